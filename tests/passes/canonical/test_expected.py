"""Random inputs are of the kind that their readers expect."""

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, prove, random_plan

# By form: what reads the 24 numbers of the input, and which numbers it shall be given.
READERS = {
    "an embedding": ("e = Gather(table, ids)", range(9)),
    "behind a cast and a reshape": (
        "i = Cast<to=6>(ids)  f = Reshape(i, long)  g = Gather(table, f)  e = Reshape(g, full)",
        range(9),
    ),
    "positions with an offset": ("i = Add(ids, two)  e = Gather(table, i)", range(7)),
    "two tables": ("u = Gather(small, ids)  v = Gather(table, ids)  e = Add(u, v)", range(4)),
    "one hot": ("o = OneHot<axis=-1>(ids, nine, onoff)  e = MatMul(o, table)", range(9)),
    "with a mask of its own": (
        "k = Equal(ids, two)  m = Cast<to=1>(k)  n = Unsqueeze(m, last)  g = Gather(table, ids) "
        "e = Add(g, n)",
        range(9),
    ),
    "a mask": (
        "m = Cast<to=1>(ids)  n = Unsqueeze(m, last)  t = Expand(n, full)  e = Mul(t, ones)",
        range(2),
    ),
    "a choice": (
        "m = Cast<to=9>(ids)  n = Unsqueeze(m, last)  e = Where(n, ones, half)",
        range(2),
    ),
    "lengths": (
        "l = Unsqueeze(ids, last)  k = Less(places, l)  m = Cast<to=1>(k)  e = Mul(m, ones)",
        range(1, 7),
    ),
}
NET = """net (int64[4,6] ids, float[9,6] table, float[4,6] small, float[6,5] w1, float[5,2] w2)
    => (float[4,6,2] y)
    <int64[1] long = {{24}}, int64[3] full = {{4,6,6}}, int64 two = {{2}}, int64 nine = {{9}},
     float[2] onoff = {{0, 1}}, int64[1] last = {{-1}}, float[6] ones = {{1,2,3,4,5,6}},
     float half = {{0.5}}, int64[6] places = {{0,1,2,3,4,5}}>
    {{ {reader}  a = MatMul(e, w1)  s = Sigmoid(a)  y = MatMul(s, w2) }}"""


def graph_of(form: str) -> mg.ChannelGraph:
    return mg.lift(model_from_text(NET.format(reader=READERS[form][0]), ("ids",)))


@pytest.mark.parametrize("form", READERS)
def test_numbers_are_those_that_readers_expect(form: str) -> None:
    graph = graph_of(form)
    ids = random_inputs(graph.model)["ids"]
    assert ids.dtype == np.int64
    assert set(ids.ravel().tolist()) == set(READERS[form][1])
    np.testing.assert_array_equal(ids, random_inputs(graph.model)["ids"])
    assert any((ids != other).any() for other in (random_inputs(graph.model, 1)["ids"],))
    assert np.isfinite(run(graph.model, {"ids": ids})["y"]).all()
    if READERS[form][1] == range(2):
        assert ids.any(axis=-1).all()
        assert ids.mean() > 0.5
    prove(graph, seeds=(0,))


@pytest.mark.parametrize("row", range(9))
def test_a_fault_in_any_row_of_an_embedding_is_seen(row: int) -> None:
    graph = graph_of("an embedding")
    plan = random_plan(graph)
    small = resize(graph, plan.keep_channels(graph))
    table = small.graph.initializers["table"]
    assert table.const_value is not None
    array = table.const_value.numpy().copy()
    array[row] = np.roll(array[row], 1)
    assert mg.verify(graph, plan, small).ok
    table.const_value = ir.Tensor(array, name="table")
    assert not mg.verify(graph, plan, small).ok


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (
            "net (uint8[1,8,8,3] x, float[3,5] w1, float[5,2] w2) => (float[1,8,8,2] y) "
            "{ f = Cast<to=1>(x)  a = MatMul(f, w1)  r = Relu(a)  y = MatMul(r, w2) }",
            (0, 20),
            (230, 255),
        ),
        (
            "net (int8[1,8,8,3] x, float[3,5] w1, float[5,2] w2) => (float[1,8,8,2] y) "
            "<float s = {0.1}> { f = DequantizeLinear(x, s)  a = MatMul(f, w1)  r = Relu(a) "
            "y = MatMul(r, w2) }",
            (-128, -110),
            (110, 127),
        ),
    ],
)
def test_eight_bits_use_their_range(text: str, low: tuple[int, int], high: tuple[int, int]) -> None:
    graph = mg.lift(model_from_text(text))
    x = random_inputs(graph.model)["x"]
    assert low[0] <= x.min() <= low[1]
    assert high[0] <= x.max() <= high[1]
    prove(graph, seeds=(0,))


def test_lengths_of_a_recurrent_layer_are_not_zero() -> None:
    text = """net (float[7,4,3] x, int32[4] n, float[1,16,3] w, float[1,16,4] r, float[4,2] o)
    => (float[7,1,4,2] y) { h, u, c = LSTM<hidden_size=4>(x, w, r, , n)  y = MatMul(h, o) }"""
    graph = mg.lift(model_from_text(text, ("x", "n")))
    drawn = np.stack([random_inputs(graph.model, seed)["n"] for seed in range(20)])
    assert set(drawn.ravel().tolist()) == set(range(1, 8))


