"""Pass ``plan``: which channels stay so that the network's costs fit.

Channels leave one by one on a single path (:mod:`morphgraph.passes.planning.path`), or, with scores
on one scale for the whole network, by their sum (:mod:`morphgraph.passes.planning.allocate`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.collector import without_collector
from morphgraph.graph import ChannelGraph
from morphgraph.options import Allocation, Depth, RoundTo
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.measured import MeasuredCost
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.planning.allocate import allocate
from morphgraph.passes.planning.bounds import (
    AllowedWidths,
    WidthBounds,
    Widths,
    repair_widths,
    with_multiples,
)
from morphgraph.passes.planning.build import build_plan, scores_of, top_channels
from morphgraph.passes.planning.constraints import (
    Budget,
    Constraint,
    resolve_budget,
    shown_costs,
)
from morphgraph.passes.planning.finer import warn_of_finer, within_reach
from morphgraph.passes.planning.outputs import (
    Classes,
    channels_by_index,
    request_by_index,
)
from morphgraph.passes.planning.parts import Losses
from morphgraph.passes.planning.path import RemovalPath
from morphgraph.passes.planning.same import warn_of_held
from morphgraph.passes.planning.steps import measured_steps
from morphgraph.passes.planning.ties import NONE, Ties
from morphgraph.plans import Plan


@without_collector()
def plan(
    graph: ChannelGraph,
    budget: Budget,
    *,
    score: Score | FloatArray = "l2",
    round_to: RoundTo = "auto",
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    same: Sequence[str] = (),
    keep_classes: Classes = (),
    keep_tokens: Classes = (),
    seed: int = 0,
    convention: Convention = "default",
    allocation: Allocation = "shares",
    depth: Depth = "keep",
    losses: Losses | None = None,
    ties: Ties = NONE,
) -> Plan:
    """What :func:`morphgraph.plan` gives by scores of weights, or by those given.

    ``losses`` are what the network loses with whole branches, in the unit of the scores, for the
    allocation by their sum. ``ties`` are widths that go together.
    """
    channels = channels_by_index(graph, keep_classes, keep_tokens)
    bounds = WidthBounds(
        round_to, min_width, include, exclude, widths or {}, same, channels, depth=depth, ties=ties
    )
    constraints = resolve_budget(graph, budget, convention)
    bounds = _as_measured(bounds, constraints)
    warn_of_held(graph, same, ties, bounds.allows)
    scores = scores_of(graph, score, seed)

    def choose(bounds: WidthBounds) -> tuple[AllowedWidths, dict[int, IntArray]]:
        allowed = within_reach(graph, bounds, constraints)
        if allocation == "sum":
            found = allocate(graph, scores, constraints, allowed, losses)
            return allowed, top_channels(graph, found, scores)
        path = RemovalPath(graph, [constraint.cost for constraint in constraints], scores, allowed)
        path.walk(constraints)
        path.fill(constraints)
        if len(constraints) > 1:
            path.improve(constraints)
        return allowed, path.keep()

    allowed, chosen = choose(bounds)
    found = np.array([len(each) for each in chosen.values()])
    if stricter := with_multiples(graph, bounds, found):
        allowed, chosen = choose(stricter)
    warn_of_finer(allowed, np.array([len(each) for each in chosen.values()]))
    request: dict[str, Any] = (
        {
            "budget": {kind: str(amount) for kind, amount in budget.items()},
            "score": score if isinstance(score, str) else "given",
            "round_to": round_to,
            "min_width": min_width,
            "include": list(include),
            "exclude": list(exclude),
            "seed": seed,
            "convention": convention,
        }
        | bounds.request()
        | ties.request(graph)
        | request_by_index(keep_classes, keep_tokens)
        | ({"allocation": allocation} if allocation != "shares" else {})
    )
    keep = chosen | channels
    costs = shown_costs(graph, constraints, convention)
    computed = scores if isinstance(score, str) else None
    return build_plan(graph, keep, request, costs, computed, channels)


def _as_measured(bounds: WidthBounds, constraints: Sequence[Constraint]) -> WidthBounds:
    """The bounds, with the steps of the device where a latency on a measured one is budgeted."""
    for constraint in constraints:
        if isinstance(constraint.cost, MeasuredCost):
            return replace(bounds, steps=measured_steps(constraint.cost))
    return bounds


def continue_plan(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    scores: FloatArray,
    budget: Budget,
    shown: Cost,
    bounds: WidthBounds,
) -> Plan:
    """A plan that keeps these channels, and fewer where a budget is not met yet.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay; rounding drops or restores a few.
        scores: strength per channel, ``[channels]``.
        budget: amounts to be met; may be empty.
        shown: the cost that the plan states beside the budgeted ones.
        bounds: rounding grid, floor, and the groups that may change.

    Raises:
        BudgetError: the budget cannot be met.
    """
    constraints = resolve_budget(graph, budget, "default")
    bounds = _as_measured(bounds, constraints)
    scores = scores.copy()
    allowed = within_reach(graph, bounds, constraints)
    widths = graph.widths.copy()
    for index, positions in keep.items():
        group = graph.groups[index]
        if bounds.allows(group):
            # Every channel that stays scores above all that do not, so that these leave first.
            scores[group.channels[positions]] += 1.0 + scores[group.channels].max(initial=0.0)
            widths[index] = allowed.nearest(index, len(positions))
    widths = repair_widths(widths, allowed)
    costs = [constraint.cost for constraint in constraints]
    path = RemovalPath(graph, costs or [shown], scores, allowed, widths)
    path.walk(constraints)
    request: dict[str, Any] = {"trained": True, "round_to": bounds.round_to}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    return build_plan(graph, path.keep(), request, [*costs, shown])
