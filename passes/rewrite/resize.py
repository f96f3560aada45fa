"""Pass ``resize``: the same network in another size.

Every axis of every value keeps the positions whose channels stay. Initializers are sliced, shapes
follow, and each operator's entry updates the attributes and constants that hold sizes. The model
given is not changed; weights are shared with it until they are sliced.

A channel that is added is a copy of the last one of its group that stays: wherever that one stands,
the copy stands behind it, so that products of axes, segments and shuffles keep their order. The
kernels that make it are drawn at random, and the kernels that read it are zero there: the network
computes what it computed before, and training can begin to use the new channels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.edit import Editor, replace_array, reshape
from morphgraph.errors import PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import add_constant_names, escape, static_shape
from morphgraph.onnx_io.mapped import StoredTensor, is_stored, take
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.channel_sources import kernels, readers
from morphgraph.passes.analysis.liveness import Liveness, liveness, require_viable, result_names
from morphgraph.passes.analysis.selection import AxisSelection as AxisSelection
from morphgraph.passes.rewrite.absorb import Absorbed, nothing_absorbed
from morphgraph.passes.rewrite.placement import add_constant
from morphgraph.passes.rewrite.vanish import vanish


def resize(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    added: Mapping[int, int] | None = None,
    seed: int = 0,
    absorbed: Absorbed | None = None,
) -> ir.Model:
    """Remove the channels that a plan does not keep, and add those that it adds.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        added: per group index the number of channels that are added.
        seed: of the kernels that make the added channels.
        absorbed: what removed constants contribute to what stays, to be added there.

    Returns:
        A new model. Nodes, values and initializers keep their names.

    Raises:
        PlanError: groups keep no channel, and nothing would be left; or a group cannot grow.
    """
    return _Resizer(graph, keep, added or {}, seed, absorbed or nothing_absorbed(graph)).run()


class _Resizer:
    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        added: Mapping[int, int],
        seed: int,
        absorbed: Absorbed,
    ) -> None:
        self.graph = graph
        self.absorbed = absorbed
        self.grows = bool(added)
        self.generator = np.random.default_rng(seed)
        self.kept = AxisSelection(graph, keep, added)
        if ungrowable := self.kept.ungrowable(added):
            groups = [graph.groups[index] for index in sorted(ungrowable)]
            names = ", ".join(f"{group.id} '{escape(group.name)}'" for group in groups)
            raise PlanError(
                f"{names} cannot grow: some operator would take the added channels for others; "
                "leave out 'new'"
            )
        self.model = graph.model.clone()
        self.model.meta.update(graph.model.meta)
        self.editor = Editor(self.model)

    def run(self) -> ir.Model:
        require_viable(self.graph, sorted(self.kept.dead))
        found = liveness(self.graph, self.kept.dead)
        used_before = {v.name for v in self.model.graph.initializers.values() if v.uses()}
        pairs = list(zip(self.graph.ops, list(self.model.graph), strict=True))
        for value in self.model.graph.initializers.values():
            self._slice(value)
        if self.grows:
            self._start_added()
        for value in self.model.graph.inputs:
            self._reshape(value)
        for _, copy in pairs:
            for value in copy.outputs:
                if value.name:  # a result that nobody wants has none
                    self._reshape(value)
        copies = [self._resized(number, copy, found) for number, (_, copy) in enumerate(pairs)]
        left_over = self._absorb(found, copies)
        if self.kept.dead:
            vanish(found, self.kept, self.model, self.editor, copies, left_over)
        initializers = self.model.graph.initializers
        for name, value in list(initializers.items()):
            if name in used_before and not value.uses() and not value.is_graph_output():
                del initializers[name]
        return self.model

    def _absorb(self, found: Liveness, copies: Sequence[ir.Node]) -> dict[str, Array]:
        """Add what removed constants contribute; by value, what nodes that go would get of it."""
        left_over: dict[str, Array] = {}
        made: list[ir.Value] = []
        for number, given in self.absorbed.contributions.items():
            (result,) = result_names(self.graph.ops[number])
            for axis in range(given.ndim):
                stays = self.kept.axis(result, axis)
                given = given if stays is None else np.take(given, stays, axis=axis)
            if number in found.bias_only:
                left_over[result] = given
            elif given.size and (not self.kept.dead or number in found.live | found.folded):
                free = self.absorbed.free[number]
                made += add_constant(self.editor, copies[number], given, free)
        if made:
            add_constant_names(self.model, [value.name or "" for value in made])
        self.absorbed.note_in(self.model)
        return left_over

    def _resized(self, number: int, copy: ir.Node, found: Liveness) -> ir.Node:
        """The node's copy, or the one in its place, with attributes and constants that fit."""
        node = self.graph.ops[number]
        entry = facts_of(node.ir)
        computes = not self.kept.dead or number in found.live | found.folded
        if entry.resize is None or node.opaque is not None or not computes:
            return copy
        view = NodeResizing(self.kept, self.editor, node.ir, copy, node.factors)
        entry.call(entry.resize, node.ir, view.original, view)
        return view.copy

    def _slice(self, value: ir.Value) -> None:
        tensor = value.const_value
        cuts = [
            (axis, kept)
            for axis in range(len(static_shape(value)))
            if (kept := self.kept.axis(value.name or "", axis)) is not None
        ]
        if not cuts or tensor is None:
            return
        if is_stored(tensor):
            value.const_value = StoredTensor(tensor, cuts, name=value.name or "")
        else:
            array = take(tensor.numpy(), cuts)
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
        self._reshape(value)

    def _start_added(self) -> None:
        """Draw the kernels that make added channels, and silence those that read them."""
        for sources, silent in ((kernels(self.graph), False), (readers(self.graph), True)):
            for source in sources:
                fresh = self.kept.fresh(source.parameter, source.axis)
                value = self.model.graph.initializers[source.parameter]
                if not len(fresh) or value.const_value is None:
                    continue
                array = np.array(value.const_value.numpy())
                rows = np.moveaxis(array, source.axis, 0)
                shape = (len(fresh), *rows.shape[1:])
                spread = 0.0 if silent or not array.size else float(array.std(dtype=np.float64))
                rows[fresh] = self.generator.standard_normal(shape) * spread
                value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)

    def _reshape(self, value: ir.Value) -> None:
        """Give a value its new shape; symbolic dims stay symbolic."""
        new = self.kept.shape(value)
        if new != static_shape(value):
            reshape(value, new)


