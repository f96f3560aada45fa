"""Sizes that a model leaves open beyond the batch: sequences, heights and widths.

The recipe runs once with every open size at its analysis size, and once more for each of them
enlarged. Whatever differs between the runs depends on an open size: dims become symbolic, and the
numbers that were computed from sizes stay computed. All runs then repeat with those nodes kept.

    Reshape to [batch, length, 4, 8]   [0, 0, 4, 8]; one size that is no copy may be -1
    Expand to [batch, 1, 64]           a size that the operand has already is 1
    Resize to [batch, 24, H, W]        [H, W] of the axes 2 and 3

Where that is not enough the shape stays computed and its operator is opaque; it is right at every
size, but what it touches keeps its channels. No axis whose size is open is ever resized.

Where the batch alone is open, ``open_batch`` is asked first. It needs two runs and not four, and
what it leaves computes no sizes: a constant says every number. What cannot be written in that way
comes here.
"""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.arrays import Shape
from morphgraph.edit import Editor
from morphgraph.errors import ModelError
from morphgraph.onnx_io import STATIC_SHAPE_KEY, bind_inputs, escape, static_shape
from morphgraph.passes.canonical.symbols import (
    Symbol,
    expression,
    input_shapes,
    same_numbers,
    same_structure,
)

OPEN_AXES_KEY = "open_axes"

Digests = Mapping[str, object]
Fold = Callable[[ir.Model, frozenset[str]], Digests]
"""Fold a model in place, keeping the nodes that make these values; what every folded value was."""


def settle_open_sizes(model: ir.Model, symbols: Sequence[Symbol], fold: Fold) -> ir.Model:
    """The canonical form of a model with open sizes: they stay open, all others are known.

    Raises:
        ModelError: the network's structure depends on a size, or a number that does cannot be
            written so that it follows.
    """
    symbols, plain = _tried(model, symbols, fold)
    shapes = [input_shapes(model, symbols, larger) for larger in (None, *symbols)]
    varying = frozenset(
        name for name in plain[0] if any(other.get(name) != plain[0][name] for other in plain[1:])
    )
    runs = [bind_inputs(model, run) for run in shapes]
    for run in runs:
        fold(run, varying)
    if not same_structure(runs):
        raise ModelError(
            "the network's structure depends on the size of its inputs; give --input-shape for "
            "fixed ones"
        )
    declared = {value.name: ir.Shape(value.shape or ()) for value in model.graph.inputs}
    _Restorer(runs, symbols).run(declared)
    return runs[0]


def _tried(
    model: ir.Model, symbols: Sequence[Symbol], fold: Fold
) -> tuple[list[Symbol], list[Digests]]:
    """What folds at the analysis sizes, and with each of the open sizes enlarged.

    Some models name sizes apart that must be equal, such as those of tokens and of their mask.
    Symbols that cannot grow alone are taken together.
    """

    def folded(of: Sequence[Symbol], larger: Symbol | None) -> Digests:
        return fold(bind_inputs(model, input_shapes(model, of, larger)), frozenset())

    try:
        results = [folded(symbols, None)]
    except ModelError as error:
        tried = ", ".join(f"{symbol.name}={symbol.size}" for symbol in symbols)
        raise ModelError(
            f"{error} (the open sizes were tried at {tried}; give --input-shape for others)"
        ) from error
    stuck: dict[tuple[int, int], list[Symbol]] = {}
    growing = []
    for symbol in symbols:
        try:
            results.append(folded(symbols, symbol))
            growing.append(symbol)
        except ModelError:
            stuck.setdefault((symbol.size, symbol.larger), []).append(symbol)
    for (size, larger), tied in stuck.items():
        axes = tuple(place for symbol in tied for place in symbol.axes)
        growing.append(Symbol(tied[0].name, axes, size, larger))
    results += [folded(growing, symbol) for symbol in growing[len(results) - 1 :]]
    return growing, results


