"""Dynamic sizes beyond the batch: sequences, heights and widths.

The recipe runs at the analysis sizes, and once more per symbol with that one enlarged. Whatever
differs between the runs depends on a dynamic size: dims become symbolic, and the numbers that were
computed from sizes stay computed. All runs then repeat with those nodes kept.

    Reshape to [batch, length, 4, 8]   [0, 0, 4, 8]; one size that is no copy may be -1
    Expand to [batch, 1, 64]           a size that the operand has already is 1
    Resize to [batch, 24, H, W]        [H, W] of the axes 2 and 3

Where that is not enough the shape stays computed and its operator is opaque; it is right at every
size, but what it touches keeps its channels. No axis whose size is dynamic is ever resized.

Where the batch alone is dynamic, ``dynamic_batch`` goes first. It needs two runs and not four, and
what it leaves computes no sizes: a constant holds every number. What cannot be written in that way
comes here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.edit import Editor
from morphgraph.errors import ModelError
from morphgraph.onnx_io import bind_inputs, escape, node_label, static_shape
from morphgraph.passes.canonical.dynamic_batch import keep_batch_dynamic
from morphgraph.passes.canonical.infer_shapes import MisfitError, require_fit
from morphgraph.passes.canonical.size_runs import Digests, Fold, SizeRuns, same_structure
from morphgraph.passes.canonical.symbols import (
    Symbol,
    addends,
    expression,
    input_shapes,
    other_sizes,
)

_MAX_TRIES = 40  # sizes that are looked at for the advice of an error
_MAX_TRIED = 4096  # the largest of them


def keep_sizes_dynamic(model: ir.Model, symbols: Sequence[Symbol], fold: Fold) -> ir.Model:
    """The canonical form of a model with dynamic sizes: they stay, all others are known.

    Args:
        model: is not changed.
        symbols: the dynamic sizes of its inputs.
        fold: the recipe.

    Raises:
        ModelError: the network's structure depends on a size, or a number that does cannot be
            written so that it follows.
    """
    failure = None
    for tried in [symbols, *other_sizes(symbols)]:
        try:
            return _kept(model, tried, fold)
        except MisfitError as error:
            failure = failure or error
    assert failure is not None
    sizes = ", ".join(f"{symbol.name}={symbol.size}" for symbol in symbols)
    names = dict.fromkeys(f"'{escape(name)}'" for symbol in symbols for name, _ in symbol.axes)
    raise ModelError(
        f"{failure} (the open sizes of input {', '.join(names)} were tried "
        f"at {escape(sizes)}; {_advice(model, symbols, fold, failure)})"
    ) from failure


def _advice(model: ir.Model, symbols: Sequence[Symbol], fold: Fold, failure: MisfitError) -> str:
    """Which ``--input-shape`` would do, as it stands in a message: sizes at which all fits.

    A size that tracing has burnt into the file stands beside the one that it should be. So every
    symbol is tried by itself, and all but the batch together, in proportion to such a pair.
    """
    beside_batch = [symbol for symbol in symbols if not symbol.is_batch]
    choices = [[symbol] for symbol in symbols] + [beside_batch] * (len(beside_batch) > 1)
    pairs = set(product((size for size in failure.sizes if size > 0), repeat=2))
    ranked = sorted(
        # First what stands where a symbol's own size should, then what is near; 1 fits too much.
        (chosen[0].size * ratio == 1, given != chosen[0].size, max(ratio, 1 / ratio), ratio, k)
        for k, chosen in enumerate(choices)
        for wanted, given in pairs
        for ratio in [Fraction(wanted, given)]
        if all((s.size * ratio).denominator == 1 and s.size * ratio <= _MAX_TRIED for s in chosen)
    )
    wanted = [
        [replace(s, size=int(s.size * ratio)) if s in choices[k] else s for s in symbols]
        for ratio, k in dict.fromkeys((ratio, k) for *_, ratio, k in ranked)
    ]
    for sizes in wanted[:_MAX_TRIES]:
        shapes = input_shapes(model, sizes)
        bound = bind_inputs(model, shapes)
        try:
            fold(bound, frozenset())
            require_fit(bound.graph)
        except ModelError:
            continue
        named = dict.fromkeys(name for symbol in symbols for name, _ in symbol.axes)
        given = (f"{escape(name)}={'x'.join(map(str, shapes[name]))}" for name in named)
        return f"give --input-shape {' --input-shape '.join(given)}"
    return f"give --input-shape {escape(symbols[-1].axes[0][0])}=... for others"


def _kept(model: ir.Model, symbols: Sequence[Symbol], fold: Fold) -> ir.Model:
    """The canonical form, from runs at the symbols' sizes."""
    if all(symbol.is_batch for symbol in symbols):
        (batch,) = symbols
        canonical = keep_batch_dynamic(model, batch, fold)
        if canonical is not None:
            return canonical
    symbols, digests = _folded(model, symbols, fold)
    varying = _varying(digests)
    runs, digests = _runs(model, symbols, fold, varying)
    left = _OperandWriter(runs).run()
    further = varying | _varying(digests)
    if left and further != varying:
        # The first runs know nothing of what is computed from a constant that they did not fold,
        # for it would take more bytes (a mask of floats, cast from a condition).
        runs, _ = _runs(model, symbols, fold, further)
        left = _OperandWriter(runs).run()
    for value in left:
        use = next(iter(value.uses()))
        raise ModelError(
            f"{node_label(use.node)}: its operand '{escape(value.name or '')}' depends on "
            "the size of an input; give --input-shape for a fixed one"
        )
    runs.write_shapes(model)
    return runs.model


