"""Whether a penalty, an optimizer and a network belong together, looked at while they run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from morphgraph.errors import ArgumentError, warn
from morphgraph.onnx_io.check import escape
from morphgraph.train.motion import Motion
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.sources import BoundSource, is_shared, whole

_Function = TypeVar("_Function", bound=Callable[..., Any])

_following: "WeakKeyDictionary[Optimizer, WeakSet[Steps]]" = WeakKeyDictionary()
_SOME = 16  # channels of a kernel that are remembered, and numbers of each
_DECAYED = 0.05  # of a strength within the phase: less decay is not worth a word


def outside_graphs(function: _Function) -> _Function:
    """The function, into which ``torch.compile`` does not look: it would compile the controller."""
    return cast("_Function", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Probe:
    """A few numbers of every kernel, whose proportions the penalty does not change."""

    def __init__(self, regularizer: Regularizer) -> None:
        scales = {id(source) for source in regularizer.scales}
        self._kernels = [s for s in regularizer.acted_on if id(s) not in scales and not s.frozen]
        self._before = [_proportions(source) for source in self._kernels]

    def unmoved(self) -> list[str]:
        """Names of the kernels that nothing but the penalty has moved."""
        return [
            source.name
            for source, before in zip(self._kernels, self._before, strict=True)
            if not source.frozen and _are_alike(before, _proportions(source))
        ]

    @property
    def count(self) -> int:
        """How many kernels there are."""
        return len(self._kernels)


@torch.no_grad()
def _proportions(source: BoundSource) -> Tensor | None:
    """Some numbers of some channels, each channel's of length 1 or zero: ``[channels, numbers]``.

    Of one channel alone it could be that no gradient reaches it: a unit behind a ReLU that is
    silent from the beginning.
    """
    if is_shared(source.parameter) or source.parameter.dim() < 2:
        return None
    places = source.positions[:: max(1, len(source.positions) // _SOME)][:_SOME]
    rows = source.parameter.index_select(source.axis, places).movedim(source.axis, 0)
    rows = rows.reshape(len(places), -1)[:, :_SOME].float()
    return torch.nn.functional.normalize(rows) if rows.shape[1] > 1 else None


def _are_alike(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether the channels that are not zero have the proportions that they had."""
    if before is None or now is None:
        return False
    both = before.any(dim=1) & now.any(dim=1)
    return bool(both.any()) and torch.allclose(before[both], now[both], rtol=1e-6, atol=1e-7)


def warn_of_unmoved(motion: Motion, probe: Probe, step: int) -> None:
    """Warn of parameters that only the penalty moves: nobody trains them."""
    unmoved = motion.unmoved() + probe.unmoved()
    count = len(motion.scales) + probe.count
    if unmoved:
        warn(
            f"nothing but the penalty moves {len(unmoved)} of {count} regularized parameters in "
            f"{step} steps, such as '{escape(unmoved[0])}': are they in the optimizer, and is it "
            "this module that is trained, not a copy of it?"
        )


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of torch inside a framework's wrapper.

    Raises:
        ArgumentError: there is none, so that nothing says when it has stepped.
    """
    inside = getattr(optimizer, "optimizer", None)
    if inside is not None and inside is not optimizer:
        return inner_optimizer(inside)
    if isinstance(optimizer, list | tuple | dict):
        raise ArgumentError(
            f"attach: a {type(optimizer).__name__} is no optimizer; give several one by one, "
            "budget.attach(first, second)"
        )
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, which says when it has "
            "stepped; call budget.step() after its step instead"
        )
    if not hasattr(type(optimizer).step, "hooked"):  # Optimizer.__init__ makes it so
        raise ArgumentError(
            f"{type(optimizer).__name__} wraps another optimizer and runs no hooks after its step; "
            "give the optimizer inside, or call budget.step() after the step instead"
        )
    return optimizer


def require_owner(
    optimizers: Sequence[Optimizer], sources: Iterable[BoundSource], steps: int
) -> None:
    """Hold what optimizers train against what is regularized.

    Raises:
        ArgumentError: they have none of the regularized parameters.
    """
    owned: dict[int, Mapping[str, Any]] = {
        id(parameter): group
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    acted_on = [source for source in sources if not source.frozen]
    missing = [source.name for source in acted_on if id(source.parameter) not in owned]
    names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
    if acted_on and len(missing) == len(acted_on):
        raise ArgumentError(
            f"{names} has none of the {len(acted_on)} regularized parameters, such as "
            f"'{escape(missing[0])}': give the optimizer of the module that the regularizer was "
            "made for; with fully_shard make the optimizer after it"
        )
    if missing:
        warn(
            f"{len(missing)} of {len(acted_on)} regularized parameters are in no optimizer, such "
            f"as '{escape(missing[0])}': only the penalty will move them; exclude their groups"
        )
    decayed = [
        source.name
        for source in acted_on
        if (group := owned.get(id(source.parameter))) and _decay(group, steps) > _DECAYED
    ]
    if decayed:
        warn(
            f"weight decay also shrinks {len(decayed)} of {len(acted_on)} regularized parameters, "
            f"such as '{escape(decayed[0])}': it is undone on scales while the budget shrinks "
            "them, and counts on kernels; give them a group with weight_decay=0"
        )


def _decay(group: Mapping[str, Any], steps: int) -> float:
    """By what share decay shrinks a group's parameters in so many steps, by its settings."""
    decay, lr = (float(group.get(key) or 0.0) for key in ("weight_decay", "lr"))
    momentum = float(group.get("momentum") or 0.0)
    return decay * lr * steps / max(1.0 - momentum, 1e-3)


