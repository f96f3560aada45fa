"""Pass ``score``: how much the network uses each channel, from its weights.

A *source* is an axis of a parameter whose slices belong to channels: a kernel's output axis, or a
BatchNorm's scale. The same sources feed the scores here and the regularizer in training.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir

from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph, FloatArray, IntArray
from morphgraph.onnx_io import escape, static_shape
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

    A depthwise kernel is one: its channel is as dead as its producer's if the kernel is zero.
    """
    couplings = graph.couplings
    on_output: set[int] = set()
    operands: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for edge in couplings.edges:
        dim = couplings.dims[edge.dim]
        if edge.port < 0:
            on_output.add(edge.factor)
        elif dim.value in couplings.weights:
            operands[edge.factor].append((dim.value, dim.axis))
    found: dict[tuple[str, int], Source] = {}
    values = _values(graph)
    for node in graph.nodes:
        for factor in {factor for term in node.macs for factor in term} & on_output:
            if factor in couplings.pins:
                continue
            for name, axis in operands[factor]:
                traced = _trace(values[name], axis)
                if traced is not None and len(static_shape(values[traced[0]])) > 1:
                    found[traced] = Source(*traced, graph.channels_at(*traced))
    return list(found.values())


def readers(graph: ChannelGraph) -> list[Source]:
    """The kernels' axes that are summed over: the readers of channels."""
    couplings = graph.couplings
    values = _values(graph)
    found: dict[tuple[str, int], Source] = {}
    for edge in couplings.edges:
        dim = couplings.dims[edge.dim]
        node = graph.nodes[edge.node]
        summed = couplings.factors[edge.factor - len(couplings.dims)].name in node.contracted
        if edge.port >= 0 and summed and node.macs and dim.value in couplings.weights:
            traced = _trace(values[dim.value], dim.axis)
            if traced is not None:
                found[traced] = Source(*traced, graph.channels_at(*traced))
    return list(found.values())


def norm_scales(graph: ChannelGraph) -> list[Source]:
    """The scales of all BatchNorms."""
    found = {}
    for node in graph.nodes:
        scale = node.ir.inputs[1] if node.ir.op_type == "BatchNormalization" else None
        if scale is not None and scale.name and scale.is_initializer():
            found[scale.name] = Source(scale.name, 0, graph.channels_at(scale.name, 0))
    return list(found.values())


def _values(graph: ChannelGraph) -> dict[str, ir.Value]:
    values = dict(graph.model.graph.initializers)
    for node in graph.nodes:
        values.update((value.name or "", value) for value in node.ir.outputs)
    return values


def _trace(value: ir.Value, axis: int) -> tuple[str, int] | None:
    """The parameter axis that a computed weight's axis comes from, through transposes."""
    while True:
        if value.is_initializer():
            return value.name or "", axis
        node = value.producer()
        if node is None or node.op_type != "Transpose" or node.inputs[0] is None:
            return None
        perm = node.attributes.get("perm")
        order = perm.as_ints() if perm else range(len(static_shape(value)))[::-1]
        value, axis = node.inputs[0], order[axis]


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
