"""Which channels stay so that outputs and embeddings keep certain positions, by index."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.rows import tables

Classes = Mapping[str, Sequence[int]] | Sequence[int]
"""Classes to keep: indices on an output's axis, by output (``"name"`` or ``"name:axis"``), or alone
where the network has one output."""


def channels_by_index(
    graph: ChannelGraph, classes: Classes = (), tokens: Classes = ()
) -> dict[int, IntArray]:
    """Per index of a group with channels on an output, or among a table's rows, those that stay.

    The groups of the chosen axes keep the channels of the classes and tokens, ascending; other
    groups on outputs keep all, and so do rows that are named by number. With neither classes nor
    tokens outputs are left as the graph has them.

    Args:
        graph: lifted with ``pin_outputs=False``, so that outputs may change, and for tokens with
            ``pin_rows=False``.
        classes: positions of outputs.
        tokens: rows of a table: by the table's name, or alone where there is one.

    Raises:
        ArgumentError: an index is out of range or stands there twice, or an output is unknown.
        UnsupportedError: outputs or rows keep their size, or these positions cannot go by
            themselves.
    """
    keep: dict[int, IntArray] = {}
    for where, value, axis, indices in (*_classes(graph, classes), *_tokens(graph, tokens)):
        for index, positions in _kept(graph, value, axis, indices, where).items():
            if not np.array_equal(keep.setdefault(index, positions), positions):
                raise ArgumentError(
                    f"{where}: shares its channels with another output or table, of which others "
                    "are kept; give both the same"
                )
    held = {index for rows in tables(graph).values() for index in rows.groups}
    if keep:
        outputs = {value.name for value in graph.model.graph.outputs}
        on_outputs = (g for g in graph.groups if any(m.value in outputs for m in g.members))
        held.update(group.index for group in on_outputs)
    return {index: np.arange(graph.groups[index].width) for index in held} | keep


_Choice = tuple[str, str, int, Sequence[int]]  # for errors, value, axis, positions that stay


def _classes(graph: ChannelGraph, classes: Classes) -> Iterator[_Choice]:
    for name, indices in _by_output(graph, classes).items():
        if graph.options.pin_outputs:
            raise UnsupportedError(
                "keep_classes: graph outputs keep their size in this graph; lift the model with "
                "pin_outputs=False"
            )
        where = f"keep_classes '{escape(name)}'"
        yield where, *_axis(graph, name, where), indices


def _tokens(graph: ChannelGraph, tokens: Classes) -> Iterator[_Choice]:
    if not len(tokens):
        return
    if graph.options.pin_rows:
        raise UnsupportedError(
            "keep_tokens: embeddings keep their rows in this graph; lift the model with "
            "pin_rows=False, and pin_outputs=False where an output has the tokens too"
        )
    known = {name: rows for name, rows in tables(graph).items() if rows.inputs}
    names = ", ".join(f"'{escape(name)}' ({rows.count} rows)" for name, rows in known.items())
    if not isinstance(tokens, Mapping):
        if len(known) != 1:
            raise ArgumentError(
                f"keep_tokens: say of which table; those that an input numbers: {names or 'none'}"
            )
        tokens = {next(iter(known)): tokens}
    for name, indices in tokens.items():
        if name not in known:
            raise ArgumentError(
                f"keep_tokens: no input numbers rows of '{escape(name)}'; there are {names}"
            )
        yield f"keep_tokens '{escape(name)}'", name, known[name].axis, indices


def request_by_index(classes: Classes, tokens: Classes) -> dict[str, object]:
    """What a plan says of the classes and tokens that it keeps."""
    return {
        key: {name: _integers(each) for name, each in chosen.items()}
        if isinstance(chosen, Mapping)
        else _integers(chosen)
        for key, chosen in (("keep_classes", classes), ("keep_tokens", tokens))
        if len(chosen)
    }


def _integers(indices: Sequence[int]) -> list[int]:
    """In their order in the result: the place of each is its new index."""
    return sorted(int(index) for index in indices)


def _by_output(graph: ChannelGraph, classes: Classes) -> Mapping[str, Sequence[int]]:
    if isinstance(classes, Mapping):
        return classes
    names = [value.name or "" for value in graph.model.graph.outputs]
    if len(classes) and len(names) > 1:
        some = ", ".join(f"'{escape(name)}'" for name in names)
        raise ArgumentError(f"keep_classes: say of which output; the model has {some}")
    return {names[0]: classes} if len(classes) else {}


def _axis(graph: ChannelGraph, name: str, where: str) -> tuple[str, int]:
    """The output and its axis of classes: the only one with channels that may go."""
    outputs = [value.name or "" for value in graph.model.graph.outputs]
    output, _, text = (name, "", "") if name in outputs else name.rpartition(":")
    rank = len(graph.shapes.get(output, ()))
    if output not in outputs or (text and not (text.isdecimal() and int(text) < rank)):
        some = ", ".join(f"'{escape(each)}'" for each in outputs)
        raise ArgumentError(f"{where}: no such output or axis; the model's outputs are {some}")
    if text:
        return output, int(text)
    free = [axis for axis in range(rank) if _groups_on(graph, output, axis)]
    if len(free) == 1:
        return output, free[0]
    sizes = "x".join(map(str, graph.shapes.get(output, ())))
    if not free:
        reasons = sorted(
            {
                group.reason
                for group in graph.groups
                if group.reason and any(member.value == output for member in group.members)
            }
        )
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UnsupportedError(f"{where}: no axis of this output ({sizes}) may change{why}")
    raise ArgumentError(
        f"{where}: the axes {', '.join(map(str, free))} of {sizes} may change; say which is that "
        f"of the classes: '{escape(output)}:{free[-1]}'"
    )


def _groups_on(graph: ChannelGraph, output: str, axis: int) -> list[int]:
    """Indices of the groups on an axis that may change."""
    found = graph.groups_on(graph.dim(output, axis))
    return sorted(index for index in found if graph.groups[index].can_change)


def _kept(
    graph: ChannelGraph, output: str, axis: int, indices: Sequence[int], where: str
) -> dict[int, IntArray]:
    """Per index of a group on the axis its channels that stay."""
    channels = graph.channels_at(output, axis)
    chosen = np.array(list(indices))
    within = chosen.dtype.kind in "iu" and (chosen >= 0).all() and (chosen < len(channels)).all()
    if not within or len(np.unique(chosen)) < len(chosen):
        raise ArgumentError(f"{where}: give whole numbers from 0 to {len(channels) - 1}, each once")
    stays = np.isin(np.arange(len(channels)), chosen)
    kept, gone = channels[stays], channels[~stays]
    free = _groups_on(graph, output, axis)
    fixed = np.flatnonzero(~stays & ~np.isin(graph.channel_group[channels], free))
    if len(fixed):
        raise UnsupportedError(
            f"{where}: position {fixed[0]} cannot go, since its channel may not change"
        )
    if len(split := np.intersect1d(kept, gone)):
        together = np.flatnonzero(channels == split[0]).tolist()
        raise UnsupportedError(
            f"{where}: positions {', '.join(map(str, together))} are one channel; keep all of them "
            "or none"
        )
    return {index: np.flatnonzero(np.isin(graph.groups[index].channels, kept)) for index in free}
