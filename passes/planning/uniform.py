"""Widths without a removal path: the width multiplier, and widths by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.options import RoundTo
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.planning.bounds import (
    BY_HAND,
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
    fits,
    require_reachable,
    resolve_budget,
    shown_costs,
    spend_rest,
)
from morphgraph.passes.planning.finer import warn_of_finer, within_reach
from morphgraph.passes.planning.outputs import (
    Classes,
    channels_by_index,
    request_by_index,
)
from morphgraph.passes.planning.ties import NONE, Ties
from morphgraph.plans import Plan


def uniform(
    graph: ChannelGraph,
    ratio: float | None = None,
    *,
    budget: Budget | None = None,
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
    ties: Ties = NONE,
) -> Plan:
    """The width multiplier: every group times one ratio, the naive baseline.

    Give the ``ratio`` (0 to 1), or a ``budget`` for which the largest ratio is found. What rounding
    then leaves of the budget is spent, one grid step at a time, where rounding took most: a
    baseline that wastes a part of its budget would not be comparable. Within a group the channels
    with the highest score stay. ``widths``, ``same``, ``keep_classes`` and
    ``keep_tokens`` are those of :func:`morphgraph.plan`; groups whose width is given by hand are
    not multiplied.

    Raises:
        BudgetError: no ratio meets the budget.
        PlanError: with the widths by hand nothing would be left of the network.
        UnsupportedError: the ratio is not above 0 and at most 1, or a glob names no group.
    """
    channels = channels_by_index(graph, keep_classes, keep_tokens)
    bounds = WidthBounds(
        round_to, min_width, include, exclude, widths or {}, same, channels, ties=ties
    )
    constraints = resolve_budget(graph, budget or {}, convention)
    if ratio is not None:
        # Widths by hand, as it were: on a grid, but not one that would keep them as they are.
        bounds = replace(bounds, finer=dict.fromkeys(range(len(graph.groups)), BY_HAND))
    asked = ratio

    def choose(bounds: WidthBounds) -> tuple[float, IntArray]:
        allowed = within_reach(graph, bounds, constraints)
        ratio = _largest_ratio(constraints, allowed) if asked is None else asked
        if not 0 < ratio <= 1:
            raise UnsupportedError(
                f"uniform ratio {ratio} is out of range; give one above 0, at most 1"
            )
        scaled = _scaled(ratio, allowed)
        if asked is None:
            scaled = spend_rest(constraints, scaled, graph.widths, allowed.ceilings, allowed)
            warn_of_finer(allowed, scaled)
        return ratio, scaled

    ratio, scaled = choose(bounds)
    if stricter := with_multiples(graph, bounds, scaled):
        ratio, scaled = choose(stricter)
    request: dict[str, Any] = {"uniform": ratio, "round_to": round_to, "min_width": min_width}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    request |= bounds.request() | request_by_index(keep_classes, keep_tokens)
    request |= ties.request(graph)
    scores = scores_of(graph, score, seed)
    keep = top_channels(graph, scaled, scores) | channels
    computed = scores if isinstance(score, str) else None
    costs = shown_costs(graph, constraints, convention)
    return build_plan(graph, keep, request, costs, computed, channels)


def set_widths(
    graph: ChannelGraph,
    widths: Widths,
    *,
    score: Score | FloatArray = "l2",
    seed: int = 0,
) -> Plan:
    """Widths by hand alone: per glob over group ids, names and producers a width, 0 to remove it.

    Raises:
        PlanError: nothing would be left of the network.
        UnsupportedError: a glob matches no group, or a width does not fit.
    """
    bounds = WidthBounds(widths=widths)
    scores = scores_of(graph, score, seed)
    keep = top_channels(graph, bounds.on(graph).ceilings, scores)
    computed = scores if isinstance(score, str) else None
    costs = shown_costs(graph, (), "default")
    return build_plan(graph, keep, bounds.request(), costs, computed)


def _scaled(ratio: float, allowed: AllowedWidths) -> IntArray:
    present = allowed.graph.widths.tolist()
    widths = [allowed.nearest(index, ratio * width) for index, width in enumerate(present)]
    return repair_widths(np.array(widths, dtype=np.int64), allowed)


def _largest_ratio(constraints: Sequence[Constraint], allowed: AllowedWidths) -> float:
    """Bisect for the largest ratio whose widths meet every budget."""

    def fitting(ratio: float) -> bool:
        return fits(constraints, _scaled(ratio, allowed))

    low, high = 1e-9, 1.0
    if fitting(high):
        return high
    require_reachable(constraints, allowed)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low
