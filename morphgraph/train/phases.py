"""What a training phase must do for the structure: the penalty that ``fit`` is given."""

import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from morphgraph.errors import ArgumentError, warn
from morphgraph.options import Update
from morphgraph.train.controller import Budget, ControlStep
from morphgraph.train.regularizer import Regularizer

DEFAULT_STEPS = 1000  # of a phase of unknown length
NEVER_STEPPED = "fit never called penalty.step: call it after every optimizer step"


_UNEXPECTED = re.compile(r"forward\(\) got an unexpected keyword argument '(\w+)'")
_P = TypeVar("_P")


def run_fit(fit: Callable[[nn.Module, _P], None], net: nn.Module, penalty: _P) -> None:
    """Let the user train a network for a phase.

    Raises:
        ArgumentError: it is given an argument that it was not exported with, as the labels by which
            a network of Hugging Face computes its loss.
    """
    try:
        fit(net, penalty)
    except TypeError as error:
        found = _UNEXPECTED.search(str(error))
        if found is None:
            raise
        taken = list(inspect.signature(net.forward).parameters)
        if found[1] in taken:
            raise
        raise ArgumentError(
            f"fit: gives the network '{found[1]}', and what a resize makes takes the arguments of "
            f"the example alone ({', '.join(taken)}); compute the loss from its results, as "
            "cross_entropy(net(...).logits, labels), or resize your own class with mg.resize_module"
        ) from error


class SteppedPenalty(Protocol):
    """What a training phase calls that steps the penalty itself and knows its learning rate."""

    def begin(self, steps: int) -> None:
        """Say how many optimizer steps the phase takes, before the first one."""

    def loss(self) -> Tensor | float:
        """What is to be added to the loss; nothing, unless ``update="subgradient"`` was asked."""

    def step(self, lr: float) -> None:
        """After the optimizer's step, before the gradients are cleared.

        ``lr`` is the length of the optimizer's step, for SGD the learning rate over (1 - momentum).
        """

    def carry(self, optimizer: Optimizer) -> None:
        """Tell the phase's optimizer, once it is made: what it can go on with, it is given.

        That is, where a trained network is shrunk, the state of the one before the resize.
        """


class Penalty(SteppedPenalty, Protocol):
    """What one training phase calls: :meth:`attach` once, or :meth:`step` after every step."""

    def attach(self, *optimizers: Any) -> Any:
        """Step by itself after every real step of the optimizer; of several after the last one."""

    def step(self, lr: float | None = None) -> None:
        """After the optimizer's step; without ``lr`` its length is read off the optimizer."""


class ResumablePenalty(SteppedPenalty, Protocol):
    """A penalty of a phase that can be stopped and resumed."""

    @property
    def regularizer(self) -> Regularizer | None:
        """What shrinks the network, if anything does."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes during the phase, the network apart."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""


class NoPenalty:
    """The penalty of a phase that trains the weights alone."""

    regularizer: Regularizer | None = None

    def begin(self, steps: int) -> None:
        """Do nothing."""

    def loss(self) -> float:
        """Nothing is added to the loss."""
        return 0.0

    def attach(self, *optimizers: Any) -> Any:
        """Do nothing."""

    def step(self, lr: float | None = None) -> None:
        """Do nothing."""

    def carry(self, optimizer: Optimizer) -> None:
        """Do nothing: the optimizer begins anew."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class ShrinkPenalty:
    """The penalty of a phase that learns a structure: a controller, made when the length is known.

    Args:
        regularizer: of the network that is trained.
        target: the cost, of the regularizer's own kind and in its units, to be reached.
        steps: of the phase, where :meth:`begin` is not called.
        update: see :class:`~morphgraph.train.fixed_weight.FixedWeight`.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        target: float,
        steps: int | None = None,
        update: Update = "proximal",
    ) -> None:
        self.regularizer = regularizer
        self.update: Update = update
        self.target = target
        self.steps = steps or DEFAULT_STEPS
        self.budget: Budget | None = None

    def begin(self, steps: int) -> None:
        """Say how many optimizer steps the phase takes, before the first one."""
        self.steps = steps
        self._controller()

    def loss(self) -> Tensor | float:
        """What is to be added to the loss: nothing for proximal steps."""
        return self._controller().loss()

    def attach(self, *optimizers: Any) -> Any:
        """Step by itself after every real step of the optimizer; of several after the last one."""
        self._controller().attach(*optimizers, step=self.step)
        return self

    def step(self, lr: float | None = None) -> None:
        """Shrink, after the optimizer's step and before the gradients are cleared."""
        self._controller().step(lr)

    def carry(self, optimizer: Optimizer) -> None:
        """Do nothing: there is no state to go on with."""

    @property
    def taken(self) -> int:
        """How many steps the phase has taken."""
        return 0 if self.budget is None else self.budget.step_number

    @property
    def met(self) -> bool:
        """Whether the target has been reached, so that the structure is settled."""
        return self._controller().met

    @property
    def trajectory(self) -> tuple[ControlStep, ...]:
        """What the controller has seen and done, every few steps."""
        return tuple(self._controller().trajectory)

    def end(self) -> None:
        """Step no longer, and warn where the phase was over before its structure was found."""
        self._controller().detach()
        self.regularizer.unfinished = None  # it is said here
        if self.met or self.taken == self.steps:  # then the controller has said so
            return
        share = self.regularizer.live_share()
        target = self.target / self.regularizer.initial_cost
        warn(
            f"the phase ended at {share:.1%} of the network's {self.regularizer.cost.kind}, "
            f"not at {target:.1%}; {self._advice()}"
        )

    def _advice(self) -> str:
        if not self.taken:
            return NEVER_STEPPED
        if self.taken < self.steps:
            return (
                f"it took {self.taken} steps of {self.steps}: say so by "
                f"penalty.begin({self.taken}) in fit"
            )
        return "train it longer"

    def state_dict(self) -> dict[str, Any]:
        """All that changes during the phase, the network apart."""
        return {"controller": self._controller().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of a phase of the same length; the network is loaded already."""
        self._controller().load_state_dict(state["controller"])

    def _controller(self) -> Budget:
        # Made at its first use: `begin`, if it is called at all, says how long the phase is.
        if self.budget is None:
            unit = self.regularizer.cost.kind
            self.budget = Budget(
                self.regularizer, {unit: self.target}, self.steps, update=self.update
            )
        return self.budget
