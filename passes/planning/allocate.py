"""Pass ``allocate``: the widths with the least loss within all budgets.

Scores on one scale for the whole network say what a group's width costs the outputs: the sum of the
scores of the channels that it loses, a convex function of its width. With costs that are products
of widths the best widths are found step by step: the step (of one group, or of groups that are to
have one width) that loses least per cost that it saves now, until all budgets are met; then steps
back where there is room, and exchanges of a step here for a step there while the loss falls. Where
there are few widths to choose from, the best are then found exactly
(:mod:`morphgraph.passes.planning.exact`).

Whole branches and blocks that may go, each at a loss of its own, are steps like others. They are
large, so that three ways are gone and the best is taken: with branches among the steps, with widths
alone, and with branches as long as there are some.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from morphgraph.arrays import Flags, FloatArray, IntArray
from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.along import WidthsAlong
from morphgraph.passes.analysis.liveness import is_viable, with_orphans
from morphgraph.passes.planning.bounds import AllowedWidths
from morphgraph.passes.planning.constraints import (
    Constraint,
    fits_along,
    require_reachable,
    unreachable,
)
from morphgraph.passes.planning.exact import improved
from morphgraph.passes.planning.parts import Losses, Parts

#: Steps that are exchanged at most, blocks up to which both directions are tried, and branches that
#: are tried each time, the most promising first.
MOST_EXCHANGES = 200
FEW_BLOCKS = 64
MOST_PARTS = 6
#: Branches are priced anew when so large a share of the cost has gone.
PART_STEP = 1 / 64


def allocate(
    graph: ChannelGraph,
    scores: FloatArray,
    constraints: Sequence[Constraint],
    allowed: AllowedWidths,
    losses: Losses | None = None,
) -> IntArray:
    """The widths of all groups, ``[groups]``.

    Args:
        graph: the lifted network.
        scores: what each channel costs the outputs, ``[channels]``, on one scale.
        constraints: budgets.
        allowed: grids, floors and ceilings, and the branches that may go.
        losses: what these cost the outputs, on the same scale; of those that are not there the sum
            of the scores inside.

    Raises:
        BudgetError: no widths meet the budgets.
    """
    require_reachable(constraints, allowed)
    ways: tuple[Way, ...] = ("widths", "both", "parts") if allowed.parts else ("widths",)
    best: _Allocation | None = None
    refused: BudgetError | None = None
    for way in ways:
        found = _Allocation(graph, scores, constraints, allowed, losses or {})
        try:
            found.run(way)
        except BudgetError as error:
            refused = error
            continue
        if best is None or found.loss() < best.loss() * (1 - 1e-9):
            best = found
    if best is None:
        assert refused is not None
        raise refused
    return improved(best.widths, best.group_loss, constraints, allowed)


Way = Literal["widths", "both", "parts"]


class _Allocation:
    def __init__(
        self,
        graph: ChannelGraph,
        scores: FloatArray,
        constraints: Sequence[Constraint],
        allowed: AllowedWidths,
        losses: Losses,
    ) -> None:
        self.graph, self.constraints, self.allowed = graph, constraints, allowed
        self.removable = allowed.removable()
        # Per group what is lost with its k weakest channels, for k from 0 to its width.
        ascending = [np.sort(scores[group.channels], kind="stable") for group in graph.groups]
        self.lost = [np.append(0.0, np.cumsum(each)) for each in ascending]
        self.block_of = np.zeros(len(graph.groups), dtype=np.int64)
        for number, block in enumerate(allowed.blocks):
            self.block_of[list(block)] = number
        # Blocks that may not lose their last channels.
        self.fixed = np.zeros(len(allowed.blocks), dtype=bool)
        costs = [constraint.cost for constraint in constraints]
        self.state = WidthsAlong(costs, allowed.ceilings, *([0] if allowed.parts else []))
        self.below: IntArray = self.widths.copy()
        self.above: IntArray = self.widths.copy()
        self.loss_now, self.loss_below, self.loss_above = np.zeros((3, len(graph.groups)))
        self._look(range(len(graph.groups)))
        self.parts = Parts(allowed.parts, costs)
        self.part_loss = np.array([self._loss_of(part.groups, losses) for part in allowed.parts])
        self.gone: set[int] = set()  # parts that have gone
        self.refused: set[int] = set()  # and those without which nothing would be left
        self.part_prices, self.part_cost = np.full(len(self.part_loss), np.inf), np.inf

    @property
    def widths(self) -> IntArray:
        """The present widths, ``[groups]``."""
        return self.state.widths.astype(np.int64)

    def run(self, way: Way) -> None:
        """Find widths within the budgets."""
        if way == "parts":
            while not self._fits() and self._remove_part(self._least_part()):
                pass
        while not self._fits():
            if not self._shrink(parts=way != "widths"):
                raise unreachable(self.constraints, self.widths, self.allowed)
        self._fill()
        for _ in range(MOST_EXCHANGES):
            if not self._exchange(parts=way != "widths"):
                break

    def loss(self) -> float:
        """Of all groups together, and of the parts that have gone."""
        own = np.ones(len(self.graph.groups), dtype=bool)
        for number in self.gone:
            own[self.parts.groups[number]] = False
        return float(self.loss_now[own].sum() + self.part_loss[sorted(self.gone)].sum())

    def group_loss(self, index: int, width: int) -> float:
        """What a group loses at a width."""
        return float(self.lost[index][self.graph.groups[index].width - width])

    def _loss_of(self, groups: tuple[int, ...], losses: Losses) -> float:
        return losses.get(groups, sum(self.group_loss(index, 0) for index in groups))

    # -- state ---------------------------------------------------------------------------------

    def _fits(self) -> bool:
        return fits_along(self.constraints, self.state)

    def _move(self, groups: Sequence[int] | IntArray, widths: Sequence[int] | IntArray) -> None:
        self.state.move(groups, widths)
        self._look(np.asarray(groups).tolist())

    def _look(self, groups: Iterable[int]) -> None:
        """Take note of the steps that groups can take from here; of dead ones none."""
        for k in groups:
            width, ceiling = int(self.state.widths[k]), int(self.allowed.ceilings[k])
            below = self.allowed.below(k, width) if width else 0
            if below == 0 and self.fixed[self.block_of[k]]:
                below = width
            above = min(ceiling, self.allowed.grids[k].above(width)) if 0 < width < ceiling else 0
            self.below[k], self.above[k] = below, above or width
            self.loss_now[k] = self.group_loss(k, width)
            self.loss_below[k] = self.group_loss(k, below)
            self.loss_above[k] = self.group_loss(k, above or width)

    def _restore(self, widths: IntArray, gone: set[int]) -> None:
        changed = np.flatnonzero(self.state.widths != widths)
        if len(changed):
            self._move(changed, widths[changed])
        self.gone = set(gone)

    def _sums(self, numbers: FloatArray) -> FloatArray:
        """Of the groups of every block, ``[blocks]``."""
        count = len(self.allowed.blocks)
        return np.bincount(self.block_of, numbers, minlength=count).astype(np.float64)

    def _living(self, number: int) -> list[int]:
        """The groups of a block that have not gone."""
        return [k for k in self.allowed.blocks[number] if self.state.widths[k] > 0]

    def _gains(self, constraints: Iterable[Constraint]) -> FloatArray:
        """What one channel of every group costs, relative to each cost, ``[groups]``."""
        return sum(
            (self.state[c.cost].gradient / max(c.cost.total, 1e-30) for c in constraints),
            np.zeros(len(self.graph.groups)),
        )

    # -- down ----------------------------------------------------------------------------------

    def _shrink(self, held: int = -1, *, parts: bool) -> bool:
        """Take the step that loses least for what it saves of the budgets not met yet.

        The block with the number ``held`` stays as it is.
        """
        missing = [c for c in self.constraints if not self.state[c.cost].holds(c.limit)]
        steps = self.state.widths - self.below
        saved = self._sums(self._gains(missing) * steps)
        prices = np.full(len(saved), np.inf)
        np.divide(self._sums(self.loss_below - self.loss_now), saved, prices, where=saved > 0)
        if held >= 0:
            prices[held] = np.inf
        number = int(np.argmin(prices))
        part = self._cheapest_part(missing) if parts else None
        if part is not None and self.part_prices[part] < prices[number]:
            self._remove_part(part)
            return True
        if not np.isfinite(prices[number]):
            return False
        block = self._living(number)
        below = self.below[block]
        if 0 in below:
            self._vanish(number, block)
        else:
            self._move(block, below)
        return True

    def _vanish(self, number: int, block: Sequence[int]) -> None:
        """Let a group go with those that it orphans, or never, if nothing would be left."""
        if not self._let_die(block):
            self.fixed[number] = True
            self._look(block)

    def _let_die(self, groups: Sequence[int] | IntArray) -> bool:
        """Give groups width 0, and those that are orphaned by that, if a network is left."""
        dead = frozenset(np.flatnonzero(self.state.widths == 0).tolist()).union(map(int, groups))
        if not is_viable(self.graph, dead):
            return False
        changed = sorted(with_orphans(self.graph, dead, self.removable))
        self._move(changed, np.zeros(len(changed), dtype=np.int64))
        return True

    # -- whole branches and blocks -------------------------------------------------------------

    def _can_go(self, number: int) -> bool:
        groups = self.parts.groups[number]
        return number not in self.refused and bool(self.state.widths[groups].all())

    def _part_price(self, number: int, missing: Sequence[Constraint]) -> float:
        """What a part loses more than its channels have, for what it saves; no more than misses."""
        saved = 0.0
        if self._can_go(number):
            for c in missing:
                over = self.state[c.cost].at - c.limit
                share = min(self.parts.saved(self.state, number, c.cost), over)
                saved += share / max(c.cost.total, 1e-30)
        lost = float(self.loss_now[self.parts.groups[number]].sum())
        return max(float(self.part_loss[number]) - lost, 0.0) / saved if saved > 0 else np.inf

    def _cheapest_part(self, missing: Sequence[Constraint]) -> int | None:
        """The part with the lowest price; priced anew when the cost has changed a bit."""
        if not len(self.part_loss):
            return None
        now = sum(self.state[c.cost].at / max(c.cost.total, 1e-30) for c in missing)
        if not abs(now - self.part_cost) < PART_STEP * self.part_cost:
            self.part_cost = now
            numbers = range(len(self.part_loss))
            self.part_prices = np.array([self._part_price(n, missing) for n in numbers])
        number = int(np.argmin(self.part_prices))
        if np.isfinite(self.part_prices[number]):
            self.part_prices[number] = self._part_price(number, missing)
        return number

    def _least_part(self) -> int | None:
        """The part that loses least for what it saves of all budgets, whatever is missing."""
        numbers = [n for n in range(len(self.part_loss)) if self._can_go(n)]
        return min(numbers, key=self._per_cost, default=None)

    def _per_cost(self, number: int) -> float:
        groups = self.parts.groups[number]
        paid = sum(
            self.parts.saved(self.state, number, c.cost) / max(c.cost.total, 1e-30)
            for c in self.constraints
        )
        lost = float(self.loss_now[groups].sum())
        return (float(self.part_loss[number]) - lost) / max(paid, 1e-12)

    def _remove_part(self, number: int | None) -> bool:
        """Remove a branch or a block; or never, if nothing would be left. Whether there was one."""
        if number is None:
            return False
        if self._let_die(self.parts.groups[number]):
            self.gone.add(number)
        else:
            self.refused.add(number)
        self.part_cost = np.inf
        return True

    # -- up ------------------------------------------------------------------------------------

    def _growing(self) -> Flags:
        """Blocks whose living groups can all grow by a step, ``[blocks]``."""
        living = self.state.widths > 0
        stays = living & (self.above <= self.state.widths)
        can: Flags = (self._sums(living.astype(float)) > 0) & (self._sums(stays.astype(float)) == 0)
        return can

    def _fill(self, held: int = -1) -> None:
        """Grow where that fits, first what wins most for its cost; not the block ``held``."""
        stuck = np.zeros(len(self.allowed.blocks), dtype=bool)
        if held >= 0:
            stuck[held] = True
        while True:
            steps = self.above - self.state.widths
            won = self._sums(self.loss_now - self.loss_above)
            paid = self._sums(self._gains(self.constraints) * steps)
            worth = np.where(self._growing() & ~stuck, won / np.maximum(paid, 1e-12), 0.0)
            number = int(np.argmax(worth))
            if worth[number] <= 0:
                return
            block = self._living(number)
            before = self.widths[block]
            self._move(block, self.above[block])
            if not self._fits():
                self._move(block, before)
                stuck[number] = True

    # -- exchange ------------------------------------------------------------------------------

    def _exchange(self, *, parts: bool) -> bool:
        """One block takes a step, and others make up for it, if less is lost then.

        Where a block grows, others shrink to pay for it; where it shrinks, others grow. So do
        others where a branch goes or comes back.
        """
        start, gone, loss = self.widths, set(self.gone), self.loss()
        few = len(self.allowed.blocks) <= FEW_BLOCKS
        for number in range(len(self.allowed.blocks)):
            for attempt in (self._grown, self._shrunk) if few else (self._grown,):
                if attempt(number) and self.loss() < loss * (1 - 1e-9):
                    return True
                self._restore(start, gone)
        if not parts:
            return False
        numbers = [n for n in range(len(self.part_loss)) if self._can_go(n)]
        for number in sorted(numbers, key=self._per_cost)[:MOST_PARTS]:
            if self._let_die(self.parts.groups[number]):
                self.gone.add(number)
                self._fill()
                if self.loss() < loss * (1 - 1e-9):
                    return True
            self._restore(start, gone)
        dearest = sorted(gone, key=lambda n: -float(self.part_loss[n]))[:MOST_PARTS]
        for number in dearest:
            if self._revived(number) and self.loss() < loss * (1 - 1e-9):
                return True
            self._restore(start, gone)
        return False

    def _grown(self, number: int) -> bool:
        """Let a block grow by a step at the cost of others; whether that can be."""
        if not self._growing()[number]:
            return False
        block = self._living(number)
        self._move(block, self.above[block])
        return self._paid(number)

    def _paid(self, held: int = -1) -> bool:
        while not self._fits():
            if not self._shrink(held, parts=False):
                return False
        self._fill(held)
        return True

    def _shrunk(self, number: int) -> bool:
        """Let a block shrink by a step, and others grow; whether that can be."""
        block = self._living(number)
        below = self.below[block]
        if not block or 0 in below or (below == self.state.widths[block]).all():
            return False
        self._move(block, below)
        self._fill(number)
        return True

    def _revived(self, number: int) -> bool:
        """Let a part come back at the cost of others; whether that can be."""
        self.gone.discard(number)
        others = {k for n in self.gone for k in self.parts.groups[n].tolist()}
        for k in self.parts.groups[number].tolist():
            if k not in others:
                # Groups that go together come back with the width, or the share, of the others.
                living = self._living(int(self.block_of[k]))
                width, wide = int(self.allowed.ceilings[k]), self.graph.widths
                if living:
                    width = int(self.state.widths[living[0]] * wide[k] / wide[living[0]])
                self._move([k], [width])
        return self._paid()
