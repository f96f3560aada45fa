"""Every value inside a resized model, computed from the masked original's operands.

From end to end, rounding grows: one quantizer that rounds the other way moves a number by a whole
step, and argmax, sharp softmax and long networks do the like. And a saturated output hides what is
wrong. Neither happens within a single node. So every node of the resized model is given the masked
original's operands, at the positions that stay, and must give the masked original's results there.
If all do, then by induction the resized model computes what the masked original computes, up to
rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.edit import cut_at
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.compare import OutputError, compare, kept

Runner = Callable[[ir.Model, Mapping[str, Array]], Arrays]
"""Runs a model on inputs by name; results by name."""

# Types in which a difference between two networks shows. Integers of 64 and 32 bits are mostly
# sizes, which differ by right, or follow from what is compared.
_COMPARED = frozenset(
    {ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16}
)


@dataclass(frozen=True, slots=True)
class ValuesReport:
    """The errors of the values inside, each computed from the masked original's operands.

    Attributes:
        compared: how many values were.
        worst: the one that is furthest off.
        sensitivity: how far masking moved any of them, as a share of its scale.
        untold: names of values of which no number is finite, so that they tell nothing.
    """

    compared: int
    worst: OutputError
    sensitivity: float
    untold: tuple[str, ...]


@dataclass(frozen=True)
class Stepwise:
    """What a comparison value by value needs.

    Attributes:
        original, masked, small: the three networks, in single precision.
        selection: which positions of every axis stay.
        run: runs a model.
        constants_moved: whether what removed channels gave as a constant was added to biases.
    """

    original: ir.Model
    masked: ir.Model
    small: ir.Model
    selection: AxisSelection
    run: Runner
    constants_moved: bool

    def compare(self, inputs: Mapping[str, Array], tolerance: float) -> ValuesReport | None:
        """Compare all values; ``None`` where a model cannot be taken apart."""
        try:
            return self._compare(inputs, tolerance)
        except (ModelError, UnsupportedError):
            return None

    def _compare(self, inputs: Mapping[str, Array], tolerance: float) -> ValuesReport | None:
        names = self._common()
        expected = self._values(self.masked, names, inputs)
        original = self._values(self.original, names, inputs)
        cut = [name for name in names if expected[name].size]
        added = self._added_to()
        while True:
            open_model, given = cut_at(self.small, cut)
            feeds = {given[name]: expected[name] for name in cut}
            found = self.run(open_model, {**inputs, **feeds})
            errors = {
                name: compare(name, expected[name], result, [original[name]])
                for name, result in found.items()
                if name in expected
            }
            # What is another's by right is judged by what is computed from it.
            other = {
                name
                for name in cut
                if found[name].shape != expected[name].shape
                or (errors[name].relative > tolerance and name in added)
            }
            if not other:
                break
            cut = [name for name in cut if name not in other]
        if not errors:
            return None
        return ValuesReport(
            len(errors),
            max(errors.values(), key=lambda error: error.relative),
            max(error.sensitivity for error in errors.values()),
            tuple(name for name, error in errors.items() if not error.told),
        )

    def _common(self) -> list[str]:
        """Results in the resized model that the original has as well, and where nothing is new."""
        outputs = [value.name for value in self.small.graph.outputs]
        inside = {
            value.name: value
            for node in self.small.graph
            for value in node.outputs
            if value.name and (value.uses() or value.name in outputs)
        }
        in_masked = {v.name: v.dtype for node in self.masked.graph for v in node.outputs}
        shapes = self.selection.graph.shapes
        return [
            name
            for name, value in inside.items()
            if name in shapes
            and in_masked.get(name) in _COMPARED
            and value.dtype in (None, in_masked[name])
            and not any(len(self.selection.fresh(name, k)) for k in range(len(shapes[name])))
        ]

    def _added_to(self) -> set[str]:
        """Results that are added to something, and may now hold a removed operand's constant."""
        if not self.constants_moved:
            return set()
        return {
            value.name or ""
            for node in self.original.graph
            if facts_of(node).adds
            for value in node.inputs
            if value is not None and value.producer() is not None
        }

    def _values(self, model: ir.Model, names: list[str], inputs: Mapping[str, Array]) -> Arrays:
        """What a model computes for some values, at the positions that stay."""
        copy = model.clone()
        results = {value.name: value for node in copy.graph for value in node.outputs}
        listed = {value.name for value in copy.graph.outputs}
        copy.graph.outputs.extend(results[name] for name in names if name not in listed)
        found = self.run(copy, inputs)
        return {name: kept(self.selection, name, found[name]) for name in names}
