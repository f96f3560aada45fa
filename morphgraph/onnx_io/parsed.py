"""A model of a message: what ``onnx_ir`` makes of it, in about half of the time.

Thousands of nodes, values and attributes are alike: each kind of shape and attribute is read once.
What is rare is left to ``onnx_ir``: local functions, subgraphs, notes for quantizers, types that
are no tensor's, symbolic sizes.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import onnx
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.onnx_io.values import shape_of


def parsed(proto: onnx.ModelProto, weights: Mapping[str, Array]) -> ir.Model:
    """The model that a checked message describes.

    Args:
        proto: the message, each of whose names is made once, as ``check_proto`` tells.
        weights: numbers of initializers that do not stand in the message, by name; their tensors
            there have types, sizes and notes alone.

    Raises:
        ir.serde.SerdeError: something in the message is none of what ``onnx_ir`` knows.

    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text("net (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    >>> [node.op_type for node in parsed(ir.to_proto(model), {}).graph]
    ['Relu']
    """
    if _is_rare(proto):
        model = ir.from_proto(proto)
        for name, array in weights.items():
            value = model.graph.initializers[name]
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.Tensor(
                array,
                dtype=tensor.dtype,
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
        return model
    model = ir.Model(
        _Graph(proto.graph, weights).read(),
        ir_version=proto.ir_version,
        producer_name=proto.producer_name if proto.HasField("producer_name") else None,
        producer_version=proto.producer_version if proto.HasField("producer_version") else None,
        domain=proto.domain if proto.HasField("domain") else None,
        model_version=proto.model_version if proto.HasField("model_version") else None,
        doc_string=_doc_string(proto),
        metadata_props=_notes(proto.metadata_props),
    )
    model.opset_imports.update({each.domain: each.version for each in proto.opset_import})
    return model


def _is_rare(proto: onnx.ModelProto) -> bool:
    """Whether the message has something that is left to ``onnx_ir`` as a whole."""
    graph = proto.graph
    return bool(
        proto.functions
        or proto.configuration
        or graph.quantization_annotation
        or any(
            node.device_configurations
            or any(attribute.type in _OF_GRAPHS for attribute in node.attribute)
            for node in graph.node
        )
    )


_OF_GRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
_SHARED = frozenset(
    {
        *(onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.STRING),
        *(onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS),
    }
)
"""Attributes whose values do not change, so that nodes may share them."""


class _Graph:
    """Reads a graph without subgraphs.

    Args:
        proto: the graph.
        weights: as of :func:`parsed`.
    """

    def __init__(self, proto: onnx.GraphProto, weights: Mapping[str, Array]) -> None:
        self._proto, self._weights = proto, weights
        self._stated = {stated.name: stated for stated in proto.value_info}
        self._attributes: dict[bytes, ir.Attr] = {}
        self._values: dict[str, ir.Value | None] = {"": None}

    def read(self) -> ir.Graph:
        """The graph, with its nodes in the message's order."""
        proto, values = self._proto, self._values
        inputs = [self._value(stated.name, stated) for stated in proto.input]
        initializers = [self._initializer(tensor) for tensor in proto.initializer if tensor.name]
        stated = self._stated.get
        for node in proto.node:
            for name in node.output:
                if name:
                    self._value(name, stated(name))
        nodes = [self._node(node) for node in proto.node]
        outputs = []
        for each in proto.output:
            value = values[each.name]
            assert value is not None
            _state(value, each)
            outputs.append(value)
        return ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            doc_string=_doc_string(proto),
            name=proto.name if proto.HasField("name") else None,
            metadata_props=_notes(proto.metadata_props),
        )

    def _value(self, name: str, stated: onnx.ValueInfoProto | None) -> ir.Value:
        value = self._values[name] = ir.Value(name=name)
        if stated is not None:
            _state(value, stated)
        return value

    def _initializer(self, proto: onnx.TensorProto) -> ir.Value:
        """An initializer, which may be an input with a default as well."""
        name = proto.name
        array = self._weights.get(name)
        if array is None:
            tensor = ir.serde.deserialize_tensor(proto)
        else:
            tensor = ir.Tensor(
                array,
                dtype=ir.DataType(proto.data_type),
                shape=shape_of(array.shape),
                name=name,
                doc_string=_doc_string(proto),
                metadata_props=_notes(proto.metadata_props),
            )
        value = self._values.get(name)
        if value is None:
            value = self._value(name, self._stated.get(name))
            value.type = value.type or ir.TensorType(tensor.dtype)
            value.shape = value.shape or shape_of(tensor.shape.dims)
        value.const_value = tensor
        return value

    def _node(self, proto: onnx.NodeProto) -> ir.Node:
        values = self._values
        return ir.Node(
            proto.domain,
            proto.op_type,
            [values[name] for name in proto.input],
            [self._attribute(attribute) for attribute in proto.attribute],
            overload=proto.overload,
            outputs=[values[name] or ir.Value(name="") for name in proto.output],
            name=proto.name,
            doc_string=_doc_string(proto),
            metadata_props=_notes(proto.metadata_props),
        )

    def _attribute(self, proto: onnx.AttributeProto) -> ir.Attr:
        if proto.type not in _SHARED:
            return ir.serde.deserialize_attribute(proto)
        content = proto.SerializeToString()
        known = self._attributes.get(content)
        if known is None:
            known = self._attributes[content] = ir.serde.deserialize_attribute(proto)
        return known


def _state(value: ir.Value, stated: onnx.ValueInfoProto) -> None:
    """Give a value the type, shape and notes that the message states."""
    plain = _plain_type(stated.type.SerializeToString())
    if plain is None:
        ir.serde.deserialize_value_info_proto(stated, value)
        return
    value.type, value.shape = ir.TensorType(plain.dtype), plain.shape
    value.doc_string = _doc_string(stated)
    if stated.metadata_props:
        value.metadata_props.update(_notes(stated.metadata_props) or {})


class _Plain(NamedTuple):
    """A tensor's type with sizes that are all known."""

    dtype: ir.DataType
    shape: ir.Shape


@lru_cache(2**12)
def _plain_type(content: bytes) -> _Plain | None:
    """What a type says; ``None``: it is another than that of a tensor with known sizes."""
    proto = onnx.TypeProto.FromString(content)
    tensor = proto.tensor_type
    dims = tensor.shape.dim
    if (
        not proto.HasField("tensor_type")
        or not tensor.HasField("elem_type")
        or not tensor.HasField("shape")
        or proto.HasField("denotation")
        or any(not dim.HasField("dim_value") or dim.HasField("denotation") for dim in dims)
    ):
        return None
    return _Plain(ir.DataType(tensor.elem_type), shape_of(tuple([dim.dim_value for dim in dims])))


def _doc_string(
    proto: onnx.ModelProto | onnx.GraphProto | onnx.NodeProto | onnx.TensorProto,
) -> str | None:
    return proto.doc_string if proto.HasField("doc_string") else None


def _notes(entries: Iterable[onnx.StringStringEntryProto]) -> dict[str, str] | None:
    return {entry.key: entry.value for entry in entries} or None
