"""Growing: within budget, as far as it goes, and without a change of what the network computes."""

import re
import warnings

import numpy as np
import pytest

from morphgraph.errors import BudgetError, MorphWarning, PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.budget import plan
from morphgraph.passes.cost import cost
from morphgraph.passes.expand import expand
from morphgraph.passes.lift import lift
from morphgraph.passes.verify import verify
from morphgraph.plans import Plan, make_plan
from morphgraph.testing import model_from_text
from morphgraph.workflow import apply

HEAD = """<ir_version: 10, opset_import: ["": 20]>
net (float[1,3,8,8] x, """

NETWORKS = {
    "residual": """float[12,3,3,3] a, float[8,12,3,3] b, float[12,8,1,1] c, float[5,12] d)
=> (float[1,5] y) {
    p = Conv<pads=[1,1,1,1]>(x, a)  r = Relu(p)  q = Conv<pads=[1,1,1,1]>(r, b)  s = Relu(q)
    t = Conv(s, c)  u = Add(r, t)  g = GlobalAveragePool(u)  f = Flatten(g)
    y = Gemm<transB=1>(f, d)
}""",
    "flatten": """float[6,3,3,3] a, float[5,96] d) => (float[1,5] y) {
    p = Conv<strides=[2,2], pads=[1,1,1,1]>(x, a)  f = Flatten(p)  y = Gemm<transB=1>(f, d)
}""",
    "concat and depthwise": """float[6,3,3,3] a, float[4,3,1,1] b, float[10,1,3,3] c,
 float[7,10,1,1] e, float[5,7] d) => (float[1,5] y) {
    p = Conv<pads=[1,1,1,1]>(x, a)  q = Conv(x, b)  r = Concat<axis=1>(p, q)
    s = Conv<group=10, pads=[1,1,1,1]>(r, c)  t = Relu(s)  u = Conv(t, e)
    g = GlobalAveragePool(u)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
    "groups": """float[8,3,1,1] a, float[12,2,3,3] b, float[5,12] d) => (float[1,5] y) {
    p = Conv(x, a)  r = Relu(p)  q = Conv<group=4, pads=[1,1,1,1]>(r, b)
    g = GlobalAveragePool(q)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
    "split": """float[12,3,1,1] a, float[7,8,1,1] b, float[5,11] d) => (float[1,5] y) {
    p = Conv(x, a)  r = Relu(p)  s = Constant<value_ints=[8, 4]>()  m, n = Split<axis=1>(r, s)
    q = Conv(m, b)  k = Concat<axis=1>(q, n)
    g = GlobalAveragePool(k)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
    "transposed, grouped": """float[8,3,1,1] a, float[8,1,3,3] b, float[4] c, float[5,4] d)
=> (float[1,5] y) {
    p = Conv(x, a)  r = Relu(p)  q = ConvTranspose<group=4>(r, b, c)
    g = GlobalAveragePool(q)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
}

