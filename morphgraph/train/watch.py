"""What a :class:`morphgraph.train.controller.Budget` warns of while it runs, once each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from morphgraph.errors import ArgumentError, warn
from morphgraph.onnx_io.check import escape
from morphgraph.train.motion import Motion
from morphgraph.train.pace import SLACK, Pace
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.wiring import Probe, warn_of_unmoved

_LOOK = 0.05  # of the phase: after this the wiring is looked at
_FEW = 0.05  # of a group's channels: what is nearly pruned
_SLOW, _FAR, _TWICE = -1, -2, -3  # beside the indices of groups


class Watch:
    """Looks at a phase while it runs.

    Args:
        regularizer: whose weights the phase moves.
        motion: what is known of the optimizer.
    """

    def __init__(self, regularizer: Regularizer, motion: Motion) -> None:
        self._regularizer = regularizer
        self._motion = motion
        self._probe: Probe | None = Probe(regularizer)
        self._since = 0  # the step from which on the wiring is looked at
        self._warned: list[int] = []

    def after_step(self, step: int, steps: int, shortfall: Callable[[], str]) -> None:
        """Look at the wiring once, and at the end of the phase at what it has missed.

        Args:
            step: of ``steps``, from 1.
            shortfall: says by what the budget is missed; empty where it is met.
        """
        if self._probe is not None and step >= self._since + max(10, _LOOK * steps):
            warn_of_unmoved(self._motion, self._probe, step - self._since)
            if self._motion.no_gradient:
                warn(
                    "gradients were cleared before budget.step(): scales move as the optimizer "
                    "moves them, and none resists by how much it is needed; step before "
                    "zero_grad, or attach the budget to the optimizer"
                )
            self._probe = None
        if step == steps and (missed := shortfall()):
            warn(
                f"the phase ends at {missed}: its plan will remove the rest at once; train longer, "
                "or with a higher learning rate"
            )

    def after_control(
        self, paces: Sequence[Pace], step: int, steps: int, strengths: Tensor
    ) -> None:
        """Warn early: nothing shrinks, too much does, or a group is nearly pruned."""
        first = paces[0]
        if step > steps / 2 and first.share > 1 - 0.1 * (1 - first.target) and self._once(_SLOW):
            warn(
                f"at half of the phase {first.share:.1%} of the cost are alive, {first.target:.1%} "
                "are wanted: train longer, or with a higher learning rate"
            )
        ahead = step + 2 * SLACK * steps
        if all(pace.share < pace.reference(ahead) for pace in paces) and self._once(_FAR):
            warn(
                f"the cost is at {first.share:.1%}, far below the reference of "
                f"{first.reference(step):.1%}, though no step of the penalty goes so far: does "
                "anything else shrink the scales, such as weight decay or another loss?"
            )
        limits = self._regularizer.limits
        widths = self._regularizer.live_widths(strengths)
        for group in self._regularizer.graph.groups:
            few = widths[group.index] <= _FEW * group.width
            if few and limits.allows(group) and self._once(group.index):
                warn(
                    f"group '{escape(group.name)}' is nearly pruned: {int(widths[group.index])} of "
                    f"{group.width} channels left; min_width (--min-width) sets a floor"
                )

    def look_again(self, step: int) -> None:
        """Look at the wiring once more: parameters were replaced before this step."""
        self._probe = Probe(self._regularizer)
        self._since = step
        self._motion.forget_movements()

    def after_step_by_hand(self) -> None:
        """Warn where an attached budget is also stepped by hand: every step would count twice."""
        if self._once(_TWICE):
            warn(
                "budget.step() is left out: the budget is attached to the optimizer and steps "
                "after it by itself; remove the call, or do not attach"
            )

    def state_dict(self) -> dict[str, Any]:
        """What has been looked at, and what has been said."""
        looked = {"looked": self._probe is None, "since": self._since}
        return looked | {"warned": list(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        self._probe = None if state["looked"] else Probe(self._regularizer)
        self._since = state.get("since", 0)
        self._warned = list(state["warned"])

    def _once(self, what: int) -> bool:
        if what in self._warned:
            return False
        self._warned.append(what)
        return True


def require_state(state: object) -> None:
    """Refuse what no budget has written.

    Raises:
        ArgumentError: says what is given, and what to give.
    """
    wanted = ("paces", "motion", "strengths", "watch", "optimizers")
    missing = [key for key in wanted if not (isinstance(state, Mapping) and key in state)]
    if missing:
        what = "part of the state" if len(missing) < len(wanted) else "state"
        named = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ArgumentError(
            f"this is no {what} of a budget: it has {escape(named) or 'nothing'}, and no "
            f"{', '.join(missing)}; give what budget.state_dict() returned"
        )


def warn_of_another_optimizer(before: Sequence[str], now: Sequence[str]) -> None:
    """Warn where another optimizer goes on than the one that the state is of."""
    warn(
        f"this state is of a run with {' and '.join(before)}, and now {' and '.join(now)} trains: "
        "what was measured of its steps is forgotten; give the same optimizer, with its own "
        "state, to go on as before"
    )


def warn_of_other_amounts(paces: Sequence[Pace], steps: int, state: Mapping[str, Any]) -> None:
    """Warn where a run goes on that was promised other amounts, or another length."""
    saved = state["paces"]
    asked = [f"{p.kind} at {p.target:.1%}" for p in paces if p.target != saved[p.kind]["target"]]
    goes_on = [
        f"{p.kind} at {saved[p.kind]['target']:.1%}"
        for p in paces
        if p.target != saved[p.kind]["target"]
    ]
    if steps != state["steps"]:
        asked.append(f"{steps} steps")
        goes_on.append(f"{state['steps']} steps")
    if asked:
        warn(
            f"the state goes on to {', '.join(goes_on)}, not to {', '.join(asked)}; to change that "
            "call budget.change(budget, steps) after it is loaded"
        )


def warn_of_a_raise(pace: Pace, target: float) -> None:
    """Warn where a budget that is met gets larger."""
    warn(
        f"budget {pace.kind} was met at {pace.share:.1%} and is raised to {target:.1%}: the "
        "channels that are gone do not come back; go back to a checkpoint before"
    )
