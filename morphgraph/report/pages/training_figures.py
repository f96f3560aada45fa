"""The pictures of a training: what was reached at which cost, epochs, strengths of channels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from morphgraph.report.pages.facts import Curve, Epoch, GroupStrengths
from morphgraph.report.pages.figure import BAR, COLORS, LEGEND, Figure, plain_text, short_label
from morphgraph.report.tables import (
    Table,
    amount,
    columns,
    number_column,
    percent,
    share,
)

_BINS = 24


def curve_figure(curve: Curve | None) -> Figure:
    """Accuracy or error against cost."""
    assert curve is not None
    scale = 100 if curve.shares else 1
    data = []
    for index, series in enumerate(dict.fromkeys(point.series for point in curve.points)):
        own = sorted((p for p in curve.points if p.series == series), key=lambda p: p.share)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if own[1:] else "markers",
                "name": plain_text(series),
                "x": [100 * point.share for point in own],
                "y": [scale * point.value for point in own],
                "error_y": {"array": [scale * p.spread for p in own], "visible": True, "width": 3},
                "text": [plain_text(point.label or series) for point in own],
                "hovertemplate": "%{text}<br>%{x:.1f} %, %{y:.4g}<extra></extra>",
                "marker": {
                    "size": [15 if p.label == curve.chosen else 8 for p in own],
                    "symbol": ["star" if p.label == curve.chosen else "circle" for p in own],
                    "color": f"@color{index % COLORS}",
                },
                "line": {"color": f"@color{index % COLORS}"},
            }
        )
    return Figure(
        "curve",
        f"{curve.quality.capitalize()} against cost",
        "The star is the network of this report; bars are standard errors of several seeds.",
        data,
        {
            "height": 380,
            "xaxis": {"title": {"text": f"{curve.cost} (% of the original)"}},
            "yaxis": {"title": {"text": curve.quality + (" (%)" if curve.shares else "")}},
            "legend": LEGEND,
        },
        Table(
            columns(
                "network",
                number_column(f"{curve.cost} of the original", share),
                number_column(curve.quality, percent if curve.shares else amount),
            ),
            [[point.label or point.series, point.share, point.value] for point in curve.points],
        ),
    )


def training_figure(epochs: Sequence[Epoch]) -> Figure:
    """Loss, live cost and weight over the epochs."""
    panels: list[tuple[str, Callable[[Epoch], float | None]]] = [
        ("loss", lambda epoch: epoch.loss),
        ("cost alive (%)", lambda epoch: None if epoch.live is None else 100 * epoch.live),
        ("weight of the penalty", lambda epoch: epoch.weight),
    ]
    panels = [panel for panel in panels if any(panel[1](epoch) is not None for epoch in epochs)]
    phases = list(dict.fromkeys(epoch.phase for epoch in epochs))
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": 60 + 180 * len(panels),
        "grid": {"rows": len(panels), "columns": 1, "pattern": "independent"},
        "legend": LEGEND,
    }
    for panel, (title, read) in enumerate(panels, 1):
        suffix = "" if panel == 1 else str(panel)
        layout[f"yaxis{suffix}"] = {"title": {"text": title}, "rangemode": "tozero"}
        layout[f"xaxis{suffix}"] = {"matches": "x"} if panel > 1 else {}
        for index, phase in enumerate(phases):
            own = [
                (number, read(epoch))
                for number, epoch in enumerate(epochs, 1)
                if epoch.phase == phase
            ]
            if any(value is not None for _, value in own):
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": plain_text(phase),
                        "legendgroup": str(index),
                        "showlegend": panel == 1,
                        "x": [number for number, _ in own],
                        "y": [value for _, value in own],
                        "xaxis": f"x{suffix}",
                        "yaxis": f"y{suffix}",
                        "line": {"color": f"@color{index % COLORS}"},
                    }
                )
    layout[f"xaxis{'' if len(panels) == 1 else len(panels)}"] |= {
        "title": {"text": "epoch of the run"}
    }
    return Figure(
        "training",
        "Training",
        f"Epochs: {len(epochs)}, phases: {len(phases)}. Each point is the mean over an epoch.",
        data,
        layout,
        Table(
            columns(
                "phase",
                number_column("epoch"),
                number_column("loss"),
                number_column("cost alive", share),
                number_column("weight"),
            ),
            [[e.phase, e.number, e.loss, e.live, e.weight] for e in epochs],
        ),
    )


def strengths_figure(groups: Sequence[GroupStrengths]) -> Figure:
    """Histograms of the strengths of every group, with their threshold."""
    every = np.concatenate([np.asarray(group.strengths, float) for group in groups])
    positive = every[every > 0]
    low = math.floor(math.log10(positive.min())) if positive.size else -1
    high = math.ceil(math.log10(positive.max())) if positive.size else 0
    edges = np.linspace(low, max(high, low + 1), _BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    counts, gone = [], []
    for group in groups:
        values = np.asarray(group.strengths, float)
        logs = np.log10(np.maximum(values, 10.0**low))
        counts.append(np.histogram(logs, edges)[0].tolist())
        gone.append(int((values <= group.threshold).sum()))
    rows = list(range(len(groups)))
    heat = {
        "type": "heatmap",
        "x": middle.tolist(),
        "y": rows,
        "z": counts,
        "colorscale": "@scale",
        "colorbar": {"title": {"text": "channels", "side": "right"}, "thickness": 12},
        "hovertemplate": "%{z} channels at 10^%{x:.1f}<extra></extra>",
    }
    threshold = {
        "type": "scatter",
        "mode": "markers",
        "name": "threshold",
        "x": [math.log10(max(group.threshold, 10.0**low)) for group in groups],
        "y": rows,
        "marker": {"symbol": "line-ns-open", "size": 14, "color": "@accent", "line": {"width": 3}},
        "hovertext": [
            f"{plain_text(group.name)}: {out} of {len(group.strengths)} channels go"
            for group, out in zip(groups, gone, strict=True)
        ],
        "hoverinfo": "text",
    }
    return Figure(
        "strengths",
        "Strengths",
        "How strong the channels of every group are when the shrink phase has ended, as powers of "
        "10; those left of the mark go.",
        [heat, threshold],
        {
            "height": 110 + BAR * len(groups),
            "xaxis": {"title": {"text": "strength (10^x)"}},
            "yaxis": {
                "tickvals": rows,
                "ticktext": [plain_text(short_label(group.name)) for group in groups],
                "autorange": "reversed",
                "automargin": True,
            },
        },
        Table(
            columns(
                "group", number_column("channels"), number_column("go"), number_column("threshold")
            ),
            [
                [group.name, len(group.strengths), out, group.threshold]
                for group, out in zip(groups, gone, strict=True)
            ],
        ),
    )
