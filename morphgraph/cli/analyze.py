"""``morphgraph analyze``: which channels live and die together, and what they cost."""

from pathlib import Path
from typing import Annotated, Literal

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show
from morphgraph.cli.models import Lifting, open_graph, some, warn_of_weights
from morphgraph.cli.pages import ReportFile, command_line, write_page
from morphgraph.cli.shared_options import DeviceFile, OutputFormat, Overwrite, check_output
from morphgraph.cli.width_options import Counting
from morphgraph.errors import warn
from morphgraph.folders.found import model_file
from morphgraph.graph import ChannelGraph
from morphgraph.labels import label
from morphgraph.onnx_io import escape, load, save, static_shape
from morphgraph.options import option
from morphgraph.passes.analysis.cost import on_device
from morphgraph.report.analysis import (
    Analysis,
    analyze as analyze_graph,
    operators,
)
from morphgraph.report.explain import explain
from morphgraph.report.explanation import explanation_report
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


@command
def analyze(
    model: Path,
    *,
    by: Annotated[
        Literal["group", "layer", "op"], option("What a row of the table stands for.")
    ] = "group",
    cost_kind: Annotated[
        str,
        option(
            "The cost that rows are priced with: flops, params, memory, latency@P100 (a device), "
            "flops+20*params (a weighted sum), ...",
            "--cost",
            metavar="COST",
        ),
    ] = "flops",
    device: DeviceFile = None,
    name: Annotated[
        str | None,
        option(
            "Tell the life of a group: by its id or name, a layer, a tensor, an operator, or a "
            "glob.",
            "--explain",
            metavar="NAME",
        ),
    ] = None,
    top: Annotated[
        int | None,
        option("Only the N most expensive rows.", ge=1, metavar="N"),
    ] = None,
    convention: Counting = "default",
    annotate: Annotated[
        Path | None,
        option(
            "Write a copy whose nodes are labelled with their channel groups in its metadata, as "
            "Netron shows it.",
            metavar="labelled.onnx",
        ),
    ] = None,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Show a model's channel groups, what they cost, and which can shrink.

    JSON always holds all layers and groups; --by and --top choose the rows of the other formats.
    """
    for output in (annotate, report):
        check_output(output, overwrite, model)
    model = model_file(model)
    graph = open_graph(model, lifting)
    if name is not None:
        show(explanation_report(explain(graph, name, convention=convention)), output_format)
        return
    broken = warn_of_weights(model, graph)
    analysis = analyze_graph(
        graph,
        model,
        cost_kind=next(iter(on_device({cost_kind: None}, device))),
        convention=convention,
        not_finite=broken,
    )
    _warn_of_opaque(model, analysis)
    tables = {"group": _group_table, "layer": _layer_table, "op": _op_table}
    table = _top(tables[by](graph, analysis), top)
    opaque = [_opaque_table(analysis)] if analysis.opaque_ops else []
    show(Report(analysis, [table, *opaque], _head(graph, analysis)), output_format)
    if report is not None:
        from morphgraph.report.pages.gather import Resized, resized_facts

        shown = Resized(model.name, graph, command=command_line())
        write_page(report, resized_facts(shown), overwrite)
    if annotate is not None:
        _write_labelled(graph, model, annotate, overwrite)


def _write_labelled(graph: ChannelGraph, model: Path, output: Path, overwrite: bool) -> None:
    """Write a model as its file has it, with the names of its groups."""
    labelled = load(model)
    count = label(labelled, graph)
    save(labelled, output, overwrite)
    note(f"wrote {escape(str(output))}: {count} nodes are labelled")


def _warn_of_opaque(model: Path, analysis: Analysis) -> None:
    if analysis.opaque_ops:
        names = some([op.name for op in analysis.opaque_ops])
        warn(
            f"{escape(str(model))}: operators that are not described; the channels that they touch "
            f"keep their size: {names}",
        )


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
