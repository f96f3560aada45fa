"""The batch of a model that leaves no other size open.

The model is analysed at batch 2. Running the same recipe at batch 3 shows which sizes, and which
numbers in shape operands, depend on the batch: those stay open.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.edit import Editor, replace_array
from morphgraph.onnx_io import STATIC_SHAPE_KEY, bind_inputs, static_shape
from morphgraph.passes.canonical.symbols import (
    BATCH,
    Symbol,
    expression,
    input_shapes,
    same_numbers,
    same_structure,
)

Fold = Callable[[ir.Model], ir.Model]


def settle_open_batch(model: ir.Model, batch: Symbol, fold: Fold) -> ir.Model | None:
    """The canonical form of a model with an open batch: it stays open, all other sizes are known.

    ``None`` where that cannot be: the structure depends on the batch, or a number that does cannot
    be written for any batch.

    Args:
        model: its inputs are static but for the batch.
        batch: the open size.
        fold: the recipe, for a model whose inputs are static.
    """
    runs = [
        fold(bind_inputs(model, input_shapes(model, [batch], larger))) for larger in (None, batch)
    ]
    if not same_structure(runs):
        return None
    first, second = runs
    editor = Editor(first)
    twins = {value.name: value for node in second.graph for value in node.outputs}
    twins |= {value.name: value for value in second.graph.inputs}
    for value in list(first.graph.initializers.values()):
        if not same_numbers(value, second.graph.initializers[value.name or ""]):
            uses = list(value.uses())
            if not all(_restore_operand(first, editor, use.node, use.idx, twins) for use in uses):
                return None
    common.RemoveUnusedNodesPass()(first)
    declared = {value.name: ir.Shape(value.shape or ()) for value in model.graph.inputs}
    made = (value for node in first.graph for value in node.outputs if value.name)
    for value in (*first.graph.inputs, *made, *first.graph.initializers.values()):
        sizes = static_shape(value)
        if value.name in declared:
            value.shape = declared[value.name]
        elif (twin := twins.get(value.name)) is not None:
            value.shape = ir.Shape(
                expression([batch], pair) for pair in zip(sizes, static_shape(twin), strict=True)
            )
        value.meta[STATIC_SHAPE_KEY] = sizes
    return first


def _restore_operand(
    model: ir.Model,
    editor: Editor,
    node: ir.Node,
    index: int,
    twins: Mapping[str | None, ir.Value],
) -> bool:
    """Write a shape operand that depends on the batch so that the batch stays open, if possible."""
    if index != 1 or node.domain or node.op_type not in ("Reshape", "Expand"):
        return False
    sizes = list(static_shape(node.outputs[0]))
    others = static_shape(twins[node.outputs[0].name])
    varying = [axis for axis, size in enumerate(sizes) if size != others[axis]]
    if node.op_type == "Expand":
        return _restore_expand(model, editor, node, sizes, varying)
    if len(varying) != 1:
        return False
    sizes[varying[0]] = -1
    _replace_initializer(editor, node, index, sizes)
    return True


def _restore_expand(
    model: ir.Model, editor: Editor, node: ir.Node, sizes: Sequence[int], varying: Sequence[int]
) -> bool:
    source = node.inputs[0]
    assert source is not None
    padded = (1,) * (len(sizes) - len(static_shape(source))) + static_shape(source)
    # A 1 in Expand's operand leaves that size as it is.
    target = [1 if old == new else new for old, new in zip(padded, sizes, strict=True)]
    if all(target[axis] == 1 for axis in varying):
        _replace_initializer(editor, node, 1, target)
        return True
    if list(varying) != [0] or sizes[0] != BATCH[0] or model.opset_imports.get("", 0) < 15:
        return False
    # Something without a batch is repeated for every sample, as the class token of a
    # transformer: the one case that must look at the input.
    batched = next(v for v in model.graph.inputs if static_shape(v)[:1] == (BATCH[0],))
    name = node.outputs[0].name or ""
    whole = _sizes_with_batch(editor, node, name, batched, target)
    of = "batch" if len(target) == 1 else "shape"
    editor.replace_operand(node, 1, whole, f"{name}_{of}", f"{name}_{of}")
    return True


def _sizes_with_batch(
    editor: Editor, node: ir.Node, name: str, batched: ir.Value, sizes: Sequence[int]
) -> ir.Value:
    """A shape whose first size is that of an input, as new nodes before a node."""

    def insert(
        op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int], of: str, size: int
    ) -> ir.Value:
        name_ = f"{name}_{of}"
        return editor.insert_vector(
            op_type, inputs, attributes, name=name_, result=name_, size=size, before=node
        )

    batch = insert("Shape", [batched], {"start": 0, "end": 1}, "batch", 1)
    if len(sizes) == 1:
        return batch
    rest = editor.sizes(f"{name}_rest", sizes[1:])
    return insert("Concat", [batch, rest], {"axis": 0}, "shape", len(sizes))


def batched_sizes(editor: Editor, node: ir.Node, name: str, shape: ir.Shape) -> ir.Value | None:
    """What expands a value without a batch to one per sample, computed before a node.

    Args:
        editor: of a canonical model.
        node: the reader.
        name: what the new values' names begin with.
        shape: the expanded sizes; ``None`` is returned unless the first, and it alone, is open, and
            that of an input.
    """
    graph = editor.graph
    if graph.opset_imports.get("", 0) < 15 or not all(isinstance(n, int) for n in shape[1:]):
        return None
    batched = next((v for v in graph.inputs if v.shape and v.shape[0] == shape[0]), None)
    # A 1 in Expand's operand leaves that size as it is.
    ones = [1] * len(shape)
    return None if batched is None else _sizes_with_batch(editor, node, name, batched, ones)


def _replace_initializer(editor: Editor, node: ir.Node, index: int, numbers: Sequence[int]) -> None:
    """Give a node an operand of its own; the old one may have other readers."""
    old = node.inputs[index]
    assert old is not None
    if len(old.uses()) == 1:
        replace_array(old, np.array(numbers))
        return
    node.replace_input_with(index, editor.sizes(f"{old.name}_{node.name}", numbers))
