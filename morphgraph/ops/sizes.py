"""Operators that compute with sizes, in models that leave some of them open.

Where PyTorch wants a number, such as in a shape, it gets one (``b.numbers``); here are the tensors.
"""

import operator
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.onnx_io import is_unsized, static_shape
from morphgraph.ops.elementwise import Elementwise
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.movement import sliced_positions
from morphgraph.ops.op import Description, Op, OpNode, Place, Resizing, facts_of, op


@op("Shape")
class Shape(Op):
    """The axes whose sizes are read keep them; all others are free."""

    reads_sizes = True

    @staticmethod
    def describe(n: OpNode, *, start: int = 0, end: int | None = None) -> Description:
        description = Description()
        axes = range(len(n.shape(0)))[slice(start, end)]
        read = {axes[k] for k in read_places(n.ir.outputs[0])}
        for axis, size in enumerate(n.shape(0)):
            if axis in read:
                description.pin(0, axis, size, "its size is read")
            else:
                description.add(f"a{axis}", size, [Place(0, axis)])
        description.pin(~0, 0, n.out()[0], "sizes")
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, start: int = 0, end: int | None = None) -> "fx.Node":
        import torch

        axes = range(len(n.shape(0)))[slice(start, end)]
        sizes = [b.size(n, 0, axis) for axis in axes]
        return b.call(torch.tensor, sizes, dtype=torch.int64, device=b.device())


@op("Size")
class Size(Op):
    """The number of elements: all sizes are read, and kept."""

    reads_sizes = True

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        for axis, size in enumerate(n.shape(0)):
            description.pin(0, axis, size, "its size is read")
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        count: int | fx.Node = 1
        for axis in range(len(n.shape(0))):
            count = b.call(operator.mul, count, b.size(n, 0, axis))
        return b.call(torch.tensor, count, dtype=torch.int64, device=b.device())


def read_places(value: ir.Value) -> set[int]:
    """Which of a value's numbers, in row-major order, anybody reads.

    Operators that only move numbers, or treat each by itself, do not read those that they leave
    behind, however they are spelled: Gather, Slice, Split, Squeeze, Cast, Mul, and so on in turn.
    """
    count = prod(static_shape(value))
    everything = set(range(count))
    if value.is_graph_output():
        return everything
    read: set[int] = set()
    maker = value.producer()
    for node, index in value.uses():
        is_inner = maker is not None and node.graph is not maker.graph
        moved = None if is_inner else _moved(node, index)
        if moved is None:
            return everything
        for result, sources in zip(node.outputs, moved, strict=True):
            places = read_places(result) if result.name else ()
            read.update(source for k in places if (source := int(sources[k])) >= 0)
    return read


def _moved(node: ir.Node, index: int) -> list[IntArray] | None:
    """For every number of a node's results the place in operand ``index`` that it depends on.

    -1 stands for one that comes from elsewhere; ``None`` for an operator that mixes numbers, and
    where the places depend on other operands that are computed.
    """
    operands = [value for value in node.inputs if value is not None]
    source = node.inputs[index]
    if node.domain or source is None or any(map(is_unsized, (*operands, *node.outputs))):
        return None
    shape = static_shape(source)
    places = np.arange(prod(shape)).reshape(shape)
    match node.op_type:
        case "Squeeze" | "Unsqueeze" | "Reshape" if index == 0:
            return [places.reshape(-1)]
        case "Concat":
            axis = node.attributes.get_int("axis")
            parts = [
                places if k == index else np.full(static_shape(value), -1)
                for k, value in enumerate(operands)
            ]
            return [np.concatenate(parts, axis).reshape(-1)]
        case "Split" if index == 0:
            axis = node.attributes.get_int("axis", 0)
            ends = np.cumsum([static_shape(value)[axis] for value in node.outputs])
            return [part.reshape(-1) for part in np.split(places, ends[:-1], axis)]
        case "Gather" if index == 0:
            indices = OpNode(node).const(1)
            axis = node.attributes.get_int("axis", 0)
            return None if indices is None else [places.take(indices, axis).reshape(-1)]
        case "Slice" if index == 0 and all(v.const_value is not None for v in operands[1:]):
            kept = sliced_positions(OpNode(node))
            for axis, positions in kept.items():
                places = places.take(positions, axis)
            return [places.reshape(-1)]
    if issubclass(facts_of(node), Elementwise):
        return [np.broadcast_to(places, static_shape(node.outputs[0])).reshape(-1)]
    return None


@op("Range")
class Range(Op):
    """Counts; what it counts to is no channel."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        description.pin(~0, 0, n.out()[0], "counted")
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        bounds = [b.numbers(n, i) for i in range(3)]
        dtype = n.ir.outputs[0].dtype
        if dtype is None or not dtype.is_integer() or None in bounds:
            b.fail(n, "it counts by fractions, or to what is computed from values")
        numbers = [bound[0] for bound in bounds if bound]
        return b.call(torch.arange, *numbers, dtype=b.dtype(dtype), device=b.device())


@op("ConstantOfShape")
class ConstantOfShape(Op):
    """A number repeated; an axis follows its readers, unless its size is computed."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        for axis, (size, known) in enumerate(zip(n.out(), n.sizes(0), strict=True)):
            pinned = "filled to a computed size" if known is None else None
            description.add(f"a{axis}", size, [Place(~0, axis)], pinned)
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        if any(size is not None for size in n.sizes(0)):
            new.set_sizes(0, new.shape(~0))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, value: ir.TensorProtocol | None = None) -> "fx.Node":
        import torch

        sizes = b.numbers(n, 0)
        if sizes is None:
            b.fail(n, "its shape is computed from values")
        dtype = torch.float32 if value is None else b.dtype(value.dtype)
        fill = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
        return b.call(torch.full, sizes, fill, dtype=dtype, device=b.device())
