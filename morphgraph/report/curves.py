"""Accuracy against cost: the results of a sweep, as a table and as a picture."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.recipes.sweep import Row
from morphgraph.report.axes import Axis, Frame, svg_page, svg_text
from morphgraph.report.runs import NAMES, budget_text, duration, shares_text
from morphgraph.report.tables import (
    Cell,
    Report,
    Table,
    columns,
    number_column,
    percent,
    plain,
    share,
)

# Told apart by people who see colours differently (Okabe and Ito 2008), and by their marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_MARKS = ("circle", "square", "triangle", "diamond", "down", "plus", "ring")
_TITLES = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "activation memory",
    "latency": "latency",
}
_PANEL = (470, 330)  # width and height with labels
_LEGEND_ROW = 20
_ASIDE = 4.0


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
            name += f", regularized by {_title(row.cost)}"
        if len(units) > 1 and row.method != "base":
            name += f" (budget on {_title(next(iter(row.budget)))})"
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
        *(number_column(f"{_title(unit)} of original", share) for unit in units),
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


def _title(unit: str) -> str:
    return _TITLES.get(unit, unit)


def _shared_units(points: Sequence[Point]) -> list[str]:
    """The costs that all points have."""
    first = dict.fromkeys(unit for point in points for unit in point.shares)
    return [unit for unit in first if all(unit in point.shares for point in points)]


def curves_svg(rows: Sequence[Row], data: str) -> str:
    """A picture of accuracy against every cost, one panel each; bars are standard errors.

    It needs no other file, and no font but one without serifs.

    Args:
        rows: of one model and one dataset.
        data: what the dataset is called.
    """
    points = points_of(rows)
    units = _shared_units(points)
    series = list(dict.fromkeys(point.series for point in points))
    across = min(len(units), 2)
    down = math.ceil(len(units) / across)
    width = across * _PANEL[0]
    head = 44 + _LEGEND_ROW * len(series)
    height = head + down * _PANEL[1] + 10
    low = min(point.accuracy - point.error for point in points)
    high = max(point.accuracy + point.error for point in points)
    vertical = Axis.around(100 * low, 100 * high)
    parts = [_title_line(rows, points, data), *_legend(series)]
    for index, unit in enumerate(units):
        corner = ((index % across) * _PANEL[0], head + index // across * _PANEL[1])
        shares = [100 * point.shares[unit] for point in points]
        frame = Frame(corner, _PANEL, Axis.around(min(shares), max(shares)), vertical)
        parts += frame.draw(f"{_title(unit)} (% of the original)", "test accuracy (%)")
        for place, name in enumerate(series):
            own = [point for point in points if point.series == name]
            parts += _curve(frame, unit, own, place, place - (len(series) - 1) / 2)
    return svg_page(width, height, f"Test accuracy on {data} against cost, by method", parts)


def _title_line(rows: Sequence[Row], points: Sequence[Point], data: str) -> str:
    seeds = sorted({point.seeds for point in points})
    many = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    word = "seed" if seeds[-1] == 1 else "seeds"
    bars = "; bars: standard error of the mean" if seeds[-1] > 1 else ""
    epochs = max(row.epochs for row in rows)
    return svg_text(16, 26, f"{data}: {epochs} epochs, {many} {word}{bars}", 14, weight=600)


def _legend(series: Sequence[str]) -> list[str]:
    parts = []
    for place, name in enumerate(series):
        y = 46 + _LEGEND_ROW * place
        colour = _COLOURS[place % len(_COLOURS)]
        parts.append(f'<path d="M16 {y}h28" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(_mark(30, y, place))
        parts.append(svg_text(54, y + 4, name, 12.5))
    return parts


def _curve(frame: Frame, unit: str, points: Sequence[Point], place: int, side: float) -> list[str]:
    """A line through a series' points from the left to the right, with marks and error bars.

    Series stand a little beside each other, or those at the same cost would hide each other.
    """
    colour = _COLOURS[place % len(_COLOURS)]
    ordered = sorted(points, key=lambda point: point.shares[unit])
    xs = [frame.x(100 * point.shares[unit]) + _ASIDE * side for point in ordered]
    ys = [frame.y(100 * point.accuracy) for point in ordered]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for point, x, y in zip(ordered, xs, ys, strict=True):
        if point.error:
            top, bottom = (frame.y(100 * (point.accuracy + s * point.error)) for s in (1, -1))
            parts.append(
                f'<path d="M{x - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8" fill="none" '
                f'stroke="{colour}" stroke-width="1.2"/>'
            )
        parts.append(_mark(x, y, place))
    return parts


def _mark(x: float, y: float, place: int) -> str:
    """The sign of a series, centred."""
    colour, shape = _COLOURS[place % len(_COLOURS)], _MARKS[place % len(_MARKS)]
    at = f"M{x:.1f} {y:.1f}"
    paths = {
        "square": f"{at}m-4 -4h8v8h-8z",
        "triangle": f"{at}m0 -5l5 9h-10z",
        "diamond": f"{at}m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "down": f"{at}m0 5l5 -9h-10z",
        "plus": f"{at}m-1.5 -5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    }
    if shape in paths:
        return f'<path d="{paths[shape]}" fill="{colour}"/>'
    fill = colour if shape == "circle" else "#ffffff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{fill}" stroke="{colour}"/>'
