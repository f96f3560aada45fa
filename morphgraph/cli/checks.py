"""What ``apply`` and ``verify`` report of the check against the masked original."""

from dataclasses import asdict
from typing import Any

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.checking.verify import VerifyReport
from morphgraph.plans import Plan
from morphgraph.report.planning import removed_layers
from morphgraph.report.tables import Cell, Report, change, number_column, plain, table_of
from morphgraph.version import __version__

SCHEMA_VERSION = 1


def check_report(graph: ChannelGraph, plan: Plan, report: VerifyReport | None) -> Report:
    """The costs before and after, and the error of every output where it was measured."""
    widths = plan.widths(graph)
    costs = {unit: cost(graph, unit) for unit in ("macs", "flops", "params")}
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "cost": {unit: {"before": c.total, "after": c.at(widths)} for unit, c in costs.items()},
        "verified": report is not None,
    }
    head = [(c.unit, change(c.total, c.at(widths))) for c in costs.values()]
    gone = removed_layers(graph, widths)
    data["removed_layers"] = list(gone)
    if gone:
        head.append(("removed", ", ".join(gone)))
    outputs = table_of(
        () if report is None else report.outputs,
        ("output", lambda output: output.name),
        (number_column("largest error", _small), lambda output: output.max_abs),
        (number_column("of its scale", _small), lambda output: output.relative),
        (number_column("scale", _small), lambda output: output.scale),
        (number_column("sensitivity", _small), lambda output: output.sensitivity),
    )
    if report is None:
        return Report(data, [outputs], [*head, ("check", "not done (--no-verify)")])
    data |= {
        "ok": report.ok,
        "by": report.by,
        "tolerance": report.tolerance,
        # ``felt`` is the former name of ``sensitivity``, for one version.
        "outputs": [asdict(output) | {"felt": output.sensitivity} for output in report.outputs],
    }
    if report.values is not None:
        data["values"] = asdict(report.values)
    verdict = "computes what the masked original computes" if report.ok else "WRONG"
    head.append(
        (
            "check",
            f"{verdict} (in {report.by}); tolerance {report.tolerance:g} of an output's scale",
        )
    )
    head += _reasons(report)
    return Report(data, [outputs], head)


def _reasons(report: VerifyReport) -> list[tuple[str, str]]:
    """What the verdict follows from where the outputs alone do not tell."""
    lines = []
    floors = [output.floor for output in report.outputs if output.floor is not None]
    if floors:
        moved = _small(max(floors))
        lines.append(("rounding", f"alone moves an output of the original by up to {moved}"))
    if report.values is not None:
        worst = report.values.worst
        lines.append(
            (
                "inside",
                f"{report.values.compared} values computed from the same operands; the largest "
                f"error is {_small(worst.relative)} of its scale, in '{escape(worst.name)}'",
            )
        )
    return lines


def _small(value: Cell) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)
