"""Query heads within their groups, and sizes of heads, in files of the model builder and others."""

import re

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.errors import PlanError
from morphgraph.graph import Attention, ChannelGraph
from morphgraph.passes.analysis.least import multiples
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, prove

HEADER = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
GROUPED = "com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2"
TABLES = ", float[99,16] cosines, float[99,16] sines"
INPUTS = ("ids", "m", "p", "r")


def decoder(attention: str, *, width: int = 320, more: str = TABLES, cache: str = "P") -> str:
    """One layer as the model builder writes it: 6 heads of queries on 2 of keys, of size 32."""
    grown = "W" if cache == "W" else "L"
    return f"""{HEADER} net (int64[B,T] ids, int64[B,L] m, float[B,2,{cache},32] p,
        float[B,2,{cache},32] r, float[20,8] e, float[8,{width}] w1, float[192,8] w2,
        float[8,20] w3{more})
        => (float[B,T,20] y, float[B,2,{grown},32] k, float[B,2,{grown},32] v)
        <int64[1] one = {{1}}, int64 axis = {{1}}, int64[3] sizes = {{192, 64, 64}}> {{
            x = Gather(e, ids)
            sum = ReduceSum<keepdims=0>(m, one)  less = Sub(sum, one)  l = Cast<to=6>(less)
            shape = Shape(m)  size = Gather(shape, axis)  t = Cast<to=6>(size)
            q = MatMul(x, w1)
            {attention}
            o = MatMul(a, w2)  h = Add(x, o)  y = MatMul(h, w3) }}"""


SPLIT = "s, sk, sv = Split<axis=2>(q, sizes)"
# By the network what a head has to give (positions, or pairs of them that turn), and in what steps.
NETWORKS = {
    "packed, turned": (
        decoder(f"a, k, v = {GROUPED}, do_rotary=1>(q, , , p, r, l, t, cosines, sines)"),
        (16, 8),
    ),
    "neighbours turn": (
        decoder(
            f"{SPLIT} a, k, v = {GROUPED}, do_rotary=1, rotary_interleaved=1, scale=0.3>"
            "(s, sk, sv, p, r, l, t, cosines, sines)"
        ),
        (16, 8),
    ),
    "turned before": (
        decoder(
            f"""{SPLIT} first = Constant<value = int64[1] {{0}}>()
            sr = com.microsoft.RotaryEmbedding<num_heads=6>(s, first, cosines, sines)
            kr = com.microsoft.RotaryEmbedding<num_heads=2>(sk, first, cosines, sines)
            a, k, v = {GROUPED}>(sr, kr, sv, p, r, l, t)"""
        ),
        (16, 4),
    ),
    "not turned": (
        decoder(f"{SPLIT} a, k, v = {GROUPED}>(s, sk, sv, p, r, l, t)", more=""),
        (32, 8),
    ),
    "a sink, a window": (
        decoder(
            f"{SPLIT} a, k, v = {GROUPED}, local_window_size=4>(s, sk, sv, p, r, l, t, , , , , b)",
            more=", float[6] b",
        ),
        (32, 8),
    ),
}


def graph_of(name: str, attention: Attention) -> ChannelGraph:
    return mg.lift(model_from_text(NETWORKS[name][0], inputs=INPUTS), attention=attention)


@pytest.mark.parametrize("name", NETWORKS)
def test_query_heads_go_from_every_group_alike(name: str) -> None:
    graph = graph_of(name, "query-heads")
    assert sorted(g.width for g in graph.groups if g.resizable) == [3, 8]
    prove(graph, seeds=(0,), faults=5)
    heads = next(g for g in graph.groups if g.width == 3)
    small = resize(graph, {heads.index: np.array([0, 2])})
    (node,) = [node for node in small.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes[k].as_int() for k in ("num_heads", "kv_num_heads")] == [4, 2]
    # Of the heads 0 1 2 | 3 4 5 the second of each group is gone, and the cache is as it was.
    rows = np.delete(np.arange(192).reshape(6, 32), [1, 4], axis=0).ravel()
    kept, whole = (each.graph.initializers["w2"].const_value for each in (small, graph.model))
    assert kept is not None
    assert whole is not None
    np.testing.assert_array_equal(kept.numpy(), whole.numpy()[rows])
    assert {str(v.shape) for v in small.graph.inputs if v.name in ("p", "r")} == {"[B,2,P,32]"}


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_get_smaller_in_steps_that_kernels_take(name: str) -> None:
    graph = graph_of(name, "head-dim")
    channels, step = NETWORKS[name][1]
    size = next(g for g in graph.groups if g.width == channels)
    assert multiples(graph)[size.index] == step
    prove(graph, seeds=(0,), faults=5)
    small = resize(graph, {size.index: np.arange(8, 16)})
    (node,) = [node for node in small.graph if node.op_type == "GroupQueryAttention"]
    wanted = 0.3 if name == "neighbours turn" else 32**-0.5
    assert node.attributes["scale"].as_float() == np.float32(wanted)
    left = 8 * 32 // channels
    assert {str(v.shape) for v in small.graph.inputs if v.name in ("p", "r")} == {f"[B,2,P,{left}]"}
    if "cosines" in small.graph.initializers:
        table = small.graph.initializers["cosines"].const_value
        assert table is not None
        assert table.shape[1] == 8


def test_plans_take_these_steps_whatever_the_budget_and_the_grid() -> None:
    graph = graph_of("not turned", "head-dim")
    for budget, grid in (("90%", 1), ("75%", 1), ("60%", 6), ("60%", "auto")):
        plan = mg.plan(graph, {"params": budget}, round_to=grid)  # type: ignore[arg-type]
        (size,) = [len(g.positions) for g in plan.groups.values() if g.width == 32]
        assert size % 8 == 0
    (group,) = [g for g in graph.groups if g.width == 32]
    by_hand = make_plan(graph, {group.index: np.arange(13)}, {})
    with pytest.raises(PlanError, match=r"keeps 13 of 32 channels.*multiples of 8"):
        by_hand.keep_channels(graph)


def runs(size: int, rotary: int) -> bool:
    """Whether ONNX Runtime computes an attention with heads of this size."""
    more = f", float[9,{size // 2}] c, float[9,{size // 2}] s" if rotary else ""
    text = f"""{HEADER} net (float[1,3,{2 * size}] q, float[1,3,{size}] k{more})
        => (float[1,3,{2 * size}] y) <int32[1] l = {{2}}, int32 t = {{3}}> {{
            y = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1, do_rotary={rotary}>
                (q, k, k, , , l, t{", c, s" if rotary else ""}) }}"""
    proto = onnx.parser.parse_model(re.sub(r"\s+", " ", text)).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    inputs = {each.name: np.ones(each.shape, np.float32) for each in session.get_inputs()}
    try:
        session.run(None, inputs)
    except ort.capi.onnxruntime_pybind11_state.InvalidArgument:
        return False
    return True


@pytest.mark.parametrize(("rotary", "step"), [(0, 8), (1, 16)])
def test_these_steps_are_what_onnx_runtime_takes(rotary: int, step: int) -> None:
    taken = [size for size in range(2, 50, 2) if runs(size, rotary)]
    assert taken == [size for size in range(2, 50, 2) if size % step == 0]
