"""Kernels that several operators read, fitted for all of them at once, held against numpy."""

import warnings
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.edit import array_of
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration.readers import all_readers, peers
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.calibration.together import in_order, repeated
from morphgraph.passes.refit.refit import Refitted, refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text

#: One encoder on two inputs: its bias is shared, and an addition's.
SIAMESE = """net (float[N,6] x, float[N,6] z, float[6,12] a, float[12] ab, float[12,5] b,
  float[5] bb, float[5,2] c) => (float[N,2] y) {
  h = MatMul(x, a) hb = Add(h, ab) r = Relu(hb) g = MatMul(r, b) gb = Add(g, bb) s = Tanh(gb)
  i = MatMul(z, a) ib = Add(i, ab) t = Relu(ib) k = MatMul(t, b) kb = Add(k, bb) u = Tanh(kb)
  d = Sub(s, u) e = Abs(d) y = MatMul(e, c) }"""
#: A head over maps of two sizes, as a detector has it over its levels.
LEVELS = """net (float[N,3,8,8] x, float[10,3,3,3] a, float[10,10,3,3] l, float[12,10,3,3] b,
  float[12] bb, float[4,12,1,1] c) => (float[N,4,8,8] y, float[N,4,4,4] z) {
  h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h)
  g = Conv<pads=[1,1,1,1], strides=[2,2]>(r, l) q = Relu(g)
  m = Conv<pads=[1,1,1,1]>(r, b, bb) s = Relu(m) y = Conv(s, c)
  n = Conv<pads=[1,1,1,1]>(q, b, bb) t = Relu(n) z = Conv(t, c) }"""
#: A block that runs three times.
REPEATED = """net (float[N,6] x, float[6,8] e, float[8,16] a, float[16] ab, float[16,8] b,
  float[8,3] c) => (float[N,3] y) {
  s0 = MatMul(x, e)
  h0 = MatMul(s0, a) i0 = Add(h0, ab) r0 = Tanh(i0) g0 = MatMul(r0, b) s1 = Add(s0, g0)
  h1 = MatMul(s1, a) i1 = Add(h1, ab) r1 = Tanh(i1) g1 = MatMul(r1, b) s2 = Add(s1, g1)
  h2 = MatMul(s2, a) i2 = Add(h2, ab) r2 = Tanh(i2) g2 = MatMul(r2, b) s3 = Add(s2, g2)
  y = MatMul(s3, c) }"""
PLACES = 600


def model(text: str, inputs: tuple[str, ...], scale: float = 0.5) -> ir.Model:
    """With weights of few dimensions, so that channels can take over for others."""
    made, rng = model_from_text(text, inputs), np.random.default_rng(0)
    for name, value in made.graph.initializers.items():
        shape = array_of(value).shape
        array = np.asarray(rng.normal(scale=scale, size=shape))
        if len(shape) > 1 and name in ("a", "e", "l"):
            axis = 1 if len(shape) == 2 else 0
            array += 2 * scale * array.take(rng.integers(3, size=shape[axis]), axis)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
    return made


def kept(graph: mg.ChannelGraph, producer: str, width: int) -> dict[int, Array]:
    (group,) = (g for g in graph.groups if g.resizable and producer in g.producers)
    return {group.index: np.arange(width)}


