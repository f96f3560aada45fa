"""The channel graph as a picture: layers in the order of the data, and the groups between."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.report.pages.facts import Flow, Node

_MOST = 600
"""Nodes that a person can still find their way among; more are joined by module."""


def flow_of(graph: ChannelGraph) -> Flow:
    """The layers of a model with the links between them, each at its place.

    A layer stands as far to the right as the longest way to it from an input; those side by side
    are ordered by what feeds them. Beyond a few hundred layers, those of one module are one node.
    """
    names = _names([op.layer for op in graph.ops])
    ranks = _ranks(graph)
    index: dict[str, int] = {}
    last: dict[int, int] = {}
    for place, op in enumerate(graph.ops):
        node = index.setdefault(names[op.layer], len(index))
        last[node] = place
    links: dict[tuple[int, int], int | None] = {}
    for op in graph.ops:
        target = index[names[op.layer]]
        for value in (each.name or "" for each in op.ir.inputs if each is not None):
            maker = graph.makers.get(value)
            source = None if maker is None else index[names[graph.ops[maker].layer]]
            if source is not None and source != target:
                links.setdefault((source, target), _group_of(graph, value))
    columns = [ranks[last[node]] for node in range(len(index))]
    rows = _rows(columns, links)
    nodes = []
    for name, node in index.items():
        op = graph.ops[last[node]]
        made = op.ir.outputs[0]
        nodes.append(
            Node(
                name=name,
                op_type=op.ir.op_type,
                output=" x ".join(map(str, static_shape(made))),
                group=_group_of(graph, made.name or ""),
                place=(float(columns[node]), rows[node]),
            )
        )
    return Flow(nodes, [(a, b, group) for (a, b), group in links.items()])


def _names(layers: Iterable[str]) -> dict[str, str]:
    """By layer the node that shows it: itself, or the deepest module so that there are few."""
    every = list(dict.fromkeys(layers))
    parts = {layer: layer.replace("/", ".").strip(".").split(".") for layer in every}
    depth = max((len(each) for each in parts.values()), default=1)
    while depth > 1 and len({tuple(each[:depth]) for each in parts.values()}) > _MOST:
        depth -= 1
    if depth >= max((len(each) for each in parts.values()), default=1):
        return {layer: layer for layer in every}
    return {layer: ".".join(each[:depth]) for layer, each in parts.items()}


def _ranks(graph: ChannelGraph) -> list[int]:
    """The longest way from an input to each operator, in operators that change layers."""
    ranks: list[int] = []
    for op in graph.ops:
        rank = 0
        for value in op.ir.inputs:
            maker = None if value is None else graph.makers.get(value.name or "")
            if maker is not None:
                rank = max(rank, ranks[maker] + (graph.ops[maker].layer != op.layer))
        ranks.append(rank)
    return ranks


def _group_of(graph: ChannelGraph, value: str) -> int | None:
    """The group that has most positions on a value; ``None`` where none has."""
    if value not in graph.shapes:
        return None
    found = (
        (graph.shapes[value][axis], group)
        for axis in range(len(graph.shapes[value]))
        for group in graph.groups_on(graph.dim(value, axis))
    )
    return max(found, key=lambda each: (each[0], -each[1]), default=(0, None))[1]


def _rows(columns: Sequence[int], links: Mapping[tuple[int, int], int | None]) -> list[float]:
    """A height for every node: near what feeds it, and at least 1 from the others of its column."""
    feeds: dict[int, list[int]] = defaultdict(list)
    for source, target in links:
        feeds[target].append(source)
    by_column: dict[int, list[int]] = defaultdict(list)
    for node, column in enumerate(columns):
        by_column[column].append(node)
    rows = [0.0] * len(columns)
    for column in sorted(by_column):
        nodes = by_column[column]
        wanted = {
            node: sum(rows[source] for source in feeds[node]) / len(feeds[node])
            if feeds[node]
            else 0.0
            for node in nodes
        }
        nodes.sort(key=lambda node: (wanted[node], node))
        middle = sum(wanted.values()) / len(nodes)
        for place, node in enumerate(nodes):
            rows[node] = middle + place - (len(nodes) - 1) / 2 if nodes[1:] else wanted[node]
    return rows
