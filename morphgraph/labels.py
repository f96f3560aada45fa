"""Labels on a model's nodes that say which channel groups they make and read: Netron shows them.

They stand in the nodes' metadata, which ONNX has from IR version 10 on. In a model of an older one
they are lines of the nodes' ``doc_string``, which every version has and Netron shows as well.
"""

from collections.abc import Iterable

import onnx_ir as ir

from morphgraph.graph import ChannelGraph, GraphOp, Group
from morphgraph.onnx_io import MAKES_KEY, READS_KEY, escape

_FIRST_IR_VERSION = 10  # with metadata of nodes
_KEYS = (MAKES_KEY, READS_KEY)


def label(model: ir.Model, graph: ChannelGraph) -> int:
    """Label the nodes of a model that is being made; returns how many have a label.

    Args:
        model: has the same values as the graph's, as far as none of its nodes were folded.
        graph: the groups.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> model = mg.export(residual_cnn(), (image(),))
    >>> label(model, mg.lift(model)) > 0
    True
    """
    unlabel(model)
    labelled = 0
    for node in model.graph:
        found = (graph.makers.get(value.name or "") for value in node.outputs)
        op_index = next((index for index in found if index is not None), None)
        notes = {} if op_index is None else _notes(graph, graph.ops[op_index])
        _write(node, notes, (model.ir_version or 0) >= _FIRST_IR_VERSION)
        labelled += bool(notes)
    return labelled


def unlabel(model: ir.Model) -> None:
    """Take the labels off a model that is being made: they are of another one."""
    for node in model.graph:
        for key in _KEYS:
            node.metadata_props.pop(key, None)
        if node.doc_string and "morphgraph." in node.doc_string:
            lines = node.doc_string.split("\n")
            rest = [line for line in lines if not line.startswith(tuple(f"{k}: " for k in _KEYS))]
            node.doc_string = "\n".join(rest) or None


def _write(node: ir.Node, notes: dict[str, str], in_metadata: bool) -> None:
    if in_metadata:
        node.metadata_props.update(notes)
    elif notes:
        lines = [f"{key}: {note}" for key, note in notes.items()]
        node.doc_string = "\n".join([*([node.doc_string] if node.doc_string else []), *lines])


def _notes(graph: ChannelGraph, op: GraphOp) -> dict[str, str]:
    makes = _groups_on(graph, op.ir.outputs)
    reads = _groups_on(graph, op.ir.inputs) - makes
    notes = {MAKES_KEY: makes, READS_KEY: reads}
    return {
        key: "; ".join(_says(graph.groups[index]) for index in sorted(groups))
        for key, groups in notes.items()
        if groups
    }


def _groups_on(graph: ChannelGraph, values: Iterable[ir.Value | None]) -> frozenset[int]:
    """Indices of the groups on any axis of some values."""
    names = [(value.name or "") for value in values if value is not None]
    return frozenset(
        group
        for name in names
        if name in graph.shapes
        for axis in range(len(graph.shapes[name]))
        for group in graph.groups_on(graph.dim(name, axis))
    )


def _says(group: Group) -> str:
    width = f"{group.width} channel{'s' if group.width > 1 else ''}"
    fixed = f", keeps its size: {escape(group.reason)}" if group.reason else ""
    return f"{group.id} '{escape(group.name)}' ({width}{fixed})"
