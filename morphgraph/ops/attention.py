"""Attention in one node, and the rotation of its queries and keys by position.

Axes: ``N`` batch, ``T`` queries, ``S`` new keys, ``P`` keys of the past, ``L`` all keys. ``h`` are
the heads of keys and values, each shared by ``r`` heads of queries; ``d`` is the size of a head of
queries and keys, ``e`` that of a head of values.
"""

import operator
from collections.abc import Sequence
from math import sqrt
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
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


def _is_flat(n: OpNode) -> bool:
    """Whether heads and head size share the last axis (the 3-D form)."""
    return len(n.shape(0)) == 3


@op("Attention")
class Attention(Op):
    """Queries sum over the head size, probabilities over the keys; keys compete."""

    mixes = 2
    extends = MappingProxyType({4: 1, 5: 2})

    @staticmethod
    def describe(n: OpNode, *, q_num_heads: int = 0, kv_num_heads: int = 0) -> Description:
        if _is_flat(n):
            q, k, v, out = "N T (h r d)", "N S (h d)", "N S (h e)", "N T (h r e)"
        else:
            q, k, v, out = "N (h r) T d", "N h S d", "N h S e", "N (h r) T e"
        heads, key_heads = _head_counts(n, q_num_heads, kv_num_heads)
        if not key_heads or heads % key_heads:
            raise UnsupportedFormError(
                f"Attention of {heads} query heads over {key_heads} key heads"
            )
        past, length = "_, _", "S"
        if n.has(4):
            past, length = "N h P d, N h P e", "L"
        mask = mask_axes(n.shape(3), n.shape(0)[0], heads, length) if n.has(3) else "_"
        return from_line(
            n,
            f"{q}, {k}, {v}, {mask}, {past}, N"
            f" -> {out}, N h {length} d, N h {length} e, N (h r) T {length}",
            {"h": key_heads, "r": heads // key_heads, length: _keys(n)},
            macs=f"N h r T {length} d + N h r T {length} e",
            contracted="d",
            prefer="h r d e",
            eager="h r",
            sharing="r",
            reluctant="d e",
        )

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, q_num_heads: int = 0, scale: float | None = None
    ) -> None:
        if q_num_heads:
            new.set_attribute("q_num_heads", new.size("h") * new.size("r"))
            new.set_attribute("kv_num_heads", new.size("h"))
        head_size = n.shape(0)[-1] // (q_num_heads if _is_flat(n) else 1)
        if scale is None and new.size("d") != head_size:
            new.set_attribute("scale", 1 / sqrt(head_size))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        is_causal: int = 0,
        kv_num_heads: int = 0,
        left_window_size: int = -1,
        q_num_heads: int = 0,
        right_window_size: int = -1,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> "tuple[fx.Node, ...]":
        from torch.nn import functional as F

        if n.has(6) or (left_window_size, right_window_size) != (-1, -1):
            b.fail(n, "keys are chosen by a window or by lengths given at run time")
        counts = (q_num_heads, kv_num_heads, kv_num_heads) if _is_flat(n) else (0, 0, 0)
        q, k, v = (heads_first(b, b.tensor(n, i), count) for i, count in enumerate(counts))
        k, v = _behind_the_past(b, n, k, v)
        heads, key_heads = _head_counts(n, q_num_heads, kv_num_heads)
        torch_draws = not n.has(3) and not softcap and n.shape(0)[-2] == _keys(n)
        mask = _mask(b, n, bool(is_causal) and not torch_draws)
        if softcap:
            head_size = n.shape(0)[-1] // (q_num_heads if _is_flat(n) else 1)
            factor = b.decimal(1 / sqrt(head_size) if scale is None else scale)
            repeats = heads // key_heads
            shared = [_repeated(b, x, repeats) for x in (k, v)]
            y = _capped(b, n, (q, shared[0], shared[1]), mask, factor, b.decimal(softcap))
        else:
            chosen = {
                "attn_mask": mask,
                "is_causal": bool(is_causal) and torch_draws,
                "scale": None if scale is None else b.decimal(scale),
                "enable_gqa": heads != key_heads,
            }
            options = {name: value for name, value in chosen.items() if value not in (None, False)}
            y = b.call(F.scaled_dot_product_attention, q, k, v, **options)
        if _is_flat(n):
            y = b.method("flatten", b.method("transpose", y, 1, 2), 2)
        return (y, k, v)[: len(n.out_shapes)]


