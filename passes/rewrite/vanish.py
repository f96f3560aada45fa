"""Pass ``vanish``: layers of width 0 are cut, and what they still contributed stays as a constant.

What goes is decided by :mod:`morphgraph.passes.analysis.liveness`; this pass, a step of ``resize``,
does it. A node that sums over nothing is run alone on zeros, at its original size, and what
computes with such constants alone is run at its new size. Where a constant enters a node that
stays, it becomes an initializer named after the value that it replaces. Over axes along which it
does not vary and which its reader broadcasts it has size 1. One that is added behind an operator
with a shift of its own moves into that; zeros are not added.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import add_constant_names, escape, static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.evaluate import evaluate, needed_for, nodes_by_result
from morphgraph.passes.analysis.liveness import Liveness, result_names
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.dynamic_batch import batched_sizes
from morphgraph.passes.rewrite.bias import add_to_bias


def vanish(
    found: Liveness,
    kept: AxisSelection,
    model: ir.Model,
    editor: Editor,
    copies: Sequence[ir.Node],
    absorbed: Mapping[str, Array],
) -> None:
    """Cut what has gone out of a resized model, in place.

    Args:
        found: what stays and what goes.
        kept: the positions that stay on every axis.
        model: the model with its weights, shapes and attributes in their new size.
        editor: of that model.
        copies: its nodes, in the order of ``found.graph.ops``.
        absorbed: what removed constants add to values that nothing else is left of, by name.

    Raises:
        UnsupportedError: ONNX Runtime cannot compute a constant, or it depends on the batch.
    """
    _Vanisher(found, kept, model, editor, list(copies), absorbed).run()


class _Vanisher:
    def __init__(
        self,
        found: Liveness,
        kept: AxisSelection,
        model: ir.Model,
        editor: Editor,
        copies: list[ir.Node],
        absorbed: Mapping[str, Array],
    ) -> None:
        self.found = found
        self.nodes = found.graph.ops
        self.kept = kept
        self.model = model
        self.editor = editor
        self.copies = copies
        self.absorbed = absorbed
        self.forms: dict[tuple[str, tuple[int, ...]], ir.Value] = {}

    def run(self) -> None:
        for number, ports in self.found.dropped.items():
            _keep_operands(self.copies[number], ports)
        for number in sorted(self.found.live | self.found.folded):
            self._keep_results(number)
        live = sorted(self.found.live)
        self._feed({number: self._entering(number) for number in live})
        for node in reversed(list(self.model.graph)):
            if not any(v.uses() or v.is_graph_output() for v in node.outputs):
                self.model.graph.remove(node, safe=True)
        for number in live:
            if self.found.passes(number):
                self.editor.bypass(self.copies[number], 0)
        for number in live:
            self._tidy(self.copies[number])
        for form in self.forms.values():
            if not form.uses():
                del self.model.graph.initializers[form.name or ""]
        made = [v.name or "" for v in self.forms.values() if v.uses() and _is_float(v)]
        add_constant_names(self.model, made)

    def _keep_results(self, number: int) -> None:
        """Leave a node without its empty results, where there are others."""
        node = self.copies[number]
        left = [v for v in node.outputs if v.name and v.name not in self.found.empty]
        if len(left) < len([v for v in node.outputs if v.name]):
            self.copies[number] = self.editor.replace(
                node,
                node.op_type,
                list(node.inputs),
                node.attributes.values(),
                results=left,
                domain=node.domain,
            )

    # -- constants ----------------------------------------------------------------------------

    def _entering(self, number: int) -> list[int]:
        """Operands of a node that have become constant, as places in its copy."""
        inputs = enumerate(self.copies[number].inputs)
        return [i for i, v in inputs if v is not None and v.name in self.found.constant]

    def _feed(self, entering: Mapping[int, Sequence[int]]) -> None:
        """Give every node that stays the constants that it reads."""
        values = {
            value.name or "": value
            for number, places in entering.items()
            for value in (self.copies[number].inputs[i] for i in places)
            if value is not None
        }
        inside = {v: None for number in self.found.live for v in self.nodes[number].captured}
        for name in inside:
            if name in self.found.constant:
                raise UnsupportedError(
                    f"value '{escape(name)}' would be constant, and is read inside of a subgraph; "
                    "keep a channel of what makes it"
                )
        arrays = self._compute(list(values))
        for number, places in entering.items():
            for i in places:
                value = self.copies[number].inputs[i]
                assert value is not None
                form = self._form(number, i, value, arrays[value.name or ""])
                self.copies[number].replace_input_with(i, form)

    def _compute(self, wanted: Sequence[str]) -> dict[str, Array]:
        """Values of constants, in their new size."""
        zeros = {
            name for number in self.found.bias_only for name in result_names(self.nodes[number])
        }
        makers = nodes_by_result(self.model)
        inner = needed_for(wanted, makers, zeros)
        read = {v.name for name in inner for v in makers[name].inputs if v is not None}
        arrays = self._from_zeros([name for name in sorted(zeros) if name in read | set(wanted)])
        rest = [name for name in wanted if name not in arrays]
        return arrays | evaluate(rest, arrays, self.model)

    def _from_zeros(self, wanted: Sequence[str]) -> dict[str, Array]:
        """What nodes that sum over nothing give, from a run at their original size on zeros."""
        graph = self.found.graph
        makers = nodes_by_result(graph.model)
        zeros = {
            value.name or "": np.zeros(static_shape(value), _dtype(value))
            for name in wanted
            for value in makers[name].inputs
            if value is not None and value.name in self.found.empty
        }
        results = evaluate(wanted, zeros, graph.model)
        for name, array in results.items():
            for axis in range(array.ndim):
                stays = self.kept.axis(name, axis)
                if stays is not None:
                    array = np.take(array, stays, axis=axis)
            results[name] = array + self.absorbed.get(name, np.zeros((), array.dtype))
        return results

    def _form(self, number: int, place: int, value: ir.Value, array: Array) -> ir.Value:
        """The constant as a node reads it: as small as broadcasting allows."""
        shared = self._broadcast_axes(number, place)
        flat = tuple(a for a in range(array.ndim) if a in shared and _is_flat(array, a))
        assert value.shape is not None
        open_axes = [a for a, dim in enumerate(value.shape) if not isinstance(dim, int)]
        repeated = [axis for axis in open_axes if axis not in flat]
        key = (value.name or "", (*flat, -1, *repeated))
        if key not in self.forms:
            for axis in (*flat, *repeated):
                if not _is_flat(array, axis):
                    raise UnsupportedError(
                        f"value '{escape(value.name or '')}' would be constant, but not the same "
                        "for every sample; give --input-shape for a fixed batch"
                    )
                array = array.take([0], axis=axis)
            self.forms[key] = self._initializer(value, array)
        form = self.forms[key]
        return self._repeat(number, place, value, form) if repeated else form

    def _broadcast_axes(self, number: int, place: int) -> frozenset[int]:
        """Axes of a node's operand that may have size 1, since another operand has the full one."""
        node = self.nodes[number]
        gone = self.found.dropped.get(number, ())
        port = [p for p in range(len(node.ir.inputs)) if p not in gone][place]
        couplings = self.found.graph.couplings
        full = {
            edge.factor
            for edge in self.found.graph.edges_of(number)
            if edge.port >= 0 and couplings.dims[edge.dim].value not in self.found.constant
        }
        free = {factor for name, factor in node.factors.items() if name in node.broadcast}
        return frozenset(
            couplings.dims[edge.dim].axis
            for edge in self.found.graph.edges_of(number)
            if edge.port == port and edge.factor in full & free
        )

    def _initializer(self, like: ir.Value, array: Array) -> ir.Value:
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=like.dtype)
        if any(name == like.name for name, _ in self.forms):
            return self.editor.constant(like.name or "", tensor)
        return self.editor.constant_for(like, tensor)

    def _repeat(self, number: int, place: int, value: ir.Value, form: ir.Value) -> ir.Value:
        """The constant once per sample, for a reader that does not broadcast."""
        node = self.copies[number]
        assert value.shape is not None
        name = f"{node.name}_{place}_{form.name}"
        sizes = batched_sizes(self.editor, node, name, value.shape)
        if sizes is None:
            raise UnsupportedError(
                f"node '{escape(node.name or '')}' ({escape(node.op_type)}): would read a constant "
                "whose size depends on the batch; give --input-shape for a fixed one"
            )
        name += "_repeated"
        return self.editor.insert(
            "Expand", [form, sizes], name=name, result=name, like=value, before=node
        )

    # -- sums ---------------------------------------------------------------------------------

    def _tidy(self, node: ir.Node) -> None:
        """Drop a constant from a sum where it is zero, or an operator before it can add it."""
        if not facts_of(node).adds or node.graph is None:
            return
        made = set(self.forms.values())
        size = static_shape(node.outputs[0])
        for place in reversed(range(len(node.inputs))):
            constant = node.inputs[place]
            others = [v for k, v in enumerate(node.inputs) if v is not None and k != place]
            whole = any(static_shape(value) == size for value in others)
            if constant is None or constant not in made or not whole:
                continue
            array = array_of(constant)
            if array.any() and (len(others) > 1 or not self._shifted(others[0], array, made)):
                continue
            if len(others) == 1:
                self.editor.bypass(node, 1 - place)
                return
            _keep_operands(node, [place])

    def _shifted(self, value: ir.Value, array: Array, made: set[ir.Value]) -> bool:
        """Let the node that makes a value add a constant, if it alone is concerned."""
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return False
        if not facts_of(node).adds:
            return add_to_bias(node, array)
        sums = [v for v in node.inputs if v is not None and v in made and len(v.uses()) == 1]
        if not sums:
            return False
        replace_array(sums[0], array_of(sums[0]) + array)
        return True


def _keep_operands(node: ir.Node, without: Sequence[int]) -> None:
    left = [value for port, value in enumerate(node.inputs) if port not in without]
    for port, value in enumerate(left):
        node.replace_input_with(port, value)
    node.resize_inputs(len(left))


def _is_flat(array: Array, axis: int) -> bool:
    """Whether an array does not vary along an axis."""
    return bool(np.array_equal(array, np.broadcast_to(array.take([0], axis=axis), array.shape)))


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _dtype(value: ir.Value) -> np.dtype[Any]:
    return np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