def test_flags_stay_as_they_were_where_no_mask_is_read() -> None:
    text = """net (bool which, float[1,3] x, float[3,4] w) => (float[1,4] y) {
        y = If(which) <then_branch = g () => (float[1,4] t) { t = MatMul(x, w) },
            else_branch = h () => (float[1,4] e) { m = MatMul(x, w)  e = Neg(m) }> }"""
    graph = mg.lift(model_from_text(text, ("which", "x")))
    assert {bool(random_inputs(graph.model, seed)["which"]) for seed in range(20)} == {False, True}


# By form: how columns of the 4 x 5 numbers `t` become rows of tables of 9 and of 4.
COLUMNS = {
    "gathered": "a = Gather<axis=1>(t, three)  b = Gather<axis=1>(t, one)",
    "sliced": "u = Slice(t, three1, four1, one1)  a = Squeeze(u, one1) "
    "v = Slice(t, one1, two1, one1)  b = Squeeze(v, one1)",
    "split": "p, b, q, a, z = Split<axis=1, num_outputs=5>(t)",
    "behind a cast": "k = Cast<to=7>(t)  a = Gather<axis=1>(k, three)  b = Gather<axis=1>(k, one)",
}


@pytest.mark.parametrize("dtype", ["float", "int64"])
@pytest.mark.parametrize("form", COLUMNS)
def test_columns_are_rows_of_tables_of_their_own(form: str, dtype: str) -> None:
    text = f"""net ({dtype}[4,5] t, float[9,6] first, float[4,6] second, float[5,6] w0,
        float[6,5] w1, float[5,2] w2) => (float[4,2] y)
    <int64 three = {{3}}, int64 one = {{1}}, int64[1] three1 = {{3}}, int64[1] four1 = {{4}},
     int64[1] one1 = {{1}}, int64[1] two1 = {{2}}, int64[2] full = {{4, 6}}>
    {{ {COLUMNS[form]}  i = Cast<to=7>(a)  j = Cast<to=7>(b)  e = Gather(first, i)
       f = Gather(second, j)  g = Reshape(e, full)  h = Reshape(f, full)  r = Cast<to=1>(t)
       n = MatMul(r, w0)  s = Add(g, h)  m = Add(s, n)  c = MatMul(m, w1)  d = Sigmoid(c)
       y = MatMul(d, w2) }}"""
    graph = mg.lift(model_from_text(text, ("t",)))
    drawn = np.stack([random_inputs(graph.model, seed)["t"] for seed in range(20)])
    assert set(drawn[..., 3].ravel().tolist()) == set(range(9))
    assert set(drawn[..., 1].ravel().tolist()) == set(range(4))
    if dtype == "float":
        assert len(np.unique(drawn[..., [0, 2, 4]])) == 20 * 4 * 3
    prove(graph, seeds=(0,))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize(
    "reader",
    [
        "c = Slice(rois, zero, one, one)  d = Squeeze(c, one)  which = Cast<to=7>(d) "
        "boxes = Slice(rois, one, five, one) "
        "b = RoiAlign<output_height=2, output_width=2, sampling_ratio=2>(r, boxes, which)",
        "b = MaxRoiPool<pooled_shape=[2,2]>(r, rois)",
    ],
)
def test_regions_are_of_samples_that_there_are(reader: str, batch: int) -> None:
    """ONNX Runtime reads memory that is not the network's where they are not."""
    text = f"""net (float[{batch},3,8,8] x, float[5,5] rois, float[6,3,1,1] w1, float[2,6,1,1] w2)
        => (float[5,2,2,2] y)
    <int64[1] zero = {{{{0}}}}, int64[1] one = {{{{1}}}}, int64[1] five = {{{{5}}}}>
    {{{{ a = Conv(x, w1)  r = Sigmoid(a)  {reader}  y = Conv(b, w2) }}}}""".format()
    graph = mg.lift(model_from_text(text, ("x", "rois")))
    drawn = np.stack([random_inputs(graph.model, seed)["rois"] for seed in range(20)])
    assert set(drawn[..., 0].ravel().tolist()) == set(range(batch))
    assert len(np.unique(drawn[..., 1:])) == 20 * 5 * 4
    prove(graph, seeds=(0,))


@pytest.mark.parametrize(
    ("node", "rows"),
    [
        ("u = ScatterElements<axis=1>(x, ids, z)", range(7)),
        ("u = ScatterND(x, ids, z)", range(4)),
        ("u = GatherND(x, ids)", range(4)),
    ],
)
def test_what_is_written_or_read_by_number_is_anywhere(node: str, rows: range) -> None:
    sizes = {"ScatterElements": "4,3,6", "ScatterND": "4,3,2", "GatherND": "4,3,2"}
    (name,) = (each for each in sizes if f" {each}" in node)
    text = f"""net (float[4,7,6] x, int64[{sizes[name]}] ids, float[4,3,6] z, float[6,5] w1,
        float[5,2] w2) => (float[4,N,2] y)
    {{ {node}  a = MatMul(u, w1)  r = Sigmoid(a)  y = MatMul(r, w2) }}"""
    graph = mg.lift(model_from_text(text, ("x", "ids", "z")))
    drawn = np.stack([random_inputs(graph.model, seed)["ids"] for seed in range(20)])
    assert set(drawn.ravel().tolist()) == set(rows)
    assert np.isfinite(run(graph.model, random_inputs(graph.model))["y"]).all()
