"""Quantized operators of the domain ``com.microsoft``, beside those that ONNX has itself."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from morphgraph.arrays import Shape
from morphgraph.ops.contraction import product, product_axes, product_shape
from morphgraph.ops.contrib import KeepsShape
from morphgraph.ops.elementwise import Elementwise
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Coded, Description, Op, OpNode, from_line, op
from morphgraph.ops.pool import AveragePool
from morphgraph.ops.positions import joined
from morphgraph.ops.quantize import by_range, centred, column_axes, require_single, single, stored

_DOMAIN = "com.microsoft"


def _real(b: "TorchBuilder", n: OpNode, i: int) -> "fx.Node":
    """Stored operand ``i`` as real numbers; its scale and zero point stand behind it."""
    import torch

    return b.call(torch.mul, centred(b, n, i, i + 2), single(b, n, i + 1))


def _quantized(b: "TorchBuilder", n: OpNode, real: "fx.Node", scale: int) -> "fx.Node":
    """Real numbers as the result stores them; operand ``scale``, the zero point behind it."""
    import torch

    steps = b.call(torch.round, b.call(torch.div, real, single(b, n, scale)))
    if n.has(scale + 1):
        steps = b.call(torch.add, steps, single(b, n, scale + 1))
    return stored(b, n, steps)


@op("QLinearAdd", "QLinearMul", domain=_DOMAIN)
class QLinearBinary(Op):
    @staticmethod
    def shape(a: Shape, _scale: Shape, _zero: Shape, b: Shape, *_others: Shape | None) -> Shape:
        return np.broadcast_shapes(a, b)

    @staticmethod
    def describe(n: OpNode) -> Description:
        line = "*a, _, _, *a, _, _, _, _ -> *a"
        return from_line(n, line, gate=n.op_type == "QLinearMul")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        function = torch.add if n.op_type == "QLinearAdd" else torch.mul
        return _quantized(b, n, b.call(function, _real(b, n, 0), _real(b, n, 3)), 6)


@op("QLinearLeakyRelu", "QLinearSigmoid", domain=_DOMAIN)
class QLinearUnary(KeepsShape, Elementwise):
    line = "*a, _, _, _, _ -> *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 0.01) -> "fx.Node":
        import torch
        from torch.nn import functional as F

        x = _real(b, n, 0)
        if n.op_type == "QLinearSigmoid":
            return _quantized(b, n, b.call(torch.sigmoid, x), 3)
        return _quantized(b, n, b.call(F.leaky_relu, x, b.decimal(alpha)), 3)


@op("QLinearAveragePool", "QLinearGlobalAveragePool", domain=_DOMAIN)
class QLinearPool(Op):
    @staticmethod
    def describe(n: OpNode, *, channels_last: int = 0) -> Description:
        x, y = ("N *S c", "N *T c") if channels_last else ("N c *S", "N c *T")
        return from_line(n, f"{x}, _, _, _, _ -> {y}")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, channels_last: int = 0) -> "fx.Node":
        if channels_last:
            b.fail(n, "its channels stand last")
        x = _real(b, n, 0)
        if n.op_type == "QLinearGlobalAveragePool":
            axes = tuple(range(2, len(n.shape(0))))
            pooled = b.method("mean", x, axes, keepdim=True)
        else:
            pooled = AveragePool.call(AveragePool.pooled, n.ir, b, n, x)
        return _quantized(b, n, pooled, 3)


@op("QLinearConcat", domain=_DOMAIN)
class QLinearConcat(Op):
    """Operands stand behind the result's scale and zero point, each with its own."""

    @staticmethod
    def describe(n: OpNode, *, axis: int) -> Description:
        return joined(n, ~0, range(2, len(n.in_shapes), 3), axis)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int) -> "fx.Node":
        import torch

        parts = tuple(_real(b, n, i) for i in range(2, len(n.in_shapes), 3))
        return _quantized(b, n, b.call(torch.cat, parts, axis), 0)


@op("QGemm", domain=_DOMAIN)
class QGemm(Op):
    quantized = MappingProxyType({0: (1, 2), 3: (4, 5)})

    @staticmethod
    def coded(n: OpNode) -> Mapping[int, Coded]:
        return {3: Coded(1, (4, 5)), 6: Coded(1)}

    @staticmethod
    def describe(n: OpNode, *, transA: int = 0, transB: int = 0) -> Description:
        left, right = "i N" if transA else "N i", "o i" if transB else "i o"
        scale, zero = ("o" if n.shape(i) == (n.out()[1],) else "_" for i in (4, 5))
        description = from_line(
            n,
            f"{left}, _, _, {right}, {scale}, {zero}, o, _, _ -> N o",
            macs="N i o",
            contracted="i",
        )
        description.silent = {0: 2, 3: 5}
        return description

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, alpha: float = 1.0, transA: int = 0, transB: int = 0
    ) -> "fx.Node":
        import torch

        x, kernel = centred(b, n, 0, 2), centred(b, n, 3, 5, 0 if transB else 1)
        left = b.method("t", x) if transA else x
        total = b.call(torch.mm, left, b.method("t", kernel) if transB else kernel)
        if n.has(6):
            total = b.call(torch.add, total, b.tensor(n, 6))
        scale = b.call(torch.mul, single(b, n, 1), b.tensor(n, 4))
        if alpha != 1.0:
            scale = b.call(torch.mul, scale, b.decimal(alpha))
        real = b.call(torch.mul, total, scale)
        return _quantized(b, n, real, 7) if n.has(7) else b.method("float", real)


