"""The original and the masked original in one network, beside the two of them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.onnx_io import ModelLike
from morphgraph.onnx_io.runtime import Session, random_inputs, run, run_each
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.mask import mask, maskable
from morphgraph.testing import model_from_text
from tests.passes.experts import gathered

CONVOLUTIONS = """net (float[1,3,8,8] x, float[6,3,3,3] w1, float[6] b1, float[6,1,3,3] w2,
    float[2,6,1,1] w3) => (float[1,2,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  b = Conv<pads=[1,1,1,1], group=6>(r, w2)
    s = Add(b, a)  y = Conv(s, w3)
}"""

# Statistics over channels: these are gathered, and what comes of them is put back.
NORMED = """net (float[2,5,3] x, float[3,8] w1, float[8] s, float[8] h, float[8,2] w2) =>
(float[2,5,2] y) {
    a = MatMul(x, w1)  n = LayerNormalization(a, s, h)  y = MatMul(n, w2)
}"""


# Of a mixture the router's numbers say which expert of those that stay is taken.
@pytest.mark.parametrize(
    "model",
    [
        model_from_text(CONVOLUTIONS),
        model_from_text(NORMED),
        gathered("softmax of those taken"),
    ],
)
def test_with_either_masks_it_computes_what_that_network_does(model: ModelLike) -> None:
    graph = lift(model)
    keep: dict[int, IntArray] = {
        group.index: np.array([1, *range(3, group.width)])
        for group in graph.groups
        if group.resizable
    }
    assert keep
    feeds = random_inputs(graph.model, 3)
    original, masked = run(graph.model, feeds)["y"], run(mask(graph, keep), feeds)["y"]
    assert not np.allclose(original, masked, atol=1e-2)
    both = maskable(graph, keep)
    assert both.masked.keys() == both.whole.keys()
    one, other = run_each(both.model, [{**feeds, **both.whole}, {**feeds, **both.masked}])
    np.testing.assert_allclose(one["y"], original, atol=1e-6)
    np.testing.assert_allclose(other["y"], masked, atol=1e-6)


LAYERS = """net (float[2,5,3] x, float[8,3] w1, float[8] b1, float[8] s, float[8] h, float[2,8] w2,
    float[2] b2) => (float[2,5,2] y) {
    t = Transpose<perm=[1,0]>(w1)  a = MatMul(x, t)  c = Add(a, b1)
    n = LayerNormalization(c, s, h)
    u = Transpose<perm=[1,0]>(w2)  d = MatMul(n, u)  y = Add(d, b2)
}"""


# What it transposes in every run may take longer than all else.
def test_onnx_runtime_makes_gemm_of_layers_behind_masks_too(tmp_path: Path) -> None:
    graph = lift(model_from_text(LAYERS))
    (group,) = [group for group in graph.groups if group.resizable]
    both = maskable(graph, {group.index: np.array([1, 3, 4])})
    feeds = random_inputs(graph.model, 3)
    shared = {
        name: array.shape
        for name, array in {**feeds, **both.masked}.items()
        if name in feeds or array.shape == both.whole[name].shape
    }
    assert len(shared) < len(feeds) + len(both.masked)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    Session(both.model, options, shared, fed=True)
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("Gemm") == 2
    assert not {"MatMul", "Transpose"} & set(kinds)


def test_where_it_does_not_run_as_one_the_check_runs_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from morphgraph.errors import UnsupportedError
    from morphgraph.onnx_io import runtime
    from morphgraph.passes.checking import verify as verifying

    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    large = CONVOLUTIONS.replace("8,8]", "32,32]")
    graph = lift(model_from_text(large))
    plan = mg.plan(graph, budget={"flops": "50%"})
    small = mg.apply(graph, plan, verify=False)
    report = mg.verify(graph, plan, small)
    asked: list[int] = []

    def refuse(model: object, each: list[object]) -> None:
        asked.append(len(each))
        raise UnsupportedError("not as one")

    run_alone = runtime.run_each
    monkeypatch.setattr(
        runtime,
        "run_each",
        lambda m, each: run_alone(m, each) if len(each) == 1 else refuse(m, each),
    )
    again = mg.verify(graph, plan, small)
    assert asked == [2]
    assert again.ok
    assert again.sensitivity == pytest.approx(report.sensitivity, rel=1e-4)
