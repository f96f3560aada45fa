"""The pictures of a report page."""

from collections.abc import Callable
from typing import Any

from morphgraph.report.pages.facts import Facts
from morphgraph.report.pages.figure import Figure
from morphgraph.report.pages.network_figures import (
    costs_figure,
    flow_figure,
    times_figure,
    widths_figure,
)
from morphgraph.report.pages.training_figures import (
    curve_figure,
    strengths_figure,
    training_figure,
)


def figures(facts: Facts) -> list[Figure]:
    """The pictures that there are facts for, in the order of the page."""
    makers: list[tuple[Any, Callable[..., Figure]]] = [
        (facts.groups, lambda: widths_figure(facts.groups, facts.resized)),
        ([each for each in facts.layers if each.macs[0]], lambda: costs_figure(facts)),
        (facts.curve, lambda: curve_figure(facts.curve)),
        (facts.epochs, lambda: training_figure(facts.epochs)),
        (facts.strengths, lambda: strengths_figure(facts.strengths)),
        (facts.flow, lambda: flow_figure(facts.flow, facts.groups)),
        (facts.times, lambda: times_figure(facts.times)),
    ]
    return [make() for there, make in makers if there]
