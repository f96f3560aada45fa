"""Models are read as ``onnx_ir`` reads them, whatever the message holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from morphgraph.onnx_io.parsed import parsed
from morphgraph.testing import model_from_text
from tests.onnx_io.test_written import OPEN, PLAIN, WITH_BRANCHES, WITH_FUNCTION, noted

UNSORTED = """net (float[2] x) => (float[2] y, float z) {
    y = Neg(a)
    a = Relu(x)
    z = ReduceSum<keepdims=0>(x)
}"""


def messages() -> Iterator[tuple[str, onnx.ModelProto]]:
    texts = {
        "plain": PLAIN,
        "open": OPEN,
        "branches": WITH_BRANCHES,
        "function": WITH_FUNCTION,
        "unsorted": UNSORTED,
    }
    for name, text in texts.items():
        yield name, onnx.parser.parse_model(_headed(text))
    yield "noted", ir.to_proto(noted())
    yield "rare", rare()


def _headed(text: str) -> str:
    return text if text.startswith("<") else f'<ir_version: 10, opset_import: ["" : 20]> {text}'


def rare() -> onnx.ModelProto:
    """A message with all that is not a tensor of known sizes, and with fields that are empty."""
    proto = ir.to_proto(model_from_text(PLAIN))
    graph = proto.graph
    graph.doc_string, proto.doc_string, graph.node[0].doc_string = "", "", ""
    graph.node[1].attribute[0].doc_string = "a slope"
    graph.input[0].type.denotation = "IMAGE"
    graph.value_info.add().CopyFrom(
        onnx.helper.make_tensor_value_info(
            "a", 1, [1, 4, 6, 6], shape_denotation=["N", "C", "", ""]
        )
    )
    values = {
        "no_shape": onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None),
        "scalar": onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, []),
        "empty": onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, [0, 2]),
        "no_size": onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, [None, 2]),
        "sequence": onnx.helper.make_tensor_sequence_value_info("", 1, [2]),
        "sparse": onnx.helper.make_sparse_tensor_value_info("", onnx.TensorProto.FLOAT, [2]),
        "no_type": onnx.ValueInfoProto(),
    }
    for name, stated in values.items():
        stated.name = name
        graph.value_info.add().CopyFrom(stated)
        graph.node.add(op_type="Made", domain="own", output=[name, ""], input=["", "x"])
    graph.value_info[0].metadata_props.add(key="k", value="v")
    weight = onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "weight")
    graph.initializer.add().CopyFrom(weight)
    stated = onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, ["A", 3])
    graph.value_info.add().CopyFrom(stated)
    default = onnx.numpy_helper.from_array(np.ones((1, 3, 8, 8), np.float32), "x")
    graph.initializer.add().CopyFrom(default)
    graph.node[-1].attribute.add(name="words", type=onnx.AttributeProto.STRINGS, strings=[b"a"])
    graph.node[-1].attribute.add(name="bytes", type=onnx.AttributeProto.STRING, s=b"\xff")
    return proto


def facts(model: ir.Model) -> list[Any]:
    """All that can be told of a model."""

    def of(value: ir.Value | None) -> Any:
        if value is None:
            return None
        shape, tensor = value.shape, value.const_value
        return (
            *(value.name, repr(value.type), value.doc_string, dict(value.metadata_props)),
            *(value.is_graph_input(), value.is_graph_output(), value.is_initializer()),
            shape
            and (repr(shape), shape.frozen, [shape.get_denotation(k) for k in range(shape.rank())]),
            tensor and (tensor.name, tensor.dtype, tensor.doc_string, tensor.numpy().tolist()),
        )

    graph = model.graph
    ends = [of(v) for v in (*graph.inputs, *graph.initializers.values(), *graph.outputs)]
    nodes = [
        (
            *(node.name, node.domain, node.op_type, node.overload, node.version, node.doc_string),
            dict(node.metadata_props),
            [of(value) for value in (*node.inputs, *node.outputs)],
            [(name, a.name, a.type, a.doc_string) for name, a in node.attributes.items()],
        )
        for node in graph
    ]
    about = (model.ir_version, model.producer_name, model.producer_version, model.domain)
    texts = (model.model_version, model.doc_string, graph.name, graph.doc_string)
    return [ends, nodes, about, texts, dict(model.metadata_props), dict(graph.opset_imports)]


MESSAGES = dict(messages())


@pytest.mark.parametrize("name", MESSAGES)
def test_everything_is_read_as_onnx_ir_reads_it(name: str) -> None:
    proto = MESSAGES[name]
    found, expected = parsed(proto, {}), ir.from_proto(proto)
    assert facts(found) == facts(expected)
    written, wanted = (
        ir.to_proto(m).SerializeToString(deterministic=True) for m in (found, expected)
    )
    assert written == wanted


@pytest.mark.parametrize("name", ["noted", "function"])
def test_weights_that_are_given_are_taken_where_the_message_has_none(name: str) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(MESSAGES[name])
    weight = proto.graph.initializer.add(name="given", data_type=1, dims=[2, 2], doc_string="own")
    weight.metadata_props.add(key="k", value="v")
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    value = parsed(proto, {"given": array}).graph.initializers["given"]
    tensor = value.const_value
    assert tensor is not None
    assert tensor.numpy() is array
    assert (tensor.name, tensor.doc_string, tensor.metadata_props) == ("given", "own", {"k": "v"})
    assert value.shape == (2, 2)
    assert value.dtype == ir.DataType.FLOAT


def test_attributes_that_are_alike_are_one_object() -> None:
    text = "net (float[2,3] x) => (float[2,3] z) { y = Softmax<axis=1>(x)  z = Softmax<axis=1>(y) }"
    first, second = parsed(ir.to_proto(model_from_text(text)), {}).graph
    assert first.attributes["axis"] is second.attributes["axis"]
