"""Quantized numbers: ``real = (stored - zero point) * scale``.

Scales and zero points are single numbers, or follow the axis that they belong to. Operators that
multiply stored numbers subtract the zero points first, so that a zero point adds nothing to a sum.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType

from morphgraph.ops.contraction import Convolution, Convolutional, product, product_axes
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Coded, Description, Op, OpNode, UnsupportedFormError, from_line, op
from morphgraph.ops.window import ranked, torch_padding, window_pads


def _is_single(n: OpNode, i: int) -> bool:
    """Whether an operand is one number, or absent."""
    return not n.has(i) or prod(n.shape(i)) == 1


def require_single(n: OpNode, *operands: int) -> None:
    """Refuse a form in which one of these operands is more than one number."""
    if not all(_is_single(n, i) for i in operands):
        raise UnsupportedFormError(f"{n.op_type} with a scale or zero point for every row")


@op("QuantizeLinear", "DequantizeLinear")
class Quantize(Op):
    """One scale for all, one for every position of an axis, or one for every block of it."""

    foldable = False  # meant as it stands

    @staticmethod
    def coded(n: OpNode) -> Mapping[int, Coded]:
        return {0: Coded(1, (1, 2))}

    @staticmethod
    def describe(n: OpNode, *, axis: int = 1, block_size: int = 0) -> Description:
        if _is_single(n, 1) and not block_size:
            return from_line(n, "*a, _, _ -> *a")
        names = [f"a{k}" for k in range(len(n.shape(0)))]
        line = " ".join(names)
        if not block_size:
            return from_line(n, f"{line}, {names[axis]}, {names[axis]} -> {line}")
        if n.shape(0)[axis] != n.shape(1)[axis] * block_size:
            raise UnsupportedFormError(f"{n.op_type} with a last block that is not full")
        names[axis] = f"({names[axis]} W)"
        whole = " ".join(names)
        reason = "whole blocks of a quantized axis go"
        sizes = {"W": block_size}
        return from_line(n, f"{whole}, {line}, {line} -> {whole}", sizes, reason=reason)

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, axis: int = 1, block_size: int = 0, saturate: int = 1
    ) -> "fx.Node":
        import torch

        def spread(i: int) -> "fx.Node":
            if not block_size:
                return _column(b, n, i, axis)
            return b.call(torch.repeat_interleave, b.tensor(n, i), block_size, axis)

        x, scale, zero = b.tensor(n, 0), spread(1), None
        if n.has(2):
            zero = b.method("float", spread(2))
        if n.op_type == "DequantizeLinear":
            real = b.method("float", x)
            real = real if zero is None else b.call(torch.sub, real, zero)
            return b.call(torch.mul, real, scale)
        steps = b.call(torch.round, b.call(torch.div, x, scale))
        return stored(b, n, steps if zero is None else b.call(torch.add, steps, zero))


def _column(b: "TorchBuilder", n: OpNode, i: int, axis: int) -> "fx.Node":
    """A scale or zero point, shaped to broadcast along its axis."""
    rank = len(n.shape(0))
    if _is_single(n, i):
        return b.tensor(n, i) if not n.shape(i) else b.method("reshape", b.tensor(n, i), ())
    return b.method("reshape", b.tensor(n, i), [-1 if k == axis % rank else 1 for k in range(rank)])


def single(b: "TorchBuilder", n: OpNode, i: int) -> "fx.Node":
    """A scale or zero point that is one number for all."""
    return b.method("reshape", b.tensor(n, i), ())


def stored(b: "TorchBuilder", n: OpNode, number: "fx.Node") -> "fx.Node":
    """A whole number as the node's result type, as near as that holds it."""
    import torch

    value = n.ir.outputs[0]
    if value.dtype is None or not value.dtype.is_integer():
        b.fail(n, f"results of type {value.dtype}")
    dtype = b.dtype(value.dtype)
    limits = torch.iinfo(dtype)
    return b.method("to", b.call(torch.clamp, number, limits.min, limits.max), dtype)


@op("DynamicQuantizeLinear")
class DynamicQuantize(Op):
    """The range spans all numbers and 0, so that a zero changes nothing of it."""

    foldable = False  # meant as it stands

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a -> *a, _, _", contracted="*a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "tuple[fx.Node, fx.Node, fx.Node]":
        import torch

        steps, scale, zero = by_range(b, b.tensor(n, 0))
        return stored(b, n, steps), scale, b.method("to", zero, torch.uint8)


def by_range(b: "TorchBuilder", x: "fx.Node") -> "tuple[fx.Node, fx.Node, fx.Node]":
    """Numbers in 8 bits whose range spans all of them and 0: steps, scale and zero point."""
    import torch

    high = b.call(torch.clamp, b.method("amax", x), 0.0)
    low = b.call(torch.clamp, b.method("amin", x), None, 0.0)
    scale = b.call(torch.div, b.call(torch.sub, high, low), 255)
    nearest = b.call(torch.round, b.call(torch.neg, b.call(torch.div, low, scale)))
    zero = b.call(torch.clamp, nearest, 0, 255)
    steps = b.call(torch.add, b.call(torch.round, b.call(torch.div, x, scale)), zero)
    return b.call(torch.clamp, steps, 0, 255), scale, zero


def centred(b: "TorchBuilder", n: OpNode, i: int, zero: int, axis: int | None = None) -> "fx.Node":
    """Stored numbers less their zero point, in double precision: whole numbers stay exact."""
    import torch

    x = b.method("double", b.tensor(n, i))
    if not n.has(zero):
        return x
    point = b.tensor(n, zero)
    if _is_single(n, zero):
        point = b.method("reshape", point, ())
    elif axis is not None:
        rank = len(n.shape(i))
        point = b.method("reshape", point, [-1 if k == axis else 1 for k in range(rank)])
    return b.call(torch.sub, x, point)


