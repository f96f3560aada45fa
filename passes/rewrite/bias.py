"""Adding a constant to a node's result in a resized model, where it costs least.

In the node's own bias, in the one that is added behind it (a linear layer's), in a bias that the
node lacks so far, or else in an addition of its own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.tolerances import EQUAL_SLICES


def add_constant(
    editor: Editor, node: ir.Node, constant: Array, free: frozenset[int]
) -> ir.Value | None:
    """Add a constant to a node's result, in place; returns the initializer that is new, if any.

    Args:
        editor: of the resized model.
        node: one of its nodes.
        constant: of its result's rank, in its new size, for one sample.
        free: axes of the result that a plan may resize.
    """
    compact, orders = deduplicate_slices(constant, free)
    if orders:
        return _insert_sum(editor, node, compact, orders)
    if add_to_bias(node, compact) or _add_to_next_bias(node, compact):
        return None
    return _new_bias(editor, node, compact) or _insert_sum(editor, node, compact, {})


def add_constant_to_all(
    editor: Editor, nodes: Sequence[ir.Node], constant: Array, free: frozenset[int]
) -> None:
    """Add one constant to the results of several nodes, which then have one bias, too.

    Args:
        editor: of the resized model.
        nodes: some of its nodes, of one kind, that have the same bias or none.
        constant, free: as of :func:`add_constant`.
    """
    compact, orders = deduplicate_slices(constant, free)
    bias = bias_of(nodes[0])
    if bias is not None and not orders and all(bias_of(node) is bias for node in nodes):
        first, readers = nodes[0], len(nodes)
        if add_to_bias(first, compact, readers) or _add_to_next_bias(first, compact, readers):
            return
    new = add_constant(editor, nodes[0], constant, free)
    for node in nodes[1:]:
        twin = add_constant(editor, node, constant, free)
        if new is not None and twin is not None:
            twin.replace_all_uses_with(new)
            del editor.graph.initializers[twin.name or ""]


def bias_of(node: ir.Node) -> ir.Value | None:
    """The constant that is added to a node's result, by itself or by what alone reads it."""
    port = facts_of(node).shift
    own = None if port is None else _operand(node, port)
    bias = _next_bias(node) if own is None else own
    return None if bias is None or bias.const_value is None else bias


def add_to_bias(node: ir.Node, constant: Array, readers: int = 1) -> bool:
    """Add a constant to a node's result by changing its bias in place; whether that could be.

    Args:
        node: of any operator; its bias must be an initializer that so many read.
        constant: of the result's rank; it may vary along the channels, and not along other axes.
        readers: the node, and others to which the constant is added with it.
    """
    port = _bias_port(node, constant)
    bias = None if port is None else _operand(node, port)
    shape, channel_axis = static_shape(node.outputs[0]), facts_of(node).shift_axis
    if bias is None or not _is_own(bias, readers):
        return False
    if array_of(bias).size != shape[channel_axis]:
        return False
    old = array_of(bias)
    along_channels = [size if axis == channel_axis else 1 for axis, size in enumerate(shape)]
    replace_array(bias, old + np.broadcast_to(constant, along_channels).reshape(old.shape))
    return True


def deduplicate_slices(array: Array, free: frozenset[int]) -> tuple[Array, dict[int, IntArray]]:
    """An array without slices that repeat others, and per axis which one each position had.

    Where all slices of an axis are the same, it gets size 1 and broadcasts; other slices of axes in
    ``free`` stay as they are.

    >>> deduplicate_slices(np.array([[1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 2.0]]), frozenset())
    (array([[1., 2.]]), {1: array([0, 1, 1, 1])})
    """
    orders: dict[int, IntArray] = {}
    for axis in range(array.ndim):
        if axis in free:
            if np.ptp(array, axis=axis).max(initial=0.0) == 0:
                array = array.take([0], axis=axis)
            continue
        first, order = _distinct_slices(array, axis)
        if len(first) < array.shape[axis]:
            array = array.take(first, axis=axis)
            if len(first) > 1:
                orders[axis] = order
    return array, orders


