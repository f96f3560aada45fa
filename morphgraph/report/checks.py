"""What ``apply`` and ``verify`` report of the check against the masked original."""

from dataclasses import asdict, replace

import msgspec

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.checking.stepwise import ValuesReport
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.plans import Change, Plan
from morphgraph.report.planning import removed_layers
from morphgraph.report.tables import Cell, Report, change, number_column, plain, table_of
from morphgraph.version import __version__

SCHEMA_VERSION = 1

#: Outputs that a terminal shows: a decoder with caches has hundreds.
MOST_OUTPUTS = 10


class CheckedOutput(msgspec.Struct, frozen=True):
    """The error of one output.

    ``max_abs`` is the largest error of a number, ``relative`` the same as a share of the output's
    ``scale``; ``sensitivity`` how far masking moved the original; ``moved`` the share of numbers
    that it moved; ``told`` of those that were compared; ``floor`` what rounding alone moves.
    ``felt`` is the former name of ``sensitivity``, for one version.
    """

    name: str
    max_abs: float
    scale: float
    relative: float
    sensitivity: float
    moved: float
    told: float
    floor: float | None
    felt: float


class CheckData(msgspec.Struct, frozen=True):
    """What ``apply``, ``verify`` and ``slice`` print: costs, and the check where it was made.

    ``values`` are the errors inside, where the outputs alone do not tell.
    """

    cost: dict[str, Change]
    verified: bool
    removed_layers: list[str]
    ok: bool | msgspec.UnsetType = msgspec.UNSET
    by: str | msgspec.UnsetType = msgspec.UNSET
    tolerance: float | msgspec.UnsetType = msgspec.UNSET
    outputs: list[CheckedOutput] | msgspec.UnsetType = msgspec.UNSET
    values: ValuesReport | msgspec.UnsetType = msgspec.UNSET
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def check_report(graph: ChannelGraph, plan: Plan, report: VerifyReport | None) -> Report:
    """The costs before and after, and the error of every output where it was measured."""
    widths = plan.widths(graph)
    costs = {unit: cost(graph, unit) for unit in ("macs", "flops", "params")}
    gone = removed_layers(graph, widths)
    data = CheckData(
        cost={unit: Change(c.total, c.at(widths)) for unit, c in costs.items()},
        verified=report is not None,
        removed_layers=list(gone),
    )
    head = [(c.unit, change(c.total, c.at(widths))) for c in costs.values()]
    if gone:
        head.append(("removed", ", ".join(gone)))
    checked = () if report is None else report.outputs
    if len(checked) > MOST_OUTPUTS:
        checked = tuple(sorted(checked, key=lambda output: output.relative, reverse=True))
    outputs = table_of(
        checked,
        ("output", lambda output: output.name),
        (number_column("largest error", _small), lambda output: output.max_abs),
        (number_column("of its scale", _small), lambda output: output.relative),
        (number_column("scale", _small), lambda output: output.scale),
        (number_column("sensitivity", _small), lambda output: output.sensitivity),
    )
    outputs = replace(outputs, most=MOST_OUTPUTS)
    if report is None:
        return Report(data, [outputs], [*head, ("check", "not done (--no-verify)")])
    data = msgspec.structs.replace(
        data,
        ok=report.ok,
        by=report.by,
        tolerance=report.tolerance,
        outputs=[CheckedOutput(**asdict(o), felt=o.sensitivity) for o in report.outputs],
        values=msgspec.UNSET if report.values is None else report.values,
    )
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
