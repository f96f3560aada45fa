"""What ``shrink`` and ``apply --refit`` say of a network that was fitted to calibration inputs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.calibration.outputs import OutputCheck
from morphgraph.plans import Change
from morphgraph.report.planning import removed_layers
from morphgraph.report.tables import (
    Cell,
    Report,
    Table,
    change,
    cost_title,
    number_column,
    plain,
    share,
    table_of,
)
from morphgraph.report.vega import Mark, Panel, picture
from morphgraph.shrinker import CURVE, CurvePoint
from morphgraph.shrinking import COSTS, Perplexity, ShrinkResult
from morphgraph.version import __version__

SCHEMA_VERSION = 1
_BAR = 24  # signs of the longest bar


class OutputError(msgspec.Struct, frozen=True):
    """How far an output is from the original's, on inputs that were held out.

    ``agreement`` is the share of places where the largest number is the same, of outputs that look
    like scores of classes; ``cosine`` the mean over samples that are vectors. What does not apply,
    or is not finite, is null.
    """

    name: str
    error: float | None
    agreement: float | None
    cosine: float | None


class FittedLayer(msgspec.Struct, frozen=True):
    """The error of a layer as a share of the variance of its results, on inputs held out.

    ``before`` is with the sliced kernel and ``after`` with the fitted one, all earlier layers
    fitted; ``places`` is at how many places it was fitted, ``inputs`` how many numbers it takes.
    """

    name: str
    before: float
    after: float
    places: int
    inputs: int


class CurveRow(msgspec.Struct, frozen=True):
    """What a budget costs: the share asked for, the share reached, and the outputs' errors."""

    share: float
    reached: float
    outputs: list[OutputError]
    perplexity: float | None = None


class PerplexityRow(msgspec.Struct, frozen=True):
    """Perplexity of a language model on inputs held out, after every step; null: not done."""

    original: float
    resized: float | None
    refitted: float | None
    tuned: float | None


class Calibrated(msgspec.Struct, frozen=True):
    """The calibration inputs: what they are, and how many are fitted to and held out."""

    data: str
    fitted: int
    held_out: int


class Fitted(msgspec.Struct, frozen=True):
    """The outputs' errors when the network was resized, then fitted, then tuned; null: not done."""

    resized: list[OutputError]
    refitted: list[OutputError] | None
    tuned: list[OutputError] | None
    layers: list[FittedLayer]


class ShrinkReport(msgspec.Struct, frozen=True):
    """What ``shrink`` made of a model, or what budgets would cost it."""

    calibration: Calibrated
    cost: dict[str, Change]
    removed_layers: list[str]
    verified: bool
    result: Fitted | None
    curve_of: str | None
    curve: list[CurveRow]
    perplexity: PerplexityRow | None = None
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def shrink_report(
    graph: ChannelGraph,
    calibration: Calibrated,
    result: ShrinkResult | None,
    curve: Sequence[CurvePoint] = (),
    kind: str | None = None,
    convention: Convention = "default",
) -> Report:
    """What is to be expected of the result, and of other budgets.

    Args:
        graph: the original.
        calibration: what it was calibrated with.
        result: what came out; ``None`` where only the curve was wanted.
        curve: what other budgets cost.
        kind: of the curve's cost; ``None`` where no curve was wanted.
        convention: of the costs.
    """
    head = [("calibration", _calibration_line(calibration))]
    tables: list[Table] = []
    costs: dict[str, Change] = {}
    gone: tuple[str, ...] = ()
    if result is not None:
        widths = result.plan.widths(graph)
        gone = removed_layers(graph, widths)
        costs = dict(result.cost)
        for name, each in costs.items():
            unit = cost(graph, name, convention=convention).unit
            head.append((_cost_name(name, unit), change(each.before, each.after)))
        if gone:
            head.append(("removed", escape(", ".join(gone))))
        head.append(("check", _check_line(result)))
        if result.perplexity is not None:
            head.append(("perplexity", _perplexity_line(result.perplexity)))
        tables.append(errors_table(result))
    if curve and kind is not None:
        tables.append(_curve_table(curve, kind))
    data = ShrinkReport(
        calibration,
        costs,
        list(gone),
        result is not None and result.check is not None,
        None if result is None else fitted(result),
        kind,
        [CurveRow(p.share, p.reached, _errors(p.outputs), _number(p.perplexity)) for p in curve],
        None if result is None else _perplexity_row(result.perplexity),
    )
    checks = [*(result.error if result else ()), *(c for p in curve for c in p.outputs)]
    foot = _meanings(checks)
    if (result and result.perplexity) or any(p.perplexity is not None for p in curve):
        foot.append("perplexity: exp of the mean loss of the next token, on the inputs held out.")
    if kind is not None and len(curve) < len(CURVE):
        foot.append(
            f"No plan reaches {CURVE[len(curve)]:.0%} of {cost_title(kind)}: what keeps its size, "
            "and the options, hold more."
        )
    return Report(data, tables, head, foot)


def _calibration_line(calibration: Calibrated) -> str:
    return (
        f"{calibration.data}: {calibration.fitted} to fit to, {calibration.held_out} held out to "
        "judge by"
    )


def _perplexity_line(found: Perplexity) -> str:
    stages = [(found.refitted, "refitted"), (found.tuned, "tuned")]
    parts = [f"{found.original:.2f} -> {found.resized:.2f} resized"]
    parts += [f"{value:.2f} {stage}" for value, stage in stages if value is not None]
    return ", ".join(parts)


def _perplexity_row(found: Perplexity | None) -> PerplexityRow | None:
    if found is None:
        return None
    later = (_number(value) for value in (found.resized, found.refitted, found.tuned))
    return PerplexityRow(found.original, *later)


