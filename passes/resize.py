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
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.graph import ChannelGraph, IntArray
from morphgraph.notation import Shape
from morphgraph.onnx_io import static_shape
from morphgraph.ops import entry_of
from morphgraph.passes.score import kernels, readers
from morphgraph.stored import StoredTensor, is_stored, take


def resize(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    added: Mapping[int, int] | None = None,
    seed: int = 0,
) -> ir.Model:
    """Remove the channels that a plan does not keep, and add those that it adds.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        added: per group index the number of channels that are added.
        seed: of the kernels that make the added channels.

    Returns:
        A new model. Nodes, values and initializers keep their names.
    """
    return _Resizer(graph, keep, added or {}, seed).run()


class Kept:
    """Which positions of every axis stay, given the channels that stay and those that are added."""

    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        added: Mapping[int, int] | None = None,
    ) -> None:
        self.graph = graph
        alive = graph.alive(keep)
        atom_alive = alive[graph.atom_channel]
        dead = np.flatnonzero(~atom_alive)
        owners = np.searchsorted(graph.class_start, dead, side="right") - 1
        self._changed = {
            int(kind): np.flatnonzero(
                atom_alive[graph.class_start[kind] : graph.class_start[kind + 1]]
            )
            for kind in np.unique(owners)
        }
        self._fresh: dict[int, IntArray] = {}
        for index, count in (added or {}).items():
            group = graph.groups[index]
            template = group.channels[keep[index][-1] if index in keep else -1]
            column = graph.per_channel.tocsc()[:, [index]].indices
            for kind in column:
                self._grow(int(kind), int(template), count)

    def _grow(self, kind: int, template: int, count: int) -> None:
        """Put copies of a channel behind every run of positions that it has in a class."""
        start, stop = self.graph.class_start[kind : kind + 2]
        positions = self._changed.get(kind, np.arange(stop - start))
        fresh = self._fresh.get(kind, np.zeros(len(positions), dtype=np.int64))
        mine = np.flatnonzero((self.graph.atom_channel[start:stop] == template)[positions])
        ends = np.flatnonzero(np.diff(positions[mine], append=-2) != 1)
        order = np.arange(len(positions))
        marks = np.zeros(len(positions), dtype=np.int64)
        pieces, flags, before, first = [], [], 0, 0
        for end in ends:
            run = mine[first : end + 1]
            pieces += [order[before : run[-1] + 1], np.tile(run, count)]
            flags += [marks[before : run[-1] + 1], np.ones(len(run) * count, dtype=np.int64)]
            before, first = int(run[-1]) + 1, int(end) + 1
        taken = np.concatenate([*pieces, order[before:]])
        is_new = np.concatenate([*flags, marks[before:]])
        self._changed[kind] = positions[taken]
        self._fresh[kind] = np.maximum(fresh[taken], is_new)

    def fresh(self, value: str, axis: int) -> IntArray:
        """New positions of an axis that belong to added channels, ascending."""
        kind = int(self.graph.node_class[self.graph.dim(value, axis)])
        return np.flatnonzero(self._fresh.get(kind, ()))

    def node(self, node: int) -> IntArray | None:
        """Kept positions of a dim or elements of a factor; ``None``: all."""
        return self._changed.get(int(self.graph.node_class[node]))

    def axis(self, value: str, axis: int) -> IntArray | None:
        """Kept positions of an axis of a value; ``None``: all."""
        first = self.graph.couplings.first_dim.get(value)
        return None if first is None else self.node(first + axis)

    def shape(self, value: ir.Value) -> Shape:
        """The new static shape of a value."""
        return tuple(
            size if (kept := self.axis(value.name or "", axis)) is None else len(kept)
            for axis, size in enumerate(static_shape(value))
        )


