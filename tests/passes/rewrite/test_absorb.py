"""Removed channels that were constant are not missed: the result equals the original there."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import constant_names
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.dependence import dependence
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.absorb import absorb, absorbed_in
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan, make_plan
from morphgraph.testing import model_from_text
from morphgraph.workflow import apply

BN = """net (float[1,3,8,8] x, float[6,3,3,3] w1, float[6] s, float[6] h, float[6] m, float[6] v,
    {weights}) => (float[1,2,{out}] y) {{
    a = Conv<pads=[1,1,1,1]>(x, w1)  n = BatchNormalization(a, s, h, m, v)  r = Relu(n)
    {rest}
}}"""

# Per network: what is set to zero (an axis-0 slice per tensor), the group, and what new constants
# there are, by the shape of each.
ZERO = {"s": [1, 4]}
NETWORKS: dict[str, tuple[str, Mapping[str, list[int]], str, list[tuple[int, ...]]]] = {
    "a convolution with a bias": (
        BN.format(weights="float[2,6,1,1] w2, float[2] b2", out="8,8", rest="y = Conv(r, w2, b2)"),
        ZERO,
        "Conv_a",
        [],
    ),
    "a convolution without": (
        BN.format(weights="float[2,6,1,1] w2", out="8,8", rest="y = Conv(r, w2)"),
        ZERO,
        "Conv_a",
        [(2,)],
    ),
    "a padded convolution": (
        BN.format(
            weights="float[2,6,3,3] w2, float[2] b2",
            out="8,8",
            rest="y = Conv<pads=[1,1,1,1]>(r, w2, b2)",
        ),
        ZERO,
        "Conv_a",
        [(1, 2, 3, 3)],
    ),
    "padded, strided, on one side": (
        BN.format(
            weights="float[5,6,3,3] w2, float[2,5,1,1] w3",
            out="4,4",
            rest="b = Conv<pads=[1,1,0,0], strides=[2,2]>(r, w2)  t = Tanh(b)  y = Conv(t, w3)",
        ),
        ZERO,
        "Conv_a",
        [(1, 5, 2, 2)],
    ),
    "a transposed convolution": (
        BN.format(
            weights="float[6,2,2,2] w2, float[2] b2",
            out="16,16",
            rest="y = ConvTranspose<strides=[2,2]>(r, w2, b2)",
        ),
        ZERO,
        "Conv_a",
        [(1, 2, 2, 2)],
    ),
    "kernels of zeros": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] b1, float[2,6,1,1] w2, float[2] b2)
        => (float[1,2,4,4] y) { a = Conv(x, w1, b1)  r = Sigmoid(a)  y = Conv(r, w2, b2) }""",
        {"w1": [0, 3]},
        "Conv_a",
        [],
    ),
    "a flattened map": (
        """net (float[2,3,4,4] x, float[6,3,3,3] w1, float[6] b1, float[5,24] w2, float[5] b2,
             float[3,5] w3) => (float[2,3] y) {
            a = Conv(x, w1, b1)  r = Sigmoid(a)  f = Flatten<axis=1>(r)
            l = Gemm<transB=1>(f, w2, b2)  t = Tanh(l)  y = Gemm<transB=1>(t, w3)
        }""",
        {"w1": [0, 3]},
        "Conv_a",
        [],
    ),
    "linear layers on three axes": (
        """net (float[2,5,3] x, float[3,6] w1, float[6] s, float[6] b1, float[6,2] w2, float[2] b2)
        => (float[2,5,2] y) {
            a = MatMul(x, w1)  m = Mul(a, s)  b = Add(m, b1)  r = Tanh(b)  c = MatMul(r, w2)
            y = Add(c, b2)
        }""",
        ZERO,
        "MatMul_a",
        [],
    ),
    "a linear layer without a bias": (
        """net (float[2,5,3] x, float[3,6] w1, float[6] s, float[6] b1, float[6,2] w2)
        => (float[2,5,2] y) {
            a = MatMul(x, w1)  m = Mul(a, s)  b = Add(m, b1)  r = Tanh(b)  y = MatMul(r, w2)
        }""",
        ZERO,
        "MatMul_a",
        [(1, 1, 2)],
    ),
    "a depthwise convolution on the way": (
        BN.format(
            weights="float[6,1,3,3] w2, float[6] b2, float[2,6,3,3] w3, float[2] b3",
            out="6,6",
            rest="d = Conv<group=6, pads=[1,1,1,1]>(r, w2, b2)  t = Tanh(d)  y = Conv(t, w3, b3)",
        ),
        ZERO,
        "Conv_a",
        [(1, 2, 3, 3)],
    ),
    "a concatenation and pooling": (
        BN.format(
            weights="float[4,3,1,1] w2, float[2,10,1,1] w3, float[2] b3",
            out="8,8",
            rest="""b = Conv(x, w2)  c = Concat<axis=1>(b, r)
            p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)  y = Conv(p, w3, b3)""",
        ),
        ZERO,
        "Conv_a",
        [],
    ),
    "the whole group": (
        BN.format(
            weights="float[2,6,3,3] w2, float[2] b2, float[2,3,1,1] w3",
            out="8,8",
            rest="b = Conv<pads=[1,1,1,1]>(r, w2, b2)  c = Conv(x, w3)  y = Add(b, c)",
        ),
        {"s": [0, 1, 2, 3, 4, 5]},
        "Conv_a",
        [(1, 2, 8, 8)],
    ),
}


