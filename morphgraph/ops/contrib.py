"""Operators of the domain ``com.microsoft`` that ONNX Runtime writes into the files it optimizes.

They are resized like what they were fused from. They have no PyTorch form: load the file that they
were made from. ONNX knows no shapes for them, and ONNX Runtime does not write them: the entries of
those that keep their operand's shape tell it, and convolutions; for others the file must state it.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from morphgraph.notation import Shape
from morphgraph.ops.attention import mask_axes
from morphgraph.ops.contraction import Gemm, convolution, product
from morphgraph.ops.op import (
    Description,
    IndexMap,
    Op,
    OpNode,
    Place,
    Resizing,
    UnreadableError,
    from_line,
    op,
)
from morphgraph.ops.window import window_axes

_DOMAIN = "com.microsoft"


class _KeepsShape(Op):
    """Operators whose first result has the shape of the first operand."""

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x


@op("BiasGelu", "FastGelu", "Gelu", "QuickGelu", domain=_DOMAIN)
class Gelus(_KeepsShape):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, *a -> *a")


@op("QLinearAdd", "QLinearMul", domain=_DOMAIN)
class QLinearBinary(Op):
    @staticmethod
    def shape(a: Shape, _scale: Shape, _zero: Shape, b: Shape, *_others: Shape | None) -> Shape:
        return np.broadcast_shapes(a, b)

    @staticmethod
    def describe(n: OpNode) -> Description:
        line = "*a, _, _, *a, _, _, _, _ -> *a"
        return from_line(n, line, gate=n.op_type == "QLinearMul")


@op("QLinearLeakyRelu", "QLinearSigmoid", domain=_DOMAIN)
class QLinearUnary(_KeepsShape):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, _, _, _, _ -> *a")


@op("QLinearAveragePool", "QLinearGlobalAveragePool", domain=_DOMAIN)
class QLinearPool(Op):
    @staticmethod
    def describe(n: OpNode, *, channels_last: int = 0) -> Description:
        x, y = ("N *S c", "N *T c") if channels_last else ("N c *S", "N c *T")
        return from_line(n, f"{x}, _, _, _, _ -> {y}")


@op("QLinearConcat", domain=_DOMAIN)
class QLinearConcat(Op):
    """Operands stand behind the result's scale and zero point, each with its own."""

    @staticmethod
    def describe(n: OpNode, *, axis: int) -> Description:
        description, ports = Description(), range(2, len(n.in_shapes), 3)
        rank, offset = len(n.out()), 0
        for other in range(rank):
            if other != axis % rank:
                places = [Place(port, other) for port in (*ports, ~0)]
                description.add(f"a{other}", n.out()[other], places)
        for port in ports:
            size = n.shape(port)[axis % rank]
            part = Place(~0, axis % rank, IndexMap(offset=offset))
            description.add(f"c{port}", size, [Place(port, axis % rank), part])
            offset += size
        return description


@op("FusedConv", domain=_DOMAIN)
class FusedConv(Op):
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

    @staticmethod
    def describe(
        n: OpNode,
        *,
        group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> Description:
        space = window_axes(n.shape(1)[2:], strides, pads)
        form = convolution(n.shape(0)[1], n.shape(1), group, space)
        return form.describe(n, f"{form.x}, {form.kernel}, {form.out}, {form.y} -> {form.y}")

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, group: int = 1) -> None:
        if group > 1:
            new.set_attribute("group", new.shape(0)[1] // new.shape(1)[1])


@op("FusedGemm", domain=_DOMAIN)
class FusedGemm(Op):
    """Gemm and an activation."""

    describe = Gemm.describe


@op("QGemm", domain=_DOMAIN)
class QGemm(Op):
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


@op("FusedMatMul", domain=_DOMAIN)
class FusedMatMul(Op):
    @staticmethod
    def describe(
        n: OpNode, *, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0
    ) -> Description:
        if transBatchA or transBatchB or min(len(n.shape(0)), len(n.shape(1))) < 2:
            raise UnreadableError("FusedMatMul of vectors, or with its batch axes turned")
        left, right = "*b k m" if transA else "*b m k", "*b n k" if transB else "*b k n"
        return product(n, f"{left}, {right} -> *b m n", left, right, (0, 1))


@op("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_DOMAIN)
class SkipLayerNormalization(_KeepsShape):
    """A sum of two values and a bias, normalized over the last axis; the sum is a result, too."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        scales = "c, c, c" if n.op_type == "SkipLayerNormalization" else "c, c"
        line = f"*a c, *a c, {scales} -> *a c, *a 1, *a 1, *a c"
        return from_line(n, line, statistical="c")


class _Heads(Op):
    """What attentions share: the scale's default hangs on the head size, as its attribute."""

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, num_heads: int, scale: float | None = None) -> None:
        head_size = n.out()[-1] // num_heads
        new.set_attribute("num_heads", new.size("h"))
        if not scale and new.size("d") != head_size:
            new.set_attribute("scale", 1 / sqrt(head_size))


@op("MultiHeadAttention", domain=_DOMAIN)
class MultiHeadAttention(_Heads):
    @staticmethod
    def describe(n: OpNode, *, num_heads: int) -> Description:
        if n.has(3) or n.has(6) or any(not n.has(i) or len(n.shape(i)) != 3 for i in range(3)):
            raise UnreadableError("MultiHeadAttention with packed operands, a bias or a past")
        mask = mask_axes(n.shape(5), n.shape(0)[0], num_heads, "S") if n.has(5) else "_"
        return from_line(
            n,
            f"N T (h d), N S (h d), N S (h e), _, N S, {mask} -> N T (h e)",
            {"h": num_heads},
            macs="N h T S d + N h T S e",
            contracted="d",
            prefer="h d e",
            eager="h",
            reluctant="d e",
        )


@op("Attention", domain=_DOMAIN)
class PackedAttention(_Heads):
    """Makes queries, keys and values by one kernel, whose axis is (3, heads, head size)."""

    @staticmethod
    def describe(
        n: OpNode, *, do_rotary: int = 0, num_heads: int, qkv_hidden_sizes: Sequence[int] = ()
    ) -> Description:
        if n.has(4) or do_rotary or len(set(qkv_hidden_sizes)) > 1:
            raise UnreadableError("Attention with a past, rotations, or values of another size")
        mask = mask_axes(n.shape(5), n.shape(0)[0], num_heads, "T") if n.has(5) else "_"
        return from_line(
            n,
            f"N T i, i (Q h d), (Q h d), _, _, {mask} -> N T (h d)",
            {"Q": 3, "h": num_heads},
            macs="N T i Q h d + N h T T d + N h T T d",
            contracted="i d",
            prefer="h d",
            eager="h",
            reluctant="d",
        )

    @staticmethod
    def resize(
        n: OpNode,
        new: Resizing,
        *,
        num_heads: int,
        qkv_hidden_sizes: Sequence[int] = (),
        scale: float | None = None,
    ) -> None:
        _Heads.resize(n, new, num_heads=num_heads, scale=scale)
        if qkv_hidden_sizes:
            new.set_attribute("qkv_hidden_sizes", [new.shape(~0)[-1]] * 3)
