"""The pictures of a network: its widths, where its cost is, its graph, the times of its layers."""

from collections.abc import Sequence
from typing import Any

from morphgraph.report.pages.facts import Facts, Flow, GroupWidth, LayerCost, LayerTime
from morphgraph.report.pages.figure import BAR, COLORS, LEGEND, Figure, plain_text, short_label
from morphgraph.report.tables import (
    Cell,
    Table,
    amount,
    columns,
    number_column,
    plain,
    share,
)

# Counts of channels, to the last one.
_WIDTHS = number_column("before", plain), number_column("after", plain)


def widths_figure(groups: Sequence[GroupWidth], resized: bool) -> Figure:
    """The width of every group before and after, as bars."""
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
            "height": 70 + BAR * len(groups),
            "margin": {"t": 50, "l": 60, "r": 84, "b": 10},
            "xaxis": {"rangemode": "tozero", "side": "top"},
            "yaxis": {
                "tickvals": rows,
                "ticktext": [plain_text(short_label(group.name)) for group in groups],
                "showgrid": False,
                "range": [len(groups) - 0.5, -0.5],
                "automargin": True,
            },
            "showlegend": resized,
            "legend": LEGEND,
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


def costs_figure(facts: Facts) -> Figure:
    """Where the cost is by module, and how much of it is left."""
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


def flow_figure(flow: Flow | None, groups: Sequence[GroupWidth]) -> Figure:
    """The channel graph with its groups in colors."""
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
    return f"@color{group % COLORS}"


def times_figure(times: Sequence[LayerTime]) -> Figure:
    """Times of layers as predicted, beside measured ones."""
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
                "marker": {"size": 8, "color": f"@color{index % COLORS}"},
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
            "legend": LEGEND,
        },
        Table(
            columns("layer", "model", number_column("predicted ms"), number_column("measured ms")),
            [[each.name, each.model, each.predicted, each.measured] for each in times],
        ),
    )
