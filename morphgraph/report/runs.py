"""What a run came to, as a table, the networks side by side; and its progress in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphgraph.benchmark import BenchResult
from morphgraph.recipes.results import Arm, Result
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    amount,
    number,
    percent,
    plain,
    share,
)
from morphgraph.train.smoke import SmokeReport

NAMES = {
    "base": "original",
    "uniform": "width multiplier",
    "l2": "magnitude pruning",
    "bn": "BatchNorm-scale pruning",
    "random": "random pruning",
    "slim": "morphgraph",
}


def result_report(result: Result, folder: Path, timing: BenchResult | None = None) -> Report:
    """The arms of a run; with their times in ONNX Runtime where they were measured.

    Args:
        result: of :func:`morphgraph.recipes.run.run`.
        folder: where the run wrote its files.
        timing: of the arms' files, in the order of ``result.arms``, the original first.
    """
    columns = [
        Column("network"),
        number("accuracy", percent),
        number("MACs", amount),
        number("of original", share),
        number("parameters", amount),
        number("epochs", plain),
    ]
    if timing is not None:
        columns += [number("ms", _ms), Column("speed-up (95 % interval)")]
    base = next(iter(result.arms.values()))
    rows: list[list[Cell]] = []
    for index, (name, arm) in enumerate(result.arms.items()):
        row = _row(name, arm, base)
        if timing is not None:
            row += [timing.models[index].p50_ms, _speed_up(timing, index)]
        rows.append(row)
    asked = ", ".join(f"{kind}={text}" for kind, text in result.budget.items())
    met = ", ".join(_met(result, kind) for kind in result.budget)
    last = result.iterations[-1]
    head = [
        ("data", result.data),
        ("budget", f"{asked}: met with {met}"),
        (
            "check",
            f"resized equals the masked original (error {last.error:.1e} of the output's scale)",
        ),
    ]
    foot = [] if timing is None else [timing.verdict]
    foot.append("written: " + ", ".join(str(folder / name) for name in _written(result)))
    return Report(result, [Table(columns, rows)], head, foot)


def smoke_report(report: SmokeReport) -> Report:
    """The sanity checks before a run."""
    columns = [
        Column("penalty"),
        number("cost before", share),
        number("after", share),
        number("steps", plain),
        Column("result"),
    ]
    rows: list[list[Cell]] = [
        [c.name, c.before, c.after, c.steps, "pass" if c.passed else f"FAIL: {c.reason}"]
        for c in report.checks
    ]
    verdict = "passed: the penalty reaches the network" if report.passed else "FAILED"
    return Report(report, [Table(columns, rows)], foot=[verdict])


def event_line(event: Mapping[str, Any]) -> str | None:
    """An event of a run as a line of progress; ``None`` where there is nothing to say."""
    match event["event"]:
        case "resumed":
            return f"going on where the run was stopped, after {duration(event['at'])}"
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
            costs = ", ".join(f"{value:.1%} of {kind}" for kind, value in event["cost"].items())
            return (
                f"iteration {event['number']}: shrunk to {event['live']:.1%}, widths x "
                f"{event['omega']:.3g}, now {costs}; verified (error {event['error']:.1e}), "
                f"accuracy {event['accuracy']:.2%}, resized {event['resized_accuracy']:.2%}"
            )
        case "left out":
            return f"{event['name']}: left out, {event['reason']}"
        case "arm":
            macs = event["macs"] / 1e6
            return f"{event['name']}: accuracy {event['accuracy']:.2%}, {macs:.3g} M MACs"
    return None


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42.4), duration(200), duration(8000)
    ('42 s', '3 min', '2 h 13 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _met(result: Result, kind: str) -> str:
    change = result.cost[kind]
    return share(change.after / change.before)


def _row(name: str, arm: Arm, base: Arm) -> list[Cell]:
    title = NAMES.get(name, name)
    return [title, arm.accuracy, arm.macs, arm.macs / base.macs, arm.params, arm.epochs]


def _written(result: Result) -> list[str]:
    return [*(arm.file for arm in result.arms.values()), "plan.json", "result.json", "events.jsonl"]


def _ms(value: Cell) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def _speed_up(timing: BenchResult, index: int) -> str:
    model = timing.models[index]
    if model.speedup is None or model.speedup_interval is None:
        return ""
    low, high = model.speedup_interval
    noisy = " (noisy machine)" if model.unstable else ""
    return f"{model.speedup:.2f} ({low:.2f} to {high:.2f}){noisy}"
