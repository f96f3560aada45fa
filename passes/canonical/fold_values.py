"""What single nodes compute from constants: by ONNX's reference implementation, within bounds.

Nothing is computed before the size of its result is known to be within the cap. Whole parts of a
model run in ONNX Runtime instead (:mod:`morphgraph.passes.analysis.evaluate`).
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from morphgraph.arrays import Array, Shape
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape
from morphgraph.ops import facts_of
from morphgraph.passes.canonical.infer_shapes import has_subgraph, known_shape

FOLD_LIMIT_BYTES = 16 * 2**20  # of one result, or of one operand
_FILL_LIMIT_BYTES = 2**31  # of a weight that is one repeated number and takes no memory


logger = logging.getLogger(__name__)


def is_foldable(node: ir.Node) -> bool:
    """Whether a node whose operands are constants may be replaced by what it computes."""
    return not node.domain and facts_of(node).foldable and not has_subgraph(node)


def described_shape(node: ir.Node, shape: Shape) -> Array:
    """What Shape or Size computes for an operand of this shape."""
    if node.op_type == "Size":
        return np.array(math.prod(shape), np.int64)
    start = node.attributes["start"].as_int() if "start" in node.attributes else None
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    return np.array(shape[start:end], np.int64)


def filled(node: ir.Node, shape: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """What a ConstantOfShape makes, without taking memory for it; ``None`` where it is too much."""
    number = node.attributes["value"].as_tensor() if "value" in node.attributes else None
    filler = np.zeros((), np.float32) if number is None else number.numpy().reshape(())
    sizes = tuple(shape.numpy().tolist())
    if min(sizes, default=0) < 0 or math.prod(sizes) * filler.itemsize > _FILL_LIMIT_BYTES:
        return None
    # A view with stride 0: the weight takes no memory until it is changed.
    return ir.tensor(np.broadcast_to(filler, sizes))


def computed(
    node: ir.Node, opset: int, operands: Sequence[ir.TensorProtocol | None]
) -> list[Array] | None:
    """What a node computes; ``None`` where that is too large, or not implemented."""
    if not _result_is_small(node):
        return None
    attributes = {
        name: ir.to_proto(attribute.as_tensor())
        if attribute.type == ir.AttributeType.TENSOR
        else attribute.value
        for name, attribute in node.attributes.items()
    }
    arrays = [None if tensor is None else tensor.numpy() for tensor in operands]
    try:
        kernel = onnx.reference.ops.load_op("", node.op_type, opset)
        with np.errstate(all="ignore"):
            results = kernel.eval(*arrays, n_outputs=len(node.outputs), **attributes)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as why:
        logger.debug("%s %s is not folded: %s", node.op_type, node.name, why)
        return None
    if not isinstance(results, tuple | list):
        results = (results,)
    return [
        np.asarray(result, dtype=None if output.dtype is None else output.dtype.numpy())
        for result, output in zip(results, node.outputs, strict=True)
    ]


def _result_is_small(node: ir.Node) -> bool:
    if facts_of(node).bounded:
        return True
    for output in node.outputs:
        shape = known_shape(output)
        if shape is None or output.dtype is None:
            return False
        if math.prod(shape) * output.dtype.itemsize > FOLD_LIMIT_BYTES:
            return False
    return True


def constant_tensor(node: ir.Node) -> ir.TensorProtocol:
    """The tensor that a Constant node holds.

    Raises:
        ModelError: it holds none, or a sparse one.
    """
    if len(node.attributes) == 1:
        (attribute,) = node.attributes.values()
        match attribute.name:
            case "value":
                return attribute.as_tensor()
            case "value_float" | "value_floats":
                return ir.tensor(np.array(attribute.value, np.float32))
            case "value_int" | "value_ints":
                return ir.tensor(np.array(attribute.value, np.int64))
            case "value_string" | "value_strings":
                return ir.tensor(attribute.value, dtype=ir.DataType.STRING)
    raise ModelError(
        f"node '{escape(node.name or '')}' (Constant): holds no dense value; store it as a tensor"
    )