def _head_counts(n: OpNode, q_num_heads: int, kv_num_heads: int) -> tuple[int, int]:
    """Heads of the queries, and of the keys and values."""
    return (q_num_heads, kv_num_heads) if _is_flat(n) else (n.shape(0)[1], n.shape(1)[1])


def _keys(n: OpNode) -> int:
    """Keys that every query sees: the new ones, behind those of the past."""
    return n.shape(1)[-2] + (n.shape(4)[-2] if n.has(4) else 0)


def mask_axes(mask: Shape, batch: int, heads: int, length: str) -> str:
    """How a mask broadcasts to batch, heads, queries and keys; it may have fewer of each."""
    names, sizes = ["N", "(h r)", "T", length], [batch, heads, 0, 0]
    rank = len(mask)
    axes = []
    for name, size, full in zip(names[4 - rank :], mask, sizes[4 - rank :], strict=True):
        axes.append("1" if size == 1 != full else name)
    if rank and axes[-1] == length:
        axes[-1] = "M"  # may be shorter than the keys, which are masked from there on
    return " ".join(axes) or "_"


def heads_first(b: "TorchBuilder", x: "fx.Node", heads: int) -> "fx.Node":
    """``[N, T, (heads d)]`` becomes ``[N, heads, T, d]``; 0 heads: it has this form already."""
    if not heads:
        return x
    return b.method("transpose", b.method("unflatten", x, 2, (heads, -1)), 1, 2)


def _behind_the_past(
    b: "TorchBuilder", n: OpNode, k: "fx.Node", v: "fx.Node"
) -> "tuple[fx.Node, fx.Node]":
    import torch

    if not n.has(4):
        return k, v
    past_k, past_v = b.tensor(n, 4), b.tensor(n, 5)
    return b.call(torch.cat, (past_k, k), 2), b.call(torch.cat, (past_v, v), 2)


def _mask(b: "TorchBuilder", n: OpNode, is_causal: bool) -> "fx.Node | None":
    """The given mask, with the causal one in it where that is asked for."""
    import torch
    from torch.nn import functional as F

    given, forbidden = b.optional(n, 3), float("-inf")
    if given is not None:
        missing = _keys(n) - n.shape(3)[-1]
        if missing and n.shape(3)[-1] > 1:
            fill = False if _is_bool_mask(n) else forbidden
            given = b.call(F.pad, given, [0, missing], value=fill)
    if not is_causal:
        return given
    causal = _causal(b, n)
    if given is None:
        return causal
    if _is_bool_mask(n):
        return b.call(torch.logical_and, given, causal)
    return b.call(torch.where, causal, given, forbidden)


def _causal(b: "TorchBuilder", n: OpNode) -> "fx.Node":
    """Which keys queries see, ``[queries, keys]``: all of the past, and no later one of the new."""
    import torch

    ports = (0, 1, 4) if n.has(4) else (0, 1)
    queries, new, *past = (b.size(n, port, -2) for port in ports)
    if all(isinstance(size, int) for size in (queries, new, *past)):
        before = n.shape(4)[-2] if n.has(4) else 0
        allowed = torch.ones(n.shape(0)[-2], _keys(n), dtype=torch.bool)
        return b.buffer(n, "causal", allowed.tril(before))
    keys = b.call(operator.add, new, past[0]) if past else new
    every = b.call(torch.ones, queries, keys, dtype=torch.bool, device=b.device())
    return b.method("tril", every, *past)


def _is_bool_mask(n: OpNode) -> bool:
    """Whether a mask says which keys count; else it is added to the scores."""
    value = n.ir.inputs[3] if n.has(3) else None
    return value is None or value.dtype == ir.DataType.BOOL


def _repeated(b: "TorchBuilder", x: "fx.Node", repeats: int) -> "fx.Node":
    return x if repeats == 1 else b.method("repeat_interleave", x, repeats, 1)


def _capped(
    b: "TorchBuilder",
    n: OpNode,
    qkv: "tuple[fx.Node, fx.Node, fx.Node]",
    mask: "fx.Node | None",
    scale: float,
    cap: float,
) -> "fx.Node":
    """Attention written out, its scores bent towards a bound by ``cap * tanh(score / cap)``."""
    import torch

    q, k, v = qkv
    scores = b.call(torch.matmul, q, b.method("transpose", k, -2, -1))
    bent = b.call(torch.tanh, b.call(torch.mul, scores, scale / cap))
    scores = b.call(torch.mul, bent, cap)
    if mask is not None and _is_bool_mask(n):
        scores = b.call(torch.where, mask, scores, float("-inf"))
    elif mask is not None:
        scores = b.call(torch.add, scores, mask)
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


