"""Files hold byte for byte what protobuf writes of ``onnx_ir``'s message."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.written import written
from morphgraph.testing import model_from_text

PLAIN = """net (float[1,3,8,8] x, float[4,3,3,3] w, float[40,30] m)
    => (float[1,4,6,6] y, float[40,30] n)
<float[4] b = {1,2,3,4}, int64[2] axes = {2,3}> {
    a = Conv<kernel_shape=[3,3], group=1>(x, w, b)
    y = LeakyRelu<alpha=0.2>(a)
    n = Softmax<axis=-1>(m)
    k = Constant<value = int64[1] {1}>()
    e, unused = TopK(axes, k)
    l = LRN<size=3, alpha=0.0001>(x)
}"""

OPEN = """net (float[N,3] x) => (float[N,P] y) { y = Concat<axis=1>(x, x) }"""

WITH_BRANCHES = """net (bool c, float[2] x) => (float[2] y) {
    y = If(c) <then_branch = t () => (float[2] p) { p = Relu(x) },
               else_branch = e () => (float[2] q) { q = Neg(x) }>
}"""

WITH_FUNCTION = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
net (float[2] x) => (float[2] y) { y = own.twice(x) }
<domain: "own", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }"""


def noted() -> ir.Model:
    """A model with every kind of note, and tensors of many types."""
    model = model_from_text(PLAIN)
    graph = model.graph
    graph.doc_string, graph.metadata_props["z"] = "what it is", "1"
    model.producer_name, model.producer_version, model.domain = "somebody", "2", "here"
    model.model_version, model.doc_string = 7, "in words: \N{GREEK SMALL LETTER MU}"
    model.metadata_props.update({"b": "2", "a": "1"})
    node = graph[0]
    node.doc_string, node.metadata_props["key"] = "a layer", "x"
    graph[1].metadata_props.update({"later": "2", "earlier": "1"})
    node.outputs[0].doc_string, node.outputs[0].metadata_props["k"] = "a map", "v"
    graph.inputs[0].shape = ir.Shape([1, 3, 8, 8], denotations=["N", "C", None, None])
    generator = np.random.default_rng(0)
    for dtype in ("float32", "float16", "float64", "int8", "uint16", "bool", "int64"):
        for count in (0, 3, 2000):
            name = f"{dtype}_{count}"
            array = generator.integers(0, 2, count).astype(dtype)
            tensor = ir.Tensor(array, name=name, doc_string=f"of {count}")
            tensor.metadata_props["from"] = "here"
            graph.register_initializer(ir.val(name, const_value=tensor))
    half = ir.tensor(np.array(generator.normal(0, 1, 3000)), ir.DataType.DOUBLE, name="strided")
    strided = ir.Tensor(np.ascontiguousarray(half.numpy()).reshape(50, 60).T, name="strided")
    graph.register_initializer(ir.val("strided", const_value=strided))
    words = ir.StringTensor(np.array([b"a", b"bc"]), shape=ir.Shape([2]), name="words")
    graph.register_initializer(ir.val("words", const_value=words))
    return model


def annotated() -> ir.Model:
    model = model_from_text(OPEN)
    model.graph.inputs[0].meta["quant_parameter_tensor_names"] = {"SCALE_TENSOR": "s"}
    return model


MODELS = {
    "plain": lambda: model_from_text(PLAIN),
    "open": lambda: model_from_text(OPEN),
    "branches": lambda: model_from_text(WITH_BRANCHES),
    "function": lambda: ir.from_onnx_text(WITH_FUNCTION),
    "noted": noted,
    "annotated": annotated,
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_what_protobuf_writes(kind: str) -> None:
    model = MODELS[kind]()
    expected = ir.to_proto(model).SerializeToString(deterministic=True)
    assert b"".join(written(model)) == expected
    again = ir.from_proto(onnx.ModelProto.FromString(expected))  # tensors stand in the message now
    assert b"".join(written(again)) == b"".join(written(model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_what_onnx_ir_copies(kind: str) -> None:
    model = MODELS[kind]()
    model.graph[0].outputs[0].meta["key"] = "a note"
    copy = copied(model)
    proto = ir.to_proto(copy)
    assert proto == ir.to_proto(model.clone()) == ir.to_proto(model)
    assert copy.graph[0].outputs[0].meta["key"] == "a note"
    copy.graph[0].outputs[0].name = "other"
    for value in copy.graph.inputs:
        value.shape = None
    assert ir.to_proto(model) == proto
    mine, theirs = (
        {v for node in m.graph for v in (*node.inputs, *node.outputs) if v} for m in (model, copy)
    )
    assert not mine & theirs
