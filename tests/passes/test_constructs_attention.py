"""Attention in all spellings: resized equals masked, by whole heads and by the size of every head.

A network is a triple: its text, the widths when heads shrink, the widths when head sizes do.
"""

from math import sqrt

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from morphgraph.graph import Attention, ChannelGraph
from morphgraph.ops import OpNode, describe
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, prove, random_plan

OPSET = '<ir_version: 10, opset_import: ["": 23]>'
CHOICES: tuple[Attention, Attention] = ("heads", "head-dim")

# 3 heads of size 4 on a sequence of 5; weights q, k, v make them, o reads them.
FLAT = """net (float[1,5,6] x, float[6,12] q, float[6,12] k, float[6,12] v, float[12,6] o{more})
        => (float[1,5,6] y) <int64[4] split = {{1, 5, 3, 4}}, int64[3] joined = {{1, 5, 12}}> {{
            qf = MatMul(x, q)  kf = MatMul(x, k)  vf = MatMul(x, v)
            {body}
            y = MatMul(c, o)
        }}"""
HEADS = """qs = Reshape(qf, split)  ks = Reshape(kf, split)  vs = Reshape(vf, split)
            qh = Transpose<perm=[0,2,1,3]>(qs)  kh = Transpose<perm=[0,2,1,3]>(ks)
            vh = Transpose<perm=[0,2,1,3]>(vs)
            {body}
            m = Transpose<perm=[0,2,1,3]>(a)  c = Reshape(m, joined)"""
WRITTEN = """kt = Transpose<perm=[0,1,3,2]>(kr)  s = MatMul(qr, kt)  p = Softmax(s)
            a = MatMul(p, vh)"""

# 4 heads of queries share 2 of keys and values, of size 4.
GROUPED = """net (float[1,5,6] x, float[6,16] q, float[6,8] k, float[6,8] v, float[16,6] o)
        => (float[1,5,6] y)
        <int64[4] qsplit = {{1, 5, 4, 4}}, int64[4] ksplit = {{1, 5, 2, 4}},
         int64[3] joined = {{1, 5, 16}}, int64[1] two = {{2}}, int64[5] often = {{1, 2, 2, 5, 4}},
         int64[4] four = {{1, 4, 5, 4}}> {{
            qf = MatMul(x, q)  kf = MatMul(x, k)  vf = MatMul(x, v)
            {body}
            y = MatMul(c, o)
        }}"""
GROUPED_HEADS = """qs = Reshape(qf, qsplit)  ks = Reshape(kf, ksplit)  vs = Reshape(vf, ksplit)
            qh = Transpose<perm=[0,2,1,3]>(qs)  kh = Transpose<perm=[0,2,1,3]>(ks)
            vh = Transpose<perm=[0,2,1,3]>(vs)
            {body}
            m = Transpose<perm=[0,2,1,3]>(a)  c = Reshape(m, joined)"""


def flat(body: str, more: str = "") -> str:
    return FLAT.format(body=body, more=more)


def by_heads(body: str, more: str = "") -> str:
    return flat(HEADS.format(body=body), more)


