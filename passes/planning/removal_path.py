"""Pass ``plan``: which channels stay so that the network's costs fit.

Channels leave one by one (or one rounding step at a time) on a single removal path, which depends
on scores, costs and options, not on the budget: a smaller budget keeps a subset of what a larger
one keeps. The next to leave is the one whose loss per unit of saved cost is the lowest::

    loss(channel)  = share(group) * score(channel) / live(group) / (live(group) / all(group))
    gain(channel)  = sum over budgets of dF/d(width) / F0          (live, exact)

where ``share`` is the group's width times its marginal cost in the original network, ``all`` the
sum of the group's scores and ``live`` the sum of those that are left. Scores of different layers
are not on one scale, so they count as shares of what is left of their group. The second division
keeps groups in step: in a product of two widths, halving either frees the same, and whichever came
first would shrink alone. With equal scores every group shrinks nearly alike, and the path is the
width multiplier. Groups that are to have one width step together: their losses and their gains add
up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.options import Allocation, RoundTo
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.liveness import is_viable, with_orphans
from morphgraph.passes.analysis.measured import MeasuredCost
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.planning.allocate import allocate
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds, Widths, repair_widths
from morphgraph.passes.planning.build import build_plan, scores_of, top_channels
from morphgraph.passes.planning.constraints import (
    Budget,
    Constraint,
    fits,
    require_reachable,
    resolve_budget,
    shown_costs,
    unreachable,
)
from morphgraph.passes.planning.finer import warn_of_finer, within_reach
from morphgraph.passes.planning.outputs import (
    Classes,
    channels_by_index,
    request_by_index,
)
from morphgraph.passes.planning.steps import measured_steps
from morphgraph.plans import Plan


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
) -> Plan:
    """What :func:`morphgraph.plan` gives by scores of weights, or by those given."""
    channels = channels_by_index(graph, keep_classes, keep_tokens)
    bounds = WidthBounds(round_to, min_width, include, exclude, widths or {}, same, channels)
    constraints = resolve_budget(graph, budget, convention)
    bounds = _as_measured(bounds, constraints)
    allowed = within_reach(graph, bounds, constraints)
    scores = scores_of(graph, score, seed)
    if allocation == "sum":
        widths_now = allocate(graph, scores, constraints, allowed)
        chosen = top_channels(graph, widths_now, scores)
    else:
        path = _Path(graph, [constraint.cost for constraint in constraints], scores, allowed)
        path.walk(constraints)
        path.fill(constraints)
        chosen = path.keep()
    warn_of_finer(allowed, np.array([len(each) for each in chosen.values()]), 2)
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
    path = _Path(graph, costs or [shown], scores, allowed, widths)
    path.walk(constraints)
    request: dict[str, Any] = {"trained": True, "round_to": bounds.round_to}
    if budget:
        request["budget"] = {kind: str(amount) for kind, amount in budget.items()}
    return build_plan(graph, path.keep(), request, [*costs, shown])


#: A group loses its channels in so many steps at least, where it has so many.
ROUNDS = 128


class _Path:
    """The removal path: a state of widths that shrinks step by step."""

    def __init__(
        self,
        graph: ChannelGraph,
        costs: Sequence[Cost],
        scores: FloatArray,
        allowed: AllowedWidths,
        widths: IntArray | None = None,
    ) -> None:
        self.graph = graph
        self.costs = [(resource, max(resource.total, 1e-30)) for resource in costs]
        self.scores = scores
        self.allowed = allowed
        self.removable = allowed.removable()
        self.coarse = allowed.chosen_coarse()
        self.block_of = np.zeros(len(graph.groups), dtype=np.int64)
        for number, block in enumerate(allowed.blocks):
            self.block_of[list(block)] = number
        self.widths = graph.widths.astype(np.float64)
        ascending = [np.sort(scores[group.channels], kind="stable") for group in graph.groups]
        # Per group the summed scores of its k weakest channels, for k from 0 to its width.
        self.prefix = [np.append(0.0, np.cumsum(np.maximum(s, 0.0))) for s in ascending]
        share = self._marginals() * self.widths
        self.share = np.where(share > 0, share, share[share > 0].mean() if share.any() else 1.0)
        self.widths = (allowed.ceilings if widths is None else widths).astype(np.float64)
        self.next = np.array([self._below(k, int(w)) for k, w in enumerate(self.widths)])
        self.loss = np.array([self._loss(index) for index in range(len(graph.groups))])

    def walk(self, constraints: Sequence[Constraint]) -> None:
        """Go on until every budget is met."""
        if not self.removable:
            require_reachable(constraints, self.allowed)
        before = self.widths.copy()
        while not fits(constraints, self.widths):
            before = self.widths.copy()
            if not self._step():
                raise unreachable(constraints, self.widths, self.allowed)
        self._only_as_far(constraints, before)

    def _only_as_far(self, constraints: Sequence[Constraint], before: FloatArray) -> None:
        """Of a last step of several channels take no more than the budgets ask for."""
        after = self.widths
        changed = np.flatnonzero((after < before) & (after > 0)).tolist()
        now = before.copy()
        while changed and not fits(constraints, np.where(after > 0, now, after)):
            for index in changed:
                now[index] = max(after[index], self.allowed.below(index, int(now[index])))
        self.widths = np.where(after > 0, now, after)

    def fill(self, constraints: Sequence[Constraint]) -> None:
        """Give back what coarse steps took too much, first where most was lost for the cost.

        Only steps that were chosen for each group: with one number for the whole network, plans of
        smaller budgets keep subsets, which this would end.
        """
        blocks = [list(block) for block in self.allowed.blocks if self.coarse[list(block)].all()]
        while blocks:
            gains = self._marginals()
            offers = sorted((self._offer(block, gains) for block in blocks), reverse=True)
            blocks = []
            for number, (worth, block, wider) in enumerate(offers):
                before = self.widths[block].copy()
                if worth > 0:
                    self.widths[block] = wider
                    if fits(constraints, self.widths):
                        blocks = [each for _, each, _ in offers[number:]]
                        break
                    self.widths[block] = before

    def _offer(self, block: list[int], gains: FloatArray) -> tuple[float, list[int], list[int]]:
        """What the next wider widths of a block win for their cost; nothing at its ceiling."""
        now = self.widths[block].astype(int).tolist()
        wider = [
            min(int(self.allowed.ceilings[k]), self.allowed.grids[k].above(width))
            for k, width in zip(block, now, strict=True)
        ]
        if now == wider or 0 in now:
            return 0.0, block, now
        won = sum(self._step_loss(*each) for each in zip(block, wider, now, strict=True))
        return won / max(float(gains[block] @ np.subtract(wider, now)), 1e-30), block, wider

    def _below(self, index: int, width: int) -> int:
        """The next smaller width: of a wide group, several channels go at a time."""
        floor, wide = int(self.allowed.floors[index]), self.graph.groups[index].width
        below = self.allowed.below(index, width)
        aim = width - max(1, wide // ROUNDS)
        if floor < aim < below:
            below = max(floor, self.allowed.grids[index].at_most(aim))
        return below

    def _step(self) -> bool:
        """Remove the next channels; whether there were any that free something."""
        gains = np.bincount(self.block_of, self._marginals())
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(gains > 0, np.bincount(self.block_of, self.loss) / gains, np.inf)
        cheapest = int(np.argmin(price))
        if not np.isfinite(price[cheapest]):
            return False
        for index in self.allowed.blocks[cheapest]:
            if self.next[index] == 0:
                self._remove_group(index)  # a block by itself: others keep one channel
                continue
            self.widths[index] = self.next[index]
            self.next[index] = self._below(index, int(self.next[index]))
            self.loss[index] = self._loss(index)
        return True

    def _remove_group(self, index: int) -> None:
        """Remove a group, and those that it orphans; or fix its width, if nothing would be left.

        For good: what leaves no network leaves none after more groups have gone.
        """
        dead = frozenset(np.flatnonzero(self.widths == 0).tolist()) | {index}
        if is_viable(self.graph, dead):
            changed = with_orphans(self.graph, dead, self.removable)
            self.widths[list(changed)] = 0
            self.next[list(changed)] = 0
        else:
            changed = frozenset({index})
            self.next[index] = self.widths[index]
        for other in changed:
            self.loss[other] = self._loss(other)

    def _loss(self, index: int) -> float:
        """Loss per channel of the group's next step; infinite at the floor."""
        width, below = int(self.widths[index]), int(self.next[index])
        step = width - below
        return self._step_loss(index, width, below) / step if step > 0 else float("inf")

    def _step_loss(self, index: int, width: int, below: int) -> float:
        """What a group loses from one width to a smaller one."""
        wide, prefix = self.graph.groups[index].width, self.prefix[index]
        live = prefix[-1] - prefix[wide - width]
        lost = prefix[wide - below] - prefix[wide - width]
        fraction = lost * prefix[-1] / live**2 if live > 0 else 0.0
        return float(self.share[index] * fraction)

    def _marginals(self) -> FloatArray:
        """Relative cost that one channel of every group frees now, over all budgets."""
        total = np.zeros(len(self.widths))
        for resource, initial in self.costs:
            total += resource.gradient(self.widths) / initial
        return total

    def keep(self) -> dict[int, IntArray]:
        """Per group index the channels that stay."""
        return top_channels(self.graph, self.widths.astype(np.int64), self.scores)
