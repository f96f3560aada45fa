"""What nothing takes over for, held against what networks give where channels are gone."""

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.edit import array_of
from morphgraph.onnx_io.runtime import run
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.moments import Moments
from morphgraph.passes.calibration.statistics import Calibration, calibrate
from morphgraph.passes.calibration.uncompensated import (
    Uncompensated,
    cost_of_inputs,
    norm_looks,
    shares_of_squares,
)
from morphgraph.testing import model_from_text

PLACES, WIDE = 400, 6
TIED = """<ir_version: 10, opset_import: ["": 23]>
net (float[400,5] x, float[5,6] w, float[6,3] v, float[4,6] e, float[400,4] z,
     float[6,2] k) => (float[400,3] y, float[400,4] u, float[400,2] o) {
  h = MatMul(x, w)  y = MatMul(h, v)  et = Transpose<perm=[1,0]>(e)  u = MatMul(h, et)
  i = MatMul(z, e)  o = MatMul(i, k)
}"""
NORMED = """<ir_version: 10, opset_import: ["": 23]>
net (float[400,6] x, float[6,6] w, float[6] scale, float[6,3] v) => (float[400,3] y)
    <int64[1] last = {-1}> {
  h = MatMul(x, w)  BODY  y = MatMul(n, v)
}"""
NORMS = {
    "one node": "n = RMSNormalization<epsilon=1e-9>(h, scale)",
    "written out": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)  d = Div(h, r)
        n = Mul(d, scale)""",
}


def sums(rows: Array) -> Moments:
    found = Moments(crossed=False)
    found.add(rows[:, None], rows[:, None, :0])
    return found


def test_inputs_that_go_cost_what_is_missing_then() -> None:
    """The sum over all pairs is the squared error without them, a share of the variance."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(1.0, 2.0, (PLACES, WIDE)), rng.normal(size=(9, WIDE))
    cost = cost_of_inputs(sums(x).statistics(), w[None])
    for gone in ([0], [1, 4], [0, 2, 3, 5]):
        missing = np.square(x[:, gone] @ w[:, gone].T).sum(axis=1).mean()
        share = missing / (x @ w.T).var(axis=0).sum()
        assert cost[np.ix_(gone, gone)].sum() == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization", "ReduceMean"])
def test_a_norm_costs_the_variance_of_its_scale(kind: str) -> None:
    """By the logarithm of the root of what is left of the squares, as far as little is gone."""
    import onnx_ir as ir

    rng = np.random.default_rng(0)
    x = rng.normal(size=(PLACES, 400)) * rng.uniform(0.5, 1.5, (PLACES, 400))
    centred = x - x.mean(axis=1, keepdims=True) if kind == "LayerNormalization" else x
    given = np.square(x) if kind == "ReduceMean" else x
    shares = shares_of_squares(given, facts_of(ir.node(kind, [])))
    other = Uncompensated({"n": np.arange(400)[:, None]}, {"n": 3})
    other.add_norm("n", sums(shares).statistics())
    assert other.spread is not None
    assert not other.left
    gone = [0, 7]
    left = np.delete(np.square(centred), gone, axis=1).sum(axis=1)
    scale = np.log(np.sqrt(left / np.square(centred).sum(axis=1)))
    assert other.spread[np.ix_(gone, gone)].sum() == pytest.approx(3 * scale.var(), rel=0.05)


def test_a_mean_of_no_squares_is_no_norm() -> None:
    import onnx_ir as ir

    rows = np.array([[1.0, -1.0]])
    assert not len(shares_of_squares(rows, facts_of(ir.node("ReduceMean", []))))


def calibrated(graph: mg.ChannelGraph, feeds: Arrays) -> tuple[Calibration, int]:
    (index,) = (g.index for g in graph.groups if g.resizable and "MatMul_h" in g.producers)
    return calibrate(graph, [feeds], stops=lambda group: []), index


def test_what_a_tied_kernel_reads_goes_later() -> None:
    """Of two equal channels the one goes of which the tied kernel takes less."""
    for first, other in ((0, 1), (1, 0)):
        model = model_from_text(TIED, inputs=("x", "z"))
        graph, rng = mg.lift(model), np.random.default_rng(0)
        held = graph.model.graph.initializers
        w, e = array_of(held["w"]), array_of(held["e"])
        w[:, 1] = w[:, 0]
        array_of(held["v"])[1] = array_of(held["v"])[0]
        e[:, first], e[:, other] = 0.01, 5.0
        array_of(held["k"])[[0, 1]] = 0.0
        feeds = {
            "x": rng.normal(size=(PLACES, 5)).astype(np.float32),
            "z": rng.normal(size=(PLACES, 4)).astype(np.float32),
        }
        known, index = calibrated(graph, feeds)
        assert known.groups[index].tied
        order = known.removals[index].order.tolist()
        assert order.index(first) < order.index(other)
        assert run(graph.model, feeds)["u"].var() > 0


@pytest.mark.parametrize("body", NORMS.values(), ids=NORMS)
def test_what_makes_a_norm_vary_goes_later(body: str) -> None:
    """Of two channels that nobody reads the one goes whose size is the same at all places."""
    rng = np.random.default_rng(0)
    for steady, other in ((0, 1), (1, 0)):
        model = model_from_text(NORMED.replace("BODY", body))
        graph = mg.lift(model)
        held = graph.model.graph.initializers
        array_of(held["w"])[...] = np.eye(WIDE)
        array_of(held["v"])[[0, 1]] = 0.0
        x = rng.choice([-1.0, 1.0], (PLACES, WIDE))
        x[:, steady] *= 3.0
        x[:, other] *= rng.choice([0.1, 3.0], PLACES)
        known, index = calibrated(graph, {"x": x.astype(np.float32)})
        order = known.removals[index].order.tolist()
        assert order.index(steady) < order.index(other)


def test_the_looks_are_norms_over_one_axis() -> None:
    graph = mg.lift(model_from_text(NORMED.replace("BODY", NORMS["written out"])))
    ((look, dim, _),) = norm_looks(graph)
    assert (look.axis, look.size, graph.couplings.dims[dim].value) == (1, WIDE, "s")
