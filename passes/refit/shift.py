"""Adding to what a reader of a resized network gives: in a bias, an offset, or an addition."""

from collections.abc import Sequence

import numpy as np

from morphgraph.arrays import FloatArray
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.rewrite.bias import add_constant, add_constant_to_all


def shift_result(editor: Editor, reader: Reader, shift: FloatArray, bias: FloatArray) -> None:
    """Add ``shift`` to what a reader gives; its bias is ``bias`` then, ``[maps, outputs]``."""
    if not shift.any() or (reader.is_norm and _write_offset(editor, reader, bias)):
        return
    if reader.linear.inside:
        _shift_gates(editor, reader, shift)
        return
    add_to_result(editor, reader, shift)


def add_to_result(editor: Editor, reader: Reader, shift: FloatArray) -> None:
    """Add to a reader's result, ``[maps, outputs]``."""
    rank = len(static_shape(reader.result))
    constant = reader.linear.spread(shift, rank).astype(reader.kernel().dtype)
    add_constant(editor, reader.node, constant, frozenset(range(rank)))


def add_to_results(editor: Editor, peers: Sequence[Reader], shift: FloatArray) -> None:
    """Add to the results of readers that share their kernel, ``[maps, outputs]``.

    Where they have one bias, or none, they have one behind it.
    """
    first, rank = peers[0], len(static_shape(peers[0].result))
    if len(peers) == 1:
        add_to_result(editor, first, shift)
    elif shift.any():
        constant = first.linear.spread(shift, rank).astype(first.kernel().dtype)
        nodes = [reader.node for reader in peers]
        add_constant_to_all(editor, nodes, constant, frozenset(range(rank)))


def _write_offset(editor: Editor, reader: Reader, bias: FloatArray) -> bool:
    """Give a norm another shift, where it has one of its own or may have one."""
    node, port = reader.node, facts_of(reader.node).offset
    if port is None:
        return False
    value = node.inputs[port] if port < len(node.inputs) else None
    kernel = reader.kernel()
    array = bias.reshape(kernel.shape).astype(kernel.dtype)
    if value is None:
        node.resize_inputs(max(port + 1, len(node.inputs)))
        node.replace_input_with(port, editor.constant(f"{node.name}_bias", array))
    elif value.const_value is not None and len(value.uses()) == 1:
        replace_array(value, array.reshape(array_of(value).shape))
    else:
        return False
    return True


def _shift_gates(editor: Editor, reader: Reader, shift: FloatArray) -> None:
    """Add to the first half of a recurrent layer's bias, ``[directions, 2 gates units]``."""
    node, kernel = reader.node, reader.kernel()
    directions, rows = kernel.shape[:2]
    port = 3
    if len(node.inputs) <= port or node.inputs[port] is None:
        zeros = np.zeros((directions, 2 * rows), kernel.dtype)
        bias = editor.constant(f"{node.name}_bias", zeros)
        if len(node.inputs) <= port:
            node.resize_inputs(port + 1)
        node.replace_input_with(port, bias)
    value = node.inputs[port]
    if value is None or value.const_value is None or len(value.uses()) > 1:
        return
    array = array_of(value).copy()
    array[:, :rows] += shift.reshape(directions, rows).astype(array.dtype)
    replace_array(value, array)