def graph_of(text: str, zero: Mapping[str, list[int]]) -> ChannelGraph:
    """A network in which some slices of some weights are zero."""
    model = model_from_text(text)
    for name, rows in zero.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[rows] = 0.0
        value.const_value = ir.Tensor(array, name=name)
    return lift(model)


def without(graph: ChannelGraph, group: str, removed: list[int]) -> Plan:
    found = graph.group(group)
    return make_plan(graph, {found.index: np.delete(np.arange(found.width), removed)}, {})


def removed_by(graph: ChannelGraph, zero: Mapping[str, list[int]], group: str) -> list[int]:
    """The channels of a group at the slices that are zero."""
    ((name, rows),) = zero.items()
    channels = graph.channels_at(name, 0)[rows]
    return np.flatnonzero(np.isin(graph.group(group).channels, channels)).tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_is_the_original_network(name: str) -> None:
    text, zero, group, shapes = NETWORKS[name]
    graph = graph_of(text, zero)
    made = without(graph, group, removed_by(graph, zero, group))
    small = apply(graph, made, absorb=True)
    for seed in (1, 2):
        feeds = random_inputs(graph.model, seed)
        original, found = run(graph.model, feeds)["y"], run(small, feeds)["y"]
        dropped = run(resize(graph, made.keep_channels(graph)), feeds)["y"]
        scale = np.abs(original).max()
        assert np.abs(original - found).max() < 1e-5 * scale
        assert np.abs(original - dropped).max() > 1e-2 * scale  # it mattered
    named = sorted(constant_names(small))
    assert [tuple(small.graph.initializers[n].shape or ()) for n in named] == shapes
    for kind in ("flops", "params"):
        assert cost(lift(small), kind).total == cost(graph, kind).at(made.widths(graph))


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_were_not_constant_are_masked_as_before(name: str) -> None:
    text, zero, group, _ = NETWORKS[name]
    graph = graph_of(text, zero)
    constant = removed_by(graph, zero, group)
    live = [k for k in range(graph.group(group).width) if k not in constant]
    made = without(graph, group, [*constant[:1], *live[:2]])
    moved = absorb(graph, made.keep_channels(graph))
    assert {k: v.tolist() for k, v in moved.positions().items()} == {
        graph.group(group).index: constant[:1]
    }
    small = resize(graph, made.keep_channels(graph), absorbed=moved)
    report = verify(graph, made, small)
    assert report.ok, report.worst


def test_dependence_is_what_two_runs_can_see() -> None:
    """Positions that are flagged as constant are the same for any input; these are all of them."""
    for name, (text, zero, _, _) in NETWORKS.items():
        graph = graph_of(text, zero)
        depends = dependence(graph)
        model = graph.model.clone()
        made = [v for node in model.graph for v in node.outputs if v.name in depends]
        model.graph.outputs.extend(v for v in made if v.name != "y")
        runs = [run(model, random_inputs(graph.model, seed)) for seed in range(6)]
        for value in made:
            arrays = [found[value.name or ""] for found in runs]
            differs = np.any([arrays[0] != other for other in arrays[1:]], axis=0)
            for axis, flags in enumerate(depends[value.name or ""]):
                seen = differs.any(axis=tuple(a for a in range(differs.ndim) if a != axis))
                assert not (seen & ~flags).any(), (name, value.name, axis)
                if value.name in ("r", "n"):
                    assert (seen == flags).all(), (name, value.name, axis)


def test_a_chain_of_constants() -> None:
    """A channel that reads constant channels alone is constant too, and so is the next."""
    text = """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[4] b1, float[5,4,1,1] w2, float[5] b2,
        float[2,5,1,1] w3, float[2] b3) => (float[1,2,4,4] y) {
        a = Conv(x, w1, b1)  r = Sigmoid(a)  b = Conv(r, w2, b2)  s = Tanh(b)  y = Conv(s, w3, b3)
    }"""
    model = model_from_text(text)
    for name, cut in (("w1", np.s_[1:3]), ("w2", np.s_[:2, [0, 3]])):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[cut] = 0.0
        value.const_value = ir.Tensor(array, name=name)
    graph = lift(model)
    first, second = graph.group("Conv_a"), graph.group("Conv_b")
    keep = {first.index: np.array([0, 3]), second.index: np.array([2, 3, 4])}
    small = apply(graph, make_plan(graph, keep, {}), absorb=True)
    feeds = random_inputs(graph.model, 3)
    np.testing.assert_allclose(run(small, feeds)["y"], run(graph.model, feeds)["y"], rtol=1e-5)


