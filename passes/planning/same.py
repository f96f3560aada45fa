"""Groups that are named together, and those of them that are to have one width."""

import fnmatch
import re
from collections.abc import Callable, Sequence

from morphgraph.errors import UnsupportedError, warn
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.options import REPEATED
from morphgraph.passes.planning.ties import NONE, Ties
from morphgraph.words import did_you_mean

_NUMBERED = re.compile(r"[0-9]+$")
_STEPS = re.compile(r"[./]")


def any_match(group: Group, patterns: Sequence[str]) -> bool:
    """Whether a glob names the group, by id, name or producer."""
    return any(fnmatch.fnmatchcase(name, p) for name in _names(group) for p in patterns)


def _names(group: Group) -> tuple[str, ...]:
    """What a glob may match."""
    return group.id, group.name, *group.producers


def require_match(graph: ChannelGraph, pattern: str, option: str) -> list[Group]:
    """The groups that a glob names, by id, name or producer.

    Raises:
        UnsupportedError: there is none; says which names are near.
    """
    matching = [group for group in graph.groups if any_match(group, [pattern])]
    if not matching:
        names = dict.fromkeys(name for group in graph.groups for name in _names(group))
        raise UnsupportedError(
            f"{option} '{escape(pattern)}': no group has that name"
            f"{did_you_mean(pattern.strip('*'), names)}; `analyze` lists them all"
        )
    return matching


def repeated(graph: ChannelGraph) -> list[list[Group]]:
    """Groups that correspond in repeated blocks: named alike but for numbers of blocks.

    ``layers.0.mlp.up`` and ``layers.7.mlp.up`` correspond where they have the same width, and so do
    the same layers of several experts. The last step of a name is no block: ``fc1`` and ``fc2``
    are two layers. What no layer produces by itself (stacked experts) goes by its weights' names.
    """
    kinds: dict[tuple[int, int, tuple[str, ...]], list[Group]] = {}
    for group in graph.groups:
        makers = group.producers or _weights(graph, group) or (group.name,)
        names = [_without_numbers(name) for name in makers]
        kind = group.width, _view(graph, group), tuple(sorted(set(names)))
        kinds.setdefault(kind, []).append(group)
    return [groups for groups in kinds.values() if len(groups) > 1]


def _view(graph: ChannelGraph, group: Group) -> int:
    """Heads, query heads and elements of heads of one layer are told apart by their views."""
    classes = graph.per_channel[:, [group.index]].tocoo().coords[0]
    return max(graph.views(int(graph.base[k])).index(int(k)) for k in classes)


def _weights(graph: ChannelGraph, group: Group) -> list[str]:
    """The axes of weights on which a group stands."""
    weights = graph.model.graph.initializers
    return [f"{m.value}:{m.axis}" for m in group.members if m.value in weights]


def _without_numbers(name: str) -> str:
    """A name in which the numbers of blocks are left out."""
    *blocks, layer = _STEPS.split(name)
    return "/".join([*(_NUMBERED.sub("#", block) for block in blocks), layer])


def one_for_all(same: Sequence[str]) -> tuple[str, ...]:
    """Globs with the word for groups that correspond in repeated blocks among them."""
    return tuple(same) if REPEATED in same else (*same, REPEATED)


def held_together(
    graph: ChannelGraph, same: Sequence[str], ties: Ties, allows: Callable[[Group], bool]
) -> frozenset[int]:
    """Indices of groups that keep their width, for one that goes with them may not change.

    A block that is left alone holds the others only where a config has one number for all.
    """
    together: list[Sequence[int]] = [*ties.ratios]
    if REPEATED in same:
        together += [
            [group.index for group in groups]
            for groups in repeated(graph)
            if ties.of or not all(group.can_change for group in groups)
        ]
    stuck = {g.index for g in graph.groups if not (allows(g) if ties.of else g.can_change)}
    held = set[int]()
    while more := {
        index
        for each in together
        if not stuck.isdisjoint(each)
        for index in each
        if index not in held
    }:
        held |= more
        stuck |= more
    return frozenset(held)


def warn_of_held(
    graph: ChannelGraph, same: Sequence[str], ties: Ties, allows: Callable[[Group], bool]
) -> None:
    """Say what follows where only a part of the blocks that correspond is left alone."""
    if REPEATED not in same:
        return
    for groups in repeated(graph):
        alone = [g for g in groups if g.can_change and not allows(g)]
        others = [g for g in groups if allows(g)]
        if alone and others:
            what = (
                f"{ties.of} has one number for all, and all keep their width"
                if ties.of
                else "a config has one number for all, and cannot say what comes out"
            )
            warn(
                f"same: '{escape(alone[0].name)}' is left alone, and '{escape(others[0].name)}' "
                f"corresponds to it: {what}; leave all alone or none (exclude=, include=)"
            )
            return


def one_width(
    graph: ChannelGraph,
    same: Sequence[str],
    allows: Callable[[Group], bool],
    ties: Ties = NONE,
) -> tuple[tuple[int, ...], ...]:
    """Indices of groups that are to have one width together, and every other group by itself.

    Globs with a group in common make one block.

    Args:
        graph: the network.
        same: globs, and the word for groups that correspond in repeated blocks.
        allows: whether a plan may change a group.
        ties: widths that go together for the sake of a config.

    Raises:
        UnsupportedError: a glob names no group, or groups that cannot get one width.
    """
    block_of = {group.index: frozenset({group.index}) for group in graph.groups}
    together = [_alike(graph, pattern, allows) for pattern in same if pattern != REPEATED]
    if REPEATED in same:
        together += [[g.index for g in groups if allows(g)] for groups in repeated(graph)]
    together += [[index for index in each if allows(graph.groups[index])] for each in ties.ratios]
    for members in together:
        block = frozenset().union(*(block_of[index] for index in members))
        block_of |= dict.fromkeys(block, block)
    return tuple(tuple(sorted(block)) for block in dict.fromkeys(block_of.values()))


def _alike(graph: ChannelGraph, pattern: str, allows: Callable[[Group], bool]) -> list[int]:
    """Indices of the groups of a glob that are to have one width."""
    where = f"same '{escape(pattern)}'"
    named = require_match(graph, pattern, "same")
    matching = [group for group in named if allows(group) or not group.resizable]
    if not matching:
        raise UnsupportedError(f"{where}: '{escape(named[0].name)}' is excluded")
    by_width = {group.width: group for group in matching}
    if len(by_width) > 1:
        kinds = ", ".join(f"{width} ('{escape(g.name)}')" for width, g in sorted(by_width.items()))
        raise UnsupportedError(
            f"{where}: names groups of different widths: {kinds}; give one glob per kind of layer"
        )
    pinned = next((group for group in matching if not allows(group)), None)
    if pinned is not None:
        raise UnsupportedError(
            f"{where}: '{escape(pinned.name)}' cannot be resized ({pinned.reason}), so that all "
            "would keep their width; give a glob without it"
        )
    return [group.index for group in matching]