@op("QLinearSoftmax", domain=_DOMAIN)
class QLinearSoftmax(KeepsShape):
    @staticmethod
    def describe(n: OpNode, *, axis: int = -1, opset: int) -> Description:
        names = [f"a{k}" for k in range(len(n.shape(0)))]
        first = axis % len(names)
        summed = names[first : first + 1] if opset >= 13 else names[first:]
        line = f"{' '.join(names)}, _, _, _, _ -> {' '.join(names)}"
        return from_line(n, line, statistical=" ".join(summed))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -1, opset: int) -> "fx.Node":
        import torch

        x, first = _real(b, n, 0), axis % len(n.shape(0))
        if opset >= 13:
            return _quantized(b, n, b.call(torch.softmax, x, axis), 3)
        flat = b.call(torch.softmax, b.method("flatten", x, first), first)
        return _quantized(b, n, b.method("reshape", flat, n.shape(0)), 3)


class _QuantizedProduct(Op):
    """A matrix product of stored numbers whose result is a real one, with a bias."""

    foldable = False  # slow

    @staticmethod
    def shape(left: Shape, right: Shape, *_others: Shape | None) -> Shape:
        return product_shape(left, right)

    @staticmethod
    def finish(
        b: "TorchBuilder", n: OpNode, total: "fx.Node", scales: "Sequence[fx.Node]", bias: int
    ) -> "fx.Node":
        """Real numbers, from the sum of whole ones."""
        import torch

        for scale in scales:
            total = b.call(torch.mul, total, scale)
        if n.has(bias):
            total = b.call(torch.add, total, b.tensor(n, bias))
        return b.method("float", total)


@op("DynamicQuantizeMatMul", domain=_DOMAIN)
class DynamicQuantizeMatMul(_QuantizedProduct):
    """The left operand is quantized by a range that spans its numbers and 0."""

    quantized = MappingProxyType({1: (2, 3)})

    @staticmethod
    def describe(n: OpNode) -> Description:
        left, right, out = product_axes(n.shape(0), n.shape(1))
        line = f"{left}, {right}, {column_axes(n, 2)}, {column_axes(n, 3)}, n -> {out}"
        description = product(n, line, left, right, (0, 1))
        description.silent = {1: 3}
        return description

    @classmethod
    def lower(cls, b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        steps, scale, zero = by_range(b, b.tensor(n, 0))
        left = b.method("double", b.call(torch.sub, steps, zero))
        total = b.call(torch.matmul, left, centred(b, n, 1, 3))
        return cls.finish(b, n, total, (scale, b.tensor(n, 2)), 4)


@op("MatMulIntegerToFloat", domain=_DOMAIN)
class MatMulIntegerToFloat(_QuantizedProduct):
    quantized = MappingProxyType({0: (2, 4), 1: (3, 5)})
    typed_by = 2

    @staticmethod
    def describe(n: OpNode) -> Description:
        require_single(n, 2, 4)
        left, right, out = product_axes(n.shape(0), n.shape(1))
        line = f"{left}, {right}, _, {column_axes(n, 3)}, _, {column_axes(n, 5)}, n -> {out}"
        description = product(n, line, left, right, (0, 1))
        description.silent = {0: 4, 1: 5}
        return description

    @classmethod
    def lower(cls, b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        total = b.call(torch.matmul, centred(b, n, 0, 4), centred(b, n, 1, 5))
        return cls.finish(b, n, total, (single(b, n, 2), b.tensor(n, 3)), 6)


@op("DynamicQuantizeLSTM", domain=_DOMAIN)
class DynamicQuantizeLSTM(Op):
    """An LSTM whose kernels stand transposed, in 8 bits; its hidden units share one range.

    So none of them can go without a change of what the others are rounded to.
    """

    @staticmethod
    def coded(n: OpNode) -> Mapping[int, Coded]:
        return {1: Coded(1, (8, 9)), 2: Coded(1, (10, 11))}

    @staticmethod
    def shape(x: Shape, kernel: Shape, recurrent: Shape, *_others: Shape | None) -> list[Shape]:
        length, batch = x[:2]
        directions, units = recurrent[:2]
        last = (directions, batch, units)
        return [(length, directions, batch, units), last, last]

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(
            n,
            "T N i, D i G, D H G, D B, N, D N H, D N H, D P, _, _, _, _ -> T D N H, D N H, D N H",
            macs="T N D G i + T N D G H",
            contracted="i",
            reason="hidden units share a range of numbers",
        )
