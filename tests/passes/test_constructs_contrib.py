"""ONNX Runtime's own operators, as its optimizer writes them: resized equals masked."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

OPSET = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1, "ai.onnx.ml": 3]>'
TOKENS = """net (float[1,5,3] x, float[3,6] w1, float[6,2] w2{more}) => (float[1,5,2] y)
    <float[1,5,6] b{values}> {{ a = MatMul(x, w1)  {body}  y = MatMul(b, w2) }}"""
IMAGES = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2{more}) => (float[1,2,4,4] y)
    <float[1,6,4,4] b{values}> {{ a = Conv(x, w1)  {body}  y = Conv(b, w2) }}"""
STORED = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,{read},1,1] w2)
    => (float[1,2,{out}] y)
    <float s = {{0.03}}, uint8 o = {{120}}, float t = {{0.02}}, uint8 p = {{90}}, {values}> {{
        a = Conv(x, w1)  q = QuantizeLinear(a, s, o)  {body}
        b = DequantizeLinear(z, t, p)  y = Conv(b, w2) }}"""


def tokens(body: str, more: str = "", values: str = "") -> str:
    return TOKENS.format(body=body, more=more, values=values)


def images(body: str, more: str = "", values: str = "") -> str:
    return IMAGES.format(body=body, more=more, values=values)


def stored(body: str, out: str = "4,4", result: str = "1,6,4,4", more: str = "") -> str:
    read = result.split(",")[1]
    return STORED.format(body=body, out=out, read=read, values=f"uint8[{result}] z{more}")


def numbers(count: int, low: int = 0, span: int = 256) -> str:
    """So many whole numbers in braces, as different as they may be."""
    return f"{{{', '.join(str(low + 97 * k % span) for k in range(count))}}}"


def blocks(form: str, more: str = "", constants: str = "", bits: int = 4) -> str:
    """Two products by kernels in few bits, with 64 channels in blocks of 16 between them."""
    blob = 2 * bits
    return f"""net (float[2,5,32] x, float[64,2] s, float[192] t, float[48,2] w2{more})
        => (float[2,5,2] y) <uint8[64,2,{blob}] a = {numbers(128 * blob)},
        uint8[48,4,{blob}] c = {numbers(192 * blob)}{constants}> {{
            u = com.microsoft.MatMulNBits<K=32, N=64, bits={bits}, block_size=16>(x, a, s)
            v = Relu(u)
            b = com.microsoft.MatMulNBits<K=64, N=48, bits={bits}, block_size=16>({form})
            y = MatMul(b, w2) }}"""


NETWORKS: dict[str, tuple[str, list[int]]] = {
    **{
        kind: (images(f"b = com.microsoft.{kind}(a)"), [6])
        for kind in ("Gelu", "FastGelu", "QuickGelu")
    },
    "BiasGelu": (tokens("b = com.microsoft.BiasGelu(a, h)", ", float[6] h"), [6]),
    "FusedConv": (
        images(
            'c = com.microsoft.FusedConv<activation="Tanh">(a, w3, h, a)'
            '  b = com.microsoft.FusedConv<activation="Tanh", group=6>(c, w4)',
            ", float[6,6,1,1] w3, float[6] h, float[6,1,1,1] w4",
            ", float[1,6,4,4] c",
        ),
        [6],
    ),
    "FusedConv, grouped": (
        images(
            'b = com.microsoft.FusedConv<activation="Relu", group=2>(a, w3, h)',
            ", float[6,3,1,1] w3, float[6] h",
        ),
        [3, 3],
    ),
    "FusedMatMul": (
        tokens(
            "c = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(a, w3)  b = Relu(c)",
            ", float[6,6] w3",
            ", float[1,5,6] c",
        ),
        [6, 6],
    ),
    "FusedMatMul, batch axes turned": (
        tokens(
            "t = Transpose<perm=[1,0,2]>(a)"
            "  c = com.microsoft.FusedMatMul<transBatchA=1>(t, w3)"
            "  u = Transpose<perm=[2,0,1]>(c)"
            "  b = com.microsoft.FusedMatMul<transA=1, transBatchA=1>(u, w4)",
            ", float[1,6,8] w3, float[1,8,6] w4",
        ),
        [6, 8, 6],
    ),
    "FusedGemm": (
        """net (float[4,3] x, float[6,3] w1, float[6] h, float[6,2] w2) => (float[4,2] y)
        <float[4,6] a> {
            a = com.microsoft.FusedGemm<activation="Relu", transB=1>(x, w1, h)  y = MatMul(a, w2)
        }""",
        [6],
    ),
    "SkipLayerNormalization": (
        tokens(
            "n, , , e = com.microsoft.SkipLayerNormalization(a, c, g, h, k)  b = Add(n, e)",
            ", float[1,5,6] c, float[6] g, float[6] h, float[6] k",
            ", float[1,5,6] n, float[1,5,6] e",
        ),
        [6],
    ),
    "SkipSimplifiedLayerNormalization": (
        tokens(
            "b = com.microsoft.SkipSimplifiedLayerNormalization(a, c, g)",
            ", float[1,5,6] c, float[6] g",
        ),
        [6],
    ),
    "MultiHeadAttention": (
        tokens(
            "k = MatMul(x, w3)  v = MatMul(x, w4)"
            "  b = com.microsoft.MultiHeadAttention<num_heads=3>(a, k, v, , , m)",
            ", float[3,6] w3, float[3,6] w4, float[1,3,5,5] m",
        ),
        [3],
    ),
    "Attention": (
        tokens(
            "b = com.microsoft.Attention<num_heads=3>(a, w3, h)", ", float[6,18] w3, float[18] h"
        ),
        [6, 3],
    ),
    "QLinearAdd": (stored("z = com.microsoft.QLinearAdd(q, s, o, q, t, p, t, p)"), [6]),
    "QLinearMul": (stored("z = com.microsoft.QLinearMul(q, s, o, q, t, p, t, p)"), [6]),
    "QLinearSigmoid": (stored("z = com.microsoft.QLinearSigmoid(q, s, o, t, p)"), [6]),
    "QLinearLeakyRelu": (
        stored("z = com.microsoft.QLinearLeakyRelu<alpha=0.2>(q, s, o, t, p)"),
        [6],
    ),
    "QLinearGlobalAveragePool": (
        stored("z = com.microsoft.QLinearGlobalAveragePool(q, s, o, t, p)", "1,1", "1,6,1,1"),
        [6],
    ),
    "QLinearAveragePool": (
        stored(
            "z = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(q, s, o, t, p)",
            "3,3",
            "1,6,3,3",
        ),
        [6],
    ),
    "QLinearConcat": (
        stored(
            "z = com.microsoft.QLinearConcat<axis=1>(t, p, q, s, o, q, t, p)", "4,4", "1,12,4,4"
        ),
        [6],
    ),
    "QLinearSoftmax": (
        stored("z = com.microsoft.QLinearSoftmax<axis=1, opset=13>(q, s, o, t, p)"),
        [6],
    ),
    "QLinearSoftmax of all behind": (
        stored("z = com.microsoft.QLinearSoftmax<axis=2, opset=12>(q, s, o, t, p)"),
        [6],
    ),
    "DynamicQuantizeMatMul": (
        tokens(
            "c = com.microsoft.DynamicQuantizeMatMul(a, d, s, z, h)"
            "  b = com.microsoft.DynamicQuantizeMatMul(c, e, t)",
            ", float[6] h, float[6] t",
            f", int8[6,6] d = {numbers(36, -128)}, int8[6,6] e = {numbers(36, -100, 201)},"
            " float s = {0.01}, int8 z = {5}",
        ),
        [6, 6, 6],
    ),
    "MatMulIntegerToFloat": (
        tokens(
            "q = QuantizeLinear(a, u, o)"
            "  b = com.microsoft.MatMulIntegerToFloat(q, d, u, s, o, z, h)",
            ", float[6] h, float[6] s",
            f", int8[6,6] d = {numbers(36, -128)}, float u = {{0.03}}, uint8 o = {{120}},"
            " int8[6] z = {1,2,3,4,5,6}",
        ),
        [6, 6],
    ),
    "MatMulNBits": (blocks("v, c, t", bits=8), [4, 48]),
    "MatMulNBits, with a bias": (
        blocks("v, c, t, , , h", ", float[48] h"),
        [4, 48],
    ),
    "MatMulNBits, zero points in bytes": (
        blocks("v, c, t, z", constants=f", uint8[96] z = {numbers(96)}"),
        [2, 48],  # two blocks share a byte
    ),
    "MatMulNBits, zero points in rows of bytes": (
        blocks("v, c, t, z", constants=f", uint8[48,2] z = {numbers(96)}"),
        [2, 48],
    ),
    "MatMulNBits, real zero points": (blocks("v, c, t, z", ", float[192] z"), [4, 48]),
    "MatMulNBits, columns in another order": (
        blocks("v, c, t, , g", constants=f", int32[64] g = {numbers(64, 0, 4)}"),
        [48],
    ),
    **{
        f"GatherBlockQuantized, {name}": (
            f"""net (int64[2,5] x, float[9,4] s, float[64,6] w, float[6,2] w2) => (float[2,5,2] y)
            <uint8[9,32] a = {numbers(288)}{points}> {{
                e = com.microsoft.GatherBlockQuantized<bits=4, block_size=16, quantize_axis=1>
                    (a, x, s{operand})
                m = MatMul(e, w)  b = Tanh(m)  y = MatMul(b, w2) }}""",
            [width, 6],
        )
        for name, operand, points, width in (
            ("middle", "", "", 4),
            ("zero points", ", z", f", uint8[9,2] z = {numbers(18)}", 2),
        )
    },
    "DynamicQuantizeLSTM": (
        f"""net (float[3,2,4] x, float[4,6] w1, float[8,2] w2) => (float[3,1,2,2] y)
        <float[1] s = {{0.01}}, int8[1] z = {{0}},
         int8[1,6,32] w = {numbers(192, -128)}, int8[1,8,32] r = {numbers(256, -128)}> {{
            a = MatMul(x, w1)  b, m, c = com.microsoft.DynamicQuantizeLSTM
                <hidden_size=8>(a, w, r, , , , , , s, z, s, z)
            y = MatMul(b, w2) }}""",
        [6],
    ),
    **{
        f"{kind} of {form}": (
            f"""net (float[4,3] x, float[3,5] w1, float[5,2] w2) => (float[4,2] y) {{
                a = MatMul(x, w1)  r = Relu(a)
                b = ai.onnx.ml.{kind}<{form}>(r)  y = MatMul(b, w2) }}""",
            [5],
        )
        for kind, form in (
            ("Scaler", "offset=[0.1,0.2,-0.3,0.4,0.5], scale=[1.5,2.0,3.0,0.5,1.0]"),
            ("Scaler", "offset=[0.5], scale=[2.0]"),
            ("Imputer", "imputed_value_floats=[0.1,0.2,-0.3,0.4,0.7]"),
            ("Imputer", "imputed_value_floats=[0.5], replaced_value_float=0.0"),
        )
    },
    "QGemm": (
        """net (float[4,3] x, float[3,6] w1, float[2,2] w2) => (float[4,2] y)
        <float s = {0.03}, uint8 o = {120}, float t = {0.02}, uint8 p = {90}, uint8[4,2] z,
         int8[2,6] w = {50, -40, 30, -20, 10, 60, -50, 40, -30, 20, -10, 25}, int8 v = {0},
         int32[2] h = {700, -800}> {
            a = MatMul(x, w1)  q = QuantizeLinear(a, s, o)
            z = com.microsoft.QGemm<transB=1>(q, s, o, w, t, v, h, t, p)
            b = DequantizeLinear(z, t, p)  y = MatMul(b, w2)
        }""",
        [6, 2],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(OPSET + NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, faults=30)


def test_sizes_of_heads_shrink_inside_an_attention_that_makes_them() -> None:
    model = model_from_text(OPSET + NETWORKS["Attention"][0])
    graph = lift(model, attention="head-dim")
    assert [g.width for g in graph.groups if g.resizable] == [6, 2]
    prove(graph)


def test_a_file_that_onnx_runtime_optimized(tmp_path: Path) -> None:
    text = """net (float[1,3,6,6] x, float[8,3,3,3] w1, float[8] b1, float[8,8,1,1] w2, float[8] b2,
        float[2,8,1,1] w3) => (float[1,2,3,3] y) {
            a = Conv<strides=[2,1], pads=[0,1,1,0], dilations=[1,2]>(x, w1, b1)  ra = Relu(a)
            b = Conv(ra, w2, b2)  c = Add(ra, b)  rc = Relu(c)  d = Gelu(rc)  y = Conv(d, w3)
        }"""
    model = model_from_text(OPSET + text)
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = level
    path = tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    data = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    graph = lift(path)
    assert "FusedConv" in {node.ir.op_type for node in graph.ops}
    assert cost(graph, "macs").total == cost(lift(model), "macs").total
    assert [g.width for g in graph.groups if g.resizable] == [8]
    prove(graph)
