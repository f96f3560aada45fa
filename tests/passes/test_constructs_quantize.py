"""Quantized networks: resized equals masked, where a zero point and not 0 adds nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.ops import OpNode, describe
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, prove, random_plan
from morphgraph.torch_io.to_torch import to_torch


def stored(kind: str, name: str, shape: str, low: int = -60, high: int = 60) -> str:
    """A constant of random whole numbers."""
    count = int(np.prod([int(size) for size in shape.split(",")]))
    generator = np.random.default_rng(sum(map(ord, name + shape)))
    values = ", ".join(map(str, generator.integers(low, high, count)))
    return f"{kind}[{shape}] {name} = {{{values}}}"


SCALES = (
    "float xs = {0.03}, uint8 xz = {120}, float ws = {0.01}, int8 wz = {0}, float hs = {0.02},"
    " uint8 hz = {90}, float ys = {0.03}, uint8 yz = {130}"
)


def quantized(shapes: str, body: str, *constants: str) -> str:
    """``x`` is stored as ``q``; the body makes ``z``, which is read as real numbers again."""
    whole = f"q = QuantizeLinear(x, xs, xz)  {body}  y = DequantizeLinear(z, ys, yz)"
    return with_constants(f"net ({shapes}) => (float y)", whole, SCALES, *constants)


def with_constants(head: str, body: str, *constants: str) -> str:
    return f"{head} <{', '.join(constants)}> {{ {body} }}"


NETWORKS: dict[str, tuple[str, list[int]]] = {
    "convolutions": (
        quantized(
            "float[1,3,4,4] x",
            "h = QLinearConv(q, xs, xz, w1, s1, z1, hs, hz, b1)"
            "  z = QLinearConv<pads=[1,1,1,1]>(h, hs, hz, w2, ws, wz, ys, yz)",
            stored("int8", "w1", "6,3,1,1"),
            "float[6] s1 = {0.01, 0.012, 0.008, 0.011, 0.009, 0.013}",
            "int8[6] z1 = {0, 0, 0, 0, 0, 0}",
            stored("int32", "b1", "6", -900, 900),
            stored("int8", "w2", "2,6,3,3"),
        ),
        [6],
    ),
    "convolutions, grouped and depthwise": (
        quantized(
            "float[1,3,4,4] x",
            "h = QLinearConv(q, xs, xz, w1, ws, wz, hs, hz)"
            "  i = QLinearConv<group=2>(h, hs, hz, w2, ws, wz, hs, hz)"
            "  j = QLinearConv<group=6>(i, hs, hz, w3, s3, z3, hs, hz)"
            "  z = QLinearConv(j, hs, hz, w4, ws, wz, ys, yz)",
            stored("int8", "w1", "6,3,1,1"),
            stored("int8", "w2", "6,3,1,1"),
            stored("int8", "w3", "6,1,3,3"),
            "float[6] s3 = {0.01, 0.012, 0.008, 0.011, 0.009, 0.013}",
            "int8[6] z3 = {0, 0, 0, 0, 0, 0}",
            stored("int8", "w4", "2,6,1,1"),
        ),
        [3, 3],
    ),
    "matrix products": (
        quantized(
            "float[2,5,3] x",
            "h = QLinearMatMul(q, xs, xz, w1, s1, z1, hs, hz)"
            "  z = QLinearMatMul(h, hs, hz, w2, ws, wz, ys, yz)",
            stored("int8", "w1", "3,6"),
            "float[6] s1 = {0.01, 0.012, 0.008, 0.011, 0.009, 0.013}",
            "int8[6] z1 = {0, 0, 0, 0, 0, 0}",
            stored("int8", "w2", "6,2"),
        ),
        [6],
    ),
    "sums of whole numbers": (
        quantized(
            "float[1,3,4,4] x",
            "i = ConvInteger(q, w1, xz)  f = Cast<to=1>(i)  g = Mul(f, xs)  h = Mul(g, ws)"
            "  r = Relu(h)  k = QuantizeLinear(r, hs, hz)  j = ConvInteger(k, w2, hz)"
            "  l = Cast<to=1>(j)  m = Mul(l, hs)  n = Mul(m, ws)  z = QuantizeLinear(n, ys, yz)",
            stored("int8", "w1", "6,3,1,1"),
            stored("int8", "w2", "2,6,1,1"),
        ),
        [6],
    ),
    "a range found at run time": (
        with_constants(
            "net (float[2,5,3] x, float[3,6] w0) => (float[2,5,2] y)",
            """a = MatMul(x, w0)  q, s, o = DynamicQuantizeLinear(a)  m = MatMulInteger(q, w, o, p)
            f = Cast<to=1>(m)  g = Mul(f, s)  y = Mul(g, c)""",
            stored("int8", "w", "6,2"),
            "int8[2] p = {3, -4}",
            "float c = {0.01}",
        ),
        [6],
    ),
    "two activations of signed numbers": (
        """net (float[1,5,6] x, float[6,8] a, float[6,8] b, float[5,2] c) => (float[1,5,2] y)
        <float s = {0.04}, int8 o = {-7}, float t = {0.2}, int8 p = {5}> {
            f = MatMul(x, a)  g = MatMul(x, b)  h = Transpose<perm=[0,2,1]>(g)
            i = QuantizeLinear(f, s, o)  j = QuantizeLinear(h, s, p)
            k = QLinearMatMul(i, s, o, j, s, p, t, p)  l = DequantizeLinear(k, t, p)
            y = MatMul(l, c)
        }""",
        [8],
    ),
    "quantize and dequantize around float": (
        with_constants(
            "net (float[1,3,4,4] x, float[6] b1, float[2] b2) => (float[1,2,4,4] y)",
            """xq = QuantizeLinear(x, xs, xz)  xd = DequantizeLinear(xq, xs, xz)
            k1 = DequantizeLinear<axis=0>(w1, s1, z1)  a = Conv(xd, k1, b1)  r = Relu(a)
            rq = QuantizeLinear(r, hs, hz)  rd = DequantizeLinear(rq, hs, hz)
            k2 = DequantizeLinear(w2, ws, wz)  y = Conv(rd, k2, b2)""",
            SCALES,
            stored("int8", "w1", "6,3,1,1"),
            "float[6] s1 = {0.01, 0.012, 0.008, 0.011, 0.009, 0.013}",
            "int8[6] z1 = {0, 3, -2, 0, 1, 0}",
            stored("int8", "w2", "2,6,1,1"),
        ),
        [6],
    ),
    "a scale for every channel of an activation": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y)
        <float[6] s = {0.05, 0.04, 0.06, 0.05, 0.03, 0.07},
         uint8[6] z = {100, 90, 80, 70, 60, 50}, uint8[6] p = {90, 95, 75, 80, 52, 49}> {
            a = Conv(x, w1)  q = QuantizeLinear<axis=-3>(a, s, z)
            d = DequantizeLinear<axis=-3>(q, s, p)  y = Conv(d, w2)
        }""",
        [6],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, faults=30)


