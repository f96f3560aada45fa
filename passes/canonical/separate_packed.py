"""Operands that ONNX Runtime's own operators take packed become separate, so that each is followed.

GroupQueryAttention takes queries, keys and values behind each other on one axis, of which the
queries have more heads: a Split gives it three operands. The scales of a MatMulNBits stand in one
row for all blocks of all channels: it takes them as a matrix, too.
"""

import onnx_ir as ir

from morphgraph.edit import Editor
from morphgraph.onnx_io import known_shape

_DOMAIN = "com.microsoft"
_SPLIT_TAKES_SIZES = 13  # the opset since which Split has its sizes as an operand


def separate_packed(model: ir.Model) -> None:
    """Separate packed operands, in place.

    Args:
        model: constants are folded, sizes are known.
    """
    separate = {"GroupQueryAttention": _split_queries, "MatMulNBits": _stack_rows}
    nodes = [n for n in model.graph if n.domain == _DOMAIN and n.op_type in separate]
    editor = Editor(model) if nodes else None
    for node in nodes:
        assert editor is not None
        separate[node.op_type](editor, node)


def _split_queries(editor: Editor, node: ir.Node) -> None:
    """``[N, T, (queries keys values)]`` becomes three operands."""
    packed = node.inputs[0]
    shape = None if packed is None else known_shape(packed)
    version = editor.graph.opset_imports.get("", 0)
    if packed is None or shape is None or node.inputs[1] is not None:
        return
    if version < _SPLIT_TAKES_SIZES or (len(node.inputs) > 12 and node.inputs[12] is not None):
        return
    heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    size = shape[2] // (heads + 2 * shared)
    sizes = [heads * size, shared * size, shared * size]
    split = ir.node(
        "Split",
        [packed, editor.sizes(f"{node.name}_sizes", sizes)],
        {"axis": 2},
        num_outputs=3,
        name=f"{node.name}_split",
        metadata_props=dict(node.metadata_props),
    )
    editor.graph.insert_before(node, split)
    for i, (value, width) in enumerate(zip(split.outputs, sizes, strict=True)):
        value.name = editor.value_name(f"{packed.name}_{'qkv'[i]}")
        value.type, value.shape = packed.type, ir.Shape((*shape[:2], width))
        node.replace_input_with(i, value)


def _stack_rows(editor: Editor, node: ir.Node) -> None:
    """Scales and zero points ``[(rows blocks)]`` become ``[rows, blocks]``."""
    rows = node.attributes.get_int("N", 0)
    for i, value in list(enumerate(node.inputs))[2:4]:
        if value is None or value.const_value is None:
            continue
        array = value.const_value.numpy()
        if array.ndim == 1 and rows and len(array) % rows == 0:
            name = f"{value.name}_rows"
            node.replace_input_with(i, editor.constant(name, array.reshape(rows, -1)))
