"""What comes out of a node that neither ONNX nor its entry knows the sizes of: it is run.

ONNX Runtime gets the node by itself, with operands of the known sizes, and is asked once for every
operator, attributes and operand sizes.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import captured_values, dtype_of, item_bytes, known_shape
from morphgraph.passes.canonical.fold_values import KnownValues

_MAX_CONSTANT_BYTES = 2**20  # of an operand whose numbers the node gets; larger ones are weights
_MAX_OPERAND_BYTES = 2**31  # of all operands; what needs more is not run

ResultType = tuple[ir.TypeProtocol, ir.Shape]

logger = logging.getLogger(__name__)


class Runtime:
    """Asks ONNX Runtime for the results of single nodes, and remembers the answers.

    Args:
        model: its operator sets are those of the nodes.
        known: the numbers that operands have.
    """

    def __init__(self, model: ir.Model, known: KnownValues) -> None:
        self._model = model
        self._known = known
        self._answers: dict[object, Sequence[ResultType | None] | None] = {}

    def results(self, node: ir.Node) -> Sequence[ResultType | None] | None:
        """Type and shape of every result; ``None`` for one that depends on numbers.

        ``None`` for all where an operand's size is not known, and where ONNX Runtime does not run
        the node.
        """
        operands = [
            v for v in dict.fromkeys((*node.inputs, *captured_values(node))) if v is not None
        ]
        shapes = [known_shape(value) for value in operands]
        if None in shapes or any(value.dtype is None for value in operands):
            return None
        if sum(_bytes(value) for value in operands) > _MAX_OPERAND_BYTES:
            return None
        constants = {
            value.name or "": tensor.numpy()
            for value in operands
            if (tensor := self._known.get(value)) is not None
            and tensor.nbytes <= _MAX_CONSTANT_BYTES
        }
        attributes = ir.serde.serialize_node(node)
        for field in ("input", "output", "name", "doc_string", "metadata_props"):
            attributes.ClearField(field)
        key = (
            attributes.SerializeToString(deterministic=True),
            tuple((value.dtype, shape) for value, shape in zip(operands, shapes, strict=True)),
            tuple((name in constants, value is None) for name, value in _ports(node)),
            tuple(array.tobytes() for array in constants.values() if array.dtype.kind != "O"),
        )
        if key not in self._answers:
            self._answers[key] = self._asked(node, operands, constants)
        return self._answers[key]

    def _asked(
        self, node: ir.Node, operands: Sequence[ir.Value], constants: Arrays
    ) -> Sequence[ResultType | None] | None:
        """What two runs agree upon: a size that differs between them depends on numbers."""
        from morphgraph.onnx_io import runtime

        model = self._alone(node, operands, constants)
        free = [value for value in operands if value.name not in constants]
        length = max((size for v in operands for size in (known_shape(v) or ())[1:2]), default=1)

        def run(half: bool, single: int) -> dict[str, Any]:
            feeds = {value.name or "": _numbers(value, half, single) for value in free}
            return runtime.results(model, feeds)

        try:
            runs = [run(False, length)]
            try:
                runs.append(run(True, length + 1))
            except UnsupportedError:  # a number that must be that length follows from the sizes
                runs.append(run(True, length))
        except UnsupportedError as error:
            logger.debug("%s %s is not run: %s", node.op_type, node.name, error)
            return None
        return [
            _type_of([run[value.name] for run in runs]) if value.name else None
            for value in node.outputs
        ]

    def _alone(self, node: ir.Node, operands: Sequence[ir.Value], constants: Arrays) -> ir.Model:
        """A node as a model, whose inputs are the operands that are no constants."""
        proto = onnx.ModelProto(ir_version=max(self._model.ir_version, 8))
        for domain, version in self._model.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        graph = proto.graph
        graph.name = "node"
        graph.node.append(ir.serde.serialize_node(node))
        for value in operands:
            name = value.name or ""
            if name in constants:
                graph.initializer.append(onnx.numpy_helper.from_array(constants[name], name))
            else:
                graph.input.append(ir.serde.serialize_value(value))
        graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in node.outputs if v.name)
        return ir.from_proto(proto)


def _ports(node: ir.Node) -> Sequence[tuple[str, ir.Value | None]]:
    return [("" if value is None else value.name or "", value) for value in node.inputs]


def _bytes(value: ir.Value) -> float:
    return float(np.prod(known_shape(value) or (), dtype=np.float64)) * item_bytes(value.dtype)


def _numbers(value: ir.Value, half: bool, single: int) -> Array:
    """An operand for one of two runs: ones; in the second every other number is zero.

    An integer by itself may be a length: it is ``single``.
    """
    shape, dtype = known_shape(value), dtype_of(value)
    assert shape is not None
    if dtype.kind == "O":
        return np.full(shape, "a", object)
    if not shape and dtype.kind in "iu":
        return np.asarray(single, dtype)
    array = np.ones(shape, dtype)
    if half:
        array.reshape(-1)[::2] = np.zeros((), dtype)
    return array


def _type_of(results: Sequence[object]) -> ResultType | None:
    """The type of a result of two runs, if it is a tensor of one size."""
    first, second = results
    if not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
        return None
    if first.shape != second.shape:
        return None
    dtype = ir.DataType.STRING if first.dtype.kind == "O" else ir.DataType.from_numpy(first.dtype)
    return ir.TensorType(dtype), ir.Shape(first.shape)
