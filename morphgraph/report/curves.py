"""Accuracy against cost: the results of a sweep, as a table and as a picture."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.recipes.sweep import Row
from morphgraph.report.runs import NAMES, budget_text, duration, shares_text
from morphgraph.report.tables import (
    Cell,
    Report,
    Table,
    columns,
    cost_title,
    number_column,
    percent,
    plain,
    share,
)
from morphgraph.report.vega import Mark, Panel, picture


@dataclass(frozen=True)
class Point:
    """One budget of one method: means over seeds, and their standard errors (0 of one seed)."""

    series: str
    budget: str
    seeds: int
    accuracy: float
    error: float
    shares: dict[str, float]


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Rows that differ in their seeds alone, as one point each; in the order of the rows."""
    own_cost = all(row.cost in row.budget for row in rows)
    units = {unit for row in rows for unit in row.budget}
    gathered: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        budget = budget_text(row.budget)
        name = NAMES["slim" if row.method == "morph" else row.method]
        if row.method == "morph" and not own_cost:
            name += f", regularized by {cost_title(row.cost)}"
        if len(units) > 1 and row.method != "base":
            name += f" (budget on {cost_title(next(iter(row.budget)))})"
        gathered[name, budget].append(row)
    return [_point(name, budget, same) for (name, budget), same in gathered.items()]


def _point(name: str, budget: str, rows: Sequence[Row]) -> Point:
    accuracies = np.array([row.accuracy for row in rows])
    spread = float(accuracies.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    shares = {unit: float(np.mean([r.shares[unit] for r in rows])) for unit in rows[0].shares}
    return Point(name, budget, len(rows), float(accuracies.mean()), spread, shares)


def row_line(row: Row, done: int, of: int, left: float) -> str:
    """A line of progress: what a run came to, and the seconds left for all of them."""
    return (
        f"{done}/{of}: {row.method} at {budget_text(row.budget)}, seed {row.seed}: "
        f"accuracy {row.accuracy:.2%}, {shares_text(row.shares)}; {duration(left)} left"
    )


def sweep_report(rows: Sequence[Row], written: Sequence[str] = ()) -> Report:
    """A row per method and budget."""
    points = points_of(rows)
    units = _shared_units(points)
    titles = columns(
        "method",
        "budget",
        number_column("seeds", plain),
        number_column("accuracy", percent),
        number_column("standard error", percent),
        *(number_column(f"{cost_title(unit)} of original", share) for unit in units),
    )
    cells: list[list[Cell]] = [
        [
            point.series,
            point.budget,
            point.seeds,
            point.accuracy,
            point.error if point.seeds > 1 else None,
            *(point.shares.get(unit) for unit in units),
        ]
        for point in points
    ]
    foot = ["written: " + ", ".join(written)] if written else []
    return Report(rows, [Table(titles, cells)], foot=foot)


def _shared_units(points: Sequence[Point]) -> list[str]:
    """The costs that all points have."""
    first = dict.fromkeys(unit for point in points for unit in point.shares)
    return [unit for unit in first if all(unit in point.shares for point in points)]


def curves_svg(rows: Sequence[Row], data: str) -> str:
    """A picture of accuracy against every cost, one panel each; bars are standard errors.

    Args:
        rows: of one model and one dataset.
        data: what the dataset is called.

    Raises:
        UnsupportedError: Vega is not installed.
    """
    points = points_of(rows)
    panels = [
        Panel(
            f"{cost_title(unit)} (% of the original)",
            "test accuracy (%)",
            [
                Mark(each.series, 100 * each.shares[unit], 100 * each.accuracy, 100 * each.error)
                for each in points
            ],
        )
        for unit in _shared_units(points)
    ]
    label = f"Test accuracy on {data} against cost, by method"
    return picture(panels, _title_line(rows, points, data), label)


def _title_line(rows: Sequence[Row], points: Sequence[Point], data: str) -> str:
    seeds = sorted({point.seeds for point in points})
    many = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    word = "seed" if seeds[-1] == 1 else "seeds"
    bars = "; bars: standard error of the mean" if seeds[-1] > 1 else ""
    epochs = max(row.epochs for row in rows)
    return f"{data}: {epochs} epochs, {many} {word}{bars}"
