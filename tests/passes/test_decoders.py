"""Decoders with a cache: their sizes, their heads, and the check in two steps.

The files are as the model builder of ONNX Runtime GenAI and PyTorch's exporter write them.
"""

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import ModelError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.canonical.caches import caches
from morphgraph.passes.checking.decoding import decodings
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan, make_plan
from morphgraph.testing.prove import is_rejected, model_from_text, prove, prove_plan

HEADER = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
GROUPED = "com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1"
INPUTS = ("ids", "m", "p", "r")


def builders(attention: str, *, width: int = 128, cache: str = "[B,2,P,D]", more: str = "") -> str:
    """One layer as the model builder writes it: the head size and the marked keys are open."""
    return f"""{HEADER} net (int64[B,T] ids, int64[B,L] m, float{cache} p, float{cache} r,
        float[20,8] e, float[8,{width}] w1, float[64,8] w2, float[8,20] w3,
        float[99,8] cosines, float[99,8] sines{more})
        => (float[B,T,20] y, float[B,2,L,D] k, float[B,2,L,D] v)
        <int64[1] one = {{1}}, int64 axis = {{1}}> {{
            x = Gather(e, ids)
            sum = ReduceSum<keepdims=0>(m, one)  less = Sub(sum, one)  l = Cast<to=6>(less)
            shape = Shape(m)  size = Gather(shape, axis)  t = Cast<to=6>(size)
            q = MatMul(x, w1)
            {attention}
            o = MatMul(a, w2)  h = Add(x, o)  y = MatMul(h, w3) }}"""


PACKED = builders(f"a, k, v = {GROUPED}>(q, , , p, r, l, t, cosines, sines)")
NORMED = builders(
    f"""s, sk, sv = Split<axis=2>(q, sizes)
    rows = Reshape(s, heads)  n = SimplifiedLayerNormalization<axis=-1>(rows, g)
    again = Reshape(n, whole)
    a, k, v = {GROUPED}>(again, sk, sv, p, r, l, t, cosines, sines)""",
    more=", float[16] g",
).replace(
    "int64 axis = {1}",
    "int64 axis = {1}, int64[3] sizes = {64, 32, 32}, int64[3] heads = {0, -1, 16}, "
    "int64[3] whole = {0, -1, 64}",
)
RING = builders(
    f"a, k, v = {GROUPED}, local_window_size=16, sliding_window_cache=1>"
    "(q, , , p, r, l, t, cosines, sines)",
    cache="[B,2,W,D]",
).replace("float[B,2,L,D] k, float[B,2,L,D] v", "float[B,2,W,D] k, float[B,2,W,D] v")
WRITTEN_OUT = f"""{HEADER} net (int64[B,T] ids, float[B,3,P,4] p, float[B,3,S,4] r, float[20,8] e,
    float[8,12] w1, float[8,12] w2, float[8,12] w3, float[12,8] w4, float[8,20] w5)
    => (float[B,T,20] y, float[B,3,L,4] k, float[B,3,L,4] v)
    <int64[4] split = {{0, 0, 3, 4}}, int64[3] join = {{0, 0, 12}}> {{
        x = Gather(e, ids)
        q0 = MatMul(x, w1)  k0 = MatMul(x, w2)  v0 = MatMul(x, w3)
        q1 = Reshape(q0, split)  k1 = Reshape(k0, split)  v1 = Reshape(v0, split)
        q = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,1,3]>(k1)
        v2 = Transpose<perm=[0,2,1,3]>(v1)
        k = Concat<axis=2>(p, k2)  v = Concat<axis=2>(r, v2)
        kt = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(q, kt)  c = Softmax(s)
        a0 = MatMul(c, v)  a1 = Transpose<perm=[0,2,1,3]>(a0)  a = Reshape(a1, join)
        o = MatMul(a, w4)  h = Add(x, o)  y = MatMul(h, w5) }}"""
NETWORKS = {
    "packed": (PACKED, [2, 8]),
    "normed heads": (NORMED, [2, 8]),
    "a ring": (RING, [2, 8]),
    "written out": (WRITTEN_OUT, [3, 8]),
}


