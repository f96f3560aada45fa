"""Curves: means and errors by hand, and a picture whose points stand where the numbers say."""

import re
from xml.etree import ElementTree as ET

import pytest

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


def test_points_stand_where_the_numbers_say() -> None:
    root = ET.fromstring(curves_svg(ROWS, "digits"))
    lines = root.findall("{*}polyline")
    assert len(lines) == 4  # two methods in two panels
    places = [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in lines
    ]
    (low, high), (naive_low, naive_high) = places[0], places[1]  # from the left to the right
    up = (low[1] - high[1]) / (0.92 - 0.80)  # pixels per accuracy
    across = (high[0] - low[0]) / (0.49 - 0.25)
    assert up > 0
    assert (naive_low[1] - naive_high[1]) / (0.85 - 0.70) == pytest.approx(up, rel=0.01)
    assert (naive_high[0] - naive_low[0]) / (0.5 - 0.2) == pytest.approx(across, rel=0.01)
    assert low[1] - naive_high[1] == pytest.approx((0.85 - 0.80) * up, abs=0.3)
    # The one error bar in either panel: two standard errors high, around the mean.
    bars = re.findall(r"M[\d.]+ ([\d.]+)h8m-4 0V([\d.]+)m", curves_svg(ROWS, "digits"))
    assert len(bars) == 2
    top, bottom = map(float, bars[0])
    assert bottom - top == pytest.approx(0.04 * up, abs=0.3)
    assert (bottom + top) / 2 == pytest.approx(high[1], abs=0.2)


def test_the_picture_says_what_it_shows_and_needs_nothing_else() -> None:
    svg = curves_svg(ROWS, "<script>&.npz")
    root = ET.fromstring(svg)
    words = ["".join(text.itertext()) for text in root.findall(".//{*}text")]
    assert "FLOPs (% of the original)" in words
    assert "parameters (% of the original)" in words
    assert words.count("test accuracy (%)") == 2
    assert {"morphgraph", "width multiplier"} <= set(words)
    assert any("<script>&.npz: 2 epochs, 1 to 2 seeds" in text for text in words)
    assert "href" not in svg
    assert not root.findall(".//{*}script")
