"""From numbers per channel to a plan: which channels stay, and what the plan states."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.analysis.score import Score, score as score_channels
from morphgraph.passes.planning.constraints import all_pinned
from morphgraph.plans import Change, Plan, make_plan


def top_channels(
    graph: ChannelGraph, widths: IntArray, score: Score | FloatArray, seed: int = 0
) -> dict[int, IntArray]:
    """Per group index the channels with the highest scores, as many as its new width."""
    scores = scores_of(graph, score, seed)
    return {
        group.index: np.sort(
            np.argsort(scores[group.channels], kind="stable")[group.width - int(width) :]
        )
        for group, width in zip(graph.groups, widths, strict=True)
    }


def scores_of(graph: ChannelGraph, score: Score | FloatArray, seed: int) -> FloatArray:
    """A number per channel, computed or given."""
    if isinstance(score, str):
        return score_channels(graph, score, seed)
    given = np.asarray(score, dtype=np.float64)
    channels = len(graph.channel_group)
    if given.shape != (channels,):
        raise UnsupportedError(f"{given.size} scores for {channels} channels; give one per channel")
    if np.isnan(given).any():
        raise UnsupportedError(f"score {int(np.isnan(given).argmax())} is NaN; it cannot be ranked")
    if np.isinf(given).any():
        raise UnsupportedError(
            f"score {int(np.isinf(given).argmax())} is infinite; a score counts as a share of its "
            "group's sum, so give finite ones, and keep whole groups by `exclude`"
        )
    return given


def build_plan(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    request: Mapping[str, Any],
    costs: Sequence[Cost],
) -> Plan:
    """A plan that keeps these channels; warns the caller's caller where it does not do much."""
    widths = graph.widths.copy()
    for index, kept in keep.items():
        widths[index] = len(kept)
    changes = {c.kind: Change(c.total, c.at(widths)) for c in costs}
    made = make_plan(graph, keep, request, changes)
    uncounted = [f"{node.ir.op_type} '{node.name}'" for node in graph.ops if node.opaque]
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        warnings.warn(
            "operators that are not described keep their channels, and what they compute is not "
            f"counted in the budget: {escape(', '.join(uncounted[:3]))}{more}",
            MorphWarning,
            stacklevel=3,
        )
    if not made.groups:
        warnings.warn(_nothing_shrinks(graph), MorphWarning, stacklevel=3)
    return made


def _nothing_shrinks(graph: ChannelGraph) -> str:
    why = all_pinned(graph) or "the model fits the request as it is"
    return f"the plan changes nothing: {why}"
