"""Inputs that count keys, or mark those that count: what they are for a batch without padding.

An operator may take no other numbers than such as fit the sizes of its operands (the lengths of a
GroupQueryAttention). Random inputs of a check then are these numbers.
"""

import onnx_ir as ir

from morphgraph.onnx_io import EXPECTED_KEY, Expected, is_unsized
from morphgraph.ops import OpNode, facts_of


def note_lengths(model: ir.Model) -> None:
    """Note at inputs the number that they hold for a batch without padding.

    Args:
        model: canonical.
    """
    for node in model.graph:
        entry = facts_of(node)
        if entry.lengths is None or any(map(is_unsized, filter(None, node.inputs))):
            continue
        for port, number in entry.call(entry.lengths, node, OpNode(node)).items():
            if port < len(node.inputs) and node.inputs[port] is not None:
                _note(node.inputs[port], number)


def _note(operand: ir.Value | None, number: int) -> None:
    """Note it at the inputs that an operand is computed from: a mask there marks every key."""
    pending, seen = [operand], set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        maker = value.producer()
        if maker is not None and maker.op_type != "Shape":  # sizes are what they are
            pending += maker.inputs
        elif value.is_graph_input() and value.dtype is not None and value.dtype.is_integer():
            is_mask = value.shape is not None and value.shape.rank() > 1
            count = 1 if is_mask else number
            value.meta.setdefault(EXPECTED_KEY, Expected("length", count, count + 1))
