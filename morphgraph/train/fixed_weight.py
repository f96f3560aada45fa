"""A weight of the regularizer that was set by hand, as MorphNet does."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from morphgraph.options import Update
from morphgraph.train.regularizer import Regularizer


class FixedWeight:
    """A regularizer whose weight stays as it was set.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> reg = mg.Regularizer(mg.lift(mg.export(net, (image(),))), net)
    >>> penalty = FixedWeight(reg, weight=0.5)
    >>> penalty.step(lr=0.1)                    # after the optimizer's step
    >>> reg.weight
    0.5

    Args:
        regularizer: whose weight is set.
        weight: lambda, in units of 1/(initial cost).
        update: ``"proximal"``: channels are shrunk after the optimizer's step, to exact zeros;
            ``"subgradient"``: the loss gets the regularizer as a term, and a threshold says who is
            alive, as in the paper.
    """

    def __init__(
        self, regularizer: Regularizer, weight: float, update: Update = "proximal"
    ) -> None:
        self.regularizer = regularizer
        self.update = update
        regularizer.weight = weight

    def begin(self, steps: int) -> None:
        """Do nothing: the weight does not depend on how long the phase is."""

    def loss(self) -> Tensor | float:
        """What is to be added to the loss: the regularizer, or nothing for proximal steps."""
        return self.regularizer() if self.update == "subgradient" else 0.0

    def step(self, lr: float) -> None:
        """Shrink once, after the optimizer's step; ``lr`` as for :meth:`morphgraph.Budget.step`."""
        if self.update == "proximal":
            self.regularizer.proximal_step(lr)

    def carry(self, optimizer: Any) -> None:
        """Do nothing: there is no state to go on with."""

    def state_dict(self) -> dict[str, Any]:
        """The weight: all that can change."""
        return {"weight": self.regularizer.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        self.regularizer.weight = state["weight"]
