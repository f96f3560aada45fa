"""Which tensors share memory while a network runs, and what each holds after something was written.

A graph knows values, not memory. So a write gives a new value, and whoever looks at the same memory
next computes what it sees there from the new one: a view of it by the operators that had made the
view, and what a view was written into by putting the view back. PyTorch's functionalization does
the same; this follows it operator by operator, so that the same ones come out in the same order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch._ops import OpOverload

Emit = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]
"""Computes an operator's results, and has it recorded."""

Found = TypeVar("Found")
aten = torch.ops.aten


class CaptureError(Exception):
    """A single run does not tell what the network computes."""


class PerTensor(Generic[Found]):
    """Something for each of some tensors, which are held, so that nothing else gets their ids.

    PyTorch may hand a held tensor on as another object (what ``torch.zeros`` returns is one, if
    somebody holds the first); it is known by where its numbers are.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[torch.Tensor, Found]] = {}
        self._at: dict[int, list[int]] = defaultdict(list)

    def __setitem__(self, tensor: torch.Tensor, found: Found) -> None:
        if id(tensor) not in self._found:
            self._at[memory_of(tensor)].append(id(tensor))
        self._found[id(tensor)] = tensor, found

    def get(self, tensor: torch.Tensor) -> Found | None:
        """What there is for a tensor."""
        if id(tensor) in self._found:
            return self._found[id(tensor)][1]
        for other, found in (self._found[number] for number in self._at[memory_of(tensor)]):
            if _place(other) == _place(tensor):
                self[tensor] = found
                return found
        return None


def memory_of(tensor: torch.Tensor) -> int:
    """Of tensors that are alive, those with the same number share their memory."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


@dataclass(frozen=True)
class _Step:
    """An operator that looks at a part of a tensor, and which of its results is meant."""

    func: OpOverload
    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    index: int | None

    def forward(self, emit: Emit, whole: torch.Tensor) -> torch.Tensor:
        result = emit(self.func, (whole, *self.rest), self.keywords)
        part: torch.Tensor = result if self.index is None else result[self.index]
        return part

    def back(self, emit: Emit, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The whole, in which a part is replaced."""
        if self.func not in _BACK:
            raise CaptureError(f"writes into what {self.func} looks at")
        func, arguments = _BACK[self.func](whole, part, self.rest)
        result: torch.Tensor = emit(func, arguments, self.keywords)
        return result


_Back = Callable[[torch.Tensor, torch.Tensor, tuple[Any, ...]], tuple[OpOverload, tuple[Any, ...]]]
_BACK: dict[OpOverload, _Back] = {
    aten.slice.Tensor: lambda x, y, rest: (aten.slice_scatter.default, (x, y, *rest)),
    aten.select.int: lambda x, y, rest: (aten.select_scatter.default, (x, y, *rest)),
    aten.permute.default: lambda _, y, rest: (
        aten.permute.default,
        (y, [[axis % y.ndim for axis in rest[0]].index(k) for k in range(y.ndim)]),
    ),
    aten.transpose.int: lambda _, y, rest: (aten.transpose.int, (y, *rest)),
    aten.unsqueeze.default: lambda x, y, rest: (aten.squeeze.dim, (y, rest[0] % (x.ndim + 1))),
    aten.view.default: lambda x, y, _: (aten.view.default, (y, list(x.shape))),
}
"""By operator that looks at a part: the operator that puts it back."""


@dataclass
class _Memory:
    """What several tensors look at: its value, and what was written since it was computed."""

    base: torch.Tensor
    is_given: bool
    written: int = 0
    writes: list[tuple[torch.Tensor, tuple[_Step, ...]]] = field(default_factory=list)


@dataclass
class _View:
    """A tensor of the network: where it looks, and its value after so many writes."""

    value: torch.Tensor
    memory: _Memory
    steps: tuple[_Step, ...] = ()
    written: int = 0


class Views:
    """The tensors of a network that runs, and their values."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._views: PerTensor[_View] = PerTensor()

    def add(self, tensor: torch.Tensor, *, is_given: bool = False) -> None:
        """A tensor with memory of its own; a given one must not be written to."""
        self._views[tensor] = _View(tensor, _Memory(tensor, is_given))

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor holds now.

        Raises:
            CaptureError: it is not known.
        """
        view = self._view(tensor)
        if view.written != view.memory.written:
            self._write_down(view.memory)
            view.value = view.memory.base
            for step in view.steps:
                view.value = step.forward(self._emit, view.value)
            view.written = view.memory.written
        return view.value

    def look(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | list[torch.Tensor]:
        """What an operator gives that looks at parts of its first operand."""
        whole, *rest = args
        if not isinstance(whole, torch.Tensor) or any(isinstance(r, torch.Tensor) for r in rest):
            raise CaptureError(f"{func} looks at more than its first operand")
        value, view = self.value(whole), self._view(whole)
        inside = self._emit(func, (value, *rest), kwargs)
        # The network goes on with what looks at the memory that it knows.
        outside = inside if value is whole else func(whole, *rest, **kwargs)
        several = isinstance(inside, tuple | list)
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = (
            zip(outside, inside, strict=True) if several else [(outside, inside)]
        )
        for k, (tensor, part) in enumerate(pairs):
            step = _Step(func, tuple(rest), kwargs, k if several else None)
            self._views[tensor] = _View(part, view.memory, (*view.steps, step))
        result: torch.Tensor | list[torch.Tensor] = outside
        return result

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """From now on a tensor, and all that look at its memory, hold another value.

        Raises:
            CaptureError: the memory belongs to somebody else, or is not known.
        """
        memory = self._view(tensor).memory
        if memory.is_given:
            raise CaptureError("writes into what it is given")
        memory.writes.append((value, self._view(tensor).steps))
        memory.written += 1
        self.value(tensor)

    def turn(
        self, func: OpOverload, twin: OpOverload, args: tuple[Any, ...], aside: torch.Tensor
    ) -> None:
        """``x.squeeze_()``: from now on ``x`` looks at its memory in another way.

        Args:
            func: what is called.
            twin: the operator that gives what it makes of its operand.
            args: of the call.
            aside: like the operand, to stand for its value where that is the operand itself.
        """
        target, *rest = args
        value, view = self.value(target), self._view(target)
        if value is target:
            value = aside
        if view.memory.base is target:
            view.memory.base = aside
        view.value = self._emit(twin, (value, *rest), {})
        view.steps = (*view.steps, _Step(twin, tuple(rest), {}, None))
        func(target, *rest)

    def _view(self, tensor: torch.Tensor) -> _View:
        view = self._views.get(tensor)
        if view is None:
            raise CaptureError(
                f"a tensor {tuple(tensor.shape)} is neither given nor part of the state"
            )
        return view

    def _write_down(self, memory: _Memory) -> None:
        """Compute the memory's value from what was written to its parts."""
        for value, steps in memory.writes:
            wholes = [memory.base]
            for step in steps[:-1]:
                wholes.append(step.forward(self._emit, wholes[-1]))
            for step, whole in zip(reversed(steps), reversed(wholes), strict=False):
                value = step.back(self._emit, whole, value)
            memory.base = value
        memory.writes.clear()
