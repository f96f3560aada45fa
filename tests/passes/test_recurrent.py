"""Recurrent layers: the arithmetic, what is traced, what grows; resizes are in test_constructs."""

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import runtime as ort, static_shape
from morphgraph.passes.analysis.channel_sources import kernels, readers
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.gates import gated_groups
from morphgraph.passes.analysis.score import score
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, random_plan

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(kind: str, directions: int = 1, units: int = 5, tail: str = "") -> ChannelGraph:
    """One layer that a matrix product reads; 7 steps, a batch of 2, 3 features."""
    g, way = GATES[kind], "bidirectional" if directions == 2 else "forward"
    text = f"""net (float[7,2,3] x, float[{directions},{g * units},3] w,
        float[{directions},{g * units},{units}] r, float[{directions},{2 * g * units}] b,
        float[{units},4] out) => (float[7,{directions},2,4] y) {{
        a = {kind}<hidden_size={units}, direction="{way}"{tail}>(x, w, r, b)  y = MatMul(a, out)
    }}"""
    return lift(model_from_text(text))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("directions", [1, 2])
def test_the_arithmetic_is_both_kernels_at_every_step(kind: str, directions: int) -> None:
    graph = layer(kind, directions)
    sizes = [math.prod(static_shape(graph.model.graph.initializers[name])) for name in ("w", "r")]
    by_layer = cost(graph, "macs").by_layer
    assert by_layer[f"{kind}_a"] * graph.batch == 7 * 2 * sum(sizes)


@pytest.mark.parametrize("kind", GATES)
def test_the_gradient_is_exact_where_a_size_stands_twice_in_a_term(kind: str) -> None:
    graph = layer(kind, 2)
    macs, widths = cost(graph, "macs"), graph.widths.astype(float)
    unit = np.array([float(group.resizable) for group in graph.groups])
    central = (macs.at(widths + unit) - macs.at(widths - unit)) / 2  # exact for squares
    assert macs.gradient(widths) @ unit == pytest.approx(central, rel=1e-12)


def test_kernels_are_the_gates_rows_and_not_the_bias() -> None:
    graph = layer("LSTM", 2)
    assert [(s.parameter, s.axis) for s in kernels(graph)] == [("w", 1), ("r", 1), ("out", 1)]
    assert [(s.parameter, s.axis) for s in readers(graph)] == [("w", 2), ("r", 2), ("out", 0)]
    weights = {n: graph.model.graph.initializers[n].const_value.numpy() for n in ("w", "r")}
    norms = [
        np.sqrt((w.reshape(2, 4, 5, -1).astype(float) ** 2).sum(axis=(0, 1, 3)))
        for w in weights.values()
    ]
    found = score(graph, "l2")[graph.channels_at("a", 3)]
    assert found == pytest.approx(np.maximum(*norms))


# As torch exports it: gates i, f, g, o sliced from the parameter, joined as i, o, f, c.
SLICED = """net (float[7,2,3] x, float[20,3] w, float[1,20,5] r, float[5,4] out)
    => (float[7,1,2,4] y) <int64[1] axis = {0}, int64[1] a = {0}, int64[1] b = {5},
    int64[1] c = {10}, int64[1] d = {15}, int64[1] e = {20}> {
    i = Slice(w, a, b, axis)  f = Slice(w, b, c, axis)  g = Slice(w, c, d, axis)
    o = Slice(w, d, e, axis)  j = Concat<axis=0>(i, o, f, g)  u = Unsqueeze(j, axis)
    h = LSTM<hidden_size=5>(x, u, r)  y = MatMul(h, out)
}"""


def test_the_sources_of_a_computed_kernel_are_its_parameters() -> None:
    graph = lift(model_from_text(SLICED))
    assert ("w", 0) in [(s.parameter, s.axis) for s in kernels(graph)]
    assert ("w", 1) in [(s.parameter, s.axis) for s in readers(graph)]
    units = graph.channels_at("h", 3)
    assert np.array_equal(graph.channels_at("w", 0), np.tile(units, 4))


