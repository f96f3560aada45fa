"""Lines with marks in a panel of a picture, and what they are called."""

from collections.abc import Sequence

from morphgraph.report.axes import Frame, svg_text

# Told apart by people who see colours differently (Okabe and Ito 2008), and by their marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_MARKS = ("circle", "square", "triangle", "diamond", "down", "plus", "ring")
_TITLES = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "activation memory",
    "latency": "latency",
}
LEGEND_ROW = 20
"""Height of a line of the legend."""
_ASIDE = 4.0


def cost_title(unit: str) -> str:
    """A cost as people call it.

    >>> cost_title("flops"), cost_title("flops+20*params")
    ('FLOPs', 'flops+20*params')
    """
    return _TITLES.get(unit, unit)


def legend(series: Sequence[str], top: float = 46) -> list[str]:
    """A line with a sign for every series, from ``top`` downwards."""
    parts = []
    for place, name in enumerate(series):
        y = top + LEGEND_ROW * place
        colour = _COLOURS[place % len(_COLOURS)]
        parts.append(f'<path d="M16 {y}h28" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(_mark(30, y, place))
        parts.append(svg_text(54, y + 4, name, 12.5))
    return parts


def curve(
    frame: Frame, points: Sequence[tuple[float, float, float]], place: int, side: float = 0
) -> list[str]:
    """A line through a series' points from the left to the right, with marks and error bars.

    Args:
        frame: the panel.
        points: across, up, and half the length of the error bar (0: none).
        place: of the series in the legend.
        side: how far it stands beside its place: series at the same cost would hide each other.
    """
    colour = _COLOURS[place % len(_COLOURS)]
    ordered = sorted(points, key=lambda point: point[0])
    xs = [frame.x(across) + _ASIDE * side for across, _, _ in ordered]
    ys = [frame.y(up) for _, up, _ in ordered]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for (_, up, error), x, y in zip(ordered, xs, ys, strict=True):
        if error:
            top, bottom = (frame.y(up + s * error) for s in (1, -1))
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
