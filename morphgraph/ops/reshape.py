"""Reshape: one rule for flattening, heads, channel shuffles and every other regrouping of axes.

The cumulative products of both shapes are refined against each other. Where each boundary divides
the next, the axes of both sides become product axes over the common factors; a block that does not
nest (4x6 -> 6x4) is pinned.

    (1, 48, 7, 7) -> (1, 2, 24, 7, 7)     boundaries 1 2 48 336 2352: 48 = (2 24)
    (1, 512, 7, 7) -> (1, 25088)          boundaries 1 512 3584 25088: 25088 = (512 7 7)
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from morphgraph.arrays import Shape
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, op


def regroup(old: Shape, new: Shape) -> Description:
    """Couple the axes of two shapes of equal element count, read in row-major order.

    >>> [(f.size, f.pinned) for f in regroup((4, 6), (6, 4)).factors.values()][0]
    (4, 'reshape 4x6 -> 6x4 does not nest')
    """
    description = Description()
    for in_axes, out_axes in blocks(old, new):
        in_sizes = [old[a] for a in in_axes]
        out_sizes = [new[a] for a in out_axes]
        factors = _refine(in_sizes, out_sizes)
        if factors is None:
            left, right = "x".join(map(str, in_sizes)), "x".join(map(str, out_sizes))
            reason = f"reshape {left} -> {right} does not nest"
            for port, axes, shape in ((0, in_axes, old), (~0, out_axes, new)):
                for axis in axes:
                    description.pin(port, axis, shape[axis], reason)
            continue
        names = [f"f{len(description.factors) + k}" for k in range(len(factors))]
        for name, size in zip(names, factors, strict=True):
            description.add(name, size, [])
        for port, axes, shape in ((0, in_axes, old), (~0, out_axes, new)):
            _lay(description, port, axes, shape, names)
    for port, shape in ((0, old), (~0, new)):
        for axis, size in enumerate(shape):
            if size == 1:
                description.pin(port, axis, 1, "axis of size 1 that a reshape moves")
    description.prefer = tuple(reversed(description.factors))
    return description


def blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The axes (size 1 left out) of both sides between two boundaries that both sides share."""
    blocks: list[tuple[list[int], list[int]]] = []
    left = iter([axis for axis, size in enumerate(old) if size != 1])
    right = iter([axis for axis, size in enumerate(new) if size != 1])
    for first in left:
        in_axes, out_axes = [first], [next(right)]
        in_size, out_size = old[first], new[out_axes[0]]
        # The side with fewer positions takes its next axis until both have as many.
        while in_size != out_size:
            if in_size < out_size:
                in_axes.append(next(left))
                in_size *= old[in_axes[-1]]
            else:
                out_axes.append(next(right))
                out_size *= new[out_axes[-1]]
        blocks.append((in_axes, out_axes))
    return blocks


def _refine(left: Sequence[int], right: Sequence[int]) -> list[int] | None:
    """Sizes of the common factors, outermost first; ``None`` where the boundaries do not divide."""
    boundaries = sorted({prod(side[k:]) for side in (left, right) for k in range(len(side) + 1)})
    pairs = list(pairwise(boundaries))
    if any(larger % smaller for smaller, larger in pairs):
        return None
    return [larger // smaller for smaller, larger in reversed(pairs)]


def _lay(
    description: Description, port: int, axes: Sequence[int], shape: Shape, names: Sequence[str]
) -> None:
    """Lay the factors of a block, outermost first, on the axes of one side."""
    remaining = list(names)
    for axis in axes:
        on_axis: list[str] = []
        while prod(description.factors[name].size for name in on_axis) < shape[axis]:
            on_axis.append(remaining.pop(0))
        description.lay(port, axis, on_axis)


@op("Reshape")
class Reshape(Op):
    moves = True
    target = 1

    @staticmethod
    def describe(n: OpNode, *, allowzero: int = 0) -> Description:
        sizes = n.sizes(1)
        if n.ints(1) is None and all(size is None for size in sizes):
            raise UnsupportedFormError("Reshape to a shape that is computed at run time")
        description = regroup(n.shape(0), n.out())
        for factor in description.factors.values():
            if any(place.port == ~0 and sizes[place.axis] is None for place in factor.places):
                factor.pinned = factor.pinned or "reshaped to a size that is computed at run time"
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, allowzero: int = 0) -> None:
        # A 0 copies the operand's size, and stays where that is still the right one. A -1 stays
        # where nothing was cut, for a size that the model leaves open, and for a batch: elsewhere
        # tools read from it how many heads there are.
        before, target, sizes = new.shape(0), n.sizes(1), new.shape(~0)
        result = n.ir.outputs[0].shape
        cut = [k for k, (size, old) in enumerate(zip(sizes, n.out(), strict=True)) if size != old]
        known = {k for k in range(0 if 0 in cut else 1, len(sizes)) if cut}
        known = {k for k in known if result is None or isinstance(result[k], int)}
        updated = [
            entry
            if entry is None
            or (entry == -1 and k not in known)
            or (entry == 0 and before[k : k + 1] == (size,))
            else size
            for k, (entry, size) in enumerate(zip(target, sizes, strict=True))
        ]
        new.set_sizes(1, [size or 0 for size in updated])

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, allowzero: int = 0) -> "fx.Node":
        x, target = b.tensor(n, 0), b.numbers(n, 1)
        if target is None:
            b.fail(n, "its shape is computed from values")
        # torch knows no 0 that copies a size. The first becomes -1 where the model has no -1, so
        # that most reshapes follow the operand; the others are read off it.
        copied = [k for k, size in enumerate(target) if size == 0 and not allowzero]
        for k in copied:
            target[k] = n.out()[k]
        if copied and -1 not in target:
            target[copied[0]] = -1
        for k in copied:
            if target[k] != -1:
                target[k] = b.size(n, 0, k)
        return b.method("reshape", x, tuple(target))


@op("Flatten")
class Flatten(Op):
    moves = True

    @staticmethod
    def describe(n: OpNode, *, axis: int = 1) -> Description:
        return regroup(n.shape(0), n.out())

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = 1) -> "fx.Node":
        x, rank = b.tensor(n, 0), len(n.shape(0))
        first = axis + rank if axis < 0 else axis
        if first == 1:
            return b.method("flatten", x, 1)
        if first == rank:
            return b.method("reshape", x, (-1, 1))
        y = x if first == rank - 1 else b.method("flatten", x, first)
        return b.method("flatten", y, 0, first - 1) if first else b.method("unsqueeze", y, 0)
