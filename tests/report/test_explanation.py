"""A group's life: what is told of it is what the model, the costs and a recount say."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.lift import lift
from morphgraph.plans import make_plan
from morphgraph.report.explain import explain
from morphgraph.report.explanation import Explanation, GroupExplanation, Step
from morphgraph.testing import model_from_text

OPSET = '<ir_version: 10, opset_import: ["": 20, "com.acme": 1]>'

RESIDUAL = """
net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8,8,1,1] w2, float[12,8,1,1] w3, float[5,192] w4)
    => (float[1,5] y) {
  a = Conv(x, w1)  r = Relu(a)  b = Conv(r, w2)  s = Add(b, r)  c = Conv(s, w3)
  f = Flatten(c)  y = Gemm<transB=1>(f, w4)
}"""
# The 12 channels of c cannot be told apart from the output's 192 numbers.
PINNED = """
net (float[1,3,4,4] x, float[12,3,1,1] w1) => (float[1,192] y) {
  a = Conv(x, w1)  r = Relu(a)  y = Flatten(r)
}"""
# b's channels are a part of the axis that the graph output has.
PART = """
net (float[1,3,4,4] x, float[4,3,1,1] w1, float[6,3,1,1] w2) => (float[1,10,4,4] y) {
  a = Conv(x, w1)  b = Conv(x, w2)  ra = Relu(a)  y = Concat<axis=1>(ra, b)
}"""
OPAQUE = """
net (float[1,3,4,4] x, float[8,3,1,1] w1, float[6,8,1,1] w2, float[2,6,1,1] w3)
    => (float[1,2,4,4] y) <float[1,8,4,4] g> {
  a = Conv(x, w1)  g = com.acme.Unknown(a)  b = Conv(g, w2)  y = Conv(b, w3)
}"""
SHUFFLE = """
net (float[1,3,4,4] x, float[12,3,1,1] w1, float[2,12,1,1] w2) => (float[1,2,4,4] y)
<int64[5] split = {1, 3, 4, 4, 4}, int64[4] back = {1, 12, 4, 4}> {
  a = Conv(x, w1)  v = Reshape(a, split)  t = Transpose<perm=[0,2,1,3,4]>(v)
  s = Reshape(t, back)  y = Conv(s, w2)
}"""
NORMED = """
net (float[2,5,6] x, float[6,8] w1, float[8] scale, float[8] shift, float[8,3] w2)
    => (float[2,5,3] y) {
  a = MatMul(x, w1)  n = LayerNormalization(a, scale, shift)  y = MatMul(n, w2)
}"""
NETWORKS = [RESIDUAL, PINNED, PART, OPAQUE, SHUFFLE, NORMED]


def of_text(text: str) -> ChannelGraph:
    return lift(model_from_text(OPSET + text))


def group_of(graph: ChannelGraph, name: str) -> GroupExplanation:
    (found,) = explain(graph, name).groups
    return found


def test_a_residual_group_is_described_operator_by_operator() -> None:
    found = group_of(of_text(RESIDUAL), "Conv_a (residual, 2 producers)")
    assert [(use.operator, use.role, use.factor) for use in found.operators] == [
        ("Conv_a", "makes", "o"),
        ("Relu_r", "carries on", "a1"),
        ("Conv_b", "sums over", "i"),
        ("Conv_b", "makes", "o"),
        ("Add_s", "ties", "a1"),
        ("Conv_c", "sums over", "i"),
    ]
    (add,) = [use for use in found.operators if use.op_type == "Add"]
    assert add.tied == ["Conv_b", "Relu_r"]
    assert [(place.tensor, place.axis, place.side) for place in add.places] == [
        ("b", 1, "operand"),
        ("r", 1, "operand"),
        ("s", 1, "result"),
    ]
    assert found.resizable
    assert (found.reason, found.path, found.statistical) == (None, [], False)


def test_index_maps() -> None:
    flat = group_of(of_text(RESIDUAL), "Conv_c").operators
    blocks = {(u.operator, p.tensor): (p.map, p.inner) for u in flat for p in u.places}
    assert blocks["Flatten_f", "f"] == ("blocks", 16)
    assert blocks["Flatten_f", "c"] == ("identity", 1)
    shuffled = group_of(of_text(SHUFFLE), "Conv_a").operators
    maps = {(u.operator, p.tensor): (p.map, p.outer, p.inner) for u in shuffled for p in u.places}
    assert maps["Reshape_v", "a"] == ("strides", 3, 1)
    assert maps["Reshape_s", "s"] == ("blocks", 1, 3)
    parts = {g.id: g for g in explain(of_text(PART), "Conv_*").groups}
    places = [p for g in parts.values() for u in g.operators for p in u.places if p.tensor == "y"]
    assert not places  # the output's axis is one class, and pinned


@pytest.mark.parametrize("text", NETWORKS)
def test_every_step_of_a_path_touches_the_next(text: str) -> None:
    """The model itself is the oracle: an axis that follows an operator is one of its tensors'."""
    graph = of_text(text)
    nodes = {node.name: node for node in graph.ops}
    tensors = {
        name: {v.name for v in (*node.ir.inputs, *node.ir.outputs) if v is not None}
        for name, node in nodes.items()
    }
    axes = [axis for node in nodes for axis in explain(graph, node).axes if axis.reason]
    groups = [group_of(graph, group.id) for group in graph.groups]
    paths = [a.path for a in axes] + [g.path for g in groups if g.reason]
    assert all(paths)
    for path in paths:
        for step, following in pairwise(path):
            assert {step.kind, following.kind} == {"axis", "operator"}
            axis, operator = (step, following) if step.kind == "axis" else (following, step)
            assert axis.name in tensors[operator.name]
    assert all(not group.path for group in groups if group.reason is None)


