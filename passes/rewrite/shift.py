"""Adding a constant to a result: in the operand that shifts its channels already."""

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import array_of, replace_array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of


def add_to_bias(node: ir.Node, array: Array) -> bool:
    """Add a constant to what a node gives by changing its bias in place; whether that could be.

    Args:
        node: of any operator; its bias must be an initializer that it alone reads.
        array: of the result's rank; it may vary along the channels, and not along other axes.
    """
    place = shift_of(node, array)
    shift = node.inputs[place] if place is not None and place < len(node.inputs) else None
    size, shifted = static_shape(node.outputs[0]), facts_of(node).shift_axis
    if shift is None or shift.const_value is None or len(shift.uses()) != 1:
        return False
    old = array_of(shift)
    if shift.is_graph_output() or old.size != size[shifted]:
        return False
    full = [length if axis == shifted else 1 for axis, length in enumerate(size)]
    replace_array(shift, old + np.broadcast_to(array, full).reshape(old.shape))
    return True


def shift_of(node: ir.Node, array: Array) -> int | None:
    """Which operand of a node could add a constant, present or not; ``None``: there is none."""
    facts = facts_of(node)
    factor = node.attributes.get(facts.shift_factor)
    alone = all(size == 1 for axis, size in enumerate(array.shape) if axis != facts.shift_axis)
    if not alone or (factor is not None and factor.as_float() != 1.0):
        return None
    return facts.shift
