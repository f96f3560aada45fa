"""Quantized operators of the domain ``com.microsoft``, beside those that ONNX has itself."""

from types import MappingProxyType

import numpy as np

from morphgraph.arrays import Shape
from morphgraph.ops.contrib import KeepsShape
from morphgraph.ops.elementwise import Elementwise
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, from_line, op
from morphgraph.ops.pool import AveragePool
from morphgraph.ops.positions import joined
from morphgraph.ops.quantize import centred, single, stored

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
