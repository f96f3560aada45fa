"""Pass ``channel_sources``: which slices of which parameters belong to a channel.

A *source* is an axis of a parameter whose slices belong to channels: a kernel's output axis, or a
BatchNorm's scale. Where a kernel is computed from parameters by movements alone (transposed, sliced
by gates that are joined in another order), the sources are theirs. The same sources feed the scores
and the regularizer in training.

Other kernels hold numbers that no parameter holds: weight norm, masks, a product with a scale,
quantized weights. They are *computed*, and their channels are those of the axis that the operator
reads (:mod:`morphgraph.passes.analysis.computed_kernels` has the numbers).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Flags, IntArray
from morphgraph.graph import ChannelGraph, Edge, GraphOp, analysis
from morphgraph.ops import coded_operands, facts_of, parameter_names
from morphgraph.passes.coupling.roles import roles


@dataclass(frozen=True)
class Source:
    """An axis of a parameter, with the channel of every position, ``[size]``."""

    parameter: str
    axis: int
    channels: IntArray


@dataclass(frozen=True)
class ComputedKernel:
    """An axis of a kernel whose numbers no parameter holds as they are.

    Attributes:
        value: what the operator reads.
        axis: where its channels stand.
        channels: of every position on the axis, ``[size]``.
        scales: values whose product the stored numbers are multiplied with: one number for all, or
            one for every position; empty where the kernel's numbers are real ones.
        zero_point: the value that is subtracted first, likewise.
    """

    value: str
    axis: int
    channels: IntArray
    scales: tuple[str, ...] = ()
    zero_point: str | None = None


def kernels(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that stand on an operator's result: the producers of channels.

    A kernel is a weight all of whose factors are counted as arithmetic. A depthwise kernel is one:
    its channel is as dead as its producer's if the kernel is zero. A recurrent layer has two; its
    bias and its peepholes are none.
    """
    # A vector is a bias or a scale, whatever its operator counts.
    sources = _sources(graph, [edge.dim for edge in _producing(graph)])
    return [source for source in sources if len(graph.shapes[source.parameter]) > 1]


def stored_kernels(graph: ChannelGraph) -> list[Source]:
    """Those of :func:`kernels` whose parameters hold the very numbers that the operator uses."""
    return _by_origin(graph)[0]


def computed_kernels(graph: ChannelGraph) -> list[ComputedKernel]:
    """The producers of channels that are computed from what is stored."""
    return _by_origin(graph)[1]


@analysis
def _by_origin(graph: ChannelGraph) -> tuple[list[Source], list[ComputedKernel]]:
    dims = graph.couplings.dims
    stored: dict[Origin, Source] = {}
    computed: dict[tuple[Origin, tuple[str, ...]], ComputedKernel] = {}
    running = roles(graph.couplings).runs
    for edge in _producing(graph):
        if not running[edge.factor]:
            continue  # it computes a kernel
        name, axis = dims[edge.dim].value, dims[edge.dim].axis
        if len(graph.shapes[name]) < 2:
            continue
        scales, zero_point = _dequantization(graph, edge)
        sources, complete = _trace(graph, edge.dim)
        if complete and not scales and zero_point is None:
            stored |= sources
        else:
            for view, channels in enumerate(graph.channels_by_view(edge.dim)):
                kernel = ComputedKernel(name, axis, channels, scales, zero_point)
                computed.setdefault(((edge.dim, view), scales), kernel)
    return [s for s in stored.values() if len(graph.shapes[s.parameter]) > 1], [*computed.values()]


def _producing(graph: ChannelGraph) -> list[Edge]:
    """Where the factors that make channels stand on kernels."""
    couplings = graph.couplings
    role, edges = roles(couplings), couplings.columns
    factors, stride = edges.factor, int(edges.port.max(initial=0)) + 1
    ports = edges.op_index * stride + edges.port  # of operands
    scales, points = (np.isin(ports, found) for found in _codes(graph, stride))
    on_kernels = (edges.port >= 0) & edges.on_weight & ~points
    # Of stacks of kernels an operator computes with those that it chooses.
    other = on_kernels & ~role.counted[factors] & ~role.normalizes[factors]
    uncounted = other & (couplings.sizes[factors] > 1)
    whole = on_kernels & (scales | ~np.isin(ports, ports[uncounted]))
    makes = role.counted & (role.on_results > 0) & ~role.sums
    # Units inside of an operator; of these biases have a matrix, too: a row for every kernel.
    inside = role.counted & role.sums & (role.on_results == 0) & (role.on_activations == 0)
    pinned = list(couplings.pins)
    makes[pinned] = inside[pinned] = False
    deep = np.isin(ports, _with_two_axes(ports, edges.dim, on_kernels & role.counted[factors]))
    found = whole & (makes[factors] | (inside[factors] & (deep | scales)))
    return [couplings.edges[k] for k in np.flatnonzero(found).tolist()]


