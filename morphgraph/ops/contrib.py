"""Operators of the domain ``com.microsoft`` that ONNX Runtime writes into the files it optimizes.

They are resized like what they were fused from, and become the same modules of torch. ONNX knows
no shapes for them, and ONNX Runtime does not write them: the entries of those that keep their
operand's shape tell it, and convolutions; for others the file must state it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from morphgraph.arrays import Shape
from morphgraph.ops.contraction import (
    Conv,
    Convolution,
    Convolutional,
    Gemm,
    matrices,
    product,
    product_shape,
    turned_product,
)
from morphgraph.ops.elementwise import Elementwise
from morphgraph.ops.initial import ONE, ZERO, Initial
from morphgraph.ops.linear import Linear
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.norm import RMSNormalization
from morphgraph.ops.op import (
    AfterSum,
    Description,
    Op,
    OpNode,
    UnsupportedFormError,
    from_line,
    op,
)

_DOMAIN = "com.microsoft"


class KeepsShape(Op):
    """Operators whose first result has the shape of the first operand."""

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x


@op("BiasGelu", "FastGelu", "Gelu", "QuickGelu", domain=_DOMAIN)
class Gelus(KeepsShape, Elementwise):
    offset = 1
    line = "*a, *a -> *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 1.702) -> "fx.Node":
        import torch
        from torch import nn

        x = b.tensor(n, 0)
        if n.has(1):
            x = b.call(torch.add, x, b.tensor(n, 1))
        if n.op_type == "QuickGelu":
            factor = b.decimal(alpha)
            return b.call(torch.mul, x, b.call(torch.sigmoid, b.call(torch.mul, x, factor)))
        return b.module(n, nn.GELU("tanh" if n.op_type == "FastGelu" else "none"), x)


def _activated(
    b: "TorchBuilder", n: OpNode, x: "fx.Node", activation: str, numbers: Sequence[float]
) -> "fx.Node":
    """The activation that was fused into an operator, with its parameters in ONNX's order."""
    import torch
    from torch import nn

    if activation in ("", "Relu", "Tanh", "Sigmoid"):
        modules = {"Relu": nn.ReLU, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid}
        return b.module(n, modules[activation](), x) if activation else x
    parameters = [b.decimal(number) for number in numbers]
    if activation == "LeakyRelu" and parameters:
        return b.module(n, nn.LeakyReLU(parameters[0]), x)
    if activation == "Clip" and len(parameters) == 2:
        return b.call(torch.clamp, x, *parameters)
    if activation == "HardSigmoid" and len(parameters) == 2:
        line = b.call(torch.add, b.call(torch.mul, x, parameters[0]), parameters[1])
        return b.call(torch.clamp, line, 0.0, 1.0)
    return b.fail(n, f"activation {activation} with parameters {parameters}")


