"""What a run came to, as a table: the networks side by side."""

from pathlib import Path

from morphgraph.bench import BenchResult
from morphgraph.report.tables import Cell, Column, Report, Table, amount, number, plain, share
from morphgraph.train.run import Arm, Result

_NAMES = {
    "base": "original",
    "uniform": "width multiplier",
    "slim": "morphgraph",
}


def result_report(result: Result, folder: Path, timing: BenchResult | None = None) -> Report:
    """The arms of a run; with their times in ONNX Runtime where they were measured.

    Args:
        result: of :func:`morphgraph.train.run.run`.
        folder: where the run wrote its files.
        timing: of the arms' files, in the order of ``result.arms``, the original first.
    """
    columns = [
        Column("network"),
        number("accuracy", _accuracy),
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
    ((kind, amount_asked),) = result.budget.items()
    change = result.cost[kind]
    head = [
        ("data", result.data),
        ("budget", f"{kind}={amount_asked}: met with {share(change.after / change.before)}"),
        (
            "check",
            f"resized equals the masked original (error {result.error:.1e} of the output's scale)",
        ),
    ]
    foot = [] if timing is None else [timing.verdict]
    foot.append("written: " + ", ".join(str(folder / name) for name in _written(result)))
    return Report(result, [Table(columns, rows)], head, foot)


def _row(name: str, arm: Arm, base: Arm) -> list[Cell]:
    title = _NAMES.get(name, name)
    return [title, arm.accuracy, arm.macs, arm.macs / base.macs, arm.params, arm.epochs]


def _written(result: Result) -> list[str]:
    return [*(arm.file for arm in result.arms.values()), "plan.json", "result.json", "events.jsonl"]


def _accuracy(value: Cell) -> str:
    return f"{value:.2%}" if isinstance(value, float) else plain(value)


def _ms(value: Cell) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def _speed_up(timing: BenchResult, index: int) -> str:
    model = timing.models[index]
    if model.speedup is None or model.speedup_interval is None:
        return ""
    low, high = model.speedup_interval
    noisy = " (noisy machine)" if model.unstable else ""
    return f"{model.speedup:.2f} ({low:.2f} to {high:.2f}){noisy}"
