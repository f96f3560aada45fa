"""Attention with a state of fixed size in the domain ``com.microsoft``, and what stands around it.

Beside the forms that ONNX has, heads of queries may be fewer than those of keys and values, and
sequences may come with their channels last. Axes as in :mod:`morphgraph.ops.linear_attention`.
"""

from morphgraph.arrays import Shape
from morphgraph.ops.linear_attention import (
    CausalConvWithState,
    LinearAttention,
    convolved,
    gated,
)
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, UnsupportedFormError, from_line, op

_DOMAIN = "com.microsoft"


@op("LinearAttention", domain=_DOMAIN)
class ContribLinearAttention(LinearAttention):
    """Every position decays the state, may take from it what its key finds, adds, and reads."""

    @staticmethod
    def shape(
        q: Shape, k: Shape, v: Shape, *_others: Shape | None, q_num_heads: int, kv_num_heads: int
    ) -> list[Shape]:
        sizes = q[-1] // q_num_heads, v[-1] // kv_num_heads
        out = (*q[:2], max(q_num_heads, kv_num_heads) * sizes[1])
        return [out, (q[0], kv_num_heads, *sizes)]

    @staticmethod
    def describe(
        n: OpNode,
        *,
        q_num_heads: int,
        kv_num_heads: int,
        state_window: int = 0,
        update_rule: str = "gated_delta",
    ) -> Description:
        if state_window:
            raise UnsupportedFormError("LinearAttention with states of several positions")
        return LinearAttention.describe(
            n, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, update_rule=update_rule
        )

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        q_num_heads: int,
        kv_num_heads: int,
        scale: float = 0.0,
        state_window: int = 0,
    ) -> "tuple[fx.Node, ...]":
        if state_window:
            b.fail(n, "states of several positions")
        return LinearAttention.lower(
            b, n, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale
        )


@op("CausalConvWithState", domain=_DOMAIN)
class ContribCausalConvWithState(CausalConvWithState):
    """A depthwise convolution over the past; of the past it keeps what the next steps need."""

    @staticmethod
    def shape(
        x: Shape, kernel: Shape, *_others: Shape | None, channels_last: int = 0, dilation: int = 1
    ) -> list[Shape]:
        past = (kernel[-1] - 1) * dilation
        return [x, (x[0], past, *x[2:]) if channels_last else (*x[:-1], past)]

    @staticmethod
    def describe(
        n: OpNode,
        *,
        channels_last: int = 0,
        input_channels: int = 0,
        ndim: int = 1,
        state_channels_last: int = -1,
        state_length: int = 0,
        state_update_capacity: int = 0,
        state_window: int = 0,
    ) -> Description:
        own_states = state_channels_last >= 0 or state_length or state_update_capacity
        if own_states or state_window or input_channels or ndim != 1 or len(n.shape(0)) != 3:
            raise UnsupportedFormError(
                "CausalConvWithState over several axes, of a part of the channels, or with states "
                "of several positions or of a layout of their own"
            )
        x, state = ("N T c", "N P c") if channels_last else ("N c T", "N c P")
        return from_line(n, f"{x}, c 1 K, c, {state} -> {x}, {state}", macs="N c T K")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        activation: str = "none",
        channels_last: int = 0,
        dilation: int = 1,
        ndim: int = 1,
        state_window: int = 0,
    ) -> "tuple[fx.Node, ...]":
        if ndim != 1 or len(n.shape(0)) != 3 or state_window:
            b.fail(n, "a convolution over several axes, or states of several positions")
        return convolved(b, n, activation, bool(channels_last), dilation)


@op("LinearAttentionGate", domain=_DOMAIN)
class LinearAttentionGate(Op):
    """How fast the state of a head decays, and how much of a value it takes."""

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> list[Shape]:
        return [x, x]

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N T h, h, h, N T h -> N T h, N T h")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "tuple[fx.Node, ...]":
        import torch
        from torch.nn import functional as F

        opened = b.call(F.softplus, b.call(torch.add, b.tensor(n, 0), b.tensor(n, 1)))
        decay = b.call(torch.mul, opened, b.tensor(n, 2))
        beta = b.optional(n, 3)
        return (decay,) if beta is None else (decay, b.call(torch.sigmoid, beta))


@op("SwiGLU", domain=_DOMAIN)
class ClampedSwiGLU(Op):
    """The same of numbers within bounds; gates and units may lie side by side."""

    @staticmethod
    def shape(gate: Shape, up: Shape | None = None) -> Shape:
        return gate if up is not None else (*gate[:-1], gate[-1] // 2)

    @staticmethod
    def describe(n: OpNode, *, activation_beta: float = 0.0) -> Description:
        if n.has(1):
            return from_line(n, "*a, *a -> *a", gate=not activation_beta)
        return from_line(n, "*b (H c) -> *b c", {"H": 2}, reason="gates and units")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        activation_alpha: float = 1.0,
        activation_beta: float = 0.0,
        limit: float = 0.0,
    ) -> "fx.Node":
        import torch

        if n.has(1):
            gate, up = b.tensor(n, 0), b.tensor(n, 1)
        else:
            halves = b.method("chunk", b.tensor(n, 0), 2, -1)
            gate, up = b.item(halves, 0), b.item(halves, 1)
        if limit > 0:
            bound = b.decimal(limit)
            gate = b.call(torch.clamp, gate, max=bound)
            up = b.call(torch.clamp, up, -bound, bound)
        if activation_beta:
            up = b.call(torch.add, up, b.decimal(activation_beta))
        return gated(b, gate, up, activation_alpha)
