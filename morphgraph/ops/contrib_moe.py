"""Mixtures of experts of ONNX Runtime's own (``com.microsoft``): one node for all experts.

A token takes the ``k`` experts that a router prefers. An expert is a row of the router and its part
of every stack of weights; which of them are taken, all compete for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from morphgraph.arrays import Shape
from morphgraph.ops.contrib_blocks import unpacked
from morphgraph.ops.expert_packing import (
    TWICE_GATED,
    bits_of,
    fusion_of,
    kernel_port,
    packing_of,
    zeros_port,
)
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Coded,
    Description,
    Experts,
    Op,
    OpNode,
    Place,
    Stacked,
    UnsupportedFormError,
    from_line,
    op,
)

_DOMAIN = "com.microsoft"

# By `swiglu_fusion` how the rows of the first kernel lie: gates and units side by side, or one
# after the other.
_FUSED = {0: "i", 1: "(i G)", 2: "(G i)"}
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "silu": ("silu", {}),
    "gelu": ("gelu", {"approximate": "tanh"}),
}


class _Mixture(Op):
    """What both have in common."""

    foldable = False  # meant as it stands

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x

    @staticmethod
    def computed(
        b: "TorchBuilder",
        n: OpNode,
        kernels: "Sequence[fx.Node | None]",
        biases: Sequence[int],
        attributes: dict[str, Any],
        weights: "fx.Node | None" = None,
    ) -> "fx.Node":
        """What all experts compute of every token, weighted by the router's shares.

        Every expert computes every token, so that the graph has no step that depends on numbers;
        the shares of those that a token does not take are 0.

        Args:
            b: where the network grows.
            n: the node.
            kernels: ``[experts, out, in]``, in ONNX Runtime's order; the third may be missing.
            biases: the operands that are added behind them, ``[experts, out]``.
            attributes: of the node.
            weights: what the shares are of, if not the numbers that are ranked.
        """
        import torch
        from torch.nn import functional as F

        x = b.tensor(n, 0)
        tokens = b.method("flatten", x, 0, -2)

        def linear(values: "fx.Node", letters: str, i: int) -> "fx.Node":
            kernel = kernels[i]
            assert kernel is not None
            y = b.call(torch.einsum, letters, values, kernel)
            return b.call(torch.add, y, b.tensor(n, biases[i])) if n.has(biases[i]) else y

        units = linear(tokens, "th,eih->tei", 0)
        kind = attributes.get("activation_type", "relu")
        if kind == "swiglu":
            other = None if kernels[2] is None else linear(tokens, "th,eih->tei", 2)
            units = _gated(b, n, units, other, attributes)
        else:
            if kind in _ACTIVATIONS:
                name, options = _ACTIVATIONS[kind]
                units = b.call(getattr(F, name), units, **options)
            elif kind != "identity":
                b.fail(n, f"the activation {kind}")
            if kernels[2] is not None:
                units = b.call(torch.mul, units, linear(tokens, "th,eih->tei", 2))
        experts = linear(units, "tei,ehi->teh", 1)
        y = b.call(torch.einsum, "te,teh->th", _shares(b, n, attributes, weights), experts)
        return y if len(n.shape(0)) == 2 else b.method("view_as", y, x)


def _gated(
    b: "TorchBuilder",
    n: OpNode,
    units: "fx.Node",
    other: "fx.Node | None",
    attributes: dict[str, Any],
) -> "fx.Node":
    """SwiGLU: gates and units come side by side, one after the other, or of two kernels."""
    import torch

    fusion = attributes.get("swiglu_fusion", 0)
    if other is not None:
        gate, up = units, other
    elif fusion == 1:
        gate, up = (b.item(units, (..., slice(first, None, 2))) for first in (0, 1))
    elif fusion == 2:
        halves = b.method("chunk", units, 2, -1)
        gate, up = b.item(halves, 0), b.item(halves, 1)
    else:
        b.fail(n, "SwiGLU of one kernel that is not fused")
    limit = attributes.get("swiglu_limit")
    if limit is not None:
        gate = b.method("clamp", gate, max=b.decimal(limit))
        up = b.method("clamp", up, b.decimal(-limit), b.decimal(limit))
    scaled = b.call(torch.mul, gate, b.decimal(attributes.get("activation_alpha", 1.0)))
    gate = b.call(torch.mul, gate, b.call(torch.sigmoid, scaled))
    up = b.call(torch.add, up, b.decimal(attributes.get("activation_beta", 0.0)))
    return b.call(torch.mul, gate, up)


def _shares(
    b: "TorchBuilder", n: OpNode, attributes: dict[str, Any], weights: "fx.Node | None"
) -> "fx.Node":
    """By token and expert its share, ``[tokens, experts]``; 0 of those that are not taken."""
    import torch

    if attributes.get("use_sparse_mixer", 0):
        b.fail(n, "the sparse mixer")
    logits, whole = b.tensor(n, 1), attributes.get("normalize_routing_weights", 0)
    best = b.call(torch.topk, logits, attributes.get("k", 1), -1)
    taken = b.item(best, 1)
    if weights is not None:
        shares = b.call(torch.gather, weights, -1, taken)
        if whole:
            total = b.method("sum", shares, -1, keepdim=True)
            shares = b.call(torch.div, shares, total)
    elif whole:
        shares = b.call(torch.softmax, b.item(best, 0), -1)
    else:
        shares = b.call(torch.gather, b.call(torch.softmax, logits, -1), -1, taken)
    return b.method("scatter", b.call(torch.zeros_like, logits), -1, taken, shares)


@op("MoE", domain=_DOMAIN)
class MoE(_Mixture):
    """Experts of two or three kernels; whole experts go, and units inside all of them."""

    added_behind = (5,)

    @staticmethod
    def describe(n: OpNode, *, k: int = 1, **attributes: Any) -> Description:
        fusion = fusion_of(attributes)
        if fusion not in _FUSED:
            raise UnsupportedFormError(f"MoE with swiglu_fusion={fusion}")
        if fusion and n.has(6):
            raise UnsupportedFormError(f"MoE with {TWICE_GATED}")
        rows = _FUSED[fusion]
        description = from_line(
            n,
            f"*t h, R e, e {rows} h, e {rows}, e h i, e h, e i h, e i -> *t h",
            {"G": 2} if fusion else None,
            macs=f"*t h i{' G' if fusion else ''} + *t i h" + " + *t h i" * n.has(6),
            contracted="h i",
            statistical="e",
            prefer="i",
            reason="experts compute gates and units alike" if fusion else "",
        )
        _choose(description, k)
        return description

    @staticmethod
    def experts(_n: OpNode) -> Experts:
        return Experts((0, 1), Stacked(2, 3), Stacked(4, 5))

    @classmethod
    def lower(cls, b: "TorchBuilder", n: OpNode, **attributes: Any) -> "fx.Node":
        kernels = [b.optional(n, i) for i in (2, 4, 6)]
        return cls.computed(b, n, kernels, (3, 5, 7), attributes)


@op("QMoE", domain=_DOMAIN)
class QMoE(_Mixture):
    """The same in few bits; of the hidden width and the units inside whole blocks go."""

    added_behind = (7,)

    @staticmethod
    def describe(n: OpNode, *, k: int = 1, **attributes: Any) -> Description:
        packing = packing_of(n, attributes)
        if isinstance(packing, str):
            description = _by_expert(n, packing)
        else:
            form = packing.form(n)
            description = from_line(
                n,
                form.line,
                form.sizes,
                contracted=form.contracted,
                statistical="e",
                prefer=form.prefer,
                reason=form.reason,
            )
            packing.count(n, description)
        _choose(description, k)
        return description

    @staticmethod
    def coded(n: OpNode, **attributes: Any) -> Mapping[int, Coded]:
        present = [kernel for kernel in range(3) if n.has(kernel_port(kernel))]
        return {
            (port := kernel_port(kernel)): Coded(
                8 / bits_of(kernel, attributes), (port + 1, zeros_port(kernel), 15 + kernel)
            )
            for kernel in present
        }

    @staticmethod
    def experts(n: OpNode, **attributes: Any) -> Experts | None:
        if isinstance(packing_of(n, attributes), str):
            return None
        first, last = (
            Stacked(port, port + 2, bits_of(kernel, attributes), port + 1, zeros_port(kernel))
            for kernel, port in ((0, kernel_port(0)), (1, kernel_port(1)))
        )
        return Experts((0, 1, 14) if n.has(14) else (0, 1), first, last)

    @classmethod
    def lower(cls, b: "TorchBuilder", n: OpNode, **attributes: Any) -> "fx.Node":
        if attributes.get("quant_type", "int") != "int" or attributes.get("weights_prepacked", 0):
            b.fail(n, "kernels that are no whole numbers in rows")
        kernels = [
            _dequantized(b, n, k, bits_of(k, attributes)) if n.has(kernel_port(k)) else None
            for k in range(3)
        ]
        return cls.computed(b, n, kernels, (4, 7, 10), attributes, b.optional(n, 14))


def _dequantized(b: "TorchBuilder", n: OpNode, kernel: int, bits: int) -> "fx.Node":
    """A stack of kernels in few bits as real numbers, ``[experts, out, in]``."""
    import torch

    if bits not in (2, 4, 8):
        b.fail(n, f"kernels in {bits} bits")
    port, zeros = kernel_port(kernel), zeros_port(kernel)
    experts, rows, packed = n.shape(port)
    columns = packed * 8 // bits
    steps = unpacked(b, b.tensor(n, port), bits, columns)
    blocks = n.shape(port + 1)[2] if len(n.shape(port + 1)) == 3 else 1
    scale = b.method("reshape", b.tensor(n, port + 1), (experts, rows, blocks, 1))
    zero: fx.Node | float = float(2 ** (bits - 1))
    if n.has(zeros):
        count = blocks if len(n.shape(zeros)) == 3 else rows
        points = unpacked(b, b.tensor(n, zeros), bits, count)
        zero = b.method("reshape", points, (experts, rows, blocks, 1))
    parts = b.method("reshape", steps, (experts, rows, blocks, columns // blocks))
    real = b.call(torch.mul, b.call(torch.sub, parts, zero), scale)
    return b.method("flatten", real, 2)


def _by_expert(n: OpNode, reason: str) -> Description:
    """Experts go as a whole, and what is packed inside of them stays."""
    description = Description(statistical=frozenset("e"))
    places = [Place(1, len(n.shape(1)) - 1)]
    for port in range(2, len(n.in_shapes)):
        if n.has(port):
            axis = len(n.shape(port)) - 1 if port == 14 else 0  # the router's weights, by token
            places.append(Place(port, axis))
            for other, size in enumerate(n.shape(port)):
                if other != axis:
                    description.pin(port, other, size, reason)
    description.add("e", n.shape(1)[-1], places)
    description.pin(1, 0, n.shape(1)[0], "batch")
    for axis, size in enumerate(n.shape(0)):
        why = reason if axis == len(n.shape(0)) - 1 else None
        description.add(f"t{axis}", size, [Place(0, axis), Place(~0, axis)], why)
    return description


def _choose(description: Description, k: int) -> None:
    """Say that every token takes k experts."""
    description.least = {"e": k}
    description.macs = tuple((*term, "K") for term in description.macs)
    description.add("K", k, [], "experts that a token takes")
