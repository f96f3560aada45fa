"""Widths that go together for the sake of a config: by one ratio, as multiples, or not at all."""

import numpy as np
import pytest

from morphgraph.errors import BudgetError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.ties import Multiple, Ties
from morphgraph.passes.planning.uniform import uniform
from morphgraph.plans import Plan
from morphgraph.testing import model_from_text
from morphgraph.testing.random_weights import randomize_model_weights
from morphgraph.workflow import apply

A, B, C = 24, 8, 16


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    """Layers of 24, 8 and 16 channels in a row."""
    model = model_from_text(
        f"net (float[2,6] x, float[6,{A}] a, float[{A},{B}] b, float[{B},{C}] c, float[{C},3] d)"
        " => (float[2,3] y) { p = MatMul(x, a) q = Relu(p) r = MatMul(q, b) s = Relu(r)"
        " t = MatMul(s, c) u = Relu(t) y = MatMul(u, d) }"
    )
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)}
    return lift(randomize_model_weights(model, feeds))


def params(a: int, b: int, c: int) -> int:
    return 6 * a + a * b + b * c + c * 3


def at(graph: ChannelGraph, width: int) -> int:
    return next(group.index for group in graph.groups if group.width == width)


def widths(graph: ChannelGraph, made: Plan) -> tuple[int, ...]:
    found = made.widths(graph)
    return tuple(int(found[at(graph, width)]) for width in (A, B, C))


@pytest.mark.parametrize("allocation", ["shares", "sum"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("pair", [(A, B), (A, C), (A, B, C)])
def test_widths_change_by_one_ratio(
    graph: ChannelGraph, pair: tuple[int, ...], share: float, allocation: str
) -> None:
    ties = Ties(ratios=(tuple(at(graph, width) for width in pair),), of="Config")
    limit = share * params(A, B, C)
    given = {"round_to": 1, "ties": ties, "allocation": allocation}
    made = plan(graph, {"params": limit}, **given)  # type: ignore[arg-type]
    found = widths(graph, made)
    of = dict(zip((A, B, C), found, strict=True))
    assert len({of[width] / width for width in pair}) == 1
    assert params(*found) <= limit
    assert verify(graph, made, apply(graph, made)).ok
    if len(pair) == 3:  # nothing else is free, so that the largest ratio that fits is right
        best = max(t for t in range(1, 9) if params(3 * t, t, 2 * t) <= limit)
        assert found == (3 * best, best, 2 * best)


def test_a_ratio_is_on_the_grid_of_all(graph: ChannelGraph) -> None:
    ties = Ties(ratios=((at(graph, A), at(graph, B)),))
    allowed = WidthBounds(round_to=4, ties=ties).on(graph)
    assert {allowed.grids[at(graph, width)].pitch for width in (A, B)} == {12, 4}
    floors = WidthBounds(min_width=5, ties=ties).on(graph).floors
    assert (floors[at(graph, A)], floors[at(graph, B)]) == (15, 5)


def test_the_multiplier_keeps_a_ratio(graph: ChannelGraph) -> None:
    ties = Ties(ratios=((at(graph, A), at(graph, B)),))
    for ratio in np.linspace(0.2, 1, 9):
        a, b, _ = widths(graph, uniform(graph, float(ratio), round_to=1, ties=ties))
        assert a == 3 * b


@pytest.mark.parametrize("allocation", ["shares", "sum"])
@pytest.mark.parametrize("share", [0.85, 0.7, 0.55, 0.4])
def test_a_width_is_a_multiple_of_another(
    graph: ChannelGraph, share: float, allocation: str
) -> None:
    of = Multiple((at(graph, A),), (at(graph, B),), 1)
    ties = Ties(multiples=(of,))
    limit = share * params(A, B, C)
    made = plan(graph, {"params": limit}, round_to=1, ties=ties, allocation=allocation)  # type: ignore[arg-type]
    a, b, _ = found = widths(graph, made)
    assert a % b == 0 < a
    assert params(*found) <= limit
    assert of.holds(made.widths(graph))


def test_what_a_config_cannot_say_stays(graph: ChannelGraph) -> None:
    index = at(graph, A)
    ties = Ties(fixed={index: "Config cannot say another width"}, of="Config")
    made = plan(graph, {"params": "80%"}, round_to=1, ties=ties)
    assert widths(graph, made)[0] == A
    assert made.request["config"] == {"of": "Config", "kept": [graph.groups[index].id]}
    with pytest.raises(BudgetError, match="Config cannot say another width"):
        plan(graph, {"params": "30%"}, round_to=1, ties=ties)


def test_a_width_by_hand_takes_along_what_goes_with_it(graph: ChannelGraph) -> None:
    one, other = at(graph, A), at(graph, B)
    ties = Ties(ratios=((one, other),), of="Config")
    id_of = graph.groups[one].id
    made = plan(graph, {"params": "99%"}, widths={id_of: 15}, round_to=1, ties=ties)
    assert widths(graph, made)[:2] == (15, 5)
    with pytest.raises(UnsupportedError, match=r"same ratio.*give a multiple of 3"):
        plan(graph, {"params": "99%"}, widths={id_of: 14}, round_to=1, ties=ties)


def test_what_is_left_alone_holds_what_goes_with_it(graph: ChannelGraph) -> None:
    one, other = at(graph, A), at(graph, B)
    ties = Ties(ratios=((one, other),), of="Config")
    exclude = [graph.groups[other].id]
    made = plan(graph, {"params": "95%"}, exclude=exclude, round_to=1, ties=ties)
    assert widths(graph, made)[:2] == (A, B)
