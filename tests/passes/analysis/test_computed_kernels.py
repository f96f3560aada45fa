"""Scores of kernels that are computed: of what the kernel is, held against numpy."""

import warnings
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.arrays import Array, FloatArray
from morphgraph.errors import MorphWarning
from morphgraph.passes.analysis.channel_sources import computed_kernels
from morphgraph.passes.analysis.score import score
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths, uniform
from morphgraph.testing import model_from_text

WEAK = [1, 4]
OVER = "int64[3] over = {1, 2, 3}, int64[1] c0 = {0}, int64[1] c3 = {3}, int64[1] a1 = {1}"
Weights = dict[str, Array]


def _standardized(w: FloatArray) -> FloatArray:
    centred = w - w.mean((1, 2, 3), keepdims=True)
    result: FloatArray = centred / np.sqrt((centred**2).mean((1, 2, 3), keepdims=True) + 0.01)
    return result


def _column(vector: Array) -> FloatArray:
    return vector.astype(np.float64).reshape(-1, 1, 1, 1)


# Per kind the parameters beside the raw kernel w [6,3,3,3], what computes k, and k by numpy.
KINDS: dict[str, tuple[str, str, Callable[[Weights], FloatArray]]] = {
    "weight norm": (
        "float[6,1,1,1] g",
        "n = ReduceL2(w, over)  d = Div(g, n)  k = Mul(w, d)",
        lambda p: p["w"] * p["g"] / np.sqrt((p["w"] ** 2).sum((1, 2, 3), keepdims=True)),
    ),
    "a mask": ("float[6,3,3,3] m", "k = Mul(m, w)", lambda p: p["w"] * p["m"]),
    "a number": ("float[1] s", "k = Mul(w, s)", lambda p: p["w"] * p["s"]),
    "a scale per channel": ("float[6,1,1,1] s", "k = Mul(s, w)", lambda p: p["w"] * p["s"]),
    "standardized": (
        "float e",
        """mu = ReduceMean(w, over)  c = Sub(w, mu)  q = Mul(c, c)  v = ReduceMean(q, over)
        ve = Add(v, e)  d = Sqrt(ve)  k = Div(c, d)""",
        lambda p: _standardized(p["w"]),
    ),
    "low rank beside it": (
        "float[6,2] up, float[2,27] low",
        "ba = MatMul(up, low)  sh = Shape(w)  ra = Reshape(ba, sh)  k = Add(w, ra)",
        lambda p: p["w"] + (p["up"] @ p["low"]).reshape(6, 3, 3, 3),
    ),
    "turned, cut and scaled": (
        "float[3,3,4,7] u",
        """t = Transpose<perm=[3, 2, 1, 0]>(u)  t1 = Slice(t, a1, c7, c0)
        t2 = Slice(t1, c0, c3, a1)  k = Neg(t2)""",
        lambda p: -p["u"].transpose(3, 2, 1, 0)[1:, :3],
    ),
    "two parts": (
        "float[3,3,3,3] u, float[3,3,3,3] v, float[1] s",
        "us = Mul(u, s)  k = Concat<axis=0>(us, v)",
        lambda p: np.concatenate([p["u"] * p["s"], p["v"]]),
    ),
    "a function": ("float[1] s", "e = Exp(w)  k = Sub(e, s)", lambda p: np.exp(p["w"]) - p["s"]),
    "stored in 16 bits": ("float16[6,3,3,3] u", "k = Cast<to=1>(u)", lambda p: p["u"]),
    "stored in bfloat16": ("bfloat16[6,3,3,3] u", "k = Cast<to=1>(u)", lambda p: p["u"]),
    "quantized": (
        "int8[6,3,3,3] u, float s, int8 z",
        "k = DequantizeLinear(u, s, z)",
        lambda p: (p["u"].astype(float) - p["z"]) * p["s"],
    ),
    "quantized by channels": (
        "int8[6,3,3,3] u, float[6] s, int8[6] z",
        "k = DequantizeLinear<axis=0>(u, s, z)",
        lambda p: (p["u"] - _column(p["z"])) * _column(p["s"]),
    ),
    "fake quantization": (
        "float[6] s, int8[6] z",
        "q = QuantizeLinear<axis=0>(w, s, z)  k = DequantizeLinear<axis=0>(q, s, z)",
        lambda p: np.round(p["w"] / _column(p["s"])) * _column(p["s"]),
    ),
}


def _with(model: ir.Model, name: str, array: Array) -> None:
    value = model.graph.initializers[name]
    assert value.dtype is not None
    value.const_value = ir.Tensor(array.astype(value.dtype.numpy()), dtype=value.dtype, name=name)


def _numbers(model: ir.Model) -> Weights:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value}


