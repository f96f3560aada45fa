"""The facts of a report page on a network that was shrunk by calibration inputs."""

from collections.abc import Sequence

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.calibration.outputs import OutputCheck
from morphgraph.passes.lift import lift
from morphgraph.report.pages.facts import Curve, CurvePoint, Facts
from morphgraph.report.pages.gather import Resized, made_by, resized_facts
from morphgraph.report.runs import NAMES
from morphgraph.report.shrinking import Calibrated, errors_table
from morphgraph.report.tables import cost_title, percent, share
from morphgraph.shrinker import CurvePoint as BudgetPoint
from morphgraph.shrinking import ShrinkResult

_CHOSEN = "this network"


def shrink_facts(
    graph: ChannelGraph,
    result: ShrinkResult,
    curve: Sequence[BudgetPoint],
    kind: str,
    calibration: Calibrated,
    name: str,
    command: str,
    multiplied: ShrinkResult | None = None,
) -> Facts:
    """The facts of a shrink.

    Args:
        graph: the original.
        result: what came out.
        curve: what other budgets cost; empty where it was not asked for.
        kind: of the curve's cost.
        calibration: what it was calibrated with.
        name: of the model.
        command: that made it.
        multiplied: the width multiplier at the same budget, made alike; ``None`` where none fits.
    """
    after = lift(result.model, **graph.options.arguments())
    resized = Resized(
        name,
        graph,
        after,
        plan=result.plan,
        quality=[*_perplexity(result), *(row for check in result.error for row in _quality(check))],
        command=command,
    )
    inputs = f"{calibration.data}: {calibration.fitted} fitted to, {calibration.held_out} held out"
    return resized_facts(
        resized,
        curve=_curve(graph, result, curve, kind, multiplied),
        tables=[errors_table(result)],
        made=[("calibration inputs", inputs), *made_by(resized)],
    )


def _perplexity(result: ShrinkResult) -> list[tuple[str, str, str]]:
    """Of a language model: before, and of what is written."""
    found = result.perplexity
    if found is None:
        return []
    stages = (found.tuned, found.refitted, found.resized)
    last = next(value for value in stages if value is not None)
    return [("perplexity on held-out text", f"{found.original:.2f}", f"{last:.2f}")]


def _quality(check: OutputCheck) -> list[tuple[str, str, str]]:
    rows = [(f"error of '{check.name}' on inputs held out", "0", share(check.error))]
    if check.agreement is not None:
        rows.append((f"same arg max in '{check.name}'", percent(1.0), percent(check.agreement)))
    return rows


def _curve(
    graph: ChannelGraph,
    result: ShrinkResult,
    points: Sequence[BudgetPoint],
    kind: str,
    multiplied: ShrinkResult | None,
) -> Curve:
    """What other budgets cost the outputs, with this network, the original and the multiplier.

    Shown is how often the largest number stays the same where every output tells that, else the
    largest error of an output.
    """
    others = () if multiplied is None else multiplied.error
    checks = [*result.error, *others, *(check for point in points for check in point.outputs)]
    agrees = all(check.agreement is not None for check in checks)

    def value(outputs: Sequence[OutputCheck]) -> float:
        if agrees:
            return min(check.agreement or 0.0 for check in outputs)
        return max(check.error for check in outputs)

    price = cost(graph, kind)

    def left(made: ShrinkResult) -> float:
        return price.at(made.plan.widths(graph)) / price.total

    found = [
        CurvePoint("other budgets", each.reached, value(each.outputs), label=share(each.share))
        for each in points
    ]
    found.append(CurvePoint("original", 1.0, 1.0 if agrees else 0.0, label="original"))
    if multiplied is not None:
        place = left(multiplied), value(multiplied.error)
        found.append(CurvePoint(NAMES["uniform"], *place, label=NAMES["uniform"]))
    found.append(CurvePoint(_CHOSEN, left(result), value(result.error), label=_CHOSEN))
    quality = "same arg max as the original" if agrees else "error of the outputs"
    return Curve(cost_title(kind), quality, found, _CHOSEN)
