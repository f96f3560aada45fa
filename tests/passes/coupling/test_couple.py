"""From operators to edges: what stands where, what is pinned, what does not fit."""

import onnx_ir as ir
import pytest

from morphgraph.errors import ModelError
from morphgraph.graph import Dim
from morphgraph.notation import NotationError
from morphgraph.ops import entry_of, op, register
from morphgraph.ops.op import _REGISTRY
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.coupling.couple import couple, input_independent_values, layer_name
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

OPSET = '<ir_version: 10, opset_import: ["": 20, "com.acme": 1]>'


def test_edges_say_which_axes_a_factor_stands_on() -> None:
    text = "net (float[1,3,4,4] x, float[6,3,3,3] w, float[6] b) => (float[1,6,2,2] y)"
    model = model_from_text(OPSET + text + "{ y = Conv(x, w, b) }")
    couplings = couple(canonicalize(model))
    stands: dict[str, set[Dim]] = {}
    start = len(couplings.dims)
    for edge in couplings.edges:
        name = couplings.factors[edge.factor - start].name
        stands.setdefault(name, set()).add(couplings.dims[edge.dim])
    assert stands["i"] == {Dim("x", 1), Dim("w", 1)}
    assert stands["o"] == {Dim("w", 0), Dim("b", 0), Dim("y", 1)}
    assert stands["N"] == {Dim("x", 0), Dim("y", 0)}
    assert stands["K0"] == {Dim("w", 2)}


def test_operands_that_do_not_belong_together_name_the_node() -> None:
    text = "net (float[1,4,4,4] x, float[6,3,1,1] w) => (float[1,6,4,4] y) { y = Conv(x, w) }"
    model = model_from_text(OPSET + text)
    with pytest.raises(ModelError) as caught:
        lift(model)
    assert "Conv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_operand_of_a_described_custom_operator() -> None:
    register("com.acme::Gate", "N c *S, c -> N c *S", gate=True)
    try:
        text = """net (float[1,4,4,4] x, float[3] w) => (float[1,4,4,4] y)
        { y = com.acme.Gate(x, w) }"""
        with pytest.raises(ModelError, match=r"node .* \(Gate\): shape mismatch: .*factor c is 4"):
            lift(model_from_text(OPSET + text))
    finally:
        del _REGISTRY["com.acme", "Gate"]


def test_a_custom_operator_is_taught_in_one_line() -> None:
    text = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] g, float[2,6,1,1] w2)
    => (float[1,2,4,4] y) <float[1,6,4,4] b> {
        a = Conv(x, w1)  b = com.acme.Gate(a, g)  y = Conv(b, w2)
    }"""
    model = model_from_text(OPSET + text)
    assert not [group for group in lift(model).groups if group.resizable]
    register("com.acme::Gate", "N c *S, c -> N c *S")
    try:
        (group,) = [group for group in lift(model).groups if group.resizable]
        assert group.width == 6
        assert ("g", 0) in {(member.value, member.axis) for member in group.members}
        with pytest.raises(ValueError, match="has an entry already"):
            register("com.acme::Gate", "N c -> N c")
        with pytest.raises(NotationError, match="needs exactly one '->'"):
            register("com.acme::Other", "N c")
    finally:
        del _REGISTRY["com.acme", "Gate"]
    assert entry_of("Other", "com.acme") is None


def test_an_operator_has_one_entry() -> None:
    conv = entry_of("Conv")
    assert conv is not None
    with pytest.raises(ValueError, match=r"ai\.onnx::Conv has an entry already"):
        op("Conv")(conv)


def test_weights_are_what_depends_on_initializers_alone() -> None:
    text = """net (float[2,4] x, float[3,4] w) => (float[2,3] y) {
        t = Transpose(w)  s = Sigmoid(t)  a = MatMul(x, s)  y = Relu(a)
    }"""
    assert input_independent_values(model_from_text(OPSET + text)) == {"w", "t", "s"}


def test_layers_are_named_after_modules() -> None:
    text = """net (float[1,3,4,4] x, float[6,3,1,1] "features.0.weight") => (float[1,6,4,4] y) {
        a = Conv(x, "features.0.weight")  y = Relu(a)
    }"""
    conv, relu = model_from_text(OPSET + text).graph
    relu.name = "relu_node"
    assert layer_name(conv) == "features.0"
    assert layer_name(relu) == "relu_node"
    relu.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'features.1', 'relu']"
    assert layer_name(relu) == "features.1"


def test_a_dynamic_batch_is_analysed_and_stays_dynamic() -> None:
    text = """net (float[N,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[N,2,4,4] y) {
        a = Conv(x, w1)  r = Relu(a)  y = Conv(r, w2)
    }"""
    model = model_from_text(OPSET + text)
    graph = lift(model)
    assert [group.width for group in graph.groups if group.resizable] == [6]
    prove(graph)
    shape = graph.model.graph.outputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], ir.SymbolicDim)
