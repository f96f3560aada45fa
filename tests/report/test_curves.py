"""Curves: means and errors by hand, and a picture whose points stand where the numbers say."""

import re
import sys
from xml.etree import ElementTree as ET

import pytest

from morphgraph.errors import UnsupportedError
from morphgraph.options import Method
from morphgraph.recipes.sweep import Row
from morphgraph.report.curves import curves_svg, points_of, sweep_report


def row(
    method: Method, budget: str, seed: int, accuracy: float, flops: float, cost: str = "flops"
) -> Row:
    return Row(
        key=f"{method}{budget}{seed}{cost}",
        method=method,
        budget={"flops": budget},
        cost=cost,
        seed=seed,
        accuracy=accuracy,
        costs={"flops": 100 * flops, "params": 10.0},
        shares={"flops": flops, "params": flops**2},
        epochs=2,
        folder="f",
    )


ROWS = [
    row("morph", "50%", 0, 0.90, 0.50),
    row("morph", "50%", 1, 0.94, 0.48),
    row("morph", "25%", 0, 0.80, 0.25),
    row("morph", "25%", 1, 0.80, 0.25),
    row("uniform", "50%", 0, 0.85, 0.5),
    row("uniform", "25%", 0, 0.70, 0.2),
]


def test_means_and_standard_errors() -> None:
    points = {(p.series, p.budget): p for p in points_of(ROWS)}
    assert len(points) == 4
    learned = points["morphgraph", "flops=50%"]
    assert learned.seeds == 2
    assert learned.accuracy == pytest.approx(0.92)
    assert learned.error == pytest.approx(0.02)  # 0.0283 over the root of 2
    assert learned.shares["flops"] == pytest.approx(0.49)
    assert points["width multiplier", "flops=25%"].error == 0.0
    (table,) = sweep_report(ROWS).tables
    assert table.readable()[0][:5] == ["morphgraph", "flops=50%", "2", "92.00%", "2.00%"]
    assert table.readable()[2][4] == ""  # of one seed there is none


def test_what_the_regularizer_counted_is_told_where_it_differs() -> None:
    other = row("morph", "50%", 0, 0.9, 0.5, cost="params")
    assert {p.series for p in points_of([ROWS[0], other])} == {
        "morphgraph, regularized by FLOPs",
        "morphgraph, regularized by parameters",
    }


def _marks(svg: str) -> dict[tuple[str, float], tuple[float, float]]:
    """By series and FLOPs, as the marks of the first panel say them, where a mark stands."""
    found = {}
    for path in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        said = path.attrib.get("aria-label", "")
        words = dict(part.split(": ", 1) for part in said.split("; ") if ": " in part)
        if "FLOPs (% of the original)" in words and path.attrib["aria-roledescription"] == "point":
            x, y = map(float, re.findall(r"[-\d.]+", path.attrib["transform"]))
            across = float(words["FLOPs (% of the original)"])
            up = float(words["test accuracy (%)"])
            found[words["series"], across] = (x, y)
            assert up == pytest.approx(EXPECTED[words["series"], across])
    return found


EXPECTED = {
    ("morphgraph", 49.0): 92.0,
    ("morphgraph", 25.0): 80.0,
    ("width multiplier", 50.0): 85.0,
    ("width multiplier", 20.0): 70.0,
}


def test_points_stand_where_the_numbers_say() -> None:
    svg = curves_svg(ROWS, "digits")
    marks = _marks(svg)
    assert marks.keys() == EXPECTED.keys()
    low, high = marks["morphgraph", 25.0], marks["morphgraph", 49.0]
    across, up = (high[0] - low[0]) / 24, (low[1] - high[1]) / 12  # pixels per percent
    assert across > 0
    assert up > 0
    for (_, flops), (x, _) in marks.items():
        assert x == pytest.approx(low[0] + (flops - 25) * across, abs=0.6)
    for key, (_, y) in marks.items():
        assert y == pytest.approx(low[1] - (EXPECTED[key] - 80) * up, abs=0.6)
    # One error bar in either panel: two standard errors high, around the mean.
    bars = [
        path.attrib["aria-label"]
        for path in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}line")
        if "high: 94" in path.attrib.get("aria-label", "")
        and path.attrib["aria-roledescription"] == "errorbar"
    ]
    assert len([bar for bar in bars if bar.startswith("FLOPs")]) >= 1
    assert svg == curves_svg(ROWS, "digits")


def test_the_picture_says_what_it_shows_and_needs_nothing_else() -> None:
    svg = curves_svg(ROWS, "<script>&\x1b.npz")
    root = ET.fromstring(svg)
    words = ["".join(text.itertext()) for text in root.findall(".//{*}text")]
    assert "FLOPs (% of the original)" in words
    assert "parameters (% of the original)" in words
    assert words.count("test accuracy (%)") == 2
    assert {"morphgraph", "width multiplier"} <= set(words)
    assert any("<script>&\\x1b.npz: 2 epochs, 1 to 2 seeds" in text for text in words)
    assert root.attrib["aria-label"].startswith("Test accuracy on <script>&")
    assert "href=" not in svg.replace("xlink:href", "")
    assert not root.findall(".//{*}script")


def test_without_vega_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UnsupportedError, match=r"morphgraph\[report\]"):
        curves_svg(ROWS, "digits")
