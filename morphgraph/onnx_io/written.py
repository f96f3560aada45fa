"""A model as the message that a file holds: byte for byte what ``onnx_ir`` makes of it, sooner.

Thousands of nodes and values are alike, and are written field by field, in protobuf's wire format
and in the order of the fields' numbers (:mod:`morphgraph.onnx_io.wire`). What is rare is left to
``onnx_ir``: local functions, notes for quantizers, types that are no tensor's, symbolic sizes.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.onnx_io.maps import has_maps, write_maps
from morphgraph.onnx_io.messages import node_message, type_message
from morphgraph.onnx_io.values import known_shape
from morphgraph.onnx_io.wire import (
    LEAST_HELD_BYTES,
    Buffer,
    framed,
    framed_pieces,
    number_field,
)

_NUMERIC = (
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL),
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
)
PLAIN_TYPES: dict[int, np.dtype[Any]] = {
    dtype.value: dtype.numpy() for dtype in _NUMERIC if sys.byteorder == "little"
}
"""Types whose data in a message is what numpy has in memory, by their number."""

_ANNOTATION_KEY = "quant_parameter_tensor_names"
"""Under which ``onnx_ir`` keeps annotations of values."""


def written(model: ir.Model) -> list[Buffer]:
    """The model as one message, in pieces; large weights are not copied into it.

    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text("net (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    >>> b"".join(written(model)) == ir.to_proto(model).SerializeToString(deterministic=True)
    True
    """
    if _is_rare(model):
        return [_by_onnx_ir(model)]
    pieces: list[Buffer] = [number_field(1, model.ir_version)]
    for number, text in ((2, model.producer_name), (3, model.producer_version), (4, model.domain)):
        pieces += [framed(number, text.encode())] if text else []
    pieces += [number_field(5, model.model_version)] if model.model_version else []
    pieces += [framed(6, model.doc_string.encode())] if model.doc_string else []
    pieces += framed_pieces(7, list(_graph(model.graph)))
    for domain, version in model.opset_imports.items():
        pieces.append(framed(8, framed(1, domain.encode()) + number_field(2, version)))
    return [*pieces, *_notes(14, model.metadata_props)]


def _is_rare(model: ir.Model) -> bool:
    """Whether the model has something that is left to ``onnx_ir``."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *graph.outputs]
    values += [value for node in graph for value in node.outputs]
    return bool(
        model.functions
        or model.device_configurations
        or any(_ANNOTATION_KEY in value.meta.data for value in values)
        or any(node.device_configurations for node in graph)
        or has_maps(model)
    )


def _by_onnx_ir(model: ir.Model) -> bytes:
    proto = ir.to_proto(model)
    write_maps(model, proto.graph)
    for tensor in proto.graph.initializer:
        _drop_repeated_notes(tensor)
    return bytes(proto.SerializeToString(deterministic=True))


def _graph(graph: ir.Graph) -> Iterator[Buffer]:
    """The fields of a graph."""
    for node in graph:
        yield framed(1, _node(node))
    if graph.name:
        yield framed(2, graph.name.encode())
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.const_value.name = value.name
            yield from framed_pieces(5, _tensor(value.const_value))
    if graph.doc_string:
        yield framed(10, graph.doc_string.encode())
    inputs = set(graph.inputs)
    for value in graph.inputs:
        yield framed(11, _value(value))
    for value in graph.outputs:
        yield framed(12, _value(value))
    for value in graph.initializers.values():
        if value not in inputs and _says_something(value):
            yield framed(13, _value(value))
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output() and _says_something(value):
                yield framed(13, _value(value))
    yield from _notes(16, graph.metadata_props)


def _node(node: ir.Node) -> bytes:
    if node.doc_string or any(a.doc_string for a in node.attributes.data.values()):
        return bytes(ir.serde.serialize_node(node).SerializeToString(deterministic=True))
    return b"".join([node_message(node), *_notes(9, node.metadata_props)])


def _tensor(tensor: ir.TensorProtocol) -> list[Buffer]:
    kind: type = type(tensor)
    if _is_written_otherwise(kind) or tensor.dtype == ir.DataType.STRING:
        proto = ir.serde.serialize_tensor(tensor)
        _drop_repeated_notes(proto)
        return [proto.SerializeToString(deterministic=True)]
    pieces: list[Buffer] = [number_field(1, size) for size in tensor.shape.numpy()]
    pieces.append(number_field(2, tensor.dtype.value))
    pieces += [framed(8, tensor.name.encode())] if tensor.name else []
    pieces += framed_pieces(9, [_data(tensor)])
    pieces += [framed(12, tensor.doc_string.encode())] if tensor.doc_string else []
    return [*pieces, *_notes(16, tensor.metadata_props)]


def _data(tensor: ir.TensorProtocol) -> Buffer:
    """A tensor's numbers as a file holds them: in memory as they are, if that is the same."""
    if tensor.dtype not in PLAIN_TYPES or tensor.nbytes < LEAST_HELD_BYTES:
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


@cache  # it is asked of every weight, and classes of onnx_ir are slow to ask
def _is_written_otherwise(kind: type) -> bool:
    return issubclass(kind, ir.ExternalTensor | ir.serde.TensorProtoTensor)


def _drop_repeated_notes(tensor: onnx.TensorProto) -> None:
    """Keep one entry per key: onnx_ir 1.1 writes those of a tensor that it has read twice."""
    entries = {entry.key: entry.value for entry in tensor.metadata_props}
    if len(entries) < len(tensor.metadata_props):
        del tensor.metadata_props[:]
        for key, value in entries.items():
            tensor.metadata_props.add(key=key, value=value)


def _says_something(value: ir.Value) -> bool:
    """Whether there is anything to write of a value beside its name."""
    return bool(value.name) and bool(
        value.type is not None
        or value.shape is not None
        or value.doc_string
        or value.metadata_props
    )


def _value(value: ir.Value) -> bytes:
    """What the model states of a value."""
    kind, sizes = value.type, known_shape(value)
    if (
        sizes is None
        or type(kind) is not ir.TensorType
        or kind.denotation
        or (value.shape is not None and any(map(value.shape.get_denotation, range(len(sizes)))))
    ):
        return bytes(ir.serde.serialize_value(value).SerializeToString(deterministic=True))
    pieces = [framed(1, (value.name or "").encode()), framed(2, type_message(kind.dtype, sizes))]
    pieces += [framed(3, value.doc_string.encode())] if value.doc_string else []
    return b"".join([*pieces, *_notes(4, value.metadata_props)])


def _notes(number: int, notes: Mapping[str, str]) -> Iterator[bytes]:
    """Entries of metadata, in the order of their keys."""
    for key in sorted(notes):
        yield framed(number, _entry(key, notes[key]))


@lru_cache(2**12)
def _entry(key: str, note: str) -> bytes:
    return framed(1, key.encode()) + framed(2, note.encode())
