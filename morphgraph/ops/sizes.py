"""Operators that compute with sizes, in models that leave some of them open.

Where PyTorch wants a number, such as in a shape, it gets one (``b.numbers``); here are the tensors.
"""

import operator

import onnx_ir as ir

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Place, op


@op("Shape")
class Shape(Op):
    """The axes whose sizes are read keep them; all others are free."""

    @staticmethod
    def describe(n: OpNode, *, start: int = 0, end: int | None = None) -> Description:
        description = Description()
        rank = len(n.shape(0))
        read = set(range(rank)[slice(start, end)])
        picked = _picked(n)
        if picked is not None:
            read &= {range(rank)[slice(start, end)][k] for k in picked}
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


def _picked(n: OpNode) -> set[int] | None:
    """Which of the sizes the readers pick, where all are Gathers at constant places."""
    found: set[int] = set()
    for node, index in n.ir.outputs[0].uses():
        indices = node.inputs[1] if node.op_type == "Gather" and index == 0 else None
        if indices is None or indices.const_value is None:
            return None
        found.update(int(k) for k in indices.const_value.numpy().reshape(-1))
    return None if n.ir.outputs[0].is_graph_output() else found


@op("Size")
class Size(Op):
    """The number of elements: all sizes are read, and kept."""

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
    """A number repeated; its axes follow the shape that is given."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        for axis, size in enumerate(n.out()):
            description.pin(~0, axis, size, "filled to a computed size")
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, value: ir.TensorProtocol | None = None) -> "fx.Node":
        import torch

        sizes = b.numbers(n, 0)
        if sizes is None:
            b.fail(n, "its shape is computed from values")
        dtype = torch.float32 if value is None else b.dtype(value.dtype)
        fill = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
        return b.call(torch.full, sizes, fill, dtype=dtype, device=b.device())