def _network(kind: str) -> ir.Model:
    shapes, body, _ = KINDS[kind]
    text = f"""net (float[1,3,6,6] x, float[6,3,3,3] w, {shapes}, float[2,6,1,1] r)
    => (float[1,2,4,4] y) <{OVER}, int64[1] c7 = {{7}}> {{
        {body}  a = Conv(x, k)  b = Relu(a)  y = Conv(b, r)
    }}"""
    model = model_from_text(text)
    generator = np.random.default_rng(3)
    weak = np.isin(np.arange(6), WEAK)
    w = generator.normal(0, 0.2, (6, 3, 3, 3)) * _column(np.where(weak, 0.01, 1.0))
    for name, number in _numbers(model).items():
        if name == "w" or (name == "u" and number.shape == (6, 3, 3, 3)):
            _with(model, name, w if number.dtype.kind in "fV" or name == "w" else w * 100)
        if name == "z":
            _with(model, name, np.zeros(number.shape))
        if name == "m":
            _with(model, name, np.asarray(generator.random(number.shape) < 0.7))
        if name == "e":
            _with(model, name, np.array(0.01))
    if kind == "fake quantization":
        _with(model, "s", np.full(6, 0.008))
    if kind == "stored in bfloat16":
        _with(model, "u", w.astype(ml_dtypes.bfloat16))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_kernel_counts_as_what_it_is(kind: str) -> None:
    model = _network(kind)
    graph = lift(model)
    expected = KINDS[kind][2]({n: a.astype(np.float64) for n, a in _numbers(model).items()})
    norms = np.sqrt((expected**2).sum(axis=(1, 2, 3)))
    channels = graph.channels_at("k", 0)
    assert score(graph, "l2")[channels] == pytest.approx(norms, rel=1e-4)
    magnitudes = np.abs(expected).sum(axis=(1, 2, 3))
    assert score(graph, "l1")[channels] == pytest.approx(magnitudes, rel=1e-4)
    for group in (graph.groups[k] for k in set(graph.channel_group[channels].tolist())):
        with warnings.catch_warnings():
            warnings.simplefilter("error", MorphWarning)
            wanted = set_widths(graph, {group.id: group.width - 1})
        (lost,) = np.setdiff1d(np.arange(group.width), wanted.keep_channels(graph)[group.index])
        own = norms[np.isin(channels, group.channels)]
        assert own[lost] == own.min()


# Operators that work with whole numbers; the scale per channel turns their order around.
INTEGERS = {
    "QLinearConv": """net (float[1,3,4,4] x, int8[6,3,1,1] w, float[6] s, int8[6] z,
    float[2,6,1,1] r) => (float[1,2,4,4] y) <float one = {0.1}, uint8 o = {0}> {
        q = QuantizeLinear(x, one, o)  c = QLinearConv(q, one, o, w, s, z, one, o)
        d = DequantizeLinear(c, one, o)  y = Conv(d, r)
    }""",
    "QLinearMatMul": """net (float[1,3] x, int8[3,6] w, float[6] s, int8[6] z, float[6,2] r)
    => (float[1,2] y) <float one = {0.1}, uint8 o = {0}> {
        q = QuantizeLinear(x, one, o)  c = QLinearMatMul(q, one, o, w, s, z, one, o)
        d = DequantizeLinear(c, one, o)  y = MatMul(d, r)
    }""",
    "MatMulInteger": """net (float[1,3] x, int8[3,6] w, float[6] s, int8[6] z, float[6,2] r)
    => (float[1,2] y) {
        q, qs, qz = DynamicQuantizeLinear(x)  c = MatMulInteger(q, w, qz, z)
        f = Cast<to=1>(c)  both = Mul(qs, s)  d = Mul(f, both)  y = MatMul(d, r)
    }""",
    "ConvInteger": """net (float[1,3,4,4] x, int8[6,3,1,1] w, float[6,1,1] s, int8[6] z,
    float[2,6,1,1] r) => (float[1,2,4,4] y) {
        q, qs, qz = DynamicQuantizeLinear(x)  c = ConvInteger(q, w, qz, z)
        f = Cast<to=1>(c)  d = Mul(f, s)  e = Mul(d, qs)  y = Conv(e, r)
    }""",
}


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_count_with_their_scale(name: str) -> None:
    model = model_from_text(INTEGERS[name])
    generator = np.random.default_rng(0)
    whole = generator.integers(-100, 100, (6, 3))
    scales = np.array([1.0, 0.01, 0.5, 2.0, 0.02, 0.3])
    zero = np.array([0, 5, 0, -20, 0, 0])
    stored = _numbers(model)
    by_row, shape = len(stored["w"]) == 6, stored["s"].shape
    _with(model, "w", whole.reshape(6, 3, 1, 1) if by_row else whole.T)
    _with(model, "s", scales.reshape(shape))
    _with(model, "z", zero)
    graph = lift(model)
    real = (whole - zero[:, None]) * scales[:, None]
    (kernel,) = [k for k in computed_kernels(graph) if k.value == "w"]
    assert kernel.zero_point == "z"
    expected = np.sqrt((real**2).sum(axis=1))
    assert score(graph)[graph.channels_at("w", 0 if by_row else 1)] == pytest.approx(expected)


EMBEDDING = """net (int64[1,4] x, float[9,6] e, float[6,2] r) => (float[1,4,2] y) {
    a = Gather(e, x)  b = Relu(a)  y = MatMul(b, r)
}"""


def test_groups_without_a_score_are_named() -> None:
    graph = lift(model_from_text(EMBEDDING))
    words = "no score tells the channels apart of g. 'a'.*no kernel makes them"
    for make in (
        lambda: plan(graph, {"macs": "70%"}),
        lambda: uniform(graph, 0.5),
        lambda: set_widths(graph, {"a": 3}),
    ):
        with pytest.warns(MorphWarning, match=words):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        plan(graph, {"macs": "70%"}, score="random")
        plan(graph, {"macs": "70%"}, score=np.linspace(1.0, 2.0, len(graph.channel_group)))


@pytest.mark.parametrize("kernel", [np.ones((6, 3)), np.eye(6, 3) + np.eye(6, 3, -3)])
def test_channels_that_score_alike_are_named(kernel: Array) -> None:
    model = model_from_text("""net (float[1,3] x, float[6,3] w, float[6,2] r) => (float[1,2] y) {
        a = Gemm<transB=1>(x, w)  b = Relu(a)  y = MatMul(b, r)
    }""")
    _with(model, "w", kernel)
    with pytest.warns(MorphWarning, match="'Gemm_a' .their channels score alike"):
        uniform(lift(model), 0.5)
