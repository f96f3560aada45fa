"""Pass ``expand``: the largest uniform width multiplier on a plan's widths that still fits.

MorphNet's third step (Gordon et al., CVPR 2018, algorithm 1): after shrinking, all widths are
multiplied by the largest omega for which F(omega * widths) stays within the budget. A width is
rounded down to its grid, so that F is a staircase in omega: the search is over its steps, and
exact. What rounding leaves of the budget is then filled, one grid step of one group at a time.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphgraph.arrays import Flags, FloatArray, IntArray
from morphgraph.errors import ArgumentError, UnsupportedError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.options import RoundTo
from morphgraph.passes.analysis.channel_sources import readers
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.coupling.roles import roles
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds
from morphgraph.passes.planning.build import scores_of, top_channels, warn_of_price
from morphgraph.passes.planning.constraints import (
    Budget,
    Constraint,
    fits,
    resolve_budget,
    shown_costs,
    spend_rest,
    unreachable,
)
from morphgraph.passes.planning.finer import within_reach
from morphgraph.passes.planning.grids import Grid
from morphgraph.passes.planning.same import require_match
from morphgraph.plans import MAX_NEW_CHANNELS, Plan, make_plan


def expand(
    graph: ChannelGraph,
    plan: Plan,
    budget: Budget,
    *,
    round_to: RoundTo = "auto",
    min_width: int = 1,
    max_growth: float | None = None,
    max_width: Mapping[str, int] | None = None,
    fill: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    same: Sequence[str] = (),
    score: Score | FloatArray = "l2",
    convention: Convention = "default",
) -> Plan:
    """Multiply a plan's widths by one factor, the largest that every budget allows.

    New channels come behind those that stay; the resized network computes what it computed before,
    since nothing reads the new channels yet. Groups for which that would not hold keep their width
    (an operator normalizes over them, sums over them without weights, or would take their copies
    for other channels), and so do pinned ones. Groups that the plan removes are not brought back.

    Args:
        graph: the network that the plan is for.
        plan: what stays of it, for example of :func:`morphgraph.plan` or ``Regularizer.plan``.
        budget: per cost an amount, or a share of the original network's.
        round_to: widths that grow become multiples of this, counted as by :func:`morphgraph.plan`.
        min_width: narrower groups are raised to this first, before any other grows; if that is
            above a budget, to the largest width that all of them can be raised to.
        max_growth: no group gets wider than this many times its width in ``graph``. Layers that
            cost little would grow without bound where shrinking and growing take turns.
        max_width: per glob over group ids, names and producers the widest that a group may get.
        fill: use what rounding leaves of the budget, one grid step of one group at a time, first
            where rounding took most. Without it, all widths are those of the multiplier.
        include, exclude: globs over group ids, names and producers.
        same: globs; all groups that one of them names have one width in ``plan``, and get one.
        score: where the plan is above a budget, so that the factor is below 1, the channels of
            highest score stay.
        convention: of the costs.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> small = mg.plan(graph, {"flops": "25%"})
    >>> wide = mg.expand(graph, small, {"flops": "50%"})
    >>> 0.49 < wide.cost["flops"].after / wide.cost["flops"].before <= 0.5
    True

    Raises:
        ArgumentError: a bound makes no sense.
        BudgetError: the plan's groups are above a budget even at their narrowest.
        PlanError: the plan is for another network.
        UnsupportedError: unknown cost or amount, or a glob that names no group.
    """
    bounds = WidthBounds(round_to, min_width, include, exclude, same=same)
    allowed = bounds.on(graph)
    constraints = resolve_budget(graph, budget, convention)
    keep: Mapping[int, IntArray] = plan.keep_channels(graph)
    kept_widths = np.array([len(keep.get(g.index, g.channels)) for g in graph.groups])
    start = plan.widths(graph)
    _require_same(start, allowed)
    if fits(constraints, start):
        widest = _widest(graph, max_growth, max_width or {})
        widest = np.minimum(widest, kept_widths + MAX_NEW_CHANNELS)
        on_grid = [allowed.grids[k].at_most(int(width)) for k, width in enumerate(widest)]
        grown = np.maximum(start, on_grid)
        ceilings = np.where(_growable(graph, bounds, keep), grown, start)
        for block in map(list, allowed.blocks):
            ceilings[block] = ceilings[block].min()
        floors = _floors(start, ceilings, constraints, bounds, allowed)
    else:
        ceilings = start
        allowed = within_reach(graph, bounds, constraints)
        # Groups that the plan keeps do not go.
        floors = np.minimum(start, [allowed.least(group.index) for group in graph.groups])
        if not fits(constraints, floors):
            remedy = "the plan's groups are at their narrowest; raise the budget, or shrink further"
            raise unreachable(constraints, floors, allowed, f"{remedy} with `plan`")
    growth = Growth(start, floors, ceilings, allowed.grids)
    omega = growth.largest(constraints)
    widths = growth.widths(omega)
    if fill:
        widths = spend_rest(constraints, widths, start, ceilings, allowed)
    if (widths < kept_widths).any():
        keep = top_channels(graph, widths, scores_of(graph, score), among=keep)
    request: dict[str, Any] = {
        "expand": {kind: str(amount) for kind, amount in budget.items()},
        "omega": omega,
        "round_to": round_to,
        "min_width": min_width,
        "max_growth": max_growth,
        "max_width": dict(max_width or {}),
        "fill": fill,
        "of": plan.request,
    } | bounds.request()
    growing = np.flatnonzero(widths > kept_widths).tolist()
    added = {index: int(widths[index] - kept_widths[index]) for index in growing}
    made = make_plan(graph, keep, request, shown_costs(graph, constraints, convention), added)
    warn_of_price(graph, made)
    return made


@dataclass(frozen=True)
class Growth:
    """The staircase of widths over omega, all arrays ``[groups]``.

    >>> even = Grid.of(2, 1, 20)
    >>> growth = Growth(np.array([3, 10]), np.array([4, 10]), np.array([9, 18]), [even, even])
    >>> growth.widths(1.0).tolist(), growth.widths(1.7).tolist(), growth.widths(5.0).tolist()
    ([4, 10], [4, 16], [9, 18])

    Attributes:
        start: the widths that omega multiplies.
        floors, ceilings: what a width is never below and never above.
        grids: of every group; products are rounded down to it.
    """

    start: IntArray
    floors: IntArray
    ceilings: IntArray
    grids: Sequence[Grid]

    def widths(self, omega: float) -> IntArray:
        """The widths at one multiplier."""
        # One part in 10^12 up: omega = k / width must give k channels, however it rounds.
        products = np.floor(omega * self.start * (1 + 1e-12)).astype(np.int64).tolist()
        widths = [grid.at_most(width) for grid, width in zip(self.grids, products, strict=True)]
        return np.clip(np.array(widths, dtype=np.int64), self.floors, self.ceilings)

    def largest(self, constraints: Sequence[Constraint]) -> float:
        """The largest omega that fits, among those at which some width changes.

        The floors must fit. Below 1 it is where the widths to start from do not.
        """
        low, high = 1.0, 2.0
        while not fits(constraints, self.widths(low)):
            low, high = low / 2, low
        while fits(constraints, self.widths(high)) and (self.widths(high) < self.ceilings).any():
            low, high = high, 2 * high
        steps = self._steps(low, high)
        # Costs grow with omega, so that the steps that fit come first; ``low`` is one of them.
        first = bisect_left(
            steps, True, key=lambda omega: not fits(constraints, self.widths(omega))
        )
        return float(steps[first - 1])

    def _steps(self, low: float, high: float) -> FloatArray:
        """The multipliers from ``low`` to ``high`` at which some width changes, ascending."""
        steps = [np.array([low])]
        for width, floor, ceiling, grid in zip(
            self.start.tolist(), self.floors, self.ceilings.tolist(), self.grids, strict=True
        ):
            if width > 0 and floor < ceiling:
                last = min(high * width, grid.at_least(ceiling))
                steps.append(grid.between(int(low * width), int(last)) / width)
        ascending = np.unique(np.concatenate(steps))
        return ascending[(ascending >= low) & (ascending <= high)]


def _widest(
    graph: ChannelGraph, max_growth: float | None, max_width: Mapping[str, int]
) -> IntArray:
    """The widest that every group may get by the user's bounds, ``[groups]``."""
    factor = math.inf if max_growth is None else max_growth
    if not factor >= 1:
        raise ArgumentError(f"max_growth={max_growth}: give a number from 1")
    products = np.floor(factor * (1 + 1e-12) * graph.widths)
    widest: IntArray = np.minimum(products, 2.0**62).astype(np.int64)
    for pattern, width in max_width.items():
        if width < 1:
            raise ArgumentError(
                f"max_width '{escape(pattern)}={width}': give a whole number from 1"
            )
        for group in require_match(graph, pattern, "max_width"):
            widest[group.index] = min(widest[group.index], width)
    return widest


