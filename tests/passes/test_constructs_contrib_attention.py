"""Attentions of ONNX Runtime's own, and what stands around them: resized equals masked."""

import numpy as np
import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, prove
from morphgraph.testing.prove import prove_plan

OPSET = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
QKV = "q = MatMul(x, w1)  k = MatMul(x, w3)  v = MatMul(x, w4)"


def network(
    body: str,
    more: str = "",
    constants: str = "",
    sizes: tuple[int, int, int, int] = (12, 12, 12, 12),
    tail: str = "y = MatMul(b, w2)",
) -> str:
    """``x`` ``[2, 5, 6]`` becomes queries, keys and values of these widths; ``b`` has the last."""
    q, k, v, read = sizes
    return f"""net (float[2,5,6] x, float[6,{q}] w1, float[6,{k}] w3, float[6,{v}] w4,
        float[{read},3] w2{more}) => (float[2,5,3] y) <{constants}> {{ {QKV}  {body}  {tail} }}"""


PAST = ", float[2,3,4,4] p, float[2,3,4,4] r"


def attention(
    form: str, more: str = "", constants: str = "", results: str = "b", **options: object
) -> str:
    body = f"{results} = com.microsoft.MultiHeadAttention<num_heads=3>({form})"
    return network(body, more, constants, **options)  # type: ignore[arg-type]


LENGTHS = "int32[2] l = {4,4}, int32 t = {5}"
TABLES = ", float[9,8] cosines, float[9,8] sines"


def grouped(form: str, attributes: str = "", more: str = "") -> str:
    return network(
        f"b = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2{attributes}>({form})",
        more,
        LENGTHS,
        sizes=(64, 32, 32, 64),
    )


NETWORKS: dict[str, tuple[str, list[int]]] = {
    "bias": (attention("q, k, v, h", ", float[36] h"), [3]),
    "bias, values of another size": (
        attention("q, k, v, h", ", float[33] h", sizes=(12, 12, 9, 9)),
        [3],
    ),
    "lengths": (attention("q, k, v, , m", constants="int32[2] m = {5,3}"), [3]),
    "starts and ends": (
        attention("q, k, v, , m", constants="int32[8] m = {5,3,0,5,10,0,5,8}"),
        [3],
    ),
    "padding": (
        attention("q, k, v, h, m", ", float[36] h", "int32[2,5] m = {1,1,1,1,0,1,1,0,0,0}"),
        [3],
    ),
    "padding for every query": (
        attention("q, k, v, , m", constants=f"int32[2,5,5] m = {{{','.join(['1,1,1,1,0'] * 10)}}}"),
        [3],
    ),
    "bias for every head": (attention("q, k, v, h, , s", ", float[36] h, float[2,3,5,5] s"), [3]),
    "bias for all heads": (attention("q, k, v, , , s", ", float[1,1,5,5] s"), [3]),
    "past": (attention("q, k, v, , , , p, r", PAST, results="b, o1, o2"), [3]),
    "past and bias": (
        attention(
            "q, k, v, h, , s, p, r",
            f"{PAST}, float[36] h, float[1,3,5,9] s",
            results="b, o1, o2",
        ),
        [3],
    ),
    "present": (
        network(
            "c, k2, v2 = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v)"
            "  f = com.microsoft.MultiHeadAttention<num_heads=3>(q, k2, v2)  b = Add(c, f)"
        ),
        [3],
    ),
    "groups": (grouped("q, k, v, , , l, t"), [2]),
    "groups, rotated": (
        grouped("q, k, v, , , l, t, cosines, sines", ", do_rotary=1", TABLES),
        [2],
    ),
    "groups, rotated neighbours": (
        grouped("q, k, v, , , l, t, cosines, sines", ", do_rotary=1, rotary_interleaved=1", TABLES),
        [2],
    ),
    "groups, window": (grouped("q, k, v, , , l, t", ", local_window_size=3, softcap=2.0"), [2]),
    "groups, bias": (grouped("q, k, v, , , l, t, , , , s", more=", float[2,4,5,5] s"), [2]),
    "groups, sink": (grouped("q, k, v, , , l, t, , , , , s", more=", float[4] s"), [2]),
    "groups, packed": (
        """net (float[2,5,6] x, float[6,128] w1, float[64,3] w2, float[9,8] cosines,
            float[9,8] sines) => (float[2,5,3] y) <int32[2] l = {4,4}, int32 t = {5}> {
            q = MatMul(x, w1)
            b, k, v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>
                (q, , , , , l, t, cosines, sines)
            y = MatMul(b, w2) }""",
        [2],
    ),
    "groups, past": (
        grouped("q, k, v, p, r, l, t", more=", float[1,2,4,16] p, float[1,2,4,16] r")
        .replace("b = com", "b, o1, o2 = com")
        .replace("[2,5,", "[1,5,")
        .replace("int32[2] l = {4,4}, int32 t = {5}", "int32[1] l = {8}, int32 t = {9}"),
        [2],
    ),
    "rotation": (
        network(
            "a = com.microsoft.RotaryEmbedding<num_heads=3>(q, i, cosines, sines)"
            "  b = com.microsoft.MultiHeadAttention<num_heads=3>(a, k, v)",
            ", float[9,2] cosines, float[9,2] sines",
            "int64[2,5] i = {0,1,2,3,4,1,2,3,4,5}",
        ),
        [3],
    ),
    "rotation of neighbours from a start": (
        network(
            "a = com.microsoft.RotaryEmbedding<num_heads=3, interleaved=1>(q, i, cosines, sines)"
            "  b = com.microsoft.MultiHeadAttention<num_heads=3>(a, k, v)",
            ", float[9,2] cosines, float[9,2] sines",
            "int64[1] i = {2}",
        ),
        [3],
    ),
    "rotation of a part": (
        network(
            "a = com.microsoft.RotaryEmbedding<num_heads=3, rotary_embedding_dim=2>"
            "(q, i, cosines, sines)"
            "  b = com.microsoft.MultiHeadAttention<num_heads=3>(a, k, v)",
            ", float[9,1] cosines, float[9,1] sines",
            "int64[1] i = {2}",
        ),
        [3],
    ),
    "packed kernels, lengths": (
        network(
            "b = com.microsoft.Attention<num_heads=3>(q, w5, h, l)",
            ", float[12,36] w5, float[36] h",
            "int32[2] l = {5,3}",
        ),
        [12, 3],
    ),
    "packed kernels, past": (
        network(
            "b, z = com.microsoft.Attention<num_heads=3>(q, w5, h, , p)",
            ", float[12,36] w5, float[36] h, float[2,2,3,4,4] p",
        ),
        [12, 3],
    ),
    "quantized, packed kernels": (
        network(
            "a = QuantizeLinear(q, s, o)  c = QuantizeLinear(w5, u, z)"
            "  b = com.microsoft.QAttention<num_heads=3>(a, c, h, s, u, , o, z)",
            ", float[12,36] w5, float[36] h",
            "float s = {0.03}, uint8 o = {120}, float u = {0.01}, int8 z = {0}",
        ),
        [12, 3],
    ),
    "embedding": (
        """net (int32[2,5] x, float[20,8] words, float[9,8] places,
            float[2,8] kinds, float[8] g, float[8] h, float[8,6] w1, float[6,3] w2,
            float[8,7] w3, float[7,3] w4) => (float[2,5,3] y, float[2,5,3] z) {
            a, m, s = com.microsoft.EmbedLayerNormalization(x, x, words, places, kinds, g, h)
            c = MatMul(a, w1)  y = MatMul(c, w2)  d = MatMul(s, w3)  z = MatMul(d, w4) }""",
        [8, 6, 7],
    ),
    "embedding of words and places": (
        """net (int32[2,5] x, float[20,8] words, float[9,8] places,
            float[8] g, float[8] h, float[8,6] w1, float[6,3] w2) => (float[2,5,3] y)
            <int32[2,5] i = {0,1,2,3,4,1,2,3,4,5}> {
            a, m = com.microsoft.EmbedLayerNormalization
                <mask_index_type=0>(x, , words, places, , g, h, , i)
            c = MatMul(a, w1)  y = MatMul(c, w2) }""",
        [8, 6],
    ),
}


