"""The removal path: channels leave one by one until the budget is met.

Channels leave one by one (or one rounding step at a time) on a single path, which depends
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

Whole branches of a residual network, where they may go, are further steps of the path, each at a
price of its own (:mod:`morphgraph.passes.planning.parts`).

Several budgets are rarely met at one place of a path. There the path is a first answer, from which
the widths with the least loss are found (:mod:`morphgraph.passes.planning.exact`); plans of smaller
budgets need not keep subsets then.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.along import WidthsAlong
from morphgraph.passes.analysis.liveness import is_viable, with_orphans
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.planning.bounds import AllowedWidths
from morphgraph.passes.planning.build import top_channels
from morphgraph.passes.planning.constraints import (
    Constraint,
    fits_along,
    require_reachable,
    unreachable,
)
from morphgraph.passes.planning.exact import improved
from morphgraph.passes.planning.lowest import Lowest
from morphgraph.passes.planning.parts import AVERAGE, Parts, weigh

#: A group loses its channels in so many steps at least, where it has so many.
ROUNDS = 128
#: Branches are priced anew when so large a share of the cost has gone.
PART_STEP = 1 / 64


class RemovalPath:
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
        self.first_of = np.array([block[0] for block in allowed.blocks], dtype=np.int64)
        # Of groups that change by one ratio, the steps by those of the block's first.
        firsts = self.first_of[self.block_of]
        self.ratio = graph.widths / np.maximum(graph.widths[firsts], 1)
        self.lead = {k: int(firsts[k]) for k in np.flatnonzero(self.ratio != 1).tolist()}
        shared = np.array([len(block) > 1 for block in allowed.blocks], dtype=bool)
        self.shared = shared if shared.any() else None
        ascending = [np.sort(scores[group.channels], kind="stable") for group in graph.groups]
        # Per group the summed scores of its k weakest channels, for k from 0 to its width.
        self.prefix = [np.append(0.0, np.cumsum(np.maximum(s, 0.0))) for s in ascending]
        slopes = self._relative(lambda cost: cost.gradient(graph.widths), len(graph.groups))
        share = slopes * graph.widths
        self.share = np.where(share > 0, share, share[share > 0].mean() if share.any() else 1.0)
        self.members = [list(block) for block in allowed.blocks]  # those that are left
        begin = allowed.ceilings if widths is None else widths
        self.state = WidthsAlong(costs, begin, *([0] if allowed.parts else []))
        self.widths = self.state.widths  # changed by the state alone
        self.gains = np.zeros(len(graph.groups))
        self._regain(np.arange(len(graph.groups)))
        self.next = np.array([self._below(k, int(w)) for k, w in enumerate(self.widths)])
        self.loss = np.array([self._loss(index) for index in range(len(graph.groups))])
        self.prices = Lowest(len(allowed.blocks))
        self._reprice(np.arange(len(graph.groups)))
        self.parts = Parts(allowed.parts, costs)
        saved = [self._saved(number) for number in range(len(allowed.parts))]
        self.part_loss = AVERAGE * np.array(saved) * weigh(graph, allowed.parts, scores)
        self.part_prices = np.full(len(saved), np.inf)
        self.part_cost = np.inf  # at which those were computed

    def walk(self, constraints: Sequence[Constraint]) -> None:
        """Go on until every budget is met."""
        if not self.removable:
            require_reachable(constraints, self.allowed)
        before: Mapping[int, float] = {}
        while not fits_along(constraints, self.state):
            stepped = self._step()
            if stepped is None:
                raise unreachable(constraints, self.widths, self.allowed)
            before = stepped
        self._only_as_far(constraints, before)

    def _only_as_far(self, constraints: Sequence[Constraint], before: Mapping[int, float]) -> None:
        """Of a last step of several channels take no more than the budgets ask for.

        Args:
            constraints: budgets, which the present widths meet.
            before: what the groups of that step had before it.
        """
        after = {k: int(self.widths[k]) for k in sorted(before) if 0 < self.widths[k] < before[k]}
        now = {index: int(before[index]) for index in after}
        if after:
            self._move(list(after), list(now.values()))
        while after and not fits_along(constraints, self.state):
            now = {k: max(after[k], self.allowed.below(k, width)) for k, width in now.items()}
            self._move(list(after), list(now.values()))

    def fill(self, constraints: Sequence[Constraint]) -> None:
        """Give back what coarse steps took too much, first where most was lost for the cost.

        Only steps that were chosen for each group: with one number for the whole network, plans of
        smaller budgets keep subsets, which this would end.
        """
        blocks = {
            number: block
            for number, block in enumerate(self.members)
            if block and self.coarse[block].all()
        }
        # A block that did not fit is not tried again: costs only grow from here on.
        open_ = set(blocks)
        offers = [(*self._offer(blocks[number]), number) for number in blocks]
        heapq.heapify(offers)
        while offers:
            worth, first, wider, number = heapq.heappop(offers)
            block = blocks[number]
            if number not in open_ or (worth, first, wider) != self._offer(block):
                continue
            if worth >= 0:
                break
            before = self.widths[block]
            changed = self.state.move(block, wider)
            if fits_along(constraints, self.state):
                self._regain(changed)
                again = open_.intersection(self.block_of[changed].tolist()) | {number}
                for each in again:
                    heapq.heappush(offers, (*self._offer(blocks[each]), each))
            else:
                self.state.move(block, before)
                open_.remove(number)

    def improve(self, constraints: Sequence[Constraint]) -> None:
        """Take the widths that lose least within several budgets, where few are to choose from.

        The path weighs all budgets alike, and ends where the last is met: others may be met by far
        then. Its losses, step by step, add up to ``share * (all / live - 1)``.
        """

        def loss(index: int, width: int) -> float:
            prefix = self.prefix[index]
            live = prefix[-1] - prefix[self.graph.groups[index].width - width]
            return float(self.share[index] * (prefix[-1] / live - 1.0)) if live > 0 else 0.0

        better = improved(self.widths.astype(np.int64), loss, constraints, self.allowed)
        changed = np.flatnonzero(better != self.widths)
        self.state.move(changed.tolist(), better[changed].astype(np.float64))

    def _offer(self, block: list[int]) -> tuple[float, int, list[int]]:
        """What the next wider widths of a block win for their cost; nothing at its ceiling.

        Returns:
            The negative of that, and of the block's first group: the least offer is the first; and
            the widths.
        """
        now = self.widths[block].astype(int).tolist()
        wider = [
            min(int(self.allowed.ceilings[k]), self.allowed.grids[k].above(width))
            for k, width in zip(block, now, strict=True)
        ]
        if now == wider or 0 in now:
            return 0.0, -block[0], now
        won = sum(self._step_loss(*each) for each in zip(block, wider, now, strict=True))
        cost = float(self.gains[block] @ np.subtract(wider, now))
        return -won / max(cost, 1e-30), -block[0], wider

    def _below(self, index: int, width: int) -> int:
        """The next smaller width: of a wide group, several channels go at a time."""
        floor, wide = int(self.allowed.floors[index]), self.graph.groups[index].width
        if index in self.lead:
            first = self.lead[index]
            whole = self.graph.groups[first].width
            return self._below(first, width * whole // wide) * wide // whole
        below = self.allowed.below(index, width)
        aim = width - max(1, wide // ROUNDS)
        if floor < aim < below:
            below = max(floor, self.allowed.grids[index].at_most(aim))
        return below

    def _step(self) -> Mapping[int, float] | None:
        """Remove the next channels.

        Returns:
            The widths that the groups had which lost some; ``None``: there is nothing that frees
            something.
        """
        cheapest, price = self.prices.least
        part = self._cheapest_part()
        if part is not None and self.part_prices[part] < price:
            return self._remove_part(part)
        if not np.isfinite(price):
            return None
        before = {}
        for index in self.members[cheapest]:
            if self.next[index] == 0:
                return self._remove_group(index)  # a block by itself: others keep one channel
            before[index] = float(self.widths[index])
        block = list(before)
        wanted = self.next[block]
        self.next[block] = [self._below(k, w) for k, w in zip(block, wanted.tolist(), strict=True)]
        self._move(block, wanted)
        return before

    def _remove_group(self, index: int) -> Mapping[int, float]:
        """Remove a group, and those that it orphans; or fix its width, if nothing would be left.

        For good: what leaves no network leaves none after more groups have gone.
        """
        dead = frozenset(np.flatnonzero(self.widths == 0).tolist()) | {index}
        if not is_viable(self.graph, dead):
            self.next[index] = self.widths[index]
            self._move([index], self.widths[[index]])
            return {}
        return self._let_die(dead)

    def _let_die(self, dead: Iterable[int]) -> Mapping[int, float]:
        """Give groups width 0, and those that are orphaned by that."""
        changed = sorted(with_orphans(self.graph, dead, self.removable))
        before = dict(zip(changed, self.widths[changed].tolist(), strict=True))
        self.next[changed] = 0
        if self.shared is not None:
            for index in changed:
                number = self.block_of[index]
                if self.shared[number] and index in self.members[number]:
                    self.members[number].remove(index)
        self._move(changed, np.zeros(len(changed)))
        return before

    # -- whole branches and blocks -------------------------------------------------------------

    def _saved(self, number: int) -> float:
        """The relative cost that goes with a part at the present widths."""
        return sum(self.parts.saved(self.state, number, c) / initial for c, initial in self.costs)

    def _cheapest_part(self) -> int | None:
        """The part that loses least for what it saves; priced anew when that has changed a bit."""
        if not len(self.part_prices):
            return None
        now = sum(self.state[resource].at / initial for resource, initial in self.costs)
        if now < self.part_cost * (1 - PART_STEP):
            self.part_cost = now
            self.part_prices[:] = [self._part_price(n) for n in range(len(self.part_prices))]
        return int(np.argmin(self.part_prices))

    def _part_price(self, number: int) -> float:
        groups = self.parts.groups[number]
        saved = self._saved(number) if self.widths[groups].all() else 0.0
        if np.isnan(self.part_loss[number]) or saved <= 0:
            return np.inf
        lost = sum(self._lost(index) for index in groups.tolist())
        return max(float(self.part_loss[number]) - lost, 0.0) / saved

    def _lost(self, index: int) -> float:
        """What a group has lost so far."""
        prefix, wide = self.prefix[index], self.graph.groups[index].width
        live = prefix[-1] - prefix[wide - int(self.widths[index])]
        return float(self.share[index] * (prefix[-1] / live - 1.0)) if live > 0 else 0.0

    def _remove_part(self, number: int) -> Mapping[int, float]:
        """Remove a branch or a block; or never, if nothing would be left."""
        zero = frozenset(np.flatnonzero(self.widths == 0).tolist())
        dead = zero | set(self.parts.groups[number].tolist())
        self.part_loss[number], self.part_prices[number] = np.nan, np.inf
        if not is_viable(self.graph, dead):
            return {}
        gone = self._let_die(dead)
        for other, groups in enumerate(self.parts.groups):
            if not self.widths[groups].all():
                self.part_prices[other] = np.inf
        return gone

    def _move(self, groups: Sequence[int], widths: Sequence[float] | FloatArray) -> None:
        """Give these groups other widths, and blocks the prices that follow."""
        changed = self.state.move(groups, widths)
        self._regain(changed)
        for index in groups:
            self.loss[index] = self._loss(index)
        self._reprice(np.append(changed, groups))

    def _regain(self, groups: IntArray) -> None:
        """What one channel of these groups frees at the present widths."""
        self.gains[groups] = self._relative(
            lambda cost: self.state[cost].gradient[groups], len(groups)
        )

    def _reprice(self, groups: IntArray) -> None:
        """Loss per unit of saved cost of the blocks that these groups are in."""
        blocks = self.block_of[groups]
        gains, losses = self._of_blocks(self.gains, blocks), self._of_blocks(self.loss, blocks)
        prices = np.full(len(blocks), np.inf)
        np.divide(losses, gains, out=prices, where=gains > 0)
        self.prices.put(blocks, prices)

    def _of_blocks(self, numbers: FloatArray, blocks: IntArray) -> FloatArray:
        """The sums over the groups of each of these blocks."""
        sums = numbers[self.first_of[blocks]]
        if self.shared is not None:
            for place in np.flatnonzero(self.shared[blocks]).tolist():
                members = self.members[blocks[place]]
                sums[place] = sum((numbers[members] * self.ratio[members]).tolist())
        return sums

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

    def _relative(self, slopes: Callable[[Cost], FloatArray], groups: int) -> FloatArray:
        """Relative cost that one channel of some groups frees, over all budgets, ``[groups]``."""
        total = np.zeros(groups)
        for resource, initial in self.costs:
            total += slopes(resource) / initial
        return total

    def keep(self) -> dict[int, IntArray]:
        """Per group index the channels that stay."""
        return top_channels(self.graph, self.widths.astype(np.int64), self.scores)
