"""Finer steps where those that suit best leave a budget no room, for as few groups as possible."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from morphgraph.errors import warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.along import WidthsAlong
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds
from morphgraph.passes.planning.constraints import Constraint, fits, fits_along
from morphgraph.passes.planning.steps import common

_NAMED = 3  # groups that a warning names


def within_reach(
    graph: ChannelGraph, bounds: WidthBounds, constraints: Sequence[Constraint]
) -> AllowedWidths:
    """The widths that a plan may give, with finer steps where ``"auto"``'s miss a budget.

    All groups together take the coarsest level at which the budgets can be met, and then as few of
    them as possible, first those that save most by it; the others stay one level above. A budget
    that no level meets is left to the caller to refuse.
    """
    allowed = bounds.on(graph)
    if not allowed.is_auto or _reaches(allowed, constraints):
        return allowed
    steps = [common([bounds.steps_of(graph)[k] for k in block]) for block in allowed.blocks]
    before: dict[int, int] = {}
    for level in range(max((len(each.sizes) for each in steps), default=0) - 2, -1, -1):
        at = {k: level for block in allowed.blocks for k in block}
        allowed = replace(bounds, finer=at).on(graph)
        if _reaches(allowed, constraints):
            return _fewest(graph, bounds, constraints, allowed, before, level)
        before = at
    return allowed


def _reaches(allowed: AllowedWidths, constraints: Sequence[Constraint]) -> bool:
    return fits(constraints, allowed.lowest())


def _fewest(
    graph: ChannelGraph,
    bounds: WidthBounds,
    constraints: Sequence[Constraint],
    fine: AllowedWidths,
    before: Mapping[int, int],
    level: int,
) -> AllowedWidths:
    """As few groups as possible at a level, the others as they were before."""
    coarse = replace(bounds, finer=before).on(graph)
    low, high = fine.floors, coarse.floors
    missed = [each for each in constraints if not each.holds(coarse.lowest())]
    state = WidthsAlong([each.cost for each in constraints], high)
    most = [state[each.cost].at for each in missed]

    def saved(block: Sequence[int]) -> float:
        state.move(block, low[list(block)])
        shares = [(at - state[c.cost].at) / c.limit for c, at in zip(missed, most, strict=True)]
        state.move(block, high[list(block)])
        return sum(shares)

    blocks = [block for block in fine.blocks if (low < high)[list(block)].any()]
    first = sorted(blocks, key=saved, reverse=True)
    taken: list[tuple[int, ...]] = []
    for block in first:
        if fits_along(constraints, state):
            break
        state.move(block, low[list(block)])
        taken.append(block)
    for block in list(taken):
        state.move(block, high[list(block)])
        if fits_along(constraints, state):
            taken.remove(block)
        else:
            state.move(block, low[list(block)])
    finer = dict(before) | {k: level for block in taken for k in block}
    chosen = replace(bounds, finer=finer).on(graph)
    return chosen if _reaches(chosen, constraints) else fine


def warn_of_finer(allowed: AllowedWidths, widths: np.ndarray) -> None:
    """Say which groups left the steps that suit them for the budget's sake."""
    graph, bounds = allowed.graph, allowed.bounds
    best = replace(bounds, finer={}).on(graph)
    found = [
        f"'{escape(graph.groups[k].name)}' {width}"
        for k, width in enumerate(widths.tolist())
        if 0 < width < best.floors[k]
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        warn(
            "the budget is below what the grid of --round-to auto can reach; finer widths: "
            f"{', '.join(found[:_NAMED])}{more}",
        )
