"""From numbers per channel to a plan: which channels stay, and what the plan states."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import UnsupportedError, warn
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.channel_sources import computed_kernels, stored_kernels
from morphgraph.passes.analysis.convolutions import price_of_widths
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
    scores: FloatArray | None = None,
    by_hand: Container[int] = (),
) -> Plan:
    """A plan that keeps these channels; warns the caller's caller of what it leaves as it is.

    With the ``scores`` by which channels were chosen, ``[channels]``, it also warns of groups in
    which these tell no channel from another; ``by_hand`` are groups whose channels no score chose.
    """
    costs = list(costs)
    plan = make_plan(graph, keep, request, costs)
    ranked = {index: kept for index, kept in keep.items() if index not in by_hand}
    undecided = {} if scores is None else _undecided(graph, ranked, scores)
    if undecided:
        warn(_without_choice(undecided))
    uncounted = [f"{op.ir.op_type} '{op.name}'" for op in graph.ops if op.opaque]
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        warn(
            "operators that are not described keep their channels, and what they compute is not "
            f"counted in the budget: {escape(', '.join(uncounted[:3]))}{more}",
        )
    warn_of_price(graph, plan)
    if not plan.groups:
        warn(_nothing_shrinks(graph))
    return plan


def warn_of_price(graph: ChannelGraph, plan: Plan) -> None:
    """Say what a plan's widths cost in time where they are off the grid."""
    if price := price_of_widths(graph, plan.widths(graph)):
        by_auto = plan.request.get("round_to") == "auto"
        remedy = "" if by_auto else "; plan with --round-to auto (round_to='auto')"
        warn(price + remedy)


_SAME = 0.01  # scores of a group within this share of the largest do not tell channels apart


def _undecided(
    graph: ChannelGraph, keep: Mapping[int, IntArray], scores: FloatArray
) -> dict[str, list[Group]]:
    """By reason the groups that lose some of their channels, but no score says which."""
    sources = [source.channels for source in stored_kernels(graph)]
    sources += [kernel.channels for kernel in computed_kernels(graph)]
    made = set(graph.channel_group[np.concatenate(sources)].tolist()) if sources else set()
    found: dict[str, list[Group]] = {}
    for index, kept in keep.items():
        group = graph.groups[index]
        of: FloatArray = scores[group.channels]
        if 0 < len(kept) < group.width and np.ptp(of) <= _SAME * of.max():
            alike = "their channels score alike" if index in made else "no kernel makes them"
            found.setdefault(alike, []).append(group)
    return found


def _without_choice(undecided: Mapping[str, Sequence[Group]]) -> str:
    parts = []
    for reason, groups in undecided.items():
        names = ", ".join(f"{group.id} '{escape(group.name)}'" for group in groups[:5])
        more = f" and {len(groups) - 5} more" if len(groups) > 5 else ""
        parts.append(f"{names}{more} ({reason})")
    return (
        f"no score tells the channels apart of {'; '.join(parts)}: the first ones go, whatever "
        "they do; exclude these groups, or give scores"
    )


def _nothing_shrinks(graph: ChannelGraph) -> str:
    why = all_pinned(graph) or "the model fits the request as it is"
    return f"the plan changes nothing: {why}"
