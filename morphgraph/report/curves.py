"""Accuracy against cost: what a sweep came to, as a table and as a picture."""

import html
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.recipes.sweep import Row
from morphgraph.report.axes import Axis, Frame
from morphgraph.report.runs import NAMES, duration
from morphgraph.report.tables import Cell, Column, Report, Table, number, percent, plain, share

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
    kinds = {kind for row in rows for kind in row.budget}
    gathered: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        budget = ", ".join(f"{kind}={amount}" for kind, amount in row.budget.items())
        name = NAMES["slim" if row.method == "morph" else row.method]
        if row.method == "morph" and not own_cost:
            name += f", regularized by {_title(row.cost)}"
        if len(kinds) > 1 and row.method != "base":
            name += f" (budget on {_title(next(iter(row.budget)))})"
        gathered[name, budget].append(row)
    return [_point(name, budget, same) for (name, budget), same in gathered.items()]


def _point(name: str, budget: str, rows: Sequence[Row]) -> Point:
    accuracies = np.array([row.accuracy for row in rows])
    spread = float(accuracies.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    shares = {kind: float(np.mean([r.shares[kind] for r in rows])) for kind in rows[0].shares}
    return Point(name, budget, len(rows), float(accuracies.mean()), spread, shares)


def row_line(row: Row, done: int, of: int, left: float) -> str:
    """A line of progress: what a run came to, and the seconds left for all of them."""
    budget = ", ".join(f"{kind}={amount}" for kind, amount in row.budget.items())
    costs = ", ".join(f"{value:.1%} of {kind}" for kind, value in row.shares.items())
    return (
        f"{done}/{of}: {row.method} at {budget}, seed {row.seed}: accuracy {row.accuracy:.2%}, "
        f"{costs}; {duration(left)} left"
    )


def sweep_report(rows: Sequence[Row], written: Sequence[str] = ()) -> Report:
    """A row per method and budget."""
    points = points_of(rows)
    kinds = _kinds(points)
    columns = [
        Column("method"),
        Column("budget"),
        number("seeds", plain),
        number("accuracy", percent),
        number("standard error", percent),
        *(number(f"{_title(kind)} of original", share) for kind in kinds),
    ]
    cells: list[list[Cell]] = [
        [
            point.series,
            point.budget,
            point.seeds,
            point.accuracy,
            point.error if point.seeds > 1 else None,
            *(point.shares.get(kind) for kind in kinds),
        ]
        for point in points
    ]
    foot = ["written: " + ", ".join(written)] if written else []
    return Report(rows, [Table(columns, cells)], foot=foot)


def _title(kind: str) -> str:
    return _TITLES.get(kind, kind)


def _kinds(points: Sequence[Point]) -> list[str]:
    """The costs that all points have."""
    first = dict.fromkeys(kind for point in points for kind in point.shares)
    return [kind for kind in first if all(kind in point.shares for point in points)]


def curves_svg(rows: Sequence[Row], data: str) -> str:
    """A picture of accuracy against every cost, one panel each; bars are standard errors.

    It needs no other file, and no font but one without serifs.

    Args:
        rows: of one model and one dataset.
        data: what the dataset is called.
    """
    points = points_of(rows)
    kinds = _kinds(points)
    series = list(dict.fromkeys(point.series for point in points))
    columns = min(len(kinds), 2)
    lines = -(-len(kinds) // columns)
    width = columns * _PANEL[0]
    head = 44 + _LEGEND_ROW * len(series)
    height = head + lines * _PANEL[1] + 10
    low = min(point.accuracy - point.error for point in points)
    high = max(point.accuracy + point.error for point in points)
    vertical = Axis.around(100 * low, 100 * high)
    parts = [_title_line(rows, points, data), *_legend(series)]
    for index, kind in enumerate(kinds):
        corner = ((index % columns) * _PANEL[0], head + index // columns * _PANEL[1])
        shares = [100 * point.shares[kind] for point in points]
        frame = Frame(corner, _PANEL, Axis.around(min(shares), max(shares)), vertical)
        parts += frame.draw(f"{_title(kind)} (% of the original)", "test accuracy (%)")
        for place, name in enumerate(series):
            own = [point for point in points if point.series == name]
            parts += _curve(frame, kind, own, place, place - (len(series) - 1) / 2)
    label = html.escape(f"Test accuracy on {data} against cost, by method")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        f'role="img" aria-label="{label}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _title_line(rows: Sequence[Row], points: Sequence[Point], data: str) -> str:
    seeds = sorted({point.seeds for point in points})
    many = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    word = "seed" if seeds[-1] == 1 else "seeds"
    bars = "; bars: standard error of the mean" if seeds[-1] > 1 else ""
    epochs = max(row.epochs for row in rows)
    text = f"{data}: {epochs} epochs, {many} {word}{bars}"
    return (
        f'<text x="16" y="26" font-size="14" font-weight="600" fill="#14243c">'
        f"{html.escape(text)}</text>"
    )


def _legend(series: Sequence[str]) -> list[str]:
    parts = []
    for place, name in enumerate(series):
        y = 46 + _LEGEND_ROW * place
        colour = _COLOURS[place % len(_COLOURS)]
        parts.append(f'<path d="M16 {y}h28" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(_mark(30, y, place))
        parts.append(
            f'<text x="54" y="{y + 4}" font-size="12.5" fill="#14243c">{html.escape(name)}</text>'
        )
    return parts


def _curve(frame: Frame, kind: str, points: Sequence[Point], place: int, side: float) -> list[str]:
    """A line through a series' points from the left to the right, with marks and error bars.

    Series stand a little beside each other, or those at the same cost would hide each other.
    """
    colour = _COLOURS[place % len(_COLOURS)]
    ordered = sorted(points, key=lambda point: point.shares[kind])
    xs = [frame.x(100 * point.shares[kind]) + _ASIDE * side for point in ordered]
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