def fitted(result: ShrinkResult) -> Fitted:
    """The errors for programs."""
    stages = dict(_stages(result))
    return Fitted(
        _errors(stages["resized"]),
        _errors(stages["refitted"]) if "refitted" in stages else None,
        _errors(stages["tuned"]) if "tuned" in stages else None,
        [FittedLayer(e.name, e.before, e.after, e.places, e.inputs) for e in result.layers],
    )


def errors_table(result: ShrinkResult) -> Table:
    """A row per output and per stage of the work."""
    stages = list(_stages(result))
    rows: list[tuple[str, str, OutputCheck]] = [
        (check.name, stage, check)
        for row in zip(*(checks for _, checks in stages), strict=True)
        for (stage, _), check in zip(stages, row, strict=True)
    ]
    return table_of(
        rows,
        ("output", lambda row: row[0]),
        ("network", lambda row: row[1]),
        *_columns([check for *_, check in rows], lambda row: row[2]),
        title="What to expect: the outputs against the original's, on the inputs held out",
    )


def _meanings(checks: Sequence[OutputCheck]) -> list[str]:
    """What the figures mean."""
    if not checks:
        return []
    lines = ["error: root mean square of the difference, as a share of the output's own."]
    if any(check.agreement is not None for check in checks):
        lines.append("same arg max: how often the largest number is in the same channel.")
    if any(check.cosine is not None for check in checks):
        lines.append("cosine: of the angle between the two vectors, the mean over the inputs.")
    return lines


def layer_lines(result: ShrinkResult, most: int = 8) -> list[str]:
    """The layers whose results are furthest from the original's, a line each."""
    worst = sorted(result.layers, key=lambda layer: -layer.after)[:most]
    return [
        f"layer '{escape(layer.name)}': error {share(math.sqrt(layer.after))} of what it gives, "
        f"{share(math.sqrt(layer.before))} with its kernel only sliced; fitted at {layer.places} "
        f"places to {layer.inputs} inputs"
        for layer in worst
    ]


def curve_svg(curve: Sequence[CurvePoint], kind: str, name: str) -> str:
    """The errors at several budgets as a picture.

    Args:
        curve: the points.
        kind: of the cost.
        name: of the model.

    Raises:
        UnsupportedError: Vega is not installed.
    """
    marks = [
        Mark(check.name, 100 * point.reached, 100 * check.error)
        for point in curve
        for place, check in enumerate(point.outputs)
        if _is_finite(point, place)
    ]
    across = f"{cost_title(kind)} (% of the original)"
    panel = Panel(across, "error on held-out inputs (%)", marks)
    label = f"Errors of the outputs of {escape(name)} against {cost_title(kind)}"
    return picture([panel], f"{escape(name)}: what a budget costs", label)


def _is_finite(point: CurvePoint, output: int) -> bool:
    return math.isfinite(point.outputs[output].error)


def _stages(result: ShrinkResult) -> Iterable[tuple[str, Sequence[OutputCheck]]]:
    """The network as it came out of every step, with its errors."""
    yield "resized", result.before
    if result.layers:
        yield "refitted", result.tuned or result.error
    if result.tuned:
        yield "tuned", result.error


def _errors(checks: Sequence[OutputCheck]) -> list[OutputError]:
    return [
        OutputError(c.name, _number(c.error), _number(c.agreement), _number(c.cosine))
        for c in checks
    ]


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _columns(checks: Sequence[OutputCheck], check_of: Any) -> list[Any]:
    """Columns of what is known of any of these outputs."""
    found: list[Any] = [(number_column("error", _error), lambda row: check_of(row).error)]
    if any(check.agreement is not None for check in checks):
        found.append((number_column("same arg max", _percent), lambda row: check_of(row).agreement))
    if any(check.cosine is not None for check in checks):
        found.append((number_column("cosine", _cosine), lambda row: check_of(row).cosine))
    return found


def _curve_table(curve: Sequence[CurvePoint], kind: str) -> Table:
    rows = [(point, check) for point in curve for check in point.outputs]
    largest = max((c.error for _, c in rows if math.isfinite(c.error)), default=0.0) or 1.0

    def bar(row: tuple[CurvePoint, OutputCheck]) -> str:
        return "=" * math.ceil(_BAR * min(row[1].error / largest, 1.0))

    several = len(curve[0].outputs) > 1
    return table_of(
        rows,
        (number_column("budget", _percent), lambda row: row[0].share),
        (number_column("reached", share), lambda row: row[0].reached),
        *([("output", lambda row: row[1].name)] if several else []),
        *_columns([check for _, check in rows], lambda row: row[1]),
        *([_PERPLEXITY] if curve[0].perplexity is not None else []),
        ("", bar),
        title=f"What budgets on {cost_title(kind)} do to the outputs, on the inputs held out",
    )


_PERPLEXITY = (
    number_column("perplexity", lambda cell: f"{cell:.2f}" if isinstance(cell, float) else ""),
    lambda row: row[0].perplexity,
)


def _check_line(result: ShrinkResult) -> str:
    if result.check is None:
        return "of the resize not done (--no-verify)"
    after = "; fitted after that" if result.layers else ""
    return f"resized, computes what the masked original computes (in {result.check.by}){after}"


def _cost_name(kind: str, unit: str) -> str:
    return unit if kind in COSTS else f"{kind} ({unit})"


def _error(value: Cell) -> str:
    return share(value) if isinstance(value, float) and math.isfinite(value) else "infinite"


def _percent(value: Cell) -> str:
    return share(value)


def _cosine(value: Cell) -> str:
    return f"{value:.4f}" if isinstance(value, float) else plain(value)
