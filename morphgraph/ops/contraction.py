"""Convolutions and matrix products: the operators that mix channels, and so the ones that cost."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np

from morphgraph.arrays import Shape
from morphgraph.ops.initial import Initial, by_fan_in, by_kernel
from morphgraph.ops.linear import Linear, Product, Window
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, from_line, op
from morphgraph.ops.window import ranked, torch_padding, window_axes, window_pads


class Convolution(NamedTuple):
    """A convolution in factor notation: its operands, and what its factors do."""

    x: str
    kernel: str
    out: str
    y: str
    macs: str
    sizes: Mapping[str, int] = MappingProxyType({})
    contracted: str = ""
    prefer: str = ""

    def describe(self, n: OpNode, line: str) -> Description:
        """A description from a line that is made of the operands."""
        return from_line(
            n,
            line,
            self.sizes,
            macs=self.macs,
            contracted=self.contracted,
            prefer=self.prefer,
        )


def convolution(
    channels: int, kernel: Shape, group: int, space: tuple[str, str] = ("*S", "*T")
) -> Convolution:
    """Dense, grouped or depthwise, as the sizes say.

    ``kernel`` is ``[o, i, *K]``; ``space`` names the axes before and after it.
    """
    out_channels, in_per_group = kernel[:2]
    before, after = space
    if group == 1:
        return Convolution(
            f"N i {before}", "o i *K", "o", f"N o {after}", f"N i o *K {after}", contracted="i"
        )
    if group == channels and in_per_group == 1:
        return Convolution(
            f"N c {before}",
            "(c m) 1 *K",
            "(c m)",
            f"N (c m) {after}",
            f"N c m *K {after}",
            {"c": channels},
            prefer="c m",
        )
    return Convolution(
        f"N (g i) {before}",
        "(g o) i *K",
        "(g o)",
        f"N (g o) {after}",
        f"N g i o *K {after}",
        {"g": group},
        "i",
        grouped_preference(in_per_group, out_channels // group),
    )


class Convolutional(Op):
    """What convolutions share; ``kernel`` is the operand that holds theirs.

    Dense, grouped or depthwise: decided by the shapes when the graph is lifted.
    """

    kernel: ClassVar[int] = 1
    convolves = True

    @staticmethod
    @abstractmethod
    def fit(n: OpNode, form: Convolution) -> Description:
        """The description of a node whose convolution has this form."""

    @classmethod
    def describe(
        cls,
        n: OpNode,
        *,
        group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> Description:
        kernel = n.shape(cls.kernel)
        space = window_axes(kernel[2:], strides, pads)
        return cls.fit(n, convolution(n.shape(0)[1], kernel, group, space))

    @classmethod
    def linear(
        cls,
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> Linear | None:
        return _window(n, (0, cls.kernel), auto_pad, dilations, group, pads, strides)

    @classmethod
    def resize(cls, n: OpNode, new: Resizing, *, group: int = 1) -> None:
        if group > 1:
            new.set_attribute("group", new.shape(0)[1] // new.shape(cls.kernel)[1])


@op("Conv")
class Conv(Convolutional):
    blocked = True
    foldable = False  # slow
    shift = 2
    zeros = (2,)

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return dict.fromkeys((1, 2), by_kernel(n.shape(1)))

    @staticmethod
    def fit(n: OpNode, form: Convolution) -> Description:
        return form.describe(n, f"{form.x}, {form.kernel}, {form.out} -> {form.y}")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch import nn
        from torch.nn import functional as F

        kernel = n.shape(1)[2:]  # [kh, kw]
        rank = _spatial_rank(b, n)
        stride = tuple(strides or (1,) * rank)
        dilation = tuple(dilations or (1,) * rank)
        before, after = window_pads(n, kernel, stride, dilation, pads, auto_pad)
        x = b.tensor(n, 0)
        if before != after:
            x = b.call(F.pad, x, torch_padding(before, after))
            before = (0,) * rank
        biased = _has_bias(b, n)
        make = ranked(nn, "Conv", rank)
        sizes = n.shape(1)[1] * group, n.shape(1)[0], kernel, stride, before, dilation, group
        module = make(*sizes, bias=biased, device="meta")
        owned = b.owner(n, module, x, {"weight": 1, "bias": 2} if biased else {"weight": 1})
        if owned is not None:
            return owned
        function = ranked(F, "conv", rank)
        bias = b.tensor(n, 2) if biased else None
        return b.call(function, x, b.tensor(n, 1), bias, stride, before, dilation, group)


@op("ConvTranspose")
class ConvTranspose(Op):
    """Every input position is multiplied with the whole kernel, so the input space is counted."""

    convolves = True
    foldable = False  # slow
    shift = 2
    zeros = (2,)

    @staticmethod
    def describe(n: OpNode, *, group: int = 1) -> Description:
        channels = n.shape(0)[1]
        out_per_group = n.shape(1)[1]
        if group == 1:
            line = "N i *S, i o *K, o -> N o *T"
            return from_line(n, line, macs="N i o *S *K", contracted="i")
        if group == channels:
            if out_per_group == 1:
                return from_line(n, "N c *S, c 1 *K, c -> N c *T", macs="N c *S *K")
            return from_line(
                n,
                "N c *S, c m *K, (c m) -> N (c m) *T",
                macs="N c m *S *K",
                prefer="c m",
            )
        return from_line(
            n,
            "N (g i) *S, (g i) o *K, (g o) -> N (g o) *T",
            {"g": group},
            macs="N g i o *S *K",
            contracted="i",
            prefer=grouped_preference(channels // group, out_per_group),
        )

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return dict.fromkeys((1, 2), by_kernel(n.shape(1)))

    @staticmethod
    def linear(
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> Linear | None:
        # A size that is asked for leaves the pads to it, whatever they are said to be.
        padding = "SAME_LOWER" if output_shape and auto_pad != "SAME_UPPER" else auto_pad
        found = _window(n, (0, 1), padding, dilations, group, pads, strides)
        return found and replace(
            found,
            transposed=True,
            odd_first=padding != "SAME_UPPER",
            extra=tuple(output_padding or ()),
        )

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, group: int = 1) -> None:
        if group > 1:
            new.set_attribute("group", new.size("c" if group == n.shape(0)[1] else "g"))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch import nn
        from torch.nn import functional as F

        kernel = n.shape(1)[2:]  # [kh, kw]
        rank = _spatial_rank(b, n)
        stride = tuple(strides or (1,) * rank)
        dilation = tuple(dilations or (1,) * rank)
        extra = tuple(output_padding or (0,) * rank)
        full = [
            (size - 1) * s + more + (width - 1) * d + 1
            for size, s, more, width, d in zip(
                n.shape(0)[2:], stride, extra, kernel, dilation, strict=True
            )
        ]
        cut = [whole - out for whole, out in zip(full, n.out()[2:], strict=True)]
        if auto_pad == "NOTSET" and output_shape is None:
            before, after = window_pads(n, kernel, stride, dilation, pads, auto_pad)
        else:
            small, large = tuple(c // 2 for c in cut), tuple(c - c // 2 for c in cut)
            before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        symmetric = before == after and min(cut) >= 0
        padding = before if symmetric else (0,) * rank
        x, biased = b.tensor(n, 0), _has_bias(b, n)
        make = ranked(nn, "ConvTranspose", rank)
        sizes = n.shape(1)[0], n.shape(1)[1] * group, kernel, stride, padding, extra, group
        module = make(*sizes, bias=biased, dilation=dilation, device="meta")
        y = b.owner(n, module, x, {"weight": 1, "bias": 2} if biased else {"weight": 1})
        if y is None:
            weight, bias = b.tensor(n, 1), b.tensor(n, 2) if biased else None
            options = stride, padding, extra, group, dilation
            y = b.call(ranked(F, "conv_transpose", rank), x, weight, bias, *options)
        if not symmetric:
            crop = torch_padding([-c for c in before], [-c for c in after])
            y = b.call(F.pad, y, crop)
        return y


def _window(
    n: OpNode,
    ports: tuple[int, int],
    auto_pad: str,
    dilations: Sequence[int] | None,
    group: int,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> Window | None:
    """A convolution as a linear map of the first of these ports."""
    operand, weight = ports
    if n.is_weight(operand) or not n.is_weight(weight):
        return None
    size = n.shape(weight)[2:]
    rank = len(size)
    fixed = {"NOTSET": tuple(pads or (0,) * (2 * rank))[:rank], "VALID": (0,) * rank}
    return Window(
        operand=operand,
        weight=weight,
        size=tuple(size),
        strides=tuple(strides or (1,) * rank),
        dilations=tuple(dilations or (1,) * rank),
        before=fixed.get(auto_pad or "NOTSET"),
        odd_first=auto_pad == "SAME_LOWER",
        groups=group,
    )


def grouped_preference(in_per_group: int, out_per_group: int) -> str:
    """Channels within the groups shrink by default; where a group has one only, whole groups go."""
    return "i o g" if in_per_group > 1 and out_per_group > 1 else "g i o"


@op("Gemm")
class Gemm(Op):
    shift = 2
    shift_factor = "beta"
    zeros = (2,)

    @staticmethod
    def describe(
        n: OpNode, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
    ) -> Description:
        left = "i N" if transA else "N i"
        right = "o i" if transB else "i o"
        bias = _bias_axes(n.shape(2), n.out()) if n.has(2) else "_"
        return from_line(n, f"{left}, {right}, {bias} -> N o", macs="N i o", contracted="i")

    @staticmethod
    def linear(n: OpNode, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> Linear | None:
        return turned_product(n, alpha, transA, transB)

    @staticmethod
    def initial(n: OpNode, *, transB: int = 0) -> Mapping[int, Initial]:
        return dict.fromkeys((0, 1, 2), by_fan_in(n.shape(1)[1 if transB else 0]))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,
        transB: int = 0,
    ) -> "fx.Node":
        import torch
        from torch import nn

        x, biased = b.tensor(n, 0), _has_bias(b, n)
        if transA:
            x = b.method("t", x)
        if transB and alpha == beta == 1.0 and (not biased or n.shape(2) == n.out()[1:]):
            out_features, in_features = n.shape(1)
            module = nn.Linear(in_features, out_features, bias=biased, device="meta")
            owned = b.owner(n, module, x, {"weight": 1, "bias": 2} if biased else {"weight": 1})
            if owned is not None:
                return owned
        weight = b.method("t", b.tensor(n, 1)) if transB else b.tensor(n, 1)
        if biased:
            return b.call(torch.addmm, b.tensor(n, 2), x, weight, beta=beta, alpha=alpha)
        product = b.call(torch.mm, x, weight)
        return product if alpha == 1.0 else b.call(torch.mul, product, alpha)


def _bias_axes(bias: Shape, out: Shape) -> str:
    """How Gemm's bias broadcasts to the product's (N, o)."""
    names = ["N", "o"][2 - len(bias) :]
    full = out[2 - len(bias) :]
    axes = [
        name if size == whole else "1" for name, size, whole in zip(names, bias, full, strict=True)
    ]
    return " ".join(axes) or "_"


def product_axes(left: Shape, right: Shape) -> tuple[str, str, str]:
    """The axes of a matrix product's operands and of its result."""
    first = "k" if len(left) == 1 else "*b m k"
    second = "k" if len(right) == 1 else "*b k n"
    axes = ("*b" if len(left) > 1 or len(right) > 1 else "", "m" if len(left) > 1 else "")
    return first, second, " ".join([*axes, "n" if len(right) > 1 else ""]).strip()