def test_zero_instead_of_the_zero_point_would_be_wrong() -> None:
    graph = graph_of("convolutions")
    keep = random_plan(graph).keep_channels(graph)
    nodes = [node for node in mask(graph, keep).graph if node.op_type == "Where"]
    assert [node.inputs[2].name for node in nodes] == ["hz"]


def test_macs_are_those_of_the_operators_on_real_numbers() -> None:
    assert cost(graph_of("convolutions"), "macs").total == 16 * 6 * 3 + 16 * 2 * 6 * 9
    assert cost(graph_of("matrix products"), "macs").total == 5 * (3 * 6 + 6 * 2)


def test_whole_blocks_go() -> None:
    """Weights in blocks of 4 along what is summed over; what makes them loses 4 channels each."""
    text = """<ir_version: 10, opset_import: ["": 21]> net (float[2,5] x, float[5,8] u, int8[6,8] w,
    float[6,2] s, int8[6,2] z, float[6,3] v) => (float[2,3] y) {
        h = MatMul(x, u)  r = Relu(h)  d = DequantizeLinear<axis=1, block_size=4>(w, s, z)
        t = Transpose<perm=[1, 0]>(d)  a = MatMul(r, t)  b = Relu(a)  y = MatMul(b, v)
    }"""
    model = model_from_text(text)
    stored = np.random.default_rng(0).integers(-9, 9, (6, 8)).astype(np.int8)
    model.graph.initializers["w"].const_value = ir.Tensor(stored, name="w")
    graph = lift(model)
    assert [group.width for group in graph.groups if group.resizable] == [2, 6]
    prove(graph, faults=30)
    x = np.random.default_rng(1).standard_normal((2, 5), np.float32)
    (expected,) = run(model, {"x": x}).values()
    assert to_torch(model)(torch.from_numpy(x)).detach().numpy() == pytest.approx(
        expected, abs=1e-5
    )


def test_blocks_that_are_not_full_are_left_alone() -> None:
    head = '<ir_version: 10, opset_import: ["": 21]>'
    text = """net (float[2,7] x) => (float[2,7] y) <float[2,2] s = {0.1, 0.2, 0.3, 0.4}> {
        q = QuantizeLinear<block_size=4>(x, s)  y = DequantizeLinear<block_size=4>(q, s)
    }"""
    nodes = list(lift(model_from_text(head + text)).model.graph)
    assert [describe(OpNode(node)).opaque for node in nodes] == [
        "QuantizeLinear with a last block that is not full",
        "DequantizeLinear with a last block that is not full",
    ]


class _Noise(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        samples = ({"x": generator.standard_normal((1, 3, 8, 8), np.float32)} for _ in range(4))
        self.samples: Iterator[dict[str, np.ndarray]] = samples

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


CONVOLUTIONS = """a = Conv(x, w1, b1)  ra = Relu(a)  b = Conv<group=8>(ra, w2)  rb = Relu(b)
            c = Conv(rb, w3)"""


# What ONNX Runtime makes of the other operators in its own form is not ONNX.
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("form", "rest", "widths"),
    [
        (
            QuantFormat.QDQ,
            "g = GlobalAveragePool(c)  f = Flatten(g)  y = Gemm<transB=1>(f, w4, b4)",
            [8, 6],
        ),
        (QuantFormat.QOperator, "y = Identity(c)", [8]),
    ],
)
def test_what_onnx_runtime_quantizes(
    form: QuantFormat, rest: str, widths: list[int], per_channel: bool, tmp_path: Path
) -> None:
    text = f"""net (float[1,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] w2,
        float[6,8,1,1] w3, float[4,6] w4, float[4] b4) => (float y) {{
            {CONVOLUTIONS}  {rest}
        }}"""
    whole, small = tmp_path / "whole.onnx", tmp_path / "quantized.onnx"
    onnx.save(ir.to_proto(model_from_text(text)), whole)
    quantize_static(
        whole,
        small,
        _Noise(),
        quant_format=form,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    graph = lift(small)
    assert [g.width for g in graph.groups if g.resizable] == widths
    for seed in range(3):
        plan = random_plan(graph, seed)
        report = verify(graph, plan, resize(graph, plan.keep_channels(graph)))
        assert report.ok
        assert report.sensitivity > 1e-2