# Channels that cannot be copied in place: networks, and the groups that keep their width.
UNEVEN = {
    # One channel is all that 4 groups and 6 leave of 12 positions.
    "4 groups feed 6": (
        """float[12,3,1,1] a, float[12,3,1,1] b, float[12,2,1,1] c, float[9,12,1,1] e,
 float[5,9] d) => (float[1,5] y) {
    p = Conv(x, a)  r = Relu(p)  q = Conv<group=4>(r, b)  s = Relu(q)  t = Conv<group=6>(s, c)
    u = Conv(t, e)  g = GlobalAveragePool(u)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
        ["Conv_q"],
    ),
    # The second group of four has two of its positions from the padding.
    "a group that is padded in part": (
        """float[6,3,1,1] a, float[2,4,1,1] b, float[9,2,1,1] e, float[5,9] d) => (float[1,5] y)
<int64[8] pads = {0, 0, 0, 0, 0, 2, 0, 0}> {
    p = Conv(x, a)  q = Pad(p, pads)  s = Relu(q)  t = Conv<group=2>(s, b)  u = Conv(t, e)
    g = GlobalAveragePool(u)  f = Flatten(g)  y = Gemm<transB=1>(f, d)
}""",
        ["Conv_p #2"],
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request: pytest.FixtureRequest) -> ChannelGraph:
    return lift(model_from_text(HEAD + NETWORKS[request.param]))


def growth(graph: ChannelGraph, shrink: str, grow: str, round_to: int = 1) -> tuple[Plan, Plan]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)  # "100%" shrinks nothing
        small = plan(graph, {"flops": shrink}, score="random", seed=1)
    return small, expand(graph, small, {"flops": grow}, round_to=round_to)


@pytest.mark.parametrize(("shrink", "grow"), [("60%", "100%"), ("80%", "250%"), ("100%", "140%")])
def test_the_grown_network_computes_what_the_shrunk_one_computes(
    graph: ChannelGraph, shrink: str, grow: str
) -> None:
    small, wide = growth(graph, shrink, grow)
    model = apply(graph, wide)
    report = verify(graph, small, model)
    assert report.worst.relative < 1e-5
    grown = cost(lift(model), "flops").total
    assert grown == wide.cost["flops"].after > small.cost["flops"].after
    assert grown <= float(grow[:-1]) / 100 * cost(graph, "flops").total


@pytest.mark.parametrize("round_to", [1, 4])
def test_no_larger_multiplier_fits(graph: ChannelGraph, round_to: int) -> None:
    """Brute force over all multipliers at which some width changes."""
    small, wide = growth(graph, "50%", "130%", round_to)
    flops = cost(graph, "flops")
    limit = 1.3 * flops.total
    start, found = small.widths(graph), wide.widths(graph)
    free = np.array([group.resizable for group in graph.groups])
    best = start
    steps = {k * round_to / w for w in start[free] for k in range(1, 400)}
    for omega in sorted(step for step in steps if step >= 1):
        grown = np.floor(omega * start / round_to + 1e-9).astype(int) * round_to
        widths = np.where(free, np.maximum(start, grown), start)
        if flops.at(widths) <= limit:
            best = widths
    assert flops.at(found) == flops.at(best)
    assert np.array_equal(found, best)


def test_a_plan_above_the_budget_is_refused(graph: ChannelGraph) -> None:
    with pytest.raises(BudgetError, match="before it grows"):
        growth(graph, "80%", "40%")


def test_new_channels_are_trainable(graph: ChannelGraph) -> None:
    """Their readers are zero, but neither are their makers, so that gradients reach the readers."""
    _, wide = growth(graph, "80%", "200%")
    model = apply(graph, wide)
    again = apply(graph, wide)
    for name, value in model.graph.initializers.items():
        tensor, same = value.const_value, again.graph.initializers[name].const_value
        assert tensor is not None
        assert same is not None
        assert np.array_equal(tensor.numpy(), same.numpy())
        assert np.isfinite(tensor.numpy()).all()
    assert Plan.from_json(wide.to_json()) == wide


@pytest.mark.parametrize("name", UNEVEN)
def test_a_group_whose_copies_would_be_taken_for_others_keeps_its_width(name: str) -> None:
    text, names = UNEVEN[name]
    graph = lift(model_from_text(HEAD + text))
    small, wide = growth(graph, "100%", "250%")
    apply(graph, wide)
    grown = wide.widths(graph) > small.widths(graph)
    still = [g.name for g, grew in zip(graph.groups, grown, strict=True) if g.resizable > grew]
    assert set(names) <= set(still)
    assert grown.any()
    for blocked in names:
        group = graph.group(blocked)
        forced = make_plan(graph, {}, {}, {}, {group.index: 1})
        with pytest.raises(PlanError, match=re.escape(blocked)):
            apply(graph, forced, verify=False)