def halves(feeds: Arrays) -> tuple[list[Arrays], list[Arrays]]:
    """To fit to in two batches, and kept aside."""
    size = len(next(iter(feeds.values())))
    cuts = [0, size // 3, 2 * size // 3, size]
    one, two, three = (
        {name: array[a:b] for name, array in feeds.items()} for a, b in pairwise(cuts)
    )
    return [one, two], [three]


def fitted(graph: mg.ChannelGraph, keep: dict[int, Array], feeds: Arrays) -> Refitted:
    batches, aside = halves(feeds)
    return refit(graph, keep, batches, aside, threads=1)


def values(model: ir.Model, feeds: Arrays, names: list[str]) -> list[FloatArray]:
    """What ONNX Runtime gives for values inside."""
    inputs = [value.name or "" for value in model.graph.inputs]
    found = Piece(model, inputs, names, 1).run(feeds)
    return [found[name].astype(np.float64) for name in names]


def normal(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.default_rng(1)
    return {
        name: (rng.normal(size=shape) + place).astype(np.float32)
        for place, (name, shape) in enumerate(shapes.items())
    }


def together(feeds: list[Arrays]) -> Arrays:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def test_one_kernel_and_one_bias_are_the_least_squares_of_all_places() -> None:
    graph = mg.lift(model(SIAMESE, ("x", "z")))
    feeds = normal({"x": (PLACES, 6), "z": (PLACES, 6)})
    found = fitted(graph, kept(graph, "MatMul_h", 7), feeds)
    seen = together(halves(feeds)[0])
    rows = np.concatenate(values(found.model, seen, ["r", "t"]))
    wanted = np.concatenate(values(graph.model, seen, ["gb", "kb"]))
    with_one = np.column_stack([rows, np.ones(len(rows))])
    best, *_ = np.linalg.lstsq(with_one, wanted, rcond=None)
    held = found.model.graph.initializers
    mine = np.vstack([array_of(held["b"]), array_of(held["bb"])]).astype(np.float64)
    np.testing.assert_allclose(mine, best, rtol=1e-2, atol=1e-3)
    assert len(held["b"].uses()) == len(held["bb"].uses()) == 2
    assert held.keys() - graph.model.graph.initializers.keys() <= {"y_absorbed"}
    assert not found.slices
    (one, other) = (each for each in found.layers if each.name in ("MatMul_g", "MatMul_k"))
    assert (one.before, one.after) == (other.before, other.after)
    assert one.after < 0.8 * one.before


def test_biases_of_their_own_get_the_means_of_their_places() -> None:
    text = SIAMESE.replace("float[5] bb", "float[5] bb, float[5] bc").replace(
        "kb = Add(k, bb)", "kb = Add(k, bc)"
    )
    graph = mg.lift(model(text, ("x", "z")))
    feeds = normal({"x": (PLACES, 6), "z": (PLACES, 6)})
    found = fitted(graph, kept(graph, "MatMul_h", 7), feeds)
    seen = together(halves(feeds)[0])
    rows = values(found.model, seen, ["r", "t"])
    wanted = values(graph.model, seen, ["gb", "kb"])
    size = len(rows[0])
    flags = np.repeat(np.eye(2), size, axis=0)
    best, *_ = np.linalg.lstsq(
        np.column_stack([np.concatenate(rows), flags]), np.concatenate(wanted), rcond=None
    )
    held = found.model.graph.initializers
    mine = np.vstack([array_of(held[name]) for name in ("b", "bb", "bc")]).astype(np.float64)
    np.testing.assert_allclose(mine, best, rtol=1e-2, atol=1e-3)


def test_a_bias_that_is_new_is_one_for_all_places() -> None:
    text = SIAMESE.replace("gb = Add(g, bb)", "gb = Identity(g)").replace(
        "kb = Add(k, bb)", "kb = Identity(k)"
    )
    graph = mg.lift(model(text.replace(", float[5] bb", ""), ("x", "z")))
    feeds = normal({"x": (PLACES, 6), "z": (PLACES, 6)})
    found = fitted(graph, kept(graph, "MatMul_h", 7), feeds)
    held = found.model.graph.initializers
    (new,) = held.keys() - graph.model.graph.initializers.keys() - {"y_absorbed"}
    assert len(held[new].uses()) == 2


NETWORKS: dict[str, tuple[str, dict[str, tuple[int, ...]], str, int]] = {
    "siamese": (SIAMESE, {"x": (PLACES, 6), "z": (PLACES, 6)}, "MatMul_h", 7),
    "levels": (LEVELS, {"x": (60, 3, 8, 8)}, "Conv_m", 7),
    "ahead of the levels": (LEVELS, {"x": (60, 3, 8, 8)}, "Conv_h", 6),
    "repeated": (REPEATED, {"x": (PLACES, 6)}, "MatMul_h0", 10),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_never_further_away_than_with_slices(name: str) -> None:
    text, shapes, producer, width = NETWORKS[name]
    graph = mg.lift(model(text, tuple(shapes)))
    feeds, keep = normal(shapes), kept(graph, producer, width)
    found = fitted(graph, keep, feeds)
    assert not found.slices
    sliced = resize(graph, keep)
    for part in (halves(feeds)[0][0], halves(feeds)[1][0]):
        expected = run(graph.model, part)
        before, after = (
            sum(float(np.square(run(each, part)[k] - v).sum()) for k, v in expected.items())
            for each in (sliced, found.model)
        )
        assert after < 0.8 * before


def test_one_that_something_else_reads_stays_a_slice() -> None:
    text = SIAMESE.replace("=> (float[N,2] y)", "=> (float[N,2] y, float[5,12] w)").replace(
        "y = MatMul(e, c)", "w0 = Transpose<perm=[1,0]>(b) w = Relu(w0) y = MatMul(e, c)"
    )
    graph = mg.lift(model(text, ("x", "z")))
    assert "MatMul_g" not in all_readers(graph.model, graph.couplings.input_independent)


def test_kernels_read_as_other_matrices_are_no_peers() -> None:
    text = """net (float[N,6] x, float[6,6] a, float[6,6] b) => (float[N,6] y) {
      h = MatMul(x, a) r = Relu(h) g = Gemm<transB=1>(r, a) y = MatMul(g, b) }"""
    graph = mg.lift(model_from_text(text))
    assert not peers(graph.model, graph.couplings.input_independent)


def orders(text: str, inputs: tuple[str, ...]) -> tuple[list[str], frozenset[str]]:
    graph = mg.lift(model_from_text(text, inputs))
    found = all_readers(graph.model, graph.couplings.input_independent)
    nodes = list(graph.model.graph)
    again = repeated(nodes, found)
    own = {name: each for name, each in found.items() if name not in again}
    rank = {node.name or "": place for place, node in enumerate(nodes)}
    order = in_order(nodes, own, rank)
    made = {value.name for value in graph.model.graph.inputs} | {*graph.model.graph.initializers}
    for node in order:  # topological
        assert {value.name for value in node.inputs if value is not None} <= made
        made |= {value.name for value in node.outputs}
    assert len(order) == len(nodes)
    return [node.name or "" for node in order], again


def test_peers_stand_beside_each_other() -> None:
    order, again = orders(SIAMESE, ("x", "z"))
    assert not again
    assert order.index("MatMul_i") == order.index("MatMul_h") + 1
    assert order.index("MatMul_k") == order.index("MatMul_g") + 1


def test_what_runs_again_stays_in_its_order() -> None:
    order, again = orders(REPEATED, ("x",))
    assert again == {f"MatMul_{letter}{k}" for letter in "hg" for k in range(3)}
    assert order.index("MatMul_h0") < order.index("MatMul_g0") < order.index("MatMul_h1")
    crossed = """net (float[N,6] x, float[N,6] z, float[6,6] a, float[6,6] b) =>
      (float[N,6] y, float[N,6] w) {
      h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)
      i = MatMul(z, b) s = Relu(i) w = MatMul(s, a) }"""
    assert orders(crossed, ("x", "z"))[1] == {"MatMul_h", "MatMul_y", "MatMul_i", "MatMul_w"}


def test_no_warning_of_slices() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mg.MorphWarning)
        feeds = normal({"x": (200, 6), "z": (200, 6)})
        result = mg.shrink(model(SIAMESE, ("x", "z")), feeds, {"params": "60%"}, threads=1)
    for before, after in zip(result.before, result.error, strict=True):
        assert after.error <= before.error
