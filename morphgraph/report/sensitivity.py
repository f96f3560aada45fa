"""What halving each group alone does, as a table."""

import math
from collections.abc import Callable, Sequence

import msgspec

from morphgraph.passes.checking.sensitivity import Sensitivity
from morphgraph.report.tables import Cell, Report, number_column, plain, share, table_of
from morphgraph.version import __version__

SCHEMA_VERSION = 1


class SensitivityReport(msgspec.Struct, frozen=True):
    """What halving each group alone does to the outputs, the least harmful first.

    An error that is not finite is null.
    """

    inputs: str
    rows: list[Sensitivity]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def sensitivity_report(rows: Sequence[Sensitivity], inputs: str) -> Report:
    """A row per group; ``inputs`` says what the network was run on."""
    outputs = list(rows[0].error) if rows else []
    table = table_of(
        rows,
        ("id", lambda row: row.id),
        ("group", lambda row: row.name),
        (number_column("width", plain), lambda row: row.width),
        (number_column("halved", plain), lambda row: row.kept),
        *((number_column(f"error {name}", share), _error(name)) for name in outputs),
        (number_column("FLOPs saved", share), lambda row: row.saved["flops"]),
        (number_column("params saved", share), lambda row: row.saved["params"]),
    )
    head = [("inputs", inputs), ("error", "of an output, relative to it, with that group halved")]
    return Report(SensitivityReport(inputs, list(rows)), [table], head)


def _error(name: str) -> Callable[[Sensitivity], Cell]:
    return lambda row: row.error[name] if math.isfinite(row.error[name]) else "infinite"
