"""What ``analyze`` prints for people: the totals, and a row per group, layer or operator."""

from collections.abc import Callable, Mapping

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, static_shape
from morphgraph.origin import fixed_text
from morphgraph.report.analysis import Analysis, operators
from morphgraph.report.tables import (
    Report,
    Table,
    amount,
    number_column,
    plain,
    share,
    size,
    table_of,
)


def overview(graph: ChannelGraph, analysis: Analysis, by: str, top: int | None) -> Report:
    """The report of an analysis.

    Args:
        graph: the lifted model.
        analysis: what is known of it; the JSON.
        by: what a row stands for: ``"group"``, ``"layer"`` or ``"op"``.
        top: so many of the most expensive rows; ``None`` for all, in the model's order.
    """
    table = _top(_TABLES[by](graph, analysis), top)
    opaque = [_opaque_table(analysis)] if analysis.opaque_ops else []
    return Report(analysis, [table, *opaque], _head(graph, analysis))


def _sizes(graph: ChannelGraph) -> str:
    """The batch, and the sizes at which inputs with more open sizes are counted."""
    taken = [
        f"{escape(value.name or '')} taken as {'x'.join(map(str, static_shape(value)))}"
        for value in graph.model.graph.inputs
        if any(not isinstance(size, int) for size in (value.shape or ())[1:])
    ]
    return "; ".join([f"batch {graph.batch}", *taken])


def _head(graph: ChannelGraph, analysis: Analysis) -> list[tuple[str, str]]:
    model, totals, reach = analysis.model, analysis.totals, analysis.reach
    resizable = sum(group.resizable for group in analysis.groups)
    macs = totals.macs or 1
    return [
        ("model", f"{escape(model.path)}: opset {model.opset}, {model.ops} ops"),
        ("arithmetic", f"{amount(totals.macs)} MACs = {amount(totals.flops)} FLOPs (2 x MACs)"),
        ("counted", f"per sample, convention '{analysis.convention}'; {_sizes(graph)}"),
        ("parameters", f"{amount(totals.params)}, weights {size(totals.weight_bytes)}"),
        (
            "activations",
            f"{size(totals.activation_bytes)}, at most "
            f"{size(totals.peak_activation_bytes)} alive at once",
        ),
        ("groups", f"{len(analysis.groups)}, of which {resizable} can be resized"),
        (
            "can shrink",
            f"{share(reach.shrinkable_macs / macs)} of the MACs; the lowest reachable is "
            f"{amount(reach.lowest_macs)} MACs ({share(reach.lowest_macs / macs)})",
        ),
        *(
            [("holds for", fixed_text(model.fixed))]
            if model.fixed and analysis.origin is None
            else []
        ),
        *(analysis.origin.lines() if analysis.origin else ()),
    ]


def _group_table(graph: ChannelGraph, analysis: Analysis) -> Table:
    del graph
    return table_of(
        analysis.groups,
        ("id", lambda group: group.id),
        ("group", lambda group: group.name),
        (number_column("width", plain), lambda group: group.width),
        (number_column(f"{analysis.cost.unit} per channel"), lambda group: group.cost_per_channel),
        (number_column("params per channel"), lambda group: group.params_per_channel),
        (number_column("readers", plain), lambda group: len(group.readers)),
        ("keeps its size because", lambda group: group.reason),
    )


def _layer_table(graph: ChannelGraph, analysis: Analysis) -> Table:
    del graph
    total = analysis.cost.total or 1.0
    return table_of(
        analysis.layers,
        ("layer", lambda layer: layer.name),
        ("op", lambda layer: layer.op_type),
        ("output", lambda layer: "x".join(map(str, layer.output_shape))),
        (number_column(analysis.cost.unit), lambda layer: layer.cost),
        (number_column("share", share), lambda layer: layer.cost / total),
        (number_column("MACs"), lambda layer: layer.macs),
        (number_column("params"), lambda layer: layer.params),
    )


def _op_table(graph: ChannelGraph, analysis: Analysis) -> Table:
    total = analysis.totals.macs or 1
    return table_of(
        operators(graph),
        ("node", lambda row: row[0].name),
        ("op", lambda row: row[0].ir.op_type),
        ("layer", lambda row: row[0].layer),
        (number_column("MACs"), lambda row: row[1]),
        (number_column("share", share), lambda row: row[1] / total),
        ("output", lambda row: "x".join(map(str, static_shape(row[0].ir.outputs[0])))),
    )


def _top(table: Table, count: int | None) -> Table:
    """The rows that are highest in the fourth column, which all tables keep their price in."""
    if count is None:
        return table
    rows = sorted(table.rows, key=lambda row: -float(row[3] or 0))[:count]
    return Table(table.columns, rows, table.title)


def _opaque_table(analysis: Analysis) -> Table:
    return table_of(
        analysis.opaque_ops,
        ("operator", lambda op: op.name),
        ("type", lambda op: op.op_type),
        ("not described because", lambda op: op.reason),
        title="Opaque operators: the axes that they touch keep their size",
    )


_TABLES: Mapping[str, Callable[[ChannelGraph, Analysis], Table]] = {
    "group": _group_table,
    "layer": _layer_table,
    "op": _op_table,
}
