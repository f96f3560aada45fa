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

from morphgraph.arrays import Array, IntArray
from morphgraph.edit import Editor, like_tensor, reshape
from morphgraph.errors import PlanError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import (
    CANONICAL_KEY,
    COPIES_KEY,
    ORIGINAL_KEY,
    add_constant_names,
    escape,
    keep_known_names,
    node_label,
    static_shape,
)
from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.mapped import StoredTensor, is_stored, take
from morphgraph.ops import OpNode, Resizing, facts_of
from morphgraph.passes.analysis.channel_sources import kernels, readers
from morphgraph.passes.analysis.liveness import liveness, require_viable, result_names
from morphgraph.passes.analysis.selection import AxisSelection as AxisSelection
from morphgraph.passes.canonical.declared import restore_declared
from morphgraph.passes.canonical.restore import restore
from morphgraph.passes.canonical.untie import merge_copies
from morphgraph.passes.rewrite.absorb import Absorbed, nothing_absorbed
from morphgraph.passes.rewrite.bias import add_constant
from morphgraph.passes.rewrite.vanish import vanish


def resize(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    added: Mapping[int, int] | None = None,
    seed: int = 0,
    absorbed: Absorbed | None = None,
    restored: bool = True,
) -> ir.Model:
    """Remove the channels that a plan does not keep, and add those that it adds.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        added: per group index the number of channels that are added.
        seed: of the kernels that make the added channels.
        absorbed: what removed constants contribute to what stays, to be added there.
        restored: whether the result is as the user's model was written; else it is canonical.

    Returns:
        A new model. Nodes, values and initializers keep their names.

    Raises:
        PlanError: groups keep no channel, and nothing would be left; or a group cannot grow.
    """
    resizer = _Resizer(graph, keep, added or {}, seed, absorbed or nothing_absorbed(graph))
    return resizer.run(restored)


def restore_names(
    graph: ChannelGraph, keep: Mapping[int, IntArray], small: ir.Model, editor: Editor
) -> None:
    """Write a canonical resized model as the user's was written, in place."""
    _as_written(graph, AxisSelection(graph, keep), small, editor)


