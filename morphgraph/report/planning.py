"""A plan as tables: the groups' widths and the costs, before and after."""

from collections.abc import Callable

import msgspec
import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.plans import Plan
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    columns,
    number_column,
    plain,
    share,
    table_of,
)


def plan_report(graph: ChannelGraph, plan: Plan, convention: Convention) -> Report:
    """Widths of all groups, and every cost that people ask about; its JSON is the plan file."""
    widths = plan.widths(graph)
    groups = table_of(
        graph.groups,
        ("id", lambda group: group.id),
        ("group", lambda group: group.name),
        (number_column("width", plain), lambda group: group.width),
        (number_column("new width", _width), lambda group: int(widths[group.index])),
        (number_column("kept", share), lambda group: int(widths[group.index]) / group.width),
        ("keeps its size because", lambda group: group.reason),
    )
    units = dict.fromkeys(["macs", "flops", "params", "memory", *plan.cost])
    costs = table_of(
        [cost(graph, unit, convention=convention) for unit in units],
        ("cost", lambda c: c.kind),
        (number_column("before"), lambda c: c.total),
        (number_column("after"), lambda c: c.at(widths)),
        (number_column("left", share), lambda c: c.at(widths) / c.total if c.total else None),
        *_after_refit(plan),
        ("unit", lambda c: c.unit),
    )
    tables = [groups, costs]
    removed = removed_layers(graph, widths)
    if removed:
        tables.insert(1, Table(columns("removed layer"), [[name] for name in removed], "Layers"))
    return Report(msgspec.Raw(plan.to_json()), tables)


def _after_refit(plan: Plan) -> list[tuple[Column, Callable[[Cost], Cell]]]:
    """What is left once a fit has added its biases, of a plan that keeps room for them."""
    fitted = plan.request.get("refit")
    if not isinstance(fitted, dict):
        return []
    found = {kind: amount for kind, amount in fitted.items() if isinstance(amount, int | float)}

    def left(resource: Cost) -> Cell:
        known = resource.kind in found and resource.total
        return found[resource.kind] / resource.total if known else None

    return [(number_column("left after refit", share), left)]


def _width(value: Cell) -> str:
    return "removed" if value == 0 else plain(value)


def removed_layers(graph: ChannelGraph, widths: IntArray) -> tuple[str, ...]:
    """Names of the layers that are removed as a whole at these widths, ``[groups]``."""
    return liveness(graph, np.flatnonzero(widths == 0).tolist()).removed_layers
