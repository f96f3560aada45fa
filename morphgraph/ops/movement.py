"""Data movement: operators that put the positions of their operands elsewhere.

They have no line of notation but an index map: which position of a result came from which position
of an operand. A factor stands for the positions that move together.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from morphgraph.arrays import IntArray, Shape
from morphgraph.ops.initial import Initial
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    IndexMap,
    Op,
    OpNode,
    Place,
    Resizing,
    UnsupportedFormError,
    op,
)
from morphgraph.ops.positions import OPEN_ADVICE, gathered, joined, pass_axes, ranks, stays, wrapped
from morphgraph.ops.reshape import regroup


@op("Transpose")
class Transpose(Op):
    moves = True

    @staticmethod
    def permutation(n: OpNode, *, perm: Sequence[int] | None = None) -> tuple[int, ...]:
        return tuple(range(len(n.shape(0)))[::-1] if perm is None else perm)

    @staticmethod
    def describe(n: OpNode, *, perm: Sequence[int] | None = None) -> Description:
        order = range(len(n.shape(0)))[::-1] if perm is None else perm
        description = Description()
        pass_axes(description, n.shape(0), ((a, k) for k, a in enumerate(order)))
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, perm: Sequence[int] | None = None) -> "fx.Node":
        order = range(len(n.shape(0)))[::-1] if perm is None else perm
        return b.method("permute", b.tensor(n, 0), tuple(order))


@op("Concat")
class Concat(Op):
    moves = True
    joins = True

    @staticmethod
    def describe(n: OpNode, *, axis: int) -> Description:
        return joined(n, ~0, range(len(n.in_shapes)), axis)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int) -> "fx.Node":
        import torch

        operands = tuple(b.tensor(n, i) for i in range(len(n.in_shapes)))
        return b.call(torch.cat, operands, axis)


@op("Split")
class Split(Op):
    moves = True

    @staticmethod
    def describe(n: OpNode, *, axis: int = 0) -> Description:
        return joined(n, 0, (~k for k in range(len(n.out_shapes))), axis)

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axis: int = 0) -> None:
        axis %= len(n.shape(0))
        both = [(n.out(k)[axis], new.shape(~k)[axis]) for k in range(len(n.out_shapes))]
        # A result that comes to size 0 goes; one that had it stays.
        sizes = [size for before, size in both if size or not before]
        if n.opset < 13:
            new.set_attribute("split", sizes)
        else:
            new.remove_attribute("num_outputs")
            new.set_constant(1, np.array(sizes, dtype=np.int64))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = 0) -> "tuple[fx.Node, ...]":
        sizes = [n.out(k)[axis] for k in range(len(n.out_shapes))]
        if axis % len(n.shape(0)) in b.open_axes(n, 0):
            b.fail(n, "it splits an axis whose size is open", OPEN_ADVICE)
        parts = b.method("split", b.tensor(n, 0), sizes[0] if len(set(sizes)) == 1 else sizes, axis)
        return tuple(b.item(parts, k) for k in range(len(sizes)))


def sliced_positions(n: OpNode) -> dict[int, IntArray]:
    """Per sliced axis: the operand positions that stay, in the result's order."""
    starts, ends = n.ints(1), n.ints(2)
    if starts is None or ends is None or (n.has(3) and n.const(3) is None):
        raise UnsupportedFormError("Slice with bounds that are computed at run time")
    axes = n.ints(3) or tuple(range(len(starts)))
    steps = n.ints(4) or (1,) * len(starts)
    shape = n.shape(0)
    positions: dict[int, IntArray] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        positions[axis] = np.arange(shape[axis])[slice(start, _open_end(end, step), step)]
    return positions


def _sliced_where_computed(n: OpNode) -> Description:
    """Axes that are sliced at places computed from sizes keep theirs; the others pass."""
    axes = n.ints(3) if n.has(3) else tuple(range(n.shape(1)[0]))
    if axes is None:
        raise UnsupportedFormError("Slice of axes that are computed at run time")
    description = Description()
    sliced = {axis % len(n.shape(0)) for axis in axes}
    for axis, size in enumerate(n.shape(0)):
        if axis in sliced:
            description.pin(0, axis, size, "sliced at a computed place")
            description.pin(~0, axis, n.out()[axis], "sliced at a computed place")
        else:
            pass_axes(description, n.shape(0), [(axis, axis)])
    return description


