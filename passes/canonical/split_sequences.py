"""Sequences of tensors become the splits that they are.

PyTorch's exporter writes ``torch.split`` and ``torch.chunk`` as SplitToSequence and a SequenceAt
per part. Channels cannot be followed through a sequence; a Split with as many results computes the
same.
"""

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.edit import Editor
from morphgraph.onnx_io import known_shape, static_shape


def split_sequences(model: ir.Model) -> None:
    """Replace SplitToSequence and SequenceAt by Split or Gather, in place.

    A sequence that is read in any other way, or at a computed place, stays.

    Args:
        model: constants are folded, sizes are known.
    """
    splits = [n for n in model.graph if n.op_type == "SplitToSequence" and not n.domain]
    editor = Editor(model) if splits else None
    for node in splits:
        assert editor is not None
        _split_sequence(editor, node)


def _split_sequence(editor: Editor, node: ir.Node) -> None:
    source, parts = node.inputs[0], node.outputs[0]
    readers = [use.node for use in parts.uses()]
    # Which part each reader takes; negative ones count from the end.
    indices = [_constant(reader.inputs[1]) for reader in readers if reader.op_type == "SequenceAt"]
    known = [int(index.item()) for index in indices if index is not None]
    if (
        source is None
        or known_shape(source) is None
        or parts.is_graph_output()
        or len(known) < len(readers)
    ):
        return
    axis = node.attributes.get_int("axis", 0)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        size = static_shape(source)[axis]
        if not node.attributes.get_int("keepdims", 1):
            # Parts of size 1 without their axis: no Split gives those.
            for reader, part in zip(readers, known, strict=True):
                index = editor.constant(f"{reader.name}_index", np.array(part % size))
                editor.replace(reader, "Gather", [source, index], {"axis": axis})
            editor.graph.remove(node, safe=True)
            return
        sizes = [1] * size
    else:
        split = _constant(node.inputs[1])
        if split is None:
            return
        sizes = _sizes(split, static_shape(source)[axis])
    _split(editor, node, source, sizes, axis, {r: p % len(sizes) for r, p in zip(readers, known)})


def _constant(value: ir.Value | None) -> IntArray | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy().astype(np.int64)


def _sizes(split: IntArray, total: int) -> list[int]:
    """A scalar is the size of every part; the last one takes what is left."""
    if split.ndim:
        return [int(size) for size in split]
    size = int(split)
    return [min(size, total - start) for start in range(0, total, size)]


def _split(
    editor: Editor,
    node: ir.Node,
    source: ir.Value,
    sizes: list[int],
    axis: int,
    places: dict[ir.Node, int],
) -> None:
    parts = editor.sizes(f"{node.name}_sizes", sizes)
    split = ir.node(
        "Split",
        [source, parts],
        {"axis": axis},
        num_outputs=len(sizes),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    for k, (value, size) in enumerate(zip(split.outputs, sizes, strict=True)):
        shape = list(static_shape(source))
        shape[axis] = size
        value.name = editor.value_name(f"{node.outputs[0].name}_{k}")
        value.type, value.shape = source.type, ir.Shape(shape)
    editor.graph.insert_before(node, split)
    for reader, place in places.items():
        old = reader.outputs[0]
        new = split.outputs[place]
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            editor.graph.remove(reader, safe=True)
        else:
            editor.replace(reader, "Identity", [new])
    editor.graph.remove(node, safe=True)
