"""Where a kernel's numbers are stored, so that they can be changed there.

One initializer holds them as the operator reads them, or transposed; or they are moved together
from one or more initializers: gates that are joined in another order, both directions of a
recurrent layer. Whatever else reads an initializer would see other numbers too: then the kernel is
left alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, FloatArray, IntArray, Shape
from morphgraph.edit import array_of, like_tensor
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import is_float, static_shape
from morphgraph.ops import OpNode, facts_of
from morphgraph.passes.analysis.evaluate import evaluate


class Store(ABC):
    """Where a kernel's numbers are stored."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the kernel, as the operator reads it."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Of the initializers."""

    @abstractmethod
    def array(self) -> Array:
        """The kernel, as the operator reads it."""

    @abstractmethod
    def write(self, kernel: Array) -> None:
        """Store another kernel of the same shape, in place."""


@dataclass(frozen=True)
class Whole(Store):
    """One initializer, and how its axes are permuted on the way to the operator."""

    value: ir.Value
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        """As the operator reads it."""
        stored = static_shape(self.value)
        return tuple(stored[axis] for axis in self.order) if self.order else tuple(stored)

    @property
    def names(self) -> frozenset[str]:
        """Of the initializers."""
        return frozenset({self.value.name or ""})

    def array(self) -> Array:
        """The kernel, as the operator reads it."""
        stored = array_of(self.value)
        return stored.transpose(self.order) if self.order else stored

    def write(self, kernel: Array) -> None:
        """Store another kernel of the same shape, in place."""
        _replace(self.value, kernel.transpose(np.argsort(self.order)) if self.order else kernel)


@dataclass(frozen=True, eq=False)
class Joined(Store):
    """Several initializers, and which of their numbers stand at which positions of the kernel.

    ``pieces`` are per initializer the positions in the kernel and those in the initializer, both
    flat.
    """

    sizes: Shape
    pieces: tuple[tuple[ir.Value, IntArray, IntArray], ...]

    @property
    def shape(self) -> Shape:
        """As the operator reads it."""
        return self.sizes

    @property
    def names(self) -> frozenset[str]:
        """Of the initializers."""
        return frozenset(value.name or "" for value, _, _ in self.pieces)

    def array(self) -> Array:
        """The kernel, as the operator reads it."""
        first = array_of(self.pieces[0][0])
        kernel = np.zeros(self.shape, first.dtype)
        for value, there, here in self.pieces:
            kernel.reshape(-1)[there] = array_of(value).reshape(-1)[here]
        return kernel

    def write(self, kernel: Array) -> None:
        """Store another kernel of the same shape, in place."""
        for value, there, here in self.pieces:
            array = array_of(value).copy()
            array.reshape(-1)[here] = kernel.reshape(-1)[there]
            _replace(value, array)


class Stacked:
    """The kernels of several experts, stored as ``[experts, outputs, inputs]``.

    Attributes:
        store: where they are.
        turned: the stack holds ``[experts, inputs, outputs]``.
    """

    store: Store
    turned: bool

    @property
    def inputs(self) -> int:
        """Of each expert's kernel."""
        return self.store.shape[1 if self.turned else 2]

    def matrices(self) -> Array:
        """Those of all experts, ``[experts, outputs, inputs]``."""
        stack = self.store.array()
        return stack.swapaxes(1, 2) if self.turned else stack

    def write(self, matrices: FloatArray) -> None:
        """Give the experts other kernels, in place."""
        stack = matrices.swapaxes(1, 2) if self.turned else matrices
        self.store.write(stack.astype(self.store.array().dtype))


def _replace(value: ir.Value, array: Array) -> None:
    tensor = value.const_value
    assert tensor is not None
    value.const_value = like_tensor(tensor, np.ascontiguousarray(array))


def stored(kernel: ir.Value, model: ir.Model) -> Store | None:
    """Where a kernel is stored; ``None`` where it cannot be changed without changing more."""
    return _whole(kernel) or _joined(kernel, model)


def held(kernel: ir.Value) -> Whole | None:
    """The initializer that holds a kernel, whoever else reads it: to be read, not to be written."""
    return _whole(kernel, alone=False)


def _whole(value: ir.Value, alone: bool = True) -> Whole | None:
    order: tuple[int, ...] = ()
    while not alone or (len(value.uses()) == 1 and not value.is_graph_output()):
        maker = value.producer()
        if maker is None:
            return Whole(value, order) if _is_held(value) else None
        facts = facts_of(maker)
        source = maker.inputs[0] if maker.inputs else None
        if facts.permutation is None or source is None:
            return None
        here: tuple[int, ...] = facts.call(facts.permutation, maker, OpNode(maker))
        order = tuple(here[axis] for axis in order) if order else here
        value = source
    return None


def _is_held(value: ir.Value) -> bool:
    return value.const_value is not None and is_float(value)


_EXACT = 2**24
"""Whole numbers up to which single precision holds all."""


def _joined(kernel: ir.Value, model: ir.Model) -> Joined | None:
    """The initializers from which a kernel is moved together, each number from one place."""
    if len(kernel.uses()) != 1 or kernel.is_graph_output() or kernel.dtype != ir.DataType.FLOAT:
        return None
    nodes: set[ir.Node] = set()
    held: dict[ir.Value, None] = {}
    pending = [kernel]
    while pending:
        value = pending.pop()
        maker = value.producer()
        if maker is not None:
            if not facts_of(maker).moves:
                return None
            if maker not in nodes:
                nodes.add(maker)
                pending += [each for each in maker.inputs if each is not None and is_float(each)]
        elif _is_held(value):
            held[value] = None
        else:
            return None
    inside = list(held) + [v for node in nodes for v in node.outputs if v is not kernel]
    if any(v.is_graph_output() or any(u.node not in nodes for u in v.uses()) for v in inside):
        return None
    sizes = [int(np.prod(static_shape(value))) for value in held]
    if not held or sum(sizes) >= _EXACT:
        return None
    first = np.cumsum([1, *sizes])
    numbered = {
        value.name or "": np.arange(start, start + size, dtype=np.float32).reshape(
            static_shape(value)
        )
        for value, start, size in zip(held, first, sizes, strict=False)
    }
    try:
        (image,) = evaluate([kernel.name or ""], numbered, model).values()
    except UnsupportedError:
        return None
    places = image.reshape(-1).astype(np.int64)
    if (places < 1).any() or len(np.unique(places)) < len(places):
        return None  # zeros of a pad, or a number that stands in two places
    owner = np.searchsorted(first, places, side="right") - 1
    pieces = []
    for number, value in enumerate(held):
        there = np.flatnonzero(owner == number)
        pieces.append((value, there, places[there] - int(first[number])))
    return Joined(tuple(image.shape), tuple(pieces))