def words(path: list[Step]) -> list[str]:
    return [f"{s.name}[{s.axis}]" if s.kind == "axis" else s.name for s in path]


def test_a_reason_is_followed_from_where_it_arose() -> None:
    pinned = group_of(of_text(PINNED), "Conv_a")
    assert pinned.reason == "graph output 'y'"
    assert words(pinned.path) == ["y[1]", "Flatten_y", "r[1]", "Relu_r", "a[1]", "Conv_a"]
    assert [step.map for step in pinned.path if step.map] == ["blocks of 16"]
    opaque = group_of(of_text(OPAQUE), "Conv_a")
    assert opaque.reason == "no notation for operator com.acme::Unknown"
    assert words(opaque.path) == ["Unknown_g", "a[1]", "Conv_a"]
    part = group_of(of_text(PART), "Conv_a")
    assert words(part.path) == ["y[1]", "Concat_y", "ra[1]", "Relu_ra", "a[1]", "Conv_a"]


@pytest.mark.parametrize("text", [RESIDUAL, SHUFFLE, NORMED])
def test_the_price_of_a_channel_is_what_a_recount_finds(text: str) -> None:
    graph = of_text(text)
    for group in graph.groups:
        if not group.resizable:
            continue
        plan = make_plan(graph, {group.index: np.arange(group.width - 1)}, {})
        after = lift(mg.apply(graph, plan))
        found = group_of(graph, group.id)
        for kind, price in (
            ("macs", found.macs),
            ("flops", found.flops),
            ("params", found.params),
            ("memory", found.activation_bytes),
        ):
            total = mg.cost(graph, kind).total
            removed = total - mg.cost(after, kind).total
            # The kernel of Conv_b has its group on both axes: there the cost is a square, and the
            # gradient counts the corner of 1 x 1 twice.
            square = {"macs": 16, "flops": 32, "params": 1}.get(kind, 0)
            corner = square if "Conv_b" in found.producers and "Conv_b" in found.readers else 0
            assert price.per_channel - removed == pytest.approx(corner), (group.name, kind)
            assert price.share == pytest.approx(price.per_channel / total)


def test_statistical_groups_name_who_makes_them_so() -> None:
    found = group_of(of_text(NORMED), "MatMul_a")
    assert found.statistical
    assert found.competitors == ["LayerNormalization_n"]
    assert "1 operator (LayerNormalization_n) normalize" in str(explain(of_text(NORMED), "g1"))


def test_what_a_name_speaks_of() -> None:
    graph = of_text(RESIDUAL)

    def groups(name: str) -> list[str]:
        return [group.name for group in explain(graph, name).groups]

    assert groups("g1") == groups("Conv_b") == groups("w2") == ["Conv_a (residual, 2 producers)"]
    assert groups("Conv_a") == ["Conv_a (residual, 2 producers)"]
    assert groups("Conv_?") == ["Conv_a (residual, 2 producers)", "Conv_c"]
    assert groups("w3") == ["Conv_a (residual, 2 producers)", "Conv_c"]
    listed = str(explain(graph, "Conv_?"))
    assert "2 groups" in listed
    assert "--explain g1" in listed
    with pytest.raises(ArgumentError, match="'nobody' is no group"):
        explain(graph, "nobody")


def test_a_module_names_the_groups_within() -> None:
    model = model_from_text(OPSET + RESIDUAL)
    for old, new in (("w1", "stem.conv.weight"), ("w3", "stem.out.weight")):
        model.graph.initializers[old].name = new
    names = [group.name for group in explain(lift(model), "stem").groups]
    assert names == ["stem.conv (residual, 2 producers)", "stem.out"]


def test_an_operator_and_a_value_that_no_group_stands_on() -> None:
    graph = of_text(OPAQUE)
    found = explain(graph, "Unknown_g")
    assert [(op.name, op.opaque) for op in found.operators] == [
        ("Unknown_g", "no notation for operator com.acme::Unknown")
    ]
    by_axis = {(axis.tensor, axis.axis): axis for axis in found.axes}
    assert by_axis["a", 1].groups == ["g1"]
    assert by_axis["a", 0].reason is not None
    assert "Unknown 'Unknown_g'" in str(found)
    assert "not described" in str(found)
    shuffled = explain(of_text(SHUFFLE), "Reshape_v")
    reasons = {axis.axis: axis.reason for axis in shuffled.axes if axis.tensor == "v"}
    assert reasons[1] == "shares an axis with the factor that shrinks there"
    assert reasons[2] is None


def test_the_text_says_the_same_as_the_object() -> None:
    explanation = explain(of_text(PINNED), "Conv_a")
    text = str(explanation)
    assert "keeps size  graph output 'y'" in text
    assert "y[1] -> Flatten 'Flatten_y' (blocks of 16) -> r[1] -> Relu 'Relu_r' -> a[1]" in text
    again = msgspec.json.decode(msgspec.json.encode(explanation), type=Explanation)
    assert again == explanation
