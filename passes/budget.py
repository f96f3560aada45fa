"""Pass ``budget``: which channels stay so that the network's costs fit.

Channels leave one by one (or one rounding step at a time) on a single removal path, which depends
on scores, costs and options, not on the budget: a smaller budget keeps a subset of what a larger
one keeps. The next to leave is the one that the network misses least per unit of cost it frees::

    loss(channel)  = share(group) * score(channel) / live(group) / (live(group) / all(group))
    gain(channel)  = sum over budgets of dF/d(width) / F0          (live, exact)

where ``share`` is the group's width times its marginal cost in the original network, ``all`` the
sum of the group's scores and ``live`` the sum of those that are left. Scores of different layers
are not on one scale, so they count as shares of what is left of their group. The second division
keeps groups in step: in a product of two widths, halving either frees the same, and whichever came
first would shrink alone. With equal scores every group shrinks nearly alike, and the path is the
width multiplier.
"""

import fnmatch
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphgraph.errors import ArgumentError, BudgetError, MorphWarning, UnsupportedError
from morphgraph.fates import closed, is_viable
from morphgraph.graph import ChannelGraph, FloatArray, Group, IntArray
from morphgraph.onnx_io import escape
from morphgraph.passes.cost import Convention, Cost, cost
from morphgraph.passes.score import Score, score as score_channels
from morphgraph.plans import Change, Plan, make_plan, require_viable

Budget = Mapping[str, str | float | int]

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.IGNORECASE)
_SCALES = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
    "us": 1e-3,
    "ms": 1.0,
    "s": 1e3,
}
# What suffixes that are no mere multiples measure.
_MEASURES = dict.fromkeys(("kb", "mb", "gb", "kib", "mib", "gib"), "bytes")
_MEASURES |= dict.fromkeys(("us", "ms", "s"), "ms")


def parse_amount(text: str | float | int, present: float, unit_of_cost: str) -> float:
    """A budget as a number: absolute (``"300M"``, ``"5ms"``, ``2e6``) or a share (``"50%"``).

    Args:
        text: the amount; a suffix of time or memory fits costs in ``"ms"`` or ``"bytes"`` alone.
        present: what ``"100%"`` stands for.
        unit_of_cost: of ``present`` and of the result, as :class:`~morphgraph.passes.cost.Cost`
            names it.

    >>> parse_amount("50%", 80.0, "FLOPs"), parse_amount("300M", 1.0, "FLOPs")
    (40.0, 300000000.0)

    Raises:
        ArgumentError: it is no amount, or one of something else.
    """
    match = _AMOUNT.fullmatch(str(text))
    unit = match.group(2).lower() if match else "?"
    if match is None or (unit != "%" and unit not in _SCALES):
        raise ArgumentError(
            f"budget '{escape(str(text))}' is no amount; write 50%, 300M, 2e6 or 5ms"
        )
    number = float(match.group(1))
    if not math.isfinite(number) or _MEASURES.get(unit, unit_of_cost) != unit_of_cost:
        raise ArgumentError(
            f"budget '{escape(str(text))}' is no amount of {unit_of_cost}; write 50%, or a number"
        )
    return number / 100 * present if unit == "%" else number * _SCALES[unit]


