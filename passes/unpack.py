"""Pass ``unpack``: sequences of tensors become the splits that they are.

PyTorch's exporter writes ``torch.split`` and ``torch.chunk`` as SplitToSequence and a SequenceAt
per part. Channels cannot be followed through a sequence; a Split with as many results computes the
same.
"""

import numpy as np
import onnx_ir as ir

from morphgraph.onnx_io import static_shape


def unpack_sequences(model: ir.Model) -> ir.Model:
    """Replace SplitToSequence and SequenceAt by Split or Gather, in place; returns the model.

    A sequence that is read in any other way, or at a computed place, stays.

    Args:
        model: constants are folded, sizes are known.
    """
    for node in list(model.graph):
        if node.op_type == "SplitToSequence" and not node.domain:
            _unpack(model.graph, node)
    return model


def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    source, parts = node.inputs[0], node.outputs[0]
    readers = [use.node for use in parts.uses()]
    places = [_constant(reader.inputs[1]) for reader in readers if reader.op_type == "SequenceAt"]
    known = [int(place.item()) for place in places if place is not None]
    if source is None or parts.is_graph_output() or len(known) < len(readers):
        return
    axis_attribute = node.attributes.get("axis")
    axis = axis_attribute.as_int() if axis_attribute else 0
    keeps = node.attributes.get("keepdims")
    if len(node.inputs) < 2 or node.inputs[1] is None:
        size = static_shape(source)[axis]
        if keeps is not None and not keeps.as_int():
            for reader, place in zip(readers, known, strict=True):
                _replace(graph, reader, "Gather", [source, np.array(place % size)], axis)
            graph.remove(node, safe=True)
            return
        sizes = [1] * size
    else:
        split = _constant(node.inputs[1])
        if split is None:
            return
        sizes = _sizes(split, static_shape(source)[axis])
    _split(graph, node, source, sizes, axis, {r: p % len(sizes) for r, p in zip(readers, known)})


def _constant(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy().astype(np.int64)


def _sizes(split: np.ndarray[tuple[int, ...], np.dtype[np.int64]], total: int) -> list[int]:
    """A scalar is the size of every part; the last one takes what is left."""
    if split.ndim:
        return [int(size) for size in split]
    size = int(split)
    return [min(size, total - start) for start in range(0, total, size)]


def _split(
    graph: ir.Graph,
    node: ir.Node,
    source: ir.Value,
    sizes: list[int],
    axis: int,
    places: dict[ir.Node, int],
) -> None:
    name = node.name or ""
    made = ir.Node(
        "",
        "Split",
        [source, _initializer(graph, f"{name}_sizes", np.array(sizes))],
        [ir.AttrInt64("axis", axis)],
        num_outputs=len(sizes),
        name=name,
        metadata_props=dict(node.metadata_props),
    )
    for k, (value, size) in enumerate(zip(made.outputs, sizes, strict=True)):
        shape = list(static_shape(source))
        shape[axis] = size
        value.name = f"{node.outputs[0].name}_{k}"
        value.type, value.shape = source.type, ir.Shape(shape)
    graph.insert_before(node, made)
    for reader, place in places.items():
        old = reader.outputs[0]
        new = made.outputs[place]
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            graph.remove(reader, safe=True)
        else:
            _replace(graph, reader, "Identity", [new], None)
    graph.remove(node, safe=True)


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: "list[ir.Value | np.ndarray[tuple[int, ...], np.dtype[np.int64]]]",
    axis: int | None,
) -> None:
    """Put another operator in a node's place; its result keeps its name."""
    operands = [
        value if isinstance(value, ir.Value) else _initializer(graph, f"{node.name}_index", value)
        for value in inputs
    ]
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    made = ir.Node("", op_type, operands, attributes, name=node.name)
    old, new = node.outputs[0], made.outputs[0]
    name = old.name
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _initializer(
    graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    tensor = ir.Tensor(array.astype(np.int64), name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
