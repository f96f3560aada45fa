"""Attention with a state of fixed size: resized equals masked, by heads and by sizes of heads.

A network is its text, then the widths when heads shrink, and those when sizes of heads do.
"""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import morphgraph as mg
from morphgraph.arrays import Arrays
from morphgraph.graph import Attention, ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.caches import caches
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, prove, random_plan

OPSET = '<ir_version: 10, opset_import: ["": 28, "com.microsoft": 1]>'
CHOICES: tuple[Attention, Attention] = ("heads", "head-dim")


def network(body: str, more: str = "", queries: int = 3, heads: int = 3, inputs: str = "") -> str:
    """Heads of size 4, and 3 for values, on a sequence of 5; weights q, k, v make them."""
    outs = f", float[1,{heads},4,3] s" if inputs else ""
    wide = max(queries, heads) * 3
    return f"""net (float[1,5,6] x{inputs}, float[6,{queries * 4}] q, float[6,{heads * 4}] k,
        float[6,{heads * 3}] v, float[{wide},6] o{more}) => (float[1,5,6] y{outs}) {{
            qf = MatMul(x, q)  kf = MatMul(x, k)  vf = MatMul(x, v)
            {body}
            y = MatMul(c, o)
        }}"""


DECAY = "d0 = MatMul(x, wd)  d1 = Softplus(d0)  d = Neg(d1)"
BETA = "b0 = MatMul(x, wb)  b = Sigmoid(b0)"
EVEN = "q_num_heads=3, kv_num_heads=3"
SHARED = "q_num_heads=4, kv_num_heads=2"
NETWORKS: dict[str, tuple[str, list[int], list[int]]] = {
    "linear": (
        network(f'c, s0 = LinearAttention<{EVEN}, update_rule="linear">(qf, kf, vf)'),
        [3],
        [4, 3],
    ),
    "heads decay": (
        network(
            f'{DECAY} c, s0 = LinearAttention<{EVEN}, update_rule="gated">(qf, kf, vf, , d)',
            ", float[6,3] wd",
        ),
        [3],
        [4, 3],
    ),
    "elements of heads decay": (
        network(
            f'{DECAY} c, s0 = LinearAttention<{EVEN}, update_rule="gated">(qf, kf, vf, , d)',
            ", float[6,12] wd",
        ),
        [3],
        [4, 3],
    ),
    "delta, one rate for all": (
        network(
            f'{BETA} c, s0 = LinearAttention<{EVEN}, update_rule="delta">(qf, kf, vf, , , b)',
            ", float[6,1] wb",
        ),
        [3],
        [4, 3],
    ),
    "gated delta, shared heads": (
        network(
            f"{DECAY} {BETA} c, s0 = LinearAttention<{SHARED}, scale=0.4>(qf, kf, vf, , d, b)",
            ", float[6,2] wd, float[6,2] wb",
            queries=4,
            heads=2,
        ),
        [2],
        [4, 3],
    ),
    "a state goes on": (
        network(
            f"{DECAY} {BETA} c, s = LinearAttention<{SHARED}>(qf, kf, vf, p, d, b)",
            ", float[6,8] wd, float[6,2] wb",
            queries=4,
            heads=2,
            inputs=", float[1,2,4,3] p",
        ),
        [2],
        [4, 3],
    ),
    "ONNX Runtime's own": (
        network(
            """d0 = MatMul(x, wd)  b0 = MatMul(x, wb)
            d, b = com.microsoft.LinearAttentionGate(d0, bias, scale, b0)
            c, s0 = com.microsoft.LinearAttention<q_num_heads=3, kv_num_heads=3>(
                qf, kf, vf, , d, b)""",
            ", float[6,3] wd, float[6,3] wb, float[3] bias, float[3] scale",
        ),
        [3],
        [4, 3],
    ),
    "fewer heads of queries": (
        network(
            """c, s0 = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=4,
                update_rule="linear">(qf, kf, vf)""",
            queries=2,
            heads=4,
        ),
        [2],
        [4, 3],
    ),
}
GATES = {  # ONNX Runtime has no kernels for these on a CPU
    "gates and units": (
        """net (float[1,5,6] x, float[6,8] w, float[6,8] u, float[8,6] o) => (float[1,5,6] y) {
            g = MatMul(x, w)  l = MatMul(x, u)  m = SwiGLU<alpha=1.3>(g, l)  y = MatMul(m, o) }""",
        [8],
    ),
    "gates and units, side by side": (
        """net (float[1,5,6] x, float[6,16] w, float[8,6] o) => (float[1,5,6] y) {
            g = MatMul(x, w)  m = com.microsoft.SwiGLU<limit=0.7, activation_beta=1.0>(g)
            y = MatMul(m, o) }""",
        [8],
    ),
    "gates and units, bounded": (
        """net (float[1,5,6] x, float[6,8] w, float[6,8] u, float[8,6] o) => (float[1,5,6] y) {
            g = MatMul(x, w)  l = MatMul(x, u)
            m = com.microsoft.SwiGLU<activation_alpha=1.7, limit=0.7>(g, l)
            y = MatMul(m, o) }""",
        [8],
    ),
}
CONVOLUTIONS = {
    "a causal convolution": (
        """net (float[1,6,5] x, float[1,8,2] p, float[8,6,1] w, float[8,1,3] k, float[8] b,
            float[4,8,1] o) => (float[1,4,5] y, float[1,8,2] s) {
            a = Conv(x, w)  c, s = CausalConvWithState<activation="silu">(a, k, b, p)
            y = Conv(c, o) }""",
        [8],
    ),
    "a causal convolution, channels last": (
        """net (float[1,5,6] x, float[1,4,8] p, float[6,8] w, float[8,1,3] k, float[8,6] o)
            => (float[1,5,6] y, float[1,4,8] s) {
            a = MatMul(x, w)
            c, s = com.microsoft.CausalConvWithState<channels_last=1, dilation=2>(a, k, , p)
            y = MatMul(c, o) }""",
        [8],
    ),
}


