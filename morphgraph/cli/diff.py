"""``morphgraph diff``: what changed between two models."""

from collections.abc import Sequence
from pathlib import Path

from morphgraph.cli.command import command
from morphgraph.cli.console import show
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.pages import ReportFile, command_line, write_page
from morphgraph.cli.shared_options import OutputFormat, Overwrite, check_output
from morphgraph.folders.found import model_file
from morphgraph.report.differences import Diff, LayerDiff, RemovedLayer, compare
from morphgraph.report.tables import Cell, Column, Report, Table, change, number_column


@command
def diff(
    base: Path,
    slim: Path,
    *,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Show what changed between two models, layer by layer.

    Layers and nodes are matched by name; MACs are per sample.
    """
    check_output(report, overwrite, base, slim)
    base, slim = model_file(base), model_file(slim)
    before, after = open_graph(base, lifting), open_graph(slim, lifting)
    show(_report(compare(before, after, base, slim)), output_format)
    if report is not None:
        from morphgraph.report.pages.gather import Resized, resized_facts

        shown = Resized(base.name, before, after, command=command_line())
        write_page(report, resized_facts(shown), overwrite)


def _report(result: Diff) -> Report:
    before, after = result.before.totals, result.after.totals
    head = [
        ("MACs", change(before.macs, after.macs)),
        ("FLOPs", change(before.flops, after.flops)),
        ("parameters", change(before.params, after.params)),
        ("activations", f"{change(before.activation_bytes, after.activation_bytes)} bytes"),
        (
            "layers",
            f"{len(result.layers)} changed, {len(result.removed_layers)} removed, "
            f"{result.unchanged} did not change",
        ),
    ]
    rows = [*map(_row, result.layers), *map(_removed, result.removed_layers)]
    tables = [Table(_COLUMNS, rows)]
    nodes = [*(["removed", n] for n in result.removed), *(["added", n] for n in result.added)]
    if nodes:
        tables.append(Table([Column("change"), Column("node")], nodes, "Nodes"))
    return Report(result, tables, head)


_COLUMNS = (
    Column("layer"),
    Column("op"),
    Column("output"),
    Column("new output"),
    number_column("MACs"),
    number_column("new MACs"),
    number_column("params"),
    number_column("new params"),
)


def _row(layer: LayerDiff) -> list[Cell]:
    return [
        layer.name,
        layer.op_type,
        _sizes(layer.output_before),
        _sizes(layer.output_after),
        layer.macs.before,
        layer.macs.after,
        layer.params.before,
        layer.params.after,
    ]


def _removed(layer: RemovedLayer) -> list[Cell]:
    sizes = _sizes(layer.output)
    return [layer.name, layer.op_type, sizes, "removed", layer.macs, 0, layer.params, 0]


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
