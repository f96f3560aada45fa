"""Pass ``choices``: how often the network chooses each channel where it chooses a few of many.

Where a router ranks the experts of a mixture and nothing tells what each of them gives
(:mod:`morphgraph.passes.calibration.stacks`), how often a token takes each, over the calibration
inputs, says in what order they go.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Arrays, FloatArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.graph import ChannelGraph
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.coupling.roles import roles


@dataclass(frozen=True)
class _Choice:
    """A value along one axis of which an operator takes the largest numbers."""

    value: str
    axis: int
    count: int
    dim: int


def how_often(
    graph: ChannelGraph,
    batches: Iterable[Arrays],
    *,
    known: Collection[int] = (),
    threads: int = 0,
    processes: Processes = ALONE,
) -> dict[int, FloatArray]:
    """By index of a group that is chosen from the times that each channel was, ``[width]``.

    Args:
        graph: the lifted network.
        batches: feeds of the model; passed over where there are such groups.
        known: indices of groups that nobody asks for.
        threads: of ONNX Runtime.
        processes: that share the batches.
    """
    found = [each for each in _choices(graph) if not graph.groups_on(each.dim) <= {*known}]
    if not found:
        return {}
    inputs = [value.name or "" for value in graph.model.graph.inputs]
    piece = Piece(graph.model, inputs, [choice.value for choice in found], threads)
    times = np.zeros(len(graph.channel_group))
    for feed in batches:
        ranked = piece.run(feed)
        for choice in found:
            rows = np.moveaxis(ranked[choice.value], choice.axis, -1)
            rows = rows.reshape(-1, rows.shape[-1])
            first = np.argpartition(-rows, choice.count - 1, axis=1)[:, : choice.count]
            channels = graph.channels_of(choice.dim)[first.ravel()]
            times += np.bincount(channels, minlength=len(times))
    times = processes.total(times)
    groups = sorted({k for choice in found for k in graph.groups_on(choice.dim)}.difference(known))
    return {index: times[graph.groups[index].channels] for index in groups}


def _choices(graph: ChannelGraph) -> list[_Choice]:
    couplings, op_index = graph.couplings, roles(graph.couplings).op_index
    # Of what is numbered and read by nobody the largest are wanted, whichever they are.
    numbered = {factor for results in couplings.numbered.values() for factor in results.values()}
    unread = numbered.difference(vertex for tie in couplings.ties for vertex in tie)
    return [
        _Choice(couplings.dims[edge.dim].value, couplings.dims[edge.dim].axis, count, edge.dim)
        for vertex, count in couplings.least.items()
        if vertex not in unread | couplings.indexed
        for edge in graph.edges_of(int(op_index[vertex]))
        if edge.factor == vertex and edge.whole and couplings.on_activation(edge)
    ]