def _varying(digests: Sequence[Digests]) -> frozenset[str]:
    """Names of values that are not the same in all runs."""
    return frozenset(
        name
        for name, digest in digests[0].items()
        if any(other.get(name) != digest for other in digests[1:])
    )


def _runs(
    model: ir.Model, symbols: Sequence[Symbol], fold: Fold, varying: frozenset[str]
) -> tuple[SizeRuns, list[Digests]]:
    """Canonical at the analysis sizes, and with each symbol enlarged; what varies is computed."""
    models = [bind_inputs(model, input_shapes(model, symbols))]
    models += [bind_inputs(model, input_shapes(model, symbols, [symbol])) for symbol in symbols]
    digests = [fold(run, varying) for run in models]
    require_fit(models[0].graph)
    if not same_structure(models):
        raise ModelError(
            "the network's structure depends on the size of its inputs; give --input-shape for "
            "fixed ones"
        )
    return SizeRuns(models, symbols), digests


def _folded(
    model: ir.Model, symbols: Sequence[Symbol], fold: Fold
) -> tuple[list[Symbol], list[Digests]]:
    """What folds at the analysis sizes, and with each symbol enlarged.

    Some models name sizes apart that must be equal, such as those of tokens and of their mask.
    Symbols that cannot grow alone are one symbol in what is returned.
    """

    def folded(of: Sequence[Symbol], *enlarged: Symbol) -> Digests:
        return fold(bind_inputs(model, input_shapes(model, of, enlarged)), frozenset())

    digests = [folded(symbols)]
    stuck: dict[tuple[int, int], list[Symbol]] = {}
    growing = []
    for symbol in symbols:
        try:
            digests.append(folded(symbols, symbol))
            growing.append(symbol)
        except ModelError:
            stuck.setdefault((symbol.size, symbol.larger), []).append(symbol)
    for (size, larger), tied in stuck.items():
        axes = tuple(place for symbol in tied for place in symbol.axes)
        growing.append(Symbol(tied[0].name, axes, size, larger))
    digests += [folded(growing, symbol) for symbol in growing[len(digests) - 1 :]]
    return growing, digests


def _number(shape: ir.Value, k: int) -> int | None:
    """One number of a shape that may be joined from pieces; ``None``: it is computed."""
    if shape.const_value is not None:
        return int(shape.const_value.numpy().ravel()[k])
    maker = shape.producer()
    if maker is None or maker.op_type != "Concat" or maker.domain:
        return None
    places = [(v, at) for v in maker.inputs if v for at in range(static_shape(v)[0])]
    return _number(*places[k])


