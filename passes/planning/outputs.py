"""Which channels stay so that graph outputs keep certain classes: outputs by index."""

from collections.abc import Mapping, Sequence

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape

Classes = Mapping[str, Sequence[int]] | Sequence[int]
"""Classes to keep: indices on an output's axis, by output (``"name"`` or ``"name:axis"``), or alone
where the network has one output."""


def channels_of_classes(graph: ChannelGraph, classes: Classes) -> dict[int, IntArray]:
    """Per index of a group with channels on an output those that stay.

    The groups of the chosen axes keep the channels of the classes, ascending; other groups on
    outputs keep all. Without classes there is nothing to say, and the result is empty.

    Args:
        graph: lifted with ``pin_outputs=False``, so that outputs may change.
        classes: what is kept.

    Raises:
        ArgumentError: an index is out of range or stands there twice, or an output is unknown.
        UnsupportedError: outputs keep their size, or these positions cannot go by themselves.
    """
    chosen = _by_output(graph, classes)
    if not chosen:
        return {}
    if graph.options.pin_outputs:
        raise UnsupportedError(
            "keep_classes: graph outputs keep their size in this graph; lift the model with "
            "pin_outputs=False"
        )
    keep: dict[int, IntArray] = {}
    for name, indices in chosen.items():
        where = f"keep_classes '{escape(name)}'"
        for index, positions in _kept(graph, *_axis(graph, name, where), indices, where).items():
            if not np.array_equal(keep.setdefault(index, positions), positions):
                raise ArgumentError(
                    f"{where}: shares its channels with another output, for which other classes "
                    "are given; give both the same"
                )
    outputs = {value.name for value in graph.model.graph.outputs}
    for group in graph.groups:
        if any(member.value in outputs for member in group.members):
            keep.setdefault(group.index, np.arange(group.width))
    return keep


def request_of_classes(classes: Classes) -> dict[str, object]:
    """What a plan says of the classes that it keeps."""
    if isinstance(classes, Mapping):
        return {"keep_classes": {k: [int(i) for i in v] for k, v in classes.items()}}
    return {"keep_classes": [int(index) for index in classes]} if len(classes) else {}


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
    return sorted(index for index in found if graph.groups[index].resizable)


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