@op("RotaryEmbedding")
class RotaryEmbedding(Op):
    """Pairs of positions of every head turn together: two halves, or neighbours if interleaved."""

    turns = (1, 2)

    @staticmethod
    def describe(
        n: OpNode, *, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0
    ) -> Description:
        head_size = n.shape(0)[-1] // num_heads if _is_flat(n) else n.shape(0)[-1]
        tables = "P c, P c, N T" if n.has(3) else "N T c, N T c"
        pair = "c R" if interleaved else "R c"
        if rotary_embedding_dim in (0, head_size):
            x = f"N T (h {pair})" if _is_flat(n) else f"N h T ({pair})"
            sizes = {"R": 2, "c": head_size // 2}
            return from_line(n, f"{x}, {tables} -> {x}", sizes, prefer="h c", reluctant="c")
        if _is_flat(n):
            x = "N T (h D)"
            reason = "a part of every head turns"
            return from_line(n, f"{x}, _, _, _ -> {x}", {"D": head_size}, reason=reason)
        description = from_line(n, f"N h T d, {tables} -> N h T d", reluctant="c")
        _turn_a_part(description, rotary_embedding_dim, head_size, bool(interleaved))
        return description

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, num_heads: int = 0, rotary_embedding_dim: int = 0
    ) -> None:
        if num_heads:
            new.set_attribute("num_heads", new.size("h"))
        head_size = n.shape(0)[-1] // num_heads if _is_flat(n) else n.shape(0)[-1]
        if rotary_embedding_dim and (not _is_flat(n) or rotary_embedding_dim == head_size):
            new.set_attribute("rotary_embedding_dim", 2 * new.size("c"))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        interleaved: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
    ) -> "fx.Node":
        x = heads_first(b, b.tensor(n, 0), num_heads if _is_flat(n) else 0)
        head_size = n.shape(0)[-1] // num_heads if _is_flat(n) else n.shape(0)[-1]
        cos, sin = b.tensor(n, 1), b.tensor(n, 2)  # [N, T, c]
        if n.has(3):
            cos, sin = b.item(cos, b.tensor(n, 3)), b.item(sin, b.tensor(n, 3))
        tables = [b.method("unsqueeze", table, 1) for table in (cos, sin)]
        part = 0 if rotary_embedding_dim in (0, head_size) else rotary_embedding_dim
        y = rotated(b, x, tables, bool(interleaved), part)
        return b.method("flatten", b.method("transpose", y, 1, 2), 2) if _is_flat(n) else y


def rotated(
    b: "TorchBuilder",
    x: "fx.Node",
    tables: "Sequence[fx.Node]",
    interleaved: bool,
    part: int = 0,
) -> "fx.Node":
    """Heads ``[N, heads, T, size]``, turned by cosines and sines ``[N, 1, T, c]``.

    Of every head the first ``part`` positions turn; 0: all of them.
    """
    import torch

    turned, rest, (cos, sin) = x, None, tables
    if part:
        turned = b.item(x, (..., slice(part)))
        rest = b.item(x, (..., slice(part, None)))
    if interleaved:
        real = b.item(turned, (..., slice(0, None, 2)))
        imaginary = b.item(turned, (..., slice(1, None, 2)))
    else:
        halves = b.method("chunk", turned, 2, -1)
        real, imaginary = b.item(halves, 0), b.item(halves, 1)
    parts = (
        b.call(torch.sub, b.call(torch.mul, real, cos), b.call(torch.mul, imaginary, sin)),
        b.call(torch.add, b.call(torch.mul, real, sin), b.call(torch.mul, imaginary, cos)),
    )
    if interleaved:
        y = b.method("flatten", b.call(torch.stack, parts, -1), -2)
    else:
        y = b.call(torch.cat, parts, -1)
    return y if rest is None else b.call(torch.cat, (y, rest), -1)


def _turn_a_part(description: Description, turned: int, head_size: int, interleaved: bool) -> None:
    """Let the first positions of every head turn in pairs, and the others pass."""
    del description.factors["d"]
    pairs = np.arange(turned) // 2 if interleaved else np.arange(turned) % (turned // 2)
    both = IndexMap(table=(pairs, np.arange(turned)))
    description.factors["c"].places += [Place(0, 3, both), Place(~0, 3, both)]
    rest = IndexMap(offset=turned)
    description.add("p", head_size - turned, [Place(0, 3, rest), Place(~0, 3, rest)])