class _OperandWriter:
    """Writes the shape operands of the first run so that dynamic sizes stay dynamic."""

    def __init__(self, runs: SizeRuns) -> None:
        self.runs = runs
        self.graph = runs.model.graph
        self.editor = Editor(runs.model)
        self.opset = runs.model.opset_imports.get("", 0)
        self.varying = {value.name for value in runs.varying_constants}

    def run(self) -> list[ir.Value]:
        """Write them; returns the constants that vary with a size and are read still."""
        for node in list(self.graph):
            self._write_operand(node)
        common.RemoveUnusedNodesPass()(self.runs.model)
        constants = self.graph.initializers
        return [value for value in self.runs.varying_constants if value.name in constants]

    def _write_operand(self, node: ir.Node) -> None:
        index = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}.get(node.op_type)
        operand = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if node.domain or operand is None or index is None:
            return
        if operand.const_value is not None and operand.name not in self.varying:
            return
        if node.op_type == "Reshape":
            self._write_reshape(node, operand)
        elif node.op_type == "Expand":
            target, dynamic = self.runs.expand_target(node)
            self._write_target(node, 1, operand, target, dynamic)
        elif node.op_type == "ConstantOfShape":
            (result,) = node.outputs
            dynamic = self.runs.varying_axes(result)
            self._write_target(node, 0, operand, static_shape(result), dynamic)
        elif self.opset >= 18 and "axes" not in node.attributes:
            self._write_resize(node, operand)

    def _write_reshape(self, node: ir.Node, operand: ir.Value) -> None:
        before, after = self.runs.shapes(node.inputs[0]), self.runs.shapes(node.outputs[0])
        varying = self.runs.varying_axes(node.outputs[0])
        copied = [
            axis
            for axis in varying
            if axis < len(before[0])
            and all(b[axis] == a[axis] for b, a in zip(before, after, strict=True))
        ]
        others = [axis for axis in varying if axis not in copied]
        # One axis may be -1. A size that is multiplied shares its axis with something that may be
        # resized (batch and heads): that axis is left to be inferred, for a computed number would
        # hold the old width. Lengths that are added do not: past and new tokens.
        inferred = [
            axis for axis in others if not self._is_sum([run[axis] for run in after])
        ] or others[:1]
        if len(inferred) > 1:
            return
        if len(varying) == 1:
            inferred = varying
        node.attributes.pop("allowzero", None)  # nothing here is really of size 0
        target = list(after[0])
        for axis in copied:
            target[axis] = 0
        for axis in inferred:
            target[axis] = -1
        computed = [axis for axis in others if axis not in inferred]
        left = [axis for axis in computed if _number(operand, axis) == -1]
        found = [(axis, self._source(node, axis)) for axis in left]
        sources = {axis: source for axis, source in found if source is not None}
        if len(sources) == len(left):
            self._write_target(node, 1, operand, target, computed, sources)

    def _source(self, node: ir.Node, axis: int) -> int | None:
        """Which axis of a Reshape's operand has the size of an axis of its result, if any does."""
        before, after = self.runs.shapes(node.inputs[0]), self.runs.shapes(node.outputs[0])
        same = (
            k
            for k in range(len(before[0]))
            if all(b[k] == a[axis] for b, a in zip(before, after, strict=True))
        )
        return next(same, None) if self.opset >= 15 else None

    def _is_sum(self, sizes: Sequence[int]) -> bool:
        """Whether a size is one dynamic size or a sum of several, and none is multiplied."""
        found = expression(self.runs.symbols, sizes)
        names = {symbol.name for symbol in self.runs.symbols}
        if isinstance(found, int) or found.value in names:
            return not isinstance(found, int)
        return set(addends(found, names)[0].values()) == {1}

    def _write_target(
        self,
        node: ir.Node,
        index: int,
        operand: ir.Value,
        target: Sequence[int],
        computed: Sequence[int],
        sources: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Give a node a shape: a constant, or one with some sizes picked from the computed one.

        Those of ``sources`` are the size of this axis of what is reshaped.
        """
        name = node.outputs[0].name
        if not computed:
            node.replace_input_with(index, self.editor.sizes(f"{name}_target", target))
            return
        if operand.const_value is not None:
            return
        added = len(target) - static_shape(operand)[0]  # axes that Expand puts before those it has
        pieces = [
            self._read(node, sources[k], f"{name}_size_{k}")
            if k in sources
            else self._pick(node, operand, k - added, f"{name}_size_{k}")
            if k in computed
            else self.editor.sizes(f"{name}_size_{k}", [size])
            for k, size in enumerate(target)
        ]
        self._join(node, index, pieces, f"{name}_shape")

    def _read(self, node: ir.Node, axis: int, name: str) -> ir.Value:
        """The size of an axis of what a node reads first."""
        operand = node.inputs[0]
        assert operand is not None
        return self._insert(node, "Shape", [operand], {"start": axis, "end": axis + 1}, name, 1)

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

    def _write_resize(self, node: ir.Node, operand: ir.Value) -> None:
        """Name only the axes that change, so that the channels stand in no operand."""
        before, after = self.runs.shapes(node.inputs[0]), self.runs.shapes(node.outputs[0])
        axes = [
            axis
            for axis in range(len(after[0]))
            if any(b[axis] != a[axis] for b, a in zip(before, after, strict=True))
        ]
        if not axes or node.inputs[1] is not None or operand.const_value is not None:
            return
        name = node.outputs[0].name
        picked = [self._pick(node, operand, axis, f"{name}_size_{axis}") for axis in axes]
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
                    assert source is not None
                    first = maker.attributes.get_int("start", 0)
                    axis = range(len(static_shape(source)))[slice(first, None)][k]
                    attributes = {"start": axis, "end": axis + 1}
                    return self._insert(node, "Shape", [source], attributes, name, 1)
        if count == 1:
            return operand
        indices = self.editor.sizes(f"{name}_at", [k])
        return self._insert(node, "Gather", [operand, indices], {"axis": 0}, name, 1)
