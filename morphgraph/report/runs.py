"""The results of a run as a table, its networks side by side; and its progress in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphgraph.benchmark import BenchResult
from morphgraph.options import Method
from morphgraph.plans import Change
from morphgraph.recipes.results import Arm, Result
from morphgraph.recipes.sweep import Row
from morphgraph.report.tables import (
    Cell,
    Report,
    Table,
    columns,
    number_column,
    percent,
    plain,
    share,
    table_of,
)
from morphgraph.train.smoke import SmokeReport

NAMES = {
    "base": "original",
    "uniform": "width multiplier",
    "l2": "magnitude pruning",
    "bn": "BatchNorm-scale pruning",
    "random": "random pruning",
    "slim": "morphgraph",
    "elastic": "elastic, whole",
}


def result_report(result: Result, folder: Path, timing: BenchResult | None = None) -> Report:
    """The arms of a run; with their times in ONNX Runtime where they were measured.

    Args:
        result: of :func:`morphgraph.recipes.run.run`.
        folder: where the run wrote its files.
        timing: of the arms' files, in the order of ``result.arms``, the original first.
    """
    errors = [found.error for found in result.iterations[-1:]]
    error = max(errors + [member.error for member in result.family])
    head = [
        ("data", result.data),
        *_budgets(result),
        ("check", f"resized equals the masked original (error {error:.1e} of the output's scale)"),
    ]
    foot = [] if timing is None else [timing.verdict]
    plans = [member.plan for member in result.family] or ["plan.json"]
    files = [*(arm.file for arm in result.arms.values()), *plans]
    several = len(result.family) > 1
    files += ["ranking.json"] if several or "elastic" in result.arms else []
    files += ["curves.svg"] if several else []
    files.append("result.json")
    foot.append("written: " + ", ".join(str(folder / name) for name in (*files, "events.jsonl")))
    return Report(result, [arms_table(result, timing)], head, foot)


def arms_table(result: Result, timing: BenchResult | None = None) -> Table:
    """The networks of a run, a row each; with their times where they were measured."""
    titles = columns(
        "network",
        number_column("accuracy", percent),
        number_column("MACs"),
        number_column("of original", share),
        number_column("parameters"),
        number_column("epochs", plain),
    )
    if timing is not None:
        titles += columns(number_column("ms", _ms), "speed-up (95 % interval)")
    base = next(iter(result.arms.values()))
    rows: list[list[Cell]] = []
    for index, (name, arm) in enumerate(result.arms.items()):
        title = NAMES.get(name, name)
        row: list[Cell] = [
            title,
            arm.accuracy,
            arm.macs,
            arm.macs / base.macs if base.macs else None,
            arm.params,
            arm.epochs,
        ]
        if timing is not None:
            row += [timing.models[index].p50_ms, _speed_up(timing, index)]
        rows.append(row)
    return Table(titles, rows)


def _budgets(result: Result) -> list[tuple[str, str]]:
    """Every budget, and with what share of the original's cost it was met."""

    def met(budget: Mapping[str, str], costs: Mapping[str, Change]) -> tuple[str, str]:
        changes = [costs[unit] for unit in budget]
        shares = ", ".join(share(change.after / change.before) for change in changes)
        return "budget", f"{budget_text(budget)}: met with {shares}"

    if result.family:
        return [met(member.budget, member.cost) for member in result.family]
    return [met(result.budget, result.cost)]


def family_rows(result: Result, folder: Path) -> list[Row]:
    """The networks of a family, and the original, as points of a curve."""
    base = result.arms["base"]
    points: list[tuple[Method, Arm, Mapping[str, str]]]
    points = [("base", base, dict.fromkeys(result.family[0].budget, "100%"))]
    points += [("morph", result.arms[each.name], each.budget) for each in result.family]
    return [
        Row(
            key=f"{folder.name}/{arm.file}",
            method=method,
            budget=dict(budget),
            cost=result.regularized,
            seed=result.seed,
            accuracy=arm.accuracy,
            costs={"flops": 2 * arm.macs, "params": arm.params},
            shares={"flops": arm.macs / base.macs, "params": arm.params / base.params},
            epochs=arm.epochs,
            folder=folder.name,
        )
        for method, arm, budget in points
    ]


def smoke_report(report: SmokeReport) -> Report:
    """The sanity checks before a run."""
    checks = table_of(
        report.checks,
        ("penalty", lambda check: check.name),
        (number_column("cost before", share), lambda check: check.before),
        (number_column("after", share), lambda check: check.after),
        (number_column("steps", plain), lambda check: check.steps),
        ("result", lambda check: "pass" if check.passed else f"FAIL: {check.reason}"),
    )
    verdict = "passed: the penalty reaches the network" if report.passed else "FAILED"
    return Report(report, [checks], foot=[verdict])


def event_line(event: Mapping[str, Any]) -> str | None:
    """An event of a run as a line of progress; ``None`` where there is nothing to say."""
    match event["event"]:
        case "resumed":
            return f"resumed where the run was stopped, after {duration(event['at'])}"
        case "finished":
            return f"{event['folder']}: the run is finished already; this is what it came to"
        case "warning":
            return f"warning: {event['name']}"
        case "epoch":
            live = event["live_share"]
            alive = "" if live is None else f", {live:.1%} of the cost alive"
            return (
                f"{event['phase']}: epoch {event['number']}/{event['epochs']}, "
                f"loss {event['loss']:.3f}{alive}, {duration(event['left'])} left"
            )
        case "iteration":
            return (
                f"iteration {event['number']}: shrunk to {event['live']:.1%}, widths x "
                f"{event['omega']:.3g}, now {shares_text(event['cost'])}; "
                f"verified (error {event['error']:.1e}), accuracy {event['accuracy']:.2%}, "
                f"resized {event['resized_accuracy']:.2%}"
            )
        case "resized":
            return (
                f"{event['name']}: resized to {shares_text(event['cost'])}; verified (error "
                f"{event['error']:.1e}), accuracy {event['accuracy']:.2%}"
            )
        case "left out":
            return f"{event['name']}: left out, {event['reason']}"
        case "arm":
            macs = event["macs"] / 1e6
            return f"{event['name']}: accuracy {event['accuracy']:.2%}, {macs:.3g} M MACs"
    return None


def budget_text(budget: Mapping[str, Any]) -> str:
    """A budget as people write it.

    >>> budget_text({"flops": "50%", "params": "2M"})
    'flops=50%, params=2M'
    """
    return ", ".join(f"{unit}={amount}" for unit, amount in budget.items())


def shares_text(shares: Mapping[str, float]) -> str:
    """Costs as shares of the original's.

    >>> shares_text({"flops": 0.5})
    '50.0% of flops'
    """
    return ", ".join(f"{value:.1%} of {unit}" for unit, value in shares.items())


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42.4), duration(200), duration(8000)
    ('42 s', '3 min', '2 h 13 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _ms(value: Cell) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def _speed_up(timing: BenchResult, index: int) -> str:
    model = timing.models[index]
    if model.speedup is None or model.speedup_interval is None:
        return ""
    low, high = model.speedup_interval
    noisy = " (noisy machine)" if model.unstable else ""
    return f"{model.speedup:.2f} ({low:.2f} to {high:.2f}){noisy}"