def product_shape(left: Shape, right: Shape) -> Shape:
    """The shape of a product of two stacks of matrices.

    Raises:
        UnsupportedFormError: one of them is a vector.
    """
    if min(len(left), len(right)) < 2:
        raise UnsupportedFormError("a product of vectors")
    return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])


def product(n: OpNode, line: str, left: str, right: str, operands: tuple[int, int]) -> Description:
    """A matrix product; of two activations an attention, whose batch axes (heads) go first."""
    factors = [f for f in ("*b", "m", "k", "n") if f in f"{left} {right}".split()]
    activations = not any(n.is_weight(i) for i in operands)
    return from_line(
        n,
        line,
        macs=" ".join(factors),
        contracted="k",
        eager="*b" if activations and "*b" in factors else "",
        reluctant="k" if activations else "",
    )


def turned_product(n: OpNode, factor: float, left: int, right: int) -> Linear | None:
    """A matrix product with one kernel as a linear map; ``None`` for a stack of several kernels.

    ``left`` and ``right`` say whether that operand is transposed.
    """
    if n.is_weight(0) == n.is_weight(1) or factor == 0:
        return None
    weight = 0 if n.is_weight(0) else 1
    kernel, operand = n.shape(weight), n.shape(1 - weight)
    if len(operand) < 2 or len(kernel) < 2 or prod(kernel[:-2]) > 1:
        return None
    if weight:
        plain = Product(operand=0, weight=1, factor=factor, transposed=not right)
        return replace(plain, reduced=-2) if left else plain
    turned = Product(operand=1, weight=0, factor=factor, made=-2, transposed=bool(left))
    return turned if right else replace(turned, reduced=-2)


