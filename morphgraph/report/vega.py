"""Curves as a picture in SVG, drawn by Vega; the file needs no other, and no network."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from morphgraph.errors import UnsupportedError
from morphgraph.words import escape

# Told apart by people who see colours differently (Okabe and Ito 2008), and by their marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_SIZE = (380, 260)  # pixels of a panel without labels
_ACROSS = 2  # panels beside each other
_FONT = "Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Mark:
    """A point of a curve; ``error`` is half the length of its error bar, 0 for none."""

    series: str
    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes, which these titles name."""

    across: str
    up: str
    marks: Sequence[Mark]


def require_vega() -> None:
    """Refuse before any work is done for a picture that cannot be drawn.

    Raises:
        UnsupportedError: says what to install.
    """
    try:
        import vl_convert  # noqa: F401 - whether it is there
    except ImportError:
        raise UnsupportedError(
            "pictures of curves need Vega; install it with `pip install 'morphgraph[report]'`"
        ) from None


def picture(panels: Sequence[Panel], title: str, label: str) -> str:
    """Panels of curves as an SVG file; the same curves give the same file.

    Args:
        panels: with one legend for all.
        title: above them.
        label: what the picture shows, for those who hear it.

    Raises:
        UnsupportedError: Vega is not installed.
    """
    require_vega()
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(_spec(panels, title))
    told = html.escape(escape(label))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1) + "\n"


def _spec(panels: Sequence[Panel], title: str) -> dict[str, Any]:
    series = list(dict.fromkeys(escape(m.series) for panel in panels for m in panel.marks))
    return {
        "$schema": _SCHEMA,
        "title": {"text": escape(title), "anchor": "start"},
        "columns": _ACROSS,
        "concat": [_panel(panel, series) for panel in panels],
        "config": {"font": _FONT, "view": {"stroke": "#8c959f"}},
    }


def _panel(panel: Panel, series: Sequence[str]) -> dict[str, Any]:
    """One panel: lines, marks, and error bars where there are any."""
    colour = {
        "field": "series",
        "type": "nominal",
        "title": None,
        "scale": {"domain": series, "range": [*_COLOURS] * (len(series) // len(_COLOURS) + 1)},
        "legend": {"orient": "top", "columns": 1, "symbolType": "stroke", "labelLimit": 0},
    }
    across = {
        "field": "x",
        "type": "quantitative",
        "title": escape(panel.across),
        "scale": {"zero": False, "padding": 12},
    }
    up = across | {"field": "y", "title": escape(panel.up)}
    shape = colour | {"scale": {"domain": series}}
    bars = {"field": "low", "type": "quantitative", "title": escape(panel.up)}
    values = [
        {
            "series": escape(mark.series),
            "x": mark.x,
            "y": mark.y,
            "low": mark.y - mark.error,
            "high": mark.y + mark.error,
        }
        for mark in sorted(panel.marks, key=lambda mark: mark.x)
    ]
    has_error = "datum.high > datum.low"
    return {
        "width": _SIZE[0],
        "height": _SIZE[1],
        "data": {"values": values},
        "encoding": {"x": across, "color": colour},
        "layer": [
            {"mark": {"type": "line", "aria": False}, "encoding": {"y": up}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"y": up, "shape": shape},
            },
            {
                "transform": [{"filter": has_error}],
                "mark": {"type": "errorbar", "ticks": True},
                "encoding": {"y": bars, "y2": {"field": "high"}},
            },
        ],
    }