def decoder(name: str) -> ChannelGraph:
    text = NETWORKS[name][0]
    inputs = tuple(each for each in INPUTS if f"] {each}," in text)
    return lift(model_from_text(text, inputs=inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_and_hidden_size_shrink_and_so_does_the_cache(name: str) -> None:
    graph = decoder(name)
    assert sorted(g.width for g in graph.groups if g.resizable) == NETWORKS[name][1]
    assert caches(graph.model) == {"p": "k", "r": "v"}
    prove(graph, seeds=(0, 1), faults=6)
    heads = next(g for g in graph.groups if g.resizable and g.width < 8)
    small = resize(graph, {heads.index: np.array([1])})
    shapes = [list(v.shape or ()) for v in (*small.graph.inputs, *small.graph.outputs)]
    assert [shape[1] for shape in shapes if len(shape) == 4] == [1] * 4


def test_open_sizes_that_follow_from_others_are_found() -> None:
    graph = decoder("packed")
    shapes = {v.name: [str(size) for size in v.shape or ()] for v in graph.model.graph.inputs}
    assert shapes["m"] == ["B", "T + P"]
    assert shapes["p"] == ["B", "2", "P", "16"]
    small = resize(graph, {})
    written = {v.name: str(v.shape) for v in small.graph.inputs}
    assert (written["m"], written["p"]) == ("[B,T + P]", "[B,2,P,16]")


def test_a_size_that_outputs_state_wrongly_is_not_believed() -> None:
    text = f"""{HEADER} net (float[B,T,3] x, float[B,S,3] z, float[3,5] w1, float[5,2] w2)
        => (float[B,T,2] y, float[B,S,2] u) <int64[1] a = {{0}}, int64[1] b = {{9}},
        int64[1] c = {{1}}, int64[1] d = {{2}}> {{
            h = MatMul(x, w1)  s = Slice(h, a, b, c, d)  y = MatMul(s, w2)
            g = MatMul(z, w1)  u = MatMul(g, w2) }}"""
    graph = lift(model_from_text(text, inputs=("x", "z")))
    shapes = {v.name: [str(size) for size in v.shape or ()] for v in graph.model.graph.inputs}
    assert shapes == {"x": ["B", "T", "3"], "z": ["B", "S", "3"]}


def test_two_steps_of_decoding() -> None:
    """A prompt behind nothing, then a token behind it; the same as all tokens at once."""
    graph = decoder("written out")
    plan = next(decodings(graph.model))
    prompt = plan.inputs(0, 0, np.random.Generator.standard_normal)
    assert prompt["p"].shape == (2, 3, 0, 4)
    first = run(graph.model, prompt)
    step = plan.inputs(1, 0, np.random.Generator.standard_normal, first)
    assert step["ids"].shape == (2, 1)
    np.testing.assert_array_equal(step["p"], first["k"])
    assert run(graph.model, step)["k"].shape == (2, 3, prompt["ids"].shape[1] + 1, 4)


def test_a_wrong_slice_of_what_only_a_cache_reads_is_rejected() -> None:
    graph = decoder("packed")
    heads = next(g for g in graph.groups if g.resizable and g.width == 2)
    costs = [cost(graph, unit) for unit in ("flops", "params")]
    plan = make_plan(graph, {heads.index: np.array([1])}, {}, costs)
    small = resize(graph, plan.keep_channels(graph))
    assert verify(graph, plan, small).ok
    kernel = small.graph.initializers["w1"]
    assert kernel.const_value is not None
    array = kernel.const_value.numpy().copy()
    array[:, -16:] = array[:, -16:][:, ::-1]  # the values
    kernel.const_value = ir.Tensor(array, name="w1")
    assert is_rejected(graph, plan, small)


def test_the_check_tells_of_a_cache_that_kept_its_heads() -> None:
    graph = decoder("written out")
    plan = prove_plan_of_one(graph)
    broken = resize(graph, plan.keep_channels(graph))
    value = next(v for v in broken.graph.inputs if v.name == "p")
    value.shape = ir.Shape(["B", 3, "P", 4])
    assert is_rejected_or_refused(graph, plan, broken)


def prove_plan_of_one(graph: ChannelGraph) -> Plan:
    heads = next(g for g in graph.groups if g.resizable and g.width == 3)
    costs = [cost(graph, unit) for unit in ("flops", "params")]
    plan = make_plan(graph, {heads.index: np.array([0, 2])}, {}, costs)
    assert prove_plan(graph, plan).ok
    return plan


def is_rejected_or_refused(graph: ChannelGraph, plan: Plan, small: ir.Model) -> bool:
    try:
        return not verify(graph, plan, small).ok
    except (ModelError, VerificationError):
        return True


MERGED = {  # the shape to which batch and heads of the keys are merged
    "tokens inferred": "rows, minus, two",
    "tokens counted": "rows, counted, two",
    "a product in two steps": "product, minus, two",
    "the head size counted": "rows, minus, last",
    "all computed": "all",
}


def merged(pieces: str, opset: int = 20) -> ir.Model:
    """As PyTorch exports Bloom: products of batches and heads, whose number is counted."""
    joined = "j = Concat<axis=0>(rows, counted, last)  shape = Mul(j, i1)"
    if pieces != "all":
        joined = f"shape = Concat<axis=0>({pieces})"
    return model_from_text(
        f"""<ir_version: 8, opset_import: ["": {opset}]> net (float[B,T,8] x, float[B,4,P,2] p,
        float[8,8] w1, float[8,8] w2, float[8,8] w3, float[8,5] w4)
        => (float[B,T,5] y, float[B,4,L,2] k)
        <int64[4] split = {{0, 0, 4, 2}}, int64[3] rejoin = {{0, 0, 8}}, int64[1] i0 = {{0}},
         int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] four = {{4}}, int64[1] two = {{2}},
         int64[1] minus = {{-1}}> {{
            sx = Shape(x)  b = Gather<axis=0>(sx, i0)  t = Gather<axis=0>(sx, i1)
            rows = Mul(b, four)  half = Mul(b, two)  product = Mul(half, two)
            a = MatMul(x, w1)  a1 = Reshape(a, split)  q = Transpose<perm=[0,2,1,3]>(a1)
            c = MatMul(x, w2)  c1 = Reshape(c, split)  c2 = Transpose<perm=[0,2,1,3]>(c1)
            k = Concat<axis=2>(p, c2)  sk = Shape(k)  counted = Gather<axis=0>(sk, i2)
            i3 = Add(i2, i1)  last = Gather<axis=0>(sk, i3)
            {joined}
            k3 = Reshape(k, shape)  kt = Transpose<perm=[0,2,1]>(k3)
            sq = Concat<axis=0>(rows, minus, two)  q3 = Reshape(q, sq)
            s = MatMul(q3, kt)  probs = Softmax<axis=-1>(s)  m = MatMul(probs, k3)
            back = Concat<axis=0>(b, four, t, two)  m4 = Reshape(m, back)
            m5 = Transpose<perm=[0,2,1,3]>(m4)  o = Reshape(m5, rejoin)
            u = MatMul(o, w3)  r = Relu(u)  y = MatMul(r, w4) }}""",
        inputs=("x", "p"),
    )


@pytest.mark.parametrize(("opset", "width"), [pytest.param(14, 2, marks=pytest.mark.long), (20, 4)])
@pytest.mark.parametrize("name", MERGED)
def test_batch_and_heads_on_one_axis(name: str, opset: int, width: int) -> None:
    """Their number is computed from the batch alone, with the old number of heads in it.

    Heads stay, and their size is free, where no operator tells the size of one axis.
    """
    graph = lift(merged(MERGED[name], opset))
    assert [g.width for g in graph.groups if g.resizable and g.name.startswith("MatMul_a")] == [
        width
    ]
    prove(graph)
