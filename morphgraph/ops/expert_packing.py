"""How stacks of kernels in few bits lie in bytes: which columns and rows can go together.

Of three kernels the first and the third read the hidden width and make the units inside; the
second reads these. Numbers of 2 or 4 bits share bytes with those beside them, blocks of columns
share a scale, and zero points share bytes as well: along the columns where blocks have them, along
the rows where whole rows do. A *grain* is the least number of positions that shares nothing with
others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

from morphgraph.ops.description import Description
from morphgraph.ops.op import OpNode

HIDDEN, UNITS = "h", "i"
#: By kernel: the axis of its rows and that of its columns.
_AXES = ((UNITS, HIDDEN), (HIDDEN, UNITS), (UNITS, HIDDEN))
#: By `swiglu_fusion` how many rows of the first kernel belong to a unit.
_ROWS_OF_UNIT = {0: 1, 1: 2, 2: 2}
TWICE_GATED = "gates and units in one kernel, and a third one"


def kernel_port(kernel: int) -> int:
    """The operand with a kernel; its scales and its bias are the next two."""
    return 2 + 3 * kernel


def zeros_port(kernel: int) -> int:
    """The operand with a kernel's zero points."""
    return 11 + kernel


def fusion_of(attributes: Mapping[str, Any]) -> int:
    """How gates and units lie in the rows of the first kernel; ONNX Runtime asks for SwiGLU only.

    >>> fusion_of({"activation_type": "relu", "swiglu_fusion": 1})
    0
    """
    gated = attributes.get("activation_type", "relu") == "swiglu"
    fusion: int = attributes.get("swiglu_fusion", 0) if gated else 0
    return fusion


def bits_of(kernel: int, attributes: Mapping[str, Any]) -> int:
    """How many bits a weight of a kernel has."""
    whole: int = attributes.get("expert_weight_bits", 4)
    bits: int = attributes.get(f"fc{kernel + 1}_expert_weight_bits", whole)
    return bits


@dataclass(frozen=True)
class Form:
    """What a node does to its axes, as :func:`from_line` takes it."""

    line: str
    sizes: Mapping[str, int]
    contracted: str
    prefer: str
    reason: str


@dataclass(frozen=True)
class Packing:
    """The kernels of one node, of whole numbers in rows.

    Attributes:
        fusion: how gates and units lie in the rows of the first kernel, as `swiglu_fusion`.
        size: the hidden width, and how many units are inside.
        grain: of each how many positions go together.
        held: of each why it keeps its size; empty if it can change.
    """

    fusion: int
    size: Mapping[str, int]
    grain: Mapping[str, int]
    held: Mapping[str, str]

    def form(self, n: OpNode) -> Form:
        """What the node does to its axes."""
        operands = ["*t h", "R e", *["_"] * 15]
        for kernel, (rows, columns) in enumerate(_AXES):
            port = kernel_port(kernel)
            for each in (port, port + 1, port + 2):
                operands[each] = f"e {self._rows(n, each, kernel, rows)}"
            for each in (port, port + 1):
                operands[each] += self._last(n, each, columns)
            zeros = zeros_port(kernel)
            operands[zeros] = f"e {self._rows(n, zeros, kernel, rows)}"
            operands[zeros] += self._last(n, zeros, columns)
        operands[0] = f"*t {self._along(HIDDEN, self.size[HIDDEN])}"
        operands[14:17] = ["R e", "e", "e"]
        line = f"{', '.join(operands)} -> {operands[0]}"
        free = [axis for axis in (UNITS, HIDDEN) if not self.held[axis]]
        used = {name.strip("(),") for name in line.split()}
        sizes = {name: int(name[1:]) for name in used if name[0] in "HI" and name[1:].isdigit()}
        return Form(
            line,
            sizes | ({"G": 2} if "G" in used else {}),
            contracted=" ".join(self._names(axis, self.size[axis]) for axis in free),
            prefer=" ".join(free),
            reason="; ".join(filter(None, self.held.values())) or "whole blocks of QMoE go",
        )

    def count(self, n: OpNode, description: Description) -> None:
        """Say what all kernels of the chosen experts cost, one after the other."""
        names = [*self._names(HIDDEN, self.size[HIDDEN]).split()]
        names += self._names(UNITS, self.size[UNITS]).split()
        for name, size in ((names[-1], self.size[UNITS]), ("G", 2)):
            if name not in description.factors:
                description.add(name, size, [], self.held[UNITS] or "gates and units")
        tokens = [name for name in description.factors if name.startswith("t")]
        one = (*tokens, *names)
        fused = (*one, "G") if self.fusion else one
        description.macs = (fused, one, *[one] * n.has(kernel_port(2)))

    def _names(self, axis: str, count: int) -> str:
        """The factors of an axis that holds so many numbers for all positions of a width."""
        if self.held[axis]:
            return f"{axis.upper()}{count}"
        inside = count * self.grain[axis] // self.size[axis]
        return axis if inside == 1 else f"{axis} {axis.upper()}{inside}"

    def _along(self, axis: str, count: int) -> str:
        names = self._names(axis, count)
        return f"({names})" if " " in names else names

    def _rows(self, n: OpNode, port: int, kernel: int, axis: str) -> str:
        """The axis behind the experts', of which a unit may have two rows."""
        count = n.shape(port)[1] if n.has(port) else self.size[axis]
        if kernel or self.fusion == 0 or not n.has(port):
            return self._along(axis, count)
        if self.fusion == 2:
            return f"(G {self._names(axis, count // 2)})"
        shared = count * self.grain[axis] // self.size[axis] % 2  # a byte holds both rows
        if shared or count == self.size[axis]:
            return self._along(axis, count)
        return f"({self._names(axis, count // 2)} G)"

    def _last(self, n: OpNode, port: int, axis: str) -> str:
        wide = n.has(port) and len(n.shape(port)) == 3
        return f" {self._along(axis, n.shape(port)[2])}" if wide else ""


