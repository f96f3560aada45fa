"""Edits of an ONNX graph: names, new constants, new nodes, and what takes another's place.

Every value of an ONNX model has a name of its own, results in subgraphs included: an inner name
must not hide an outer one. All new values get their names here, where the names in use are known;
nothing else in the program registers an initializer or names a value.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.onnx_io import (
    STATIC_SHAPE_KEY,
    graphs_of,
    known_shape,
    shape_of,
    subgraphs,
    values_of,
)

Attributes = Mapping[str, Any]


class Editor:
    """Changes the main graph of a model in place; the names that it gives are unused.

    One editor serves for all edits of a model: it does not see names that others give meanwhile.

    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text('''
    ... net (float[1,3] x) => (float[1,3] y) { order = Relu(x)  y = Relu(order) }''')
    >>> editor = Editor(model)
    >>> editor.constant("order", np.arange(2)).name
    'order_'
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._value_names = Counter(
            value.name for graph in graphs_of(model) for value in values_of(graph) if value.name
        )
        self._node_names = {node.name for node in self.graph}

    # -- names ---------------------------------------------------------------------------------

    def value_name(self, wanted: str) -> str:
        """A name that no value has, taken from now on: the wanted one, underscores behind it."""
        while self._value_names[wanted]:
            wanted += "_"
        self._value_names[wanted] += 1
        return wanted

    def node_name(self, wanted: str) -> str:
        """A name that no node has, taken from now on."""
        while wanted in self._node_names:
            wanted += "_"
        self._node_names.add(wanted)
        return wanted

    def release(self, name: str) -> None:
        """Say that a value of this name goes, so that another may have it."""
        self._value_names[name] -= 1

    def release_subgraphs(self, node: ir.Node) -> None:
        """The same of all values inside of a node's subgraphs."""
        for graph in subgraphs(node):
            for value in values_of(graph):
                self.release(value.name or "")
            for inner in graph:
                self.release_subgraphs(inner)

    # -- constants -----------------------------------------------------------------------------

    def constant(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        """A new initializer, under this name where it is free."""
        return self._register(self.value_name(name), content)

    def constant_for(self, value: ir.Value, content: Array | ir.TensorProtocol) -> ir.Value:
        """A new initializer under the name of a value that goes; its readers are left alone."""
        self.release(value.name or "")
        return self.constant(value.name or "", content)

    def sizes(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """A new initializer of sizes or positions, ``[len(numbers)]`` of int64."""
        return self.constant(name, np.array(numbers, dtype=np.int64))

    def _register(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        tensor = content
        if isinstance(tensor, np.ndarray):
            # ascontiguousarray makes a scalar a vector
            tensor = ir.Tensor(np.ascontiguousarray(tensor).reshape(tensor.shape), name=name)
        value = ir.Value(
            name=name,
            shape=shape_of(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    # -- nodes ---------------------------------------------------------------------------------

    def insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        name: str,
        result: str,
        like: ir.Value,
        sizes: Mapping[int, int] | None = None,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ir.Value:
        """A new node with one result beside another; returns the result.

        Args:
            op_type: an operator of ONNX's own.
            inputs: its operands.
            attributes: its attributes.
            name: of the node, where it is free.
            result: of its result, where that is free.
            like: a value whose type and shape the result has.
            sizes: by axis those sizes that are others.
            before, after: the node beside which it goes; one of them.
            metadata: of the node.
        """
        node = ir.node(
            op_type,
            inputs,
            attributes,
            name=self.node_name(name),
            metadata_props=dict(metadata or {}),
        )
        value = node.outputs[0]
        value.name = self.value_name(result)
        _copy_type(like, value)
        for axis, size in (sizes or {}).items():
            resize_axis(value, axis, size)
        if before is not None:
            self.graph.insert_before(before, node)
        else:
            assert after is not None
            self.graph.insert_after(after, node)
        return value

    def insert_vector(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        result: str,
        size: int,
        before: ir.Node,
        name: str | None = None,
    ) -> ir.Value:
        """A new node before another that computes ``size`` sizes, ``[size]`` of int64.

        Its name is that of the result, if none is given.
        """
        like = ir.val("", ir.DataType.INT64, [size])
        name = result if name is None else name
        return self.insert(
            op_type, inputs, attributes, name=name, result=result, like=like, before=before
        )

    def replace(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        attributes: Attributes | Iterable[ir.Attr] = (),
        results: Sequence[ir.Value] | None = None,
        domain: str = "",
    ) -> ir.Node:
        """Put a node in the place of another; it has that one's name, metadata and readers.

        Args:
            node: goes.
            op_type, domain: the operator of the new node.
            inputs: its operands.
            attributes: its attributes.
            results: the old node's results that it makes, by default all; nobody may need the
                others.
        """
        results = list(node.outputs if results is None else results)
        if isinstance(attributes, Mapping):
            attributes = ir.convenience.convert_attributes(attributes)
        new = ir.Node(
            domain,
            op_type,
            inputs,
            attributes,
            num_outputs=len(results),
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        self.graph.insert_after(node, new)
        names = [value.name for value in results]
        for old, fresh in zip(results, new.outputs, strict=True):
            _copy_type(old, fresh)
            old.replace_all_uses_with(fresh, replace_graph_outputs=True)
        for value in node.outputs:
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, None)  # of nodes that go, too
        self.graph.remove(node, safe=True)
        for fresh, name in zip(new.outputs, names, strict=True):
            fresh.name = name
        return new

    def bypass(self, node: ir.Node, port: int) -> None:
        """Take a node out: its readers read an operand instead; a graph output keeps its name.

        Where the operand is a graph input, an initializer or an output itself, an Identity stays.
        """
        source, result = node.inputs[port], node.outputs[0]
        assert source is not None
        if not result.is_graph_output():
            result.replace_all_uses_with(source)
            self.graph.remove(node, safe=True)
            return
        maker = source.producer()
        if maker is None or maker.graph is not self.graph or source.is_graph_output():
            if node.op_type != "Identity" or node.domain:
                self.replace(node, "Identity", [source], results=[result])
            return
        name = result.name
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        self.release(source.name or "")
        source.name = name

    def rename(self, value: ir.Value, wanted: str) -> None:
        """Give a value another name, where that is free."""
        self.release(value.name or "")
        value.name = self.value_name(wanted)

    def replace_operand(
        self, node: ir.Node, index: int, new: ir.Value, name: str, node_name: str
    ) -> None:
        """Let a node read a value instead of an operand, which goes if nobody else reads it.

        Args:
            node: the reader.
            index: of its operand.
            new: a value from this editor.
            name, node_name: of it and its producer; they may be those of the operand.
        """
        old = node.inputs[index]
        node.replace_input_with(index, new)
        if old is None or old is new or old.uses() or old.is_graph_output():
            return
        maker, new_maker = old.producer(), new.producer()
        if maker is None:
            self.graph.initializers.pop(old.name or "", None)
        elif len(maker.outputs) == 1 and maker.graph is self.graph:
            self.graph.remove(maker, safe=True)
            self._node_names.discard(maker.name)
        else:
            return
        self.release(old.name or "")
        self.rename(new, name)
        if new_maker is not None:
            self._node_names.discard(new_maker.name)
            new_maker.name = self.node_name(node_name)

    def add_behind(self, value: ir.Value, term: ir.Value, last: ir.Node, suffix: str) -> None:
        """Add a term to a value that some node makes; the sum takes its name and its readers.

        Args:
            value: a result; it goes on under its name and ``_without``.
            term: what is added to it.
            last: the node behind which the addition goes.
            suffix: behind the name of the node that makes the value, the addition's name.
        """
        maker, name = value.producer(), value.name or ""
        assert maker is not None
        total = ir.node("Add", [value, term], name=self.node_name(f"{maker.name}_{suffix}"))
        out = total.outputs[0]
        _copy_type(value, out)
        self.graph.insert_after(last, total)
        value.replace_all_uses_with(out, replace_graph_outputs=True)
        total.replace_input_with(0, value)
        value.name, out.name = self.value_name(f"{name}_without"), name


def name_nodes(graph: ir.Graph) -> None:
    """Name unnamed nodes after their first result, and tell nodes of the same name apart."""
    taken: set[str] = set()
    for node in graph:
        base = node.name or "_".join([node.op_type, *(v.name or "" for v in node.outputs[:1])])
        name = base
        suffixes = count(1)
        while name in taken:
            name = f"{base}_{next(suffixes)}"
        taken.add(name)
        node.name = name


def name_values(model: ir.Model) -> None:
    """Tell values of the same name apart, in place: initializers keep theirs, then graph inputs.

    Exporters name results after their operations, and weights as the network's author does:
    ``self.mean`` and ``x.mean()`` meet in one graph.

    >>> model = ir.from_onnx_text('''
    ... <ir_version: 10, opset_import: ["" : 20]>
    ... net (float[2] x) => (float[2] y) <float[2] mean = {1, 2}> { t = Relu(x)  y = Add(t, mean) }
    ... ''')
    >>> model.graph.node(0).outputs[0].name = "mean"
    >>> name_values(model)
    >>> [value.name for value in model.graph.node(1).inputs]
    ['mean_', 'mean']
    """
    editor = Editor(model)
    taken: set[str] = set()
    for graph in model.graphs():
        own = [*graph.initializers.values(), *values_of(graph)]
        for value in dict.fromkeys(own):
            if value.name and value.name in taken:
                value.name = editor.value_name(value.name)
            if value.name:
                taken.add(value.name)


def array_of(value: ir.Value) -> Array:
    """An initializer's numbers."""
    assert value.const_value is not None
    return value.const_value.numpy()


def replace_array(value: ir.Value, array: Array) -> None:
    """Give an initializer other numbers, of the same type."""
    new = np.ascontiguousarray(array.astype(array_of(value).dtype)).reshape(array.shape)
    assert value.const_value is not None
    value.const_value = like_tensor(value.const_value, new)
    value.shape = ir.Shape(new.shape)
    value.meta.pop(STATIC_SHAPE_KEY, None)


def like_tensor(old: ir.TensorProtocol, array: Array) -> ir.TensorProtocol:
    """A tensor of other numbers and sizes that has the name, type and notes of another."""
    return ir.Tensor(
        array,
        dtype=old.dtype,
        shape=shape_of(array.shape),
        name=old.name,
        doc_string=old.doc_string,
        metadata_props=dict(old.metadata_props),
    )


def reshape(value: ir.Value, shape: Sequence[int]) -> None:
    """Give a value another static shape of the same rank; symbolic sizes stay symbolic.

    Those that change have no name any more: a product of an open size and one that was resized.
    """
    old = value.shape
    assert old is not None
    before = value.meta.data.get(STATIC_SHAPE_KEY)
    if before is None and known_shape(value) is not None and len(old) == len(shape):
        value.shape = shape_of(tuple(shape))
        return
    value.shape = ir.Shape(
        size if isinstance(dim, int) else dim if size == was else None
        for dim, was, size in zip(old.dims, shape if before is None else before, shape, strict=True)
    )
    if before is not None:
        value.meta[STATIC_SHAPE_KEY] = tuple(shape)


def resize_axis(value: ir.Value, axis: int, size: int) -> None:
    """Give one axis of a value another size, which is no longer symbolic."""
    assert value.shape is not None
    value.shape = ir.Shape([*value.shape.dims[:axis], size, *value.shape.dims[axis + 1 :]])
    if STATIC_SHAPE_KEY in value.meta:
        before = value.meta[STATIC_SHAPE_KEY]
        value.meta[STATIC_SHAPE_KEY] = (*before[:axis], size, *before[axis + 1 :])


def part_of(model: ir.Model, given: Mapping[str, Array], wanted: Sequence[str]) -> ir.Model:
    """The part of a model that computes some values, as a model of its own without inputs.

    Args:
        model: the model; it is not changed.
        given: values by name that are not computed; they become initializers.
        wanted: names of the results that are the new model's outputs.
    """
    values = {value.name for value in values_of(model.graph)}
    known = [name for name in given if name in values]
    graph = ir.convenience.extract(model.graph, known, wanted)
    operands = list(graph.inputs)
    graph.inputs.clear()
    for value in operands:
        name = value.name or ""
        graph.initializers.pop(name, None)  # of a weight that is given
        if value.uses():
            value.const_value = ir.Tensor(given[name], dtype=value.dtype, name=name)
            value.shape = ir.Shape(given[name].shape)
            graph.register_initializer(value)
    return ir.Model(graph, ir_version=model.ir_version)


def cut_at(model: ir.Model, names: Iterable[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of a model whose nodes are given some results instead of what it computes for them.

    Args:
        model: the model; it is not changed.
        names: results of nodes of its main graph.

    Returns:
        The copy, whose outputs those results are as well; and by result the input that takes what
        its readers are given.
    """
    copy = model.clone()
    editor, results = Editor(copy), {v.name: v for node in copy.graph for v in node.outputs}
    given: dict[str, str] = {}
    for name in names:
        value = results[name]
        source = ir.Value(name=editor.value_name(f"{name}_given"))
        _copy_type(value, source)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, source)
        copy.graph.inputs.append(source)
        if not value.is_graph_output():
            copy.graph.outputs.append(value)
        given[name] = source.name or ""
    return copy, given


def _copy_type(old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    new.meta.update(old.meta)
    new.doc_string = new.doc_string or old.doc_string
    new.metadata_props.update(old.metadata_props)
