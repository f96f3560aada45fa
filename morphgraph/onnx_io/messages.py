"""A model as a message whose large weights stand elsewhere, as runs and inference take it.

Thousands of nodes are written for every check, several times. So what is common is written field by
field, in protobuf's wire format (:mod:`morphgraph.onnx_io.wire`); whatever is rare, such as
subgraphs, by ``onnx_ir``. Notes of nodes are left out, since nobody reads them there.
"""

import math
import struct
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.onnx_io.mapped import is_stored
from morphgraph.onnx_io.maps import has_maps, write_maps
from morphgraph.onnx_io.wire import framed, number_field

_LEAST_LENT_BYTES = 512
"""Smaller tensors stay in the message, where shape inference reads sizes and axes."""

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})
_LENT_TYPES = _FLOATS | {
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64)
}

Tensors = Mapping[str, ir.TensorProtocol]


def lent_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The weights that a session may read where they stand, by name."""
    inputs = {value.name for value in model.graph.inputs}
    return {
        name: tensor
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None
        and tensor.dtype in _LENT_TYPES
        and _bytes_of(tensor) >= _LEAST_LENT_BYTES
        and name not in inputs
    }


def _bytes_of(tensor: ir.TensorProtocol) -> int:
    """How many bytes a tensor takes; an array says it at once."""
    return tensor.numpy().nbytes if type(tensor) is ir.Tensor else tensor.nbytes


def _sizes(tensor: ir.TensorProtocol) -> Shape:
    """A tensor's sizes, which are known."""
    return cast("Shape", tuple(tensor.shape.dims))


def numbers_of(weights: Tensors) -> dict[str, ir.TensorProtocol]:
    """Those of them that are floating-point numbers."""
    return {name: tensor for name, tensor in weights.items() if tensor.dtype in _FLOATS}


def message_without_weights(
    model: ir.Model,
    shapes: Mapping[str, Shape] | None = None,
    lent: Tensors | None = None,
    given: Collection[str] = (),
) -> bytes:
    """The model as a message whose large weights are said to be external data of no file.

    Args:
        model: the model.
        shapes: those of all inputs, if not those that the model states. What it states of other
            values is left out then, or would contradict them.
        lent: the large weights, if they are known (:func:`lent_weights`).
        given: of these the ones that are further inputs instead.
    """
    return Written(model, lent).message(shapes, given)


class Written:
    """The parts of a model's messages, each written once for messages with several shapes.

    Args:
        model: is not changed as long as messages are made of it.
        lent: the large weights, if they are known (:func:`lent_weights`).
    """

    def __init__(self, model: ir.Model, lent: Tensors | None = None) -> None:
        graph = model.graph
        self._model = model
        self._lent = lent_weights(model) if lent is None else lent
        nodes = [framed(1, node_message(node)) for node in graph]
        self._nodes = b"".join([*nodes, framed(2, (graph.name or "graph").encode())])
        self._initializers: dict[str, bytes] = {}

    def message(
        self, shapes: Mapping[str, Shape] | None = None, given: Collection[str] = ()
    ) -> bytes:
        """The model's message, as of :func:`message_without_weights`."""
        model, graph, lent = self._model, self._model.graph, self._lent
        pieces = [self._nodes]
        pieces += [self._initializer(name) for name in graph.initializers if name not in given]
        pieces += [framed(11, _input(value, shapes or {})) for value in graph.inputs]
        pieces += [framed(11, _of_tensor(name, lent[name])) for name in given]
        pieces += [framed(12, _stated(value, shapes is None)) for value in graph.outputs]
        if shapes is None:
            for node in graph:
                known = [value for value in node.outputs if value.name and value.type is not None]
                pieces += [framed(13, _stated(value)) for value in known]
        return _mapped(model, b"".join([*_header(model), framed(7, b"".join(pieces))]))

    def _initializer(self, name: str) -> bytes:
        """The field of an initializer; nothing where it has no data."""
        if name not in self._initializers:
            tensor = self._model.graph.initializers[name].const_value
            written = b""
            if name in self._lent:
                written = framed(5, _of_no_file(name, self._lent[name]))
            elif tensor is not None:
                written = framed(5, tensor_message(name, tensor))
            self._initializers[name] = written
        return self._initializers[name]


def structure(model: ir.Model) -> bytes:
    """The model as a message for ``onnx.checker``: weights have the size 0, as without data."""
    graph = model.graph
    pieces = [framed(1, node_message(node)) for node in graph]
    pieces.append(framed(2, (graph.name or "graph").encode()))
    for name, value in graph.initializers.items():
        kind = number_field(2, value.dtype or 0)
        pieces.append(framed(5, number_field(1, 0) + kind + framed(8, name.encode())))
    pieces += [framed(11, _stated(value)) for value in graph.inputs]
    pieces += [framed(12, _stated(value)) for value in graph.outputs]
    return _mapped(model, b"".join([*_header(model), framed(7, b"".join(pieces))]))


