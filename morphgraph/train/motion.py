"""What moves strengths beside the penalty, and how far: the same for every optimizer.

A penalty can be answered by the loss only as fast as the optimizer moves what is penalized.
Stochastic gradient descent moves a scale in proportion to its gradient, so that a channel resists
as much as the loss needs it. Adam, Lion, RMSprop and others move all scales about equally far: none
resists more than another, and where the penalty's step is longer than theirs, none resists at all.

So the program moves the regularized scales by itself. After every step of the optimizer its
movement of them is undone, and each moves in proportion to its gradient, with a momentum of 0.9, at
one rate for all of them. The rate is what the optimizer's movements come to, by regression on the
gradients: of SGD it is the learning rate, and nothing changes. It is at least what lets the loss
answer within the phase: gradients of the usual size that all point one way move a scale by
:data:`REACH`. Weight decay of the scales is undone with the rest.

Kernels are moved by the optimizer alone. Of networks without regularized scales the speed at which
strengths move is measured, so that the penalty follows the schedule of the learning rate.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from morphgraph.errors import UnsupportedError
from morphgraph.train.sources import BoundSource

MOMENTUM = 0.9
REACH = 10.0
"""How far a scale, whose strength begins at 1, can be moved within a phase by its gradients.

They are noise for the most part: what remains of their sum is about a tenth of their size.
"""
_HORIZON = 0.95  # moving average of movements and gradients, for the regression
_LONG = 0.99  # the same of the gradients' size
_SPEED = 0.9  # the same of the speed of strengths, per step of the penalty
_STATE = ("_last", "_buffer", "_moves", "_pulls", "_moved", "_size", "_counted", "_speed")


class Motion:
    """Follows the optimizer, and moves the scales in its place.

    Args:
        scales: the regularized scales; frozen ones are left alone.
        steps: of the phase.

    Attributes:
        no_gradient: whether the gradients were gone when they were asked for.
        uphill: the parameters, by ``id``, whose optimizer maximizes.
    """

    def __init__(self, scales: Sequence[BoundSource], steps: int) -> None:
        self.scales = [source for source in scales if not source.frozen]
        self.steps = steps
        self.no_gradient = False
        self.uphill: frozenset[int] = frozenset()
        self._last: Tensor | None = None  # the scales after the last step
        self._buffer: Tensor | None = None  # sum of gradients, with momentum
        self._moves: Tensor | None = None  # moving averages: of the optimizer's movements
        self._pulls: Tensor | None = None  # and of the sums of gradients
        self._moved: Tensor | None = None  # which scales the optimizer has moved so far
        self._size = 0.0  # mean square of gradients, a sum of weights ``_counted``
        self._counted = 0.0
        self._speed = 0.0
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Take the scales as they are for what the next step begins with."""
        if self.scales:
            self._last = self._values()

    @torch.no_grad()
    def follow(self, fresh: Collection[int] | None = None) -> float | None:
        """After the optimizer's step: move the scales; the effective step, if there are scales.

        It is the distance per unit of a gradient that lasts: for SGD the learning rate over
        (1 - momentum).

        Args:
            fresh: the parameters, by ``id``, whose gradients are of this step; None: all. See
                :class:`morphgraph.train.wiring.Steps`.

        Raises:
            UnsupportedError: scales or gradients are no finite numbers.
        """
        if not self.scales or self._last is None:
            return None
        now = self._values()
        moves = now - self._last
        if self._moved is None:
            zeros = torch.zeros_like(now)
            self._moved = zeros.bool()
            self._buffer, self._moves, self._pulls = zeros, zeros.clone(), zeros.clone()
        assert self._buffer is not None
        assert self._moves is not None
        assert self._pulls is not None
        gradients = [self._gradient(source, fresh) for source in self.scales]
        if fresh is None and all(gradient is None for gradient in gradients):
            self._moved |= moves != 0
            self.no_gradient |= bool(moves.any())
            return self._by_speed(float(moves.abs().mean()))
        gradient = torch.cat(
            [
                torch.zeros_like(source.index, dtype=now.dtype) if g is None else g.to(now.dtype)
                for source, g in zip(self.scales, gradients, strict=True)
            ]
        )
        finite = torch.stack([now.isfinite().all(), gradient.isfinite().all()])
        if not bool(finite.all()):
            require_finite(bool(finite[0]) and not bool(moves.any()), "the gradients")
            return 0.0  # a step that a GradScaler has skipped
        self._moved |= moves != 0
        self._buffer.mul_(MOMENTUM).add_(gradient)
        self._moves.lerp_(moves, 1 - _HORIZON)
        self._pulls.lerp_(self._buffer, 1 - _HORIZON)
        along, square, size = torch.stack(
            [
                -(self._moves * self._pulls).sum(),
                self._pulls.square().sum(),
                gradient.square().mean(),
            ]
        ).tolist()
        self._size = _LONG * self._size + (1 - _LONG) * size
        self._counted = _LONG * self._counted + (1 - _LONG)
        usual = (self._size / self._counted) ** 0.5
        rate = max(
            along / square if square > 0 else 0.0,
            (1 - MOMENTUM) * REACH / (self.steps * usual) if usual > 0 else 0.0,
        )
        own = self._last - rate * self._buffer
        self._write(torch.where(self._moved, own, now))
        return rate / (1 - MOMENTUM)

    def at_speed(self, before: Sequence[Tensor], strengths: Sequence[Tensor]) -> float:
        """How far strengths move between two steps of the penalty, in the mean: a moving average.

        Args:
            before: by source, after the penalty's last step; empty at first.
            strengths: now.
        """
        if not before or not strengths:
            return self._speed or 1.0
        moved = torch.cat(list(strengths)) - torch.cat(list(before))
        return self._by_speed(float(moved.abs().mean()))

    def unmoved(self) -> list[str]:
        """Names of the scales that the optimizer has not moved in any place, though it might."""
        if self._moved is None:
            return []
        parts = torch.split_with_sizes(self._moved, [len(source.index) for source in self.scales])
        return [
            source.name
            for source, moved in zip(self.scales, parts, strict=True)
            if not source.frozen and not moved.any()
        ]

    def forget_movements(self) -> None:
        """Forget which scales have moved: parameters were replaced."""
        if self._moved is not None:
            self._moved.zero_()

    def forget(self) -> None:
        """Forget what was measured of the optimizer: another one goes on."""
        self._buffer = self._moves = self._pulls = self._moved = None
        self._size = self._counted = self._speed = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that changes: numbers and tensors."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        for name in _STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def _gradient(self, source: BoundSource, fresh: Collection[int] | None) -> Tensor | None:
        """Of what the optimizer minimizes; None of one that is not of this step."""
        if source.frozen or not (fresh is None or id(source.parameter) in fresh):
            return None
        found = source.gradient()
        return -found if found is not None and id(source.parameter) in self.uphill else found

    def _by_speed(self, speed: float) -> float:
        known = self._speed > 0
        self._speed = _SPEED * self._speed + (1 - _SPEED) * speed if known else speed
        return self._speed

    def _values(self) -> Tensor:
        return torch.cat([source.values().detach() for source in self.scales]).float()

    def _write(self, values: Tensor) -> None:
        parts = torch.split_with_sizes(values, [len(source.index) for source in self.scales])
        for source, part in zip(self.scales, parts, strict=True):
            if not source.frozen:  # in mid-training
                source.set(part)


def require_finite(finite: bool, what: str = "the weights") -> None:
    """Refuse to decide by numbers that are none.

    Raises:
        UnsupportedError: what to do about it.
    """
    if not finite:
        raise UnsupportedError(
            f"the training has diverged: {what} are no finite numbers (NaN or infinite); lower the "
            "learning rate, clip gradients, or go back to the last checkpoint"
        )
