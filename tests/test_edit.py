"""Edits: names that are free in the whole model, constants, and what takes another's place."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.edit import Editor, part_of
from morphgraph.onnx_io.runtime import run
from morphgraph.testing import model_from_text, random_plan, random_removal

CHAIN = """net (float[1,3] x) => (float[1,3] y) { a = Relu(x)  b = Neg(a)  y = Exp(b) }"""
BRANCHES = """net (float[1,3] x, bool flag) => (float[1,3] y) {
    y = If(flag) <
        then_branch = then () => (float[1,3] inside) { inside = Relu(x) },
        else_branch = other () => (float[1,3] inside) { inside = Neg(x) }
    >
}"""
SPLIT = """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2, float[2,4,1,1] w3) =>
(float[1,2,4,4] y) {
    a = Conv(x, w1)  p, q = Split<axis=1, num_outputs=2>(a)  NAME = Relu(p)  b = Conv(NAME, w2)
    c = Conv(q, w3)  y = Add(b, c)
}"""
SLICE = """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2) => (float[1,2,4,4] y)
<int64[1] zero = {0}, int64[1] eight = {8}, int64[1] one = {1}, int64[1] two = {2}> {
    a = Conv(x, w1)  s = Slice(a, zero, eight, one, two)  NAME = Relu(s)  y = Conv(NAME, w2)
}"""
RESIDUAL = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] b1, float[6,6,3,3] w2, float[6] b2,
    float[2,6,1,1] w3) => (float[1,2,4,4] y) {
    a = Conv(x, w1, b1)  NAME = Relu(a)  b = Conv<pads=[1,1,1,1]>(NAME, w2, b2)  c = Add(NAME, b)
    rc = Relu(c)  y = Conv(rc, w3)
}"""
NORM = """net (float[2,5,3] x, float[3,8] w1, float[8] s, float[8] h, float[8,2] w2) =>
(float[2,5,2] y) {
    a = MatMul(x, w1)  NAME = LayerNormalization(a, s, h)  y = MatMul(NAME, w2)
}"""
OPEN = """net (float[N,3] x, float[1,4] token, float[3,4] w1, float[4,2] w2) => (float[N,2] y)
<int64[1] first = {0}, int64[1] four = {4}> {
    sizes = Shape(x)  n = Gather(sizes, first)  shape = Concat<axis=0>(n, four)
    t = Expand(token, shape)  a = MatMul(x, w1)  NAME = Add(a, t)  y = MatMul(NAME, w2)
}"""


def of_text(text: str, inputs: tuple[str, ...] = ("x",)) -> ir.Model:
    return model_from_text(text, inputs)


def test_a_name_is_taken_wherever_it_stands() -> None:
    editor = Editor(of_text(BRANCHES, ("x", "flag")))
    taken = ("x", "flag", "y", "inside")
    assert [editor.value_name(name) for name in taken] == ["x_", "flag_", "y_", "inside_"]
    assert editor.value_name("inside") == "inside__"


def test_a_name_is_free_once_all_that_had_it_are_gone() -> None:
    model = of_text(BRANCHES, ("x", "flag"))
    editor = Editor(model)
    editor.release_subgraphs(model.graph.node(0))  # both branches
    assert editor.value_name("inside") == "inside"


def test_a_node_in_the_place_of_another_has_its_name_and_readers() -> None:
    model = of_text(CHAIN)
    editor = Editor(model)
    (node,) = [node for node in model.graph if node.op_type == "Neg"]
    node.metadata_props["layer"] = "b"
    name = node.name
    new = editor.replace(
        node, "Mul", [node.inputs[0], editor.constant("two", np.array([2], np.float32))]
    )
    assert (new.name, new.metadata_props, new.outputs[0].name) == (name, {"layer": "b"}, "b")
    onnx.checker.check_model(ir.to_proto(model))
    x = np.array([[-1.0, 0.0, 2.0]], np.float32)
    assert run(model, {"x": x})["y"] == pytest.approx(np.exp(2 * np.maximum(x, 0)))


@pytest.mark.parametrize("op_type", ["Relu", "Neg", "Exp"])
def test_a_node_that_is_bypassed_leaves_the_outputs_name(op_type: str) -> None:
    model = mg.lift(of_text(CHAIN)).model
    (node,) = [node for node in model.graph if node.op_type == op_type]
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "Relu": lambda x: np.maximum(x, 0),
        "Neg": np.negative,
        "Exp": np.exp,
    }
    expected = x = np.array([[-1.0, 0.0, 2.0]], np.float32)
    for other, function in functions.items():
        expected = expected if other == op_type else function(expected)
    Editor(model).bypass(node, 0)
    onnx.checker.check_model(ir.to_proto(model))
    assert run(model, {"x": x})["y"] == pytest.approx(expected)


def test_a_network_of_nothing_but_an_output_keeps_a_node() -> None:
    model = of_text("net (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    Editor(model).bypass(model.graph.node(0), 0)
    assert [node.op_type for node in model.graph] == ["Identity"]


def test_a_part_runs_on_given_values() -> None:
    model = mg.lift(of_text(CHAIN)).model
    a = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert run(part_of(model, {"a": a}, ["y"]), {})["y"] == pytest.approx(np.exp(-a))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (SPLIT, ("Split_p_1", "Split_p", "a_masked", "p_masked", "Split_p_kept")),
        (SLICE, ("Slice_s_kept", "Slice_s_gathered", "s_masked", "a_stays", "zero_Slice_s")),
        (RESIDUAL, ("Relu_NAME_masked", "a_masked", "a_stays", "a_nothing", "Conv_a_absorbed")),
        (NORM, ("a_pads", "a_place", "a_stays", "a_masked", "a_masked_")),
        (OPEN, ("t_shape", "t_batch", "t_rest", "t_repeated", "shape_", "a_masked")),
    ],
)
def test_names_that_a_rewrite_makes_up_may_be_taken(text: str, names: tuple[str, ...]) -> None:
    for name in names:
        graph = mg.lift(of_text(text.replace("NAME", name)))
        onnx.checker.check_model(ir.to_proto(graph.model))
        for plan in (mg.uniform(graph, 0.5), random_plan(graph), random_removal(graph, 1, 1.0)):
            for absorb in (False, True):
                small = mg.apply(graph, plan, absorb=absorb)  # held against the masked original
                onnx.checker.check_model(ir.to_proto(small))
                assert mg.verify(graph, plan, small).by == "ONNX Runtime"


def test_lifting_again_makes_up_no_other_names() -> None:
    first = mg.lift(of_text(OPEN.replace("NAME", "sum"))).model
    again = mg.lift(ir.to_proto(first)).model
    assert ir.to_proto(again) == ir.to_proto(first)
