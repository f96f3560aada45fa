"""Plans: within budget, monotone, on the grid, and a clear no where there is none."""

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import BudgetError, ModelError, MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.score import Score, score
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.constraints import parse_amount
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths, uniform
from morphgraph.plans import Plan
from morphgraph.testing import model_from_text

TEXT = """
net (float[1,3,8,8] x, float[32,3,3,3] "stem.weight", float[24,32,3,3] "mid.weight",
     float[32,24,1,1] "out.weight", float[20,32,1,1] "last.weight", float[5,20] "fc.weight")
=> (float[1,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, "stem.weight")  r = Relu(a)
    b = Conv<pads=[1,1,1,1]>(r, "mid.weight")  rb = Relu(b)  c = Conv(rb, "out.weight")
    d = Add(r, c)  e = Conv(d, "last.weight")  g = GlobalAveragePool(e)  f = Flatten(g)
    y = Gemm<transB=1>(f, "fc.weight")
}"""
BUDGETS = [0.95, 0.8, 0.6, 0.5, 0.35, 0.2, 0.1, 0.05]


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return lift(model_from_text(TEXT))


def kept(graph: ChannelGraph, made: Plan) -> list[set[int]]:
    changed = made.keep_channels(graph)
    return [
        set(changed.get(group.index, np.arange(group.width)).tolist()) for group in graph.groups
    ]