class NodeResizing:
    """What an operator's ``resize`` sees of one node (see ``morphgraph.ops.Resizing``)."""

    def __init__(
        self,
        kept: AxisSelection,
        editor: Editor,
        node: ir.Node,
        copy: ir.Node,
        factors: Mapping[str, int],
    ) -> None:
        from morphgraph.ops import OpNode

        self.original = OpNode(node)
        self._kept = kept
        self._editor = editor
        self._node = node
        self.copy = copy
        self._factors = factors

    def _value(self, port: int) -> ir.Value:
        value = self._node.inputs[port] if port >= 0 else self._node.outputs[~port]
        assert value is not None
        return value

    def kept(self, port: int, axis: int) -> IntArray:
        """Old positions that stay on an axis, in the new order; a new one repeats its model."""
        value = self._value(port)
        kept = self._kept.axis(value.name or "", axis)
        return np.arange(static_shape(value)[axis]) if kept is None else kept

    def shape(self, port: int) -> Shape:
        """The new static shape of an operand or result."""
        return self._kept.shape(self._value(port))

    def size(self, factor: str) -> int:
        """The new size of a factor."""
        number = self._factors[factor]
        kept = self._kept.vertex(number)
        return int(self._kept.graph.couplings.sizes[number]) if kept is None else len(kept)

    def set_attribute(self, name: str, value: float | Sequence[int]) -> None:
        """Change an attribute; integers and floats are told apart by their type."""
        if isinstance(value, float):
            self.copy.attributes[name] = ir.AttrFloat32(name, value)
        elif isinstance(value, int):
            self.copy.attributes[name] = ir.AttrInt64(name, value)
        else:
            self.copy.attributes[name] = ir.AttrInt64s(name, value)

    def remove_attribute(self, name: str) -> None:
        """Drop an attribute, if it is there."""
        self.copy.attributes.pop(name, None)

    def set_constant(self, i: int, value: Array) -> None:
        """Give an operand a constant; other readers of its old one keep that."""
        if i >= len(self.copy.inputs):
            self.copy.resize_inputs(i + 1)
        old = self.copy.inputs[i]
        if old is None:
            new = self._editor.constant(f"{self.copy.name}_{i}", value)
            self.copy.replace_input_with(i, new)
            return
        assert old.const_value is not None
        if np.array_equal(old.const_value.numpy(), value):
            return
        array = value.astype(old.const_value.numpy().dtype)
        if len(old.uses()) == 1 and not old.is_graph_output():
            replace_array(old, array)
            return
        new = self._editor.constant(f"{old.name}_{self.copy.name}", array)
        self.copy.replace_input_with(i, new)

    def set_piece(self, i: int, k: int, number: int) -> None:
        """Change constant ``k`` of those that a Concat joins into operand ``i``."""
        joined = self.copy.inputs[i]
        maker = None if joined is None else joined.producer()
        assert maker is not None
        old = maker.inputs[k]
        assert old is not None
        assert old.const_value is not None
        if old.const_value.numpy()[0] != number:
            new = self._editor.sizes(f"{old.name}_{maker.name}", [number])
            maker.replace_input_with(k, new)

    def become_gather(self, axis: int, indices: IntArray) -> None:
        """Turn the node into a Gather of its first operand."""
        operands = [self.copy.inputs[0], self._positions(indices)]
        self.copy = self._editor.replace(self.copy, "Gather", operands, {"axis": axis})

    def gather_first(self, axis: int, indices: IntArray) -> None:
        """Give the node a Gather of its first operand to read instead of that."""
        old = self.copy.inputs[0]
        assert old is not None
        name = f"{self.copy.name}_gathered"
        gathered = self._editor.insert(
            "Gather",
            [old, self._positions(indices)],
            {"axis": axis},
            name=name,
            result=name,
            like=old,
            sizes={axis: len(indices)},
            before=self.copy,
            metadata=self.copy.metadata_props,
        )
        self.copy.replace_input_with(0, gathered)

    def _positions(self, indices: IntArray) -> ir.Value:
        return self._editor.constant(f"{self.copy.name}_kept", indices.astype(np.int64))
