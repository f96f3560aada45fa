"""Sizes that neither ONNX nor an entry knows: ONNX Runtime is asked, or the operator is opaque."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.testing import model_from_text, prove

MS, ML = "com.microsoft", "ai.onnx.ml"
GENERATOR = np.random.default_rng(0)


def _network(
    middle: list[onnx.NodeProto],
    initializers: Mapping[str, object],
    opset: int = 17,
    shape: tuple[str | int, ...] = ("B", "S", 32),
) -> onnx.ModelProto:
    """``x`` through the nodes that make ``m``, then a layer of 64 and one of 5."""
    given: dict[str, object] = {"w1": (32, 64), "w2": (64, 5), **initializers}
    tensors = [
        numpy_helper.from_array(
            GENERATOR.standard_normal(content).astype(np.float32)
            if isinstance(content, tuple)
            else np.asarray(content),
            name,
        )
        for name, content in given.items()
    ]
    tail = [
        helper.make_node("MatMul", ["m", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        [*middle, *tail],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (*shape[:-1], 5))],
        tensors,
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", opset), (MS, 1), (ML, 3))]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _node(op_type: str, inputs: list[str], domain: str = MS, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, ["m"], name="middle", domain=domain, **attributes)


def _quantized(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node between QuantizeLinear and DequantizeLinear."""
    node.output[0] = "p"
    return [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        node,
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["m"], name="d"),
    ]


SCALE = {"s": np.float32(0.1), "z": np.uint8(128)}
MODELS = {
    "QLinearSoftmax": lambda: _network(
        _quantized(_node("QLinearSoftmax", ["q", "s", "z", "s", "z"], axis=-1, opset=13)), SCALE
    ),
    "Normalizer": lambda: _network([_node("Normalizer", ["x"], ML, norm="L2")], {}, shape=(4, 32)),
    "Inverse": lambda: _network([_node("Inverse", ["x"])], {}, shape=(2, 32, 32)),
    "LayerNormalization of opset 13": lambda: _network(
        [_node("LayerNormalization", ["x", "g", "b"], "")], {"g": (32,), "b": (32,)}, opset=13
    ),
    "comparisons of opset 12": lambda: _network(
        [
            helper.make_node("GreaterOrEqual", ["x", "k"], ["above"], name="above"),
            helper.make_node("LessOrEqual", ["k", "x"], ["below"], name="below"),
            helper.make_node("And", ["above", "below"], ["both"], name="both"),
            helper.make_node("Cast", ["both"], ["c"], to=1, name="cast"),
            helper.make_node("Mul", ["x", "c"], ["m"], name="mul"),
        ],
        {"k": np.float32(0.1)},
        opset=12,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_of_the_network_is_resized(name: str, recwarn: pytest.WarningsRecorder) -> None:
    graph = mg.lift(MODELS[name]())
    assert not recwarn.list
    assert [group.width for group in graph.groups if group.resizable] == [64]
    prove(graph)


def test_sizes_that_depend_on_numbers_are_not_believed() -> None:
    """Unique of com.microsoft gives as many numbers as there are different ones."""
    text = """net (float[1,4] x, float[4,8] w1, float[8,3] w2) => (float[1,3] y, float[n] u) {
        h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) f = Reshape(y, flat)
        u, p, c = com.microsoft.Unique(f) }"""
    header = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
    text = text.replace("{", "<int64[1] flat = {-1}> {", 1)
    with pytest.warns(mg.MorphWarning, match=r"\(Unique\): the size of its result 'u'"):
        graph = mg.lift(model_from_text(header + text))
    assert [group.width for group in graph.groups if group.resizable] == [8]
    prove(graph)


UNKNOWN = """<ir_version: 8, opset_import: ["": 17, "com.acme": 1]>
    net (float[N,3,8,8] x, float[6,3,3,3] w1, float[7,6,3,3] w2, float[7,7,1,1] w3,
        float[9,3,1,1] v1, float[4,9,1,1] v2) => (float[N,k,a,b] y, float[N,4,8,8] z) {
        a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) d = com.acme.Odd(c) e = Conv(d, w3) y = Relu(e)
        f = Conv(x, v1) g = Relu(f) z = Conv(g, v2) }"""


def test_an_operator_that_nobody_knows_is_a_barrier_and_the_rest_goes_on(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Before it, beside it: resizable. It and all behind it keep their size, and cost nothing."""
    graph = mg.lift(model_from_text(UNKNOWN))
    (warning,) = recwarn.list
    assert "node 'Odd_d' (Odd): the size of its result 'd' cannot be known" in str(warning.message)
    assert [group.width for group in graph.groups if group.resizable] == [6, 9]
    opaque = {op.name: op.opaque for op in graph.ops if op.opaque}
    assert list(opaque) == ["Odd_d", "Conv_e", "Relu_y"]
    assert opaque["Conv_e"] == "the size of 'd' is not known before it runs"
    assert mg.cost(graph, "macs").total == 36 * 27 * 6 + 16 * 54 * 7 + 64 * (3 * 9 + 9 * 4)
    assert mg.cost(graph, "memory").total > 0
    plan = mg.plan(graph, budget={"flops": "60%"})
    small = mg.apply(graph, plan, verify=False)
    assert [str(size) for size in small.graph.outputs[0].shape or ()] == ["N", "k", "a", "b"]
    # The operator stands for what keeps its operand: then both can run.
    for model in (graph.model, small):
        for node in model.graph:
            if node.op_type == "Odd":
                node.op_type, node.domain = "Identity", ""
    x = GENERATOR.standard_normal((3, 3, 8, 8)).astype(np.float32)
    before, after = (_run(model, x) for model in (graph.model, small))
    assert [a.shape for a in after] == [b.shape for b in before]


def _run(model: object, x: np.ndarray) -> list[np.ndarray]:
    import onnx_ir as ir

    assert isinstance(model, ir.Model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return list(session.run(None, {"x": x}))


def test_a_length_beside_the_operands_is_one_that_fits() -> None:
    """GroupQueryAttention is told how many keys there are, and takes no other number."""
    model = _network(
        [
            helper.make_node(
                "GroupQueryAttention",
                ["x", "x", "x", "", "", "l", "t"],
                ["m", "k", "v"],
                name="middle",
                domain=MS,
                num_heads=4,
                kv_num_heads=4,
            )
        ],
        {},
    )
    model.graph.input.append(helper.make_tensor_value_info("l", TensorProto.INT32, ["B"]))
    model.graph.input.append(helper.make_tensor_value_info("t", TensorProto.INT32, []))
    graph = mg.lift(model)
    assert graph.shapes["h"] == (2, 64, 64)
    assert [group.width for group in graph.groups if group.resizable] == [64]
