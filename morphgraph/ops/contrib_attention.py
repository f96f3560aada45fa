"""Attentions of the domain ``com.microsoft``, as ONNX Runtime's transformer optimizer writes them.

Those of decoders are in :mod:`morphgraph.ops.contrib_decoding`. Axes as
in :mod:`morphgraph.ops.attention`: ``N`` batch, ``T`` queries, ``S`` new keys, ``P`` keys of the
past, ``L`` all keys; ``h`` heads of keys and values, each shared by ``r`` of queries; ``d`` and
``e`` the sizes of their heads. An upper-case ``D`` is a head size that stays.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import Any

from morphgraph.arrays import Shape
from morphgraph.ops.attention import heads_first, mask_axes
from morphgraph.ops.initial import ONE, ZERO, Initial, xavier
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    IndexMap,
    Op,
    OpNode,
    Place,
    Resizing,
    UnsupportedFormError,
    from_line,
    op,
)
from morphgraph.ops.quantize import centred, single

_DOMAIN = "com.microsoft"


def _attention(
    b: "TorchBuilder",
    n: OpNode,
    qkv: "Sequence[fx.Node]",
    mask: "fx.Node | None",
    options: tuple[float | None, int],
) -> "fx.Node":
    """Attention of ``[N, heads, T, size]``; ``options`` are scale and direction."""
    from torch.nn import functional as F

    scale, unidirectional = options
    if unidirectional and mask is not None:
        b.fail(n, "a bias or a mask on scores that run in one direction")
    chosen: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    if unidirectional:
        chosen["is_causal"] = True
    if scale:
        chosen["scale"] = b.decimal(scale)
    y = b.call(F.scaled_dot_product_attention, *qkv, **chosen)
    return b.method("flatten", b.method("transpose", y, 1, 2), 2)


class _Heads(Op):
    """What attentions share: without a `scale` attribute, the scale depends on the head size."""

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, num_heads: int, scale: float | None = None) -> None:
        head_size = n.out()[-1] // num_heads
        new.set_attribute("num_heads", new.size("h"))
        if not scale and new.size("d") != head_size:
            new.set_attribute("scale", 1 / sqrt(head_size))


@op("MultiHeadAttention", domain=_DOMAIN)
class MultiHeadAttention(Op):
    """Keys and values are ``[N, S, (heads, size)]`` or, of another sequence, heads first."""

    zeros = (3,)
    extends = MappingProxyType({6: 1, 7: 2})
    mixes = 2

    @staticmethod
    def shape(
        q: Shape,
        k: Shape | None = None,
        v: Shape | None = None,
        _bias: Shape | None = None,
        _mask: Shape | None = None,
        _added: Shape | None = None,
        past: Shape | None = None,
        *_others: Shape | None,
        num_heads: int,
    ) -> list[Shape | None]:
        if len(q) != 3 or k is None or v is None or len(k) not in (3, 4) or len(k) != len(v):
            return [None] * 4
        keys = (past[2] if past else 0) + k[-2]
        wide = v[-1] * (1 if len(v) == 3 else num_heads)
        sizes = (x[-1] // num_heads if len(x) == 3 else x[-1] for x in (k, v))
        present = [(q[0], num_heads, keys, size) for size in sizes]
        return [(*q[:2], wide), *present, (q[0], num_heads, q[1], keys)]

    @staticmethod
    def describe(n: OpNode, *, num_heads: int) -> Description:
        if not n.has(1) or not n.has(2) or len(n.shape(0)) != 3 or n.has(8):
            raise UnsupportedFormError(
                "MultiHeadAttention with packed operands, or a past in a buffer"
            )
        heads_lead = len(n.shape(1)) == 4
        if heads_lead and n.has(3):
            raise UnsupportedFormError("MultiHeadAttention with a bias on keys of another sequence")
        # A bias is added inside: where a query's position is 0, the product of the biases is left.
        d = "D" if n.has(3) else "d"
        k, v = (f"N h S {d}", "N h S e") if heads_lead else (f"N S (h {d})", "N S (h e)")
        past, length = ("_, _", "S")
        if n.has(6):
            past, length = f"N h P {d}, N h P e", "L"
        mask = mask_axes(n.shape(5), n.shape(0)[0], num_heads, length) if n.has(5) else "_"
        keys = n.shape(1)[-2] + (n.shape(6)[-2] if n.has(6) else 0)
        description = from_line(
            n,
            f"N T (h {d}), {k}, {v}, _, _, {mask}, {past}"
            f" -> N T (h e), N h {length} {d}, N h {length} e, N h T {length}",
            {"h": num_heads, length: keys},
            macs=f"N h T {length} {d} + N h T {length} e",
            contracted=d,
            prefer=f"h {d} e",
            eager="h",
            reluctant=f"{d} e",
        )
        if n.has(3):
            _side_by_side(n, description, 3, (0, 1, 2))
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, num_heads: int, scale: float | None = None) -> None:
        head_size = n.shape(0)[-1] // num_heads
        new.set_attribute("num_heads", new.size("h"))
        if not scale and not n.has(3) and new.size("d") != head_size:
            new.set_attribute("scale", 1 / sqrt(head_size))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        mask_filter_value: float = -10000.0,
        num_heads: int,
        scale: float | None = None,
        unidirectional: int = 0,
    ) -> "tuple[fx.Node, ...]":
        import torch

        if any(not n.has(i) for i in range(3)) or len(n.shape(0)) != 3 or n.has(8):
            b.fail(n, "packed operands or a past in a buffer")
        if n.has(4) and len(n.shape(4)) != 2:
            b.fail(n, "keys that are masked by lengths, or for every query")
        qkv = [b.tensor(n, i) for i in range(3)]
        if n.has(3):
            parts = b.method("split", b.tensor(n, 3), [n.shape(i)[-1] for i in range(3)])
            qkv = [b.call(torch.add, x, b.item(parts, i)) for i, x in enumerate(qkv)]
        q, k, v = (
            heads_first(b, x, num_heads if len(n.shape(i)) == 3 else 0) for i, x in enumerate(qkv)
        )
        if n.has(6):
            k = b.call(torch.cat, (b.tensor(n, 6), k), 2)
            v = b.call(torch.cat, (b.tensor(n, 7), v), 2)
        mask = b.optional(n, 5)
        if n.has(4):
            masked = b.method("reshape", b.tensor(n, 4), (n.shape(4)[0], 1, 1, n.shape(4)[1]))
            lower = b.call(torch.mul, b.call(torch.eq, masked, 0), b.decimal(mask_filter_value))
            mask = lower if mask is None else b.call(torch.add, mask, lower)
        if unidirectional and n.has(6):
            b.fail(n, "a past of scores that run in one direction")
        y = _attention(b, n, (q, k, v), mask, (scale, unidirectional))
        return (y, k, v)[: len(n.out_shapes)]


def _side_by_side(n: OpNode, description: Description, port: int, operands: Sequence[int]) -> None:
    """Lay the last axes of operands side by side on a vector (the biases of all in one)."""
    start = 0
    for i in operands:
        last = len(n.shape(i)) - 1
        size = n.shape(i)[last]
        places = [Place(i, last), Place(port, 0, IndexMap(offset=start))]
        description.add(f"b{i}", size, places)
        start += size


@op("Attention", domain=_DOMAIN)
class PackedAttention(_Heads):
    """Makes queries, keys and values by one kernel, whose axis is (3, heads, head size)."""

    extends = MappingProxyType({4: 1})

    @staticmethod
    def shape(
        x: Shape,
        kernel: Shape,
        _bias: Shape | None = None,
        _mask: Shape | None = None,
        past: Shape | None = None,
        *_others: Shape | None,
        num_heads: int,
        qkv_hidden_sizes: Sequence[int] = (),
    ) -> list[Shape | None]:
        wide = (list(qkv_hidden_sizes) or [kernel[1] // 3])[-1]
        keys = x[1] + (past[3] if past else 0)
        return [(*x[:2], wide), (2, x[0], num_heads, keys, wide // num_heads)]

    @staticmethod
    def describe(
        n: OpNode,
        *,
        do_rotary: int = 0,
        num_heads: int,
        past_present_share_buffer: int = 0,
        qkv_hidden_sizes: Sequence[int] = (),
    ) -> Description:
        if do_rotary or past_present_share_buffer or len(set(qkv_hidden_sizes)) > 1:
            raise UnsupportedFormError(
                "Attention with a past in a buffer, rotations, or values of another size"
            )
        past, length = ("B N h P d", "L") if n.has(4) else ("_", "T")
        mask = mask_axes(n.shape(5), n.shape(0)[0], num_heads, length) if n.has(5) else "_"
        sizes = {"Q": 3, "h": num_heads}
        if n.has(4):
            sizes["L"] = n.shape(0)[1] + n.shape(4)[3]
        return from_line(
            n,
            f"N T i, i (Q h d), (Q h d), _, {past}, {mask} -> N T (h d), B N h {length} d",
            sizes,
            macs=f"N T i Q h d + N h T {length} d + N h T {length} d",
            contracted="i d",
            prefer="h d",
            eager="h",
            reluctant="d",
        )

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {1: xavier(n.shape(1)), 2: ZERO}

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

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        do_rotary: int = 0,
        num_heads: int,
        qkv_hidden_sizes: Sequence[int] = (),
        scale: float | None = None,
        unidirectional: int = 0,
    ) -> "fx.Node":
        import torch

        if do_rotary or n.has(3) or n.has(4):
            b.fail(n, "rotations, lengths or a past")
        x = b.call(torch.matmul, b.tensor(n, 0), b.tensor(n, 1))
        if n.has(2):
            x = b.call(torch.add, x, b.tensor(n, 2))
        sizes = list(qkv_hidden_sizes) or [n.shape(1)[1] // 3] * 3
        parts = b.method("split", x, sizes, 2)
        qkv = [heads_first(b, b.item(parts, k), num_heads) for k in range(3)]
        return _attention(b, n, qkv, b.optional(n, 5), (scale, unidirectional))


@op("QAttention", domain=_DOMAIN)
class QuantizedAttention(Op):
    """The same of stored numbers, whose result is a real one."""

    quantized = MappingProxyType({0: (3, 6), 1: (4, 7)})
    typed_by = 2
    extends = MappingProxyType({8: 1})

    @staticmethod
    def shape(x: Shape, kernel: Shape, *others: Shape | None, num_heads: int) -> list[Shape | None]:
        wide, past = kernel[1] // 3, others[6] if len(others) > 6 else None
        keys = x[1] + (past[3] if past else 0)
        return [(*x[:2], wide), (2, x[0], num_heads, keys, wide // num_heads)]

    @staticmethod
    def describe(
        n: OpNode, *, do_rotary: int = 0, num_heads: int, past_present_share_buffer: int = 0
    ) -> Description:
        if do_rotary or past_present_share_buffer:
            raise UnsupportedFormError("QAttention with a past in a buffer, or rotations")
        columns = ["(Q h D)" if n.has(i) and n.shape(i) == n.shape(2) else "_" for i in (4, 7)]
        past, length = ("B N h P D", "L") if n.has(8) else ("_", "T")
        sizes = {"Q": 3, "h": num_heads}
        if n.has(8):
            sizes["L"] = n.shape(0)[1] + n.shape(8)[3]
        description = from_line(
            n,
            f"N T i, i (Q h D), (Q h D), _, {columns[0]}, _, _, {columns[1]}, {past}"
            f" -> N T (h D), B N h {length} D",
            sizes,
            macs=f"N T i Q h D + N h T {length} D + N h T {length} D",
            contracted="i",
            prefer="h",
            eager="h",
        )
        description.silent = {0: 6, 1: 7}
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        new.set_attribute("num_heads", new.size("h"))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        do_rotary: int = 0,
        num_heads: int,
        scale: float | None = None,
        unidirectional: int = 0,
    ) -> "fx.Node":
        import torch

        if do_rotary or n.has(5) or n.has(8):
            b.fail(n, "rotations, lengths or a past")
        total = b.call(torch.matmul, centred(b, n, 0, 6), centred(b, n, 1, 7))
        real = b.call(torch.mul, b.call(torch.mul, total, single(b, n, 3)), b.tensor(n, 4))
        x = b.call(torch.add, b.method("float", real), b.tensor(n, 2))
        parts = b.method("split", x, n.shape(1)[1] // 3, 2)
        qkv = [heads_first(b, b.item(parts, k), num_heads) for k in range(3)]
        return _attention(b, n, qkv, None, (scale, unidirectional))


@op("EmbedLayerNormalization", domain=_DOMAIN)
class EmbedLayerNormalization(Op):
    """The sum of the embeddings of words, positions and segments, normalized."""

    typed_by = (2, 0, 2)

    tables = (2, 3, 4)

    @staticmethod
    def shape(
        ids: Shape, _segments: Shape | None, words: Shape, *_others: Shape | None
    ) -> list[Shape]:
        return [(*ids, words[1]), ids[:1], (*ids, words[1])]

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(
            n,
            "N T, N T, V c, P c, G c, c, c, _, _ -> N T c, _, N T c",
            statistical="c",
            reason="rows of an embedding",
        )

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {5: ONE, 6: ZERO}

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, epsilon: float = 1e-12
    ) -> "tuple[fx.Node | None, ...]":
        import torch
        from torch.nn import functional as F

        total = b.item(b.tensor(n, 2), b.tensor(n, 0))
        table = b.tensor(n, 3)
        positions = (
            b.item(table, b.tensor(n, 8)) if n.has(8) else b.item(table, slice(n.shape(0)[1]))
        )
        total = b.call(torch.add, total, positions)
        if n.has(4):
            total = b.call(torch.add, total, b.item(b.tensor(n, 4), b.tensor(n, 1)))
        width = n.out()[-1:]
        weights = b.tensor(n, 5), b.tensor(n, 6)
        y = b.call(F.layer_norm, total, width, *weights, eps=b.decimal(epsilon))
        return y, None, total
