"""Reading and writing at indexed positions.

Where constant indices move whole positions along an axis, the operator is a movement with an index
map, as a Gather is: a roll, a flip, a write into some channels. Where they do not, and where they
are computed at run time, the indexed axes keep their size and the others pass.
"""

from collections.abc import Sequence

import numpy as np

from morphgraph.arrays import IntArray, Shape
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, IndexMap, Op, OpNode, Place, Resizing, op
from morphgraph.ops.positions import gathered, ranks, wrapped

_RUN_TIME = "indexed at run time"
_MIXED = "indexed position by position"


def _along(indices: IntArray | None, axis: int) -> IntArray | None:
    """The one index of every position of an axis, where the other axes do not matter."""
    if indices is None:
        return None
    lines = np.moveaxis(indices, axis, -1).reshape(-1, indices.shape[axis])
    return lines[0] if len(lines) and (lines == lines[0]).all() else None


def _constants(n: OpNode, i: int, ports: Sequence[int]) -> list[int]:
    """The ports that are described: constant indices are not, they follow in ``resize``."""
    return [port for port in ports if port != i or n.const(i) is None]


@op("GatherElements")
class GatherElements(Op):
    """Reads along one axis, at an index of its own for every element."""

    moves = True

    @staticmethod
    def describe(n: OpNode, *, axis: int = 0) -> Description:
        data, shape = n.shape(0), n.shape(1)
        axis %= len(data)
        description = Description()
        indices = n.const(1)
        source = _along(indices, axis)
        ports = _constants(n, 1, (1, ~0))
        for other in range(len(data)):
            if other != axis:
                # Shorter indices read the first positions only.
                places = [Place(port, other) for port in (0, *ports)]
                description.add(f"a{other}", shape[other], places)
        if source is not None:
            gathered(description, axis, axis, wrapped(source, data[axis]))
            return description
        reason = _RUN_TIME if indices is None else _MIXED
        description.add("rows", data[axis], [Place(0, axis)], reason)
        description.indexed = {"rows": 1} if indices is None else {}
        description.add(f"a{axis}", shape[axis], [Place(port, axis) for port in ports])
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axis: int = 0) -> None:
        _follow_elements(n, new, ~0, axis % len(n.shape(0)))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = 0) -> "fx.Node":
        import torch

        return b.call(torch.gather, b.tensor(n, 0), axis, _from_start(b, n, 1, n.shape(0)[axis]))


def _follow_elements(n: OpNode, new: Resizing, port: int, axis: int) -> None:
    """Rebuild constant indices, which have the axes of ``port``."""
    constant = n.const(1)
    if constant is None:
        return
    indices = wrapped(constant, n.shape(0)[axis])
    line = _along(indices, axis)
    # The elements whose place stays keep their indices ...
    for k in range(indices.ndim):
        indices = np.take(indices, new.positions(port, k), k)
    # ... which point at the positions that stay, where these move as a whole. Else none goes.
    if line is not None:
        results = new.positions(port, axis)
        moved = ranks(new.positions(0, axis), line[results], results)
        column = [-1 if k == axis else 1 for k in range(indices.ndim)]
        indices = np.broadcast_to(moved.reshape(column), indices.shape)
    new.set_constant(1, indices)


def _from_start(b: "TorchBuilder", n: OpNode, i: int, size: int) -> "fx.Node":
    """Indices counted from the start; ONNX counts negative ones from the end, torch does not."""
    import torch

    constant = b.constant(n, i)
    if constant is not None:
        return b.buffer(n, "indices", torch.from_numpy(wrapped(constant, size).astype(np.int64)))
    given = b.tensor(n, i)
    return b.call(torch.where, b.call(torch.lt, given, 0), b.call(torch.add, given, size), given)


def _grid(indices: IntArray | None, data: Shape) -> list[IntArray] | None:
    """Index tuples as one list of positions per indexed axis, where they form a grid of these.

    ``indices`` are ``[..., k]`` without batch axes, ``data`` the sizes of the k axes.

    >>> _grid(np.array([[[0, 2], [0, 1]], [[3, 2], [3, 1]]]), (4, 3))
    [array([0, 3]), array([2, 1])]
    """
    if indices is None or indices.ndim - 1 != indices.shape[-1]:
        return None
    lines = [_along(indices[..., k], k) for k in range(indices.shape[-1])]
    grid = [wrapped(line, size) for line, size in zip(lines, data, strict=True) if line is not None]
    return grid if len(grid) == len(lines) else None


