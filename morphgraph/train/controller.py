"""Controllers: what moves the regularizer's weight during training.

:class:`Budget` is given what the network may cost. A ratchet: a reference falls linearly from 1 to
the target over the middle of the phase. Every few steps the live cost is predicted some steps ahead
from how fast every strength falls; above the reference the weight grows, by at most ten percent at
a time, below it the weight falls. Towards the end of the phase small errors count more.

Looking ahead matters where many channels have about the same strength (a pointwise and a depthwise
layer that share a penalty): nothing dies for long, then all of them would within a few steps. The
step that reaches the target is taken only as far as the target asks; then the structure is settled:
the weight becomes zero, and the dead stay dead, since the loss alone would revive some.

:class:`FixedWeight` keeps a weight that was set by hand, as MorphNet does.
"""

import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

from morphgraph.errors import BudgetError, MorphWarning, UnsupportedError
from morphgraph.onnx_io.check import escape
from morphgraph.options import Update
from morphgraph.passes.analysis.cost import parse_cost, spelling
from morphgraph.passes.planning.constraints import parse_amount
from morphgraph.train.regularizer import Regularizer

_RISE, _FALL = 0.1, 0.1  # largest change of log(weight) per control step
_EASE = 0.3  # how much slower the weight falls than it grows for the same error
_AHEAD = 25  # training steps that the prediction looks ahead, in phases long enough
_STATE = ("step_number", "share", "_earlier", "met", "_dead", "_before", "_speed", "_warned")
_FRESH = 0.3  # weight of the newest speed in the moving average of speeds


