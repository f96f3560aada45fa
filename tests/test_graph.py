"""The channel graph as data: networkx, positions, sizes at widths, plans and their fingerprint."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import PlanError
from morphgraph.graph import Dim, OpFactor
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan, make_plan, structure_hash
from morphgraph.testing import model_from_text, random_plan

TEXT = """
net (float[1,3,4,4] x, float[6,3,1,1] w1, float[4,6,3,3] w2, float[3,16] w3) => (float[1,3] y) {
    a = Conv(x, w1)  ra = Relu(a)  b = Conv(ra, w2)  f = Flatten(b)  y = Gemm<transB=1>(f, w3)
}"""


def test_networkx_is_bipartite_between_dims_and_factors() -> None:
    graph = lift(model_from_text(TEXT))
    kinds = {type(node) for node in graph.networkx}
    assert kinds == {Dim, OpFactor}
    assert all({type(u), type(v)} == kinds for u, v in graph.networkx.edges)
    assert graph.networkx.nodes[Dim("w1", 0)]["size"] == 6
    assert graph.networkx.edges[OpFactor("Conv_a", "o"), Dim("w1", 0)]["map"].starts


def test_columns_hold_what_the_edges_hold() -> None:
    couplings = lift(model_from_text(TEXT)).couplings
    columns = couplings.columns
    assert len(couplings.edges) > 20
    for k, edge in enumerate(couplings.edges):
        row = tuple(column[k] for column in columns)
        whole = (edge.factor, edge.dim, edge.port, edge.op_index, edge.whole)
        assert row == (*whole, couplings.on_weight(edge))
    assert columns.on_weight.any()
    assert not columns.on_weight.all()


def test_positions_of_a_channel_after_flatten() -> None:
    graph = lift(model_from_text(TEXT))
    flat = graph.channels_at("w3", 1)
    assert np.array_equal(flat, np.repeat(graph.channels_at("w2", 0), 4))


def test_class_sizes_at_widths_are_the_resized_shapes() -> None:
    graph = lift(model_from_text(TEXT))
    plan = random_plan(graph, 3)
    small = resize(graph, plan.keep_channels(graph))
    sizes = graph.class_sizes(plan.widths(graph))
    values = {v.name: v for node in small.graph for v in (*node.inputs, *node.outputs)}
    for number, dim in enumerate(graph.couplings.dims):
        shape = values[dim.value].shape
        assert shape is not None
        assert sizes[graph.vertex_class[number]] == shape[dim.axis]


def test_structure_is_independent_of_weights_and_dependent_on_shapes() -> None:
    graph = lift(model_from_text(TEXT, seed=0))
    assert structure_hash(graph) == structure_hash(lift(model_from_text(TEXT, seed=1)))
    again = lift(ir.to_proto(graph.model))
    assert structure_hash(graph) == structure_hash(again)
    other = TEXT.replace("w1", "v1")
    wider = TEXT.replace("[6,3,1,1]", "[5,3,1,1]").replace("[4,6,3,3]", "[4,5,3,3]")
    hashes = {structure_hash(lift(model_from_text(text))) for text in (TEXT, other, wider)}
    assert len(hashes) == 3


STRUCTURE = """
net (float[1,4,4,4] x, float[4,4,3,3] w1, float[4,2,1,1] w2) => (float[1,4,4,4] y)
<int64[3] shape = {1, 8, 8}, int64[4] back = {1, 4, 4, 4}> {
    a = Conv<pads=[1,1,1,1], dilations=[1,1]>(x, w1)  b = Conv<group=2>(a, w2)
    l = LeakyRelu<alpha=0.1>(b)  r = Reshape(l, shape)  t = Transpose<perm=[0,2,1]>(r)
    y = Reshape(t, back)
}"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("perm=[0,2,1]", "perm=[0,1,2]", False),
        ("pads=[1,1,1,1], dilations=[1,1]", "pads=[2,2,2,2], dilations=[2,2]", False),
        ("{1, 8, 8}", "{0, 8, 8}", False),
        ("{1, 8, 8}", "{1, 8, 8 }", True),
        ("alpha=0.1", "alpha=0.2", True),
        ("LeakyRelu<alpha=0.1>", "Relu", False),
    ],
)
def test_structure_is_attributes_and_integers_but_no_floats(old: str, new: str, same: bool) -> None:
    """Sizes and names are the same in all of them."""
    assert old in STRUCTURE
    one, other = (lift(model_from_text(text)) for text in (STRUCTURE, STRUCTURE.replace(old, new)))
    assert one.shapes == other.shapes
    assert (structure_hash(one) == structure_hash(other)) is same


def test_structure_reaches_into_subgraphs() -> None:
    text = """
    net (float[1,4] x, bool c) => (float[1,4] y) {
        y = If (c) <then_branch = a () => (float[1,4] p) { p = Relu(x) },
                    else_branch = b () => (float[1,4] q) { q = AXIS(x) }>
    }"""
    bodies = ("Neg", "Softmax<axis=1>", "Softmax<axis=0>")
    models = [model_from_text(text.replace("AXIS", body), inputs=("x", "c")) for body in bodies]
    assert len({structure_hash(lift(model)) for model in models}) == 3


def test_a_plan_survives_its_file_and_another_networks_plan_does_not_fit() -> None:
    graph = lift(model_from_text(TEXT))
    plan = random_plan(graph, 0)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    kept, same = plan.keep_channels(graph), again.keep_channels(graph)
    assert kept.keys() == same.keys()
    assert all(np.array_equal(kept[index], same[index]) for index in kept)
    other = lift(model_from_text(TEXT.replace("w1", "v1")))
    with pytest.raises(PlanError, match="the plan was made for another network"):
        plan.keep_channels(other)


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [([0, 1, 4], ((0, 2), (4, 5))), ([5], ((5, 6),)), ([0, 2, 4], ((0, 1), (2, 3), (4, 5)))],
)
def test_ranges_are_half_open(kept: list[int], ranges: tuple[tuple[int, int], ...]) -> None:
    graph = lift(model_from_text(TEXT))
    (index,) = [g.index for g in graph.groups if g.producers == ("Conv_a",)]
    entry = make_plan(graph, {index: np.array(kept)}, {}).groups[graph.groups[index].id]
    assert entry.keep == ranges
    assert entry.positions.tolist() == kept


def test_former_names_of_a_plan_warn() -> None:
    graph = lift(model_from_text(TEXT))
    plan = random_plan(graph, 3)
    with pytest.warns(DeprecationWarning, match="keep_channels"):
        former = plan.kept(graph)
    assert {k: v.tolist() for k, v in former.items()} == {
        k: v.tolist() for k, v in plan.keep_channels(graph).items()
    }
    entry = next(iter(plan.groups.values()))
    with pytest.warns(DeprecationWarning, match="positions"):
        assert entry.kept.tolist() == entry.positions.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[4, 2]]", r"groups.g1.keep: range \[4, 2\] is empty"),
        ("[[0, 3], [2, 4]]", r"groups.g1.keep: range \[2, 4\] repeats channels below 3"),
        ("[[0, 9]]", "groups.g1.keep: channel 8 is out of range, the width is 6"),
        ("[[-1, 2]]", "groups"),
        ("[[0, 1.5]]", "groups"),
        ('"all"', "groups"),
    ],
)
def test_a_broken_plan_names_the_field(text: str, message: str) -> None:
    graph = lift(model_from_text(TEXT))
    broken = json.loads(make_plan(graph, {1: np.array([0, 1])}, {}).to_json())
    broken["groups"]["g1"]["keep"] = json.loads(text)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(broken).encode())
