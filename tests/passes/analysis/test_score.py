"""Strengths against the formulas, tied maxima, and weights that cannot be ranked."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.arrays import FloatArray
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import not_finite
from morphgraph.passes.analysis.channel_sources import kernels, norm_scales
from morphgraph.passes.analysis.score import Score, group_lasso, score, strengths
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

RESIDUAL = """net (float[1,3,4,4] x, float[6,3,3,3] w1, float[6] s1, float[6] h, float[6] m,
float[6] v,
    float[6,6,1,1] w2, float[6] s2, float[2,6,1,1] w3) => (float[1,2,2,2] y) {
    a = Conv(x, w1)  n = BatchNormalization(a, s1, h, m, v)  r = Relu(n)
    b = Conv(r, w2)  k = BatchNormalization(b, s2, h, m, v)  c = Add(n, k)  y = Conv(c, w3)
}"""


def weights(graph: ChannelGraph, name: str) -> np.ndarray:
    tensor = graph.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("l2", lambda w: np.sqrt((w**2).sum(axis=1))),
        ("l1", lambda w: np.abs(w).sum(axis=1)),
        ("lasso", lambda w: np.sqrt((w**2).mean(axis=1))),
    ],
)
def test_norms_are_the_maximum_over_tied_kernels(
    kind: Score, norm: Callable[[FloatArray], FloatArray]
) -> None:
    graph = lift(model_from_text(RESIDUAL))
    found = score(graph, kind)[graph.channels_at("c", 1)]
    tied = [norm(weights(graph, name).reshape(6, -1)) for name in ("w1", "w2")]
    assert found == pytest.approx(np.maximum(*tied))


def test_bn_takes_the_largest_magnitude_of_the_scales() -> None:
    graph = lift(model_from_text(RESIDUAL))
    scale = graph.model.graph.initializers["s1"]
    scale.const_value = ir.Tensor(np.array([-2, 0, 1, 0.1, -0.2, 0.3], np.float32), name="s1")
    expected = np.maximum(np.abs(weights(graph, "s1")), np.abs(weights(graph, "s2")))
    assert score(graph, "bn")[graph.channels_at("c", 1)] == pytest.approx(expected)


def test_group_lasso_mixes_mean_square_and_mean_magnitude() -> None:
    graph = lift(model_from_text(RESIDUAL))
    w = weights(graph, "w1").reshape(6, -1)
    (source,) = [source for source in kernels(graph) if source.parameter == "w1"]
    found = strengths(graph, [source], group_lasso(0.3))[graph.channels_at("w1", 0)]
    expected = 0.7 * np.sqrt((w**2).mean(axis=1)) + 0.3 * np.abs(w).mean(axis=1)
    assert found == pytest.approx(expected)


def test_sources_follow_transposes_and_depthwise_kernels() -> None:
    text = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,1,3,3] w2, float[5,24] w3,
    float[2,5] w4) => (float[1,2] y) {
        a = Conv(x, w1)  b = Conv<group=6>(a, w2)  f = Flatten(b)  t = Transpose<perm=[1,0]>(w3)
        l = MatMul(f, t)  y = Gemm<transB=1>(l, w4)
    }"""
    graph = lift(model_from_text(text))
    assert {(s.parameter, s.axis) for s in kernels(graph)} == {
        ("w1", 0),
        ("w2", 0),
        ("w3", 0),
        ("w4", 0),
    }
    assert norm_scales(graph) == []
    expected = np.sqrt((weights(graph, "w3") ** 2).sum(axis=1))
    assert score(graph, "l2")[graph.channels_at("w3", 0)] == pytest.approx(expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_weight_that_cannot_be_ranked_is_refused_by_name(poison: float) -> None:
    model = model_from_text(RESIDUAL)
    array = np.full((6, 6, 1, 1), 0.5, np.float32)
    array[2] = poison
    model.graph.initializers["w2"].const_value = ir.Tensor(array, name="w2")
    graph = lift(model)
    assert not_finite(graph.model) == ["w2"]
    with pytest.raises(ModelError, match="tensor 'w2' holds NaN or infinite numbers"):
        score(graph, "l2")
    assert np.isfinite(score(graph, "random", seed=1)).all()


def test_an_unknown_score_lists_the_known() -> None:
    graph = lift(model_from_text(RESIDUAL))
    with pytest.raises(UnsupportedError, match="score 'magic' is unknown; use l2, l1, bn"):
        score(graph, "magic")  # type: ignore[arg-type]