def _header(model: ir.Model) -> Iterable[bytes]:
    yield number_field(1, model.ir_version)
    for domain, version in model.opset_imports.items():
        yield framed(8, framed(1, domain.encode()) + number_field(2, version))
    for function in model.functions.values():
        yield framed(25, ir.serde.serialize_function(function).SerializeToString())


def _mapped(model: ir.Model, message: bytes) -> bytes:
    """The message with the types of maps, which ``onnx_ir`` does not know."""
    if not has_maps(model):
        return message
    proto = onnx.ModelProto.FromString(message)
    write_maps(model, proto.graph)
    return bytes(proto.SerializeToString())


def node_message(node: ir.Node) -> bytes:
    """A node as a message, without its notes."""
    pieces = [_text(1, "" if v is None else v.name or "") for v in node.inputs]
    results = [value.name or "" for value in node.outputs]
    while results and not results[-1]:
        results.pop()
    pieces += [_text(2, name) for name in results]
    if node.name:
        pieces.append(_text(3, node.name))
    pieces.append(_text(4, node.op_type))
    pieces += [framed(5, _attribute(attribute)) for attribute in node.attributes.data.values()]
    if node.domain:
        pieces.append(_text(7, node.domain))
    if node.overload:
        pieces.append(_text(8, node.overload))
    return b"".join(pieces)


@lru_cache(2**15)  # the same names are written in every message of a model
def _text(number: int, text: str) -> bytes:
    return framed(number, text.encode())


def _attribute(attribute: ir.Attr) -> bytes:
    kind, value = attribute.type, attribute.value
    if value is None and attribute.is_ref():
        return bytes(ir.serde.serialize_reference_attribute(attribute).SerializeToString())
    if kind is _INTS:
        return _of_integers(attribute.name, tuple(value))
    if kind is _INT:
        return _of_integer(attribute.name, value)
    if kind == _FLOAT and not _MOST < abs(value) < math.inf:
        written = _FLOAT_TAG + struct.pack("<f", value)
    elif kind == _STRING:
        written = framed(4, value.encode())
    else:
        return bytes(ir.serde.serialize_attribute(attribute).SerializeToString())
    return framed(1, attribute.name.encode()) + written + number_field(20, kind)


@lru_cache(2**12)
def _of_integer(name: str, number: int) -> bytes:
    written = framed(1, name.encode()) + number_field(3, int(number))
    return written + number_field(20, _INT)


@lru_cache(2**12)
def _of_integers(name: str, numbers: tuple[int, ...]) -> bytes:
    written = b"".join([number_field(8, int(number)) for number in numbers])
    return framed(1, name.encode()) + written + number_field(20, _INTS)


_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS
_FLOAT, _STRING = ir.AttributeType.FLOAT, ir.AttributeType.STRING

_MOST = float(np.finfo(np.float32).max)

_FLOAT_TAG = bytes([2 << 3 | 5])
"""Before ``AttributeProto.f``, which takes 32 bits."""


def _of_no_file(name: str, tensor: ir.TensorProtocol) -> bytes:
    return _of(name, tensor, _NO_FILE)


def _of(name: str, tensor: ir.TensorProtocol, data: bytes) -> bytes:
    dims = [number_field(1, size) for size in _sizes(tensor)]
    kind = number_field(2, tensor.dtype.value)
    return b"".join([*dims, kind, framed(8, name.encode()), data])


_NO_FILE = framed(13, framed(1, b"location") + framed(2, b"lent")) + number_field(14, 1)
"""``TensorProto.external_data`` and ``.data_location``."""


def _of_tensor(name: str, tensor: ir.TensorProtocol) -> bytes:
    return _tensor_value(name, tensor.dtype, _sizes(tensor))


def tensor_message(name: str, tensor: ir.TensorProtocol) -> bytes:
    """A tensor with its data, which stands beside no file."""
    if tensor.dtype == ir.DataType.STRING:
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = name
        return bytes(proto.SerializeToString())
    if is_stored(tensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    return _of(name, tensor, framed(9, tensor.tobytes()))


def _input(value: ir.Value, shapes: Mapping[str, Shape]) -> bytes:
    shape = shapes.get(value.name or "")
    if shape is None or not isinstance(value.type, ir.TensorType):
        return _stated(value)
    return _tensor_value(value.name or "", value.type.dtype, shape)


def _stated(value: ir.Value, with_shape: bool = True) -> bytes:
    """What the model states of a value, with or without its shape."""
    if not with_shape and isinstance(value.type, ir.TensorType):
        return _tensor_value(value.name or "", value.type.dtype, None)
    return bytes(ir.serde.serialize_value(value).SerializeToString())


def _tensor_value(name: str, dtype: ir.DataType, shape: Shape | None) -> bytes:
    return _text(1, name) + framed(2, type_message(dtype, shape))


@lru_cache(2**12)
def type_message(dtype: ir.DataType, shape: Shape | None) -> bytes:
    """The type of a tensor as a message."""
    tensor = number_field(1, dtype.value)
    if shape is not None:
        tensor += framed(2, b"".join([framed(1, number_field(1, size)) for size in shape]))
    return framed(1, tensor)
