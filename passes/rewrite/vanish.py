"""Pass ``vanish``: layers of width 0 are cut, and what they still contributed stays as a constant.

:mod:`morphgraph.passes.analysis.liveness` decides what goes; this pass, a step of ``resize``, takes
it out. A node that sums over nothing is run alone on zeros, at its original size; nodes that
compute with such constants alone are run at their new size. A constant that a remaining node reads
becomes an initializer named after the value that it replaces. It has size 1 along axes on which it
does not vary and which its reader broadcasts. Behind an operator with a bias of its own it moves
into that bias; zeros are not added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import (
    add_constant_names,
    dtype_of,
    escape,
    is_float,
    node_label,
    static_shape,
)
from morphgraph.onnx_io.mapped import take
from morphgraph.ops import OpNode, facts_of
from morphgraph.passes.analysis.evaluate import evaluate, needed_for, nodes_by_result
from morphgraph.passes.analysis.liveness import Liveness, result_names
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.dynamic_batch import batched_sizes
from morphgraph.passes.rewrite.bias import add_to_bias


def vanish(
    liveness: Liveness,
    selection: AxisSelection,
    model: ir.Model,
    editor: Editor,
    copies: Sequence[ir.Node],
    absorbed: Mapping[str, Array],
) -> None:
    """Cut what has gone out of a resized model, in place.

    Args:
        liveness: what stays and what goes.
        selection: the positions that stay on every axis.
        model: the model with its weights, shapes and attributes in their new size.
        editor: of that model.
        copies: its nodes, in the order of ``liveness.graph.ops``.
        absorbed: by name what removed constants add to values that become constant.

    Raises:
        UnsupportedError: ONNX Runtime cannot compute a constant, or it depends on the batch.
    """
    _Vanisher(liveness, selection, model, editor, list(copies), absorbed).run()


@dataclass
class _Vanisher:
    liveness: Liveness
    selection: AxisSelection
    model: ir.Model
    editor: Editor
    copies: list[ir.Node]
    absorbed: Mapping[str, Array]
    # Initializers that take the place of values, by the value's name and by the axes along which
    # they have size 1: several readers share one.
    constants: dict[tuple[str, tuple[int, ...]], ir.Value] = field(default_factory=dict)

    @property
    def graph(self) -> ChannelGraph:
        return self.liveness.graph

    def run(self) -> None:
        live = sorted(self.liveness.live)
        for op_index, ports in self.liveness.dropped.items():
            _remove_operands(self.copies[op_index], ports)
        for op_index in sorted(self.liveness.live | self.liveness.folded):
            self._remove_empty_results(op_index)
        self._remove_caches(live)
        self._feed({op_index: self._constant_operands(op_index) for op_index in live})
        for node in reversed(list(self.model.graph)):
            if not any(v.uses() or v.is_graph_output() for v in node.outputs):
                self.model.graph.remove(node, safe=True)
        for value in [v for v in self.model.graph.inputs if v.name in self.liveness.empty]:
            self.model.graph.inputs.remove(value)
        for op_index in live:
            if self.liveness.passes(op_index):
                self.editor.bypass(self.copies[op_index], 0)
        for op_index in live:
            self._tidy(self.copies[op_index])
        for constant in self.constants.values():
            if not constant.uses():
                del self.model.graph.initializers[constant.name or ""]
        used = [v.name or "" for v in self.constants.values() if v.uses() and is_float(v)]
        add_constant_names(self.model, used)

    def _remove_caches(self, live: Sequence[int]) -> None:
        """Take caches without heads off the inputs and outputs."""
        outputs = self.model.graph.outputs
        for value in [v for v in outputs if v.name in self.liveness.gone_outputs]:
            outputs.remove(value)
        inputs = {value.name or "": value for value in self.model.graph.inputs}
        staying = {self.copies[op_index] for op_index in live}
        for name in [name for name in inputs if name in self.liveness.empty]:
            for use in list(inputs[name].uses()):
                # Of what stays only those read it that ask how long it is.
                if use.node in staying:
                    other = self.liveness.stand_in(name)
                    assert other is not None
                    use.node.replace_input_with(use.idx, inputs[other])

    def _remove_empty_results(self, op_index: int) -> None:
        """Leave a node without its empty results, where there are others."""
        node = self.copies[op_index]
        named = [value for value in node.outputs if value.name]
        results = [value for value in named if value.name not in self.liveness.empty]
        if len(results) < len(named):
            self.copies[op_index] = self.editor.replace(
                node,
                node.op_type,
                list(node.inputs),
                node.attributes.values(),
                results=results,
                domain=node.domain,
            )

    # -- constants ----------------------------------------------------------------------------

    def _constant_operands(self, op_index: int) -> list[int]:
        """Ports of a node's copy whose operands have become constant."""
        inputs = enumerate(self.copies[op_index].inputs)
        return [i for i, v in inputs if v is not None and v.name in self.liveness.constant]

    def _feed(self, constant_operands: Mapping[int, Sequence[int]]) -> None:
        """Let every node that stays read initializers where its operands have become constant.

        Their numbers are computed before anything is replaced: that needs the nodes that go.
        """
        captured = {v: None for k in self.liveness.live for v in self.graph.ops[k].captured}
        for name in captured:
            if name in self.liveness.constant:
                raise UnsupportedError(
                    f"value '{escape(name)}' would be constant, and a subgraph reads it; keep a "
                    "channel of what makes it"
                )
        reads = [
            (op_index, port, value)
            for op_index, ports in constant_operands.items()
            for port in ports
            if (value := self.copies[op_index].inputs[port]) is not None
        ]
        arrays = self._compute(list(dict.fromkeys(value.name or "" for _, _, value in reads)))
        for op_index, port, value in reads:
            constant = self._constant(op_index, port, value, arrays[value.name or ""])
            self.copies[op_index].replace_input_with(port, constant)

    def _compute(self, wanted: Sequence[str]) -> dict[str, Array]:
        """Values of constants, in their new size.

        The first of them are what nodes that sum over nothing give: those have no operands in the
        resized model, and run in the original. What is computed from them runs in the resized one.
        """
        bias_only = {
            name for k in self.liveness.bias_only for name in result_names(self.graph.ops[k])
        }
        makers = nodes_by_result(self.model)
        zero = self.liveness.zero
        computed = needed_for(wanted, makers, bias_only | zero)
        operands = {v.name for name in computed for v in makers[name].inputs if v is not None}
        read = operands | set(wanted)
        arrays = self._bias_alone(sorted((bias_only - zero) & read))
        for name in sorted(zero & read):
            (value,) = (v for v in makers[name].outputs if v.name == name)
            arrays[name] = np.zeros(static_shape(value), dtype_of(value))
        rest = [name for name in wanted if name not in arrays]
        # Of the inputs at most the sizes count.
        inputs = {
            value.name or "": np.zeros(static_shape(value), dtype_of(value))
            for value in self.model.graph.inputs
            if rest and value.name not in self.liveness.empty
        }
        return arrays | evaluate(rest, inputs | arrays, self.model)

    def _bias_alone(self, wanted: Sequence[str]) -> dict[str, Array]:
        """What nodes that sum over nothing give, from a run at their original size on zeros."""
        makers = nodes_by_result(self.graph.model)
        zeros = {
            value.name or "": np.zeros(static_shape(value), dtype_of(value))
            for name in wanted
            for value in makers[name].inputs
            if value is not None and value.name in self.liveness.empty
        }
        results = evaluate(wanted, zeros, self.graph.model)
        return {
            name: take(array, self.selection.cuts(name))
            + self.absorbed.get(name, np.zeros((), array.dtype))
            for name, array in results.items()
        }

    def _constant(self, op_index: int, port: int, value: ir.Value, array: Array) -> ir.Value:
        """The constant as a node reads it: as small as broadcasting allows.

        Along an axis of open size (the batch) an initializer cannot have the full size. There it
        has size 1 in any case, and what no reader broadcasts is repeated in the model.
        """
        assert value.shape is not None
        broadcast = self._broadcast_axes(op_index, port)
        flat = [a for a in range(array.ndim) if a in broadcast and _is_flat(array, a)]
        open_axes = [a for a, size in enumerate(value.shape) if not isinstance(size, int)]
        repeated = [axis for axis in open_axes if axis not in flat]
        key = (value.name or "", (*flat, -1, *repeated))
        if key not in self.constants:
            for axis in (*flat, *repeated):
                if not _is_flat(array, axis):
                    raise UnsupportedError(
                        f"value '{escape(value.name or '')}' would be constant, but not the same "
                        "for every sample; give --input-shape for a fixed batch"
                    )
                array = array.take([0], axis=axis)
            self.constants[key] = self._initializer(value, array)
        constant = self.constants[key]
        return self._repeat(op_index, port, value, constant) if repeated else constant

    def _broadcast_axes(self, op_index: int, port: int) -> frozenset[int]:
        """Axes of a node's operand that may have size 1, since another operand has the full one."""
        op = self.graph.ops[op_index]
        couplings = self.graph.couplings
        # The copy has lost operands, so that its ports are not those of the edges.
        dropped = self.liveness.dropped.get(op_index, ())
        original_port = [p for p in range(len(op.ir.inputs)) if p not in dropped][port]
        edges = self.graph.edges_of(op_index)
        full = {
            edge.factor
            for edge in edges
            if edge.port >= 0 and couplings.dims[edge.dim].value not in self.liveness.constant
        }
        free = {factor for name, factor in op.factors.items() if name in op.broadcast}
        return frozenset(
            couplings.dims[edge.dim].axis
            for edge in edges
            if edge.port == original_port and edge.factor in full & free
        )

    def _initializer(self, value: ir.Value, array: Array) -> ir.Value:
        """A constant under the name of the value that it replaces; only the first can have it."""
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=value.dtype)
        if any(name == value.name for name, _ in self.constants):
            return self.editor.constant(value.name or "", tensor)
        return self.editor.constant_for(value, tensor)

    def _repeat(self, op_index: int, port: int, value: ir.Value, constant: ir.Value) -> ir.Value:
        """The constant once per sample, for a reader that does not broadcast."""
        node = self.copies[op_index]
        assert value.shape is not None
        name = f"{node.name}_{port}_{constant.name}"
        sizes = batched_sizes(self.editor, node, name, value.shape)
        if sizes is None:
            raise UnsupportedError(
                f"{node_label(node)}: would read a constant whose size depends on the batch; give "
                "--input-shape for a fixed one"
            )
        name += "_repeated"
        return self.editor.insert(
            "Expand", [constant, sizes], name=name, result=name, like=value, before=node
        )

    # -- sums ---------------------------------------------------------------------------------

    def _tidy(self, node: ir.Node) -> None:
        """Drop a constant from a sum where it is zero, or an operator before it can add it."""
        if node.graph is None:
            return
        if facts_of(node).after_sum is not None:
            self._take_apart(node)
        if not facts_of(node).adds:
            return
        constants = set(self.constants.values())
        shape = static_shape(node.outputs[0])
        for port in reversed(range(len(node.inputs))):  # so that ports before it stay what they are
            constant = node.inputs[port]
            others = [v for k, v in enumerate(node.inputs) if v is not None and k != port]
            # Without the constant the others alone must make the result's shape.
            whole = any(static_shape(value) == shape for value in others)
            if constant is None or constant not in constants or not whole:
                continue
            array = array_of(constant)
            if array.any() and (
                len(others) > 1 or not self._add_upstream(others[0], array, constants)
            ):
                continue
            if len(others) == 1:
                self.editor.bypass(node, 1 - port)
                return
            _remove_operands(node, [port])

    def _take_apart(self, node: ir.Node) -> None:
        """Let a sum of which one operand is constant be a sum by itself, or nothing at all.

        What is fused with a sum may ask for operands of one shape; and it would add zeros.
        """
        entry = facts_of(node)
        assert entry.after_sum is not None
        after = entry.call(entry.after_sum, node, OpNode(node))
        constants = set(self.constants.values())
        summands = [node.inputs[port] for port in entry.summands]
        left = [value for value in summands if value is not None and value not in constants]
        result = node.outputs[0]
        if after is None or len(left) != 1 or any(v.is_graph_output() for v in node.outputs[1:]):
            return
        (total,) = left
        terms = [v for v in summands if v is not None and v in constants and array_of(v).any()]
        if len(node.inputs) > after.bias and (bias := node.inputs[after.bias]) is not None:
            terms.append(bias)
        name = f"{node.name}_sum"
        for term in terms:
            total = self.editor.insert(
                "Add", [total, term], name=name, result=name, like=result, before=node
            )
        if len(node.outputs) > after.total:
            node.outputs[after.total].replace_all_uses_with(total)
        further = [node.inputs[k] for k in after.operands if k < len(node.inputs)]
        made = {a.name: a for a in ir.convenience.convert_attributes(after.attributes)}
        attributes = (made | dict(node.attributes)).values()
        self.editor.replace(node, after.op_type, [total, *further], attributes, results=[result])

    def _add_upstream(self, value: ir.Value, array: Array, constants: set[ir.Value]) -> bool:
        """Let the node that makes a value add a constant, if nobody else reads that value."""
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return False
        if not facts_of(node).adds:
            return add_to_bias(node, array)
        # A sum with another of these constants: one holds both.
        terms = [v for v in node.inputs if v is not None and v in constants and len(v.uses()) == 1]
        if not terms:
            return False
        replace_array(terms[0], array_of(terms[0]) + array)
        return True


def _remove_operands(node: ir.Node, ports: Sequence[int]) -> None:
    operands = [value for port, value in enumerate(node.inputs) if port not in ports]
    for port, value in enumerate(operands):
        node.replace_input_with(port, value)
    node.resize_inputs(len(operands))


def _is_flat(array: Array, axis: int) -> bool:
    """Whether an array does not vary along an axis."""
    return bool(np.array_equal(array, np.broadcast_to(array.take([0], axis=axis), array.shape)))
