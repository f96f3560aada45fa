"""Which channels training may not take, since no network would be left without them."""

import numpy as np
import torch
from torch import Tensor

from morphgraph.arrays import IntArray
from morphgraph.passes.analysis.liveness import is_viable
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.train.strengths import Strengths


class Viability:
    """Keeps the network viable while its channels shrink.

    Args:
        strengths: of the network; only groups that are measured can lose channels.
        bounds: their floors. With ``min_width`` 0 groups may die as a whole, where a network is
            left without them.
    """

    def __init__(self, strengths: Strengths, bounds: WidthBounds) -> None:
        self.graph = strengths.graph
        self._strengths = strengths
        self._floors: IntArray = bounds.on(self.graph).floors
        self._groups_may_die = bool((self._floors == 0).any())
        self._last: tuple[frozenset[int], IntArray] | None = None  # dead groups, and what is needed

    def protected(self, strengths: Tensor, would_die: Tensor) -> Tensor:
        """Channels that must not die, ``[channels]``: as many of the strongest as a group needs.

        A group needs its floor, and one channel where no network would be left without it; of
        groups that would die together the strongest stay where they must.
        """
        if not self._groups_may_die:
            return self._strongest(strengths, self._floors)
        dead = self._dead_groups(strengths)
        floors = self._needed(dead)
        protected = self._strongest(strengths, floors)
        remaining = torch.where(would_die & ~protected, 0.0, strengths)
        dying = self._dead_groups(remaining) - dead
        # One group may go: `_needed` has asked about each. Several may need one of them.
        if len(dying) < 2 or is_viable(self.graph, dead | dying):
            return protected
        floors = floors.copy()
        strongest = {k: float(strengths[self.graph.groups[k].channels].max()) for k in dying}
        for index in sorted(dying, key=lambda k: (strongest[k], k)):
            if is_viable(self.graph, dead | {index}):
                dead |= {index}
            else:
                floors[index] = 1
        return self._strongest(strengths, floors)

    def _dead_groups(self, strengths: Tensor) -> frozenset[int]:
        """The indices of the groups without a channel alive."""
        return frozenset(np.flatnonzero(self._strengths.live_widths(strengths) == 0).tolist())

    def _needed(self, dead: frozenset[int]) -> IntArray:
        """How many channels every group must keep beside the dead groups, ``[groups]``.

        Asking for every group takes long and groups die seldom: the last answer is remembered.
        """
        if self._last is None or self._last[0] != dead:
            floors = self._floors.copy()
            for index in np.flatnonzero(self._strengths.measured).tolist():
                if not is_viable(self.graph, dead | {index}):
                    floors[index] = 1
            self._last = dead, floors
        return self._last[1]

    def _strongest(self, strengths: Tensor, counts: IntArray) -> Tensor:
        return self._strengths.strongest(strengths, torch.from_numpy(counts).to(strengths.device))
