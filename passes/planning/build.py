"""From numbers per channel to a plan: which channels stay, and what the plan states."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.analysis.score import Score, score as score_channels
from morphgraph.passes.planning.constraints import all_pinned
from morphgraph.plans import Plan, make_plan


def top_channels(
    graph: ChannelGraph,
    widths: IntArray,
    scores: FloatArray,
    among: Mapping[int, IntArray] | None = None,
) -> dict[int, IntArray]:
    """Per group index the channels with the highest scores, as many as its new width.

    Args:
        graph: the lifted network.
        widths: ``[groups]``.
        scores: ``[channels]``.
        among: per group index the only channels to choose from; by default all.
    """
    keep = {}
    for group, width in zip(graph.groups, widths.tolist(), strict=True):
        positions = (among or {}).get(group.index, np.arange(group.width))
        weakest_first = np.argsort(scores[group.channels[positions]], kind="stable")
        keep[group.index] = np.sort(positions[weakest_first[max(0, len(positions) - width) :]])
    return keep


def scores_of(graph: ChannelGraph, score: Score | FloatArray, seed: int = 0) -> FloatArray:
    """A number per channel, ``[channels]``, computed or given."""
    if isinstance(score, str):
        return score_channels(graph, score, seed)
    scores = np.asarray(score, dtype=np.float64)
    channels = len(graph.channel_group)
    if scores.shape != (channels,):
        raise UnsupportedError(
            f"{scores.size} scores for {channels} channels; give one per channel"
        )
    if np.isnan(scores).any():
        raise UnsupportedError(
            f"score {int(np.isnan(scores).argmax())} is NaN; it cannot be ranked"
        )
    if np.isinf(scores).any():
        raise UnsupportedError(
            f"score {int(np.isinf(scores).argmax())} is infinite; a score counts as a share of its "
            "group's sum, so give finite ones, and keep whole groups by `exclude`"
        )
    return scores


def build_plan(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    request: Mapping[str, Any],
    costs: Iterable[Cost],
) -> Plan:
    """A plan that keeps these channels; warns the caller's caller of what it leaves as it is."""
    plan = make_plan(graph, keep, request, costs)
    uncounted = [f"{op.ir.op_type} '{op.name}'" for op in graph.ops if op.opaque]
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        warnings.warn(
            "operators that are not described keep their channels, and what they compute is not "
            f"counted in the budget: {escape(', '.join(uncounted[:3]))}{more}",
            MorphWarning,
            stacklevel=3,
        )
    if not plan.groups:
        warnings.warn(_nothing_shrinks(graph), MorphWarning, stacklevel=3)
    return plan


def _nothing_shrinks(graph: ChannelGraph) -> str:
    why = all_pinned(graph) or "the model fits the request as it is"
    return f"the plan changes nothing: {why}"
