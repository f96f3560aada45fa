"""Pass ``channel_sources``: which slices of which parameters belong to a channel.

A *source* is an axis of a parameter whose slices belong to channels: a kernel's output axis, or a
BatchNorm's scale. Where a kernel is computed from parameters by movements alone (transposed, sliced
by gates that are joined in another order), the sources are theirs. The same sources feed the scores
and the regularizer in training.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph, Edge, GraphOp
from morphgraph.onnx_io import parameter_names
from morphgraph.ops import entry_of


@dataclass(frozen=True)
class Source:
    """An axis of a parameter, with the channel of every position, ``[size]``."""

    parameter: str
    axis: int
    channels: IntArray


def kernels(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that stand on an operator's result: the producers of channels.

    A kernel is a weight all of whose factors are counted as arithmetic. A depthwise kernel is one:
    its channel is as dead as its producer's if the kernel is zero. A recurrent layer has two; its
    bias and its peepholes are none.
    """
    couplings = graph.couplings
    counted = [{factor for term in node.macs for factor in term} for node in graph.ops]
    on_output: set[int] = set()
    not_kernels: set[tuple[int, int]] = set()
    operands: list[Edge] = []
    for edge in couplings.edges:
        if edge.port < 0:
            on_output.add(edge.factor)
        elif couplings.dims[edge.dim].value in couplings.input_independent:
            if edge.factor in counted[edge.op_index]:
                operands.append(edge)
            elif couplings.sizes[edge.factor] > 1:
                not_kernels.add((edge.op_index, edge.port))
    made = [
        edge.dim
        for edge in operands
        if edge.factor in on_output
        and edge.factor not in couplings.pins
        and not _is_summed(graph, edge)
        and (edge.op_index, edge.port) not in not_kernels
    ]
    return [source for source in _sources(graph, made) if _rank(graph, source) > 1]


def readers(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that are summed over: the readers of channels."""
    couplings = graph.couplings
    summed = [
        edge.dim
        for edge in couplings.edges
        if edge.port >= 0
        and graph.ops[edge.op_index].macs
        and couplings.dims[edge.dim].value in couplings.input_independent
        and _is_summed(graph, edge)
    ]
    return _sources(graph, summed)


def norm_scales(graph: ChannelGraph) -> list[Source]:
    """The scales of all BatchNorms."""
    found = {}
    for node in graph.ops:
        scale = node.ir.inputs[1] if node.ir.op_type == "BatchNormalization" else None
        if scale is not None and scale.name and scale.is_initializer():
            found[scale.name] = Source(scale.name, 0, graph.channels_at(scale.name, 0))
    return list(found.values())


def channel_scales(graph: ChannelGraph) -> dict[int, Source]:
    """Per node in ``graph.ops`` the learned scale that it multiplies every channel with.

    That of a norm, or a parameter that is a factor of a product (a layer scale, a GroupNorm's scale
    where that is written out): its numbers stand on one axis, and reach the node as they are.
    """
    learned = frozenset(parameter_names(graph.model))
    weights = graph.couplings.input_independent
    found = {}
    for number, node in enumerate(graph.ops):
        names = [value.name or "" for value in node.ir.inputs if value is not None]
        if all(name in weights for name in names):
            continue
        for name in _multipliers(node, weights):
            dims = [graph.dim(name, axis) for axis in range(len(graph.shapes.get(name, ())))]
            for source in _sources(graph, dims):
                whole = prod(graph.shapes[source.parameter]) == len(source.channels)
                tied = (graph.channel_group[source.channels] >= 0).any()
                if source.parameter in learned and whole and tied:
                    found[number] = source
    return found


def _multipliers(node: GraphOp, weights: frozenset[str]) -> list[str]:
    """The operands that do not depend on the input and multiply what does."""
    entry = entry_of(node.ir.op_type, node.ir.domain)
    operands = list(node.ir.inputs) if node.gate else []
    if entry is not None and entry.scale is not None:
        operands = [node.ir.inputs[entry.scale]]
    return [v.name for v in operands if v is not None and v.name and v.name in weights]


def _is_summed(graph: ChannelGraph, edge: Edge) -> bool:
    """Whether the operator sums over the factor."""
    factor = graph.couplings.factors[edge.factor - len(graph.couplings.dims)]
    return factor.name in graph.ops[edge.op_index].contracted


def _rank(graph: ChannelGraph, source: Source) -> int:
    return len(graph.shapes[source.parameter])


def _sources(graph: ChannelGraph, dims: Iterable[int]) -> list[Source]:
    """The parameter axes that axes of weights come from, through operators that only move them."""
    couplings = graph.couplings
    initializers = graph.model.graph.initializers
    moved_to, moved_from = _movements(graph)
    found: dict[int, Source] = {}
    for dim in dict.fromkeys(dims):
        wanted = graph.channels_of(dim)
        pending, seen = [dim], {dim}
        while pending:
            here = pending.pop(0)
            name, axis = couplings.dims[here].value, couplings.dims[here].axis
            if name in initializers:
                found.setdefault(here, Source(name, axis, graph.channels_of(here)))
                continue
            for source in (d for f in moved_to.get(here, ()) for d in moved_from.get(f, ())):
                # A reshape puts axes side by side that have no channel in common.
                if source not in seen and np.isin(graph.channels_of(source), wanted).any():
                    seen.add(source)
                    pending.append(source)
    return list(found.values())


def _movements(graph: ChannelGraph) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Per axis of a weight the factors of the op that moved it there, and where those come from."""
    if "movements" not in graph.cache:
        couplings = graph.couplings
        moved_to: dict[int, list[int]] = {}
        moved_from: dict[int, list[int]] = {}
        for edge in couplings.edges:
            node = graph.ops[edge.op_index].ir
            entry = entry_of(node.op_type, node.domain)
            if entry is None or not entry.moves:
                continue
            if edge.port >= 0:
                moved_from.setdefault(edge.factor, []).append(edge.dim)
            elif couplings.dims[edge.dim].value in couplings.input_independent:
                moved_to.setdefault(edge.dim, []).append(edge.factor)
        graph.cache["movements"] = moved_to, moved_from
    found: tuple[dict[int, list[int]], dict[int, list[int]]] = graph.cache["movements"]
    return found