_LAST = (-1, 2**31 - 1, 2**63 - 1)
"""Where a slice begins that runs down from the last position, however many there are."""


def _open_end(end: int, step: int) -> int | None:
    """ONNX writes "down to the first position" as a very negative end, Python as None."""
    return None if step < 0 and end < -(2**31) + 1 else end


def _step(positions: IntArray) -> int:
    return int(positions[1] - positions[0]) if len(positions) > 1 else 1


@op("Slice")
class Slice(Op):
    moves = True
    places = (1, 2)
    axes = 3

    @staticmethod
    def describe(n: OpNode) -> Description:
        if n.ints(1) is None or n.ints(2) is None:
            return _sliced_where_computed(n)
        description = Description()
        slices = sliced_positions(n)
        for axis, size in enumerate(n.shape(0)):
            positions = slices.get(axis)
            if positions is None or np.array_equal(positions, np.arange(size)):
                pass_axes(description, n.shape(0), [(axis, axis)])
            elif len(positions) == 0:
                description.pin(0, axis, size, "sliced to nothing")
                description.pin(~0, axis, 0, "sliced to nothing")
            elif np.all(np.diff(positions) == 1):
                part = IndexMap(offset=int(positions[0]))
                places = [Place(0, axis, part), Place(~0, axis)]
                description.add(f"a{axis}", len(positions), places)
            else:
                gathered(description, axis, axis, positions)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        if n.ints(1) is None or n.ints(2) is None:
            return
        changed = {
            axis: ranks(new.positions(0, axis), positions[results], results)
            for axis, positions in sliced_positions(n).items()
            if not stays(new, axis, n.shape(0)[axis])
            for results in [new.positions(~0, axis)]
        }
        if not changed:
            return
        starts, ends = list(n.ints(1) or ()), list(n.ints(2) or ())
        axes = n.ints(3) or tuple(range(len(starts)))
        steps = list(n.ints(4) or (1,) * len(starts))
        for k, axis in enumerate(a % len(n.shape(0)) for a in axes):
            if axis not in changed:
                continue
            positions = changed[axis]
            stride = np.unique(np.diff(positions))
            if len(stride) > 1 or 0 in stride:
                # Positions at uneven steps: no slice reads them, but a Gather does. If other axes
                # are sliced, too, it stands before the Slice, which reads all that it gives.
                if len(starts) == 1:
                    new.become_gather(axis, positions)
                    return
                new.gather_first(axis, positions)
                positions, stride = np.arange(len(positions)), np.ones(1)
            step = int(stride[0]) if len(stride) else 1
            end = int(positions[-1]) + (1 if step > 0 else -1)
            starts[k], steps[k] = int(positions[0]), step
            # Running down to position 0 ends at -1, which ONNX would count from the end.
            ends[k] = end if end >= 0 else -(2**63) + 1
        new.set_constant(1, np.array(starts, dtype=np.int64))
        new.set_constant(2, np.array(ends, dtype=np.int64))
        if n.has(4):
            new.set_constant(4, np.array(steps, dtype=np.int64))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        x, axes = b.tensor(n, 0), _sliced_axes(b, n)
        if b.open_axes(n, 0) & set(axes) or n.ints(1) is None or n.ints(2) is None:
            return _sliced_by_bounds(b, n, axes)
        index: list[slice] = [slice(None)] * len(n.shape(0))
        for axis, positions in sliced_positions(n).items():
            if np.array_equal(positions, np.arange(n.shape(0)[axis])):
                continue
            step = _step(positions)
            if step < 0:  # torch's slices run forwards only
                x = b.method("index_select", x, axis, b.positions(n, axis, positions))
            elif len(positions):
                end = int(positions[-1]) + 1
                index[axis] = slice(int(positions[0]) or None, end, None if step == 1 else step)
            else:
                index[axis] = slice(0)
        while index and index[-1] == slice(None):
            index.pop()
        return b.item(x, tuple(index)) if index else x