@dataclass(frozen=True, slots=True)
class Limits:
    """Which widths a plan may give: rounding grid, floor, and the groups it may touch.

    With ``min_width`` 0 groups may die, where a network is left without them. ``include`` and
    ``exclude`` are globs over a group's id, name and producers.
    """

    round_to: int = 1
    min_width: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def check(self, graph: ChannelGraph) -> None:
        """Refuse a glob that names no group (a typo would go unnoticed), and a senseless grid.

        Raises:
            ArgumentError: ``round_to`` is below 1, or ``min_width`` below 0.
            UnsupportedError: ``include`` or ``exclude`` names no group.
        """
        if self.round_to < 1 or self.min_width < 0:
            raise ArgumentError(
                f"round_to={self.round_to}, min_width={self.min_width}: give whole numbers, "
                "round_to from 1, min_width from 0"
            )
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                require_match(graph, pattern, option)

    def allows(self, group: Group) -> bool:
        """Whether a plan may change the group's width."""
        wanted = not self.include or _any_match(group, self.include)
        return group.resizable and wanted and not _any_match(group, self.exclude)

    def floor(self, group: Group) -> int:
        """The smallest width that the group may get."""
        if not self.allows(group):
            return group.width
        return min(group.width, -(-self.min_width // self.round_to) * self.round_to)

    def least(self, group: Group) -> int:
        """The smallest width above 0 that the group may get."""
        return max(self.floor(group), min(group.width, self.round_to))

    def below(self, group: Group, width: int) -> int:
        """The next smaller width on the grid."""
        return max(self.floor(group), (width - 1) // self.round_to * self.round_to)

    def above(self, group: Group, width: int) -> int:
        """The next larger width on the grid, or the group's own."""
        if not self.allows(group):
            return width
        return min(group.width, (width // self.round_to + 1) * self.round_to)

    def nearest(self, group: Group, width: float) -> int:
        """The width on the grid that is nearest to a wanted one."""
        rounded = int(np.floor(width / self.round_to + 0.5)) * self.round_to
        return int(np.clip(rounded, self.floor(group), group.width))


def _any_match(group: Group, patterns: Sequence[str]) -> bool:
    names = (group.id, group.name, *group.producers)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def require_match(graph: ChannelGraph, pattern: str, option: str) -> list[Group]:
    """The groups that a glob names, by id, name or producer.

    Raises:
        UnsupportedError: there is none.
    """
    matching = [group for group in graph.groups if _any_match(group, [pattern])]
    if not matching:
        raise UnsupportedError(
            f"{option} '{escape(pattern)}': no group has that name; `analyze` lists them all"
        )
    return matching


def plan(
    graph: ChannelGraph,
    budget: Budget,
    *,
    score: Score | FloatArray = "l2",
    round_to: int = 1,
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    convention: Convention = "default",
) -> Plan:
    """The plan that meets every budget and keeps what the network uses most.

    Args:
        graph: the lifted network.
        budget: per cost (``"flops"``, ``"params"``, ...) an amount or a share of the present cost.
        score: a kind of score, or a number per channel, ``[channels]``.
        round_to: widths that change become multiples of this.
        min_width: no group gets narrower; with 0 groups may die, and layers vanish.
        include, exclude: globs over group ids, names and producers.
        seed: of ``score="random"``.
        convention: of the costs.

    Raises:
        BudgetError: no plan meets the budget; says the lowest that can be met.
        ModelError: a weight is NaN.
        UnsupportedError: unknown cost, score or amount, or a glob that names no group.
    """
    limits = Limits(round_to, min_width, tuple(include), tuple(exclude))
    limits.check(graph)
    goals = goals_of(graph, budget, convention)
    scores = _scores(graph, score, seed)
    path = _Path(graph, [goal.cost for goal in goals], scores, limits)
    path.walk(goals)
    request: dict[str, Any] = {
        "budget": {kind: str(amount) for kind, amount in budget.items()},
        "score": score if isinstance(score, str) else "given",
        "round_to": round_to,
        "min_width": min_width,
        "include": list(include),
        "exclude": list(exclude),
        "seed": seed,
        "convention": convention,
    }
    return _finish(graph, path.kept(), request, shown_costs(graph, goals, convention))


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

    Give the ``ratio`` (0 to 1), or a ``budget`` that the largest ratio is found for. What rounding
    then leaves of the budget is filled, one grid step at a time, where rounding took most: a
    baseline that wastes a part of its budget would be none. Within a group the channels with the
    highest score stay.

    Raises:
        BudgetError: no ratio meets the budget.
        UnsupportedError: the ratio is not above 0 and at most 1, or a glob names no group.
    """
    limits = Limits(round_to, min_width, tuple(include), tuple(exclude))
    limits.check(graph)
    goals = goals_of(graph, budget or {}, convention)
    fill = ratio is None
    if ratio is None:
        ratio = _largest_ratio(graph, goals, limits)
    if not 0 < ratio <= 1:
        raise UnsupportedError(
            f"uniform ratio {ratio} is out of range; give one above 0, at most 1"
        )
    widths = _scaled(graph, ratio, limits)
    if fill:
        _fill(graph, widths, goals, limits)
    request: dict[str, Any] = {"uniform": ratio, "round_to": round_to, "min_width": min_width}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    return _finish(
        graph, strongest(graph, widths, score, seed), request, shown_costs(graph, goals, convention)
    )


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
    request = {"set": dict(widths)}
    return _finish(
        graph, strongest(graph, wanted, score, seed), request, shown_costs(graph, (), "default")
    )


def continue_plan(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    scores: FloatArray,
    budget: Budget,
    shown: Cost,
    limits: Limits,
) -> Plan:
    """A plan that keeps these channels, and fewer where a budget is not met yet.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay; rounding drops or restores a few.
        scores: strength per channel, ``[channels]``.
        budget: amounts to be met; may be empty.
        shown: the cost that the plan states beside the budgeted ones.
        limits: rounding grid, floor, and the groups that may change.

    Raises:
        BudgetError: the budget cannot be met.
    """
    goals = goals_of(graph, budget, "default")
    scores = scores.copy()
    widths = graph.widths.copy()
    for index, kept in keep.items():
        group = graph.groups[index]
        if limits.allows(group):
            lifted = np.zeros(group.width)
            lifted[kept] = 1.0 + float(scores[group.channels].max(initial=0.0))
            scores[group.channels] += lifted
            widths[index] = limits.nearest(group, len(kept))
    widths = viable_widths(graph, widths, limits)
    path = _Path(graph, [goal.cost for goal in goals] or [shown], scores, limits, widths)
    path.walk(goals)
    request: dict[str, Any] = {"trained": True, "round_to": limits.round_to}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    costs = {goal.kind: goal.cost for goal in goals} | {shown.kind: shown}
    return _finish(graph, path.kept(), request, list(costs.values()))


@dataclass(frozen=True, slots=True)
class Goal:
    """A budget: a cost, and the amount that it must not exceed."""

    kind: str
    cost: Cost
    limit: float


def goals_of(graph: ChannelGraph, budget: Budget, convention: Convention) -> list[Goal]:
    """Budgets as absolute amounts; shares are of the present cost."""
    goals = []
    for kind, amount in budget.items():
        resource = cost(graph, kind, convention=convention)
        goals.append(Goal(kind, resource, parse_amount(amount, resource.total, resource.unit)))
    return goals


def viable_widths(graph: ChannelGraph, wanted: IntArray, limits: Limits) -> IntArray:
    """Wanted widths, some of them 0, made such that a network is left, ``[groups]``.

    Groups die one by one, the widest first, where they can; the others keep their least width.
    What becomes useless with them dies with them.
    """
    widths = wanted.copy()
    zero = frozenset(np.flatnonzero(widths == 0).tolist())
    dead = zero if is_viable(graph, zero) else frozenset()
    for index in sorted(zero - dead, key=lambda k: -graph.groups[k].width):
        if is_viable(graph, dead | {index}):
            dead |= {index}
        else:
            widths[index] = limits.least(graph.groups[index])
    widths[list(closed(graph, dead, _mortal(graph, limits)))] = 0
    return widths


def _mortal(graph: ChannelGraph, limits: Limits) -> list[int]:
    """Groups that may die."""
    return [group.index for group in graph.groups if limits.floor(group) == 0]


def require_reachable(graph: ChannelGraph, goals: Sequence[Goal], limits: Limits) -> None:
    """Refuse a budget that the narrowest network within the limits does not meet.

    Raises:
        BudgetError: names the budget, and the lowest that can be met.
    """
    narrowest = np.array([limits.floor(group) for group in graph.groups], dtype=np.int64)
    lowest = viable_widths(graph, narrowest, limits)
    for goal in goals:
        least = goal.cost.at(lowest)
        if least > goal.limit:
            raise _unreachable(graph, goal, least)


def _unreachable(graph: ChannelGraph, goal: Goal, least: float) -> BudgetError:
    pinned = _all_pinned(graph)
    remedy = (
        f"{pinned}; see `analyze`"
        if pinned
        else ("raise the budget, lower min-width or round-to, or exclude less")
    )
    return BudgetError(
        f"budget {goal.kind}={goal.limit:.12g} cannot be met: the lowest that can is "
        f"{least:.12g} {goal.cost.unit} ({least / goal.cost.total:.1%} of the model); {remedy}"
    )


def shown_costs(graph: ChannelGraph, goals: Sequence[Goal], convention: Convention) -> list[Cost]:
    """The costs that every plan states, and those of its budgets."""
    always = [cost(graph, kind, convention=convention) for kind in ("flops", "params")]
    return list(
        {resource.kind: resource for resource in (*always, *(g.cost for g in goals))}.values()
    )


class _Path:
    """The removal path: a state of widths that shrinks step by step."""

    def __init__(
        self,
        graph: ChannelGraph,
        costs: Sequence[Cost],
        scores: FloatArray,
        limits: Limits,
        widths: IntArray | None = None,
    ) -> None:
        self.graph = graph
        self.costs = [(resource, max(resource.total, 1e-30)) for resource in costs]
        self.limits = limits
        self.mortal = _mortal(graph, limits)
        self.widths = graph.widths.astype(np.float64)
        self.order: list[IntArray] = []
        self.prefix: list[FloatArray] = []
        for group in graph.groups:
            mine = scores[group.channels]
            order = np.argsort(mine, kind="stable")
            self.order.append(order)
            self.prefix.append(np.concatenate([[0.0], np.cumsum(np.maximum(mine[order], 0.0))]))
        share = self._marginals() * self.widths
        self.share = np.where(share > 0, share, share[share > 0].mean() if share.any() else 1.0)
        if widths is not None:
            self.widths = widths.astype(np.float64)
        self.next = np.array(
            [limits.below(g, int(w)) for g, w in zip(graph.groups, self.widths, strict=True)]
        )
        self.loss = np.array([self._loss(index) for index in range(len(graph.groups))])

    def walk(self, goals: Sequence[Goal]) -> None:
        """Go on until every budget is met."""
        if self.limits.min_width > 0:
            require_reachable(self.graph, goals, self.limits)
        while over := [goal for goal in goals if goal.cost.at(self.widths) > goal.limit]:
            if not self._step():
                raise _unreachable(self.graph, over[0], over[0].cost.at(self.widths))

    def _step(self) -> bool:
        """Remove the next channels; whether there were any that free something."""
        marginals = self._marginals()
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(marginals > 0, self.loss / marginals, np.inf)
        index = int(np.argmin(price))
        if not np.isfinite(price[index]):
            return False
        if self.next[index] == 0:
            self._kill(index)
            return True
        group = self.graph.groups[index]
        self.widths[index] = self.next[index]
        self.next[index] = self.limits.below(group, int(self.next[index]))
        self.loss[index] = self._loss(index)
        return True

    def _kill(self, index: int) -> None:
        """Let a group die, and what becomes useless with it; or never, if nothing were left.

        A set of dead groups that leaves no network leaves none with more of them.
        """
        dead = frozenset(np.flatnonzero(self.widths == 0).tolist()) | {index}
        if is_viable(self.graph, dead):
            changed = closed(self.graph, dead, self.mortal)
            self.widths[list(changed)] = 0
            self.next[list(changed)] = 0
        else:
            changed = frozenset({index})
            self.next[index] = self.widths[index]
        for other in changed:
            self.loss[other] = self._loss(other)

    def _loss(self, index: int) -> float:
        """Loss per channel of the group's next step; infinite at the floor."""
        removed = self.graph.groups[index].width - int(self.widths[index])
        step = int(self.widths[index] - self.next[index])
        if step <= 0:
            return float("inf")
        prefix = self.prefix[index]
        live = prefix[-1] - prefix[removed]
        lost = prefix[removed + step] - prefix[removed]
        fraction = lost * prefix[-1] / live**2 if live > 0 else 0.0
        return float(self.share[index] * fraction / step)

    def _marginals(self) -> FloatArray:
        """Relative cost that one channel of every group frees now, over all budgets."""
        total = np.zeros(len(self.widths))
        for resource, initial in self.costs:
            total += resource.gradient(self.widths) / initial
        return total

    def kept(self) -> dict[int, IntArray]:
        """Per group index the channels that stay."""
        return {
            group.index: np.sort(order[group.width - int(width) :])
            for group, order, width in zip(self.graph.groups, self.order, self.widths, strict=True)
        }


def strongest(
    graph: ChannelGraph, widths: IntArray, score: Score | FloatArray, seed: int = 0
) -> dict[int, IntArray]:
    """Per group index the channels with the highest scores, as many as its new width."""
    scores = _scores(graph, score, seed)
    return {
        group.index: np.sort(
            np.argsort(scores[group.channels], kind="stable")[group.width - int(width) :]
        )
        for group, width in zip(graph.groups, widths, strict=True)
    }


def _scores(graph: ChannelGraph, score: Score | FloatArray, seed: int) -> FloatArray:
    """A number per channel, computed or given."""
    if isinstance(score, str):
        return score_channels(graph, score, seed)
    given = np.asarray(score, dtype=np.float64)
    channels = len(graph.channel_group)
    if given.shape != (channels,):
        raise UnsupportedError(f"{given.size} scores for {channels} channels; give one per channel")
    if np.isnan(given).any():
        raise UnsupportedError(f"score {int(np.isnan(given).argmax())} is NaN; it cannot be ranked")
    if np.isinf(given).any():
        raise UnsupportedError(
            f"score {int(np.isinf(given).argmax())} is infinite; a score counts as a share of its "
            "group's sum, so give finite ones, and keep whole groups by `exclude`"
        )
    return given


def _scaled(graph: ChannelGraph, ratio: float, limits: Limits) -> IntArray:
    widths = [limits.nearest(group, ratio * group.width) for group in graph.groups]
    return viable_widths(graph, np.array(widths, dtype=np.int64), limits)


def _largest_ratio(graph: ChannelGraph, goals: Sequence[Goal], limits: Limits) -> float:
    """Bisect for the largest ratio whose widths meet every budget."""

    def fits(ratio: float) -> bool:
        widths = _scaled(graph, ratio, limits)
        return all(goal.cost.at(widths) <= goal.limit for goal in goals)

    low, high = 1e-9, 1.0
    if fits(high):
        return high
    require_reachable(graph, goals, limits)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fill(graph: ChannelGraph, widths: IntArray, goals: Sequence[Goal], limits: Limits) -> None:
    """Widen groups in place, the relatively narrowest first, while every budget is met.

    Those that died stay dead.
    """
    while True:
        for index in np.argsort(widths / graph.widths, kind="stable"):
            wider = widths.copy()
            wider[index] = limits.above(graph.groups[index], int(widths[index]))
            fits = all(goal.cost.at(wider) <= goal.limit for goal in goals)
            if wider[index] > widths[index] > 0 and fits:
                widths[:] = wider
                break
        else:
            return


def _finish(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    request: Mapping[str, Any],
    costs: Sequence[Cost],
) -> Plan:
    widths = graph.widths.copy()
    for index, kept in keep.items():
        widths[index] = len(kept)
    changes = {c.kind: Change(c.total, c.at(widths)) for c in costs}
    made = make_plan(graph, keep, request, changes)
    uncounted = [f"{node.ir.op_type} '{node.name}'" for node in graph.nodes if node.opaque]
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        warnings.warn(
            "operators that are not described keep their channels, and what they compute is not "
            f"counted in the budget: {escape(', '.join(uncounted[:3]))}{more}",
            MorphWarning,
            stacklevel=3,
        )
    if not made.groups:
        warnings.warn(_nothing_shrinks(graph), MorphWarning, stacklevel=3)
    return made


def _nothing_shrinks(graph: ChannelGraph) -> str:
    why = _all_pinned(graph) or "the model fits the request as it is"
    return f"the plan changes nothing: {why}"


def _all_pinned(graph: ChannelGraph) -> str:
    """The reasons why nothing can shrink; empty where something can."""
    if any(group.resizable for group in graph.groups):
        return ""
    reasons = sorted({group.reason or "" for group in graph.groups})
    return f"every group keeps its size ({'; '.join(reasons[:5])})"
