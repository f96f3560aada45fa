"""Groups die and layers vanish: what is left equals the masked original, at the predicted cost."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from morphgraph.errors import BudgetError, PlanError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import PARAMETERS_KEY, constant_names, load, save
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.ops import parameter_names
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.liveness import liveness, with_orphans
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths, uniform
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan
from morphgraph.testing import model_from_text, prove_plan, random_removal
from morphgraph.torch_io.to_torch import to_torch

OPSET = '<ir_version: 10, opset_import: ["": 21]>'

RESIDUAL = """net (float[1,3,6,6] x, float[8,3,1,1] w0, float[5,8,3,3] w1, float[5] s1,
    float[5] h1, float[5] m1, float[5] v1, float[8,5,3,3] w2, float[8] s2, float[8] h2,
    float[8] m2, float[8] v2, float[2,8,1,1] w3) => (float[1,2,6,6] y) {
    a = Conv(x, w0)  r = Relu(a)
    b = Conv<pads=[1,1,1,1]>(r, w1)  bb = BatchNormalization(b, s1, h1, m1, v1)  rb = Relu(bb)
    c = Conv<pads=[1,1,1,1]>(rb, w2)  cc = BatchNormalization(c, s2, h2, m2, v2)
    e = Add(cc, r)  f = Relu(e)  y = Conv(f, w3)
}"""
BOTTLENECK = """net (float[1,3,6,6] x, float[8,3,1,1] w0, float[4,8,1,1] w1, float[4] s1,
    float[4] h1, float[4] m1, float[4] v1, float[5,4,3,3] w2, float[5] s2, float[5] h2,
    float[5] m2, float[5] v2, float[8,5,1,1] w3, float[8] s3, float[8] h3, float[8] m3,
    float[8] v3, float[2,8,1,1] w4) => (float[1,2,6,6] y) {
    a = Conv(x, w0)  r = Relu(a)
    b = Conv(r, w1)  bb = BatchNormalization(b, s1, h1, m1, v1)  rb = Relu(bb)
    c = Conv<pads=[1,1,1,1]>(rb, w2)  cc = BatchNormalization(c, s2, h2, m2, v2)  rc = Relu(cc)
    d = Conv(rc, w3)  dd = BatchNormalization(d, s3, h3, m3, v3)
    e = Add(dd, r)  f = Relu(e)  y = Conv(f, w4)
}"""
TOWERS = """net (float[1,3,4,4] x, float[5,3,1,1] w1, float[6,3,1,1] w0, float[4,6,1,1] w2,
    float[4] b2, float[7,4,3,3] w3, float[7] b3, float[6,12,1,1] w4, float[2,6,1,1] w5)
    => (float[1,2,4,4] y) {
    a = Conv(x, w1)  ra = Relu(a)  s = Conv(x, w0)  b = Conv(s, w2, b2)  rb = Relu(b)
    c = Conv<pads=[1,1,1,1]>(rb, w3, b3)  rc = Sigmoid(c)
    d = Concat<axis=1>(ra, rc)  e = Conv(d, w4)  re = Sigmoid(e)  y = Conv(re, w5)
}"""
ATTENTION = """net (float[1,5,3] x, float[3,8] w0, float[8,8] wq, float[8,8] wk,
    float[8,8] wv, float[8] bv, float[8,8] wo, float[8] bo, float[8,6] wm, float[6] bm,
    float[6,8] wn, float[8] bn, float[8,2] wy) => (float[1,5,2] y)
