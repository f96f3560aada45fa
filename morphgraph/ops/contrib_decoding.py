"""Attentions of decoders in the domain ``com.microsoft``: queries in groups, rotated positions.

The builders of models for generation write them. Axes as in
:mod:`morphgraph.ops.contrib_attention`.
"""

from collections.abc import Mapping
from math import sqrt
from types import MappingProxyType

import numpy as np

from morphgraph.arrays import Array, Shape
from morphgraph.ops.attention import heads_first, mask_axes, rotated
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Angles,
    Description,
    Op,
    OpNode,
    Resizing,
    UnsupportedFormError,
    from_line,
    op,
)

_DOMAIN = "com.microsoft"


@op("GroupQueryAttention", domain=_DOMAIN)
class GroupQueryAttention(Op):
    """Heads of keys and values, each with its group of query heads.

    ONNX Runtime's kernels take head sizes that are multiples of 8, and of 16 where they rotate
    positions, in pairs.
    """

    extends = MappingProxyType({3: 1, 4: 2})
    mixes = 2

    @staticmethod
    def shape(
        q: Shape,
        k: Shape | None = None,
        _v: Shape | None = None,
        past: Shape | None = None,
        *_others: Shape | None,
        kv_num_heads: int,
        num_heads: int,
        sliding_window_cache: int = 0,
    ) -> list[Shape | None]:
        batch, length, wide = q
        size = wide // (num_heads if k else num_heads + 2 * kv_num_heads)
        keys = (k[1] if k else length) + (past[2] if past else 0)
        if sliding_window_cache and past:
            keys = past[2]  # the oldest go
        present = (batch, kv_num_heads, keys, size)
        whole = (batch, num_heads, length, keys)
        return [(batch, length, num_heads * size), present, present, whole]

    @staticmethod
    def angles(n: OpNode, *, do_rotary: int = 0) -> Angles | None:
        return _angles if do_rotary and n.has(7) else None

    @staticmethod
    def capacity(
        *, local_window_size: int = -1, sliding_window_cache: int = 0
    ) -> Mapping[int, int]:
        return {3: local_window_size, 4: local_window_size} if sliding_window_cache else {}

    @staticmethod
    def lengths(n: OpNode) -> Mapping[int, int]:
        keys = n.shape(0)[1] + (n.shape(3)[2] if n.has(3) else 0)
        return {5: keys - 1, 6: keys}

    @staticmethod
    def describe(
        n: OpNode,
        *,
        do_rotary: int = 0,
        kv_num_heads: int,
        num_heads: int,
        rotary_interleaved: int = 0,
    ) -> Description:
        if not n.has(1) or not n.has(2) or n.has(12) or n.has(13):
            raise UnsupportedFormError("GroupQueryAttention with packed operands or stored numbers")
        size = n.shape(0)[2] // num_heads
        turned = 2 * n.shape(7)[1] if do_rotary and n.has(7) else 0
        # A norm of every head divides by its size; where a part turns, which pairs do is not said.
        stays = any(n.has(i) for i in (14, 15)) or turned not in (0, size)
        pair = ("c R" if rotary_interleaved else "R c") if turned else "d"
        d, tables = ("D", "_, _") if stays else (pair, "W c, W c" if turned else "_, _")
        cached = f"({d})" if " " in d else d
        past = f"N h P {cached}, N h P {cached}" if n.has(3) else "_, _"
        keys = n.shape(1)[1] + (n.shape(3)[2] if n.has(3) else 0)
        if len(n.out_shapes) > 1 and n.out_shapes[1] is not None:
            keys = n.out(1)[2]
        bias = mask_axes(n.shape(10), n.shape(0)[0], num_heads, "L") if n.has(10) else "_"
        sink = "(h r)" if n.has(11) else "_"
        free = {"R c": "c", "c R": "c", "d": "d"}.get(d, "")
        sizes = {"h": kv_num_heads, "r": num_heads // kv_num_heads, "L": keys}
        description = from_line(
            n,
            f"N T (h r {d}), N S (h {d}), N S (h {d}), {past}, _, _, {tables}, _, {bias}, {sink},"
            f" _, _, _, _, _ -> N T (h r {d}), N h L {cached}, N h L {cached}, N (h r) T L",
            sizes | ({"R": 2, "c": size // 2} if free == "c" else {free or "D": size}),
            macs=f"N h r T L {d} + N h r T L {d}",
            contracted=free,
            prefer=f"h r {free}",
            eager="h r",
            sharing="r",
            reluctant=free,
            reason="norms over heads, or parts of them turn" if stays else "turns in pairs",
        )
        if free:
            description.multiples = {free: 8}
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, num_heads: int, scale: float | None = None) -> None:
        head_size = n.shape(0)[2] // num_heads
        new.set_attribute("num_heads", new.size("h") * new.size("r"))
        new.set_attribute("kv_num_heads", new.size("h"))
        if not scale and new.shape(0)[2] != new.size("h") * new.size("r") * head_size:
            new.set_attribute("scale", 1 / sqrt(head_size))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        causal: int = 1,
        do_rotary: int = 0,
        k_norm_epsilon: float | None = None,
        kv_num_heads: int,
        local_window_size: int = -1,
        num_heads: int,
        q_norm_epsilon: float | None = None,
        qk_norm_epsilon: float = 1e-6,
        rotary_interleaved: int = 0,
        scale: float | None = None,
        sliding_window_cache: int = 0,
        smooth_softmax: int = 0,
        softcap: float = 0.0,
    ) -> "tuple[fx.Node, ...]":
        if sliding_window_cache and n.has(3):
            b.fail(n, "a cache of the latest positions alone")
        if not n.has(1) or n.has(12) or n.has(16) or len(n.out_shapes) > 3:
            b.fail(n, "packed operands, stored numbers, or scores as a result")
        epsilons = (
            b.decimal(qk_norm_epsilon if each is None else each)
            for each in (q_norm_epsilon, k_norm_epsilon)
        )
        found = b.call(
            b.functions.grouped_attention,
            tuple(b.tensor(n, i) for i in range(3)),
            tuple(b.optional(n, i) for i in (3, 4)),
            b.tensor(n, 5),
            tuple(b.optional(n, i) for i in (7, 8)),
            *(b.optional(n, i) for i in (9, 10, 11)),
            tuple(b.optional(n, i) for i in (14, 15)),
            heads=(num_heads, kv_num_heads),
            scale=b.decimal(scale) if scale else None,
            rotates=(bool(do_rotary), bool(rotary_interleaved)),
            window=local_window_size,
            softcap=b.decimal(softcap),
            causal=bool(causal),
            smooth=bool(smooth_softmax),
            epsilons=tuple(epsilons),
        )
        return tuple(b.item(found, k) for k in range(3))[: len(n.out_shapes)]


def _angles(operands: Mapping[int, Array]) -> tuple[Array, Array]:
    """Cosines and sines of the places of queries, ``[N, T, c]``."""
    length = operands[0].shape[1]
    places = operands.get(9)
    if places is None:  # behind the keys of the past
        first = np.maximum(operands[5].reshape(-1) + 1 - length, 0)
        places = first[:, None] + np.arange(length)
    return operands[7][places], operands[8][places]


def _head_size(n: OpNode, num_heads: int) -> int:
    """The size of a head in a RotaryEmbedding; without a number of heads, its tables tell."""
    x = n.shape(0)
    if len(x) == 4:
        return x[-1]
    return x[-1] // num_heads if num_heads else 2 * n.shape(2)[-1]


@op("RotaryEmbedding", domain=_DOMAIN)
class RotaryEmbedding(Op):
    """Pairs of positions of every head turn together: two halves, or neighbours if interleaved."""

    turns = (2, 3)

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x

    @staticmethod
    def describe(
        n: OpNode, *, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0
    ) -> Description:
        head_size = _head_size(n, num_heads)
        whole = rotary_embedding_dim in (0, head_size)
        flat = len(n.shape(0)) == 3
        if not whole:
            x = "N T (h D)" if flat else "N h T D"
            reason = "a part of every head turns"
            return from_line(n, f"{x}, _, _, _ -> {x}", {"D": head_size}, reason=reason)
        pair = "c R" if interleaved else "R c"
        x = f"N T (h {pair})" if flat else f"N h T ({pair})"
        sizes = {"R": 2, "c": head_size // 2}
        return from_line(n, f"{x}, _, P c, P c -> {x}", sizes, prefer="h c", reluctant="c")

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, num_heads: int = 0, rotary_embedding_dim: int = 0
    ) -> None:
        whole = rotary_embedding_dim in (0, _head_size(n, num_heads))
        if num_heads:
            new.set_attribute("num_heads", new.size("h"))
        if rotary_embedding_dim and whole:
            new.set_attribute("rotary_embedding_dim", 2 * new.size("c"))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        interleaved: int = 0,
        is_packed_batching: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        scale: float = 1.0,
    ) -> "fx.Node":
        import torch

        if is_packed_batching or scale != 1.0:
            b.fail(n, "packed batches, or a scale")
        flat, size = len(n.shape(0)) == 3, _head_size(n, num_heads)
        x = heads_first(b, b.tensor(n, 0), n.shape(0)[-1] // size if flat else 0)
        positions = b.tensor(n, 1)
        if n.shape(1) == (1,):
            length = n.shape(0)[-2]
            steps = b.buffer(n, "steps", torch.arange(length))
            positions = b.method("unsqueeze", b.call(torch.add, steps, positions), 0)
        tables = [b.method("unsqueeze", b.item(b.tensor(n, i), positions), 1) for i in (2, 3)]
        part = 0 if rotary_embedding_dim in (0, size) else rotary_embedding_dim
        y = rotated(b, x, tables, bool(interleaved), part)
        return b.method("flatten", b.method("transpose", y, 1, 2), 2) if flat else y
