"""Widths that go together, because something outside of the graph says them: a model's config.

A config has fewer numbers than a network has groups. Where it derives one from others (a head's
size from the hidden width and the number of heads), groups change by one ratio. Where it refuses
what does not divide, the width of one is a multiple of a number that follows another. And what it
cannot say at all keeps its width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.planning.grids import Grid


@dataclass(frozen=True, slots=True)
class Multiple:
    """The width of some groups is a multiple of so many times the width of another.

    Attributes:
        groups: indices of the groups, of one width.
        of: indices of the others, of one width.
        factor: how often that width is taken.
    """

    groups: tuple[int, ...]
    of: tuple[int, ...]
    factor: int

    def holds(self, widths: IntArray) -> bool:
        """Whether widths, ``[groups]``, are such."""
        number = self.factor * int(widths[self.of[0]])
        return number == 0 or int(widths[self.groups[0]]) % number == 0


@dataclass(frozen=True, slots=True)
class Ties:
    """Which groups of a network have widths that go together.

    Attributes:
        ratios: indices of groups that change by one ratio.
        multiples: widths that are multiples of others.
        fixed: by index of a group that keeps its width the reason, as a person would say it.
        of: what says so, for a reader: ``"LlamaConfig"``.

    >>> Ties(ratios=((0, 3),)).ratios
    ((0, 3),)
    """

    ratios: tuple[tuple[int, ...], ...] = ()
    multiples: tuple[Multiple, ...] = ()
    fixed: Mapping[int, str] = field(default_factory=dict)
    of: str = ""

    def request(self, graph: ChannelGraph) -> dict[str, object]:
        """What a plan says of them; empty where nothing is tied."""

        def ids(indices: Sequence[int]) -> list[str]:
            return [graph.groups[index].id for index in indices]

        said: dict[str, object] = {}
        if self.ratios:
            said["one_ratio"] = [ids(each) for each in self.ratios]
        if self.multiples:
            said["multiples"] = [
                {"groups": ids(m.groups), "of": ids(m.of), "factor": m.factor}
                for m in self.multiples
            ]
        if self.fixed:
            said["kept"] = ids(sorted(self.fixed))
        return {"config": {"of": self.of, **said}} if said else {}


NONE = Ties()
"""Nothing goes together."""


def in_one_ratio(
    widths: Sequence[int], steps: Sequence[int], needed: Sequence[int]
) -> list[Grid] | None:
    """The grids on which groups of different widths keep their ratio; ``None``: there are none.

    Args:
        widths: of the groups.
        steps: what their widths should be multiples of; left out where that leaves nothing.
        needed: and what they have to be multiples of.

    >>> [grid.pitch for grid in in_one_ratio([64, 8], [16, 1], [1, 1])]
    [Fraction(16, 1), Fraction(2, 1)]
    >>> in_one_ratio([64, 9], [1, 1], [1, 1]) is None
    True
    """
    most = gcd(*widths)
    parts = [width // most for width in widths]
    for each in (list(map(lcm, steps, needed)), needed):
        count = lcm(*(n // gcd(n, part) for n, part in zip(each, parts, strict=True)))
        if count < most:
            return [Grid.of(part * count, 1, part * most) for part in parts]
    return None