NETWORKS: dict[str, tuple[str, list[int], list[int]]] = {
    "written out": (
        by_heads("qr = Identity(qh)  kr = Identity(kh)" + WRITTEN),
        [3],
        [4, 4],
    ),
    "written out, heads in the batch": (
        flat(
            """qs = Reshape(qf, split)  ks = Reshape(kf, split)  vs = Reshape(vf, split)
            qh = Transpose<perm=[0,2,1,3]>(qs)  kh = Transpose<perm=[0,2,1,3]>(ks)
            vh = Transpose<perm=[0,2,1,3]>(vs)
            qb = Reshape(qh, three)  kb = Reshape(kh, three)  vb = Reshape(vh, three)
            kt = Transpose<perm=[0,2,1]>(kb)  s = MatMul(qb, kt)  p = Softmax(s)
            ab = MatMul(p, vb)  a = Reshape(ab, four)
            m = Transpose<perm=[0,2,1,3]>(a)  c = Reshape(m, joined)"""
        ).replace(
            "int64[3] joined",
            "int64[3] three = {3, 5, 4}, int64[4] four = {1, 3, 5, 4}, int64[3] joined",
        ),
        [3],
        [4, 4],
    ),
    "one node": (by_heads("a = Attention(qh, kh, vh)"), [3], [4, 4]),
    "one node, three axes": (
        flat("c = Attention<q_num_heads=3, kv_num_heads=3>(qf, kf, vf)"),
        [3],
        [4, 4],
    ),
    "causal, capped, with a scale": (
        flat(
            "c = Attention<q_num_heads=3, kv_num_heads=3, is_causal=1, softcap=0.8, scale=0.7>"
            "(qf, kf, vf)"
        ),
        [3],
        [4, 4],
    ),
    "a mask of every head": (
        by_heads("a = Attention(qh, kh, vh, mask)", ", float[3,5,5] mask"),
        [3],
        [4, 4],
    ),
    "a mask for all heads": (
        by_heads("a = Attention(qh, kh, vh, mask)", ", float[1,1,5,5] mask"),
        [3],
        [4, 4],
    ),
    "a past": (
        by_heads(
            """b, pk, pv = Attention(qh, kh, vh, , past, past)
            ks2 = ReduceSum<keepdims=0>(pk)  vs2 = ReduceSum<keepdims=0>(pv)
            present = Mul(ks2, vs2)  a = Add(b, present)""",
            ", float[1,3,2,4] past",
        ),
        [3],
        [4],
    ),
    "grouped queries, repeated": (
        GROUPED.format(
            body=GROUPED_HEADS.format(
                body="""ku = Unsqueeze(kh, two)  ke = Expand(ku, often)  kr = Reshape(ke, four)
            vu = Unsqueeze(vh, two)  ve = Expand(vu, often)  vr = Reshape(ve, four)
            kt = Transpose<perm=[0,1,3,2]>(kr)  s = MatMul(qh, kt)  p = Softmax(s)
            a = MatMul(p, vr)"""
            )
        ),
        [2],
        [4, 4],
    ),
    "grouped queries, one node": (
        GROUPED.format(body=GROUPED_HEADS.format(body="a = Attention(qh, kh, vh)")),
        [2],
        [4, 4],
    ),
    "grouped queries, one node, three axes": (
        GROUPED.format(body="c = Attention<q_num_heads=4, kv_num_heads=2>(qf, kf, vf)"),
        [2],
        [4, 4],
    ),
    "rotary, written out": (
        by_heads(
            """q0 = Slice(qh, zero, half, last)  q1 = Slice(qh, half, full, last)
            qn = Neg(q1)  qt = Concat<axis=-1>(qn, q0)
            qc = Mul(qh, cos)  qsn = Mul(qt, sin)  qr = Add(qc, qsn)
            k0, k1 = Split<axis=-1, num_outputs=2>(kh)
            kn = Neg(k1)  ktu = Concat<axis=-1>(kn, k0)
            kc = Mul(kh, cos)  ksn = Mul(ktu, sin)  kr = Add(kc, ksn)
            """
            + WRITTEN,
            ", float[5,4] cos, float[5,4] sin",
        ).replace(
            "int64[3] joined",
            "int64[1] zero = {0}, int64[1] half = {2}, int64[1] full = {4}, int64[1] last = {-1},"
            " int64[3] joined",
        ),
        [3],
        [2, 4],
    ),
    "rotary": (
        by_heads(
            """qr = RotaryEmbedding(qh, cos, sin)  kr = RotaryEmbedding(kh, cos, sin)
            a = Attention(qr, kr, vh)""",
            ", float[1,5,2] cos, float[1,5,2] sin",
        ),
        [3],
        [2, 4],
    ),
    "rotary, interleaved, three axes": (
        flat(
            """qr = RotaryEmbedding<interleaved=1, num_heads=3>(qf, cos, sin, at)
            kr = RotaryEmbedding<interleaved=1, num_heads=3>(kf, cos, sin, at)
            c = Attention<q_num_heads=3, kv_num_heads=3>(qr, kr, vf)""",
            ", float[7,2] cos, float[7,2] sin",
        ).replace("int64[3] joined", "int64[1,5] at = {0, 1, 2, 3, 4}, int64[3] joined"),
        [3],
        [2, 4],
    ),
    "rotary of a part": (
        by_heads(
            """qr = RotaryEmbedding<rotary_embedding_dim=4>(qh, cos, sin)
            kr = RotaryEmbedding<rotary_embedding_dim=4>(kh, cos, sin)
            a = Attention(qr, kr, vh)""",
            ", float[1,5,2] cos, float[1,5,2] sin",
        )
        .replace("12", "24")
        .replace("5, 3, 4}", "5, 3, 8}"),
        [3],
        [2, 4, 8],
    ),
    "interleaved rotary of a part": (
        by_heads(
            """qr = RotaryEmbedding<interleaved=1, rotary_embedding_dim=4>(qh, cos, sin)
            kr = RotaryEmbedding<interleaved=1, rotary_embedding_dim=4>(kh, cos, sin)
            a = Attention(qr, kr, vh)""",
            ", float[1,5,2] cos, float[1,5,2] sin",
        )
        .replace("12", "24")
        .replace("5, 3, 4}", "5, 3, 8}"),
        [3],
        [2, 4, 8],
    ),
    "einsum": (
        flat(
            """qs = Reshape(qf, split)  ks = Reshape(kf, split)  vs = Reshape(vf, split)
            s = Einsum<equation="bthd,bshd->bhts">(qs, ks)  p = Softmax(s)
            a = Einsum<equation="...hts,...she->...the">(p, vs)  c = Reshape(a, joined)"""
        ),
        [3],
        [4, 4],
    ),
    "norms on queries and keys": (
        by_heads(
            """qr = RMSNormalization(qh, g)  kr = RMSNormalization(kh, g)
            a = Attention(qr, kr, vh)""",
            ", float[4] g",
        ),
        [3],
        [4, 4],
    ),
}


