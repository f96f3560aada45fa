"""Operators that cut one axis differently agree on the finest factors, and shrink those."""

import pytest

from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

# inputs, network, widths of the resizable groups
NETWORKS: dict[str, tuple[tuple[str, ...], str, list[int]]] = {
    # 24 channels are (6 4) to the grouped convolution and (2 12) to the heads: both are (2 3 4).
    "a grouped convolution before an attention (EfficientViT)": (
        ("x",),
        """net (float[1,3,2,2] x, float[24,3,1,1] w0, float[24,4,1,1] w1, float[2,16,1,1] w2)
        => (float[1,2,2,2] y)
        <int64[4] heads = {1, 4, 12, 4}, int64[3] parts = {4, 4, 4}, int64[4] back = {1, 16, 2, 2}>
        {
            a = Conv(x, w0)  g = Conv<group=6>(a, w1)  c = Concat<axis=1>(a, g)
            r = Reshape(c, heads)  t = Transpose<perm=[0,1,3,2]>(r)
            q, k, v = Split<axis=3>(t, parts)  rq = Relu(q)  rk = Relu(k)
            kt = Transpose<perm=[0,1,3,2]>(rk)  kv = MatMul(kt, v)  o = MatMul(rq, kv)
            ot = Transpose<perm=[0,1,3,2]>(o)  f = Reshape(ot, back)  y = Conv(f, w2)
        }""",
        [2],
    ),
    # Both reshapes cut the first axis as (6 2); the 2 is half of a height, so the 6 shrink.
    "patches by two reshapes (MobileViT)": (
        ("x",),
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,5] w2, float[5,2] w3)
        => (float[1,4,4,2] y)
        <int64[4] rows = {12, 2, 2, 2}, int64[4] patches = {1, 6, 4, 4}> {
            a = Conv(x, w1)  r = Reshape(a, rows)  t = Transpose<perm=[0,2,1,3]>(r)
            p = Reshape(t, patches)  s = Transpose<perm=[0,3,2,1]>(p)
            m = MatMul(s, w2)  rm = Relu(m)  y = MatMul(rm, w3)
        }""",
        [6, 5],
    ),
    # The heads are pinned by the mask, q, k and v by their index: what shrinks is the head size.
    "heads that keep their number": (
        ("x", "z"),
        """net (float[1,4,6] x, float[1,2,4,4] z, float[6,24] w1, float[8,3] w2)
        => (float[1,4,3] y)
        <int64[5] five = {1, 4, 3, 2, 4}, int64[3] three = {1, 4, 8},
         int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}> {
            a = MatMul(x, w1)  r = Reshape(a, five)  t = Transpose<perm=[2,0,3,1,4]>(r)
            q = Gather<axis=0>(t, i0)  k = Gather<axis=0>(t, i1)  v = Gather<axis=0>(t, i2)
            kt = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(q, kt)  sz = Add(s, z)  p = Softmax(sz)
            o = MatMul(p, v)  ot = Transpose<perm=[0,2,1,3]>(o)  f = Reshape(ot, three)
            y = MatMul(f, w2)
        }""",
        [4],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_finest_common_factors_shrink(name: str) -> None:
    inputs, text, widths = NETWORKS[name]
    graph = lift(model_from_text(text, inputs))
    assert [group.width for group in graph.groups if group.resizable] == widths
    prove(graph, faults=100)


def test_an_axis_pinned_part_by_part_is_pinned() -> None:
    inputs, text, _ = NETWORKS["heads that keep their number"]
    graph = lift(model_from_text(text, inputs))
    (group,) = (group for group in graph.groups if group.resizable)
    per_channel = {(member.value, member.axis): member.per_channel for member in group.members}
    assert per_channel["w1", 1] == 3 * 2
    assert ("t", 0) not in per_channel


def test_a_factor_that_stands_on_an_axis_with_itself_keeps_its_size() -> None:
    text = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,36] w2) => (float[1,5] y)
    <int64[3] flat = {1, 6, 16}> {
        a = Conv(x, w1)  r = Reshape(a, flat)  t = Transpose<perm=[0,2,1]>(r)  g = MatMul(r, t)
        f = Flatten(g)  y = Gemm<transB=1>(f, w2)
    }"""
    graph = lift(model_from_text(text))
    assert graph.group("Conv_a").reason == "stands on an axis with itself, as in an outer product"
