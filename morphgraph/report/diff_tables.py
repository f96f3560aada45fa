"""What ``diff`` prints for people."""

from collections.abc import Sequence

from morphgraph.report.differences import Diff, LayerDiff, RemovedLayer
from morphgraph.report.tables import Cell, Column, Report, Table, change, number_column


def diff_report(result: Diff) -> Report:
    """What changed, for people: the totals, and a row per layer that is another one now."""
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
    Column("op", minor=1),
    Column("output", minor=2),
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
