"""The pictures of a report page, as Plotly's figures in JSON.

Colors are names of the page's own style (``"@before"``), which its script replaces by those of a
light or a dark page. Texts are escaped: names come from files that anybody may have written, and
Plotly reads some tags in them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from morphgraph.onnx_io import escape
from morphgraph.report.pages.facts import (
    Curve,
    Epoch,
    Facts,
    Flow,
    GroupStrengths,
    GroupWidth,
    LayerCost,
    LayerTime,
)
from morphgraph.report.tables import (
    Cell,
    Table,
    amount,
    columns,
    number_column,
    percent,
    plain,
    share,
)

_BAR = 20  # pixels of a row of bars
_BINS = 24
_COLORS = 8  # of groups, in the page's style
_LEGEND = {"orientation": "h", "y": 1, "yanchor": "top", "yref": "container"}


@dataclass(frozen=True)
class Figure:
    """A picture: its heading, what it shows in words, Plotly's data, and the same as a table."""

    key: str
    title: str
    says: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    table: Table

    @property
    def spec(self) -> str:
        """Data and layout as JSON within a script element, which no name in it can end early."""
        text = msgspec.json.encode({"data": self.data, "layout": self.layout}).decode()
        return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def figures(facts: Facts) -> list[Figure]:
    """The pictures that there are facts for, in the order of the page."""
    makers: list[tuple[Any, Callable[..., Figure]]] = [
        (facts.groups, lambda: _widths(facts.groups, facts.resized)),
        ([each for each in facts.layers if each.macs[0]], lambda: _costs(facts)),
        (facts.curve, lambda: _curve(facts.curve)),
        (facts.epochs, lambda: _training(facts.epochs)),
        (facts.strengths, lambda: _strengths(facts.strengths)),
        (facts.flow, lambda: _flow(facts.flow, facts.groups)),
        (facts.times, lambda: _times(facts.times)),
    ]
    return [make() for there, make in makers if there]


def plain_text(text: str) -> str:
    """A text that Plotly shows as it is: it knows tags and entities.

    >>> plain_text("<b>x</b> & y")
    '&lt;b&gt;x&lt;/b&gt; &amp; y'
    """
    return escape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# Counts of channels, to the last one.
_WIDTHS = number_column("before", plain), number_column("after", plain)


