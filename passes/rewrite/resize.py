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
from morphgraph.edit import Editor, reshape
from morphgraph.errors import PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import add_constant_names, escape, static_shape
from morphgraph.onnx_io.mapped import StoredTensor, is_stored, take
from morphgraph.ops import OpNode, Resizing, entry_of
from morphgraph.passes.analysis.channel_sources import kernels, readers
from morphgraph.passes.analysis.liveness import Liveness, liveness, require_viable, result_names
from morphgraph.passes.analysis.selection import AxisSelection as AxisSelection
from morphgraph.passes.rewrite.absorb import Absorbed, nothing_absorbed
from morphgraph.passes.rewrite.bias import add_constant
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
        resizing = Resizing(
            self.editor,
            node.ir,
            copy,
            self.kept.axis,
            lambda factor: self._size(node.factors[factor]),
        )
        entry.call(entry.resize, node.ir, OpNode(node.ir), resizing)
        return resizing.copy

    def _size(self, vertex: int) -> int:
        stays = self.kept.vertex(vertex)
        return int(self.graph.couplings.sizes[vertex]) if stays is None else len(stays)

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