@op("FusedConv", domain=_DOMAIN)
class FusedConv(Convolutional):
    """A convolution, to which another value may be added, and an activation."""

    @staticmethod
    def shape(
        x: Shape,
        kernel: Shape,
        *_others: Shape | None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> Shape:
        rank = len(kernel) - 2
        step, gap = strides or (1,) * rank, dilations or (1,) * rank
        if auto_pad.startswith("SAME"):
            space = (-(-size // s) for size, s in zip(x[2:], step, strict=True))
            return (x[0], kernel[0], *space)
        added = pads or (0,) * (2 * rank)
        spans = [(width - 1) * g + 1 for width, g in zip(kernel[2:], gap, strict=True)]
        space = (
            (size + before + after - span) // s + 1
            for size, before, after, span, s in zip(
                x[2:], added[:rank], added[rank:], spans, step, strict=True
            )
        )
        return (x[0], kernel[0], *space)

    @classmethod
    def linear(cls, n: OpNode, *, activation: str = "", **attributes: Any) -> Linear | None:
        if activation or n.has(3):
            return None  # the result is not the map's
        return super().linear(n, **attributes)

    @staticmethod
    def fit(n: OpNode, form: Convolution) -> Description:
        return form.describe(n, f"{form.x}, {form.kernel}, {form.out}, {form.y} -> {form.y}")

    initial = Conv.initial

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        activation: str = "",
        activation_params: Sequence[float] = (),
    ) -> "fx.Node":
        import torch

        y = Op.call(Conv.lower, n.ir, b, n)
        if n.has(3):
            y = b.call(torch.add, y, b.tensor(n, 3))
        return _activated(b, n, y, activation, activation_params)


@op("FusedGemm", domain=_DOMAIN)
class FusedGemm(Op):
    """Gemm and an activation."""

    describe = Gemm.describe
    initial = Gemm.initial

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        activation: str = "",
        activation_alpha: float | None = None,
        activation_beta: float | None = None,
    ) -> "fx.Node":
        y = Op.call(Gemm.lower, n.ir, b, n)
        numbers = [x for x in (activation_alpha, activation_beta) if x is not None]
        return _activated(b, n, y, activation, numbers)


@op("FusedMatMul", domain=_DOMAIN)
class FusedMatMul(Op):
    """A product of operands whose axes are turned: the last two, or the batch before the first."""

    @staticmethod
    def shape(
        left: Shape,
        right: Shape,
        *,
        transA: int = 0,
        transB: int = 0,
        transBatchA: int = 0,
        transBatchB: int = 0,
    ) -> Shape:
        if min(len(left), len(right)) < 2:
            raise UnsupportedFormError("FusedMatMul of vectors")
        a, b = _turned(left, transA, transBatchA), _turned(right, transB, transBatchB)
        return product_shape(a, b)

    @staticmethod
    def describe(
        n: OpNode, *, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0
    ) -> Description:
        if min(len(n.shape(0)), len(n.shape(1))) < 2:
            raise UnsupportedFormError("FusedMatMul of vectors")
        left, right = ("k", "m") if transA else ("m", "k"), ("n", "k") if transB else ("k", "n")
        first = f"{left[0]} *b {left[1]}" if transBatchA else f"*b {left[0]} {left[1]}"
        second = f"{right[0]} *b {right[1]}" if transBatchB else f"*b {right[0]} {right[1]}"
        return product(n, f"{first}, {second} -> *b m n", first, second, (0, 1))

    @staticmethod
    def initial(n: OpNode, *, transA: int = 0, transBatchA: int = 0) -> Mapping[int, Initial]:
        return matrices(n, _turned(n.shape(0), transA, transBatchA)[-1])

    @staticmethod
    def linear(
        n: OpNode,
        *,
        alpha: float = 1.0,
        transA: int = 0,
        transB: int = 0,
        transBatchA: int = 0,
        transBatchB: int = 0,
    ) -> Linear | None:
        if transBatchA or transBatchB:
            return None
        return turned_product(n, alpha, transA, transB)

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        alpha: float = 1.0,
        transA: int = 0,
        transB: int = 0,
        transBatchA: int = 0,
        transBatchB: int = 0,
    ) -> "fx.Node":
        import torch

        operands = []
        for i, (turned, leads) in enumerate(((transA, transBatchA), (transB, transBatchB))):
            x = b.tensor(n, i)
            x = b.method("movedim", x, 0, -2) if leads else x
            operands.append(b.method("transpose", x, -2, -1) if turned else x)
        y = b.call(torch.matmul, *operands)
        return y if alpha == 1.0 else b.call(torch.mul, y, b.decimal(alpha))


def _turned(shape: Shape, turned: int, leads: int) -> Shape:
    """An operand's shape as a stack of matrices; its first axis ``leads`` the batch, not them."""
    if leads:
        shape = (*shape[1:-1], shape[0], shape[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


@op("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_DOMAIN)
class SkipLayerNormalization(KeepsShape):
    """A sum of two values and a bias, normalized over the last axis; the sum is a result, too."""

    summands = (0, 1)

    @staticmethod
    def describe(n: OpNode) -> Description:
        scales = "c, c, c" if n.op_type == "SkipLayerNormalization" else "c, c"
        line = f"*a c, *a c, {scales} -> *a c, *a 1, *a 1, *a c"
        return from_line(n, line, statistical="c")

    @staticmethod
    def after_sum(n: OpNode) -> AfterSum | None:
        if any(
            value.name and (value.uses() or value.is_graph_output()) for value in n.ir.outputs[1:3]
        ):
            return None
        default = {"axis": -1, "epsilon": 1e-12}
        if n.op_type == "SkipLayerNormalization":
            graph = n.ir.graph
            known = graph is not None and graph.opset_imports.get("", 0) >= 17
            return AfterSum("LayerNormalization", (2, 3), 4, 3, default) if known else None
        return AfterSum("SimplifiedLayerNormalization", (2,), 3, 3, default)

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {2: ONE, 3: ZERO} if n.op_type == "SkipLayerNormalization" else {2: ONE}

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, epsilon: float = 1e-12
    ) -> "tuple[fx.Node | None, ...]":
        import torch
        from torch import nn
        from torch.nn import functional as F

        simple, width = n.op_type != "SkipLayerNormalization", n.shape(0)[-1:]
        x = b.call(torch.add, b.tensor(n, 0), b.tensor(n, 1))
        if n.has(3 if simple else 4):
            x = b.call(torch.add, x, b.tensor(n, 3 if simple else 4))
        eps = b.decimal(epsilon)
        roles = {"weight": 2} if simple or not n.has(3) else {"weight": 2, "bias": 3}
        if simple:
            module: nn.Module = nn.RMSNorm(width, eps, device="meta")
        else:
            module = nn.LayerNorm(width, eps, bias="bias" in roles, device="meta")
        y = b.owner(n, module, x, roles)
        if y is None:
            function = F.rms_norm if simple else F.layer_norm
            operands = {role: b.tensor(n, i) for role, i in roles.items()}
            y = b.call(function, x, width, **operands, eps=eps)
        return y, None, None, x


@op("SimplifiedLayerNormalization")
class SimplifiedLayerNormalization(RMSNormalization, KeepsShape):
    """ONNX Runtime writes it into the domain of ONNX itself."""