@pytest.mark.parametrize("kind", ["flops", "params", "memory", "peak", "latency", "macs"])
@pytest.mark.parametrize("how", ["l2", "random", "lasso"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_a_smaller_budget_keeps_a_subset_and_none_is_exceeded(
    graph: ChannelGraph, kind: str, how: Score, round_to: int
) -> None:
    resource = cost(graph, kind)
    floor = WidthBounds(round_to).on(graph).floors
    lowest = resource.at(floor)
    wider: list[set[int]] | None = None
    for share in BUDGETS:
        limit = lowest + share * (resource.total - lowest)
        made = plan(graph, {kind: limit}, score=how, round_to=round_to, seed=3)
        assert resource.at(made.widths(graph)) <= limit
        here = kept(graph, made)
        if wider is not None:
            assert all(small <= large for small, large in zip(here, wider, strict=True))
        wider = here
        for group, width in zip(graph.groups, made.widths(graph), strict=True):
            assert width == group.width or width % round_to == 0


def test_one_channel_more_of_any_group_would_not_have_been_needed(graph: ChannelGraph) -> None:
    """The walk stops at once: giving back the last removed channel breaks the budget."""
    flops = cost(graph, "flops")
    for share in (0.8, 0.5, 0.3):
        made = plan(graph, {"flops": f"{share:.0%}"}, round_to=1)
        widths = made.widths(graph)
        back = [
            flops.at(widths + np.eye(len(widths), dtype=int)[group.index])
            for group in graph.groups
            if widths[group.index] < group.width
        ]
        assert max(back) > share * flops.total


def test_the_strongest_channels_stay(graph: ChannelGraph) -> None:
    made = plan(graph, {"flops": "40%"}, score="l1")
    strength = score(graph, "l1")
    for index, stays in made.keep_channels(graph).items():
        mine = strength[graph.groups[index].channels]
        gone = np.setdiff1d(np.arange(len(mine)), stays)
        assert mine[stays].min() >= mine[gone].max()


def test_several_budgets_hold_at_once(graph: ChannelGraph) -> None:
    made = plan(graph, {"flops": "60%", "params": "30%", "memory": "55%"})
    for kind, share in {"flops": 0.6, "params": 0.3, "memory": 0.55}.items():
        assert cost(graph, kind).at(made.widths(graph)) <= share * cost(graph, kind).total
        assert made.cost[kind].after == cost(graph, kind).at(made.widths(graph))


def test_a_budget_that_cannot_be_met_names_the_lowest(graph: ChannelGraph) -> None:
    flops = cost(graph, "flops")
    floor = np.array([1 if group.resizable else group.width for group in graph.groups])
    lowest = flops.at(floor)
    with pytest.raises(BudgetError) as caught:
        plan(graph, {"flops": lowest - 1}, round_to=1)
    assert f"the lowest that can is {lowest:.6g} FLOPs" in str(caught.value)
    assert "(graph input 'x')" in str(caught.value)
    assert caught.value.exit_code == 1
    made = plan(graph, {"flops": lowest}, round_to=1)
    assert made.widths(graph).tolist() == floor.tolist()


def test_a_budget_that_cannot_be_met_names_what_holds_the_cost(graph: ChannelGraph) -> None:
    """Shares by hand: what the cost would be if that group alone had one channel."""
    flops = cost(graph, "flops")
    limits: list[tuple[dict[str, Any], str, str]] = [
        ({"exclude": ["mid"]}, "mid", "left alone by include or exclude"),
        ({"widths": {"mid": 20}}, "mid", "its width is given by hand"),
        ({"round_to": 8}, "mid", "8 is the least by round-to and min-width"),
        ({"min_width": 5}, "mid", "5 is the least by round-to and min-width"),
    ]
    for options, name, reason in limits:
        with pytest.raises(BudgetError) as caught:
            plan(graph, {"flops": "1%"}, **options)
        bounds = WidthBounds(**options)
        narrow = bounds.lowest(graph)
        before = flops.at(narrow)
        narrow[graph.group(name).index] = 1
        share = (before - flops.at(narrow)) / flops.total
        assert f"'{name}' with {share:.1%} ({reason})" in str(caught.value)


def test_include_exclude_and_min_width(graph: ChannelGraph) -> None:
    assert set(plan(graph, {"flops": "80%"}, include=["mid"]).groups) == {graph.group("mid").id}
    rest = plan(graph, {"flops": "50%"}, exclude=["mid", "la*"])
    assert {entry.name for entry in rest.groups.values()} == {"stem (residual, 2 producers)"}
    narrow = plan(graph, {"flops": "30%"}, min_width=10)
    assert min(len(entry.positions) for entry in narrow.groups.values()) >= 10
    with pytest.raises(BudgetError):
        plan(graph, {"flops": "50%"}, include=["last"])


def test_a_plan_that_changes_nothing_says_so_loudly(graph: ChannelGraph) -> None:
    with pytest.warns(MorphWarning, match="the plan changes nothing"):
        made = plan(graph, {"flops": "100%"})
    assert not made.groups
    text = """
    net (float[1,3,4,4] x, float[6,3,1,1] w) => (float[1,6,4,4] y) { y = Conv(x, w) }"""
    with pytest.warns(MorphWarning, match="graph input 'x'; graph output 'y'"):
        plan(lift(model_from_text(text)), {"flops": "100%"})


def test_uniform_multiplies_every_width(graph: ChannelGraph) -> None:
    made = uniform(graph, 0.5, round_to=1)
    for group, width in zip(graph.groups, made.widths(graph), strict=True):
        assert width == (group.width // 2 if group.resizable else group.width)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = uniform(graph, budget={"flops": "50%"}, round_to=4)
    flops = cost(graph, "flops")
    assert flops.at(fitted.widths(graph)) <= 0.5 * flops.total
    for ratio in np.linspace(fitted.request["uniform"], 1, 50)[1:]:
        allowed = WidthBounds(4).on(graph)
        wider = np.array([allowed.nearest(g.index, ratio * g.width) for g in graph.groups])
        same = (wider == fitted.widths(graph)).all()
        assert same or flops.at(wider) > 0.5 * flops.total
    for ratio in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UnsupportedError, match="uniform ratio"):
            uniform(graph, ratio)


def test_widths_by_hand(graph: ChannelGraph) -> None:
    made = set_widths(graph, {"mid": 7, "stem*": 9})
    assert made.widths(graph)[graph.group("mid").index] == 7
    assert made.widths(graph)[graph.group("stem (residual, 2 producers)").index] == 9
    for pattern, width, why in (
        ("nobody", 3, "no group has that name"),
        ("mid", -1, "has 24 channels"),
        ("mid", 25, "give a width from 0 to that"),
        ("fc", 3, "cannot be resized .graph output 'y'"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            set_widths(graph, {pattern: width})


def test_equal_scores_give_the_width_multiplier(graph: ChannelGraph) -> None:
    equal = np.ones(len(graph.channel_group))
    made = plan(graph, {"flops": "36%"}, score=equal, round_to=1)
    free = [group for group in graph.groups if group.resizable]
    ratios = [made.widths(graph)[group.index] / group.width for group in free]
    assert max(ratios) - min(ratios) < 0.1


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        (np.ones(3), "3 scores for"),
        (np.full(10_000, np.nan), "10000 scores for"),
        (np.nan, "score 3 is NaN"),
        (np.inf, "score 3 is infinite; .* finite"),
        (-np.inf, "score 3 is infinite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    graph: ChannelGraph, scores: np.ndarray | float, why: str
) -> None:
    if isinstance(scores, float):
        number, scores = scores, np.ones(len(graph.channel_group))
        scores[3] = number
    with pytest.raises(UnsupportedError, match=why):
        plan(graph, {"flops": "50%"}, score=scores)


def test_nan_weights_are_refused_by_name(graph: ChannelGraph) -> None:
    model = graph.model.clone()
    array = np.full((24, 32, 3, 3), np.nan, np.float32)
    model.graph.initializers["mid.weight"].const_value = ir.Tensor(array, name="mid.weight")
    with pytest.raises(ModelError, match=r"tensor 'mid\.weight' holds NaN"):
        plan(lift(model), {"flops": "50%"})


def _unit(text: str | int) -> str:
    return {"5ms": "ms", "1GiB": "bytes"}.get(str(text), "FLOPs")


@pytest.mark.parametrize(
    ("text", "amount"),
    [("50%", 40.0), ("300M", 3e8), ("2e6", 2e6), (7, 7.0), ("5ms", 5.0), ("1GiB", 2.0**30)],
)
def test_amounts(text: str | int, amount: float) -> None:
    assert parse_amount(text, 80.0, _unit(text)) == amount


@pytest.mark.parametrize("text", ["", "half", "-5", "5 parsecs", "nan", "inf", "%", "5%%"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(UnsupportedError, match="is no amount"):
        parse_amount(text, 80.0, "FLOPs")


@pytest.mark.parametrize("text", ["5ms", "1GiB", "1e999"])
def test_amounts_of_something_else(text: str) -> None:
    with pytest.raises(UnsupportedError, match="is no amount of FLOPs"):
        parse_amount(text, 80.0, "FLOPs")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_names_no_group_is_refused(graph: ChannelGraph, option: str) -> None:
    globs: Any = {option: ["typo*"]}
    small = plan(graph, {"flops": "50%"})
    for decide in (
        lambda: plan(graph, {"flops": "50%"}, **globs),
        lambda: uniform(graph, 0.5, **globs),
        lambda: expand(graph, small, {"flops": "100%"}, **globs),
    ):
        with pytest.raises(UnsupportedError, match=rf"{option} 'typo\*': no group has that name"):
            decide()


def test_uniform_fills_what_rounding_leaves(graph: ChannelGraph) -> None:
    """No further grid step of any group fits; on a coarse grid the plain ratio leaves a lot."""
    macs = cost(graph, "flops")
    limit = 0.6 * macs.total
    filled = uniform(graph, budget={"flops": "60%"}, round_to=4)
    widths = filled.widths(graph)
    assert macs.at(widths) <= limit
    plain = uniform(graph, filled.request["uniform"], round_to=4)
    assert filled.cost["flops"].after >= plain.cost["flops"].after
    for group in graph.groups:
        if group.resizable and widths[group.index] + 4 <= group.width:
            wider = widths.copy()
            wider[group.index] += 4
            assert macs.at(wider) > limit


@pytest.mark.parametrize("limits", [{"round_to": 0}, {"round_to": -3}, {"min_width": -1}])
def test_a_senseless_grid_is_refused(graph: ChannelGraph, limits: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="give whole numbers"):
        plan(graph, {"flops": "50%"}, **limits)