<int64[4] heads = {1, 5, 2, 4}, int64[3] flat = {1, 5, 8}> {
    a = MatMul(x, w0)
    q = MatMul(a, wq)  q4 = Reshape(q, heads)  qt = Transpose<perm=[0,2,1,3]>(q4)
    k = MatMul(a, wk)  k4 = Reshape(k, heads)  kt = Transpose<perm=[0,2,3,1]>(k4)
    v = MatMul(a, wv)  vb = Add(v, bv)  v4 = Reshape(vb, heads)  vt = Transpose<perm=[0,2,1,3]>(v4)
    s = MatMul(qt, kt)  p = Softmax(s)  z = MatMul(p, vt)  zt = Transpose<perm=[0,2,1,3]>(z)
    z3 = Reshape(zt, flat)  o = MatMul(z3, wo)  ob = Add(o, bo)  r = Add(a, ob)
    m = MatMul(r, wm)  mb = Add(m, bm)  g = Gelu(mb)  n = MatMul(g, wn)  nb = Add(n, bn)
    t = Add(r, nb)  y = MatMul(t, wy)
}"""

# Per construct: the network, the groups that die, the operators that are left.
CONSTRUCTS: dict[str, tuple[str, list[str], list[str]]] = {
    "a residual block leaves the skip": (
        RESIDUAL,
        ["Conv_b"],
        ["Conv", "Relu", "Add", "Relu", "Conv"],
    ),
    "a bottleneck, its middle alive in the plan": (
        BOTTLENECK,
        ["Conv_b"],
        ["Conv", "Relu", "Add", "Relu", "Conv"],
    ),
    "a bottleneck, its last conv reads nothing": (
        BOTTLENECK,
        ["Conv_c"],
        ["Conv", "Relu", "Add", "Relu", "Conv"],
    ),
    "a tower leaves its concat": (TOWERS, ["Conv_c"], ["Conv", "Relu", "Conv", "Sigmoid", "Conv"]),
    "a tower's start dies, a padded constant stays": (
        TOWERS,
        ["Conv_s"],
        ["Conv", "Relu", "Concat", "Conv", "Sigmoid", "Conv"],
    ),
    "a zero constant is not added (pre-activation)": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w0, float[6] s, float[6] h, float[6] m, float[6] v,
             float[5,6,3,3] w1, float[6,5,1,1] w2, float[2,6,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w0)  n = BatchNormalization(a, s, h, m, v)  r = Relu(n)
            b = Conv<pads=[1,1,1,1]>(r, w1)  rb = Relu(b)  c = Conv(rb, w2)  d = Add(a, c)
            y = Conv(d, w3)
        }""",
        ["Conv_b"],
        ["Conv", "Conv"],
    ),
    "a constant moves into the bias behind which it is added": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w0, float[6] b0, float[5,3,1,1] w1,
             float[6,5,1,1] w2, float[6] b2, float[2,6,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w0, b0)  b = Conv(x, w1)  rb = Relu(b)  c = Conv(rb, w2, b2)
            d = Add(c, a)  r = Relu(d)  y = Conv(r, w3)
        }""",
        ["Conv_b"],
        ["Conv", "Relu", "Conv"],
    ),
    "squeeze and excite inside": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w0, float[8,6,1,1] w1, float[8] b1,
             float[4,8,1,1] w2, float[4] b2, float[8,4,1,1] w3, float[6,8,1,1] w4, float[6] b4,
             float[2,6,1,1] w5) => (float[1,2,4,4] y) {
            x0 = Conv(x, w0)  a = Conv(x0, w1, b1)  ra = Relu(a)  g = GlobalAveragePool(ra)
            s = Conv(g, w2, b2)  rs = Relu(s)  e = Conv(rs, w3)  z = Sigmoid(e)  m = Mul(ra, z)
            p = Conv(m, w4, b4)  d = Add(x0, p)  rd = Relu(d)  y = Conv(rd, w5)
        }""",
        ["Conv_a (tied, 2 producers)"],
        ["Conv", "Add", "Relu", "Conv"],
    ),
    "the excitation alone dies, a constant gate is left": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[4,8,1,1] w2, float[4] b2,
             float[8,4,1,1] w3, float[2,8,1,1] w4) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  g = GlobalAveragePool(ra)  s = Conv(g, w2, b2)
            rs = Relu(s)  e = Conv(rs, w3)  z = Sigmoid(e)  m = Mul(ra, z)  y = Conv(m, w4)
        }""",
        ["Conv_s"],
        ["Conv", "Relu", "Mul", "Conv"],
    ),
    "an inverted residual": (
        """net (float[1,3,4,4] x, float[4,3,1,1] w0, float[9,4,1,1] w1, float[9] b1,
             float[9,1,3,3] w2, float[9] b2, float[4,9,1,1] w3, float[4] s3, float[4] h3,
             float[4] m3, float[4] v3, float[2,4,1,1] w4)
        => (float[1,2,4,4] y) <float low = {0}, float high = {6}> {
            a = Conv(x, w0)  b = Conv(a, w1, b1)  rb = Clip(b, low, high)
            c = Conv<group=9, pads=[1,1,1,1]>(rb, w2, b2)  rc = Clip(c, low, high)
            d = Conv(rc, w3)  dd = BatchNormalization(d, s3, h3, m3, v3)  e = Add(a, dd)
            r = Relu(e)  y = Conv(r, w4)
        }""",
        ["Conv_b"],
        ["Conv", "Add", "Relu", "Conv"],
    ),
    "all heads of an attention": (
        ATTENTION,
        ["MatMul_q (attention, 3 producers)"],
        ["MatMul", "Add", "MatMul", "Add", "Gelu", "MatMul", "Add", "Add", "MatMul"],
    ),
    "the hidden layer of an mlp": (
        ATTENTION,
        ["MatMul_m"],
        [
            *("MatMul", "MatMul", "Reshape", "Transpose", "MatMul", "Reshape", "Transpose"),
            *("MatMul", "Add", "Reshape", "Transpose", "MatMul", "Softmax", "MatMul"),
            *("Transpose", "Reshape", "MatMul", "Add", "Add", "Add", "MatMul"),
        ],
    ),
    "one part of a split": (
        """net (float[1,3,4,4] x, float[10,3,1,1] w1, float[5,3,1,1] w2, float[5,7,1,1] w3,
             float[2,5,1,1] w4) => (float[1,2,4,4] y) <int64[2] parts = {3, 7}> {
            a = Conv(x, w1)  ra = Relu(a)  p, q = Split<axis=1>(ra, parts)
            b = Conv(p, w2)  c = Conv(q, w3)  d = Add(b, c)  rd = Relu(d)  y = Conv(rd, w4)
        }""",
        ["Conv_a #1"],
        ["Conv", "Relu", "Conv", "Relu", "Conv"],
    ),
    "one part of three": (
        """net (float[1,3,4,4] x, float[9,3,1,1] w1, float[5,3,1,1] w2, float[5,3,1,1] w3,
             float[5,3,1,1] w4, float[2,5,1,1] w5) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  p, q, s = Split<axis=1, num_outputs=3>(ra)
            b = Conv(p, w2)  c = Conv(q, w3)  d = Conv(s, w4)  e = Sum(b, c, d)  re = Sigmoid(e)
            y = Conv(re, w5)
        }""",
        ["Conv_a #2"],
        ["Conv", "Relu", "Split", "Conv", "Conv", "Sum", "Sigmoid", "Conv"],
    ),
    "a branch of a u-net": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,6,2,2] w2, float[5,4,2,2] w3,
             float[4] b3, float[7,10,3,3] w4, float[2,7,1,1] w5) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv<strides=[2,2]>(ra, w2)  rb = Relu(b)
            c = ConvTranspose<strides=[2,2]>(rb, w3, b3)  d = Concat<axis=1>(ra, c)
            e = Conv<pads=[1,1,1,1]>(d, w4)  re = Relu(e)  y = Conv(re, w5)
        }""",
        ["Conv_b"],
        ["Conv", "Relu", "Concat", "Conv", "Relu", "Conv"],
    ),
    "group norm inside": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w0, float[8,6,3,3] w1, float[8] s, float[8] h,
             float[6,8,1,1] w2, float[6] b2, float[2,6,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w0)  b = Conv<pads=[1,1,1,1]>(a, w1)
            n = GroupNormalization<num_groups=2>(b, s, h)  r = Relu(n)  c = Conv(r, w2, b2)
            d = Add(c, a)  rd = Relu(d)  y = Conv(rd, w3)
        }""",
        ["Conv_b"],
        ["Conv", "Add", "Relu", "Conv"],
    ),
    "the padded half of a shortcut is left": (
        """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[8,3,1,1] w2, float[2,8,1,1] w3)
        => (float[1,2,4,4] y) <int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}, float fill = {0.5}> {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv(x, w2)  p = Pad(ra, pads, fill)
            c = Add(b, p)  rc = Relu(c)  y = Conv(rc, w3)
        }""",
        ["Conv_a (residual, 2 producers)"],
        ["Conv", "Add", "Relu", "Conv"],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(OPSET + CONSTRUCTS[name][0]))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def without(graph: ChannelGraph, *names: str) -> Plan:
    """The plan under which these groups, and no others, die."""
    return set_widths(graph, {graph.group(name).id: 0 for name in names})


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_what_is_left_equals_the_masked_original(name: str) -> None:
    graph = graph_of(name)
    made = without(graph, *CONSTRUCTS[name][1])
    prove_plan(graph, made, faults=30)
    assert operators(resize(graph, made.keep_channels(graph))) == CONSTRUCTS[name][2]


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_every_other_width_may_change_as_well(name: str) -> None:
    graph = graph_of(name)
    for seed in range(4):
        prove_plan(graph, random_removal(graph, seed, deaths=0.6), label=f"seed {seed}")


def test_a_wrong_constant_is_rejected() -> None:
    graph = graph_of("a residual block leaves the skip")
    made = without(graph, "Conv_b")
    small = resize(graph, made.keep_channels(graph))
    (name,) = constant_names(small)
    value = small.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.Tensor(np.roll(value.const_value.numpy(), 1, axis=1), name=name)
    assert not verify(graph, made, small).ok


def test_a_uniform_constant_is_small_and_trained() -> None:
    model = model_from_text(OPSET + RESIDUAL)
    graph = lift(model)
    small = resize(graph, without(graph, "Conv_b").keep_channels(graph))
    assert constant_names(small) == {"cc"}
    assert tuple(small.graph.initializers["cc"].shape or ()) == (1, 8, 1, 1)
    assert "cc" in parameter_names(small)
    assert cost(lift(small), "params").total == 8 * 3 + 2 * 8  # w0, w3

    listed = model.clone()
    listed.metadata_props[PARAMETERS_KEY] = '["w0", "w1", "w2", "w3"]'
    graph = lift(listed)
    again = resize(graph, without(graph, "Conv_b").keep_channels(graph))
    assert parameter_names(again) == ["w0", "w3", "cc"]


def test_a_constant_behind_padding_is_a_map() -> None:
    """The bias of a dead tower's start, padded with zeros and convolved, is not the same
    everywhere."""
    graph = graph_of("a tower's start dies, a padded constant stays")
    small = resize(graph, without(graph, "Conv_s").keep_channels(graph))
    array = small.graph.initializers["rc"].const_value
    assert array is not None
    assert array.shape == (1, 7, 4, 4)
    assert np.ptp(array.numpy(), axis=(2, 3)).max() > 0.01


DYNAMIC = TOWERS.replace("[1,3,4,4] x", "[batch,3,4,4] x").replace("[1,2,4,4]", "[batch,2,4,4]")


def test_a_dynamic_batch_stays_dynamic(tmp_path: Path) -> None:
    """A constant that is concatenated is repeated for every sample."""
    graph = lift(model_from_text(OPSET + DYNAMIC))
    made = without(graph, "Conv_s")
    prove_plan(graph, made)
    small = resize(graph, made.keep_channels(graph))
    path = tmp_path / "small.onnx"
    save(small, path)
    x = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    whole = run(load(path), {"x": x})["y"]
    one = [run(load(path), {"x": x[k : k + 1]})["y"] for k in range(5)]
    np.testing.assert_allclose(whole, np.concatenate(one), rtol=1e-5, atol=1e-6)
    net = to_torch(small)
    assert net.meta["morphgraph.batch"] == "free"
    for count in (1, 5):
        found = net(torch.from_numpy(x[:count])).detach().numpy()
        np.testing.assert_allclose(found, whole[:count], rtol=1e-4, atol=1e-5)
    assert cost(lift(path), "flops").total == made.cost["flops"].after
    assert cost(lift(path), "params").total == made.cost["params"].after


def test_a_constant_that_is_concatenated_twice() -> None:
    text = DYNAMIC.replace("Concat<axis=1>(ra, rc)", "Concat<axis=1>(rc, ra, rc)")
    graph = lift(model_from_text(OPSET + text.replace("[6,12,1,1] w4", "[6,19,1,1] w4")))
    prove_plan(graph, without(graph, "Conv_s"))


def test_operands_behind_one_that_is_gone_stay_what_they_are() -> None:
    """A concatenation loses its first part: the others move up, and none takes another's place."""
    text = """net (float[1,3,4,4] x, float[4,3,1,1] wa, float[5,3,1,1] wb, float[5,3,1,1] wc,
        float[2,14,1,1] wd) => (float[1,2,4,4] y) {
        a = Conv(x, wa)  b = Conv(x, wb)  c = Conv(x, wc)
        d = Concat<axis=1>(a, b, c)  y = Conv(d, wd)
    }"""
    graph = lift(model_from_text(text))
    first = next(group for group in graph.groups if group.width == 4)
    prove_plan(graph, set_widths(graph, {first.id: 0}))


