"""Norms that counted channels of zeros; the original in ONNX Runtime is the oracle."""

import json

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.edit import array_of
from morphgraph.onnx_io import PARAMETERS_KEY
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.ops import parameter_names
from morphgraph.passes.analysis.recount import Recount, recounts
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text
from morphgraph.workflow import recounted

Keep = dict[int, IntArray]
HEAD = """<ir_version: 10, opset_import: ["": 23]>
net (float[3,7,8] x, float[8,WIDE] w, float[WIDE] bias, float[WIDE] scale, float[WIDE] shift,
     float[WIDE,4] v, float[WIDE,4] u) => (float[3,7,4] y)"""
NUMBERS = """<float tiny = {1e-9}, float two = {2.0}, float one = {1.0}, float much = {0.5},
              int64[1] last = {-1}>"""

EXACT = {
    "one node": "n = RMSNormalization<epsilon=1e-9>(h, scale)  y = MatMul(n, v)",
    "root and reciprocal": """s = Pow(h, two)  m = ReduceMean(s, last)  e = Add(m, tiny)
        r = Sqrt(e)  i = Reciprocal(r)  n = Mul(h, i)  k = Mul(scale, n)  y = MatMul(k, v)""",
    "a quotient": """s = Mul(h, h)  m = ReduceMean(s, last)  e = Add(tiny, m)
        r = Sqrt(e)  n = Div(h, r)  k = Mul(n, scale)  y = MatMul(k, v)""",
    "a quotient of one": """s = Mul(h, h)  m = ReduceMean(s, last)  e = Add(m, tiny)
        r = Sqrt(e)  i = Div(one, r)  n = Mul(i, h)  k = Mul(n, scale)  y = MatMul(k, v)""",
    "divided by a scale": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)  n = Div(h, r)
        k = Div(n, scale)  y = MatMul(k, v)""",
    "one is added": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)  n = Div(h, r)
        z = Add(one, scale)  k = Mul(n, z)  y = MatMul(k, v)""",
    "in another type": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)
        n = Div(h, r)  d = Cast<to=11>(n)  b = Cast<to=1>(d)  k = Mul(scale, b)
        y = MatMul(k, v)""",
    "two kernels, and no scale": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)
        n = Div(h, r)  a = MatMul(n, v)  b = MatMul(n, u)  y = Add(a, b)""",
    "one scale, two norms": """a = RMSNormalization<epsilon=1e-9>(h, scale)  i = Relu(x)
        j = MatMul(i, w)  b = RMSNormalization<epsilon=1e-9>(j, scale)  c = MatMul(a, v)
        d = MatMul(b, u)  y = Add(c, d)""",
    "a mean": "m = ReduceMean(h, last)  n = Mul(m, scale)  y = MatMul(n, v)",
    "two norms": """a = RMSNormalization<epsilon=1e-9>(h, scale)  b = Mul(shift, a)
        n = RMSNormalization<epsilon=1e-9>(b, bias)  y = MatMul(n, v)""",
}
#: What is added to the mean is not small beside it: it has to change as well.
LARGE = {
    "much is added": """s = Mul(h, h)  m = ReduceMean(s, last)  e = Add(m, much)  r = Sqrt(e)
        n = Div(h, r)  k = Mul(n, scale)  y = MatMul(k, v)""",
    "one node": "n = RMSNormalization<epsilon=20.0>(h, scale)  y = MatMul(n, v)",
    "two norms, one number": """s = Mul(h, h)  m = ReduceMean(s, last)  e = Add(m, much)
        r = Sqrt(e)  n = Div(h, r)  a = Mul(n, scale)  i = Relu(x)  j = MatMul(i, w)
        t = Mul(j, j)  o = ReduceMean(t, last)  f = Add(much, o)  q = Sqrt(f)  d = Div(j, q)
        b = Mul(d, bias)  c = MatMul(a, v)  g = MatMul(b, u)  y = Add(c, g)""",
    "behind a mean": """m = ReduceMean(h, last)  e = Add(m, much)  n = Mul(e, scale)
        y = MatMul(n, v)""",
}
LEFT_ALONE = {
    "a number that something else reads": """s = Mul(h, h)  m = ReduceMean(s, last)
        e = Add(m, much)  r = Sqrt(e)  n = Div(h, r)  k = Mul(n, scale)  l = MatMul(k, v)
        y = Add(l, much)""",
    "a sum of three": """s = Mul(h, h)  m = ReduceMean(s, last)  e = Sum(m, tiny, m)
        r = Sqrt(e)  n = Div(h, r)  k = Mul(n, scale)  y = MatMul(k, v)""",
    "read by a function": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)  n = Div(h, r)
        k = Mul(n, scale)  l = MatMul(k, v)  f = Sigmoid(n)  g = MatMul(f, u)  y = Add(l, g)""",
    "a scale of two norms, one without zeros": """a = RMSNormalization(h, scale)  i = Exp(h)
        b = RMSNormalization(i, scale)  c = MatMul(a, v)  d = MatMul(b, u)  y = Add(c, d)""",
    "not zero": "i = Cos(h)  n = RMSNormalization(i, scale)  y = MatMul(n, v)",
    "a sum": "n = LpNormalization(h)  y = MatMul(n, v)",
    "an output": """s = Mul(h, h)  m = ReduceMean(s, last)  r = Sqrt(m)  i = Div(h, r)
        k = Mul(i, scale)  l = MatMul(k, v)  y = Add(l, r)""",
}


def net(body: str, wide: int = 12) -> mg.ChannelGraph:
    text = f"{HEAD} {NUMBERS} {{ h = MatMul(x, w) {body} }}"
    model = model_from_text(text.replace("WIDE", str(wide)))
    names = [name for name in ("w", "bias", "scale", "shift", "v", "u") if name in text]
    model.metadata_props[PARAMETERS_KEY] = json.dumps(names)  # a scale of two norms is one
    return mg.lift(model)


def with_zeros(body: str, seed: int = 0, wide: int = 12) -> tuple[mg.ChannelGraph, Keep]:
    """A network more than half of whose channels are zero, and a plan that removes them."""
    graph, random = net(body, wide), np.random.default_rng(seed)
    for name, value in graph.model.graph.initializers.items():
        if name in parameter_names(graph.model):
            array = array_of(value)
            array[...] = random.uniform(0.5, 1.5, array.shape) * random.choice([-1, 1], array.shape)
    left = np.sort(random.choice(wide, 5 * wide // 12, replace=False))
    gone = np.setdiff1d(np.arange(wide), left)
    array_of(graph.model.graph.initializers["w"])[:, gone] = 0
    array_of(graph.model.graph.initializers["v"])[gone] = 0  # read by nobody, as training has it
    group = next(g for g in graph.groups if g.resizable and g.width == wide)
    return graph, {group.index: left}


def off(graph: mg.ChannelGraph, keep: Keep, wanted: Array, feeds: Arrays) -> float:
    """How far the resized network is from what the whole one gave, as a share of it."""
    found = run(resize(graph, keep), feeds)["y"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def before_and_after(body: str, seed: int = 0, wide: int = 12) -> tuple[float, float]:
    """How far the network is off when resized as it is, and when its norms are recounted."""
    graph, keep = with_zeros(body, seed, wide)
    feeds = random_inputs(graph.model)
    wanted = run(graph.model, feeds)["y"]
    return off(graph, keep, wanted, feeds), off(recounted(graph, keep), keep, wanted, feeds)


@pytest.mark.parametrize("name", EXACT)
def test_root_mean_squares_are_made_up_for(name: str) -> None:
    before, after = before_and_after(EXACT[name])
    assert before > 0.1
    assert after < 1e-5


@pytest.mark.parametrize("name", LARGE)
def test_what_is_added_to_a_mean_is_made_up_for_too(name: str) -> None:
    before, after = before_and_after(LARGE[name])
    assert before > 0.1
    assert after < 1e-5
    graph, keep = with_zeros(LARGE[name])
    number = [
        r
        for r in recounts(graph, keep, {"scale", "bias"}, epsilons=True)
        if r not in recounts(graph, keep, {"scale", "bias"})
    ]
    assert number  # the weights alone would not do


def test_a_small_number_that_something_else_adds_stays() -> None:
    """The weights make up for all but that."""
    body = """s = Mul(h, h)  m = ReduceMean(s, last)  e = Add(m, tiny)  r = Sqrt(e)  n = Div(h, r)
        k = Mul(n, scale)  l = MatMul(k, v)  y = Add(l, tiny)"""
    graph, keep = with_zeros(body)
    (found,) = recounts(graph, keep, parameter_names(graph.model), epsilons=True)
    assert isinstance(found, Recount)
    assert found.parameter == "scale"
    assert before_and_after(body)[1] < 1e-5


LAYER_NORMS = {
    "one node": "n = LayerNormalization(h, scale, shift)  y = MatMul(n, v)",
    "written out": """m = ReduceMean(h, last)  c = Sub(h, m)  s = Mul(c, c)
        z = ReduceMean(s, last)  e = Add(z, tiny)  r = Sqrt(e)  d = Div(c, r)  k = Mul(d, scale)
        n = Add(k, shift)  y = MatMul(n, v)""",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("body", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norms_nearly(body: str, seed: int) -> None:
    """They subtract a mean that is another one, too: of many channels it is small."""
    before, after = before_and_after(body, seed, wide=768)
    assert after < 0.3 * before


def test_norms_of_groups_of_which_some_go() -> None:
    """Those that stay count what they counted."""
    body = "i = Transpose<perm=[0,2,1]>(h)  n = GroupNormalization<num_groups=3>(i, scale, shift)"
    graph = net(f"{body}  t = Transpose<perm=[0,2,1]>(n)  y = MatMul(t, v)")
    group = next(g for g in graph.groups if g.resizable)
    keep = {group.index: np.array([0, 2])}
    gone = ~graph.alive(keep)[graph.channels_at("w", 1)]
    array_of(graph.model.graph.initializers["w"])[:, gone] = 0
    assert gone.sum() == 4
    assert recounts(graph, keep, parameter_names(graph.model)) == []


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_somebody_else_reads_is_left_alone(name: str) -> None:
    graph, keep = with_zeros(LEFT_ALONE[name])
    assert recounts(graph, keep, parameter_names(graph.model), epsilons=True) == []


def test_channels_that_are_not_zero() -> None:
    graph, keep = with_zeros(EXACT["one node"])
    array_of(graph.model.graph.initializers["w"])[0] = 1.0
    assert recounts(graph, keep, parameter_names(graph.model)) == []


def test_only_what_is_trained() -> None:
    graph, keep = with_zeros(EXACT["one node"])
    (found,) = recounts(graph, keep, {"v", "w"})  # the kernel behind, since the scale is not
    assert isinstance(found, Recount)
    assert found.parameter == "v"
    assert recounts(graph, keep, {"w"}) == []


FEW_BITS = """<ir_version: 10, opset_import: ["": 23]>
net (float[3,7,8] x, uint8[8,12] w, float[12] scale, float[12,4] v) => (float[3,7,4] y)
    <uint8 point = {POINT}, float step = {0.1}> {
  wide = DequantizeLinear(w, step, point)  h = MatMul(x, wide)
  n = RMSNormalization<epsilon=1e-9>(h, scale)  y = MatMul(n, v)
}"""


@pytest.mark.parametrize("point", [3, 0])
def test_a_number_that_is_stored_as_zero_is_no_zero_in_few_bits(point: int) -> None:
    """What is stored as 0 stands for ``-0.1 * point``; that 0 stands for 0 is not asked."""
    model = model_from_text(FEW_BITS.replace("POINT", str(point)))
    model.metadata_props[PARAMETERS_KEY] = json.dumps(["w", "scale", "v"])
    graph, random = mg.lift(model), np.random.default_rng(0)
    w = array_of(graph.model.graph.initializers["w"])
    w[...] = random.integers(9, 200, w.shape)
    w[:, 5:] = 0
    group = next(g for g in graph.groups if g.resizable and g.width == 12)
    assert recounts(graph, {group.index: np.arange(5)}, {"scale", "v"}) == []
