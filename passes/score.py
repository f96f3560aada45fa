"""Pass ``score``: how much the network uses each channel, from its weights.

A *source* is an axis of a parameter whose slices belong to channels: a kernel's output axis, or a
BatchNorm's scale. Where a kernel is computed from parameters by movements alone (transposed, sliced
by gates that are joined in another order), the sources are theirs. The same sources feed the scores
here and the regularizer in training.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np

from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph, Edge, FloatArray, GraphNode, IntArray
from morphgraph.onnx_io import escape, parameter_names
from morphgraph.ops import entry_of
from morphgraph.stored import blocks

Score = Literal["l2", "l1", "bn", "lasso", "random"]


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
    counted = [{factor for term in node.macs for factor in term} for node in graph.nodes]
    on_output: set[int] = set()
    not_kernels: set[tuple[int, int]] = set()
    operands: list[Edge] = []
    for edge in couplings.edges:
        if edge.port < 0:
            on_output.add(edge.factor)
        elif couplings.dims[edge.dim].value in couplings.weights:
            if edge.factor in counted[edge.node]:
                operands.append(edge)
            elif couplings.sizes[edge.factor] > 1:
                not_kernels.add((edge.node, edge.port))
    made = [
        edge.dim
        for edge in operands
        if edge.factor in on_output
        and edge.factor not in couplings.pins
        and not _is_summed(graph, edge)
        and (edge.node, edge.port) not in not_kernels
    ]
    return [source for source in _sources(graph, made) if _rank(graph, source) > 1]


def readers(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that are summed over: the readers of channels."""
    couplings = graph.couplings
    summed = [
        edge.dim
        for edge in couplings.edges
        if edge.port >= 0
        and graph.nodes[edge.node].macs
        and couplings.dims[edge.dim].value in couplings.weights
        and _is_summed(graph, edge)
    ]
    return _sources(graph, summed)


def norm_scales(graph: ChannelGraph) -> list[Source]:
    """The scales of all BatchNorms."""
    found = {}
    for node in graph.nodes:
        scale = node.ir.inputs[1] if node.ir.op_type == "BatchNormalization" else None
        if scale is not None and scale.name and scale.is_initializer():
            found[scale.name] = Source(scale.name, 0, graph.channels_at(scale.name, 0))
    return list(found.values())


def channel_scales(graph: ChannelGraph) -> dict[int, Source]:
    """Per node in ``graph.nodes`` the learned scale that it multiplies every channel with.

    That of a norm, or a parameter that is a factor of a product (a layer scale, a GroupNorm's scale
    where that is written out): its numbers stand on one axis, and reach the node as they are.
    """
    learned = frozenset(parameter_names(graph.model))
    weights = graph.couplings.weights
    found = {}
    for number, node in enumerate(graph.nodes):
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


def _multipliers(node: GraphNode, weights: frozenset[str]) -> list[str]:
    """The operands that do not depend on the input and multiply what does."""
    entry = entry_of(node.ir.op_type, node.ir.domain)
    operands = list(node.ir.inputs) if node.gate else []
    if entry is not None and entry.scale is not None:
        operands = [node.ir.inputs[entry.scale]]
    return [v.name for v in operands if v is not None and v.name and v.name in weights]


def _is_summed(graph: ChannelGraph, edge: Edge) -> bool:
    """Whether the operator sums over the factor."""
    factor = graph.couplings.factors[edge.factor - len(graph.couplings.dims)]
    return factor.name in graph.nodes[edge.node].contracted


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
            node = graph.nodes[edge.node].ir
            entry = entry_of(node.op_type, node.domain)
            if entry is None or not entry.moves:
                continue
            if edge.port >= 0:
                moved_from.setdefault(edge.factor, []).append(edge.dim)
            elif couplings.dims[edge.dim].value in couplings.weights:
                moved_to.setdefault(edge.dim, []).append(edge.factor)
        graph.cache["movements"] = moved_to, moved_from
    found: tuple[dict[int, list[int]], dict[int, list[int]]] = graph.cache["movements"]
    return found


