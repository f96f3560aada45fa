"""Pass ``expand``: the largest uniform width multiplier on a plan's widths that still fits.

MorphNet's third step (Gordon et al., CVPR 2018, algorithm 1): after shrinking, all widths are
multiplied by the largest omega for which F(omega * widths) stays within the budget.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph, IntArray
from morphgraph.passes.cost import Convention
from morphgraph.passes.goals import Budget, Goal, goals_of, shown_costs
from morphgraph.passes.kept import Kept
from morphgraph.passes.limits import Limits
from morphgraph.passes.score import readers
from morphgraph.plans import Change, Plan, make_plan

_WIDEST = 1e4  # times; a budget that allows more is no budget


def expand(
    graph: ChannelGraph,
    plan: Plan,
    budget: Budget,
    *,
    round_to: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    convention: Convention = "default",
) -> Plan:
    """Widen a plan's groups by one multiplier, as far as every budget allows.

    Groups grow behind the channels that stay; the resized network computes what it computed
    before, since nothing reads the new channels yet. Groups of which that could not be said keep
    their width (an operator normalizes over them, sums over them without weights, or would take
    their copies for other channels), and so do pinned ones.

    Args:
        graph: the network that the plan is for.
        plan: what stays of it, for example of :func:`morphgraph.plan` or ``Regularizer.plan``.
        budget: per cost an amount, or a share of the original network's.
        round_to: widths that grow become multiples of this.
        include, exclude: globs over group ids, names and producers.
        convention: of the costs.

    >>> import morphgraph as mg
    >>> from morphgraph.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> small = mg.plan(graph, {"flops": "25%"})
    >>> wide = mg.expand(graph, small, {"flops": "50%"})
    >>> 0.4 < wide.cost["flops"].after / wide.cost["flops"].before <= 0.5
    True

    Raises:
        BudgetError: the plan is above a budget already.
        PlanError: the plan is for another network.
        UnsupportedError: unknown cost or amount, or a glob that names no group.
    """
    limits = Limits(round_to, 1, tuple(include), tuple(exclude))
    limits.check(graph)
    goals = goals_of(graph, budget, convention)
    start = plan.widths(graph)
    keep = plan.kept(graph)
    free = _growable(graph, limits, keep)
    _check(goals, start)
    omega = _largest(start, free, goals, round_to)
    widths = _scaled(start, free, omega, round_to)
    kept = np.array([len(keep.get(g.index, g.channels)) for g in graph.groups])
    added = {int(k): int(widths[k] - kept[k]) for k in np.flatnonzero(widths > kept)}
    request: dict[str, Any] = {
        "expand": {kind: str(amount) for kind, amount in budget.items()},
        "omega": omega,
        "round_to": round_to,
        "of": plan.request,
    }
    costs = shown_costs(graph, goals, convention)
    changes = {c.kind: Change(c.total, c.at(widths)) for c in costs}
    return make_plan(graph, keep, request, changes, added)


def _growable(
    graph: ChannelGraph, limits: Limits, keep: Mapping[int, IntArray]
) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Groups that may grow without a change of what the network computes, ``[groups]``."""
    silent = {
        graph.node_class[graph.dim(source.parameter, source.axis)] for source in readers(graph)
    }
    couplings = graph.couplings
    covered: set[int] = set()
    summed: set[int] = set()
    for edge in couplings.edges:
        node = graph.nodes[edge.node]
        if couplings.factors[edge.factor - len(couplings.dims)].name not in node.contracted:
            continue
        summed.add(edge.factor)
        weight = couplings.dims[edge.dim].value in couplings.weights
        if weight and node.macs and graph.node_class[edge.dim] in silent:
            covered.add(edge.factor)
    blocked: set[int] = set()
    matrix = graph.per_channel
    for factor in summed - covered:
        kind = graph.node_class[factor]
        blocked.update(matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist())
    free = {
        group.index
        for group in graph.groups
        if limits.allows(group) and not group.statistical and group.index not in blocked
        # A group that keeps no channel has none to copy.
        if len(keep.get(group.index, group.channels))
    }
    while misfits := Kept(graph, keep, dict.fromkeys(free, 1)).misfits(free):
        free -= misfits
    return np.array([group.index in free for group in graph.groups])


def _scaled(
    start: IntArray, free: "np.ndarray[Any, np.dtype[np.bool_]]", omega: float, round_to: int
) -> IntArray:
    """Widths times omega, on the grid, never below where they started."""
    wanted = np.floor(omega * start / round_to + 1e-9).astype(np.int64) * round_to
    widths: IntArray = np.where(free, np.maximum(start, wanted), start)
    return widths


def _largest(
    start: IntArray,
    free: "np.ndarray[Any, np.dtype[np.bool_]]",
    goals: Sequence[Goal],
    round_to: int,
) -> float:
    """The largest omega that fits, among those at which some width changes."""

    def fits(omega: float) -> bool:
        widths = _scaled(start, free, omega, round_to)
        return all(goal.cost.at(widths) <= goal.limit for goal in goals)

    high = 2.0
    while high < _WIDEST and fits(high):
        high *= 2
    steps = [
        np.arange(1, int(high * width / round_to) + 1) * round_to / width for width in start[free]
    ]
    candidates = np.unique(np.concatenate([np.ones(1), *steps]))
    candidates = candidates[(candidates >= 1) & (candidates <= high)]
    # Costs grow with omega, so that the candidates that fit come first.
    first = bisect_left(candidates, True, key=lambda omega: not fits(float(omega)))
    return float(candidates[max(first - 1, 0)])


def _check(goals: Sequence[Goal], widths: IntArray) -> None:
    for goal in goals:
        need = goal.cost.at(widths)
        if need > goal.limit:
            raise BudgetError(
                f"budget {goal.kind}={goal.limit:.12g} cannot be met: the plan needs {need:.12g} "
                f"{goal.cost.unit} before it grows; raise the budget, or shrink further with `plan`"
            )