def _distinct_slices(array: Array, axis: int) -> tuple[list[int], IntArray]:
    """First positions of slices along an axis that differ, and which of them each position has."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    allowed = EQUAL_SLICES * float(np.abs(rows).max(initial=0.0))
    first: list[int] = []
    order = np.full(len(rows), -1, dtype=np.int64)
    while (order < 0).any():
        first.append(int(np.argmin(order)))
        same = np.abs(rows - rows[first[-1]]).max(axis=1, initial=0.0) <= allowed
        same[first[-1]] = True  # NaN differs from itself
        order[same & (order < 0)] = len(first) - 1
    return first, order


def _bias_port(node: ir.Node, constant: Array) -> int | None:
    """Which operand of a node could add a constant, present or not; ``None``: there is none."""
    facts = facts_of(node)
    others = [size for axis, size in enumerate(constant.shape) if axis != facts.shift_axis]
    factor = node.attributes.get(facts.shift_factor)
    if any(size != 1 for size in others) or (factor is not None and factor.as_float() != 1.0):
        return None
    return facts.shift


def _operand(node: ir.Node, port: int) -> ir.Value | None:
    return node.inputs[port] if port < len(node.inputs) else None


def _is_own(value: ir.Value, readers: int = 1) -> bool:
    """Whether a value is an initializer that so many nodes read, so that it may be changed."""
    is_read = len(value.uses()) == readers and not value.is_graph_output()
    return value.const_value is not None and is_read


def _next_bias(node: ir.Node) -> ir.Value | None:
    """What an addition that alone reads the node adds to it."""
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output():
        return None
    reader = uses[0].node
    if not facts_of(reader).adds or len(reader.inputs) != 2:
        return None
    return reader.inputs[1 - uses[0].idx]


def _add_to_next_bias(node: ir.Node, constant: Array, readers: int = 1) -> bool:
    """Add to the bias of an addition that alone reads the node (a linear layer's)."""
    bias = _next_bias(node)
    if bias is None or not _is_own(bias, readers):
        return False
    old = array_of(bias)
    extra = max(0, constant.ndim - old.ndim)  # leading axes that the bias lacks
    if any(size != 1 for size in constant.shape[:extra]):
        return False
    trailing = constant.reshape(constant.shape[extra:])
    if np.broadcast_shapes(trailing.shape, old.shape) != old.shape:
        return False
    replace_array(bias, old + trailing)
    return True


def _new_bias(editor: Editor, node: ir.Node, constant: Array) -> ir.Value | None:
    """A bias for an operator that may have one and has none, or shares it with others."""
    port = _bias_port(node, constant)
    shape, channel_axis = static_shape(node.outputs[0]), facts_of(node).shift_axis
    if port is None or len(shape) <= channel_axis:
        return None
    old, channels = _operand(node, port), shape[channel_axis]
    if old is not None and (old.const_value is None or array_of(old).size != channels):
        return None
    total = np.broadcast_to(constant.reshape(-1), (channels,))
    if old is not None:
        total = total + array_of(old).reshape(-1)
    weight = node.inputs[1]
    assert weight is not None
    owner, _, leaf = (weight.name or "").rpartition(".")
    name = f"{owner}.bias" if leaf == "weight" else f"{node.name}_absorbed"
    bias = editor.constant(name, total.astype(constant.dtype))
    if port >= len(node.inputs):
        node.resize_inputs(port + 1)
    node.replace_input_with(port, bias)
    return bias


def _insert_sum(
    editor: Editor, node: ir.Node, array: Array, orders: Mapping[int, IntArray]
) -> ir.Value:
    """Add a constant behind a node; along some axes its slices are repeated in a given order."""
    result = node.outputs[0]
    constant = term = editor.constant(f"{result.name}_absorbed", array)
    term.type = result.type
    last = node
    for axis, index in orders.items():
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
        gather = term.producer()
        assert gather is not None
        last = gather
    editor.add_behind(result, term, last, "absorbed")
    return constant