def graph_of(name: str, attention: Attention) -> ChannelGraph:
    return lift(model_from_text(OPSET + NETWORKS[name][0]), attention=attention)


@pytest.mark.parametrize("attention", CHOICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str, attention: Attention) -> None:
    graph = graph_of(name, attention)
    expected = NETWORKS[name][1 + CHOICES.index(attention)]
    assert [group.width for group in graph.groups if group.resizable] == expected
    prove(graph, faults=30)


def test_the_scale_stays_that_of_the_old_head_size() -> None:
    graph = graph_of("one node", "head-dim")
    small = resize(graph, random_plan(graph).keep_channels(graph))
    (node,) = [node for node in small.graph if node.op_type == "Attention"]
    assert node.attributes["scale"].as_float() == np.float32(1 / sqrt(4))
    whole = graph_of("one node", "heads")
    small = resize(whole, random_plan(whole).keep_channels(whole))
    (node,) = [node for node in small.graph if node.op_type == "Attention"]
    assert "scale" not in node.attributes


def test_macs_are_those_of_torchs_counter() -> None:
    q, k, v = torch.ones(1, 4, 5, 6), torch.ones(1, 4, 7, 6), torch.ones(1, 4, 7, 3)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        F.scaled_dot_product_attention(q, k, v)
    text = """net (float[1,4,5,6] q, float[1,2,7,6] k, float[1,2,7,3] v) => (float[1,4,5,3] y) {
        y = Attention(q, k, v)
    }"""
    graph = lift(model_from_text(OPSET + text, inputs=("q", "k", "v")))
    assert 2 * cost(graph, "macs").total == counter.get_total_flops()


def test_heads_that_do_not_divide_are_left_alone() -> None:
    text = """net (float[1,3,5,4] q, float[1,2,5,4] k) => (float[1,3,5,4] y) {
        y = Attention(q, k, k)
    }"""
    (node,) = model_from_text(OPSET + text, inputs=("q", "k")).graph
    assert describe(OpNode(node)).opaque == "Attention of 3 query heads over 2 key heads"
