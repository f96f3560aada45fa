"""Sanity checks before a long run: does the penalty reach the network at all?

MorphNet's protocol (Gordon et al., CVPR 2018, section 5): within a few steps a much too strong
regularizer must collapse the cost, and a weight of zero must not move it. Where either fails, the
training loop is wired wrongly, and a long run would find that out late.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.options import Strength
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.train.fixed_weight import FixedWeight
from morphgraph.train.lifted import lift_to_train
from morphgraph.train.phases import NEVER_STEPPED, Penalty
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.wiring import Steps, inner_optimizer, require_owner

STEPS = 30
_STRONG = 100.0  # times what would zero an average channel within the steps
_COLLAPSED = 0.1  # share of what can be removed that may be left
_MOVED = 0.01  # share of the cost within which it has not moved


@dataclass(frozen=True)
class Check:
    """One check and its result. ``reason`` says why it failed, and is empty where it passed."""

    name: str
    before: float
    after: float
    steps: int
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it went as it must."""
        return not self.reason


@dataclass(frozen=True)
class SmokeReport:
    """The checks; costs are shares of the network's."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all went as they must."""
        return all(check.passed for check in self.checks)


class _EnoughError(Exception):
    """Ends a phase from within ``penalty.step``."""


class FixedPenalty(FixedWeight):
    """A penalty of a fixed strength, that ends the phase after some steps.

    Args:
        regularizer: of the network that is trained.
        strength: 1 would zero an average channel within the steps, were there no loss, whatever
            the optimizer does.
        steps: after which the phase is ended.
    """

    def __init__(self, regularizer: Regularizer, strength: float, steps: int) -> None:
        super().__init__(regularizer, strength * regularizer.initial_weight(steps))
        self.steps = steps
        self.taken = 0
        self._hooks: Steps | None = None

    def attach(self, *optimizers: Any) -> "FixedPenalty":
        """Step by itself after every step of the optimizers."""
        inner = [inner_optimizer(each) for each in optimizers]
        require_owner(inner, self.regularizer.acted_on, self.steps)
        self._hooks = Steps(inner, self.step)
        return self

    def step(self, lr: float | None = None) -> None:
        """Shrink once; raise when it is enough."""
        self.regularizer.bind_again()
        super().step(0.0 if lr == 0 else 1.0)
        self.taken += 1
        if self.taken >= self.steps:
            if self._hooks is not None:
                self._hooks.remove()
            raise _EnoughError


def smoke(
    net: nn.Module,
    example: tuple[torch.Tensor, ...],
    fit: Callable[[nn.Module, Penalty], None],
    *,
    cost: str = "flops",
    strength: Strength = "auto",
    steps: int = STEPS,
) -> SmokeReport:
    """Check within a few steps that a training loop shrinks a network when, and only when, it must.

    The loop is run three times: with a penalty that is much too strong, with none, and on what
    :func:`morphgraph.to_torch` makes of the network, which is what is trained after a resize. An
    operator that has no lowering is found before any of them. For a loop of your own, outside of
    ``mg.morph``, give a function of the network and the penalty that runs some of its steps, with
    the penalty in the place of your :class:`~morphgraph.Budget`.

    Args:
        net: the network; copies of it are trained.
        example: inputs for the export.
        fit: as for :func:`morphgraph.morph`; it is ended from within ``penalty.step``.
        cost, strength: of the regularizer.
        steps: of either check.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ...     for _ in range(100):
    ...         optimizer.zero_grad()
    ...         net(image(2)).square().mean().backward()
    ...         optimizer.step()
    ...         penalty.step(lr=0.1)
    >>> mg.smoke(residual_cnn(), (image(2),), fit).passed
    True
    >>> mg.smoke(residual_cnn(), (image(2),), lambda net, penalty: None).checks[0].reason
    'fit never called penalty.step: call it after every optimizer step'
    """
    try:
        graph = lift_to_train(net, example)
        made = to_torch(graph.model).train(net.training)
    except UnsupportedError as error:
        return SmokeReport((Check("to_torch", 1.0, 1.0, 0, str(error)),))
    report = smoke_graph(graph, lambda: copy.deepcopy(net), fit, cost, strength, steps=steps)
    device = next(iter(net.parameters())).device
    return SmokeReport((*report.checks, _runs(graph, made.to(device), fit, cost, strength, steps)))


def _runs(
    graph: ChannelGraph,
    net: nn.Module,
    fit: Callable[[nn.Module, FixedPenalty], None],
    cost: str,
    strength: Strength,
    steps: int,
) -> Check:
    """Whether a training loop runs on the network that ``to_torch`` makes."""
    regularizer = Regularizer(graph, net, cost, strength)
    penalty = FixedPenalty(regularizer, 0.0, steps)
    reason = ""
    try:
        fit(net, penalty)
    except _EnoughError:
        pass
    except Exception as error:  # noqa: BLE001 (whatever a user's code raises)
        reason = (
            f"fit does not run on what to_torch makes of the network: {type(error).__name__}: "
            f"{error}; after a resize it is given such a module: use its call alone, or resize "
            "your own class with mg.resize_module"
        )
    return Check("what to_torch makes", 1.0, regularizer.live_share(), penalty.taken, reason)


def smoke_graph(
    graph: ChannelGraph,
    make: Callable[[], nn.Module],
    fit: Callable[[nn.Module, FixedPenalty], None],
    cost: str = "flops",
    strength: Strength = "auto",
    *,
    min_width: int = 1,
    steps: int = STEPS,
) -> SmokeReport:
    """The same for a lifted network, of which ``make`` makes a new module for either check."""
    checks = []
    for name, force in (("much too strong", _STRONG), ("zero", 0.0)):
        net = make()
        regularizer = Regularizer(graph, net, cost, strength, min_width=min_width)
        penalty = FixedPenalty(regularizer, force, steps)
        before = regularizer.live_share()
        with suppress(_EnoughError):
            fit(net, penalty)
        after = regularizer.live_share()
        if not penalty.taken:
            reason = NEVER_STEPPED
        elif force:
            reason = _collapse(before, after, regularizer.lowest_share())
        else:
            reason = _stillness(before, after)
        checks.append(Check(name, before, after, penalty.taken, reason))
    return SmokeReport(tuple(checks))


def _collapse(before: float, after: float, lowest: float) -> str:
    """Why the cost did not fall as far as it must; empty where it did."""
    if before - lowest < _MOVED:
        return "nothing can shrink: see `analyze` for the reasons"
    if after - lowest > _COLLAPSED * (before - lowest):
        return (
            "the cost did not collapse: is penalty.step called after the optimizer's step, on the "
            "module that is trained, with its learning rate over 1 - momentum?"
        )
    return ""


def _stillness(before: float, after: float) -> str:
    """Why the cost moved without a penalty; empty where it did not."""
    if abs(after - before) > _MOVED:
        return (
            "the cost moved without a penalty: is there weight decay on BatchNorm scales, or is "
            "the learning rate too high?"
        )
    return ""
