"""Pictures of a seed network and of what became of it.

Drawn are the layers with weights, and where streams are pooled, added and concatenated; every other
operator is part of the edge that it stands on. A layer keeps its name and its place, so that what
has gone is seen where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx
from svg import svg_page, svg_text

from morphgraph.graph import ChannelGraph, GraphOp

_DRAWN = {
    "Conv": "#0072b2",
    "Gemm": "#444444",
    "MatMul": "#444444",
    "Add": "#009e73",
    "Concat": "#e69f00",
    "MaxPool": "#cc79a7",
    "AveragePool": "#cc79a7",
}
_SIGNS = {"Add": "+", "Concat": "c", "MaxPool": "max", "AveragePool": "avg"}
_STEP, _LANE, _BOX = 46, 46, (34, 26)  # between columns, between lanes; a node's width and height
_LEFT, _TOP = 16, 34


if TYPE_CHECKING:
    Flow = nx.DiGraph[str]  # which cannot be subscripted when it runs


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a network: its layers with their channels, and between which data flow."""

    layers: Mapping[str, int]
    edges: Sequence[Sequence[str]]


def drawing_of(graph: ChannelGraph) -> Drawing:
    """What is drawn of a network; plain data, so that rows can hold it."""
    layers = flow(graph)
    return Drawing(
        {name: about["channels"] for name, about in layers.nodes.items()},
        [list(edge) for edge in layers.edges],
    )


def _is_drawn(node: GraphOp) -> bool:
    if node.ir.op_type == "Add":  # of two streams, not of a stream and a bias
        return all(value is not None and value.const_value is None for value in node.ir.inputs)
    return node.ir.op_type in _DRAWN


def _channels(graph: ChannelGraph, node: GraphOp) -> int:
    shape = graph.shapes[str(node.ir.outputs[0].name)]
    return int(shape[1 if len(shape) in (2, 4) else -1])


def flow(graph: ChannelGraph) -> "Flow":
    """The drawn operators, joined where data flow from one to the next.

    Nodes have ``op``, ``kernel`` (empty without one) and ``channels``.
    """
    found: Flow = nx.DiGraph()
    sources: dict[str, list[str]] = {}  # of every value, the drawn operators that it comes from
    for node in graph.ops:
        names = [str(value.name) for value in node.ir.inputs if value is not None]
        origins = list(dict.fromkeys(o for name in names for o in sources.get(name, ())))
        if _is_drawn(node):
            found.add_node(
                node.name,
                op=node.ir.op_type,
                kernel=_kernel(graph, node),
                channels=_channels(graph, node),
            )
            found.add_edges_from((origin, node.name) for origin in origins)
            origins = [node.name]
        sources.update({str(value.name): origins for value in node.ir.outputs})
    return found


def _kernel(graph: ChannelGraph, node: GraphOp) -> str:
    if node.ir.op_type != "Conv":
        return ""
    kernel = node.ir.inputs[1]
    assert kernel is not None
    shape = graph.shapes[str(kernel.name)]
    return "x".join(str(size) for size in shape[2:])


def _places(layers: "Flow") -> dict[str, tuple[float, float]]:
    """Column (the longest way from the input) and lane; a lane lies near those it is fed from."""
    columns: dict[str, int] = {}
    for name in nx.topological_sort(layers):
        columns[name] = 1 + max(
            (columns[before] for before in layers.predecessors(name)), default=-1
        )
    lanes: dict[str, float] = {}
    for column in range(max(columns.values()) + 1):
        here = [name for name in layers if columns[name] == column]

        def near(name: str) -> float:
            fed = [lanes[before] for before in layers.predecessors(name)]
            return sum(fed) / len(fed) if fed else 0.0

        here.sort(key=near)  # stable: towers keep their order in the model
        # As many lanes as stand beside each other, those that pass through among them.
        middle = (len(here) - 1) / 2
        apart = [near(name) for name in here]
        spread = all(b - a >= 1 for a, b in pairwise(apart))
        for place, name in enumerate(here):
            lanes[name] = apart[place] if spread else place - middle
    return {name: (columns[name], lanes[name]) for name in layers}


def picture(graph: ChannelGraph, becomes: Mapping[str, Drawing]) -> str:
    """An SVG: the seed network, and below it what became of it, each under its title.

    Args:
        graph: of the seed network.
        becomes: what is left, by title.
    """
    layers = flow(graph)
    places = _places(layers)
    low = min(lane for _, lane in places.values())
    high = max(lane for _, lane in places.values())
    width = 2 * _LEFT + (max(column for column, _ in places.values()) + 1) * _STEP
    height = _TOP + (high - low + 1.6) * _LANE
    rows = {"seed": drawing_of(graph), **becomes}
    parts = []
    for number, (title, left) in enumerate(rows.items()):
        at = {
            name: (
                _LEFT + column * _STEP + _STEP / 2,
                number * height + _TOP + (lane - low + 0.8) * _LANE,
            )
            for name, (column, lane) in places.items()
        }
        parts.append(svg_text(_LEFT, round(number * height + 22), title, 14, weight=600))
        lives = [(a, b) for a, b in left.edges]  # rows hold lists
        gone = [edge for edge in layers.edges if edge not in lives]
        parts += [_gone(at[name]) for name in layers if name not in left.layers]
        parts += [_edge(at[a], at[b], 'stroke="#d5dbe4" stroke-dasharray="3 3"') for a, b in gone]
        parts += [_edge(at[a], at[b], 'stroke="#7a8aa0"') for a, b in lives]
        parts += [_node(layers.nodes[name], at[name], n) for name, n in left.layers.items()]
    return svg_page(width, round(len(rows) * height), "The network before and after", parts)


def _edge(a: tuple[float, float], b: tuple[float, float], look: str) -> str:
    """From a node to a later one; one that passes others by in its lane bends around them."""
    half, up = _BOX[0] / 2, _BOX[1] / 2
    if abs(a[1] - b[1]) < 1 and b[0] - a[0] > _STEP + 1:
        way = [(a[0], a[1] - up), (a[0], a[1] - _LANE), (b[0], b[1] - _LANE), (b[0], b[1] - up)]
    else:
        start, end = a[0] + half, b[0] - half
        bend = min(_STEP / 2, (end - start) / 2)
        way = [(start, a[1]), (start + bend, a[1]), (end - bend, b[1]), (end, b[1])]
    points = [f"{x:.0f} {y:.0f}" for x, y in way]
    return f'<path d="M{points[0]}C{" ".join(points[1:])}" fill="none" {look}/>'


def _node(about: Mapping[str, str], at: tuple[float, float], channels: int) -> str:
    """A box with what the layer does, and its channels."""
    sign = _SIGNS.get(about["op"]) or about["kernel"] or "fc"
    return _box(at, f'fill="{_DRAWN[about["op"]]}"') + "".join(
        svg_text(round(at[0]), round(at[1] + down), text, size, anchor="middle", color="#ffffff")
        for text, size, down in ((sign, 9, -2), (str(channels), 11, 9))
    )


def _gone(at: tuple[float, float]) -> str:
    """An empty box, where a layer was."""
    return _box(at, 'fill="none" stroke="#c3ccd8" stroke-dasharray="3 3"')


def _box(at: tuple[float, float], look: str) -> str:
    width, height = _BOX
    x, y = at[0] - width / 2, at[1] - height / 2
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="4" {look}/>'