@op("GatherND")
class GatherND(Op):
    """Reads slices at index tuples, which name the first axes behind the batch axes."""

    moves = True

    @staticmethod
    def describe(n: OpNode, *, batch_dims: int = 0) -> Description:
        data, shape, description = n.shape(0), n.shape(1), Description()
        depth, front = shape[-1], len(shape) - 1
        ports = _constants(n, 1, (1, ~0))
        for axis in range(batch_dims):
            places = [Place(0, axis), *(Place(port, axis) for port in ports)]
            description.add(f"a{axis}", data[axis], places)
        grid = None if batch_dims else _grid(n.const(1), data[:depth])
        if grid is not None:
            for axis, positions in enumerate(grid):
                gathered(description, axis, axis, positions)
        else:
            reason = _RUN_TIME if n.const(1) is None else _MIXED
            for axis in range(batch_dims, batch_dims + depth):
                description.add(f"rows{axis}", data[axis], [Place(0, axis)], reason)
            if depth == 1 and n.const(1) is None:
                description.indexed = {f"rows{batch_dims}": 1}
            for axis in range(batch_dims, front):
                places = [Place(port, axis) for port in ports]
                description.add(f"i{axis}", shape[axis], places)
        if 1 in ports:
            description.pin(1, front, depth, "holds index tuples")
        for axis in range(batch_dims + depth, len(data)):
            places = [Place(0, axis), Place(~0, front + axis - batch_dims - depth)]
            description.add(f"a{axis}", data[axis], places)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, batch_dims: int = 0) -> None:
        _follow_tuples(n, new, ~0, batch_dims)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, batch_dims: int = 0) -> "fx.Node":
        return b.item(b.tensor(n, 0), _index_tuple(b, n, batch_dims))


def _follow_tuples(n: OpNode, new: Resizing, port: int, batch_dims: int) -> None:
    """Rebuild constant index tuples; ``port`` has an axis for each of theirs but the last."""
    indices = n.const(1)
    if indices is None:
        return
    grid = None if batch_dims else _grid(indices, n.shape(0)[: indices.shape[-1]])
    if grid is not None:
        kept = [new.positions(port, axis) for axis in range(len(grid))]
        lines = [
            ranks(new.positions(0, axis), line[results], results)
            for axis, (line, results) in enumerate(zip(grid, kept, strict=True))
        ]
        new.set_constant(1, np.stack(np.meshgrid(*lines, indexing="ij"), -1))
        return
    for axis in range(indices.ndim - 1):
        indices = np.take(indices, new.positions(port, axis), axis)
    new.set_constant(1, indices)


def _index_tuple(b: "TorchBuilder", n: OpNode, batch_dims: int) -> "tuple[fx.Node, ...]":
    """Index tuples as one index tensor per axis, those of the batch axes counted up."""
    import torch

    shape = n.shape(1)
    counters = []
    for axis in range(batch_dims):
        column = [-1 if k == axis else 1 for k in range(len(shape) - 1)]
        counted = torch.arange(shape[axis]).reshape(column)
        counters.append(b.buffer(n, f"batch_{axis}", counted))
    given = b.tensor(n, 1)
    return (*counters, *(b.item(given, (..., k)) for k in range(shape[-1])))


