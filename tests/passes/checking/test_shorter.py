"""The check on networks of fewer positions: it proves the same, or is not made."""

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking import verify as verifying
from morphgraph.passes.checking.shorter import Shorter, shorter
from morphgraph.passes.checking.smaller import smaller_inputs
from morphgraph.testing import model_from_text, prove

# Patches of an image, a token before them, a table of positions, attention with two heads, an MLP.
TOKENS = """net (float[1,3,32,32] x, float[12,3,4,4] kernel, float[1,1,12] token,
     float[1,65,12] places, float[12] g1, float[12] b1, float[12,36] qkv, float[12,12] out,
     float[12] g2, float[12] b2, float[12,20] up, float[20,12] down, float[5,12] fc)
    => (float[1,5] y)
<int64[3] flat = {1,12,64}, int64[5] apart = {1,65,3,2,6}, int64 first = {0}, int64 second = {1},
 int64 third = {2}, int64[3] together = {1,65,12}> {
    a = Conv<kernel_shape=[4,4], strides=[4,4]>(x, kernel)
    f = Reshape(a, flat)
    t = Transpose<perm=[0,2,1]>(f)
    c = Concat<axis=1>(token, t)
    p = Add(c, places)
    n = LayerNormalization<axis=-1>(p, g1, b1)
    q = MatMul(n, qkv)
    r = Reshape(q, apart)
    s = Transpose<perm=[2,0,3,1,4]>(r)
    query = Gather<axis=0>(s, first)
    key = Gather<axis=0>(s, second)
    value = Gather<axis=0>(s, third)
    kt = Transpose<perm=[0,1,3,2]>(key)
    scores = MatMul(query, kt)
    share = Softmax<axis=-1>(scores)
    mixed = MatMul(share, value)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Reshape(back, together)
    o = MatMul(joined, out)
    h = Add(p, o)
    m = LayerNormalization<axis=-1>(h, g2, b2)
    u = MatMul(m, up)
    e = Relu(u)
    d = MatMul(e, down)
    z = Add(h, d)
    k = Gather<axis=1>(z, first)
    y = Gemm<transB=1>(k, fc)
}"""

# Without a token before them one patch would be left of four, over which a softmax is a constant.
WITHOUT = (
    TOKENS.replace("float[1,1,12] token,", "")
    .replace("65", "64")
    .replace("c = Concat<axis=1>(token, t)", "c = Identity(t)")
)

# A target that follows the operand there.
FOLLOWING = TOKENS.replace("int64[3] flat = {1,12,64}", "int64[3] flat = {1,12,-1}")

# The row of a token that a smaller image does not have.
FAR = TOKENS.replace("k = Gather<axis=1>(z, first)", "k = Gather<axis=1>(z, far)").replace(
    "int64 first = {0},", "int64 first = {0}, int64 far = {40},"
)

# Tokens are mixed by a kernel that has one row for each.
MIXED = """net (float[1,3,32,32] x, float[12,3,4,4] kernel, float[64,20] up, float[20,64] down,
     float[12,5] fc) => (float[1,64,5] y) <int64[3] flat = {1,12,64}> {
    a = Conv<kernel_shape=[4,4], strides=[4,4]>(x, kernel)
    f = Reshape(a, flat)
    u = MatMul(f, up)
    r = Relu(u)
    d = MatMul(r, down)
    t = Transpose<perm=[0,2,1]>(d)
    y = MatMul(t, fc)
}"""


@pytest.mark.parametrize("text", [WITHOUT, FOLLOWING])
def test_wrong_slices_are_found_with_fewer_positions(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = mg.lift(model_from_text(text))
    assert smaller_inputs(graph) is None
    plan = shorter(graph)
    assert plan is not None
    assert plan.inputs["x"] == (1, 3, 8, 8)
    assert plan.parts.sizes[64] == 4
    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    taken: list[Shorter | None] = []

    def noted(graph: ChannelGraph) -> Shorter | None:
        taken.append(shorter(graph))
        return taken[-1]

    monkeypatch.setattr(verifying, "shorter", noted)
    prove(graph, seeds=(0,))
    assert all(taken)


def test_the_shorter_network_computes_its_tokens_as_the_whole_one_does() -> None:
    text = TOKENS.replace("Softmax<axis=-1>(scores)", "Mul(scores, scores)").replace(
        "mixed = MatMul(share, value)", "mixed = Identity(value)"
    )  # so that no token sees another
    graph = mg.lift(model_from_text(text))
    plan = shorter(graph)
    assert plan is not None
    small = plan.of(graph.model)
    assert small is not None
    feeds = random_inputs(graph.model)
    corner = {"x": feeds["x"][:, :, :8, :8]}
    listed = "t", "h"
    whole, part = (_with_outputs(model, listed) for model in (graph.model, small))
    expected, found = run(whole, feeds), run(part, corner)
    # Of 8 x 8 patches the first two of the first row are the first row of 2 x 2.
    np.testing.assert_allclose(found["t"][:, :2], expected["t"][:, :2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["h"][:, :3], expected["h"][:, :3], rtol=1e-4, atol=1e-5)


def _with_outputs(model: ir.Model, names: tuple[str, ...]) -> ir.Model:
    copy = model.clone()
    results = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.extend(results[name] for name in names)
    return copy


def test_of_a_table_that_is_cut_off_the_lost_rows_are_compared() -> None:
    graph = mg.lift(model_from_text(TOKENS))
    found = shorter(graph)
    assert found is not None
    plan = mg.uniform(graph, 0.5)
    small = mg.apply(graph, plan, verify=False)
    selection = AxisSelection(graph, plan.keep_channels(graph))
    assert found.agrees(graph.model, small, selection)
    value = small.graph.initializers["places"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[:, -1] = array[:, -1, ::-1]
    value.const_value = ir.Tensor(array, name="places")
    assert not found.agrees(graph.model, small, selection)


def test_where_a_kernel_holds_the_number_of_positions_there_are_none() -> None:
    assert shorter(mg.lift(model_from_text(MIXED))) is None


def test_a_target_of_other_sizes_in_the_resized_model_is_left_alone() -> None:
    graph = mg.lift(model_from_text(TOKENS))
    found = shorter(graph)
    assert found is not None
    assert found.of(graph.model) is not None
    other = graph.model.clone()
    other.graph.initializers["flat"].const_value = ir.tensor(np.array([1, 8, 96]), name="flat")
    assert found.of(other) is None


def test_where_a_far_position_is_read_the_full_inputs_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = mg.lift(model_from_text(FAR))
    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    prove(graph, seeds=(0,))
