"""Costs along a path of widths are what they are when they are computed as a whole."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.along import WidthsAlong, along
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

RESIDUAL = """
net (float[1,3,8,8] x, float[8,3,3,3] a, float[8,8,3,3] b, float[8,8,1,1] c, float[6,8,1,1] d)
=> (float[1,6,8,8] y) {
    s = Conv<pads=[1,1,1,1]>(x, a)  r = Relu(s)  t = Conv<pads=[1,1,1,1]>(r, b)
    u = Add(r, t)  v = Conv(u, c)  w = Sigmoid(v)  p = Mul(v, w)  y = Conv(p, d) }"""
DENSE = """
net (float[2,3,6,6] x, float[5,3,1,1] a, float[7,5,1,1] b, float[4,12,1,1] c, float[2,16,1,1] d)
=> (float[2,2,6,6] y) {
    e = Conv(x, a)  f = Conv(e, b)  g = Concat<axis=1>(e, f)  h = Conv(g, c)
    i = Concat<axis=1>(e, f, h)  y = Conv(i, d) }"""
ATTENTION = """
net (float[1,5,8] x, float[8,8] q, float[8,8] k, float[8,8] v, float[8,12] up, float[12,8] down)
=> (float[1,5,8] y) {
    a = MatMul(x, q)  b = MatMul(x, k)  t = Transpose<perm=[0,2,1]>(b)  s = MatMul(a, t)
    p = Softmax(s)  c = MatMul(x, v)  o = MatMul(p, c)  u = MatMul(o, up)  r = Relu(u)
    d = MatMul(r, down)  y = Add(x, d) }"""
# A factor that stands in one term twice, and many readers of one width.
SHARED = """
net (float[1,4] x, float[4,9] w, float[9,9] m, float[9,2] v, float[9,2] z) => (float[1,2] y) {
    h = MatMul(x, w)  g = MatMul(h, m)  s = Add(h, g)  k = MatMul(s, m)  l = Add(s, k)
    a = MatMul(l, v)  b = MatMul(l, z)  y = Add(a, b) }"""
GRAPHS = [lift(model_from_text(text)) for text in (RESIDUAL, DENSE, ATTENTION, SHARED)]
KINDS = ("flops", "params", "memory", "peak", "latency", "flops+3*peak")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAPHS), st.sampled_from(KINDS), st.data())
def test_every_step_gives_what_the_whole_gives(
    graph: ChannelGraph, kind: str, data: st.DataObject
) -> None:
    resource = cost(graph, kind)
    widths = graph.widths.astype(np.float64)
    state = along(resource, widths, few=0)
    known = state.gradient.copy()
    # Width 0 among them: what vanishes then does not count, and comes back with the group.
    free = [group.index for group in graph.groups if group.resizable]
    for _ in range(data.draw(st.integers(1, 8))):
        groups = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=2, unique=True))
        wanted = [float(data.draw(st.integers(0, int(graph.widths[k]) + 3))) for k in groups]
        widths[groups] = wanted
        changed = state.move(np.array(groups), np.array(wanted))
        known[changed] = state.gradient[changed]
        whole, slopes = resource.at(widths), resource.gradient(widths)
        np.testing.assert_allclose(state.at, whole, rtol=1e-12)
        np.testing.assert_allclose(known, slopes, rtol=1e-12, atol=1e-12 * resource.total)
        assert ((known > 0) == (slopes > 0)).all()  # none is left over from rounding
        for limit in (whole, np.nextafter(whole, -1), np.nextafter(whole, np.inf), whole / 2):
            assert state.holds(limit) == (whole <= limit)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["flops", "params", "memory"])
def test_slopes_are_those_of_differences(graph: ChannelGraph, kind: str) -> None:
    """Of costs with up to two factors of a width, exact to both sides of it."""
    resource = cost(graph, kind)
    state = WidthsAlong([resource], graph.widths)
    for group in graph.groups:
        around = []
        for width in (group.width + 1, group.width - 1):
            state.move([group.index], [width])
            around.append(resource.at(state.widths))
        state.move([group.index], [group.width])
        slope = along(resource, graph.widths, few=0).gradient[group.index]
        if group.width > 1:
            assert slope == pytest.approx((around[0] - around[1]) / 2)