def _with_two_axes(ports: IntArray, dims: IntArray, counted: Flags) -> IntArray:
    """The operands with counted factors on more than one axis."""
    axes = np.unique(np.stack([ports[counted], dims[counted]]), axis=1)
    names, counts = np.unique(axes[0], return_counts=True)
    found: IntArray = names[counts > 1]
    return found


def _codes(graph: ChannelGraph, stride: int) -> tuple[list[int], list[int]]:
    """The operands that say what whole numbers mean: scales, and other whole numbers.

    A row's scale tells how large its weights are; a zero point and an order tell nothing of it.
    """
    found: tuple[list[int], list[int]] = ([], [])
    for op_index, op in enumerate(graph.ops):
        for coded in coded_operands(op.ir).values():
            for port in coded.by:
                value = op.ir.inputs[port] if port < len(op.ir.inputs) else None
                if value is not None and value.dtype is not None:
                    found[value.dtype.is_integer()].append(op_index * stride + port)
    return found


def _dequantization(graph: ChannelGraph, edge: Edge) -> tuple[tuple[str, ...], str | None]:
    """What the operator, or those behind it, make real numbers of stored ones with."""
    op = graph.ops[edge.op_index]
    ports = facts_of(op.ir).quantized.get(edge.port)
    if ports is None:
        return (), None
    scale, zero_point = (_operand(op, port) for port in ports)
    return (_scales_behind(graph, op) if scale is None else (scale,)), zero_point


def _operand(op: GraphOp, port: int | None) -> str | None:
    value = op.ir.inputs[port] if port is not None and port < len(op.ir.inputs) else None
    return None if value is None else value.name


def _scales_behind(graph: ChannelGraph, op: GraphOp) -> tuple[str, ...]:
    """The weights in the first product behind an operator that works with whole numbers.

    Where activations are quantized as they come, the scales of both stand in one product.
    """
    weights, makers = graph.couplings.input_independent, graph.makers
    value = op.ir.outputs[0]
    while len(value.uses()) == 1:
        (use,) = value.uses()
        behind = graph.ops[makers[use.node.outputs[0].name or ""]]
        if behind.gate:
            factors = [v for v in behind.ir.inputs if v is not None and v is not value]
            for factor in list(factors):
                maker = makers.get(factor.name or "")
                if factor.name not in weights and maker is not None and graph.ops[maker].gate:
                    factors += [v for v in graph.ops[maker].ir.inputs if v is not None]
            return tuple(v.name for v in factors if v.name and v.name in weights)
        if behind.macs or len(behind.ir.inputs) != 1:
            break
        value = use.node.outputs[0]
    return ()


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


def expert_stacks(graph: ChannelGraph) -> list[Source]:
    """The axes of stacks of kernels of which the network chooses some for every token.

    No operator reads such a stack as one kernel, so that none makes the channels inside.
    """
    couplings = graph.couplings
    chosen = {int(graph.vertex_class[vertex]) for vertex in couplings.least}
    found: list[int] = []
    for name in graph.model.graph.initializers if chosen else ():
        first, rank = couplings.first_dim.get(name), len(graph.shapes.get(name, ()))
        if first is not None and rank > 2 and int(graph.vertex_class[first]) in chosen:
            found += range(first, first + rank)
    return _sources(graph, found)


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
    weights = graph.couplings.input_independent
    scales: dict[int, Source] = {}
    for op_index, op in enumerate(graph.ops):
        names = [value.name or "" for value in op.ir.inputs if value is not None]
        if all(name in weights for name in names):
            continue
        for name in _multipliers(op, weights):
            if (source := one_per_channel(graph, name)) is not None:
                scales[op_index] = source
    return scales


