"""How fast one budgeted resource is to fall, and the weight of its penalty that makes it so."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from math import exp
from typing import Any

from morphgraph.errors import BudgetError
from morphgraph.passes.planning.constraints import meant_share
from morphgraph.train.resources import Counted, Resource

SLACK = 0.1
"""How far the cost may be ahead of the reference, as a share of the phase."""

_RISE, _FALL = 0.1, 0.1  # largest change of log(weight) per control step
_EASE = 0.3  # how much slower the weight falls than it grows for the same error
_STATE = ("target", "first", "share", "level", "_earlier", "_begin", "_end", "_from")


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


class Pace:
    """A resource on its way to its target: the reference, and a controller of its weight.

    Args:
        counted: the resource; its weight is set.
        target: a share of the initial amount.
        first: the first weight, for an effective step of 1.
        share: what is alive now.
        begin, end: training steps between which the reference falls.

    Attributes:
        share: what is alive, as a share of the initial amount.
        level: by what the controller has multiplied the first weight.
        trajectory: every control step.
    """

    def __init__(
        self, counted: Counted, target: float, first: float, share: float, begin: float, end: float
    ) -> None:
        self.counted = counted
        self.target = target
        self.first = first
        self.level = 1.0
        self.share = self._earlier = share
        self.trajectory: list[ControlStep] = []
        self._begin, self._end, self._from = begin, end, 1.0

    @property
    def kind(self) -> str:
        """The resource."""
        return self.counted.resource.kind

    def reference(self, step: float) -> float:
        """Where the live share should be at a training step."""
        fallen = (step - self._begin) / max(self._end - self._begin, 1e-9)
        return self._from + min(1.0, max(0.0, fallen)) * (self.target - self._from)

    def aim(self, target: float, now: float, end: float) -> None:
        """Another target: the reference goes there from where it is now."""
        self._from = self.share if self.share < self.reference(now) else self.reference(now)
        self._begin, self._end, self.target = now, end, target

    def weigh(self, step_size: float) -> None:
        """Set the weight for an effective step of this size."""
        self.counted.weight = self.level * self.first / step_size

    def control(
        self, step: int, ahead: int, predicted: float, steps: int, *, moves: bool, overshoots: bool
    ) -> None:
        """Change the weight by how far the predicted share is from the reference.

        A proportional controller of log(weight), with the prediction in place of a derivative term.

        Args:
            step: now.
            ahead: how many steps the prediction looks ahead.
            predicted: the share then.
            steps: of the whole phase.
            moves: whether there is something to predict from yet.
            overshoots: whether more weight may revive channels: subgradient steps overshoot zero.
        """
        # 1. The error, positive where the network is to cost less than it will. After the end of
        # the reference there is no pace to keep, only the target to be reached.
        wanted = self.reference(step + ahead)
        error = (predicted if step <= self._end else self.share) - wanted
        # 2. The change of log(weight): as large as the error, within bounds, less where the weight
        # falls, and more towards the end of the phase where the network is still too large.
        late = max(0.0, step - self._end) / max(steps - self._end, 1e-9)
        change = min(_RISE, error + _RISE * late) if error > 0 else max(-_FALL, _EASE * error)
        if overshoots and self.share > self._earlier:
            change = -_FALL
        self._earlier = self.share
        if moves:
            self.level *= exp(change)
            self.counted.weight *= exp(change)
        self.trajectory.append(
            ControlStep(step, self.share, wanted, predicted, self.counted.weight)
        )

    def state_dict(self) -> dict[str, Any]:
        """All that changes: plain data."""
        state = {name: getattr(self, name) for name in _STATE}
        state["trajectory"] = [astuple(step) for step in self.trajectory]
        return state | {"weight": self.counted.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.trajectory = [ControlStep(*step) for step in state["trajectory"]]
        self.counted.weight = state["weight"]


def require_within_reach(
    pace: Pace, target: float, lowest: float, amount: object, held_by: Callable[[Resource], str]
) -> None:
    """Refuse a budget that the narrowest network does not meet.

    Args:
        pace: of the resource.
        target: a share of the initial amount.
        lowest: that share of the narrowest network.
        amount: the budget as it was given.
        held_by: says of a resource what holds it, and what else could be given up.

    Raises:
        BudgetError: names the lowest that can be.
    """
    if target < lowest:
        kind, initial = pace.kind, pace.counted.initial
        meant = meant_share(kind, target * initial, initial)
        held = held_by(pace.counted.resource)
        raise BudgetError(
            f"budget {kind}={amount} cannot be met: the narrowest network needs "
            f"{lowest:.1%} of the model's {kind}; {meant}raise the budget{held}"
        )