def _short(text: str, most: int = 44) -> str:
    """A label that fits beside a bar: the end of a long name says most."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _widths(groups: Sequence[GroupWidth], resized: bool) -> Figure:
    # Rows are numbered: two groups may have labels that look alike.
    rows = list(range(len(groups)))
    free, fixed = (
        [row for row in rows if bool(groups[row].reason) is held] for held in (False, True)
    )

    def bars(name: str, color: str, shown: Sequence[int], widths: Sequence[int]) -> dict[str, Any]:
        return {
            "type": "bar",
            "orientation": "h",
            "width": 0.8,  # without it a bar reaches as far as the next one of its own color
            "name": name,
            "y": shown,
            "x": widths,
            "marker": {"color": color},
            "hovertext": [plain_text(_says(groups[row], resized)) for row in shown],
            "hoverinfo": "text",
        }

    before = [
        bars(name, color, shown, [groups[row].before for row in shown])
        # Eight heads beside a vocabulary of thousands have no bar that an eye could read.
        | {
            "text": [_width(groups[row]) for row in shown],
            "textposition": "outside",
            "cliponaxis": False,
        }
        for name, color, shown in (
            ("before" if resized else "channels", "@before", free),
            ("fixed", "@pinned", fixed),
        )
        if shown
    ]
    after = bars("after", "@after", free, [groups[row].after for row in free]) | {"width": 0.5}
    changed = sum(group.before != group.after for group in groups)
    says = f"Groups of channels: {len(groups)}, of them {len(fixed)} of a fixed size"
    says += f" and {changed} with another width now." if resized else "."
    return Figure(
        "widths",
        "Widths",
        says + " A group's channels live and die together. Grey: why it stays is said on hover.",
        [*before, after] if resized else before,
        {
            "barmode": "overlay",
            "height": 70 + _BAR * len(groups),
            "margin": {"t": 50, "l": 60, "r": 84, "b": 10},
            "xaxis": {"rangemode": "tozero", "side": "top"},
            "yaxis": {
                "tickvals": rows,
                "ticktext": [plain_text(_short(group.name)) for group in groups],
                "showgrid": False,
                "range": [len(groups) - 0.5, -0.5],
                "automargin": True,
            },
            "showlegend": resized,
            "legend": _LEGEND,
        },
        Table(
            columns("group", *_WIDTHS, "keeps its size as"),
            [[g.name, g.before, g.after, g.reason or ""] for g in groups],
        ),
    )


def _width(group: GroupWidth) -> str:
    changed = group.after != group.before
    return f"{group.before} → {group.after}" if changed else str(group.before)


def _says(group: GroupWidth, resized: bool) -> str:
    width = f"{group.before} → {group.after}" if resized else f"{group.before} channels"
    made = ", ".join(group.producers[:4]) + (" ..." if group.producers[4:] else "")
    return f"{group.name}: {width}" + (
        f"; keeps its size: {group.reason}" if group.reason else f"; made by {made}" if made else ""
    )


def _costs(facts: Facts) -> Figure:
    ids, parents, labels, values, kept = _tree([each for each in facts.layers if each.macs[0]])
    total = values[0]
    texts = [
        f"{plain_text(label)}<br>{amount(value)} MACs, {share(value / total)} of all"
        + (f"<br>{share(part)} of it left" if facts.resized else "")
        for label, value, part in zip(labels, values, kept, strict=True)
    ]
    icicle = {
        "type": "icicle",
        "ids": ids,
        "parents": parents,
        "labels": [plain_text(label) for label in labels],
        "values": values,
        "branchvalues": "total",
        "hovertext": texts,
        "hoverinfo": "text",
        "tiling": {"orientation": "v"},
        "pathbar": {"visible": True},
        "maxdepth": 6,
        "marker": {
            "colors": kept if facts.resized else [value / total for value in values],
            "colorscale": "@scale",
            "cmin": 0,
            "cmax": 1,
            "line": {"width": 1, "color": "@page"},
            "colorbar": {
                "title": {"text": "left" if facts.resized else "of all", "side": "right"},
                "tickformat": ".0%",
                "thickness": 12,
            },
        },
    }
    says = "Each box is as wide as its part of the original's MACs, by module."
    says += " Its color is how much of that is left." if facts.resized else ""
    rows: list[list[Cell]] = [
        [layer.name, layer.op_type, *layer.macs, *layer.params] for layer in facts.layers
    ]
    titles = columns(
        "layer",
        "type",
        number_column("MACs"),
        number_column("MACs after"),
        number_column("parameters"),
        number_column("parameters after"),
    )
    if not facts.resized:
        rows = [[row[0], row[1], row[2], row[4]] for row in rows]
        titles = [titles[0], titles[1], titles[2], titles[4]]
    return Figure(
        "costs",
        "Where the cost is",
        says + " Click to enlarge a part.",
        [icicle],
        {"height": 430, "margin": {"t": 30, "l": 5, "r": 5, "b": 5}},
        Table(titles, rows),
    )


def _tree(
    layers: Sequence[LayerCost],
) -> tuple[list[str], list[str], list[str], list[float], list[float]]:
    """The modules of layers with a cost: ids, parents, labels, MACs, and the share left of them."""
    before: dict[tuple[str, ...], float] = {(): 0.0}
    after: dict[tuple[str, ...], float] = {(): 0.0}
    for layer in layers:
        path = tuple(part for part in layer.name.replace("/", ".").split(".") if part)
        for depth in range(len(path) + 1):
            before[path[:depth]] = before.get(path[:depth], 0.0) + layer.macs[0]
            after[path[:depth]] = after.get(path[:depth], 0.0) + layer.macs[1]
    ids = {path: str(index) for index, path in enumerate(before)}
    return (
        list(ids.values()),
        [ids[path[:-1]] if path else "" for path in before],
        [path[-1] if path else "the network" for path in before],
        list(before.values()),
        [after[path] / cost if cost else 1.0 for path, cost in before.items()],
    )


def _curve(curve: Curve | None) -> Figure:
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
                    "color": f"@color{index % _COLORS}",
                },
                "line": {"color": f"@color{index % _COLORS}"},
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
            "legend": _LEGEND,
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


def _training(epochs: Sequence[Epoch]) -> Figure:
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
        "legend": _LEGEND,
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
                        "line": {"color": f"@color{index % _COLORS}"},
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


def _strengths(groups: Sequence[GroupStrengths]) -> Figure:
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
            "height": 110 + _BAR * len(groups),
            "xaxis": {"title": {"text": "strength (10^x)"}},
            "yaxis": {
                "tickvals": rows,
                "ticktext": [plain_text(_short(group.name)) for group in groups],
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


def _flow(flow: Flow | None, groups: Sequence[GroupWidth]) -> Figure:
    assert flow is not None
    data: list[dict[str, Any]] = []
    by_color: dict[str, tuple[list[float | None], list[float | None]]] = {}
    for source, target, group in flow.links:
        xs, ys = by_color.setdefault(_group_color(group, groups), ([], []))
        (x0, y0), (x1, y1) = flow.nodes[source].place, flow.nodes[target].place
        xs += [x0, x1, None]
        ys += [y0, y1, None]
    for color, (xs, ys) in by_color.items():
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": xs,
                "y": ys,
                "line": {"color": color, "width": 1.5},
                "hoverinfo": "skip",
            }
        )
    texts = []
    for node in flow.nodes:
        text = f"{plain_text(node.name)} ({plain_text(node.op_type)}), {node.output}"
        if node.group is not None:
            text += f"<br>{plain_text(_says(groups[node.group], True))}"
        texts.append(text)
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [node.place[0] for node in flow.nodes],
            "y": [node.place[1] for node in flow.nodes],
            "hovertext": texts,
            "hoverinfo": "text",
            "marker": {
                "size": 9,
                "color": [_group_color(node.group, groups) for node in flow.nodes],
                "line": {"width": 1, "color": "@page"},
            },
        }
    )
    rows = [node.place[1] for node in flow.nodes]
    return Figure(
        "graph",
        "The channel graph",
        "Layers from the inputs (left) to the outputs; a color is a group of channels, grey is "
        "what keeps its size, for the reason that is shown on hover. Drag to enlarge a part, "
        "double-click to see all.",
        data,
        {
            "height": int(min(640, 260 + 18 * (max(rows) - min(rows)))),
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {"visible": False},
            "yaxis": {"visible": False, "autorange": "reversed"},
            "margin": {"t": 10, "l": 10, "r": 10, "b": 10},
        },
        Table(
            columns("layer", "type", "output", "group"),
            [
                [n.name, n.op_type, n.output, "" if n.group is None else groups[n.group].name]
                for n in flow.nodes
            ],
        ),
    )


def _group_color(group: int | None, groups: Sequence[GroupWidth]) -> str:
    if group is None or groups[group].reason is not None:
        return "@pinned"
    return f"@color{group % _COLORS}"


def _times(times: Sequence[LayerTime]) -> Figure:
    most = max(max(each.predicted, each.measured) for each in times)
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, most],
            "y": [0, most],
            "name": "equal",
            "line": {"color": "@pinned", "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    for index, model in enumerate(dict.fromkeys(each.model for each in times)):
        own = [each for each in times if each.model == model]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain_text(model),
                "x": [each.predicted for each in own],
                "y": [each.measured for each in own],
                "text": [plain_text(each.name) for each in own],
                "hovertemplate": "%{text}<br>predicted %{x:.3f} ms, measured %{y:.3f} ms"
                "<extra></extra>",
                "marker": {"size": 8, "color": f"@color{index % _COLORS}"},
            }
        )
    return Figure(
        "times",
        "Predicted and measured time",
        "Each point is a layer: its time by the calibrated device, and as the runtime's profile "
        "shows it.",
        data,
        {
            "height": 420,
            "xaxis": {"title": {"text": "predicted (ms)"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "measured (ms)"}, "rangemode": "tozero"},
            "legend": _LEGEND,
        },
        Table(
            columns("layer", "model", number_column("predicted ms"), number_column("measured ms")),
            [[each.name, each.model, each.predicted, each.measured] for each in times],
        ),
    )
