"""What resize writes: sizes, constants, attributes, names; and what it leaves alone."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, prove, random_plan


def of_text(text: str) -> ChannelGraph:
    return lift(model_from_text(text))


def constant(model: ir.Model, op_type: str, operand: int) -> list[int]:
    (node,) = [node for node in model.graph if node.op_type == op_type]
    value = node.inputs[operand]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().tolist()


def group_on_position(graph: ChannelGraph, value: str, position: int, axis: int = 0) -> int:
    return int(graph.channel_group[graph.channels_at(value, axis)[position]])


def group_on(graph: ChannelGraph, value: str, axis: int = 0) -> int:
    return group_on_position(graph, value, 0, axis)


TWO = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[4,6,1,1] w2, float[2,4,1,1] w3)
=> (float[1,2,4,4] y) { a = Conv(x, w1)  r = Relu(a)  b = Conv(r, w2)  y = Conv(b, w3) }"""


def test_weights_are_the_kept_slices_and_shared_where_nothing_is_cut() -> None:
    graph = of_text(TWO)
    kept = np.array([0, 3, 5])
    small = resize(graph, {group_on(graph, "w1"): kept})
    old = {name: v.const_value.numpy() for name, v in graph.model.graph.initializers.items()}
    new = {name: v.const_value for name, v in small.graph.initializers.items()}
    assert np.array_equal(new["w1"].numpy(), old["w1"][kept])
    assert np.array_equal(new["w2"].numpy(), old["w2"][:, kept])
    assert new["w3"] is graph.model.graph.initializers["w3"].const_value


def test_the_model_given_is_not_changed() -> None:
    graph = of_text(TWO)
    before = ir.to_proto(graph.model).SerializeToString()
    resize(graph, random_plan(graph).keep_channels(graph))
    assert ir.to_proto(graph.model).SerializeToString() == before


def test_names_stay_and_declared_sizes_follow() -> None:
    graph = of_text(TWO)
    plan = random_plan(graph, 1)
    small = resize(graph, plan.keep_channels(graph))
    assert [node.name for node in small.graph] == [node.name for node in graph.model.graph]
    values = [v.name for node in small.graph for v in node.outputs]
    assert values == [v.name for node in graph.model.graph for v in node.outputs]
    proto = ir.to_proto(small)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    again = {v.name: v for node in ir.from_proto(inferred).graph for v in node.outputs}
    for node in small.graph:
        for value in node.outputs:
            assert static_shape(again[value.name]) == static_shape(value)


def test_nothing_removed_is_nothing_changed() -> None:
    graph = of_text(TWO)
    everything = {group.index: np.arange(group.width) for group in graph.groups}
    for keep in ({}, everything):
        proto = ir.to_proto(resize(graph, keep))
        assert proto.SerializeToString() == ir.to_proto(graph.model).SerializeToString()


SPLIT = """net (float[1,3,4,4] x, float[10,3,1,1] w1, float[2,3,1,1] w2, float[2,7,1,1] w3)
=> (float[1,2,4,4] y) <int64[2] parts = {3, 7}> {
    a = Conv(x, w1)  p, q = Split<axis=1>(a, parts)  b = Conv(p, w2)  c = Conv(q, w3)  y = Add(b, c)
}"""


def test_split_sizes_follow() -> None:
    graph = of_text(SPLIT)
    keep = {group_on(graph, "w2", 1): np.array([2]), group_on(graph, "w3", 1): np.array([0, 1, 6])}
    assert constant(resize(graph, keep), "Split", 1) == [1, 3]


def test_a_shape_constant_with_two_readers_is_given_to_each() -> None:
    text = """net (float[1,3,2,2] x, float[6,3,1,1] w1, float[6,3,1,1] w2, float[2,6] w3, float[2,6]
    w4) => (float[4,2] y) <int64[2] flat = {4, 6}> {
        a = Conv(x, w1)  b = Conv(x, w2)  at = Transpose<perm=[0,2,3,1]>(a)
        bt = Transpose<perm=[0,2,3,1]>(b)  p = Reshape(at, flat)  q = Reshape(bt, flat)
        c = Gemm<transB=1>(p, w3)  d = Gemm<transB=1>(q, w4)  y = Add(c, d)
    }"""
    graph = of_text(text)
    keep = {group_on(graph, "w1"): np.array([1, 2]), group_on(graph, "w2"): np.arange(5)}
    small = resize(graph, keep)
    reshapes = [node for node in small.graph if node.op_type == "Reshape"]
    targets = [node.inputs[1].const_value.numpy().tolist() for node in reshapes]
    assert targets == [[4, 2], [4, 5]]
    prove(graph)


def test_zero_in_a_shape_copies_only_what_it_still_copies() -> None:
    """The 0 copies axis 1, the channels, but its result is axis 2, which has the same size."""
    text = """net (float[6,2,3] x, float[3,2,1] w1, float[3,5] v, float[2,3,1] w2) => (float[6,2,5]
    y) <int64[2] two = {18, 0}, int64[3] three = {6, -1, 5}> {
        a = Conv(x, w1)  s = Reshape(a, two)  m = MatMul(s, v)  u = Reshape(m, three)
        r = Relu(u)  y = Conv(r, w2)
    }"""
    graph = of_text(text)
    assert [group.width for group in graph.groups if group.resizable] == [3]
    prove(graph)


@pytest.mark.parametrize(
    ("odd", "expected"), [([0, 1, 2, 3], "Slice"), ([0, 2], "Slice"), ([0, 1, 3], "Gather")]
)
def test_an_irregular_slice_becomes_a_gather(odd: list[int], expected: str) -> None:
    """The odd ones of eight channels are read backwards; all even ones stay."""
    text = """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,8,1,1] w2) => (float[1,2,4,4] y)
    <int64[1] start = {7}, int64[1] stop = {-9}, int64[1] axis = {1}, int64[1] step = {-2},
     int64[4] even = {0, 2, 4, 6}> {
        a = Conv(x, w1)  r = Relu(a)  b = Slice(r, start, stop, axis, step)
        e = Gather<axis=1>(r, even)  c = Concat<axis=1>(e, b)  y = Conv(c, w2)
    }"""
    graph = of_text(text)
    assert [group.width for group in graph.groups if group.resizable] == [4, 4]
    keep = {group_on_position(graph, "w1", 1): np.array(odd)}
    plan, small = make_plan(graph, keep, {}), resize(graph, keep)
    assert [node.op_type for node in small.graph if node.name == "Slice_b"] == [expected]
    assert verify(graph, plan, small).worst.relative < 1e-6


def test_group_counts_follow() -> None:
    text = """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[12,1,3,3] w2, float[2,12,1,1] w3)
    => (float[1,2,2,2] y) { a = Conv(x, w1)  b = Conv<group=12>(a, w2)  y = Conv(b, w3) }"""
    graph = of_text(text)
    small = resize(graph, {group_on(graph, "w1"): np.array([1, 4, 7])})
    (depthwise,) = [node for node in small.graph if node.name == "Conv_b"]
    assert depthwise.attributes["group"].as_int() == 3


def test_unused_constants_go_and_unused_parameters_of_the_file_stay() -> None:
    graph = of_text(SPLIT)
    keep = random_plan(graph).keep_channels(graph)
    small = resize(graph, keep)
    assert all(value.uses() for value in small.graph.initializers.values())