@op("ScatterND")
class ScatterND(Op):
    """Writes slices at index tuples, which name the first axes."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        data, shape, description = n.shape(0), n.shape(1), Description()
        depth, front = shape[-1], len(shape) - 1
        grid = _grid(n.const(1), data[:depth])
        reason = _RUN_TIME if n.const(1) is None else _MIXED
        for axis in range(depth):
            whole = [Place(0, axis), Place(~0, axis)]
            description.add(f"a{axis}", data[axis], whole, None if grid is not None else reason)
        for axis in range(front):
            places = [Place(port, axis) for port in _constants(n, 1, (1, 2))]
            if grid is not None:
                places.append(Place(~0, axis, IndexMap(table=_pairs(grid[axis]))))
            description.add(f"u{axis}", shape[axis], places, None if grid is not None else reason)
        if n.const(1) is None:
            description.pin(1, front, depth, "holds index tuples")
        for axis in range(depth, len(data)):
            places = [Place(0, axis), Place(2, front + axis - depth), Place(~0, axis)]
            description.add(f"a{axis}", data[axis], places)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        _follow_tuples(n, new, 2, 0)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, reduction: str = "none") -> "fx.Node":
        import torch

        if reduction not in ("none", "add"):
            b.fail(n, f"reduction {reduction}")
        at, updates = _index_tuple(b, n, 0), b.tensor(n, 2)
        return b.call(torch.index_put, b.tensor(n, 0), at, updates, reduction == "add")


def _pairs(positions: IntArray) -> tuple[IntArray, IntArray]:
    """Element k stands at ``positions[k]``."""
    return np.arange(len(positions)), positions


@op("ScatterElements")
class ScatterElements(Op):
    """Writes along one axis, at an index of its own for every element."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = 0) -> Description:
        data, shape, description = n.shape(0), n.shape(1), Description()
        axis %= len(data)
        target = _along(n.const(1), axis)
        ports = _constants(n, 1, (1, 2))
        for other in range(len(data)):
            if other != axis and data[other] == shape[other]:
                places = [Place(port, other) for port in (0, *ports, ~0)]
                description.add(f"a{other}", data[other], places)
            elif other != axis:
                whole = [Place(0, other), Place(~0, other)]
                description.add(f"a{other}", data[other], whole)
                places = [Place(port, other) for port in (*ports, ~0)]
                description.add(f"u{other}", shape[other], places)
        moved = [Place(port, axis) for port in ports]
        whole = [Place(0, axis), Place(~0, axis)]
        reason = _RUN_TIME if n.const(1) is None else _MIXED
        kept = None if target is not None else reason
        description.add(f"a{axis}", data[axis], whole, kept)
        description.indexed = {f"a{axis}": 1} if n.const(1) is None else {}
        if target is not None:
            at = _pairs(wrapped(target, data[axis]))
            moved.append(Place(~0, axis, IndexMap(table=at)))
        description.add(f"u{axis}", shape[axis], moved, kept)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axis: int = 0) -> None:
        _follow_elements(n, new, 2, axis % len(n.shape(0)))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = 0, reduction: str = "none") -> "fx.Node":
        x, updates = b.tensor(n, 0), b.tensor(n, 2)
        indices = _from_start(b, n, 1, n.shape(0)[axis])
        if reduction == "none":
            return b.method("scatter", x, axis, indices, updates)
        torch_name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
        return b.method("scatter_reduce", x, axis, indices, updates, torch_name)


@op("TensorScatter")
class TensorScatter(Op):
    """Writes new positions of a sequence into a cache, for every sample from its own place on."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = -2) -> Description:
        cache, update, description = n.shape(0), n.shape(1), Description()
        axis %= len(cache)
        for other, size in enumerate(cache):
            if other != axis:
                places = [Place(port, other) for port in (0, 1, ~0)]
                places += [Place(2, 0)] if other == 0 and n.has(2) else []
                description.add(f"a{other}", size, places)
        description.add("cache", cache[axis], [Place(0, axis), Place(~0, axis)], "a cache")
        description.pin(1, axis, update[axis], "written into a cache")
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -2, mode: str = "linear") -> "fx.Node":
        import torch

        cache, update = n.shape(0), n.shape(1)
        axis %= len(cache)
        row = [-1 if k == axis else 1 for k in range(len(cache))]
        places = b.buffer(n, "places", torch.arange(update[axis]).reshape(row))
        if n.has(2):
            column = (-1, *[1] * (len(cache) - 1))
            places = b.call(torch.add, b.method("reshape", b.tensor(n, 2), column), places)
        if mode == "circular":
            places = b.call(torch.remainder, places, cache[axis])
        new = b.tensor(n, 1)
        return b.method("scatter", b.tensor(n, 0), axis, b.method("expand_as", places, new), new)
