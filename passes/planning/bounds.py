"""Which widths a plan may give: the rounding grid, the floor, and the groups that may change."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.liveness import is_viable, with_orphans


@dataclass(frozen=True, slots=True)
class WidthBounds:
    """Which widths a plan may give.

    Attributes:
        round_to: widths that change become multiples of this.
        min_width: no group gets narrower; with 0 groups may go as a whole, and their layers vanish.
        include, exclude: globs over group ids, names and producers.
    """

    round_to: int = 1
    min_width: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def check(self, graph: ChannelGraph) -> "WidthBounds":
        """These bounds, if they make sense: a glob that names no group would be a typo.

        Raises:
            ArgumentError: ``round_to`` is below 1, or ``min_width`` below 0.
            UnsupportedError: ``include`` or ``exclude`` names no group.
        """
        if self.round_to < 1 or self.min_width < 0:
            raise ArgumentError(
                f"round_to={self.round_to}, min_width={self.min_width}: give whole numbers, "
                "round_to from 1, min_width from 0"
            )
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                require_match(graph, pattern, option)
        return self

    def allows(self, group: Group) -> bool:
        """Whether a plan may change the group's width."""
        wanted = not self.include or _any_match(group, self.include)
        return group.resizable and wanted and not _any_match(group, self.exclude)

    def allowed(self, graph: ChannelGraph) -> Flags:
        """Which groups a plan may change, ``[groups]``."""
        return np.array([self.allows(group) for group in graph.groups], dtype=bool)

    def lowest(self, graph: ChannelGraph) -> IntArray:
        """The narrowest widths within these bounds with which a network is left, ``[groups]``."""
        floors = np.array([self.floor(group) for group in graph.groups], dtype=np.int64)
        return repair_widths(graph, floors, self)

    def floor(self, group: Group) -> int:
        """The smallest width that the group may get."""
        if not self.allows(group):
            return group.width
        return min(group.width, -(-self.min_width // self.round_to) * self.round_to)

    def least(self, group: Group) -> int:
        """The smallest width above 0 that the group may get."""
        return max(self.floor(group), min(group.width, self.round_to))

    def below(self, group: Group, width: int) -> int:
        """The next smaller width on the grid."""
        return max(self.floor(group), (width - 1) // self.round_to * self.round_to)

    def nearest(self, group: Group, width: float) -> int:
        """The width on the grid that is nearest to a wanted one."""
        rounded = int(np.floor(width / self.round_to + 0.5)) * self.round_to
        return int(np.clip(rounded, self.floor(group), group.width))


def _any_match(group: Group, patterns: Sequence[str]) -> bool:
    names = (group.id, group.name, *group.producers)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def require_match(graph: ChannelGraph, pattern: str, option: str) -> list[Group]:
    """The groups that a glob names, by id, name or producer.

    Raises:
        UnsupportedError: there is none.
    """
    matching = [group for group in graph.groups if _any_match(group, [pattern])]
    if not matching:
        raise UnsupportedError(
            f"{option} '{escape(pattern)}': no group has that name; `analyze` lists them all"
        )
    return matching


def repair_widths(graph: ChannelGraph, wanted: IntArray, bounds: WidthBounds) -> IntArray:
    """Wanted widths, some of them 0, made such that a network is left, ``[groups]``.

    Groups go one by one, the widest first, where they can; the others keep their least width.
    Groups that are orphaned by that go with them.
    """
    widths = wanted.copy()
    zero = frozenset(np.flatnonzero(widths == 0).tolist())
    dead = zero if is_viable(graph, zero) else frozenset()
    for index in sorted(zero - dead, key=lambda k: -graph.groups[k].width):
        if is_viable(graph, dead | {index}):
            dead |= {index}
        else:
            widths[index] = bounds.least(graph.groups[index])
    widths[list(with_orphans(graph, dead, removable(graph, bounds)))] = 0
    return widths


def removable(graph: ChannelGraph, bounds: WidthBounds) -> list[int]:
    """Indices of the groups that may go as a whole."""
    return [group.index for group in graph.groups if bounds.floor(group) == 0]