def graph_of(name: str, **options: str) -> ChannelGraph:
    return lift(model_from_text(OPSET + NETWORKS[name][0]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, seeds=(0, 1), faults=6)


def test_lengths_of_keys_that_callers_give() -> None:
    """ONNX Runtime takes no lengths that do not fit: a check gives those of a whole batch."""
    text = NETWORKS["groups"][0].replace(LENGTHS, "").replace("<>", "")
    text = text.replace("float[2,5,6] x,", "float[2,5,6] x, int32[2] l, int32[1] t,", 1)
    graph = lift(model_from_text(OPSET + text, inputs=("x", "l", "t")))
    assert [group.width for group in graph.groups if group.resizable] == [2]
    prove(graph, seeds=(0,), faults=6)


def test_lengths_of_keys_from_a_mask() -> None:
    """As builders of models for generation write it."""
    text = NETWORKS["groups"][0].replace(LENGTHS, "int64[1] one = {1}, int64 axis = {1}")
    text = text.replace("float[2,5,6] x,", "float[2,5,6] x, int64[2,5] m,", 1)
    text = text.replace(
        "b = com",
        """sum = ReduceSum<keepdims=0>(m, one)  less = Sub(sum, one)  l = Cast<to=6>(less)
        shape = Shape(m)  size = Gather(shape, axis)  t = Cast<to=6>(size)  b = com""",
    )
    graph = lift(model_from_text(OPSET + text, inputs=("x", "m")))
    assert [group.width for group in graph.groups if group.resizable] == [2]
    prove(graph, seeds=(0,), faults=6)


def test_a_packed_operand_whose_attention_keeps_its_size_stays_separate() -> None:
    text = NETWORKS["groups, packed"][0].replace(
        "float[6,128] w1", "float[6,7] w0, float[7,128] w1"
    )
    text = text.replace("q = MatMul(x, w1)", "a = MatMul(x, w0)  r = Relu(a)  q = MatMul(r, w1)")
    graph = lift(model_from_text(OPSET + text))
    group = graph.group("MatMul_a")
    keep = {group.index: np.array([0, 2, 5])}
    costs = [cost(graph, unit) for unit in ("flops", "params")]
    assert prove_plan(graph, make_plan(graph, keep, {}, costs)).ok
