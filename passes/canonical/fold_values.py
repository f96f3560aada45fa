"""What numbers values hold: constants, and what single nodes compute from constants.

Nodes are computed by ONNX's reference implementation, and none before the size of its result is
known to be within bounds. Whole parts of a model run in ONNX Runtime instead
(:mod:`morphgraph.passes.analysis.evaluate`).
"""

import logging
import math
from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Shape
from morphgraph.errors import ModelError
from morphgraph.onnx_io import is_float, item_bytes, known_shape, node_label, subgraphs
from morphgraph.onnx_io.fixed import fixed_values
from morphgraph.ops import facts_of, listed_parameters

FOLD_LIMIT_BYTES = 16 * 2**20  # of one result, or of one operand
_FILL_LIMIT_BYTES = 2**31  # of a weight that is one repeated number and takes no memory
_REPEATED_BYTES = 4096  # of operands and results that are remembered

# Compared one by one, the usual ones first: an enumeration's members hash slowly.
_PLAIN_ATTRIBUTES = (
    *(ir.AttributeType.INTS, ir.AttributeType.INT),
    *(ir.AttributeType.FLOAT, ir.AttributeType.STRING),
    *(ir.AttributeType.FLOATS, ir.AttributeType.STRINGS),
)

logger = logging.getLogger(__name__)


class KnownValues:
    """The numbers that are known while a graph is folded, and which of them training changes.

    Attributes:
        parameters: names that the model lists as its parameters.
        lists_parameters: whether it lists them; if not, they can but be guessed.
        trained: names of initializers that training may change. No node is folded into them.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._varying: dict[ir.Value, ir.TensorProtocol] = {}
        self._computed: dict[Hashable, list[Array]] = {}
        listed = listed_parameters(model)
        self.parameters = set(listed or ())
        self.lists_parameters = listed is not None
        settings = fixed_values(model)
        self.trained = self.parameters | {
            name
            for name, value in self._graph.initializers.items()
            if name not in settings
            if is_float(value) and value.shape is not None and len(value.shape) > 0
        }

    def constant(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of an initializer of the graph; ``None`` for any other value."""
        if value is None or not value.is_initializer() or value.graph is not self._graph:
            return None
        return value.const_value

    def get(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of a constant, or what a varying value is at the present input sizes."""
        return None if value is None else self._varying.get(value, self.constant(value))

    def compute(
        self, node: ir.Node, opset: int, operands: Sequence[ir.TensorProtocol | None]
    ) -> list[Array] | None:
        """What a node computes; networks compute the same small sizes again and again."""
        attributes = plain_attributes(node)
        given = [tensor for tensor in operands if tensor is not None]
        if attributes is None or sum(t.nbytes for t in given) > _REPEATED_BYTES:
            return _computed_arrays(node, opset, operands)
        key = (
            (node.op_type, attributes, tuple([value.dtype for value in node.outputs])),
            tuple([None if t is None else (t.dtype, t.shape.numpy(), _bytes(t)) for t in operands]),
        )
        if key not in self._computed:
            arrays = _computed_arrays(node, opset, operands)
            if arrays is None or sum(array.nbytes for array in arrays) > _REPEATED_BYTES:
                return arrays
            self._computed[key] = arrays
        return self._computed[key]

    def note_varying(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Note what a value that varies with dynamic sizes is at the present input sizes."""
        self._varying[value] = tensor
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())


def plain_attributes(node: ir.Node) -> Hashable:
    """A node's attributes; ``None`` where one holds a tensor or a graph."""
    found: list[Hashable] = []
    for name, attribute in node.attributes.data.items():
        kind, value = attribute.type, attribute.value
        if kind not in _PLAIN_ATTRIBUTES:
            return None
        found.append((name, int(kind), tuple(value) if isinstance(value, list) else value))
    return tuple(found)


def _bytes(tensor: ir.TensorProtocol) -> Hashable:
    return repr(tensor.numpy()) if tensor.dtype == ir.DataType.STRING else tensor.numpy().tobytes()


def is_foldable(node: ir.Node) -> bool:
    """Whether a node whose operands are constants may be replaced by what it computes."""
    return not node.domain and facts_of(node).foldable and not subgraphs(node)


def computed(node: ir.Node, opset: int, known: KnownValues) -> Sequence[ir.TensorProtocol] | None:
    """What a node computes, one tensor per result.

    ``None`` where an operand is not known, or training changes it; where a tensor is too large; and
    where ONNX's reference implementation does not have the operator.
    """
    if not is_foldable(node) or not node.inputs:
        return None
    if node.op_type in ("Shape", "Size"):
        shape = known_shape(node.inputs[0])
        return None if shape is None else [ir.Tensor(_described_shape(node, shape))]
    tensors = [known.get(value) for value in node.inputs]
    for value, tensor in zip(node.inputs, tensors, strict=True):
        if value is not None and (
            tensor is None or tensor.nbytes > FOLD_LIMIT_BYTES or value.name in known.trained
        ):
            return None
    if node.op_type == "ConstantOfShape":
        return None if tensors[0] is None else _filled(node, tensors[0])
    arrays = known.compute(node, opset, tensors)
    return None if arrays is None else [ir.Tensor(array) for array in arrays]


def _described_shape(node: ir.Node, shape: Shape) -> Array:
    """What Shape or Size computes for an operand of this shape."""
    if node.op_type == "Size":
        return np.array(math.prod(shape), np.int64)
    start, end = node.attributes.get_int("start"), node.attributes.get_int("end")
    return np.array(shape[start:end], np.int64)


def _filled(node: ir.Node, shape: ir.TensorProtocol) -> list[ir.TensorProtocol] | None:
    """What a ConstantOfShape makes, without taking memory for it; ``None`` where it is too much."""
    attribute = node.attributes.get("value")
    filler = (
        np.zeros((), np.float32) if attribute is None else attribute.as_tensor().numpy().reshape(())
    )
    sizes = tuple(shape.numpy().tolist())
    if min(sizes, default=0) < 0 or math.prod(sizes) * filler.itemsize > _FILL_LIMIT_BYTES:
        return None
    # A view with stride 0: the weight takes no memory until it is changed.
    return [ir.Tensor(np.broadcast_to(filler, sizes))]


def _computed_arrays(
    node: ir.Node, opset: int, operands: Sequence[ir.TensorProtocol | None]
) -> list[Array] | None:
    if not _result_is_small(node):
        return None
    attributes = {
        name: ir.to_proto(attribute.as_tensor())
        if attribute.type == ir.AttributeType.TENSOR
        else attribute.value
        for name, attribute in node.attributes.items()
    }
    arrays = [None if tensor is None else tensor.numpy() for tensor in operands]
    from onnx.reference.ops import load_op  # takes long, and files of this program need none

    try:
        kernel = load_op("", node.op_type, opset)
        with np.errstate(all="ignore"):
            results = kernel.eval(*arrays, n_outputs=len(node.outputs), **attributes)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        logger.debug("%s %s is not folded: %s", node.op_type, node.name, error)
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
        if math.prod(shape) * item_bytes(output.dtype) > FOLD_LIMIT_BYTES:
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
                return ir.Tensor(np.array(attribute.value, np.float32))
            case "value_int" | "value_ints":
                return ir.Tensor(np.array(attribute.value, np.int64))
            case "value_string" | "value_strings":
                return ir.tensor(attribute.value, dtype=ir.DataType.STRING)
    raise ModelError(f"{node_label(node)}: holds no dense value; store it as a tensor")
