"""Growing: within budget, as far as it goes, and without a change of what the network computes."""

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphgraph.errors import ArgumentError, BudgetError, MorphWarning, PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths, uniform
from morphgraph.plans import Plan, make_plan
from morphgraph.testing import model_from_text, random_plan
from morphgraph.workflow import apply

HEAD = """
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


@cache
def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(HEAD + NETWORKS[name]))


UNITS = {"groups": 4}  # channels of the tensor per channel of a group, where it is not 1


def ladder(grid: int, unit: int, width: int) -> list[int]:
    """0 and the widths on the grid: channels are multiples of it, else nearest to those."""
    exact = [w for w in range(1, 500) if w * unit % grid == 0]
    if exact[0] < width or grid >= unit * width:
        return [0, *exact]
    return sorted({0} | {max(1, (2 * k * grid + unit) // (2 * unit)) for k in range(1, 500)})


def at_most(ladder: Sequence[int], width: float | Fraction) -> int:
    return ladder[bisect_right(ladder, width) - 1]


def staircase(
    start: Sequence[int],
    floors: Sequence[int],
    ceilings: Sequence[int],
    ladders: Sequence[Sequence[int]],
    omega: Fraction,
) -> list[int]:
    """The widths at one multiplier, in exact arithmetic."""
    return [
        max(low, min(high, at_most(ladder, omega * width)))
        for width, low, high, ladder in zip(start, floors, ceilings, ladders, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(NETWORKS)),
    seed=st.integers(0, 50),
    budgets=st.dictionaries(
        st.sampled_from(["flops", "params", "memory", "peak", "latency"]),
        st.floats(0.3, 4),
        min_size=1,
        max_size=3,
    ),
    grid=st.sampled_from([1, 3, 8]),
    growth=st.sampled_from([None, 1.0, 1.3, 2.5]),
    least=st.sampled_from([1, 5, 9]),
)
def test_no_larger_multiplier_fits(
    name: str, seed: int, budgets: dict[str, float], grid: int, growth: float | None, least: int
) -> None:
    """Brute force over all multipliers at which some width changes."""
    graph = graph_of(name)
    costs = {kind: cost(graph, kind) for kind in budgets}
    small = random_plan(graph, seed)
    start = small.widths(graph)
    # So that the plan fits: amounts are relative to what it needs.
    limits = {kind: (1 + share) * costs[kind].at(start) for kind, share in budgets.items()}

    def fit(widths: Sequence[int] | np.ndarray) -> bool:
        return all(costs[kind].at(np.array(widths)) <= limit for kind, limit in limits.items())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)  # no room for the floor
        options: dict[str, Any] = {"round_to": grid, "max_growth": growth, "min_width": least}
        bare = expand(graph, small, limits, fill=False, **options)
        full = expand(graph, small, limits, **options)
    free = [g.resizable and not g.statistical for g in graph.groups]
    bound = [int(g.width * Fraction(growth)) if growth else 10**6 for g in graph.groups]
    unit = UNITS.get(name, 1)
    ladders = [ladder(grid, unit, g.width) for g in graph.groups]
    ceilings = [
        max(int(w), at_most(ladder, b)) if f else int(w)
        for w, b, f, ladder in zip(start, bound, free, ladders, strict=True)
    ]
    for level in range(-(-least // grid) * grid, -1, -grid):
        floors = [
            max(int(w), min(high, ladder[bisect_left(ladder, level / unit)]))
            if w * unit < least
            else int(w)
            for w, high, ladder in zip(start, ceilings, ladders, strict=True)
        ]
        if fit(floors):
            break
    omegas = {
        Fraction(k, int(w))
        for w, f, ladder in zip(start, free, ladders, strict=True)
        for k in ladder[1:300]
        if f
    }
    best = floors
    for omega in sorted(omega for omega in omegas if omega >= 1):
        widths = staircase(start.tolist(), floors, ceilings, ladders, omega)
        best = widths if fit(widths) else best
    assert bare.widths(graph).tolist() == best
    # Then what is left is filled, where rounding took most, until no single step fits.
    while steps := [
        (Fraction(width, int(start[index])), index, wider)
        for index, width in enumerate(best)
        for wider in [min(ceilings[index], next(k for k in ladders[index] if k > width))]
        if width < wider and fit([*best[:index], wider, *best[index + 1 :]])
    ]:
        _, index, wider = min(steps)
        best = [*best[:index], wider, *best[index + 1 :]]
    assert full.widths(graph).tolist() == best


def test_fill_uses_what_a_jump_of_constant_widths_leaves() -> None:
    """All three would get wider at the same multiplier; there is room for one, then two."""
    text = """float[8,3,1,1] a, float[8,8,1,1] b, float[8,8,1,1] c, float[5,8,1,1] d)
    => (float[1,5,8,8] y) { p = Conv(x, a)  q = Conv(p, b)  r = Conv(q, c)  y = Conv(r, d) }"""
    graph = lift(model_from_text(HEAD + text))
    whole = make_plan(graph, {}, {})
    free = [group.resizable for group in graph.groups]

    def widths(a: int, b: int, c: int, fill: bool = True) -> list[int]:
        limit = 64 * (3 * a + a * b + b * c + 5 * c)
        made = expand(graph, whole, {"macs": limit}, round_to=8, fill=fill)
        return made.widths(graph)[free].tolist()

    assert widths(16, 16, 8, fill=False) == [8, 8, 8]
    assert widths(16, 8, 8) == [16, 8, 8]
    assert widths(16, 16, 8) == [16, 16, 8]
    assert widths(16, 16, 16, fill=False) == [16, 16, 16]


def test_bounds_by_group() -> None:
    graph = graph_of("residual")
    small = random_plan(graph, 1)
    wide = expand(graph, small, {"flops": "400%"}, max_width={"Conv_q": 9, "*": 40}, round_to=3)
    widths = dict(zip((g.name for g in graph.groups), wide.widths(graph).tolist(), strict=True))
    assert widths["Conv_q"] == 9
    assert max(widths.values()) == 39
    free = expand(graph, small, {"flops": "1e15%"}, round_to=1)  # the most that a plan file may add
    assert set(free.widths(graph) - small.widths(graph)) == {0, 2**16}


@pytest.mark.parametrize(
    "options", [{"max_growth": 0.5}, {"max_growth": float("nan")}, {"max_width": {"*": 0}}]
)
def test_bounds_without_sense_are_refused(options: dict[str, Any]) -> None:
    graph = graph_of("residual")
    with pytest.raises(ArgumentError, match="from 1"):
        expand(graph, random_plan(graph), {"flops": "100%"}, **options)


def test_narrow_groups_are_raised_as_far_as_the_budget_goes() -> None:
    graph = graph_of("residual")
    flops = cost(graph, "flops")
    free = [group.index for group in graph.groups if group.resizable]
    keep = {index: np.arange(1 + place) for place, index in enumerate(free)}  # 1 and 2 channels
    small = make_plan(graph, keep, {})

    def at(level: int) -> float:
        widths = graph.widths.copy()
        widths[free] = level
        return flops.at(widths)

    wide = expand(graph, small, {"flops": at(6)}, min_width=6, round_to=1)
    assert wide.widths(graph)[free].tolist() == [6, 6]
    with pytest.warns(MorphWarning, match="raised to 4 channels"):
        wide = expand(graph, small, {"flops": at(5) - 1}, min_width=6, fill=False, round_to=1)
    assert wide.widths(graph)[free].min() == 4


def test_dead_groups_stay_dead() -> None:
    graph = graph_of("residual")
    small = set_widths(graph, {"Conv_q": 0})
    wide = expand(graph, small, {"flops": "300%"}, min_width=8)
    assert wide.widths(graph)[graph.group("Conv_q").index] == 0
    assert (wide.widths(graph) > graph.widths).any()


def test_a_plan_above_the_budget_is_narrowed_by_the_largest_multiplier(
    graph: ChannelGraph,
) -> None:
    scores = np.random.default_rng(3).uniform(0.1, 1.0, len(graph.channel_group))
    small = plan(graph, {"flops": "80%"}, score=scores, round_to=1)
    resource = cost(graph, "flops")
    limit = 0.4 * resource.total
    start = small.widths(graph).tolist()
    floors = [min(w, 1) if g.resizable else w for w, g in zip(start, graph.groups, strict=True)]
    every = [range(500)] * len(start)
    omegas = {Fraction(k, w) for w in start if w for k in range(1, w)}
    fitting = [
        omega
        for omega in omegas
        if resource.at(np.array(staircase(start, floors, start, every, omega))) <= limit
    ]
    narrow = expand(graph, small, {"flops": "40%"}, fill=False, score=scores, round_to=1)
    largest = staircase(start, floors, start, every, max(fitting))
    assert narrow.widths(graph).tolist() == largest
    for group in graph.groups:
        before = small.keep_channels(graph).get(group.index, np.arange(group.width))
        after = narrow.keep_channels(graph).get(group.index, np.arange(group.width))
        assert set(after) <= set(before)
        gone = np.setdiff1d(before, after)
        if len(gone):
            own = scores[group.channels]
            assert own[gone].max() < own[after].min()
    full = expand(graph, small, {"flops": "40%"}, score=scores, round_to=1)
    assert (full.widths(graph) >= largest).all()
    assert cost(lift(apply(graph, full)), "flops").total == full.cost["flops"].after <= limit


def test_a_budget_below_the_narrowest_network_is_refused(graph: ChannelGraph) -> None:
    with pytest.raises(BudgetError, match="at their narrowest"):
        growth(graph, "80%", "0.5%")


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
        forced = make_plan(graph, {}, {}, added={group.index: 1})
        with pytest.raises(PlanError, match=re.escape(blocked)):
            apply(graph, forced, verify=False)


def test_a_plan_above_the_budget_shrinks_by_finer_steps_where_the_grid_leaves_none() -> None:
    """A convolution of one block that a product reads: half of it is off the grid."""
    graph = lift(
        model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,1,8,8] x, float[16,1,3,3] a, float[16,3] b) => (float[1,3] y)
        { h = Conv(x, a)  i = Relu(h)  j = GlobalAveragePool(i)  k = Flatten(j)
          y = MatMul(k, b) }""")
    )
    whole = uniform(graph, 1.0)
    made = expand(graph, whole, {"flops": "50%"})
    flops = cost(graph, "flops")
    assert 0.4 * flops.total < flops.at(made.widths(graph)) <= 0.5 * flops.total
