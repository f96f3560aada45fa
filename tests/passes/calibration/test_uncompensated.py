"""What nothing takes over for, held against what networks give where channels are gone."""

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.edit import array_of
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration.moments import Moments
from morphgraph.passes.calibration.statistics import Calibration, calibrate
from morphgraph.passes.calibration.uncompensated import cost_of_inputs
from morphgraph.testing import model_from_text

PLACES, WIDE = 400, 6
TIED = """<ir_version: 10, opset_import: ["": 23]>
net (float[400,5] x, float[5,6] w, float[6,3] v, float[4,6] e, float[400,4] z,
     float[6,2] k) => (float[400,3] y, float[400,4] u, float[400,2] o) {
  h = MatMul(x, w)  y = MatMul(h, v)  et = Transpose<perm=[1,0]>(e)  u = MatMul(h, et)
  i = MatMul(z, e)  o = MatMul(i, k)
}"""


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
