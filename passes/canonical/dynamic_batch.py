"""A dynamic batch, in a model whose other sizes are all known.

The model is canonicalized at batch 2 and at batch 3. Where a Reshape or Expand has a constant shape
operand that differs, another constant is right for any batch:

    Reshape to [batch, 16]     [-1, 16]
    Expand to [batch, 1, 64]   [1, 1, 64], where the operand has the batch already
    Expand to [batch, 1, 64]   Concat(Shape<start=0, end=1>(x), [1, 64]), where it has none
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.edit import Editor, replace_array
from morphgraph.onnx_io import bind_inputs, static_shape
from morphgraph.passes.canonical.size_runs import Fold, SizeRuns, same_structure
from morphgraph.passes.canonical.symbols import BATCH, Symbol, input_shapes


def keep_batch_dynamic(model: ir.Model, batch: Symbol, fold: Fold) -> ir.Model | None:
    """The canonical form of a model with a dynamic batch: that stays, all other sizes are known.

    ``None`` where that cannot be: the structure depends on the batch, or a number that does cannot
    be written for any batch.

    Args:
        model: its inputs are static but for the batch; it is not changed.
        batch: the dynamic size.
        fold: the recipe.
    """
    models = [bind_inputs(model, input_shapes(model, [batch], more)) for more in ([], [batch])]
    for run in models:
        fold(run, frozenset())
    if not same_structure(models):
        return None
    runs = SizeRuns(models, [batch])
    editor = Editor(runs.model)
    for value in runs.varying_constants:
        if not all(_write_operand(runs, editor, use.node, use.idx) for use in list(value.uses())):
            return None
    common.RemoveUnusedNodesPass()(runs.model)
    runs.write_shapes(model)
    return runs.model


def _write_operand(runs: SizeRuns, editor: Editor, node: ir.Node, index: int) -> bool:
    """Write a shape operand that depends on the batch for any batch, if that can be."""
    if index != 1 or node.domain or node.op_type not in ("Reshape", "Expand"):
        return False
    result = node.outputs[0]
    varying = runs.varying_axes(result)
    if node.op_type == "Expand":
        sizes, dynamic = runs.expand_target(node)
    elif len(varying) == 1:
        sizes, dynamic = list(static_shape(result)), []
        sizes[varying[0]] = -1
    else:
        return False
    if not dynamic:
        _replace_constant(editor, node, index, sizes)
        return True
    is_batch = varying == [0] and static_shape(result)[0] == BATCH[0]
    if not is_batch or runs.model.opset_imports.get("", 0) < 15:
        return False
    # Something without a batch is repeated for every sample, as the class token of a
    # transformer: the one case that must look at the input.
    batched = next(v for v in runs.model.graph.inputs if static_shape(v)[:1] == (BATCH[0],))
    name = result.name or ""
    shape = _sizes_with_batch(editor, node, name, batched, sizes)
    suffix = "batch" if len(sizes) == 1 else "shape"
    editor.replace_operand(node, 1, shape, f"{name}_{suffix}", f"{name}_{suffix}")
    return True


def _sizes_with_batch(
    editor: Editor, node: ir.Node, name: str, batched: ir.Value, sizes: Sequence[int]
) -> ir.Value:
    """A shape whose first size is that of an input, as new nodes before a node."""
    batch = editor.insert_vector(
        "Shape", [batched], {"start": 0, "end": 1}, result=f"{name}_batch", size=1, before=node
    )
    if len(sizes) == 1:
        return batch
    rest = editor.sizes(f"{name}_rest", sizes[1:])
    return editor.insert_vector(
        "Concat", [batch, rest], {"axis": 0}, result=f"{name}_shape", size=len(sizes), before=node
    )


def batched_sizes(editor: Editor, node: ir.Node, name: str, shape: ir.Shape) -> ir.Value | None:
    """What expands a value without a batch to one per sample, computed before a node.

    Args:
        editor: of a canonical model.
        node: the reader.
        name: what the new values' names begin with.
        shape: the expanded sizes; ``None`` is returned unless the first, and it alone, is dynamic,
            and that of an input.
    """
    graph = editor.graph
    if graph.opset_imports.get("", 0) < 15 or not all(isinstance(n, int) for n in shape[1:]):
        return None
    batched = next((v for v in graph.inputs if v.shape and v.shape[0] == shape[0]), None)
    # A 1 in Expand's operand leaves that size as it is.
    ones = [1] * len(shape)
    return None if batched is None else _sizes_with_batch(editor, node, name, batched, ones)


def _replace_constant(editor: Editor, node: ir.Node, index: int, sizes: Sequence[int]) -> None:
    """Give a node an operand of its own; the old one may have other readers."""
    old = node.inputs[index]
    assert old is not None
    if len(old.uses()) == 1:
        replace_array(old, np.array(sizes))
        return
    node.replace_input_with(index, editor.sizes(f"{old.name}_{node.name}", sizes))
