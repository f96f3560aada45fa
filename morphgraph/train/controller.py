"""Controllers: what moves the regularizer's weight during training.

:class:`Budget` is given what the network may cost. A ratchet: a reference falls linearly from 1 to
the target over the middle of the phase. Every few steps the live cost is predicted some steps ahead
from how fast every strength falls; above the reference the weight grows, by at most ten percent at
a time, below it the weight falls. Towards the end of the phase small errors count more. Of several
budgets each has a weight of its own (:mod:`morphgraph.train.pace`).

Looking ahead matters where many channels have about the same strength (a pointwise and a depthwise
layer that share a penalty): nothing dies for long, then all of them would within a few steps. No
step takes the cost further below the reference than the reference falls in a tenth of the phase:
the strongest that would die stay. The step that reaches the target is taken only as far as the
target asks; then the structure is settled: the weight becomes zero, and the dead stay dead, since
the loss alone would revive some, and add nothing any more (:mod:`morphgraph.train.settled`).

How long the penalty's steps are is read off what the optimizer does
(:mod:`morphgraph.train.motion`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from morphgraph.errors import ArgumentError
from morphgraph.options import Update
from morphgraph.passes.analysis.cost import cost as cost_of, parse_cost, spelling
from morphgraph.passes.planning.constraints import parse_amount
from morphgraph.train.motion import Motion, require_finite
from morphgraph.train.pace import SLACK, ControlStep, Pace, require_within_reach
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.requests import (
    require_amounts,
    require_one_of,
    require_regularizer,
    require_schedule,
    require_steps,
)
from morphgraph.train.resources import Counted, GroupWidth
from morphgraph.train.settled import Settled
from morphgraph.train.sparing import only_as_far
from morphgraph.train.watch import (
    Watch,
    require_state,
    warn_of_a_raise,
    warn_of_another_optimizer,
    warn_of_other_amounts,
)
from morphgraph.train.wiring import (
    Steps,
    inner_optimizer,
    maximized,
    outside_graphs,
    require_owner,
    warn_of_others,
)

__all__ = ["Budget", "ControlStep"]

_AHEAD = 25  # training steps that the prediction looks ahead, in phases long enough
_INTERVAL = (4, 8)  # training steps between two of the penalty, at most; kernels take longer
_FRESH = 0.3  # weight of the newest speed in the moving average of speeds
_STATE = (
    *("step_number", "steps", "met", "_before", "_speed", "_step_size"),
    *("_summed", "_after", "_lived"),
)


class Budget:
    """Meets a budget within a number of training steps, by proximal steps of a regularizer.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> reg = mg.Regularizer(graph, net)
    >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    >>> budget = mg.Budget(reg, {"flops": "50%"}, steps=60).attach(optimizer)
    >>> for _ in range(60):
    ...     loss = net.train()(image(2)).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> budget.met, reg.live_share() <= 0.5
    (True, True)

    Without :meth:`attach` call :meth:`step` after the optimizer's step, before the gradients are
    cleared.

    Args:
        regularizer: whose weights are moved.
        budget: ``{"flops": "50%", "params": "60%"}``: per cost an amount or a share. Every one has
            a weight that moves by itself, and all are met in the end.
        steps: training steps of the whole phase.
        start, end: shares of the phase between which the reference falls.
        interval: training steps between two steps of the penalty, which are control steps; by
            default a two-hundredth of the phase, at most 4; with kernels a little more, at most 8.
        update: as for :class:`~morphgraph.train.fixed_weight.FixedWeight`; with ``"subgradient"``
            add :meth:`loss` to the loss.

    Attributes:
        met: whether the live cost has reached the target, so that the structure is settled.
        paces: of every budget the target, the live share, and the control steps.

    Raises:
        BudgetError: even the narrowest network is above the budget.
        ArgumentError: the budget's cost or amount cannot be read.
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
        require_regularizer(regularizer, Regularizer)
        require_amounts(budget)
        require_schedule(start, end, interval)
        require_one_of("update", update, Update)
        self.regularizer = regularizer
        self.steps = steps = require_steps(steps)
        self.start, self.end = start, end
        longest = _INTERVAL[bool(regularizer.kernels)]
        shortest = steps // (125 if regularizer.kernels else 200)
        self.interval = max(1, min(longest, shortest)) if interval is None else interval
        self.ahead = min(_AHEAD, max(1, steps // 30))
        self.update = update
        self.step_number = 0
        self.met = False
        self.paces = self._paces(budget)
        regularizer.counted = [pace.counted for pace in self.paces]
        regularizer.unfinished = self._unfinished
        regularizer.settled = regularizer.hold = None
        self._motion = Motion(regularizer.scales, steps)
        self._watch = Watch(regularizer, self._motion)
        self._hooks: Steps | None = None
        self._optimizers: list[str] = []  # of which the state is
        self._held: Settled | None = None  # once the budget is met
        self._lived = torch.zeros_like(regularizer.alive(), dtype=torch.int32)  # the last step
        self._before: Tensor | None = None  # strengths at the last control step
        self._after: list[Tensor] = []  # by source, after the penalty's last step
        self._speed: Tensor | None = None  # by how much strengths change per training step
        self._step_size = 1.0  # that the weights are for
        self._summed = 0.0  # effective steps since the penalty's last step
        for pace in self.paces:
            pace.weigh(self._step_size)
        if all(pace.share <= pace.target for pace in self.paces):
            self._settle(regularizer.alive(), regularizer.strengths())

    def _paces(self, budget: Mapping[str, str | float | int]) -> list[Pace]:
        """What is to fall: the budgeted costs, and the groups that have a ceiling."""
        reg = self.regularizer
        counted: list[tuple[Counted, float, object]] = []
        for name, amount in budget.items():
            kind = spelling(parse_cost(name))
            cost = reg.cost if kind == reg.cost.kind else cost_of(reg.graph, kind)
            target = parse_amount(amount, cost.total, cost.unit) / cost.total
            counted.append((Counted(cost, cost.total), target, amount))
        for group, most in reg.ceilings():
            width = Counted(GroupWidth(group), float(group.width))
            counted.append((width, most / group.width, most))
        paces = []
        asked = sum(target < 1 for _, target, _ in counted)
        for each, target, said in counted:
            first = reg.initial_weight(self.steps, each.resource) / max(asked, 1)
            share = reg.needed(each.resource) / each.initial
            begin, end = self.start * self.steps, self.end * self.steps
            pace = Pace(each, target, first if target < 1 else 0.0, share, begin, end)
            lowest = reg.lowest_share(each.resource)
            require_within_reach(pace, target, lowest, said, reg.held_by)
            paces.append(pace)
        return paces

    @property
    def target(self) -> float:
        """What the first budget asks for, as a share of the initial cost."""
        return self.paces[0].target

    @property
    def share(self) -> float:
        """The first budget's live cost as a share of the initial one, after the last step."""
        return self.paces[0].share

    @property
    def trajectory(self) -> list[ControlStep]:
        """Every control step of the first budget."""
        return self.paces[0].trajectory

    def reference(self, step: float | None = None) -> float:
        """Where the live share should be at a training step, by default now."""
        return self.paces[0].reference(self.step_number if step is None else step)

    def loss(self) -> Tensor | float:
        """What is to be added to the loss: the regularizer, or nothing for proximal steps."""
        adds = self.update == "subgradient" and not self.met
        return self.regularizer() if adds else 0.0

    def attach(self, *optimizers: Any, step: Callable[[], None] | None = None) -> "Budget":
        """Step by itself after every real step of the optimizer; of several after the last one.

        Gradient accumulation, steps that a ``GradScaler`` skips and frameworks need nothing else.

        Args:
            optimizers: that train the network; wrappers of frameworks are looked through.
            step: what is called; by default :meth:`step`.

        Raises:
            ArgumentError: no optimizer is given, it is none of torch, or it has none of the
                regularized parameters.
        """
        if not optimizers:
            raise ArgumentError("attach: give the optimizer that trains the network")
        self.detach()
        self.regularizer.bind_again()
        inner = [inner_optimizer(each) for each in optimizers]
        require_owner(inner, self.regularizer.acted_on, self.steps)
        self._attached_to([type(each).__name__ for each in inner])
        self._motion.uphill = maximized(inner)
        moved = frozenset(id(source.parameter) for source in self.regularizer.acted_on)
        warn_of_others(inner, moved)
        self._hooks = Steps(inner, step or self.step, moved)
        return self

    def detach(self) -> None:
        """Step no longer by itself."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def _replaced(self) -> None:
        """Hold what trains against parameters that are new in the module."""
        if self._hooks is not None:
            require_owner(self._hooks.optimizers, self.regularizer.acted_on, self.steps)
        self._watch.look_again(self.step_number)

    def _attached_to(self, names: list[str]) -> None:
        """Say so where another optimizer goes on, and measure it anew."""
        if self._optimizers and self._optimizers != names:
            warn_of_another_optimizer(self._optimizers, names)
            self._motion.forget()
        self._optimizers = names

    @outside_graphs
    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Shrink, after the optimizer's step and before the gradients are cleared.

        Args:
            lr: how long the penalty's step is; by default it is read off what the optimizer does.
                For SGD that is its learning rate over (1 - momentum).

        Raises:
            UnsupportedError: the training has diverged.
        """
        if lr is not None and not lr >= 0:
            raise ArgumentError(f"lr={lr}: give the length of the optimizer's step, from 0")
        if self._hooks is not None and self._hooks.counted and not self._hooks.running:
            self._watch.after_step_by_hand()
            return
        self.step_number += 1
        due = self.step_number % self.interval == 0
        if self._held is not None:
            if due or not self._held.begun:
                self._held.hold()
            return
        if (self.step_number == 1 or due) and self.regularizer.bind_again():
            self._replaced()
        fresh = None if self._hooks is None else self._hooks.fresh
        moved = self._motion.follow(fresh) if self.update == "proximal" else None
        if lr is not None:
            self._summed += lr
        elif moved is not None:
            self._summed += moved
        if due:
            self._shrink(measured=lr is None and moved is None)
        self._motion.remember()
        self._watch.after_step(self.step_number, self.steps, self.shortfall)

    def _shrink(self, *, measured: bool) -> None:
        """A step of the penalty, and of the controller.

        Args:
            measured: whether the effective step is the speed of the strengths.
        """
        reg = self.regularizer
        parts = reg.measured()
        if measured and self.update == "proximal":
            self._summed = self._motion.at_speed(self._after, [value for _, value in parts])
        # Until the reference falls, the weights make up for the length of steps.
        if self._summed > 0 and self.step_number <= self.start * self.steps:
            self._step_size = self._summed / self.interval
            for pace in self.paces:
                pace.weigh(self._step_size)
        step = reg.shrinkage(self._summed if self.update == "proximal" else 0.0, parts)
        self._summed = 0.0
        require_finite(bool(step.before.isfinite().all()))
        levels = self._levels()
        self._lived = self._lived.masked_fill(reg.alive(step.before), self.step_number)
        step, spared = only_as_far(reg, self.paces, step, levels, self._lived)
        if self.update == "proximal":
            reg.shrink(step)
        reg.known = step.after
        self._after = [value * f for (_, value), f in zip(parts, step.factors, strict=True)]
        live = reg.live_widths(step.after)
        for pace in self.paces:
            pace.share = reg.needed_at(pace.counted.resource, live) / pace.counted.initial
        settled = all(
            pace.share <= pace.target == level
            for pace, level in zip(self.paces, levels, strict=True)
        )
        if settled:
            alive = reg.alive(step.after) | spared
            # The loss may have pushed a whole group below the threshold.
            alive = alive | reg.protected(step.after, ~alive)
            self._settle(alive, step.after).hold()
        else:
            self._control(step.after)

    def _levels(self) -> list[float]:
        """Below which shares no step of the penalty may take the costs."""
        at = self.step_number + SLACK * self.steps
        references = [pace.reference(at) for pace in self.paces]
        return [
            pace.target if reference < pace.target + 1e-9 else reference
            for pace, reference in zip(self.paces, references, strict=True)
        ]

    def _control(self, strengths: Tensor) -> None:
        """Predict the shares some steps ahead, and move the weights by that.

        Strengths that fall keep their mean speed, those that rise stay as they are.
        """
        ahead = strengths
        if self._before is not None:
            speed = (strengths - self._before) / self.interval
            if self._speed is not None:
                speed = _FRESH * speed + (1 - _FRESH) * self._speed
            self._speed = speed
            ahead = strengths + self.ahead * speed.clamp_max(0)
        self._before = strengths
        live = self.regularizer.live_widths(ahead)
        for pace in self.paces:
            resource, initial = pace.counted.resource, pace.counted.initial
            pace.control(
                self.step_number,
                self.ahead,
                self.regularizer.needed_at(resource, live) / initial,
                self.steps,
                moves=self._speed is not None,
                overshoots=self.update == "subgradient",
            )
        self._watch.after_control(self.paces, self.step_number, self.steps, strengths)

    def _settle(self, alive: Tensor, strengths: Tensor) -> Settled:
        """Fix the structure: from now on the weights are zero and dead channels stay dead.

        The network is as it was until the next step, in case a state is loaded.
        """
        self.met = True
        self._held = held = Settled(self.regularizer, ~alive)
        self.regularizer.settled, self.regularizer.hold = held.dead, held.hold
        strengths = strengths.detach().masked_fill(held.dead, 0.0)
        self.regularizer.known = strengths
        live = self.regularizer.live_widths()
        for pace in self.paces:
            pace.counted.weight = 0.0
            needed = self.regularizer.needed_at(pace.counted.resource, live)
            pace.share = needed / pace.counted.initial
        return held

    def change(self, budget: Mapping[str, str | float | int], steps: int | None = None) -> None:
        """Give other amounts in mid-training; the references go there from where they are.

        Args:
            budget: amounts for some of the costs that are budgeted.
            steps: of the whole phase from now on, counted from its begin; the same if not given.

        Raises:
            ArgumentError: a cost is not budgeted, or no steps are left.
            BudgetError: the narrowest network is above a budget.
        """
        reg = self.regularizer
        steps = self.steps if steps is None else require_steps(steps)
        if steps <= self.step_number:
            raise ArgumentError(
                f"step {self.step_number} of {steps}: no steps are left for another budget; give "
                "steps, counted from the begin of the phase"
            )
        paces = {pace.kind: pace for pace in self.paces}
        targets = []
        for name, amount in budget.items():
            kind = spelling(parse_cost(name))
            if kind not in paces:
                raise ArgumentError(
                    f"budget {kind}: only {', '.join(paces)} can change; for other costs detach() "
                    "this budget and make a new mg.Budget"
                )
            resource = paces[kind].counted.resource
            target = parse_amount(amount, resource.total, resource.unit) / resource.total
            lowest = reg.lowest_share(resource)
            require_within_reach(paces[kind], target, lowest, amount, reg.held_by)
            targets.append((paces[kind], target))
        for pace, target in targets:  # all of them, or none
            if self.met and target > pace.target:
                warn_of_a_raise(pace, target)
            end = self.step_number + self.end * (steps - self.step_number)
            pace.aim(target, max(self.step_number, self.start * steps), max(end, self.end * steps))
            if not pace.first:
                pace.first = reg.initial_weight(steps, pace.counted.resource)
        self.steps = self._motion.steps = steps
        if self.met and any(pace.share > pace.target for pace in self.paces):
            self.met, self._held, reg.settled, reg.hold = False, None, None, None
            self._before = self._speed = None
            self._after = []
            self._motion.remember()
            for pace in self.paces:
                pace.weigh(self._step_size)

    def shortfall(self) -> str:
        """By what the phase has missed its budget so far; empty where it is met."""
        if self.met:
            return ""
        missed = [pace for pace in self.paces if pace.share > pace.target] or self.paces
        said = ", ".join(f"{p.share:.1%} of {p.kind} instead of {p.target:.1%}" for p in missed)
        return f"{said} after {self.step_number} of {self.steps} steps"

    def _unfinished(self) -> str:
        """Why no plan should be made yet; empty where the phase is over, or the budget met."""
        if self.met or self.step_number >= self.steps:
            return ""
        if not self.step_number:
            names = " and ".join(self._optimizers) or "an optimizer"
            return f"no step of {names} was counted; attach the budget to what steps"
        missed = self.shortfall()
        return (
            f"{missed}; promise mg.Budget the optimizer steps that the phase takes (steps=, "
            "penalty.begin)"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that changes during training, the network apart: plain data and tensors.

        Save it with the network's and the optimizer's.
        """
        state = {name: getattr(self, name) for name in _STATE}
        held = self._held
        state |= {"_dead": held and held.dead, "_silent": held and held.silent}
        state["paces"] = {pace.kind: pace.state_dict() for pace in self.paces}
        state["motion"] = self._motion.state_dict()
        state["strengths"] = self.regularizer.state_dict()
        return state | {"watch": self._watch.state_dict(), "optimizers": list(self._optimizers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; the network must be as it was when :meth:`state_dict` was taken.

        Amounts and steps go on as they were; a warning says so where this budget has others.

        Raises:
            ArgumentError: it is no state of a budget, or of other budgets.
        """
        kinds = [pace.kind for pace in self.paces]
        require_state(state)
        if sorted(state["paces"]) != sorted(kinds):
            raise ArgumentError(
                f"the state is of a budget on {', '.join(state['paces'])}, not on "
                f"{', '.join(kinds)}; make the budget as it was"
            )
        warn_of_other_amounts(self.paces, self.steps, state)
        self.regularizer.load_state_dict(state["strengths"])
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
        dead, reg = state["_dead"], self.regularizer
        self._held = None if dead is None else Settled(reg, dead, state.get("_silent"))
        reg.settled, reg.hold = dead, None if self._held is None else self._held.hold
        for pace in self.paces:
            pace.load_state_dict(state["paces"][pace.kind])
        self._motion.steps = self.steps
        self._motion.load_state_dict(state["motion"])
        self._watch.load_state_dict(state["watch"])
        names, self._optimizers = self._optimizers, list(state["optimizers"])
        if names and self._optimizers:
            self._attached_to(names)