def _as_written(
    graph: ChannelGraph, selection: AxisSelection, small: ir.Model, editor: Editor
) -> None:
    changed = restore(graph.model, small, selection.cuts, editor)
    if merge_copies(small) or changed:
        small.meta.pop(CANONICAL_KEY, None)
    for key in (COPIES_KEY, ORIGINAL_KEY):
        small.meta.pop(key, None)
    keep_known_names(small)
    restore_declared(small, lambda value, axis: selection.axis(value, axis) is None)


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
        self.selection = AxisSelection(graph, keep, added)
        if ungrowable := self.selection.ungrowable(added):
            groups = [graph.groups[index] for index in sorted(ungrowable)]
            names = ", ".join(f"{group.id} '{escape(group.name)}'" for group in groups)
            raise PlanError(
                f"{names} cannot grow: some operator would take the added channels for others; "
                "leave out 'new'"
            )
        require_viable(graph, sorted(self.selection.dead))
        self.liveness = liveness(graph, self.selection.dead)
        self.model = copied(graph.model)
        self.model.meta.update(graph.model.meta)
        self.editor = Editor(self.model)

    def run(self, restored: bool) -> ir.Model:
        initializers = self.model.graph.initializers
        used_before = {value.name for value in initializers.values() if value.uses()}
        copies = list(self.model.graph)
        for value in initializers.values():
            self._slice(value)
        if self.grows:
            self._start_added()
        results = [value for copy in copies for value in copy.outputs]
        for value in (*self.model.graph.inputs, *results):
            if value.name:  # a result that nobody wants has none
                self._reshape(value)
        copies = [self._resized(op_index, copy) for op_index, copy in enumerate(copies)]
        to_constants = self._absorb(copies)
        if self.selection.dead:
            vanish(self.liveness, self.selection, self.model, self.editor, copies, to_constants)
        for name, value in list(initializers.items()):
            if name in used_before and not value.uses() and not value.is_graph_output():
                del initializers[name]
        if restored:
            _as_written(self.graph, self.selection, self.model, self.editor)
        return self.model

    def _slice(self, value: ir.Value) -> None:
        """Give an initializer the positions that stay; a stored one is sliced when it is read."""
        tensor = value.const_value
        cuts = self.selection.cuts(value.name or "")
        if not cuts or tensor is None:
            return
        if is_stored(tensor):
            value.const_value = StoredTensor(tensor, cuts, name=value.name or "")
        else:
            array = take(tensor.numpy(), cuts)
            value.const_value = like_tensor(tensor, array)
        self._reshape(value)

    def _reshape(self, value: ir.Value) -> None:
        """Give a value its new shape; symbolic dims stay symbolic."""
        shape = self.selection.shape(value)
        if shape != static_shape(value):
            reshape(value, shape)

    def _start_added(self) -> None:
        """Draw the kernels that make added channels, and silence those that read them."""
        for sources, silent in ((kernels(self.graph), False), (readers(self.graph), True)):
            for source in sources:
                fresh = self.selection.fresh(source.parameter, source.axis)
                value = self.model.graph.initializers[source.parameter]
                if not len(fresh) or value.const_value is None:
                    continue
                array = np.array(value.const_value.numpy())
                rows = np.moveaxis(array, source.axis, 0)
                shape = (len(fresh), *rows.shape[1:])
                spread = 0.0 if silent or not array.size else float(array.std(dtype=np.float64))
                rows[fresh] = self.generator.standard_normal(shape) * spread
                value.const_value = like_tensor(value.const_value, array)

    def _computes(self, op_index: int) -> bool:
        """Whether a node still has something to compute, be it a constant."""
        return not self.selection.dead or op_index in self.liveness.live | self.liveness.folded

    def _resized(self, op_index: int, copy: ir.Node) -> ir.Node:
        """The node's copy, or the one in its place, with attributes and constants that fit."""
        op = self.graph.ops[op_index]
        entry = facts_of(op.ir)
        if entry.resize is None or op.opaque or not self._computes(op_index):
            return copy
        resizing = Resizing(
            self.editor,
            op.ir,
            copy,
            self.selection.axis,
            lambda factor: self._size(op.factors[factor]),
            lambda factor: op.factors[factor] in self.graph.couplings.followers,
        )
        entry.call(entry.resize, op.ir, OpNode(op.ir), resizing)
        return resizing.copy

    def _size(self, vertex: int) -> int:
        positions = self.selection.vertex(vertex)
        return int(self.graph.couplings.sizes[vertex]) if positions is None else len(positions)

    def _absorb(self, copies: Sequence[ir.Node]) -> dict[str, Array]:
        """Add what removed constants contribute to results that are still computed.

        Returns:
            By name what they contribute to results that become constants, which ``vanish`` makes.
        """
        to_constants: dict[str, Array] = {}
        new: list[str] = []
        for op_index, contribution in self.absorbed.contributions.items():
            (result,) = result_names(self.graph.ops[op_index])
            contribution = take(contribution, self.selection.cuts(result))
            if result in self.liveness.zero and contribution.any():
                raise UnsupportedError(
                    f"{node_label(copies[op_index])}: would have nothing left but what constants "
                    "contribute, beside other activations; keep a channel, or do not absorb"
                )
            if op_index in self.liveness.bias_only:
                to_constants[result] = contribution
            elif contribution.size and self._computes(op_index):
                free = self.absorbed.free[op_index]
                constant = add_constant(self.editor, copies[op_index], contribution, free)
                if constant is not None:
                    new.append(constant.name or "")
        if new:
            add_constant_names(self.model, new)
        self.absorbed.note_in(self.model)
        return to_constants
