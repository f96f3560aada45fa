"""A smaller vocabulary: rows of the embedding, and what outputs say of the same tokens."""

from collections.abc import Iterable, Mapping, Sequence

from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.rows import tables
from morphgraph.passes.planning.outputs import Classes


def frequent_tokens(
    counts: Mapping[int, int] | Sequence[int],
    most: int | None = None,
    *,
    always: Iterable[int] = (),
) -> list[int]:
    """The tokens that a text uses, and those that are needed whatever the text is; ascending.

    Args:
        counts: how often each token id stands in a text: by id, or a number for every id.
        most: how many tokens stay at most, those that stand there most often first; by default all
            that stand there.
        always: ids that stay in any case: of special tokens, and of the bytes or letters of which
            any other text can be put together.

    Raises:
        ArgumentError: there is nothing to keep, or more is asked to stay than may.

    >>> frequent_tokens([0, 7, 3, 0, 9], 3, always=[0])
    [0, 1, 4]
    """
    pairs = counts.items() if isinstance(counts, Mapping) else enumerate(counts)
    stays = set(always)
    used = sorted((-count, token) for token, count in pairs if count > 0 and token not in stays)
    room = len(used) if most is None else most - len(stays)
    if room < 0:
        raise ArgumentError(
            f"vocabulary: {len(stays)} tokens stay in any case, and {most} may; raise the number"
        )
    if not (stays or used):
        raise ArgumentError(
            "vocabulary: the text uses no token; give counts of a text as the model reads it"
        )
    return sorted(stays.union(token for _, token in used[:room]))


def token_map(kept: Iterable[int]) -> dict[int, int]:
    """By the old id of every token that is kept its new one: its place among them, ascending.

    >>> token_map([7, 2, 11])
    {2: 0, 7: 1, 11: 2}
    """
    return {token: place for place, token in enumerate(sorted(kept))}


def by_vocabulary(graph: ChannelGraph, ids: Sequence[int]) -> tuple[Classes, Classes]:
    """What outputs and tables keep so that a network has these tokens and no others.

    The table is the one whose rows an input numbers and of which an output has as many positions;
    without such an output, the only one that an input numbers. Heads follow, tied or not.

    Args:
        graph: lifted with ``pin_outputs=False`` and ``pin_rows=False``.
        ids: of the tokens that stay.

    Returns:
        ``keep_classes`` and ``keep_tokens``, as of :func:`morphgraph.plan`.

    Raises:
        ArgumentError: several tables could be meant.
        UnsupportedError: the graph was lifted otherwise, or no input numbers the rows of a table.
    """
    if graph.options.pin_rows or graph.options.pin_outputs:
        raise UnsupportedError(
            "vocabulary: embeddings or outputs keep their size in this graph; lift the model with "
            "pin_rows=False, pin_outputs=False"
        )
    known = {name: rows.count for name, rows in tables(graph).items() if rows.inputs}
    heads = _free_axes(graph)
    named = [name for name, count in known.items() if count in heads.values()] or [*known]
    if len(named) != 1:
        some = ", ".join(f"'{escape(name)}' ({known[name]} rows)" for name in named)
        raise (ArgumentError if named else UnsupportedError)(
            f"vocabulary: inputs number the rows of {some}; name the table with keep_tokens"
            if named
            else "vocabulary: no input numbers the rows of a table of weights in floating point"
        )
    (table,) = named
    classes = {head: ids for head, count in heads.items() if count == known[table]}
    return classes, {table: ids}


def _free_axes(graph: ChannelGraph) -> dict[str, int]:
    """The axes of outputs that may change, as ``keep_classes`` names them, with their sizes."""
    found: dict[str, int] = {}
    for value in graph.model.graph.outputs:
        name = value.name or ""
        for axis, size in enumerate(graph.shapes.get(name, ())):
            if any(graph.groups[k].can_change for k in graph.groups_on(graph.dim(name, axis))):
                found[f"{name}:{axis}"] = size
    return found