@dataclass(frozen=True, slots=True)
class ControlStep:
    """One control step: the live cost, where it should be, what is predicted (shares), the weight.

    ``step`` counts training steps from 1.
    """

    step: int
    share: float
    reference: float
    predicted: float
    weight: float


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
        """Shrink once, after the optimizer's step; ``lr`` as for :meth:`Budget.step`."""
        if self.update == "proximal":
            self.regularizer.proximal_step(lr)

    def state_dict(self) -> dict[str, Any]:
        """The weight: all that can change."""
        return {"weight": self.regularizer.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        self.regularizer.weight = state["weight"]


class Budget:
    """Meets a budget within a number of training steps, by proximal steps of a regularizer.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> reg = mg.Regularizer(graph, net)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> budget = mg.Budget(reg, {"flops": "50%"}, steps=60)
    >>> for _ in range(60):
    ...     loss = net(image(2)).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     budget.step(lr=0.1 / (1 - 0.9))     # after the optimizer's step
    >>> budget.met, reg.live_share() <= 0.5
    (True, True)

    Args:
        regularizer: whose weight is moved; its cost is the one that is budgeted.
        budget: ``{"flops": "50%"}``: an amount or a share, of the regularizer's own cost.
        steps: training steps of the whole phase.
        start, end: shares of the phase between which the reference falls.
        interval: training steps between two control steps; by default a two-hundredth of the
            phase, at most 4.
        update: as for :class:`FixedWeight`; with ``"subgradient"`` add :meth:`loss` to the loss.

    Attributes:
        met: whether the live cost has reached the target, so that the structure is settled.
        share: the live cost as a share of the initial one, after the last step.
        trajectory: every control step.

    Raises:
        BudgetError: even the narrowest network is above the budget.
        ArgumentError: the budget's cost or amount cannot be read.
        UnsupportedError: the budget is on another cost than the regularizer's.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        budget: Mapping[str, str | float | int],
        steps: int,
        *,
        start: float = 0.1,
        end: float = 0.7,
        interval: int | None = None,
        update: Update = "proximal",
    ) -> None:
        unit = regularizer.cost.kind
        amounts = {spelling(parse_cost(name)): amount for name, amount in budget.items()}
        if set(amounts) != {unit}:
            raise UnsupportedError(
                f"budget {dict(budget)}: the regularizer counts {unit}; give one budget, on {unit}"
            )
        self.regularizer = regularizer
        initial = regularizer.initial_cost
        self.target = parse_amount(amounts[unit], initial, regularizer.cost.unit) / initial
        lowest = regularizer.lowest_share()
        if self.target < lowest:
            alone = regularizer.left_alone()
            raise BudgetError(
                f"budget {unit}={amounts[unit]} cannot be met: the narrowest network needs "
                f"{lowest:.1%} of the model's {unit}; raise the budget"
                + (f". Nothing measures {alone}" if alone else "")
            )
        self.steps = steps
        self.start, self.end = start, end
        self.interval = max(1, min(4, steps // 200)) if interval is None else interval
        self.ahead = min(_AHEAD, max(1, steps // 30))
        self.update = update
        self.step_number = 0
        self.share = self._earlier = regularizer.live_share()  # now, and at the last control step
        self.met = False
        self.trajectory: list[ControlStep] = []
        self._dead: Tensor | None = None
        self._before: Tensor | None = None  # strengths at the last control step
        self._speed: Tensor | None = None  # by how much strengths change per training step
        self._warned: list[int] = []
        # For an effective step of 1; until the reference falls, the weight makes up for another.
        self._first = regularizer.initial_weight(steps)
        regularizer.weight = self._first
        if self.share <= self.target:
            self._settle(regularizer.alive())

    def reference(self, step: float | None = None) -> float:
        """Where the live share should be at a training step, by default now."""
        progress = (self.step_number if step is None else step) / self.steps
        fallen = min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))
        return 1.0 + fallen * (self.target - 1.0)

    def loss(self) -> Tensor | float:
        """What is to be added to the loss: the regularizer, or nothing for proximal steps."""
        adds = self.update == "subgradient" and not self.met
        return self.regularizer() if adds else 0.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Shrink once, after the optimizer's step.

        Args:
            lr: the optimizer's effective step: its learning rate over (1 - momentum).
        """
        self.step_number += 1
        if self._dead is not None:
            self.regularizer.zero_channels(self._dead)
            return
        if lr > 0 and self.step_number <= self.start * self.steps:
            self.regularizer.weight = self._first / lr
        earlier = self.regularizer.snapshot()
        before = self.regularizer.strengths()
        if self.update == "proximal":
            self.regularizer.proximal_step(lr)
        strengths = self.regularizer.strengths()
        self.share = self.regularizer.live_share(strengths)
        if self.share <= self.target:
            alive = self._reached(before, strengths)
            self.regularizer.restore(earlier, alive & ~self.regularizer.alive(strengths))
            self._settle(alive)
            self.share = self.regularizer.live_share()
        elif self.step_number % self.interval == 0:
            self._control(strengths)

    def _control(self, strengths: Tensor) -> None:
        """Move the weight by how far the predicted cost is from the reference.

        A proportional controller of log(weight), with the prediction in place of a derivative term.
        """
        # 1. Predict the share some steps ahead: strengths that fall keep their mean speed, those
        # that rise stay as they are.
        predicted = self.share
        if self._before is not None:
            speed = (strengths - self._before) / self.interval
            if self._speed is not None:
                speed = _FRESH * speed + (1 - _FRESH) * self._speed
            self._speed = speed
            ahead = strengths + self.ahead * speed.clamp_max(0)
            predicted = self.regularizer.live_share(ahead)
        self._before = strengths
        # 2. The error, positive where the network is to cost less than it will.
        wanted = self.reference(self.step_number + self.ahead)
        # After the end of the reference there is no pace to keep, only the target to be reached.
        paced = self.step_number <= self.end * self.steps
        error = (predicted if paced else self.share) - wanted
        # 3. The change of log(weight): as large as the error, within bounds, less where the weight
        # falls, and more towards the end of the phase where the network is still too large.
        late = max(0.0, self.step_number / self.steps - self.end) / (1.0 - self.end)
        change = min(_RISE, error + _RISE * late) if error > 0 else max(-_FALL, _EASE * error)
        # Subgradient steps overshoot zero, with a large weight so far that scales count as alive
        # again: where the cost rises that way, more weight would only revive more channels.
        if self.update == "subgradient" and self.share > self._earlier:
            change = -_FALL
        self._earlier = self.share
        if self._speed is not None:  # the first control step has nothing to predict from
            self.regularizer.weight *= exp(change)
        self.trajectory.append(
            ControlStep(self.step_number, self.share, wanted, predicted, self.regularizer.weight)
        )
        self._warn(strengths)

    def _reached(self, before: Tensor, strengths: Tensor) -> Tensor:
        """The channels alive after the step that reaches the target, ``[channels]``.

        Of those that died in this step the strongest come back, as many as the target allows: many
        channels may die at once, and the cost would end far below the budget.

        Args:
            before, strengths: before and after the step, ``[channels]``.
        """
        alive = self.regularizer.alive(strengths)
        died = torch.nonzero(self.regularizer.alive(before) & ~alive).flatten()
        died = died[before[died].argsort(descending=True, stable=True)]
        # Bisection: more channels never cost less. `low` can come back, more than `high` cannot.
        low, high = 0, len(died)
        while low < high:
            middle = (low + high + 1) // 2
            mixed = strengths.index_copy(0, died[:middle], before[died[:middle]])
            if self.regularizer.live_share(mixed) <= self.target:
                low = middle
            else:
                high = middle - 1
        alive[died[:low]] = True
        # The loss may have pushed a whole group below the threshold.
        return alive | self.regularizer.protected(strengths, ~alive)

    def _settle(self, alive: Tensor) -> None:
        """Fix the structure: from now on the weight is zero and dead channels stay dead."""
        self.met = True
        self.regularizer.weight = 0.0
        self._dead = ~alive
        self.regularizer.zero_channels(self._dead)

    def _warn(self, strengths: Tensor) -> None:
        """Warn early, once each: nothing shrinks, or a group is nearly pruned."""
        late = self.step_number > self.steps / 2
        if late and -1 not in self._warned and self.share > 1 - 0.1 * (1 - self.target):
            self._warned.append(-1)
            warnings.warn(
                f"at half of the phase {self.share:.1%} of the cost are alive, {self.target:.1%} "
                "are wanted: train longer, or with a higher learning rate",
                MorphWarning,
                stacklevel=3,
            )
        widths = self.regularizer.live_widths(strengths)
        for group in self.regularizer.graph.groups:
            few = widths[group.index] <= 0.05 * group.width
            if not few or not self.regularizer.limits.allows(group):
                continue
            if group.index not in self._warned:
                self._warned.append(group.index)
                warnings.warn(
                    f"group '{escape(group.name)}' is nearly pruned: {int(widths[group.index])} of "
                    f"{group.width} channels left; min_width (--min-width) sets a floor",
                    MorphWarning,
                    stacklevel=3,
                )

    def state_dict(self) -> dict[str, Any]:
        """All that changes during training, the network apart: plain data and tensors."""
        state = {name: getattr(self, name) for name in _STATE}
        state["trajectory"] = [astuple(step) for step in self.trajectory]
        return state | {"weight": self.regularizer.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; the network must be as it was when :meth:`state_dict` was taken."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.trajectory = [ControlStep(*step) for step in state["trajectory"]]
        self.regularizer.weight = state["weight"]
