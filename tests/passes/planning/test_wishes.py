"""Widths by hand beside a budget, and one width for several groups: by enumeration."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from morphgraph.errors import ArgumentError, BudgetError, PlanError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.score import score
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths, uniform
from morphgraph.plans import Plan
from morphgraph.testing import model_from_text
from morphgraph.workflow import apply, verify

# Two blocks of one kind (an inner width of 24), a stem that both add to, and a layer by itself.
TEXT = """
net (float[1,3,6,6] x, float[16,3,3,3] "stem.weight", float[24,16,1,1] "0.inner.weight",
     float[16,24,1,1] "0.out.weight", float[24,16,1,1] "1.inner.weight",
     float[16,24,1,1] "1.out.weight", float[20,16,1,1] "last.weight", float[5,20] "fc.weight")
=> (float[1,5] y) {
    s = Conv<pads=[1,1,1,1]>(x, "stem.weight")
    a = Conv(s, "0.inner.weight")  ra = Relu(a)  b = Conv(ra, "0.out.weight")  t = Add(s, b)
    c = Conv(t, "1.inner.weight")  rc = Relu(c)  d = Conv(rc, "1.out.weight")  u = Add(t, d)
    e = Conv(u, "last.weight")  g = GlobalAveragePool(e)  f = Flatten(g)
    y = Gemm<transB=1>(f, "fc.weight")
}"""
INNER = "*.inner"


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return lift(model_from_text(TEXT))


def width(graph: ChannelGraph, made: Plan, name: str) -> int:
    return int(made.widths(graph)[graph.group(name).index])


def keeps_the_strongest(graph: ChannelGraph, made: Plan, name: str) -> bool:
    group = graph.group(name)
    strength = score(graph, "l2")[group.channels]
    stays = made.keep_channels(graph).get(group.index, np.arange(group.width))
    return set(stays.tolist()) == set(np.argsort(-strength)[: len(stays)].tolist())


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.5])
def test_one_width_is_the_largest_that_fits(
    graph: ChannelGraph, share: float, round_to: int
) -> None:
    flops = cost(graph, "flops")
    inner = [graph.group(f"{k}.inner").index for k in range(2)]
    budget = {"flops": f"{share:.0%}", "params": f"{1.1 * share:.0%}"}
    for how in (plan, lambda *a, **k: uniform(a[0], budget=a[1], **k)):
        made = how(graph, budget, same=[INNER], include=[INNER], round_to=round_to)

        def fits(common: int) -> bool:
            widths = graph.widths.copy()
            widths[inner] = common
            limits = {"flops": share, "params": 1.1 * share}
            costs = {kind: cost(graph, kind) for kind in limits}
            return all(c.at(widths) <= limits[k] * c.total for k, c in costs.items())

        if not fits(round_to):
            raise AssertionError("the case asks for too little")
        best = max(w for w in range(round_to, 25, round_to) if fits(w))
        assert made.widths(graph)[inner].tolist() == [best, best]
        assert all(keeps_the_strongest(graph, made, f"{k}.inner") for k in range(2))
    assert flops.at(made.widths(graph)) <= share * flops.total


def test_one_width_beside_others_is_no_wider_than_needed(graph: ChannelGraph) -> None:
    """The walk stops at once: one step back of any block breaks the budget."""
    flops = cost(graph, "flops")
    for share, round_to in product((0.7, 0.4, 0.2), (1, 4)):
        made = plan(graph, {"flops": f"{share:.0%}"}, same=[INNER], round_to=round_to)
        widths = made.widths(graph)
        inner: list[int] = []
        others: list[int] = []
        for group in graph.groups:
            if group.resizable:
                (inner if group.name.endswith(".inner") else others).append(group.index)
        assert len({int(widths[index]) for index in inner}) == 1
        steps = [inner, *([index] for index in others)]
        wider = [np.where(np.isin(np.arange(len(widths)), step), round_to, 0) for step in steps]
        assert max(flops.at(np.minimum(widths + more, graph.widths)) for more in wider) > (
            share * flops.total
        )
        assert made.request["same"] == [INNER]


def test_what_is_the_same_shrinks_by_the_sum_of_its_scores(graph: ChannelGraph) -> None:
    """A block whose groups are all weak goes first, one strong group among them holds it back."""
    scores = np.ones(len(graph.channel_group))
    for name, strength in (("0.inner", 1.0), ("1.inner", 1.0), ("last", 1.0)):
        scores[graph.group(name).channels] = np.linspace(1.0, 3.0, graph.group(name).width)
        scores[graph.group(name).channels] *= strength
    # Half of block 0 is nearly unused, all of block 1 is used evenly.
    scores[graph.group("0.inner").channels[:12]] = 1e-6
    scores[graph.group("1.inner").channels] = 1.0
    alone = plan(graph, {"flops": "70%"}, score=scores, include=[INNER], round_to=1)
    tied = plan(graph, {"flops": "70%"}, score=scores, include=[INNER], same=[INNER], round_to=1)
    assert width(graph, alone, "0.inner") < width(graph, tied, "0.inner")
    assert width(graph, tied, "1.inner") < width(graph, alone, "1.inner")
    kept = tied.keep_channels(graph)[graph.group("0.inner").index]
    assert set(range(12, 24)) <= set(kept.tolist())


def test_expansion_holds_one_width(graph: ChannelGraph) -> None:
    flops = cost(graph, "flops")
    small = plan(graph, {"flops": "30%"}, same=[INNER])
    for round_to in (1, 4):
        wide = expand(graph, small, {"flops": "90%"}, same=[INNER], round_to=round_to)
        assert width(graph, wide, "0.inner") == width(graph, wide, "1.inner")
        assert width(graph, wide, "0.inner") > width(graph, small, "0.inner")
        assert flops.at(wide.widths(graph)) <= 0.9 * flops.total
    uneven = set_widths(graph, {"0.inner": 5, "1.inner": 7})
    with pytest.raises(UnsupportedError, match=r"5 channels in the plan and '1.inner' 7"):
        expand(graph, uneven, {"flops": "90%"}, same=[INNER])


def test_globs_with_a_group_in_common_are_one(graph: ChannelGraph) -> None:
    made = plan(graph, {"flops": "40%"}, same=["0.inner", "0.i*", "?.inner"])
    assert width(graph, made, "0.inner") == width(graph, made, "1.inner")


def test_a_same_network_computes_what_the_masked_original_computes(graph: ChannelGraph) -> None:
    made = plan(graph, {"flops": "40%"}, same=[INNER], widths={"last": "50%"})
    assert verify(graph, made, apply(graph, made)).ok


@pytest.mark.parametrize("how", ["plan", "uniform"])
def test_a_width_by_hand_beside_a_budget(graph: ChannelGraph, how: str) -> None:
    flops = cost(graph, "flops")
    wishes: dict[str, int | str] = {"0.inner": "50%", "last": 7}
    if how == "plan":
        made = plan(graph, {"flops": "60%"}, widths=wishes, round_to=1)
    else:
        made = uniform(graph, budget={"flops": "60%"}, widths=wishes, round_to=1)
    assert width(graph, made, "0.inner") == 12
    assert width(graph, made, "last") == 7
    assert keeps_the_strongest(graph, made, "0.inner")
    assert 0.5 * flops.total < flops.at(made.widths(graph)) <= 0.6 * flops.total
    assert made.request["set"] == wishes


@pytest.mark.parametrize("narrow", [1, 2, 12])
def test_the_best_rest_for_a_width_by_hand(graph: ChannelGraph, narrow: int) -> None:
    """With one group left to choose, its width is the largest that fits."""
    flops = cost(graph, "flops")
    wishes = {"stem*": 16, "0.inner": narrow, "last": 20}
    made = plan(graph, {"flops": "70%"}, widths=wishes, round_to=1)
    widths = made.widths(graph)
    index = graph.group("1.inner").index
    assert widths[graph.group("0.inner").index] == narrow
    wider = widths.copy()
    wider[index] += 1
    assert flops.at(widths) <= 0.7 * flops.total
    assert widths[index] == 24 or flops.at(wider) > 0.7 * flops.total


def test_shares_are_rounded_to_the_grid_and_numbers_are_not(graph: ChannelGraph) -> None:
    wishes: dict[str, int | str] = {"0.inner": "40%", "1.inner": 9, "last": "1%"}
    made = uniform(graph, 1.0, widths=wishes, round_to=8)
    assert width(graph, made, "0.inner") == 8  # of 9.6
    assert width(graph, made, "1.inner") == 9
    assert width(graph, made, "last") == 8
    assert width(graph, uniform(graph, 0.5, widths={"*": "75%"}, round_to=1), "0.inner") == 18


def test_the_last_wish_counts_and_one_for_a_block_is_for_all_of_it(graph: ChannelGraph) -> None:
    made = uniform(graph, 0.5, widths={"*inner": 20, "0.inner": 10})
    assert [width(graph, made, f"{k}.inner") for k in range(2)] == [10, 20]
    made = uniform(graph, 0.5, widths={"0.inner": 10}, same=[INNER])
    assert [width(graph, made, f"{k}.inner") for k in range(2)] == [10, 10]


def test_a_group_that_is_removed_by_hand_beside_a_budget(graph: ChannelGraph) -> None:
    flops = cost(graph, "flops")
    made = plan(graph, {"flops": "40%"}, widths={"0.inner": 0})
    assert width(graph, made, "0.inner") == 0
    assert flops.at(made.widths(graph)) <= 0.4 * flops.total
    assert verify(graph, made, apply(graph, made)).ok
    with pytest.raises(PlanError):
        plan(graph, {"flops": "50%"}, widths={"last": 0})


def test_a_budget_that_widths_by_hand_leave_no_room_for(graph: ChannelGraph) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        plan(graph, {"flops": "30%"}, widths={"*": "90%"})


def _same(glob: str, **options: Any) -> Callable[[ChannelGraph], object]:
    return lambda graph: plan(graph, {"flops": "50%"}, same=[glob], **options)


def _set(glob: str, wish: int | str, **options: Any) -> Callable[[ChannelGraph], object]:
    return lambda graph: plan(graph, {"flops": "50%"}, widths={glob: wish}, **options)


@pytest.mark.parametrize(
    ("decide", "error", "why"),
    [
        (_same("iner*"), UnsupportedError, "same 'iner.*': no group .*did you mean"),
        (_same("*"), UnsupportedError, "of different widths: .*'fc'.*; give one glob per kind"),
        (_same("fc"), UnsupportedError, "'fc' cannot be resized .graph output 'y'"),
        (_same("0.inner", exclude=["0*"]), UnsupportedError, "is excluded"),
        (_set("0.iner", 3), UnsupportedError, "set '0.iner': no group .*did you mean '0.inner'"),
        (_set("last", "150%"), ArgumentError, "has 20 channels; .* a share from 0% to 100%"),
        (_set("last", "half"), ArgumentError, "set 'last=half'"),
        (_set("last", 21), UnsupportedError, "has 20 channels"),
        (_set("last", 2, exclude=["la*"]), UnsupportedError, "is excluded"),
    ],
)
def test_wishes_that_cannot_be_met_say_why(
    graph: ChannelGraph, decide: Callable[[ChannelGraph], object], error: type, why: str
) -> None:
    with pytest.raises(error, match=why):
        decide(graph)


# Two blocks of an attention-like pair of layers, whose names tell the block in several spellings.
REPEATED_NAMES = {
    "torch": ("h.{}.mlp.up", "h.{}.mlp.down"),
    "scopes": ("/model/layers.{}/mlp/up/MatMul", "/model/layers.{}/mlp/down/MatMul"),
    "keras": ("net/layer_{}/up/kernel", "net/layer_{}/down/kernel"),
    "experts": ("h.0.experts.{}.up", "h.0.experts.{}.down"),
}


def repeated_blocks(
    names: tuple[str, str], widths: tuple[int, ...], tail: str = ""
) -> ChannelGraph:
    """Residual blocks ``x + down(relu(up(x)))``, and an ``up2`` of the same width in the first."""
    weights, lines, before = [], [], "x"
    for k, width in enumerate(widths):
        up, down = (name.format(k) for name in names)
        weights += [f'float[8,{width}] "{up}"', f'float[{width},8] "{down}"']
        lines.append(
            f'u{k} = MatMul({before}, "{up}")  r{k} = Relu(u{k})  d{k} = MatMul(r{k}, "{down}")'
            f"  s{k} = Add({before}, d{k})"
        )
        before = f"s{k}"
    outputs = f"float[2,8] y{tail and ', ' + tail}"
    head = f"net (float[2,8] x, {', '.join(weights)}) => ({outputs})"
    model = model_from_text(f"{head} {{ {' '.join(lines)} y = Identity({before}) }}")
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = node.inputs[1].name
    return lift(model)


@pytest.mark.parametrize("spelling", REPEATED_NAMES)
@pytest.mark.parametrize("how", ["budget", "uniform"])
def test_repeated_blocks_get_one_width(spelling: str, how: str) -> None:
    graph = repeated_blocks(REPEATED_NAMES[spelling], (24, 24, 16, 24))
    scores = np.random.default_rng(0).random(len(score(graph, "l2")))
    if how == "budget":
        made = plan(graph, {"params": "55%"}, score=scores, same=["repeated"], round_to=1)
        free = plan(graph, {"params": "55%"}, score=scores, round_to=1)
        assert len({w for g, w in zip(graph.groups, free.widths(graph)) if g.width == 24}) > 1
    else:
        made = uniform(graph, 0.5, widths={"*2*": 8}, same=["repeated"], round_to=1)
    found = [int(w) for g, w in zip(graph.groups, made.widths(graph)) if g.width == 24]
    assert found == [found[0]] * 3
    assert found[0] < 24
    assert verify(graph, made, apply(graph, made)).ok
    assert made.request["same"] == ["repeated"]


def test_layers_of_one_block_do_not_correspond() -> None:
    graph = repeated_blocks(("fc{}", "out{}"), (24, 24))
    made = plan(graph, {"params": "75%"}, widths={"fc0": 8}, same=["repeated"], round_to=1)
    assert width(graph, made, "fc0") == 8
    assert width(graph, made, "fc1") > 8


def test_a_block_that_cannot_change_holds_those_that_correspond() -> None:
    graph = repeated_blocks(REPEATED_NAMES["torch"], (24, 24), "float[2,24] u0")
    with pytest.raises(BudgetError, match=r"only unequal widths meet it.*--unequal"):
        plan(graph, {"params": "60%"}, same=["repeated"])
    assert plan(graph, {"params": "60%"}).cost["params"].after <= 0.6 * 2 * 2 * 24 * 8


def test_excluded_blocks_are_free_of_the_others() -> None:
    graph = repeated_blocks(REPEATED_NAMES["torch"], (24, 24, 24))
    made = plan(graph, {"params": "60%"}, same=["repeated"], exclude=["h.0.*"], round_to=1)
    widths = [int(w) for g, w in zip(graph.groups, made.widths(graph)) if g.width == 24]
    assert widths[0] == 24
    assert widths[1] == widths[2] < 24


def test_a_network_in_which_nothing_shrinks_is_refused_by_budget() -> None:
    graph = lift(
        model_from_text("n (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul(x, w) }")
    )
    with pytest.raises(BudgetError, match=r"budget params=6 cannot be met.*every group keeps"):
        plan(graph, {"params": 6})
