"""Mixtures of experts of ONNX Runtime's own (``com.microsoft``): one node for all experts.

A token takes the ``k`` experts that a router prefers. An expert is a row of the router and its part
of every stack of weights; which of them are taken, all compete for.
"""

from morphgraph.arrays import Shape
from morphgraph.ops.op import Description, Op, OpNode, Place, UnsupportedFormError, from_line, op

_DOMAIN = "com.microsoft"

# By `swiglu_fusion` how the rows of the first kernel lie: gates and units side by side, or one
# after the other.
_FUSED = {0: "i", 1: "(i G)", 2: "(G i)"}


class _Mixture(Op):
    """What both have in common."""

    foldable = False  # meant as it stands

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x


@op("MoE", domain=_DOMAIN)
class MoE(_Mixture):
    """Experts of two or three kernels; whole experts go, and units inside all of them."""

    @staticmethod
    def describe(n: OpNode, *, k: int = 1, swiglu_fusion: int = 0) -> Description:
        if swiglu_fusion not in _FUSED:
            raise UnsupportedFormError(f"MoE with swiglu_fusion={swiglu_fusion}")
        rows = _FUSED[swiglu_fusion]
        description = from_line(
            n,
            f"*t h, R e, e {rows} h, e {rows}, e h i, e h, e i h, e i -> *t h",
            {"G": 2} if swiglu_fusion else None,
            macs="*t h i",
            contracted="h i",
            statistical="e",
            prefer="i",
            reason="experts compute gates and units alike" if swiglu_fusion else "",
        )
        kernels = 2 + (swiglu_fusion > 0) + n.has(6)
        _choose(description, k)
        description.macs = tuple((*term, "K") for term in description.macs) * kernels
        return description


@op("QMoE", domain=_DOMAIN)
class QMoE(_Mixture):
    """The same in few bits; experts go as a whole, and what is packed inside of them stays."""

    @staticmethod
    def describe(n: OpNode, *, k: int = 1) -> Description:
        description = Description(statistical=frozenset("e"))
        experts = n.shape(1)[-1]
        reason = "packed in few bits by QMoE"
        places = [Place(1, len(n.shape(1)) - 1)]
        for port in range(2, len(n.in_shapes)):
            if n.has(port):
                whole = port == 14  # the router's weights, by token
                axis = len(n.shape(port)) - 1 if whole else 0
                places.append(Place(port, axis))
                for other, size in enumerate(n.shape(port)):
                    if other != axis:
                        description.pin(port, other, size, reason)
        description.add("e", experts, places)
        description.pin(1, 0, n.shape(1)[0], "batch")
        for axis, size in enumerate(n.shape(0)):
            why = reason if axis == len(n.shape(0)) - 1 else None
            description.add(f"t{axis}", size, [Place(0, axis), Place(~0, axis)], why)
        _choose(description, k)
        return description


def _choose(description: Description, k: int) -> None:
    """Say that every token takes k experts."""
    description.least = {"e": k}
    description.add("K", k, [], "experts that a token takes")