def matrices(n: OpNode, fan_in: int) -> Mapping[int, Initial]:
    """Kernels of linear layers among a product's operands: matrices, not stacks of them."""
    return {i: by_fan_in(fan_in) for i in (0, 1) if len(n.shape(i)) == 2}


@op("MatMul")
class MatMul(Op):
    """A product of two activations is an attention: there the batch axes (heads) go first."""

    added_behind = ()

    @staticmethod
    def describe(n: OpNode) -> Description:
        left, right, out = product_axes(n.shape(0), n.shape(1))
        return product(n, f"{left}, {right} -> {out}", left, right, (0, 1))

    @staticmethod
    def linear(n: OpNode) -> Linear | None:
        return turned_product(n, 1.0, 0, 0)

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return matrices(n, n.shape(0)[-1])

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        x = b.tensor(n, 0)
        weight = b.transposed_parameter(n, 1)
        if weight is not None:  # [out, in]: a Linear on more than two axes
            out_features, in_features = n.out()[-1], n.shape(0)[-1]
            module = nn.Linear(in_features, out_features, bias=False, device="meta")
            owned = b.own(n, module, x, {"weight": weight})
            return b.call(F.linear, x, b.value(weight)) if owned is None else owned
        return b.call(torch.matmul, x, b.tensor(n, 1))


def _has_bias(b: "TorchBuilder", n: OpNode) -> bool:
    """Whether operand 2 adds anything; torch's exporter writes a missing bias as zeros."""
    bias = b.constant(n, 2)
    return n.has(2) and (bias is None or bool(bias.any()))


def _spatial_rank(b: "TorchBuilder", n: OpNode) -> int:
    rank = len(n.shape(1)) - 2
    if rank not in (1, 2, 3):
        b.fail(n, f"{rank} spatial axes, torch has 1 to 3")
    return rank