def maximized(optimizers: Sequence[Optimizer]) -> frozenset[int]:
    """The parameters, by ``id``, whose optimizer goes along their gradients."""
    return frozenset(
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group.get("maximize")
        for parameter in group["params"]
    )


class Steps:
    """Calls back when all of several optimizers have stepped: one training step.

    A step that one of them leaves out (a scaler that found no finite gradients) counts once the
    others step again. A fused optimizer is asked to leave it out by itself, and its hooks run; the
    gradients that a scaler has multiplied it divides in place, so that they are real ones here.

    Attributes:
        moved: the parameters, by ``id``, that are changed then.
        fresh: the parameters, by ``id``, whose gradients belong to the step that is counted; None:
            all. Those of the others are of the next step already, and may still be scaled.
        running: whether a step is being counted.
        counted: how many have been.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        after: Callable[[], None],
        moved: frozenset[int] = frozenset(),
    ) -> None:
        self.optimizers = tuple(optimizers)
        self.moved = moved
        for each in optimizers:
            _following.setdefault(each, WeakSet()).add(self)
        self._after = after
        self.fresh: frozenset[int] | None = None
        self.running = False
        self.counted = 0
        self._stepped: dict[int, _Mark | None] = {}
        self._handles = [each.register_step_post_hook(self._hook) for each in optimizers]

    @outside_graphs  # hooks are a part of the optimizer's step, which may be compiled
    def _hook(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if id(optimizer) in self._stepped or self._of_last_step():
            self.fresh = frozenset(id(p) for p in _parameters(optimizer))
            self._flush()
            self.fresh = None
        several = len(self.optimizers) > 1
        self._stepped[id(optimizer)] = _Mark.of(optimizer) if several else None
        if len(self._stepped) == len(self.optimizers):
            self._flush()

    def _of_last_step(self) -> bool:
        """Whether an optimizer that has stepped has got other gradients since."""
        return any(mark is not None and mark.has_turned() for mark in self._stepped.values())

    def _flush(self) -> None:
        self._stepped.clear()
        self.counted += 1
        self.running = True
        try:
            self._after()
        finally:
            self.running = False

    def remove(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()
        for each in self.optimizers:
            _following[each].discard(self)


def warn_of_others(optimizers: Iterable[Optimizer], moved: frozenset[int]) -> None:
    """Warn where others follow these optimizers, too, and move the same parameters."""
    for each in optimizers:
        if any(other.moved & moved for other in _following.get(each, ())):
            warn(
                f"another budget is attached to this {type(each).__name__} and moves the same "
                "parameters: both shrink them; call its detach(), or give several amounts to one "
                "budget"
            )
            return


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


class _Mark:
    """Which way the gradient of a small parameter points: scaling and clipping do not turn it."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self.points = self._direction()

    @classmethod
    def of(cls, optimizer: Optimizer) -> "_Mark | None":
        """Of the smallest parameter whose gradient points anywhere; None: there is none.

        Sparse gradients are tried last: to compare them they are filled up.
        """
        able = [p for p in _parameters(optimizer) if p.grad is not None and p.numel() > 1]
        able.sort(key=lambda p: (p.grad is not None and p.grad.is_sparse, p.numel()))
        marks = (cls(parameter) for parameter in able)
        return next((mark for mark in marks if mark.points is not None), None)

    def has_turned(self) -> bool:
        """Whether another backward pass has been; a gradient that was cleared is none."""
        now = self._direction()
        if now is None or self.points is None:
            return False
        return not torch.allclose(now, self.points, rtol=0.0, atol=1e-3)

    def _direction(self) -> Tensor | None:
        if self._parameter.grad is None:
            return None
        gradient = whole(self._parameter.grad).detach()
        if gradient.is_sparse:  # of an embedding: rows of other tokens in every step
            gradient = gradient.to_dense()
        gradient = gradient.reshape(-1).float()
        return gradient / gradient.norm() if bool(gradient.any()) else None
