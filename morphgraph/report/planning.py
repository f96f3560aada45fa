"""A plan as tables: the groups' widths and the costs, before and after."""

import msgspec
import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.plans import Plan
from morphgraph.report.tables import Cell, Column, Report, Table, number, plain, share


def plan_report(graph: ChannelGraph, made: Plan, convention: Convention) -> Report:
    """Widths of all groups, and every cost that people ask about; its JSON is the plan file."""
    widths = made.widths(graph)
    groups = Table(
        [
            Column("id"),
            Column("group"),
            number("width", plain),
            number("new width", _width),
            number("kept", share),
            Column("keeps its size because"),
        ],
        [
            [
                group.id,
                group.name,
                group.width,
                int(widths[group.index]),
                int(widths[group.index]) / group.width,
                group.reason,
            ]
            for group in graph.groups
        ],
    )
    kinds = list(dict.fromkeys(["macs", "flops", "params", "memory", *made.cost]))
    resources = [cost(graph, kind, convention=convention) for kind in kinds]
    costs = Table(
        [Column("cost"), number("before"), number("after"), number("left", share), Column("unit")],
        [
            [c.kind, c.total, c.at(widths), c.at(widths) / c.total if c.total else None, c.unit]
            for c in resources
        ],
    )
    tables = [groups, costs]
    gone = removed_layers(graph, widths)
    if gone:
        tables.insert(1, Table([Column("removed layer")], [[name] for name in gone], "Layers"))
    return Report(msgspec.Raw(made.to_json()), tables)


def _width(value: Cell) -> str:
    return "removed" if value == 0 else plain(value)


def removed_layers(graph: ChannelGraph, widths: IntArray) -> tuple[str, ...]:
    """Names of the layers of which nothing is left at these widths, ``[groups]``."""
    return liveness(graph, np.flatnonzero(widths == 0).tolist()).removed_layers