def _require_same(start: IntArray, allowed: AllowedWidths) -> None:
    """Refuse a plan whose groups differ in width where they are to have one."""
    for block in allowed.blocks:
        narrow, wide = (find(block, key=lambda k: start[k]) for find in (min, max))
        if start[narrow] < start[wide]:
            few, many = (escape(allowed.graph.groups[index].name) for index in (narrow, wide))
            raise UnsupportedError(
                f"same: '{few}' has {start[narrow]} channels in the plan and '{many}' "
                f"{start[wide]}; make the plan with the same globs"
            )


def _floors(
    start: IntArray,
    ceilings: IntArray,
    constraints: Sequence[Constraint],
    bounds: WidthBounds,
    allowed: AllowedWidths,
) -> IntArray:
    """Widths with the narrowest raised to one level: ``min_width``, or as near as budgets allow."""
    least = bounds.min_width
    grid = bounds.round_to if isinstance(bounds.round_to, int) else 1
    wanted = math.ceil(least / grid) * grid
    narrow = (start > 0) & (start < np.minimum(-(-least // allowed.units), ceilings))

    def raised(level: int) -> IntArray:
        counts = (-(-level // allowed.units)).tolist()
        levels = [grid.at_least(count) for grid, count in zip(allowed.grids, counts, strict=True)]
        return np.where(narrow, np.maximum(start, np.minimum(levels, ceilings)), start)

    levels = range(wanted, 0, -grid)
    level = next((level for level in levels if fits(constraints, raised(level))), 0)
    if narrow.any() and level < wanted:
        warn(
            f"min_width={least}: the budget has no room for it; narrow groups are raised to "
            f"{level or 'no more'} channels",
        )
    return raised(level)


def _growable(graph: ChannelGraph, bounds: WidthBounds, keep: Mapping[int, IntArray]) -> Flags:
    """Groups that may grow without a change of what the network computes, ``[groups]``."""
    couplings, sums = graph.couplings, roles(graph.couplings).sums
    read = {graph.vertex_class[graph.dim(s.parameter, s.axis)] for s in readers(graph)}
    # Sums in which the new channels meet zeros: those of kernels that read them. Another sum (a
    # mean, a product of two activations) would count the copies.
    silenced = {
        edge.factor
        for edge in couplings.edges
        if couplings.on_weight(edge)
        and graph.ops[edge.op_index].macs
        and graph.vertex_class[edge.dim] in read
    }
    blocked = {
        index
        for factor in np.flatnonzero(sums).tolist()
        if factor not in silenced
        for index in graph.groups_on(factor)
    }
    free = {
        group.index
        for group in graph.groups
        if bounds.allows(group) and not group.statistical and group.index not in blocked
        # A group that keeps no channel has none to copy.
        if len(keep.get(group.index, group.channels))
    }
    while ungrowable := AxisSelection(graph, keep, dict.fromkeys(free, 1)).ungrowable(free):
        free -= ungrowable
    return np.array([group.index in free for group in graph.groups])
