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
from morphgraph.graph import ChannelGraph, GraphOp, analysis
from morphgraph.ops import facts_of, parameter_names
from morphgraph.passes.coupling.roles import roles


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
    role = roles(couplings)
    on_weights = [e for e in couplings.edges if e.port >= 0 and couplings.on_weight(e)]
    uncounted = {
        (edge.op_index, edge.port)
        for edge in on_weights
        if not role.counted[edge.factor] and couplings.sizes[edge.factor] > 1
    }
    produced = [
        edge.dim
        for edge in on_weights
        if role.counted[edge.factor]
        and role.on_results[edge.factor]
        and not role.sums[edge.factor]
        and edge.factor not in couplings.pins
        and (edge.op_index, edge.port) not in uncounted
    ]
    # A vector is a bias or a scale, whatever its operator counts.
    sources = _sources(graph, produced)
    return [source for source in sources if len(graph.shapes[source.parameter]) > 1]


def readers(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that are summed over: the readers of channels."""
    couplings = graph.couplings
    sums = roles(couplings).sums
    summed = [
        edge.dim
        for edge in couplings.edges
        if edge.port >= 0
        and graph.ops[edge.op_index].macs
        and couplings.on_weight(edge)
        and sums[edge.factor]
    ]
    return _sources(graph, summed)


def norm_scales(graph: ChannelGraph) -> list[Source]:
    """The scales of all norms with running statistics: of BatchNorms."""
    sources = {}
    for op in graph.ops:
        facts = facts_of(op.ir)
        if not facts.statistics or facts.scale is None:
            continue
        scale = op.ir.inputs[facts.scale]
        if scale is not None and scale.name and scale.is_initializer():
            sources[scale.name] = Source(scale.name, 0, graph.channels_at(scale.name, 0))
    return list(sources.values())


def channel_scales(graph: ChannelGraph) -> dict[int, Source]:
    """Per index of an operator the learned scale that it multiplies every channel with.

    That of a norm, or a parameter that is a factor of a product (a layer scale, a GroupNorm's scale
    where that is written out): its numbers stand on one axis, and reach the operator as they are.
    """
    learned = frozenset(parameter_names(graph.model))
    weights = graph.couplings.input_independent
    scales: dict[int, Source] = {}
    for op_index, op in enumerate(graph.ops):
        names = [value.name or "" for value in op.ir.inputs if value is not None]
        if all(name in weights for name in names):
            continue
        for name in _multipliers(op, weights):
            dims = [graph.dim(name, axis) for axis in range(len(graph.shapes.get(name, ())))]
            for source in _sources(graph, dims):
                whole = prod(graph.shapes[source.parameter]) == len(source.channels)
                tied = (graph.channel_group[source.channels] >= 0).any()
                if source.parameter in learned and whole and tied:
                    scales[op_index] = source
    return scales


def _multipliers(op: GraphOp, weights: frozenset[str]) -> list[str]:
    """The operands that do not depend on the input and multiply what does."""
    scale = facts_of(op.ir).scale
    operands = list(op.ir.inputs) if op.gate else []
    if scale is not None:
        operands = [op.ir.inputs[scale]]
    return [v.name for v in operands if v is not None and v.name and v.name in weights]


def _sources(graph: ChannelGraph, dims: Iterable[int]) -> list[Source]:
    """The parameter axes that axes of weights come from, through operators that only move them."""
    couplings = graph.couplings
    initializers = graph.model.graph.initializers
    moved_by, moved_from = _movements(graph)
    sources: dict[int, Source] = {}
    for dim in dict.fromkeys(dims):
        wanted = graph.channels_of(dim)
        pending, seen = [dim], {dim}
        while pending:
            reached = pending.pop(0)
            name, axis = couplings.dims[reached].value, couplings.dims[reached].axis
            if name in initializers:
                sources.setdefault(reached, Source(name, axis, graph.channels_of(reached)))
                continue
            for origin in (d for f in moved_by.get(reached, ()) for d in moved_from.get(f, ())):
                # A reshape puts axes side by side that have no channel in common.
                if origin not in seen and np.isin(graph.channels_of(origin), wanted).any():
                    seen.add(origin)
                    pending.append(origin)
    return list(sources.values())


@analysis
def _movements(graph: ChannelGraph) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Per axis of a weight the factors of the op that moved it there, and where those come from."""
    couplings = graph.couplings
    moved_by: dict[int, list[int]] = {}
    moved_from: dict[int, list[int]] = {}
    for edge in couplings.edges:
        if not facts_of(graph.ops[edge.op_index].ir).moves:
            continue
        if edge.port >= 0:
            moved_from.setdefault(edge.factor, []).append(edge.dim)
        elif couplings.on_weight(edge):
            moved_by.setdefault(edge.dim, []).append(edge.factor)
    return moved_by, moved_from
