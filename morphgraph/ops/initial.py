"""How PyTorch draws the weights of its layers, as an operator's entry states it per operand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from morphgraph.arrays import FloatArray, Shape
from morphgraph.ops.op import OpNode, facts_of


@dataclass(frozen=True, slots=True)
class Initial:
    """A distribution: uniform in ``+-value``, normal with that deviation, or that constant."""

    distribution: Literal["uniform", "normal", "constant"]
    value: float

    def draw(self, shape: Shape, generator: np.random.Generator) -> FloatArray:
        """A tensor of this shape.

        >>> Initial("constant", 0.25).draw((2,), np.random.default_rng(0))
        array([0.25, 0.25])
        """
        match self.distribution:
            case "uniform":
                return generator.uniform(-self.value, self.value, shape)
            case "normal":
                return generator.normal(0.0, self.value, shape)
            case _:
                return np.full(shape, self.value)


ONE, ZERO = Initial("constant", 1.0), Initial("constant", 0.0)


def by_fan_in(fan_in: int) -> Initial:
    """Kernels and biases of ``nn.Linear`` and convolutions: ``kaiming_uniform`` with a = sqrt(5).

    Its gain is sqrt(2 / (1 + 5)) and its bound gain * sqrt(3 / fan_in), which is 1 / sqrt(fan_in).
    Recurrent layers have the same bound, with the hidden size for the fan-in.
    """
    return Initial("uniform", max(fan_in, 1) ** -0.5)


def by_kernel(kernel: Shape) -> Initial:
    """Of a convolution with this kernel; torch takes axis 1 for the input, transposed or not."""
    return by_fan_in(prod(kernel[1:]))


def xavier(shape: Shape) -> Initial:
    """``xavier_uniform`` of a matrix."""
    return Initial("uniform", (6 / max(sum(shape), 1)) ** 0.5)


def initials_of(n: OpNode) -> Mapping[int, Initial]:
    """Per operand that is a layer's weight how PyTorch draws it."""
    entry = facts_of(n)
    if entry.initial is None:
        return {}
    found: Mapping[int, Initial] = entry.call(entry.initial, n.ir, n)
    return {i: initial for i, initial in found.items() if n.has(i) and n.is_weight(i)}


def of_affine_addend(n: OpNode) -> dict[int, Initial]:
    """Of an addition's operands: the bias of a product, or the shift that follows a norm's scale.

    That is a weight along the last axis which is added to the result of a matrix product that has
    no bias of its own, or a weight shaped like the scale before it.
    """
    found = {}
    for i, maker in _others(n):
        if facts_of(maker).shift is not None:
            continue
        for port, initial in initials_of(maker).items():
            if initial.distribution == "uniform" and n.shape(i) == maker.out()[-1:]:
                found[i] = initial
            if initial == ONE and n.shape(i) == maker.shape(port):
                found[i] = ZERO
    return found


def of_affine_factor(n: OpNode) -> dict[int, Initial]:
    """Of a product's operands: the scale of a norm that is written out, as exporters write some."""
    return {
        i: ONE
        for i, maker in _others(n, moved=True)
        if _divides_by_root(maker) or facts_of(maker).scale is not None
    }


def _divides_by_root(n: OpNode) -> bool:
    """Whether a value is divided by a root of a statistic, as an RMSNorm written out does it."""
    if n.op_type not in ("Div", "Mul"):
        return False
    for i in (1,) if n.op_type == "Div" else (0, 1):
        value = n.ir.inputs[i]
        maker = None if value is None or n.is_weight(i) else value.producer()
        if n.op_type == "Mul" and maker is not None and maker.op_type == "Reciprocal":
            root = maker.inputs[0]
            maker = None if root is None else root.producer()
        elif n.op_type == "Mul":
            continue
        if maker is not None and maker.op_type == "Sqrt":
            return True
    return False


def _others(n: OpNode, moved: bool = False) -> Sequence[tuple[int, OpNode]]:
    """Of two operands each weight, with the maker of the other; behind movements, if ``moved``."""
    found = []
    for i in filter(n.is_weight, (0, 1)):
        value = n.ir.inputs[1 - i]
        maker = None if value is None else value.producer()
        while moved and maker is not None and facts_of(maker).moves and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is not None:
            found.append((i, OpNode(maker, n.weights)))
    return found