Norm = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
"""From the sums of squares, the sums of magnitudes and the counts per channel to a strength."""


def group_lasso(l1_fraction: float = 0.0) -> Norm:
    """``(1 - f) sqrt(mean w^2) + f mean |w|`` over a channel's kernel (MorphNet's group lasso)."""

    def norm(squares: FloatArray, magnitudes: FloatArray, counts: FloatArray) -> FloatArray:
        mean = np.sqrt(squares / counts)
        result: FloatArray = (1 - l1_fraction) * mean + l1_fraction * magnitudes / counts
        return result

    return norm


def _l2(squares: FloatArray, _magnitudes: FloatArray, _counts: FloatArray) -> FloatArray:
    return np.sqrt(squares)


def _l1(_squares: FloatArray, magnitudes: FloatArray, _counts: FloatArray) -> FloatArray:
    return magnitudes


def strengths(graph: ChannelGraph, sources: Iterable[Source], norm: Norm) -> FloatArray:
    """The norm of every channel's slices, the maximum over tied sources, ``[channels]``.

    Channels that no source has get NaN.

    Raises:
        ModelError: a parameter holds NaN or infinite numbers, which cannot be ranked.
    """
    total = len(graph.channel_group)
    result = np.full(total, np.nan)
    for source in sources:
        tensor = graph.model.graph.initializers[source.parameter].const_value
        assert tensor is not None
        size = len(source.channels)
        squared, absolute = np.zeros(size), np.zeros(size)  # per position of the axis
        for part, block in blocks(tensor, source.axis):
            if not np.isfinite(block).all():
                raise ModelError(
                    f"tensor '{escape(source.parameter)}' holds NaN or infinite numbers, which "
                    "cannot be ranked; train or repair the model first, or use --score random"
                )
            squared[part] += np.square(block).sum(axis=(0, 2))
            absolute[part] += np.abs(block).sum(axis=(0, 2))
        ones = np.full(size, tensor.size / max(size, 1))
        squares, magnitudes, counts = (
            np.bincount(source.channels, numbers, minlength=total).astype(np.float64)
            for numbers in (squared, absolute, ones)
        )
        here = counts > 0
        found = norm(squares[here], magnitudes[here], counts[here])
        result[here] = np.fmax(result[here], found)
    return result


def score(graph: ChannelGraph, kind: Score = "l2", seed: int = 0) -> FloatArray:
    """The strength of every channel, ``[channels]``, all of them above or at zero.

    Args:
        graph: the lifted network with its weights.
        kind: ``"l2"`` and ``"l1"`` are norms of the producing kernels, ``"lasso"`` MorphNet's group
            lasso (a mean, so that kernels of different size compare), ``"bn"`` the magnitude of the
            BatchNorm scale (the group lasso where a channel passes none), ``"random"`` uniform.
        seed: of ``"random"``.

    Raises:
        ModelError: a weight is NaN or infinite.
        UnsupportedError: no such score.
    """
    if kind not in get_args(Score):
        raise UnsupportedError(f"score '{kind}' is unknown; use {', '.join(get_args(Score))}")
    if kind == "random":
        return np.random.default_rng(seed).uniform(0.01, 1.0, len(graph.channel_group))
    if kind == "bn":
        found = strengths(graph, norm_scales(graph), group_lasso(1.0))
        rest = strengths(graph, kernels(graph), group_lasso())
        found = np.where(np.isnan(found), rest, found)
    else:
        norms: dict[str, Norm] = {"l2": _l2, "l1": _l1, "lasso": group_lasso()}
        found = strengths(graph, kernels(graph), norms[kind])
    return np.where(np.isnan(found), 1.0, found)


def not_finite(graph: ChannelGraph) -> Sequence[str]:
    """Names of the parameters that hold NaN or infinite numbers."""
    return [
        name
        for name, value in graph.model.graph.initializers.items()
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.const_value is not None
        and not all(np.isfinite(block).all() for _, block in blocks(value.const_value))
    ]
