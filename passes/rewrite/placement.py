"""Where a constant that is added to a node's result finds its place in a resized model.

In the node's own bias, in the one that is added behind it, or in an addition of its own.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.rewrite.shift import add_to_bias, shift_of


def add_constant(
    editor: Editor, node: ir.Node, given: Array, free: frozenset[int]
) -> list[ir.Value]:
    """Add a constant to a node's result, in place; returns the initializers that are new.

    In its own bias, in the one that is added behind it, or in an addition of its own.

    Args:
        editor: of the resized model.
        node: one of its nodes.
        given: of its result's rank, in its new size, for one sample.
        free: axes of the result that a plan may resize.
    """
    compact, repeated = without_repeats(given, free)
    if not repeated:
        if add_to_bias(node, compact) or _add_behind(node, compact):
            return []
        bias = _new_bias(editor, node, compact)
        if bias is not None:
            return [bias]
    return [_insert_sum(editor, node, compact, repeated)]


def without_repeats(array: Array, free: frozenset[int]) -> tuple[Array, dict[int, IntArray]]:
    """An array without the slices that repeat others, and per axis where they belong.

    Where all slices of an axis are the same, it gets size 1 and broadcasts; other slices of axes in
    ``free`` stay as they are.

    >>> without_repeats(np.array([[1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 2.0]]), frozenset())
    (array([[1., 2.]]), {1: array([0, 1, 1, 1])})
    """
    orders: dict[int, IntArray] = {}
    for axis in range(array.ndim):
        if axis in free:
            alone = array.take([0], axis=axis)
            array = alone if np.ptp(array, axis=axis).max(initial=0.0) == 0 else array
            continue
        first, order = unique_slices(array, axis)
        if len(first) < array.shape[axis]:
            array = array.take(first, axis=axis)
            orders |= {axis: order} if len(first) > 1 else {}
    return array, orders


def _add_behind(node: ir.Node, array: Array) -> bool:
    """Add to the bias of an addition that alone reads the node (a linear layer's)."""
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output():
        return False
    reader = uses[0].node
    if not facts_of(reader).adds or len(reader.inputs) != 2:
        return False
    bias = reader.inputs[1 - uses[0].idx]
    if bias is None or bias.const_value is None or len(bias.uses()) != 1 or not bias.name:
        return False
    old = array_of(bias)
    flat = (
        array.reshape(array.shape[max(0, array.ndim - old.ndim) :]) if _leads(array, old) else None
    )
    if flat is None or np.broadcast_shapes(flat.shape, old.shape) != old.shape:
        return False
    replace_array(bias, old + flat)
    return True


def _leads(array: Array, like: Array) -> bool:
    """Whether an array has size 1 along the axes that another lacks."""
    return all(size == 1 for size in array.shape[: max(0, array.ndim - like.ndim)])


def _new_bias(editor: Editor, node: ir.Node, array: Array) -> ir.Value | None:
    """A bias of its own for an operator that may have one and has none, or one that is shared."""
    operand = shift_of(node, array)
    size, axis = static_shape(node.outputs[0]), facts_of(node).shift_axis
    if operand is None or len(size) <= axis:
        return None
    old = node.inputs[operand] if operand < len(node.inputs) else None
    channels = size[axis]
    if old is not None and (old.const_value is None or array_of(old).size != channels):
        return None
    total = np.broadcast_to(array.reshape(-1), (channels,))
    if old is not None:
        total = total + array_of(old).reshape(-1)
    weight = node.inputs[1]
    assert weight is not None
    owner, _, leaf = (weight.name or "").rpartition(".")
    name = f"{owner}.bias" if leaf == "weight" else f"{node.name}_absorbed"
    bias = editor.constant(name, total.astype(array.dtype))
    if operand >= len(node.inputs):
        node.resize_inputs(operand + 1)
    node.replace_input_with(operand, bias)
    return bias


def _insert_sum(
    editor: Editor, node: ir.Node, array: Array, repeated: Mapping[int, IntArray]
) -> ir.Value:
    """Add a constant behind a node; along some axes its slices are repeated in a given order."""
    result = node.outputs[0]
    constant = term = editor.constant(f"{result.name}_absorbed", array)
    term.type = result.type
    last = node
    for axis, index in repeated.items():
        order = editor.constant(f"{result.name}_order_{axis}", index)
        term = editor.insert(
            "Gather",
            [term, order],
            {"axis": axis},
            name=f"{node.name}_absorbed_{axis}",
            result=f"{result.name}_absorbed_{axis}",
            like=term,
            sizes={axis: len(index)},
            after=last,
        )
        maker = term.producer()
        assert maker is not None
        last = maker
    editor.add_behind(result, term, last, "absorbed")
    return constant


def unique_slices(array: Array, axis: int) -> tuple[list[int], IntArray]:
    """Slices along an axis that differ, by their first position, and which each position has.

    Two slices are the same within the rounding of single precision.

    >>> unique_slices(np.array([[1.0, 2.0, 2.0, 3.0]]), 1)
    ([0, 1, 3], array([0, 1, 1, 2]))
    """
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    allowed = 1e-6 * float(np.abs(rows).max(initial=0.0))
    first: list[int] = []
    index = np.full(len(rows), -1, dtype=np.int64)
    while (index < 0).any():
        first.append(int(np.argmin(index)))
        same = np.abs(rows - rows[first[-1]]).max(axis=1, initial=0.0) <= allowed
        same[first[-1]] = True  # also where it is no number
        index[same & (index < 0)] = len(first) - 1
    return first, index