def _sliced_axes(b: "TorchBuilder", n: OpNode) -> tuple[int, ...]:
    axes = n.ints(3) if n.has(3) else tuple(range(n.shape(1)[0]))
    if axes is None:
        b.fail(n, "its axes are computed from values")
    return tuple(axis % len(n.shape(0)) for axis in axes)


def _sliced_by_bounds(b: "TorchBuilder", n: OpNode, axes: Sequence[int]) -> "fx.Node":
    """A slice by its bounds, which may depend on open sizes; Python clips them as ONNX does."""
    starts, ends = b.numbers(n, 1), b.numbers(n, 2)
    steps = n.ints(4) if n.has(4) else (1,) * len(axes)
    if starts is None or ends is None or steps is None:
        b.fail(n, "its bounds are computed from values")
    index: list[slice] = [slice(None)] * len(n.shape(0))
    turned: list[int] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            last = None if isinstance(end, int) and end > 2**31 - 2 else end
            index[axis] = slice(start, last, None if step == 1 else step)
        elif step == -1 and start in _LAST and isinstance(end, int) and end < -(2**31) + 1:
            turned.append(axis)
        else:
            b.fail(n, f"it runs backwards along axis {axis}, whose size is open, and not over all")
    x = b.item(b.tensor(n, 0), tuple(index))
    return b.method("flip", x, tuple(turned)) if turned else x


@op("Gather")
class Gather(Op):
    """With constant indices a choice of positions; from a weight by computed ones an embedding."""

    moves = True
    tables = (0,)

    @staticmethod
    def describe(n: OpNode, *, axis: int = 0) -> Description:
        shape, indices = n.shape(0), n.const(1)
        axis %= len(shape)
        rank = len(n.shape(1))
        if _is_reshape(indices, shape[axis]):
            return regroup(shape, n.out())
        description = Description()
        others = [a for a in range(len(shape)) if a != axis]
        pass_axes(description, shape, ((a, a if a < axis else a + rank - 1) for a in others))
        if indices is None:
            description.add("rows", shape[axis], [Place(0, axis)], "indexed at run time")
            description.rows = frozenset({"rows"} if n.is_weight(0) else ())
            description.indexed = {"rows": 1}
            for k, size in enumerate(n.shape(1)):
                description.add(f"i{k}", size, [Place(1, k), Place(~0, axis + k)])
        elif rank == 1:
            gathered(description, axis, axis, wrapped(indices, shape[axis]))
        else:
            chosen = np.unique(wrapped(indices, shape[axis]))
            place = Place(0, axis, IndexMap(table=(np.arange(len(chosen)), chosen)))
            description.add(f"a{axis}", len(chosen), [place], "picked out by a constant index")
            for k, size in enumerate(n.shape(1)):
                description.pin(~0, axis + k, size, "picked out by a constant index")
        return description

    @staticmethod
    def initial(n: OpNode, *, axis: int = 0) -> Mapping[int, Initial]:
        embeds = axis == 0 and len(n.shape(0)) == 2 and not n.is_weight(1)
        return {0: Initial("normal", 1.0)} if embeds else {}

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axis: int = 0) -> None:
        indices = n.const(1)
        axis %= len(n.shape(0))
        if indices is None or stays(new, axis, n.shape(0)[axis]):
            return
        # Still every position once, in order: counted anew, in the new shape.
        if _is_reshape(indices, n.shape(0)[axis]):
            sizes = new.shape(~0)[axis : axis + indices.ndim]
            new.set_constant(1, np.arange(new.shape(0)[axis]).reshape(sizes))
            return
        old = wrapped(indices, n.shape(0)[axis])
        # Indices of several axes are pinned, and none of them goes; their values still move.
        results = new.positions(~0, axis) if old.ndim == 1 else np.arange(old.size)
        positions = ranks(new.positions(0, axis), old.ravel()[results], results)
        new.set_constant(1, positions.reshape(-1 if old.ndim == 1 else old.shape))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = 0) -> "fx.Node":
        from torch import nn
        from torch.nn import functional as F

        axis %= len(n.shape(0))
        indices = b.constant(n, 1)
        if indices is None and b.is_parameter(n, 0) and axis == 0 and len(n.shape(0)) == 2:
            chosen = b.tensor(n, 1)
            count, width = n.shape(0)
            module = nn.Embedding(count, width, device="meta")
            owned = b.owner(n, module, chosen, {"weight": 0})
            return owned or b.call(F.embedding, chosen, b.tensor(n, 0))
        x = b.tensor(n, 0)
        if indices is not None and indices.ndim == 0:
            return b.method("select", x, axis, int(indices))
        if indices is not None and np.array_equal(indices.reshape(-1), np.arange(n.shape(0)[axis])):
            return b.method("unflatten", x, axis, indices.shape)  # from torch's as_strided
        if indices is not None and indices.ndim == 1:
            positions = wrapped(indices, n.shape(0)[axis])
            return b.method("index_select", x, axis, b.positions(n, axis, positions))
        return b.item(x, (*[slice(None)] * axis, b.tensor(n, 1)))