class _Restorer:
    """Writes the first run so that its open sizes stay open."""

    def __init__(self, runs: Sequence[ir.Model], symbols: Sequence[Symbol]) -> None:
        self.graph = runs[0].graph
        self.model = runs[0]
        self.editor = Editor(self.model)
        self.opset = runs[0].opset_imports.get("", 0)
        self.symbols = symbols
        self.shapes: dict[str, list[Shape]] = {}
        for run in runs:
            made = (value for node in run.graph for value in node.outputs if value.name)
            for value in (*run.graph.inputs, *run.graph.initializers.values(), *made):
                self.shapes.setdefault(value.name or "", []).append(static_shape(value))
        self.differing = {
            name
            for name, value in self.graph.initializers.items()
            if any(not same_numbers(value, run.graph.initializers[name]) for run in runs[1:])
        }

    def run(self, declared: Mapping[str | None, ir.Shape]) -> None:
        for node in list(self.graph):
            self._restore(node)
        common.RemoveUnusedNodesPass()(self.model)
        for name in self.differing & self.graph.initializers.keys():
            use = next(iter(self.graph.initializers[name].uses()))
            raise ModelError(
                f"node '{escape(use.node.name or '')}' ({escape(use.node.op_type)}): its operand "
                f"'{escape(name)}' depends on the size of an input; give --input-shape for a "
                "fixed one"
            )
        made = (value for node in self.graph for value in node.outputs if value.name)
        for value in (*self.graph.inputs, *made):
            self._open(value, declared)

    def _open(self, value: ir.Value, declared: Mapping[str | None, ir.Shape]) -> None:
        sizes = static_shape(value)
        runs = self.shapes.get(value.name or "", [sizes])
        value.meta[STATIC_SHAPE_KEY] = sizes
        # The batch may stand in one axis with heads or windows, which can be resized there.
        others = [run for run, s in zip(runs[1:], self.symbols) if s.axes[0][1] > 0]
        value.meta[OPEN_AXES_KEY] = frozenset(
            axis for axis in range(len(sizes)) if any(run[axis] != sizes[axis] for run in others)
        )
        if value.name in declared:
            value.shape = declared[value.name]
        else:
            value.shape = ir.Shape(
                expression(self.symbols, [run[axis] for run in runs]) for axis in range(len(sizes))
            )

    # -- shape operands ------------------------------------------------------------------------

    def _restore(self, node: ir.Node) -> None:
        index = {"Reshape": 1, "Expand": 1, "Resize": 3}.get(node.op_type)
        operand = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if node.domain or operand is None or index is None:
            return
        if operand.const_value is not None and operand.name not in self.differing:
            return
        if node.op_type == "Reshape":
            self._restore_reshape(node, operand)
        elif node.op_type == "Expand":
            self._restore_expand(node, operand)
        elif self.opset >= 18 and "axes" not in node.attributes:
            self._restore_resize(node, operand)

    def _runs(self, value: ir.Value | None) -> list[Shape]:
        assert value is not None
        return self.shapes[value.name or ""]

    def _restore_reshape(self, node: ir.Node, operand: ir.Value) -> None:
        before, after = self._runs(node.inputs[0]), self._runs(node.outputs[0])
        target = list(after[0])
        varying = [a for a in range(len(target)) if any(run[a] != target[a] for run in after)]
        copied = [
            a
            for a in varying
            if a < len(before[0]) and all(b[a] == c[a] for b, c in zip(before, after, strict=True))
        ]
        rest = [a for a in varying if a not in copied]
        # Only the batch stands in one axis with something that may be resized: that one is left to
        # be found, all others are computed.
        mixed = [a for a in rest if self._is_multiple([run[a] for run in after])] or rest[:1]
        if len(mixed) > 1:
            return
        node.attributes.pop("allowzero", None)  # nothing here is really of size 0
        for axis in copied:
            target[axis] = 0
        for axis in mixed if len(varying) > 1 else varying:
            target[axis] = -1
        computed = [axis for axis in rest if axis not in mixed] if len(varying) > 1 else []
        if not computed:
            self._replace(node, 1, target)
        elif operand.const_value is None:
            self._assemble(node, operand, target, computed)

    def _is_multiple(self, sizes: Sequence[int]) -> bool:
        """Whether a size is not one open size alone."""
        return expression(self.symbols, sizes) not in [ir.SymbolicDim(s.name) for s in self.symbols]

    def _restore_expand(self, node: ir.Node, operand: ir.Value) -> None:
        before, after = self._runs(node.inputs[0]), self._runs(node.outputs[0])
        shift = len(after[0]) - len(before[0])
        target = [
            1
            if k >= shift and all(b[k - shift] == c[k] for b, c in zip(before, after, strict=True))
            else size
            for k, size in enumerate(after[0])
        ]
        varying = [
            k for k, size in enumerate(target) if size != 1 and any(r[k] != size for r in after)
        ]
        if not varying:
            self._replace(node, 1, target)
        elif operand.const_value is None:
            self._assemble(node, operand, target, varying)

    def _assemble(
        self, node: ir.Node, operand: ir.Value, target: Sequence[int], computed: Sequence[int]
    ) -> None:
        """A shape whose open sizes are picked from the computed one, and whose others are given."""
        name = node.outputs[0].name
        skipped = len(target) - static_shape(operand)[0]
        pieces = [
            self._pick(node, operand, k - skipped, f"{name}_size_{k}")
            if k in computed
            else self.editor.sizes(f"{name}_size_{k}", [size])
            for k, size in enumerate(target)
        ]
        self._join(node, 1, pieces, f"{name}_shape")

    def _join(self, node: ir.Node, index: int, pieces: Sequence[ir.Value], name: str) -> None:
        """Give a node an operand that joins these sizes."""
        joined = self._insert(node, "Concat", pieces, {"axis": 0}, name, len(pieces))
        self.editor.replace_operand(node, index, joined, name, f"{node.name}_{name}")

    def _insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int],
        name: str,
        size: int,
    ) -> ir.Value:
        return self.editor.insert_vector(
            op_type,
            inputs,
            attributes,
            name=f"{node.name}_{name}",
            result=name,
            size=size,
            before=node,
        )

    def _restore_resize(self, node: ir.Node, operand: ir.Value) -> None:
        """Name only the axes that change, so that the channels stand in no operand."""
        before, after = self._runs(node.inputs[0]), self._runs(node.outputs[0])
        axes = [
            a
            for a in range(len(after[0]))
            if any(b[a] != c[a] for b, c in zip(before, after, strict=True))
        ]
        if not axes or node.inputs[1] is not None or operand.const_value is not None:
            return
        name = node.outputs[0].name
        picked = [self._pick(node, operand, a, f"{name}_size_{a}") for a in axes]
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        self._join(node, 3, picked, f"{name}_sizes")

    def _pick(self, node: ir.Node, operand: ir.Value, k: int, name: str) -> ir.Value:
        """One number of a computed shape, from where it comes: what nobody picks is not made."""
        maker = operand.producer()
        count = static_shape(operand)[0]
        if maker is not None and not maker.domain and operand.const_value is None:
            constants = [v.const_value.numpy() for v in maker.inputs[1:] if v and v.const_value]
            source = maker.inputs[0]
            match maker.op_type:
                case "Concat":
                    places = [
                        (v, at) for v in maker.inputs if v for at in range(static_shape(v)[0])
                    ]
                    return self._pick(node, *places[k], name)
                case "Slice" if source and len(constants) == len(maker.inputs) - 1:
                    start, end = int(constants[0][0]), int(constants[1][0])
                    step = int(constants[3][0]) if len(constants) > 3 else 1
                    at = range(static_shape(source)[0])[slice(start, end, step)][k]
                    return self._pick(node, source, at, name)
                case "Gather" if source and constants and constants[0].ndim == 1:
                    at = range(static_shape(source)[0])[int(constants[0][k])]
                    return self._pick(node, source, at, name)
                case "Shape" if count > 1 and self.opset >= 15:
                    attribute = maker.attributes.get("start")
                    first = attribute.as_int() if attribute else 0
                    assert source is not None
                    axis = range(len(static_shape(source)))[slice(first, None)][k]
                    attributes = {"start": axis, "end": axis + 1}
                    return self._insert(node, "Shape", [source], attributes, name, 1)
        if count == 1:
            return operand
        indices = self.editor.sizes(f"{name}_at", [k])
        return self._insert(node, "Gather", [operand, indices], {"axis": 0}, name, 1)

    def _replace(self, node: ir.Node, index: int, numbers: Sequence[int]) -> None:
        name = f"{node.outputs[0].name}_target"
        node.replace_input_with(index, self.editor.sizes(name, numbers))
