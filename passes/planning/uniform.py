"""Widths without a removal path: the width multiplier, and widths by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.liveness import require_viable
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.planning.bounds import WidthBounds, repair_widths, require_match
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
from morphgraph.plans import Plan


def uniform(
    graph: ChannelGraph,
    ratio: float | None = None,
    *,
    budget: Budget | None = None,
    score: Score | FloatArray = "l2",
    round_to: int = 1,
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    convention: Convention = "default",
) -> Plan:
    """The width multiplier: every group times one ratio, the naive baseline.

    Give the ``ratio`` (0 to 1), or a ``budget`` for which the largest ratio is found. What rounding
    then leaves of the budget is spent, one grid step at a time, where rounding took most: a
    baseline that wastes a part of its budget would not be comparable. Within a group the channels
    with the highest score stay.

    Raises:
        BudgetError: no ratio meets the budget.
        UnsupportedError: the ratio is not above 0 and at most 1, or a glob names no group.
    """
    bounds = WidthBounds(round_to, min_width, include, exclude).check(graph)
    constraints = resolve_budget(graph, budget or {}, convention)
    fill = ratio is None
    if ratio is None:
        ratio = _largest_ratio(graph, constraints, bounds)
    if not 0 < ratio <= 1:
        raise UnsupportedError(
            f"uniform ratio {ratio} is out of range; give one above 0, at most 1"
        )
    widths = _scaled(graph, ratio, bounds)
    if fill:
        ceilings = np.where(bounds.allowed(graph), graph.widths, 0)
        widths = spend_rest(constraints, widths, graph.widths, ceilings, bounds)
    request: dict[str, Any] = {"uniform": ratio, "round_to": round_to, "min_width": min_width}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    keep = top_channels(graph, widths, scores_of(graph, score, seed))
    return build_plan(graph, keep, request, shown_costs(graph, constraints, convention))


def set_widths(
    graph: ChannelGraph,
    widths: Mapping[str, int],
    *,
    score: Score | FloatArray = "l2",
    seed: int = 0,
) -> Plan:
    """Widths by hand: per glob over group ids, names and producers a width, 0 where it is to go.

    Raises:
        PlanError: nothing would be left of the network.
        UnsupportedError: a glob matches no group, or a width does not fit.
    """
    wanted = graph.widths.copy()
    for pattern, width in widths.items():
        matching = require_match(graph, pattern, "set")
        free = [group for group in matching if group.resizable]
        if not free:
            raise UnsupportedError(
                f"set '{escape(pattern)}': '{escape(matching[0].name)}' cannot be resized "
                f"({matching[0].reason})"
            )
        for group in free:
            if not 0 <= width <= group.width:
                raise UnsupportedError(
                    f"set '{escape(pattern)}={width}': '{escape(group.name)}' has "
                    f"{group.width} channels; give a width from 0 to that"
                )
            wanted[group.index] = width
    require_viable(graph, np.flatnonzero(wanted == 0).tolist())
    keep = top_channels(graph, wanted, scores_of(graph, score, seed))
    return build_plan(graph, keep, {"set": dict(widths)}, shown_costs(graph, (), "default"))


def _scaled(graph: ChannelGraph, ratio: float, bounds: WidthBounds) -> IntArray:
    widths = [bounds.nearest(group, ratio * group.width) for group in graph.groups]
    return repair_widths(graph, np.array(widths, dtype=np.int64), bounds)


def _largest_ratio(
    graph: ChannelGraph, constraints: Sequence[Constraint], bounds: WidthBounds
) -> float:
    """Bisect for the largest ratio whose widths meet every budget."""

    def allowed(ratio: float) -> bool:
        return fits(constraints, _scaled(graph, ratio, bounds))

    low, high = 1e-9, 1.0
    if allowed(high):
        return high
    require_reachable(graph, constraints, bounds)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