def channel_shifts(graph: ChannelGraph, op: GraphOp) -> list[Source | None]:
    """The learned shifts that an operator adds to every channel.

    That of a norm, the bias of a depthwise convolution, or a parameter that is a term of a sum;
    ``None`` for other numbers that it adds, do not depend on the input, and are not all zero.
    """
    shifts: list[Source | None] = []
    for value in _addends(op, graph.couplings.input_independent):
        name = value.name or ""
        source = one_per_channel(graph, name)
        dims = [graph.dim(name, axis) for axis in range(len(graph.shapes.get(name, ())))]
        here = np.concatenate([graph.channels_of(dim) for dim in dims] or [np.zeros(0, np.int64)])
        here = here[graph.channel_group[here] >= 0]
        if source is not None and np.isin(here, source.channels).all():
            shifts.append(source)
        elif (
            name in _trained(graph) or value.const_value is None or value.const_value.numpy().any()
        ):
            shifts.append(None)
    return shifts


def one_per_channel(graph: ChannelGraph, name: str) -> Source | None:
    """The learned parameter that a weight is, if it holds one number per channel on one axis."""
    dims = [graph.dim(name, axis) for axis in range(len(graph.shapes.get(name, ())))]
    found = None
    for source in _sources(graph, dims):
        whole = prod(graph.shapes[source.parameter]) == len(source.channels)
        tied = (graph.channel_group[source.channels] >= 0).any()
        if source.parameter in _trained(graph) and whole and tied:
            found = source
    return found


@analysis
def _trained(graph: ChannelGraph) -> frozenset[str]:
    return frozenset(parameter_names(graph.model))


def _multipliers(op: GraphOp, weights: frozenset[str]) -> list[str]:
    """The operands that do not depend on the input and multiply what does."""
    scale = facts_of(op.ir).scale
    operands = list(op.ir.inputs) if op.gate else []
    if scale is not None:
        operands = [op.ir.inputs[scale]]
    return [v.name for v in operands if v is not None and v.name and v.name in weights]


def _addends(op: GraphOp, weights: frozenset[str]) -> list[ir.Value]:
    """The operands that do not depend on the input and are added to what does."""
    facts = facts_of(op.ir)
    ports = {facts.offset, facts.shift, *facts.zeros}
    everything = facts.adds or facts.subtracts
    operands = [v for port, v in enumerate(op.ir.inputs) if everything or port in ports]
    return [v for v in operands if v is not None and v.name and v.name in weights]


def _sources(graph: ChannelGraph, dims: Iterable[int]) -> list[Source]:
    """The parameter axes that axes of weights come from, through operators that only move them."""
    sources: dict[Origin, Source] = {}
    for dim in dict.fromkeys(dims):
        for identity, source in _trace(graph, dim)[0].items():
            sources.setdefault(identity, source)
    return list(sources.values())


Origin = tuple[int, int]
"""An axis of a parameter by its id, and the view of its class."""


def _trace(graph: ChannelGraph, dim: int) -> tuple[dict[Origin, Source], bool]:
    """By their ids the parameter axes that an axis of a weight comes from, and whether all do.

    It does not come from them alone where something computes it on the way.
    """
    couplings = graph.couplings
    initializers = graph.model.graph.initializers
    moved_by, moved_from = _movements(graph)
    sources: dict[Origin, Source] = {}
    complete = True
    wanted = graph.channels_of(dim)
    pending, seen = [dim], {dim}
    while pending:
        reached = pending.pop(0)
        name, axis = couplings.dims[reached].value, couplings.dims[reached].axis
        if name in initializers:
            for view, channels in enumerate(graph.channels_by_view(reached)):
                sources[reached, view] = Source(name, axis, channels)
            continue
        # A reshape puts axes side by side that have no channel in common.
        origins = [
            origin
            for factor in moved_by.get(reached, ())
            for origin in moved_from.get(factor, ())
            if np.isin(graph.channels_of(origin), wanted).any()
        ]
        complete &= bool(origins)
        new = [origin for origin in dict.fromkeys(origins) if origin not in seen]
        seen.update(new)
        pending += new
    return sources, complete


@analysis
def _movements(graph: ChannelGraph) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Per axis of a weight the factors of the op that moved it there, and where those come from."""
    couplings = graph.couplings
    moved_by: dict[int, list[int]] = {}
    moved_from: dict[int, list[int]] = {}
    moving = (k for k, op in enumerate(graph.ops) if facts_of(op.ir).moves)
    for edge in (edge for k in moving for edge in graph.edges_of(k)):
        if edge.port >= 0:
            moved_from.setdefault(edge.factor, []).append(edge.dim)
        elif couplings.on_weight(edge):
            moved_by.setdefault(edge.dim, []).append(edge.factor)
    return moved_by, moved_from
