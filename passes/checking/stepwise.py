"""Every value inside a resized model, computed from the masked original's operands.

From end to end, rounding grows: one quantizer that rounds the other way moves a number by a whole
step, and argmax, sharp softmax and long networks do the like. And a saturated output hides what is
wrong. Neither happens within a single node. So every node of the resized model is given the masked
original's operands, at the positions that stay, and must give the masked original's results there.
If all do, then by induction the resized model computes what the masked original computes, up to
rounding.
"""

from collections.abc import Callable, Mapping, Sequence
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

    def compare(
        self,
        inputs: Mapping[str, Array],
        tolerance: float,
        known: Sequence[Mapping[str, Array]] = ({}, {}),
    ) -> ValuesReport | None:
        """Compare all values; ``None`` where a model cannot be taken apart.

        Args:
            inputs: by name.
            tolerance: the largest error that is rounding.
            known: values of the original and the masked one for these inputs; what is missing is
                computed.
        """
        try:
            return self._compare(inputs, tolerance, *known)
        except (ModelError, UnsupportedError):
            return None

    def wanted(self) -> list[str]:
        """The names of all values that ``compare`` needs of the original and the masked one."""
        names = self._common()
        return [*names, *self._vanished(names, self._constant_sums())]

    def _compare(
        self,
        inputs: Mapping[str, Array],
        tolerance: float,
        of_original: Mapping[str, Array],
        of_masked: Mapping[str, Array],
    ) -> ValuesReport | None:
        names, sums = self._common(), self._constant_sums()
        wanted = [*names, *self._vanished(names, sums)]
        masked = self._values(self.masked, wanted, inputs, of_masked)
        expected = {name: kept(self.selection, name, masked[name]) for name in wanted}
        original = self._values(self.original, names, inputs, of_original)
        common, cut = set(names), [name for name in names if expected[name].size]
        # A cache has the heads of the network that it belongs to.
        fewer = {name: kept(self.selection, name, array) for name, array in inputs.items()}
        while True:
            open_model, given = cut_at(self.small, cut)
            feeds = {given[name]: expected[name] for name in cut}
            taken = {value.name for value in open_model.graph.inputs}
            given_to = {**fewer, **feeds}
            found = self.run(open_model, {k: v for k, v in given_to.items() if k in taken})
            errors = {
                # Cut one by one: memory that is used again is quick, and fresh memory is not.
                name: compare(
                    name, expected[name], result, [kept(self.selection, name, original[name])]
                )
                for name, result in found.items()
                if name in common
            }
            # What is another's by right is judged by what is computed from it.
            other = {
                name
                for name in cut
                if found[name].shape != expected[name].shape
                or (
                    errors[name].relative > tolerance
                    and self._holds_constant(name, found[name], sums, expected, tolerance)
                )
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
        """Results in the resized model that the original has as well, and where nothing is new.

        What is computed of weights alone is judged by what their readers make of it.
        """
        outputs = [value.name for value in self.small.graph.outputs]
        inside = {
            value.name: value
            for node in self.small.graph
            for value in node.outputs
            if value.name and (value.uses() or value.name in outputs)
        }
        in_masked = {
            v.name: v.dtype
            for node in self.masked.graph
            for v in node.outputs
            if isinstance(v.type, ir.TensorType)
        }
        graph = self.selection.graph
        shapes, of_sizes = graph.shapes, self._of_sizes()
        of_weights = graph.couplings.input_independent
        return [
            name
            for name, value in inside.items()
            if name in shapes
            and name not in of_sizes
            and (name not in of_weights or name in outputs)
            and in_masked.get(name) in _COMPARED
            and value.dtype in (None, in_masked[name])
            and not any(len(self.selection.fresh(name, k)) for k in range(len(shapes[name])))
        ]

    def _of_sizes(self) -> set[str]:
        """Results that follow from sizes alone, which differ by right."""
        found: set[str] = set()
        for node in self.masked.graph:
            operands = [v.name for v in node.inputs if v is not None and v.const_value is None]
            if facts_of(node).reads_sizes or (operands and found.issuperset(operands)):
                found.update(value.name or "" for value in node.outputs)
        return found

    def _constant_sums(self) -> dict[str, list[str]]:
        """The sums that may hold what removed channels gave."""
        return self._sums() if self.constants_moved else {}

    def _sums(self) -> dict[str, list[str]]:
        """By operand of an addition its sums: what it is added into, however often."""
        sums: dict[str, list[str]] = {}
        for node in reversed(list(self.original.graph)):
            for value in node.inputs if facts_of(node).adds else ():
                if value is not None and value.producer() is not None:
                    total = node.outputs[0].name or ""
                    sums.setdefault(value.name or "", []).extend([total, *sums.get(total, [])])
        return sums

    def _vanished(self, names: list[str], sums: Mapping[str, list[str]]) -> set[str]:
        """Sums of which but one operand is left, which is what is left of them."""
        shapes = self.selection.graph.shapes
        gone = {total for name in names for total in sums.get(name, [])} - set(names)
        return {name for name in gone if name in shapes}

    def _holds_constant(
        self,
        name: str,
        found: Array,
        sums: Mapping[str, list[str]],
        expected: Arrays,
        tolerance: float,
    ) -> bool:
        """Whether a value may, by right, hold the constant that a removed addend was.

        Either the sum is computed in the resized model, and is compared there; or the value is all
        that is left of the sum, and is equal to it.
        """
        totals = sums.get(name, [])
        results = {value.name for node in self.small.graph for value in node.outputs}
        return any(
            total in results
            or (total in expected and compare(name, expected[total], found).relative <= tolerance)
            for total in totals
        )

    def _values(
        self,
        model: ir.Model,
        names: list[str],
        inputs: Mapping[str, Array],
        known: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        """What a model computes for some values."""
        return known if known.keys() >= set(names) else self.run(listing(model, names), inputs)


def listing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A model that gives these values beside its outputs; those that it has."""
    copy = model.clone()
    results = {value.name: value for node in copy.graph for value in node.outputs}
    listed = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(
        results[name] for name in names if name in results and name not in listed
    )
    return copy