def graph_of(text: str, attention: Attention = "heads") -> ChannelGraph:
    inputs = tuple(name for name in ("x", "p") if f"] {name}," in text)
    return lift(model_from_text(OPSET + text, inputs=inputs), attention=attention)


@pytest.mark.parametrize("attention", CHOICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_heads_and_their_sizes(name: str, attention: Attention) -> None:
    graph = graph_of(NETWORKS[name][0], attention)
    assert not [op.name for op in graph.ops if op.opaque]
    expected = NETWORKS[name][1 + CHOICES.index(attention)]
    assert [group.width for group in graph.groups if group.resizable] == expected
    prove(graph, faults=20)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_in_one_plan(name: str) -> None:
    graph = graph_of(NETWORKS[name][0], "all")
    assert {g.width for g in graph.groups if g.resizable} >= {*NETWORKS[name][1], 4, 3}
    prove(graph, seeds=(0,), faults=8)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_a_past(name: str) -> None:
    text, widths = CONVOLUTIONS[name]
    graph = graph_of(text)
    assert not [op.name for op in graph.ops if op.opaque]
    assert [group.width for group in graph.groups if group.resizable] == widths
    prove(graph, faults=20)


@pytest.mark.parametrize("name", GATES)
def test_gates_and_units(name: str) -> None:
    text, widths = GATES[name]
    graph = graph_of(text)
    assert not [op.name for op in graph.ops if op.opaque]
    assert [group.width for group in graph.groups if group.resizable] == widths
    plan = random_plan(graph)
    small = mg.apply(graph, plan)
    report = mg.verify(graph, plan, small)
    assert report.ok
    assert report.by == "PyTorch"
    assert report.sensitivity > 0.01
    again = cost(lift(small), "params").total
    assert again == cost(graph, "params").at(plan.widths(graph)) == plan.cost["params"].after


def test_states_follow_their_channels() -> None:
    for text in (NETWORKS["a state goes on"][0], CONVOLUTIONS["a causal convolution"][0]):
        graph = graph_of(text)
        assert caches(graph.model) == {"p": "s"}
        small = resize(graph, random_plan(graph).keep_channels(graph))
        past, present = small.graph.inputs[1], small.graph.outputs[1]
        assert past.shape == present.shape != graph.model.graph.inputs[1].shape


def test_the_scale_stays_that_of_the_old_size() -> None:
    graph = graph_of(NETWORKS["linear"][0], "head-dim")
    small = resize(graph, random_plan(graph).keep_channels(graph))
    (node,) = [node for node in small.graph if node.op_type == "LinearAttention"]
    assert node.attributes["scale"].as_float() == 0.5


def test_what_is_counted() -> None:
    """Every position writes a state and reads it; by the delta rule its key looks there first."""
    size, positions, weights = 4 * 3, 5, 5 * 6 * (12 + 12 + 9 + 9)
    for name, often, more in (("linear", 2, 0), ("delta, one rate for all", 3, 5 * 6)):
        found = cost(graph_of(NETWORKS[name][0]), "macs").total
        assert found == weights + more + often * positions * 3 * size


BY_ONNX = {k: v for k, v in (NETWORKS | GATES | CONVOLUTIONS).items() if "microsoft" not in v[0]}


@pytest.mark.parametrize("name", BY_ONNX)
def test_onnx_computes_of_the_resized_file_what_it_does_of_the_masked(name: str) -> None:
    """By onnx's own evaluator, which shares no code with ONNX Runtime and PyTorch."""
    graph = graph_of(BY_ONNX[name][0])
    keep = random_plan(graph).keep_channels(graph)
    selection = AxisSelection(graph, keep)
    small, masked = resize(graph, keep), mask(graph, keep)
    feeds = random_inputs(masked)
    expected = evaluated(masked, feeds)
    found = evaluated(small, selection.positions(feeds))
    for result, kept in selection.positions(expected).items():
        np.testing.assert_allclose(found[result], kept, rtol=1e-4, atol=1e-5)
    if name not in GATES:
        for result, array in run(small, selection.positions(feeds)).items():
            np.testing.assert_allclose(found[result], array, rtol=1e-4, atol=1e-5)


def evaluated(model: ir.Model, feeds: Arrays) -> Arrays:
    names = [value.name or "" for value in model.graph.outputs]
    results = ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds))
    return dict(zip(names, results, strict=True))
