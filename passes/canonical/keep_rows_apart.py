"""Heads that are normalized one by one stay an axis of their own.

A norm of queries and keys is often written over rows, into which positions and heads are merged:

    [N, T, (h d)] -> [N, (T h), d] -> norm over d -> [N, T, (h d)]

No axis whose size is open can be resized, and ``(T h)`` is one. What works row by row computes the
same on ``[N, T, h, d]``, where the heads stand alone.
"""

from collections.abc import Sequence

import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.edit import Editor
from morphgraph.errors import ModelError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import known_shape
from morphgraph.ops import OpNode, describe

_MAX_BETWEEN = 8  # operators between the two reshapes


def keep_rows_apart(model: ir.Model) -> None:
    """Let rows that merge positions and heads keep them as two axes, in place.

    Args:
        model: constants are folded, sizes are known.
    """
    reshapes = [n for n in model.graph if n.op_type == "Reshape" and not n.domain]
    editor = Editor(model) if len(reshapes) > 1 else None
    for node in reshapes:
        if editor is None:
            return
        lead, count = _merged(node)
        between = _row_by_row(node, lead) if count else None
        if between:
            _split(editor, node, between, lead, count)


def _merged(node: ir.Node) -> tuple[Shape, int]:
    """The axes before the last of a Reshape to rows, and how many rows each position becomes."""
    before, after = known_shape(node.inputs[0]), known_shape(node.outputs[0])
    if before is None or after is None or len(before) < 3 or not 2 <= len(after) <= len(before):
        return (), 0
    width, size = before[-1], after[-1]
    if not size or width % size or width == size or node.outputs[0].is_graph_output():
        return (), 0
    return before[:-1], width // size


def _row_by_row(node: ir.Node, lead: Shape) -> list[ir.Node] | None:
    """The nodes behind a Reshape to rows, and the Reshape that puts the rows together again."""
    found: list[ir.Node] = []
    value = node.outputs[0]
    while len(found) <= _MAX_BETWEEN:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
            return None
        user = uses[0].node
        found.append(user)
        if user.op_type == "Reshape" and not user.domain:
            whole = known_shape(user.outputs[0])
            return found if len(found) > 1 and whole is not None and whole[:-1] == lead else None
        if not _is_row_by_row(user):
            return None
        value = user.outputs[0]
    return None


def _is_row_by_row(node: ir.Node) -> bool:
    """Whether every row of the result is computed from that row, and the same for all."""
    operands = [known_shape(value) for value in node.inputs if value is not None]
    results = [value for value in node.outputs if value.name and value.uses()]
    if any(shape is None for shape in operands) or results != [node.outputs[0]]:
        return False
    rank = len(operands[0] or ())
    if any(len(shape or ()) > 1 for shape in operands[1:]):
        return False
    try:
        factors = describe(OpNode(node)).factors.values()
    except (ModelError, NotationError):
        return False
    for factor in factors:
        leading = {(p.port, p.axis) for p in factor.places if p.port < 1 and p.axis < rank - 1}
        if leading and {axis for _, axis in leading} != {next(iter(leading))[1]}:
            return False
        if leading and factor.pinned is not None and factor.size > 1:
            return False
    axis = node.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, rank - 1)


def _split(
    editor: Editor, node: ir.Node, between: Sequence[ir.Node], lead: Shape, count: int
) -> None:
    """Give the rows of each position an axis of their own, up to the Reshape that ends them."""
    *inside, last = between
    for value in (node.outputs[0], *(each.outputs[0] for each in inside)):
        size = (known_shape(value) or (0,))[-1]
        value.shape = ir.Shape((*lead, count, size))
    for each in inside:
        if "axis" in each.attributes:
            each.attributes["axis"] = ir.AttrInt64("axis", -1)
    target = [*[0] * len(lead), -1, (known_shape(node.outputs[0]) or (0,))[-1]]
    whole = [*[0] * len(lead), (known_shape(last.outputs[0]) or (0,))[-1]]
    for reshape, sizes in ((node, target), (last, whole)):
        reshape.attributes.pop("allowzero", None)
        # A name of its own, so that nobody puts the rows' sizes back.
        reshape.name = f"{reshape.name}_apart"
        reshape.replace_input_with(1, editor.sizes(f"{reshape.outputs[0].name}_apart", sizes))