def _is_reshape(indices: IntArray | None, size: int) -> bool:
    """Whether indices of several axes name every position once, in order (PyTorch's as_strided)."""
    return (
        indices is not None
        and indices.ndim > 1
        and np.array_equal(wrapped(indices, size).ravel(), np.arange(size))
    )


@op("Expand")
class Expand(Op):
    """Repeats along axes of size 1; the repeated axis may take any size its readers agree on."""

    moves = True
    target = 1

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        shape, out = n.shape(0), n.out()
        shift = len(out) - len(shape)
        given = n.sizes(1)
        target = [*[1] * (len(out) - len(given)), *given]
        for axis, size in enumerate(out):
            inner = axis - shift
            if inner >= 0 and shape[inner] == size:
                description.add(f"a{axis}", size, [Place(0, inner), Place(~0, axis)])
                continue
            if inner >= 0:
                description.pin(0, inner, 1, "axis of size 1, broadcast")
            computed = "expanded to a computed size" if target[axis] is None else None
            description.add(f"a{axis}", size, [Place(~0, axis)], computed)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        target = n.sizes(1)
        if all(size is None for size in target):
            return
        sizes = new.shape(~0)[len(n.out()) - len(target) :]
        new.set_sizes(1, [1 if old == 1 else size for old, size in zip(target, sizes, strict=True)])

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        x, target = b.tensor(n, 0), b.numbers(n, 1)
        if target is None:
            b.fail(n, "its shape is computed from values")
        shape, out = n.shape(0), n.out()
        full = [1] * (len(shape) - len(target)) + target
        shift = len(full) - len(shape)
        for axis, size in enumerate(full):
            if axis >= shift and (size == 1 or out[axis] == shape[axis - shift]):
                full[axis] = -1
        return x if set(full) == {-1} else b.method("expand", x, tuple(full))


_COMES_OR_GOES = {"Squeeze": "Squeeze removes", "Unsqueeze": "Unsqueeze adds"}


@op("Squeeze", "Unsqueeze")
class Squeeze(Op):
    """Axes of size 1 come or go; the others keep their order."""

    moves = True

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        many = max(n.shape(0), n.out(), key=len)
        fewer_port = 0 if len(n.shape(0)) < len(n.out()) else ~0
        new_axes = _inserted(n, many)
        rest = [a for a in range(len(many)) if a not in new_axes]
        for short, long in enumerate(rest):
            places = [Place(fewer_port, short), Place(~fewer_port, long)]
            description.add(f"a{short}", many[long], places)
        for axis in new_axes:
            description.pin(
                ~fewer_port, axis, 1, f"axis of size 1 that {_COMES_OR_GOES[n.op_type]}"
            )
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axes: Sequence[int] | None = None) -> "fx.Node":
        x, many = b.tensor(n, 0), max(n.shape(0), n.out(), key=len)
        changed = sorted(_inserted(n, many))
        if n.op_type == "Squeeze":
            return b.squeeze(x, changed) if changed else x
        for axis in changed:
            x = b.method("unsqueeze", x, axis)
        return x


def _inserted(n: OpNode, many: Shape) -> set[int]:
    """Axes of the longer shape that the shorter one lacks."""
    attribute = n.ir.attributes.get("axes")
    axes = n.ints(1, None if attribute is None else attribute.as_ints())
    if axes is None:
        if n.has(1):
            raise UnsupportedFormError(f"{n.op_type} of axes that are computed at run time")
        return {axis for axis, size in enumerate(many) if size == 1}
    return {axis % len(many) for axis in axes}
