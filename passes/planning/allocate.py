"""Pass ``allocate``: the widths with the least loss within all budgets.

Scores on one scale for the whole network say what a group's width costs the outputs: the sum of the
scores of the channels that it loses, a convex function of its width. With costs that are products
of widths the best widths are found step by step: the step (of one group, or of groups that are to
have one width) that loses least per cost that it saves now, until all budgets are met; then steps
back where there is room, and exchanges of a step here for a step there while the loss falls. Where
there are few widths to choose from, the best are then found exactly
(:mod:`morphgraph.passes.planning.exact`).
"""

from collections.abc import Sequence

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.liveness import is_viable, with_orphans
from morphgraph.passes.planning.bounds import AllowedWidths
from morphgraph.passes.planning.constraints import (
    Constraint,
    fits,
    require_reachable,
    unreachable,
)
from morphgraph.passes.planning.exact import improved

#: Steps that are exchanged at most, and blocks up to which both directions are tried.
MOST_EXCHANGES = 200
FEW_BLOCKS = 64


def allocate(
    graph: ChannelGraph,
    scores: FloatArray,
    constraints: Sequence[Constraint],
    allowed: AllowedWidths,
) -> IntArray:
    """The widths of all groups, ``[groups]``.

    Args:
        graph: the lifted network.
        scores: what each channel costs the outputs, ``[channels]``, on one scale.
        constraints: budgets.
        allowed: grids, floors and ceilings.

    Raises:
        BudgetError: no widths meet the budgets.
    """
    return _Allocation(graph, scores, constraints, allowed).run()


class _Allocation:
    def __init__(
        self,
        graph: ChannelGraph,
        scores: FloatArray,
        constraints: Sequence[Constraint],
        allowed: AllowedWidths,
    ) -> None:
        self.graph, self.constraints, self.allowed = graph, constraints, allowed
        self.widths = allowed.ceilings.copy()
        self.removable = allowed.removable()
        self.fixed: set[int] = set()  # blocks that may not lose their last channels
        # Per group what is lost with its k weakest channels, for k from 0 to its width.
        ascending = [np.sort(scores[group.channels], kind="stable") for group in graph.groups]
        self.lost = [np.append(0.0, np.cumsum(each)) for each in ascending]

    def run(self) -> IntArray:
        require_reachable(self.constraints, self.allowed)
        while not fits(self.constraints, self.widths):
            if not self._shrink():
                raise unreachable(self.constraints, self.widths, self.allowed)
        self._fill()
        for _ in range(MOST_EXCHANGES):
            if not self._exchange():
                break
        return improved(self.widths, self._group_loss, self.constraints, self.allowed)

    def loss(self, widths: IntArray) -> float:
        """Of all groups together."""
        return sum(self._group_loss(k, width) for k, width in enumerate(widths.tolist()))

    def _group_loss(self, index: int, width: int) -> float:
        return float(self.lost[index][self.graph.groups[index].width - width])

    def _block_loss(self, block: Sequence[int], widths: Sequence[int]) -> float:
        return sum(self._group_loss(k, width) for k, width in zip(block, widths, strict=True))

    def _shrink(self, held: int = -1) -> bool:
        """Take the step that loses least for what it saves of the budgets not met yet.

        The block with the number ``held`` stays as it is.
        """
        missing = [c for c in self.constraints if not c.holds(self.widths)]
        gains = sum(
            (c.cost.gradient(self.widths) / max(c.cost.total, 1e-30) for c in missing),
            np.zeros(len(self.widths)),
        )
        best, chosen = np.inf, None
        for number, block in enumerate(self.allowed.blocks):
            now = [int(self.widths[k]) for k in block]
            below = [self.allowed.below(k, w) for k, w in zip(block, now, strict=True)]
            if below == now or number == held or (number in self.fixed and 0 in below):
                continue
            saved = sum(gains[k] * (w - b) for k, w, b in zip(block, now, below, strict=True))
            if saved <= 0:
                continue
            price = (self._block_loss(block, below) - self._block_loss(block, now)) / saved
            if price < best:
                best, chosen = price, (number, block, below)
        if chosen is None:
            return False
        number, block, below = chosen
        if 0 in below:
            self._vanish(number, block)
        else:
            self.widths[list(block)] = below
        return True

    def _vanish(self, number: int, block: Sequence[int]) -> None:
        """Let a group go with those that it orphans, or never, if nothing would be left."""
        dead = frozenset(np.flatnonzero(self.widths == 0).tolist()) | set(block)
        if is_viable(self.graph, dead):
            self.widths[list(with_orphans(self.graph, dead, self.removable))] = 0
        else:
            self.fixed.add(number)

    def _above(self, block: Sequence[int]) -> list[int] | None:
        """The next wider widths of a block; ``None``: it cannot grow."""
        wider = []
        for k in block:
            width, ceiling = int(self.widths[k]), int(self.allowed.ceilings[k])
            if width == 0 or width >= ceiling:
                return None
            wider.append(min(ceiling, self.allowed.grids[k].above(width)))
        return wider

    def _fill(self, held: int = -1) -> None:
        """Grow where that fits, first what wins most for its cost; not the block ``held``."""
        stuck = {held}
        while True:
            best, chosen = 0.0, None
            gains = sum(
                (c.cost.gradient(self.widths) / max(c.cost.total, 1e-30) for c in self.constraints),
                np.zeros(len(self.widths)),
            )
            for number, block in enumerate(self.allowed.blocks):
                wider = None if number in stuck else self._above(block)
                if wider is None:
                    continue
                now = [int(self.widths[k]) for k in block]
                won = self._block_loss(block, now) - self._block_loss(block, wider)
                paid = sum(gains[k] * (b - w) for k, w, b in zip(block, now, wider, strict=True))
                worth = won / max(paid, 1e-12)
                if worth > best:
                    best, chosen = worth, (number, block, wider)
            if chosen is None:
                return
            number, block, wider = chosen
            before = self.widths[list(block)].copy()
            self.widths[list(block)] = wider
            if not fits(self.constraints, self.widths):
                self.widths[list(block)] = before
                stuck.add(number)

    def _exchange(self) -> bool:
        """One block takes a step, and others make up for it, if less is lost then.

        Where a block grows, others shrink to pay for it; where it shrinks, others grow.
        """
        start, loss = self.widths.copy(), self.loss(self.widths)
        few = len(self.allowed.blocks) <= FEW_BLOCKS
        for number, block in enumerate(self.allowed.blocks):
            for attempt in (self._grown, self._shrunk) if few else (self._grown,):
                if attempt(number, block) and self.loss(self.widths) < loss * (1 - 1e-9):
                    return True
                self.widths = start.copy()
        return False

    def _grown(self, number: int, block: Sequence[int]) -> bool:
        """Let a block grow by a step at the cost of others; whether that can be."""
        wider = self._above(block)
        if wider is None:
            return False
        self.widths[list(block)] = wider
        while not fits(self.constraints, self.widths):
            if not self._shrink(number):
                return False
        self._fill(number)
        return True

    def _shrunk(self, number: int, block: Sequence[int]) -> bool:
        """Let a block shrink by a step, and others grow; whether that can be."""
        now = [int(self.widths[k]) for k in block]
        below = [self.allowed.below(k, w) for k, w in zip(block, now, strict=True)]
        if below == now or 0 in below:
            return False
        self.widths[list(block)] = below
        self._fill(number)
        return True
