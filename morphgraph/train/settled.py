"""Channels that a phase has taken: they stay zero, and nobody reads what they would still add.

The loss alone would revive some, and of the others a constant may be left: a bias behind the kernel
of zeros. The resize cuts off both, so that the network must not have them before, or it is another
one after (:mod:`morphgraph.passes.analysis.silence`). What the resize absorbs may stay.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from morphgraph.passes.rewrite.absorb import absorb
from morphgraph.torch_io.weights import graph_with_weights, named_tensors
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.sources import BoundSource, whole


class Settled:
    """The channels that are dead for good.

    Args:
        regularizer: whose channels they are.
        dead: a flag for each, ``[channels]``.
        silent: those that nobody reads; None: found out when they are held for the first time.

    Attributes:
        begun: whether they have been held.
    """

    def __init__(
        self, regularizer: Regularizer, dead: Tensor, silent: Tensor | None = None
    ) -> None:
        self.dead = dead
        self.silent = silent
        self.begun = False
        self._regularizer = regularizer
        self._zeroed = _factors(regularizer.acted_on, dead)
        self._silenced: list[tuple[BoundSource, Tensor]] | None = None

    @torch.no_grad()
    def hold(self) -> None:
        """Set them to zero, after the optimizer's step.

        That passes over most weights of the network, and so is not done after every step: what a
        few of them add is small.
        """
        self.begun = True
        for source, factors in self._zeroed:
            source.multiply(factors)
        if self.silent is None:
            self.silent = self._not_absorbed()
        if self._silenced is None:
            self._silenced = _factors(self._regularizer.silencing, self.silent)
        for source, factors in self._silenced:
            source.multiply(factors)

    def _not_absorbed(self) -> Tensor:
        """Those whose constants the resize will cut off, ``[channels]``."""
        reg = self._regularizer
        if not reg.absorb:
            return self.dead
        alive = (~self.dead).cpu().numpy()
        keep = {group.index: np.flatnonzero(alive[group.channels]) for group in reg.graph.groups}
        weights = {name: whole(tensor) for name, tensor in named_tensors(reg.net).items()}
        kept = absorb(graph_with_weights(reg.graph, weights), keep).channels
        return self.dead & ~torch.from_numpy(kept).to(self.dead.device)


def _factors(sources: Iterable[BoundSource], dead: Tensor) -> list[tuple[BoundSource, Tensor]]:
    """Per source that has dead channels what its positions are multiplied with: 0 or 1.

    A product with all numbers takes a third of the time of writing zeros into some columns.
    """
    found = [(source, dead[source.index]) for source in sources]
    return [(source, (~there).float()) for source, there in found if bool(there.any())]
