"""The budget controller: moves the regularizer's weight so that training ends at the budget.

A ratchet: a reference falls linearly from 1 to the target over the middle of the phase. While the
live cost is above it, the weight grows by at most ten percent at a time; below it, the weight
falls, more slowly. The first time that the live cost is at the target, the structure is decided:
the weight becomes zero, and the channels that are dead then stay dead, since the loss alone would
revive some.
"""

from collections.abc import Mapping
from math import exp
from typing import Any

import torch

from morphgraph.errors import BudgetError, UnsupportedError
from morphgraph.passes.goals import parse_amount
from morphgraph.train.regularizer import Regularizer

_RISE, _FALL = 0.1, 0.03  # largest change of log(weight) per control step


class Budget:
    """Meets a budget within a number of training steps, by proximal steps of a regularizer.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.examples import image, residual_cnn
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
        interval: training steps between two control steps, away from the target.

    Raises:
        BudgetError: even the narrowest network is above the budget.
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
        interval: int = 4,
    ) -> None:
        kind = regularizer.cost.kind
        if set(budget) != {kind}:
            raise UnsupportedError(
                f"budget {dict(budget)}: the regularizer counts {kind}; give one budget, on {kind}"
            )
        self.regularizer = regularizer
        initial = regularizer.initial_cost
        self.target = parse_amount(budget[kind], initial, regularizer.cost.unit) / initial
        lowest = regularizer.lowest_share()
        if self.target < lowest:
            raise BudgetError(
                f"budget {kind}={budget[kind]} cannot be met: the narrowest network needs "
                f"{lowest:.1%} of the model's {kind}; raise the budget"
            )
        self.steps = steps
        self.start, self.end, self.interval = start, end, interval
        self.step_number = 0
        self.share = regularizer.live_share()
        self.met = False
        self._dead: torch.Tensor | None = None
        regularizer.weight = self._first_weight()
        self._decide()

    def _first_weight(self) -> float:
        """A weight at which an average channel, untouched by the loss, would last for the phase."""
        marginals = self.regularizer.marginals()
        mean = float(marginals[marginals > 0].mean()) / self.regularizer.initial_cost
        return 1.0 / (self.steps * mean)

    @property
    def reference(self) -> float:
        """Where the live share should be by now."""
        progress = self.step_number / self.steps
        fallen = min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))
        return 1.0 + fallen * (self.target - 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training goes on, the network apart."""
        moving = {k: v for k, v in vars(self).items() if k != "regularizer"}
        return moving | {"weight": self.regularizer.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken; the network must be as it was then."""
        own = dict(state)
        self.regularizer.weight = own.pop("weight")
        vars(self).update(own)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Shrink once, after the optimizer's step.

        Args:
            lr: the optimizer's effective step: its learning rate over (1 - momentum).
        """
        self.step_number += 1
        if self._dead is not None:
            self.regularizer.silence(self._dead)
            return
        self.regularizer.proximal_step(lr)
        near = self.share < self.target + 0.05
        if not near and self.step_number % self.interval:
            return
        self.share = self.regularizer.live_share()
        if self._decide():
            return
        error = self.share - self.reference
        change = min(_RISE, error) if error > 0 else max(-_FALL, 0.1 * error)
        self.regularizer.weight *= exp(change)

    def _decide(self) -> bool:
        """Whether the target is reached; if so, the structure is settled."""
        self.met = self.share <= self.target
        if self.met:
            self.regularizer.weight = 0.0
            self._dead = ~self.regularizer.alive()
            self.regularizer.silence(self._dead)
        return self.met
