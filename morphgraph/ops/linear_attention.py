"""Attention whose memory has a fixed size, and what layers of it consist of beside matrix products.

A head remembers a matrix, its *state*, to which every position adds the product of its key and its
value, and which its query reads. Axes: ``N`` batch, ``T`` positions; ``h`` heads of keys and
values, each read by ``r`` heads of queries; ``d`` the size of a head of queries and keys, ``e`` of
values. ONNX Runtime's own forms are in :mod:`morphgraph.ops.contrib_linear_attention`.
"""

from collections.abc import Mapping
from math import sqrt
from types import MappingProxyType

from morphgraph.ops.elementwise import Elementwise
from morphgraph.ops.initial import Initial, by_kernel
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    Op,
    OpNode,
    Resizing,
    UnsupportedFormError,
    from_line,
    op,
)


@op("LinearAttention")
class LinearAttention(Op):
    """Every position decays the state, may take from it what its key finds, adds, and reads."""

    zeros = (3,)
    extends = MappingProxyType({3: 1})

    @staticmethod
    def describe(
        n: OpNode,
        *,
        q_num_heads: int,
        kv_num_heads: int,
        update_rule: str = "gated_delta",
    ) -> Description:
        many, few = max(q_num_heads, kv_num_heads), min(q_num_heads, kv_num_heads)
        if not few or many % few:
            raise UnsupportedFormError(
                f"LinearAttention of {q_num_heads} query heads over {kv_num_heads} key heads"
            )
        # ONNX Runtime lets heads of queries, too, be fewer.
        keys, queries = ("h", "h r") if q_num_heads >= kv_num_heads else ("h r", "h")
        head, all_heads = f"({keys})" if " " in keys else keys, "h r"
        size = n.shape(0)[-1] // q_num_heads
        decay, beta = "_", "_"
        if n.has(4):
            by_head = n.shape(4)[-1] == kv_num_heads
            decay = f"N T {head}" if by_head else f"N T ({keys} d)"
        if n.has(5):
            beta = f"N T {head}" if n.shape(5)[-1] == kv_num_heads else "N T 1"
        state = f"N {head} d e"
        terms = [f"N T {keys} d e", f"N T {all_heads} d e"]
        terms += [terms[0]] if "delta" in update_rule else []  # what its key finds
        return from_line(
            n,
            f"N T ({queries} d), N T ({keys} d), N T ({keys} e), {state}, {decay}, {beta}"
            f" -> N T ({all_heads} e), {state}",
            {"h": few, "r": many // few, "d": size},
            macs=" + ".join(terms),
            contracted="d",
            prefer="h r d e",
            eager="h r",
            sharing="r",
            reluctant="d e",
        )

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, q_num_heads: int, kv_num_heads: int, scale: float = 0.0
    ) -> None:
        few, many = new.size("h"), new.size("h") * new.size("r")
        new.set_attribute("q_num_heads", many if q_num_heads >= kv_num_heads else few)
        new.set_attribute("kv_num_heads", few if q_num_heads >= kv_num_heads else many)
        size = n.shape(0)[-1] // q_num_heads
        if not scale and new.size("d") != size:
            new.set_attribute("scale", 1 / sqrt(size))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        q_num_heads: int,
        kv_num_heads: int,
        scale: float = 0.0,
    ) -> "tuple[fx.Node, ...]":
        factor = b.decimal(scale) if scale else 1 / sqrt(n.shape(0)[-1] // q_num_heads)
        operands = [b.tensor(n, i) for i in range(3)]
        more = [b.optional(n, i) for i in range(3, 6)]
        heads = q_num_heads, kv_num_heads
        made = b.call(b.functions.linear_attention, *operands, *more, heads, factor)
        return b.item(made, 0), b.item(made, 1)


@op("CausalConvWithState")
class CausalConvWithState(Op):
    """A depthwise convolution over the past; of the past it keeps what the next steps need."""

    offset = 2
    zeros = (2, 3)
    extends = MappingProxyType({3: 1})

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c T, c 1 K, c, N c P -> N c T, N c P", macs="N c T K")

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return dict.fromkeys((1, 2), by_kernel(n.shape(1)))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, activation: str = "none") -> "tuple[fx.Node, ...]":
        return convolved(b, n, activation, False, 1)


@op("SwiGLU")
class SwiGLU(Elementwise):
    """``swish(a) * b``."""

    line = "*a, *a -> *a"
    gate = True

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 1.0) -> "fx.Node":
        return gated(b, b.tensor(n, 0), b.tensor(n, 1), alpha)


def convolved(
    b: "TorchBuilder", n: OpNode, activation: str, channels_last: bool, dilation: int
) -> "tuple[fx.Node, ...]":
    """A causal convolution and what it keeps of the past."""
    operands = b.tensor(n, 0), b.tensor(n, 1), b.optional(n, 2), b.optional(n, 3)
    form = activation != "none", channels_last, dilation
    made = b.call(b.functions.causal_convolution, *operands, *form)
    return b.item(made, 0), b.item(made, 1)


def gated(b: "TorchBuilder", gate: "fx.Node", up: "fx.Node", alpha: float) -> "fx.Node":
    """``swish(gate) * up``, the swish with a factor."""
    import torch

    inner = gate if alpha == 1.0 else b.call(torch.mul, gate, b.decimal(alpha))
    return b.call(torch.mul, b.call(torch.mul, gate, b.call(torch.sigmoid, inner)), up)
