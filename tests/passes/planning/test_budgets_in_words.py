"""What is no budget is refused in words wherever budgets are given."""

from collections.abc import Callable
from typing import Any

import pytest

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.testing.examples import image, residual_cnn


def _nothing(net: Any, penalty: Any) -> None:
    """Train nothing."""


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "plan": mg.plan,
    "shrink": lambda graph, budget: mg.shrink(graph, image(8), budget),
    "expand": lambda graph, budget: mg.expand(graph, mg.uniform(graph, 0.5), budget),
    "morph": lambda _, budget: mg.morph(residual_cnn(), image(2), _nothing, budget=budget),
    "trained": lambda _, budget: mg.morph(
        residual_cnn(), image(2), _nothing, budget=budget, start="trained", data=image(8)
    ),
    "family": lambda _, budget: mg.family(
        residual_cnn(), image(2), _nothing, budgets=[budget], data=image(8)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_budget_is_no_text(call: Callable[[Any, Any], object]) -> None:
    graph = mg.lift(mg.export(residual_cnn(), image()))
    for budget in ("50%", ["flops=50%"], 0.5):
        with pytest.raises(ArgumentError, match="is no budget; write one such as"):
            call(graph, budget)


@pytest.mark.parametrize("several", [mg.family, mg.elastic])
def test_several_budgets_are_a_list(several: Callable[..., object]) -> None:
    for budgets in ({"flops": "50%"}, "50%"):
        with pytest.raises(ArgumentError, match="is no list of budgets"):
            several(residual_cnn(), image(2), _nothing, budgets=budgets, data=image(8))