def test_a_constant_that_depends_on_the_batch_is_refused_by_name() -> None:
    old = lift(model_from_text(OPSET.replace("21", "14") + DYNAMIC))
    with pytest.raises(UnsupportedError, match=r"'Concat_d'.*--input-shape"):
        resize(old, without(old, "Conv_s").keep_channels(old))


MEAN = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[1,2,1,1] w2, float[5,3,1,1] w3,
    float[2,5,1,1] w4) => (float[1,2,4,4] y) <int64[1] axes = {1}> {
    a = Conv(x, w1)  m = ReduceMean(a, axes)  k = ReduceMax(a, axes)
    c = Concat<axis=1>(m, k)  d = Conv(c, w2)  s = Sigmoid(d)  b = Conv(x, w3)  e = Mul(b, s)
    y = Conv(e, w4)
}"""


@pytest.mark.parametrize(
    ("text", "group", "why"),
    [
        (RESIDUAL, "Conv_a (residual, 2 producers)", "output 'y' would no longer depend on any"),
        (TOWERS, "Conv_e", "output 'y' would no longer depend on any input; keep at least one"),
        (MEAN, "Conv_a", "output 'y' needs them: ReduceMean 'ReduceMean_m' averages"),
        (ATTENTION, "MatMul_a (residual, 3 producers)", "'MatMul_a .residual.*no longer depend"),
    ],
)
def test_width_0_where_nothing_would_be_left_is_refused(text: str, group: str, why: str) -> None:
    graph = lift(model_from_text(OPSET + text))
    index = graph.group(group).index
    with pytest.raises(PlanError, match=why):
        without(graph, group)
    with pytest.raises(PlanError, match=why):
        resize(graph, {index: np.zeros(0, dtype=np.int64)})


def test_what_is_refused_together_is_named() -> None:
    graph = graph_of("a tower leaves its concat")
    assert without(graph, "Conv_a").groups
    assert without(graph, "Conv_c").groups
    with pytest.raises(PlanError, match="width 0 of g1 'Conv_a', g4 'Conv_c': output 'y'"):
        without(graph, "Conv_a", "Conv_c")


def test_an_output_that_never_depended_on_an_input_is_no_reason() -> None:
    text = """net (float[1,3] x, float[3,4] w1, float[4,2] w2, float[4] b)
        => (float[1,2] y, float[4] z) {
        a = MatMul(x, w1)  y = MatMul(a, w2)  z = Relu(b)
    }"""
    graph = lift(model_from_text(OPSET + text))
    assert liveness(graph, []).refusal is None


def test_a_plan_file_may_say_width_0() -> None:
    graph = graph_of("a residual block leaves the skip")
    made = without(graph, "Conv_b")
    again = Plan.from_json(made.to_json())
    assert again == made
    assert b'"keep": []' in made.to_json()
    assert again.keep_channels(graph)[graph.group("Conv_b").index].tolist() == []
    with pytest.raises(PlanError, match="keeps no channel, so that none can be added"):
        Plan.from_json(made.to_json().replace(b'"new": 0', b'"new": 2'))


def test_the_masked_original_runs_without_any_channel_of_a_normalized_group() -> None:
    graph = graph_of("group norm inside")
    keep = {graph.group("Conv_b").index: np.zeros(0, dtype=np.int64)}
    results = run(mask(graph, keep), random_inputs(graph.model))
    assert np.isfinite(results["y"]).all()


def resized_again(small: ir.Model, folder: Path) -> None:
    """What was written is lifted, loses groups again, and is proven."""
    save(small, folder / "small.onnx")
    for seed in (0, 1):
        graph = lift(folder / "small.onnx")
        made = random_removal(graph, seed, deaths=0.4)
        if made.groups:
            check(graph, made)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_network_without_layers_can_be_resized_again(name: str, tmp_path: Path) -> None:
    graph = graph_of(name)
    resized_again(
        resize(graph, without(graph, *CONSTRUCTS[name][1]).keep_channels(graph)), tmp_path
    )


def test_one_with_a_dynamic_batch_can_be_resized_again(tmp_path: Path) -> None:
    graph = lift(model_from_text(OPSET + DYNAMIC))
    resized_again(resize(graph, without(graph, "Conv_s").keep_channels(graph)), tmp_path)


# -- plans -------------------------------------------------------------------------------------


def test_groups_that_become_useless_die_with_the_one_that_dies() -> None:
    graph = graph_of("a bottleneck, its middle alive in the plan")
    first, second = (graph.group(name).index for name in ("Conv_b", "Conv_c"))
    everything = range(len(graph.groups))
    assert with_orphans(graph, [first], everything) == {first, second}  # constant
    assert with_orphans(graph, [second], everything) == {first, second}  # unread
    assert with_orphans(graph, [second], [second]) == {second}


def test_a_group_of_a_computed_weight_is_not_useless() -> None:
    """The inner channels of a weight that is itself a product are read, though by weights alone."""
    text = """net (float[1,3] x, float[3,4] u, float[4,6] v, float[6,2] w) => (float[1,2] y) {
        k = MatMul(u, v)  a = MatMul(x, k)  r = Relu(a)  y = MatMul(r, w)
    }"""
    assert liveness(lift(model_from_text(OPSET + text)), []).orphaned_groups == frozenset()


def check(graph: ChannelGraph, made: Plan) -> None:
    """The result is the masked original, at the cost that the plan states."""
    small = resize(graph, made.keep_channels(graph))
    report = verify(graph, made, small)
    assert report.ok, report.worst
    for kind, change in made.cost.items():
        assert cost(lift(small), kind).total == change.after, kind


@pytest.mark.parametrize("share", ["60%", "20%", "5%", "1%"])
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_budgets_may_kill_groups(name: str, share: str) -> None:
    graph = graph_of(name)
    flops = cost(graph, "flops")
    try:
        made = plan(graph, {"flops": share}, min_width=0)
    except BudgetError:
        # Then not even one channel of every group would do.
        least = flops.at(np.array([1 if g.resizable else g.width for g in graph.groups]))
        assert least > float(share[:-1]) / 100 * flops.total
        return
    assert made.cost["flops"].after <= float(share[:-1]) / 100 * flops.total
    check(graph, made)


def test_a_budget_below_the_lowest_of_width_1_is_met() -> None:
    graph = graph_of("a bottleneck, its middle alive in the plan")
    flops = cost(graph, "flops")
    lowest = flops.at(np.array([1 if g.resizable else g.width for g in graph.groups]))
    with pytest.raises(BudgetError):
        plan(graph, {"flops": lowest - 1})
    made = plan(graph, {"flops": lowest - 1}, min_width=0)
    dead = np.flatnonzero(made.widths(graph) == 0).tolist()
    assert dead == [graph.group(name).index for name in ("Conv_b", "Conv_c")]
    assert made.cost["flops"].after < lowest
    with pytest.raises(BudgetError, match="the lowest that can is"):
        plan(graph, {"flops": 1}, min_width=0)


def test_a_smaller_budget_keeps_a_subset_when_groups_die() -> None:
    graph = graph_of("all heads of an attention")
    made = [
        plan(graph, {"flops": f"{s}%"}, min_width=0).keep_channels(graph) for s in (50, 20, 8, 5)
    ]
    for large, small in pairwise(made):
        for index, kept in large.items():
            assert np.isin(small[index], kept).all()


def test_dead_channels_go_first_and_layers_with_them() -> None:
    graph = graph_of("a bottleneck, its middle alive in the plan")
    scores = np.ones(len(graph.channel_group))
    scores[graph.group("Conv_c").channels] = 0.0
    made = plan(graph, {"flops": "30%"}, score=scores, min_width=0)
    gone = liveness(graph, np.flatnonzero(made.widths(graph) == 0).tolist())
    assert {"Conv_b", "Conv_c", "Conv_d"} <= set(gone.removed_layers)
    assert made.widths(graph)[graph.group("Conv_a (residual, 2 producers)").index] == 8
    check(graph, made)


def test_the_grid_reaches_zero() -> None:
    graph = graph_of("an inverted residual")
    made = plan(graph, {"flops": "20%"}, round_to=4, min_width=0)
    widths = [made.widths(graph)[g.index] for g in graph.groups if g.resizable]
    assert widths == [4, 0]
    with pytest.raises(BudgetError):
        plan(graph, {"flops": "20%"}, round_to=4)
    shrunk = uniform(graph, 0.05, min_width=0)
    assert [shrunk.widths(graph)[g.index] for g in graph.groups if g.resizable] == [1, 0]
    check(graph, shrunk)
    fitted = uniform(graph, budget={"flops": "15%"}, min_width=0)
    assert fitted.cost["flops"].after <= 0.15 * fitted.cost["flops"].before


def test_an_excluded_group_stays_in_the_plan_and_its_layer_still_vanishes() -> None:
    graph = graph_of("a bottleneck, its middle alive in the plan")
    made = plan(graph, {"flops": "4%"}, min_width=0, exclude=["Conv_c"])
    widths = made.widths(graph)
    assert widths[graph.group("Conv_b").index] == 0
    assert widths[graph.group("Conv_c").index] == 5
    check(graph, made)


def test_expand_leaves_a_dead_group_dead() -> None:
    graph = graph_of("a bottleneck, its middle alive in the plan")
    small = plan(graph, {"flops": "4%"}, min_width=0)
    wide = expand(graph, small, {"flops": "10%"})
    dead = small.widths(graph) == 0
    assert dead.any()
    assert (wide.widths(graph)[dead] == 0).all()
    assert (wide.widths(graph) > small.widths(graph)).any()
    assert wide.cost["flops"].after <= 0.1 * wide.cost["flops"].before
    again = resize(graph, wide.keep_channels(graph), wide.added(graph))
    assert cost(lift(again), "flops").total == wide.cost["flops"].after
    assert verify(graph, wide, again).ok
