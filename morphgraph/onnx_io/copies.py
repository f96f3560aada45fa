"""Copies of models: what ``onnx_ir`` gives, in less time where there are no subgraphs."""

from typing import TypeVar

import onnx_ir as ir

from morphgraph.onnx_io.values import subgraphs


def copied(model: ir.Model) -> ir.Model:
    """The model with graphs, nodes and values of its own, as ``Model.clone`` gives it.

    Tensors and attributes are shared. A model with local functions or subgraphs is left to that.

    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text("net (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    >>> copy = copied(model)
    >>> [node.name for node in copy.graph] == [node.name for node in model.graph]
    True
    >>> copy.graph.outputs[0] is model.graph.outputs[0]
    False
    """
    graph = None
    if not model.functions and not model.device_configurations:
        graph = _copied_graph(model.graph)
    if graph is None:
        return model.clone()
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=dict(model.metadata_props),
    )


def _copied_graph(graph: ir.Graph) -> ir.Graph | None:
    """The copy of a graph; ``None``: it has subgraphs, or something else that is rare."""
    copies: dict[ir.Value | None, ir.Value | None] = {None: None}
    inputs = [_copied_value(value, copies) for value in graph.inputs]
    initializers = [_copied_value(value, copies) for value in graph.initializers.values()]
    nodes: list[ir.Node] = []
    for node in graph:
        attributes = node.attributes.data
        if node.device_configurations or subgraphs(node):
            return None
        if not all(value in copies for value in node.inputs):
            return None
        copy = ir.Node(
            node.domain,
            node.op_type,
            [copies[value] for value in node.inputs],
            overload=node.overload,
            outputs=[_copied_value(value, copies) for value in node.outputs],
            version=node.version,
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        copy.attributes.data.update(attributes)  # of a UserDict, at once
        _copy_notes(node, copy)
        nodes.append(copy)
    outputs = [copies.get(value) for value in graph.outputs]
    known = [value for value in outputs if value is not None]
    if len(known) < len(outputs):
        return None
    whole = ir.Graph(
        inputs,
        known,
        nodes=nodes,
        initializers=initializers,
        doc_string=graph.doc_string,
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
        metadata_props=dict(graph.metadata_props),
    )
    _copy_notes(graph, whole)
    return whole


def _copied_value(value: ir.Value, copies: dict[ir.Value | None, ir.Value | None]) -> ir.Value:
    """The copy of a value, made once; an initializer may stand among the inputs as well."""
    known = copies.get(value)
    if known is not None:
        return known
    shape = value.shape
    copy = ir.Value(
        name=value.name,
        shape=shape if shape is None or shape.frozen else shape.copy(),
        type=value.type,
        doc_string=value.doc_string,
        const_value=value.const_value,
        metadata_props=dict(value.metadata_props),
    )
    _copy_notes(value, copy)
    copies[value] = copy
    return copy


_Noted = TypeVar("_Noted", ir.Value, ir.Node, ir.Graph)


def _copy_notes(old: _Noted, new: _Noted) -> None:
    notes = old.meta
    for key, note in notes.data.items():
        new.meta[key] = note
        if not notes.is_valid(key):
            new.meta.invalidate(key)