def test_a_dynamic_batch_stays_dynamic() -> None:
    text, zero, group, _ = NETWORKS["a padded convolution"]
    graph = graph_of(text.replace("[1,3,8,8]", "[n,3,8,8]").replace("[1,2,8", "[n,2,8"), zero)
    small = apply(graph, without(graph, group, [1, 4]), absorb=True)
    for batch in (1, 5):
        feeds = {"x": np.random.default_rng(0).standard_normal((batch, 3, 8, 8), np.float32)}
        np.testing.assert_allclose(
            run(small, feeds)["y"], run(graph.model, feeds)["y"], rtol=1e-4, atol=1e-5
        )


NORMED = """net (float[2,5,3] x, float[3,6] w1, float[6] s, float[6] b1, float[6] g, float[6] h,
    float[6,2] w2) => (float[2,5,2] y) {
    a = MatMul(x, w1)  m = Mul(a, s)  b = Add(m, b1)  n = LayerNormalization(b, g, h)
    y = MatMul(n, w2)
}"""
PRODUCT = """net (float[1,4,3] x, float[3,6] w1, float[6] s, float[6] b1, float[3,6] w2)
    => (float[1,4,4] y) {
    a = MatMul(x, w1)  m = Mul(a, s)  b = Add(m, b1)  c = MatMul(x, w2)
    t = Transpose<perm=[0,2,1]>(c)  y = MatMul(b, t)
}"""
NORM = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] b1, float[2,1,1,1] w2)
    => (float[1,2,4,4] y) <int64[1] axes = {1}> {
    a = Conv(x, w1, b1)  n = ReduceL2(a, axes)  y = Conv(n, w2)
}"""
WIDE = """net (float[1,3,8,8] x, float[6,3,1,1] w1, float[6] b1, float[6,1,1,8] w2, float[6] b2,
    float[1,6,1,1] w3) => (float[1,1,8,8] y) {
    a = Conv(x, w1, b1)  r = Sigmoid(a)  p = Conv<group=6, pads=[0,3,0,4]>(r, w2, b2)
    y = Conv(p, w3)
}"""
WEIGHT_NORM = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] b1, float[2,6,1,1] v2,
    float[2,1,1,1] g2) => (float[1,2,4,4] y) <int64[3] axes = {1, 2, 3}> {
    a = Conv(x, w1, b1)  r = Sigmoid(a)
    l = ReduceL2(v2, axes)  d = Div(v2, l)  w2 = Mul(d, g2)  y = Conv(r, w2)
}"""


@pytest.mark.parametrize(
    ("text", "zero", "why"),
    [
        (WEIGHT_NORM, {"w1": [0, 3]}, "Conv 'Conv_y' has a kernel that is computed from all"),
        (NORMED, {"s": [1, 4]}, "LayerNormalization 'LayerNormalization_n' averages"),
        (PRODUCT, {"s": [1, 4]}, "MatMul 'MatMul_y' multiplies it with another activation"),
        (NORM, {"w1": [0, 3]}, "ReduceL2 'ReduceL2_n' is not linear"),
        (WIDE, {"w1": [0, 3]}, "Conv 'Conv_y' would need a map of 8 numbers, more than its 6"),
    ],
)
def test_what_cannot_be_absorbed_is_named(text: str, zero: dict[str, list[int]], why: str) -> None:
    graph = graph_of(text, zero)
    group = next(g for g in graph.groups if g.resizable)
    made = without(graph, group.name, removed_by(graph, zero, group.name))
    with pytest.warns(MorphWarning, match=f"dropped, not absorbed: .*{why}"):
        small = apply(graph, made, absorb=True)  # checked against the masked original
    assert absorbed_in(graph, small) == {}


def test_a_model_that_claims_too_much_fails() -> None:
    text, zero, group, _ = NETWORKS["a convolution with a bias"]
    graph = graph_of(text, zero)
    made = without(graph, group, [1, 4])
    small = apply(graph, made, absorb=True)
    assert "morphgraph.absorbed" in small.metadata_props
    dropped = resize(graph, made.keep_channels(graph))
    assert verify(graph, made, dropped).ok
    dropped.metadata_props["morphgraph.absorbed"] = small.metadata_props["morphgraph.absorbed"]
    assert not verify(graph, made, dropped).ok
    again = lift(small)
    assert "morphgraph.absorbed" not in resize(again, {}).metadata_props