class _Resizer:
    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        added: Mapping[int, int],
        seed: int,
    ) -> None:
        self.graph = graph
        self.grows = bool(added)
        self.generator = np.random.default_rng(seed)
        self.kept = Kept(graph, keep, added)
        self.model = graph.model.clone()
        self.model.meta.update(graph.model.meta)

    def run(self) -> ir.Model:
        used_before = {v.name for v in self.model.graph.initializers.values() if v.uses()}
        pairs = list(zip(self.graph.nodes, list(self.model.graph), strict=True))
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
        for node, copy in pairs:
            entry = entry_of(node.ir.op_type, node.ir.domain)
            if entry is not None and entry.resize is not None and node.opaque is None:
                view = NodeResizing(self.kept, node.ir, copy, node.factors)
                entry.call(entry.resize, node.ir, view.original, view)
        initializers = self.model.graph.initializers
        for name, value in list(initializers.items()):
            if name in used_before and not value.uses() and not value.is_graph_output():
                del initializers[name]
        return self.model

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
                spread = 0.0 if silent else float(array.std(dtype=np.float64))
                rows[fresh] = self.generator.standard_normal(shape) * spread
                value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)

    def _reshape(self, value: ir.Value) -> None:
        """Give a value its new shape; symbolic dims stay symbolic."""
        new = self.kept.shape(value)
        if new == static_shape(value):
            return
        old = value.shape
        assert old is not None
        value.shape = ir.Shape(
            [size if isinstance(dim, int) else dim for dim, size in zip(old.dims, new, strict=True)]
        )
        if "static_shape" in value.meta:
            value.meta["static_shape"] = new


class NodeResizing:
    """What an operator's ``resize`` sees of one node (see ``morphgraph.ops.Resizing``)."""

    def __init__(
        self, kept: Kept, node: ir.Node, copy: ir.Node, factors: Mapping[str, int]
    ) -> None:
        from morphgraph.ops import OpNode

        self.original = OpNode(node)
        self._kept = kept
        self._node = node
        self._copy = copy
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
        kept = self._kept.node(number)
        return int(self._kept.graph.couplings.sizes[number]) if kept is None else len(kept)

    def set_attribute(self, name: str, value: float | Sequence[int]) -> None:
        """Change an attribute; integers and floats are told apart by their type."""
        if isinstance(value, float):
            self._copy.attributes[name] = ir.AttrFloat32(name, value)
        elif isinstance(value, int):
            self._copy.attributes[name] = ir.AttrInt64(name, value)
        else:
            self._copy.attributes[name] = ir.AttrInt64s(name, value)

    def remove_attribute(self, name: str) -> None:
        """Drop an attribute, if it is there."""
        self._copy.attributes.pop(name, None)

    def set_constant(self, i: int, value: np.ndarray[Any, Any]) -> None:
        """Give an operand a constant; other readers of its old one keep that."""
        if i >= len(self._copy.inputs):
            self._copy.resize_inputs(i + 1)
        old = self._copy.inputs[i]
        if old is None:
            self._copy.replace_input_with(i, self._new_constant(f"{self._copy.name}_{i}", value))
            return
        assert old.const_value is not None
        if np.array_equal(old.const_value.numpy(), value):
            return
        array = value.astype(old.const_value.numpy().dtype)
        if len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value = ir.Tensor(array, name=old.name)
            old.shape = ir.Shape(array.shape)
            old.meta.pop("static_shape", None)
            return
        self._copy.replace_input_with(i, self._new_constant(f"{old.name}_{self._copy.name}", array))

    def set_piece(self, i: int, k: int, number: int) -> None:
        """Change constant ``k`` of those that a Concat joins into operand ``i``."""
        joined = self._copy.inputs[i]
        maker = None if joined is None else joined.producer()
        assert maker is not None
        old = maker.inputs[k]
        assert old is not None
        assert old.const_value is not None
        if old.const_value.numpy()[0] != number:
            array = np.array([number], dtype=np.int64)
            maker.replace_input_with(k, self._new_constant(f"{old.name}_{maker.name}", array))

    def become_gather(self, axis: int, indices: IntArray) -> None:
        """Turn the node into a Gather of its first operand."""
        copy = self._copy
        constant = self._new_constant(f"{copy.name}_kept", indices.astype(np.int64))
        gather = ir.Node(
            "",
            "Gather",
            [copy.inputs[0], constant],
            [ir.AttrInt64("axis", axis)],
            num_outputs=1,
            name=copy.name,
            metadata_props=dict(copy.metadata_props),
        )
        old, new = copy.outputs[0], gather.outputs[0]
        new.shape, new.type = old.shape, old.type
        new.meta.update(old.meta)
        graph = copy.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(copy, gather)
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(copy, safe=True)
        new.name = name

    def _new_constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        graph = self._copy.graph
        assert isinstance(graph, ir.Graph)
        while name in graph.initializers:
            name += "_"
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(array, name=name),
        )
        graph.register_initializer(value)
        return value