def _rescaled(b: "TorchBuilder", n: OpNode, total: "fx.Node", axis: int | None) -> "fx.Node":
    """A sum of products in the scale and zero point of the result (operands 1, 4, 6 and 7)."""
    import torch

    scales = []
    for i in (1, 4, 6):
        scale = b.tensor(n, i)
        if _is_single(n, i):
            scale = b.method("reshape", scale, ())
        elif axis is not None:
            rank = len(n.out())
            scale = b.method("reshape", scale, [-1 if k == axis else 1 for k in range(rank)])
        scales.append(scale)
    factor = b.call(torch.div, b.call(torch.mul, scales[0], scales[1]), scales[2])
    steps = b.call(torch.round, b.call(torch.mul, total, factor))
    if n.has(7):
        steps = b.call(torch.add, steps, b.method("reshape", b.tensor(n, 7), ()))
    return stored(b, n, steps)


class _QuantizedConvolution(Convolutional):
    """A convolution of stored numbers; each zero point stands two operands behind its numbers."""

    foldable = False  # slow

    @staticmethod
    @abstractmethod
    def finish(b: "TorchBuilder", n: OpNode, total: "fx.Node") -> "fx.Node":
        """The result, from the sum of whole numbers."""

    @classmethod
    def lower(
        cls,
        b: "TorchBuilder",
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch.nn import functional as F

        window = n.shape(cls.kernel)[2:]
        rank = len(window)
        stride, dilation = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
        before, after = window_pads(n, window, stride, dilation, pads, auto_pad)
        # Padding adds nothing, as in the operators of ONNX.
        x = b.call(F.pad, centred(b, n, 0, 2), torch_padding(before, after))
        kernel = centred(b, n, cls.kernel, cls.kernel + 2, 0)
        bias = b.method("double", b.tensor(n, 8)) if n.has(8) else None
        convolve = ranked(F, "conv", rank)
        return cls.finish(b, n, b.call(convolve, x, kernel, bias, stride, 0, dilation, group))


@op("QLinearConv")
class QLinearConv(_QuantizedConvolution):
    kernel = 3
    quantized = MappingProxyType({0: (1, 2), 3: (4, 5)})

    @staticmethod
    def coded(n: OpNode) -> Mapping[int, Coded]:
        return {3: Coded(1, (4, 5)), 8: Coded(1)}

    @staticmethod
    def fit(n: OpNode, form: Convolution) -> Description:
        require_single(n, 1, 2, 6, 7)
        scale, zero = ("_" if _is_single(n, i) else form.out for i in (4, 5))
        line = f"{form.x}, _, _, {form.kernel}, {scale}, {zero}, _, _, {form.out} -> {form.y}"
        description = form.describe(n, line)
        description.silent = {0: 2, 3: 5}
        return description

    @staticmethod
    def finish(b: "TorchBuilder", n: OpNode, total: "fx.Node") -> "fx.Node":
        return _rescaled(b, n, total, 1)


@op("ConvInteger")
class ConvInteger(_QuantizedConvolution):
    quantized = MappingProxyType({0: (None, 2), 1: (None, 3)})

    @staticmethod
    def fit(n: OpNode, form: Convolution) -> Description:
        require_single(n, 2)
        zero = "_" if _is_single(n, 3) else form.out
        description = form.describe(n, f"{form.x}, {form.kernel}, _, {zero} -> {form.y}")
        description.silent = {0: 2, 1: 3}
        return description

    @staticmethod
    def finish(b: "TorchBuilder", n: OpNode, total: "fx.Node") -> "fx.Node":
        return stored(b, n, total)


def column_axes(n: OpNode, i: int) -> str:
    """How a number for every column of a matrix stands: one for all, ``[n]`` or ``[..., 1, n]``."""
    if _is_single(n, i):
        return "_"
    return "n" if len(n.shape(i)) == 1 else "*b 1 n"


@op("QLinearMatMul")
class QLinearMatMul(Op):
    foldable = False  # slow
    quantized = MappingProxyType({0: (1, 2), 3: (4, 5)})

    @staticmethod
    def describe(n: OpNode) -> Description:
        require_single(n, 1, 2, 6, 7)
        left, right, out = product_axes(n.shape(0), n.shape(3))
        scale, zero = column_axes(n, 4), column_axes(n, 5)
        line = f"{left}, _, _, {right}, {scale}, {zero}, _, _ -> {out}"
        description = product(n, line, left, right, (0, 3))
        description.silent = {0: 2, 3: 5}
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        total = b.call(torch.matmul, centred(b, n, 0, 2), centred(b, n, 3, 5))
        return _rescaled(b, n, total, None)


@op("MatMulInteger")
class MatMulInteger(Op):
    foldable = False  # slow
    quantized = MappingProxyType({0: (None, 2), 1: (None, 3)})

    @staticmethod
    def describe(n: OpNode) -> Description:
        require_single(n, 2)
        left, right, out = product_axes(n.shape(0), n.shape(1))
        description = product(
            n, f"{left}, {right}, _, {column_axes(n, 3)} -> {out}", left, right, (0, 1)
        )
        description.silent = {0: 2, 1: 3}
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        return stored(b, n, b.call(torch.matmul, centred(b, n, 0, 2), centred(b, n, 1, 3)))