def packing_of(n: OpNode, attributes: Mapping[str, Any]) -> Packing | str:
    """How a node's kernels lie in bytes; or why nothing inside of them can go."""
    fusion = fusion_of(attributes)
    rows_of_unit = _ROWS_OF_UNIT.get(fusion)
    if attributes.get("quant_type", "int") != "int" or attributes.get("weights_prepacked", 0) == 1:
        return "kernels of QMoE that are no whole numbers in rows"
    present = [kernel for kernel in range(3) if n.has(kernel_port(kernel))]
    if fusion and 2 in present:
        return TWICE_GATED
    bits = {kernel: bits_of(kernel, attributes) for kernel in present}
    odd = next((count for count in bits.values() if count not in (2, 4, 8)), None)
    if odd is not None or rows_of_unit is None:
        return f"kernels of QMoE in {odd} bits" if odd else f"QMoE with swiglu_fusion={fusion}"
    shapes = {kernel: n.shape(kernel_port(kernel)) for kernel in present}
    size = {HIDDEN: n.shape(0)[-1], UNITS: shapes[0][1] // rows_of_unit}
    for kernel, (rows, columns) in ((k, _AXES[k]) for k in present):
        of_unit = rows_of_unit if kernel == 0 else 1
        expected = (size[rows] * of_unit, size[columns] * bits[kernel] / 8)
        if shapes[kernel][1:] != expected or not n.has(kernel_port(kernel) + 1):
            return "kernels of QMoE in a device's own order"
    grain, held = {HIDDEN: 1, UNITS: 1}, {HIDDEN: "", UNITS: ""}
    for kernel in present:
        of_unit = rows_of_unit if kernel == 0 else 1
        for axis, count in _shared(n, kernel, 8 // bits[kernel], of_unit, fusion == 1).items():
            grain[axis] = lcm(grain[axis], count)
    for axis, what in ((HIDDEN, "hidden width"), (UNITS, "units")):
        if size[axis] % grain[axis]:
            held[axis] = f"{grain[axis]} of the {what} of QMoE share bytes or scales"
    return Packing(fusion, size, grain, held)


def _shared(
    n: OpNode, kernel: int, in_byte: int, of_unit: int, interleaved: bool
) -> dict[str, int]:
    """How many positions of each axis share a byte or a scale in one kernel.

    Args:
        n: the node.
        kernel: which.
        in_byte: numbers in a byte.
        of_unit: rows that belong to a unit.
        interleaved: whether these stand side by side.
    """
    rows, columns = _AXES[kernel]
    scales, zeros = kernel_port(kernel) + 1, zeros_port(kernel)
    width = n.shape(kernel_port(kernel))[2] * in_byte
    found = {rows: 1, columns: in_byte}
    if len(n.shape(scales)) == 3:
        block = -(-width // n.shape(scales)[2])
        packed = in_byte if n.has(zeros) else 1
        found[columns] = lcm(in_byte, block * packed)
    elif n.has(zeros):
        found[rows] = in_byte // gcd(in_byte, of_unit) if interleaved else in_byte
    return found
