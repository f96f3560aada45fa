"""Outputs that a plan resizes are compared at the positions that stay."""

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.edit import array_of, replace_array
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import is_rejected, model_from_text, random_plan, wrong_slices

LINEAR = """net (float[2,6] x, float[6,8] w1, float[8,10] w2) => (float[2,10] y) {
    a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2)
}"""
FLATTENED = """net (float[1,3,4,4] x, float[6,3,3,3] w1, float[5,6,1,1] w2) => (float[1,20] y) {
    a = Conv(x, w1)  r = Relu(a)  z = Conv(r, w2)  y = Flatten(z)
}"""
PIXELS = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[12,6,1,1] w2) => (float[1,3,8,8] y) {
    a = Conv(x, w1)  r = Relu(a)  z = Conv(r, w2)  y = DepthToSpace<blocksize=2>(z)
}"""
SHARES = """net (float[2,6] x, float[6,8] w1, float[8,10] w2) => (float[2,10] y) {
    a = MatMul(x, w1)  r = Relu(a)  z = MatMul(r, w2)  y = Softmax<axis=1>(z)
}"""
SIDE_BY_SIDE = """net (float[2,6] x, float[6,8] w1, float[6,5] w2, float[8,4] w3) =>
(float[2,13] y, float[2,4] p) {
    a = MatMul(x, w1)  b = MatMul(x, w2)  y = Concat<axis=1>(a, b)  r = Relu(a)  p = MatMul(r, w3)
}"""
SHUFFLED = """net (float[1,3,4,4] x, float[12,3,1,1] w1) => (float[1,12,4,4] y)
<int64[5] five = {1, 3, 4, 4, 4}, int64[4] four = {1, 12, 4, 4}> {
    a = Conv(x, w1)  r = Reshape(a, five)  t = Transpose<perm=[0,2,1,3,4]>(r)  y = Reshape(t, four)
}"""


def free(text: str) -> ChannelGraph:
    return mg.lift(model_from_text(text), pin_outputs=False)


@pytest.mark.filterwarnings("error::morphgraph.errors.MorphWarning")  # these checks have power
@pytest.mark.parametrize("text", [LINEAR, FLATTENED, PIXELS, SHARES, SIDE_BY_SIDE, SHUFFLED])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_right_resize_passes_and_wrong_slices_do_not(text: str, seed: int) -> None:
    graph = free(text)
    plan = random_plan(graph, seed)
    keep = plan.keep_channels(graph)
    small = mg.apply(graph, plan)
    feeds = random_inputs(graph.model)
    before, after = run(graph.model, feeds), run(small, feeds)
    assert any(before[name].shape != after[name].shape for name in before)
    report = mg.verify(graph, plan, small)
    assert report.ok
    assert report.worst.relative < 1e-6
    planted = list(wrong_slices(graph, keep, small))
    assert planted
    for fault, broken in planted:
        assert is_rejected(graph, plan, broken), fault


@pytest.mark.parametrize(
    ("text", "shape"), [(LINEAR, (2, 10, 1)), (FLATTENED, (1, 5, 4)), (SHARES, None)]
)
def test_classes_that_stay_are_those_of_the_original(
    text: str, shape: tuple[int, int, int] | None
) -> None:
    """Beside the original itself, sliced by hand."""
    graph = free(text)
    group = next(g for g in graph.groups if any(m.value == "y" for m in g.members))
    kept = np.array([0, 2, 3])
    plan = make_plan(graph, {group.index: kept}, {}, {})
    small = mg.apply(graph, plan)
    feeds = random_inputs(graph.model)
    found, whole = run(small, feeds)["y"], run(graph.model, feeds)["y"]
    if shape is None:  # a softmax over those that stay
        expected = whole[:, kept] / whole[:, kept].sum(axis=1, keepdims=True)
    else:
        expected = whole.reshape(shape)[:, kept].reshape(shape[0], -1)
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_output_in_another_order_is_refused() -> None:
    graph = free(LINEAR)
    plan = random_plan(graph, 0)
    keep = plan.keep_channels(graph)
    small = resize(graph, keep)
    value = small.graph.initializers["w2"]
    replace_array(value, array_of(value)[:, ::-1])
    assert is_rejected(graph, plan, small)