def test_a_group_is_not_gated_behind_the_layer_that_sums_over_it() -> None:
    text = """net (float[7,2,3] x, float[1,5,3] w, float[1,5,5] r, float[5] s, float[5] h,
        float[5] m, float[5] v, float[5,4] out) => (float[2,4] y) <int64[1] axis = {0}> {
        , a = RNN<hidden_size=5>(x, w, r)  q = Squeeze(a, axis)
        n = BatchNormalization(q, s, h, m, v)  y = MatMul(n, out)
    }"""
    assert gated_groups(lift(model_from_text(text))) == frozenset()


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("directions", [1, 2])
def test_a_layer_that_grows_computes_what_it_did(kind: str, directions: int) -> None:
    graph = layer(kind, directions)
    (index,) = [group.index for group in graph.groups if group.resizable]
    for keep in ({}, {index: np.array([0, 3])}, {index: np.array([4])}):
        grown = resize(graph, keep, {index: 3}, seed=1)
        node = next(node for node in grown.graph if node.op_type == kind)
        assert node.attributes["hidden_size"].as_int() == len(keep.get(index, range(5))) + 3
        feeds = ort.random_inputs(graph.model)
        expected, found = (ort.run(m, feeds)["y"] for m in (resize(graph, keep), grown))
        assert found == pytest.approx(expected, abs=1e-5)
        fresh = grown.graph.initializers["w"].const_value.numpy()
        assert np.abs(fresh).min() > 0  # what makes the new units is drawn at random


def test_a_unit_that_is_added_is_sliced_from_its_own_rows() -> None:
    graph = lift(model_from_text(SLICED))
    (index,) = [group.index for group in graph.groups if group.resizable]
    keep = {index: np.array([0, 2, 3])}
    grown = resize(graph, keep, {index: 2})
    # No slice became a choice of rows, which would read the rows of an old unit once more.
    assert [n.op_type for n in grown.graph] == [n.op_type for n in graph.model.graph]
    rows = grown.graph.initializers["w"].const_value.numpy()
    (joined,) = [n.outputs[0] for n in grown.graph if n.op_type == "Concat"]
    grown.graph.outputs.append(joined)
    found = ort.run(grown, ort.random_inputs(grown))[str(joined.name)]
    gates = rows.reshape(4, 5, 3)[[0, 3, 1, 2]]
    assert np.array_equal(found, gates.reshape(20, 3))
    assert len(np.unique(rows, axis=0)) == 20


def test_a_plan_grows_a_recurrent_layer() -> None:
    graph = layer("GRU", 2, units=8)
    wide = mg.expand(graph, mg.uniform(graph, 0.5), {"params": "100%"})
    assert wide.widths(graph).max() > 4
    report = verify(graph, wide, mg.apply(graph, wide))
    assert report.ok


def test_a_single_unit_keeps_its_size() -> None:
    graph = layer("LSTM", units=1)
    assert {group.reason for group in graph.groups if group.width == 1} == {"LSTM of one unit"}


@pytest.mark.parametrize("kind", GATES)
def test_batches_first(kind: str) -> None:
    """ONNX Runtime has no kernel for layout 1; ONNX's reference implementation is the oracle."""
    g = GATES[kind]
    text = f"""net (float[2,7,3] x, float[1,{g * 5},3] w, float[1,{g * 5},5] r, float[2,1,5] h,
        float[5,4] out) => (float[2,7,1,4] y) {{
        a = {kind}<hidden_size=5, layout=1>(x, w, r, , , h)  y = MatMul(a, out)
    }}"""
    graph = lift(model_from_text(text))
    keep = random_plan(graph).keep_channels(graph)
    assert [len(kept) for kept in keep.values()] == [3]
    feeds = ort.random_inputs(graph.model)
    small, masked, whole = (
        next(iter(ReferenceEvaluator(ir.to_proto(m)).run(None, feeds)))
        for m in (resize(graph, keep), mask(graph, keep), graph.model)
    )
    assert small == pytest.approx(masked, abs=1e-5)
    assert np.abs(whole - masked).max() > 1e-2
