"""Pass ``score``: how much the network uses each channel, from its weights."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.mapped import blocks
from morphgraph.options import Score as Score
from morphgraph.passes.analysis.channel_sources import (
    ComputedKernel,
    Source,
    computed_kernels,
    expert_stacks,
    norm_scales,
    stored_kernels,
)
from morphgraph.passes.analysis.computed_kernels import numbers
from morphgraph.words import did_you_mean


class Norm(NamedTuple):
    """A strength from the sums of squares, the sums of magnitudes and the counts per channel.

    ``squares`` and ``magnitudes`` say which of the sums it needs; the others it gets are zeros.
    """

    of: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    squares: bool = True
    magnitudes: bool = True


def group_lasso(l1_fraction: float = 0.0) -> Norm:
    """``(1 - f) sqrt(mean w^2) + f mean |w|`` over a channel's kernel (MorphNet's group lasso)."""

    def norm(squares: FloatArray, magnitudes: FloatArray, counts: FloatArray) -> FloatArray:
        mean = np.sqrt(squares / counts)
        result: FloatArray = (1 - l1_fraction) * mean + l1_fraction * magnitudes / counts
        return result

    return Norm(norm, l1_fraction < 1, l1_fraction > 0)


def _l2(squares: FloatArray, _magnitudes: FloatArray, _counts: FloatArray) -> FloatArray:
    return np.sqrt(squares)


def _l1(_squares: FloatArray, magnitudes: FloatArray, _counts: FloatArray) -> FloatArray:
    return magnitudes


def strengths(
    graph: ChannelGraph,
    sources: Iterable[Source],
    norm: Norm,
    computed: Iterable[ComputedKernel] = (),
) -> FloatArray:
    """The norm of every channel's slices, the maximum over tied sources, ``[channels]``.

    Channels that no source has get NaN, and those of kernels that cannot be computed.

    Raises:
        ModelError: a parameter holds NaN or infinite numbers, which cannot be ranked.
    """
    result = np.full(len(graph.channel_group), np.nan)
    for source in sources:
        tensor = graph.model.graph.initializers[source.parameter].const_value
        assert tensor is not None
        _measure(result, source.parameter, tensor, source.axis, source.channels, norm)
    for kernel in computed:
        array = numbers(graph, kernel)
        if array is not None:
            tensor = ir.Tensor(array, name=kernel.value)
            _measure(result, kernel.value, tensor, kernel.axis, kernel.channels, norm)
    return result


def _measure(
    result: FloatArray,
    name: str,
    tensor: ir.TensorProtocol,
    axis: int,
    channels: IntArray,
    norm: Norm,
) -> None:
    """Raise the channels on an axis to the norms of their slices."""
    size = len(channels)
    squared, absolute = np.zeros(size), np.zeros(size)  # per position of the axis
    for part, block in blocks(tensor, axis):
        if norm.squares:
            squared[part] += np.einsum(
                "ijk,ijk->j", block, block, dtype=np.float64, casting="unsafe"
            )
        if norm.magnitudes:
            magnitudes = np.abs(block, dtype=np.float64, casting="unsafe")
            absolute[part] += magnitudes.sum(axis=(0, 2))
        # Sums of finite numbers are finite, or nearly always: of others they never are.
        summed = squared[part].sum() + absolute[part].sum()
        if not np.isfinite(summed) and not np.isfinite(block).all():
            raise ModelError(
                f"tensor '{escape(name)}' holds NaN or infinite numbers, which "
                "cannot be ranked; train or repair the model first, or use --score random"
            )
    ones = np.full(size, tensor.size / max(size, 1))
    # Counted among the kernel's own channels: those of the whole network are too many for each.
    present, places = np.unique(channels, return_inverse=True)
    squares, magnitudes, counts = (
        np.bincount(places, sums).astype(np.float64) for sums in (squared, absolute, ones)
    )
    norms = norm.of(squares, magnitudes, counts)
    result[present] = np.fmax(result[present], norms)


def score(graph: ChannelGraph, kind: Score = "l2", seed: int = 0) -> FloatArray:
    """The strength of every channel, ``[channels]``, all of them above or at zero.

    A kernel that is computed (weight norm, a mask, quantized weights) counts as what it is, not as
    what it is computed from. Channels that no kernel makes count 1, see :func:`scored`.

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
    scores = scored(graph, kind, seed)
    return np.where(np.isnan(scores), 1.0, scores)


def scored(graph: ChannelGraph, kind: Score = "l2", seed: int = 0) -> FloatArray:
    """As :func:`score`, and NaN for channels without a score."""
    if kind not in get_args(Score):
        raise UnsupportedError(
            f"score '{kind}' is unknown{did_you_mean(kind, get_args(Score))}; use "
            f"{', '.join(get_args(Score))}"
        )
    if kind == "random":
        return np.random.default_rng(seed).uniform(0.01, 1.0, len(graph.channel_group))
    norms = {
        "l2": Norm(_l2, magnitudes=False),
        "l1": Norm(_l1, squares=False),
        "lasso": group_lasso(),
        "bn": group_lasso(),
    }
    scores = strengths(graph, stored_kernels(graph), norms[kind], computed_kernels(graph))
    if stacks := expert_stacks(graph):
        inside = strengths(graph, stacks, norms[kind])
        scores = np.where(np.isnan(scores), inside, scores)
    if kind == "bn":
        by_norm = strengths(graph, norm_scales(graph), group_lasso(1.0))
        scores = np.where(np.isnan(by_norm), scores, by_norm)
    return scores
