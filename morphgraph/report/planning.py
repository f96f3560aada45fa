"""A plan as tables: the groups' widths and the costs, before and after."""

import msgspec
import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.plans import Plan
from morphgraph.report.tables import Cell, Report, Table, columns, number_column, plain, share


def plan_report(graph: ChannelGraph, plan: Plan, convention: Convention) -> Report:
    """Widths of all groups, and every cost that people ask about; its JSON is the plan file."""
    widths = plan.widths(graph)
    groups = Table(
        columns(
            "id",
            "group",
            number_column("width", plain),
            number_column("new width", _width),
            number_column("kept", share),
            "keeps its size because",
        ),
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
    units = dict.fromkeys(["macs", "flops", "params", "memory", *plan.cost])
    resources = [cost(graph, unit, convention=convention) for unit in units]
    amounts = (number_column("before"), number_column("after"), number_column("left", share))
    costs = Table(
        columns("cost", *amounts, "unit"),
        [
            [c.kind, c.total, c.at(widths), c.at(widths) / c.total if c.total else None, c.unit]
            for c in resources
        ],
    )
    tables = [groups, costs]
    removed = removed_layers(graph, widths)
    if removed:
        tables.insert(1, Table(columns("removed layer"), [[name] for name in removed], "Layers"))
    return Report(msgspec.Raw(plan.to_json()), tables)


def _width(value: Cell) -> str:
    return "removed" if value == 0 else plain(value)


def removed_layers(graph: ChannelGraph, widths: IntArray) -> tuple[str, ...]:
    """Names of the layers that are removed as a whole at these widths, ``[groups]``."""
    return liveness(graph, np.flatnonzero(widths == 0).tolist()).removed_layers
