"""Which widths a plan may give: grid, floor, widths by hand, and the groups that may change."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product
from math import ceil, gcd, lcm
from typing import get_args

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.options import Depth, RoundTo
from morphgraph.passes.analysis.branches import Branch, blocks, branches
from morphgraph.passes.analysis.least import least_widths, multiples
from morphgraph.passes.analysis.liveness import is_viable, require_viable, with_orphans
from morphgraph.passes.planning.grids import Grid, tensor_channels
from morphgraph.passes.planning.same import any_match, held_together, one_width, require_match
from morphgraph.passes.planning.steps import Steps, auto_steps, common
from morphgraph.passes.planning.ties import NONE, Ties, in_one_ratio

Widths = Mapping[str, int | str]
"""Widths by hand: per glob over group ids, names and producers a number or a share (``"50%"``)."""

COARSEST = 99
"""More steps than any group has: the one that suits best."""
BY_HAND = 1
"""Shares and ratios by hand are rounded to the finest step but 1, where there are several."""

_WIDTH = re.compile(r"([0-9]{1,10})|([0-9]{1,10}(?:\.[0-9]{1,10})?)%")


@dataclass(frozen=True, slots=True)
class WidthBounds:
    """Which widths a plan may give, whatever the network.

    Attributes:
        round_to: channels of the tensors that layers make and read become multiples of this; with
            ``"auto"`` of what suits each group.
        min_width: no group gets fewer channels of a tensor; with 0 groups may go as a whole, and
            their layers vanish.
        include, exclude: globs over group ids, names and producers.
        widths: widths by hand; where several globs name a group, the last counts.
        same: globs; all groups that one of them names get one width. ``"repeated"`` among them
            stands for the groups that correspond in repeated blocks.
        channels: per index of a group the channels that stay, by hand.
        steps: what suits each group, ``[groups]``, where that was measured; for ``"auto"``.
        finer: per index of a group how many finer steps that of ``"auto"`` has at most, for groups
            that would not leave a budget room enough.
        least, most: floors and ceilings of some groups, as widths by hand are given.
        depth: whether whole branches or blocks may go, whatever ``min_width`` is.
        ties: widths that go together for the sake of a config.
        factors: by index of a group a number that its width is a multiple of, too.
    """

    round_to: RoundTo = 1
    min_width: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    widths: Widths = field(default_factory=dict)
    same: Sequence[str] = ()
    channels: Mapping[int, IntArray] = field(default_factory=dict)
    steps: Sequence[Steps] | None = None
    finer: Mapping[int, int] = field(default_factory=dict)
    least: Widths = field(default_factory=dict)
    most: Widths = field(default_factory=dict)
    depth: Depth = "keep"
    ties: Ties = NONE
    factors: Mapping[int, int] = field(default_factory=dict)

    def check(self, graph: ChannelGraph) -> "WidthBounds":
        """These bounds, if they make sense: a glob that names no group would be a typo.

        Raises:
            ArgumentError: ``round_to`` is below 1, or ``min_width`` below 0.
            UnsupportedError: ``include`` or ``exclude`` names no group.
        """
        if self.depth not in get_args(Depth):
            raise ArgumentError(f"depth={self.depth}: give one of {', '.join(get_args(Depth))}")
        is_grid = self.round_to == "auto" if isinstance(self.round_to, str) else self.round_to >= 1
        if not is_grid or self.min_width < 0:
            raise ArgumentError(
                f"round_to={self.round_to}, min_width={self.min_width}: give whole numbers, "
                "round_to from 1 or 'auto', min_width from 0"
            )
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                require_match(graph, pattern, option)
        return self

    def on(self, graph: ChannelGraph) -> "AllowedWidths":
        """The widths that every group of a network may get.

        Raises:
            ArgumentError: a number makes no sense.
            PlanError: with the widths by hand nothing would be left of the network.
            UnsupportedError: a glob names no group, or none that may change, a width does not fit,
                or groups that are to get one width cannot.
        """
        self.check(graph)
        blocks = one_width(graph, self.same, self.allows, self.ties)
        units, widths = tensor_channels(graph).tolist(), graph.widths.tolist()
        alike = [block for block in blocks if len({widths[index] for index in block}) == 1]
        for block in alike:
            common = gcd(*(units[index] for index in block))
            for index in block:
                units[index] = common
        pitches = multiples(graph).tolist()
        for index, factor in self.factors.items():
            pitches[index] = lcm(pitches[index], factor)
        for block in alike:
            together = lcm(*(pitches[index] for index in block))
            for index in block:
                pitches[index] = together
        all_steps = self._multiples(graph, blocks), self._multiples(graph, blocks, BY_HAND)
        grids, shares = (
            [
                Grid.of(step, unit, width).also(pitch, width)
                for step, unit, width, pitch in zip(steps, units, widths, pitches, strict=True)
            ]
            for steps in all_steps
        )
        unlike = [block for block in blocks if block not in alike]
        stuck = set(held_together(graph, self.same, self.ties, self.allows))
        for block, (of, steps) in product(unlike, zip((grids, shares), all_steps, strict=True)):
            finest = [steps[k] // gcd(steps[k], units[k]) for k in block]
            found = in_one_ratio([widths[k] for k in block], finest, [pitches[k] for k in block])
            if found is None:
                stuck.update(block)
            for index, grid in zip(block, found or (), strict=False):
                of[index] = grid
        floors, ceilings = list(widths), list(widths)
        needed = least_widths(graph).tolist()
        shared = {index for block in blocks for index in block if len(block) > 1}
        for group in graph.groups:
            index = group.index
            if self.allows(group) and index not in stuck:
                least = -(-self.min_width // units[index])
                # Groups of one width do not vanish one by one.
                asked = needed[index] if needed[index] > 1 or index in shared else 0
                floor = grids[index].at_least(max(least, asked))
                floors[index] = min(group.width, floor)
        for block in unlike:  # their floors in one ratio, too
            share = max(Fraction(floors[index], widths[index]) for index in block)
            for index in block:
                floors[index] = min(
                    widths[index], grids[index].at_least(ceil(share * widths[index]))
                )
        most = _by_hand(replace(self, widths=self.most), graph, shares, blocks)
        for index, width in most.items():
            ceilings[index] = min(ceilings[index], max(width, floors[index]))
        least_of = _by_hand(replace(self, widths=self.least), graph, shares, blocks)
        for index, width in least_of.items():
            floors[index] = min(ceilings[index], max(width, floors[index]))
        by_hand = _by_hand(self, graph, shares, blocks)
        by_hand |= {index: len(positions) for index, positions in self.channels.items()}
        for index, width in by_hand.items():
            floors[index] = ceilings[index] = width
        require_viable(graph, [index for index, width in enumerate(ceilings) if width == 0])
        low, high, each = (np.array(n, dtype=np.int64) for n in (floors, ceilings, units))
        fixed = by_hand.keys() | least_of.keys()
        mortal = [g.index for g in graph.groups if self.allows(g) and g.index not in fixed]
        parts = self._parts(graph, frozenset(mortal))
        return AllowedWidths(graph, self, low, high, each, tuple(grids), blocks, parts)

    def _parts(self, graph: ChannelGraph, mortal: frozenset[int]) -> tuple[Branch, ...]:
        """What may go as a whole."""
        if self.depth == "keep":
            return ()
        found = branches(graph, mortal)
        whole = blocks(found)
        if self.depth == "blocks":
            return whole
        return (*found, *(block for block in whole if block not in found))

    def steps_of(self, graph: ChannelGraph) -> Sequence[Steps]:
        """What suits each group, ``[groups]``."""
        if isinstance(self.round_to, int):
            return [Steps((self.round_to,), "by hand")] * len(graph.groups)
        return auto_steps(graph) if self.steps is None else self.steps

    def _multiples(
        self, graph: ChannelGraph, blocks: Sequence[tuple[int, ...]], level: int = COARSEST
    ) -> list[int]:
        """What each group's width is a multiple of, in channels of a tensor, ``[groups]``."""
        all_steps, chosen = self.steps_of(graph), [1] * len(graph.groups)
        for block in blocks:
            steps = common([all_steps[index] for index in block])
            finest = min(self.finer.get(index, level) for index in block)
            for index in block:
                chosen[index] = steps.at(min(level, finest))
        return chosen

    def allows(self, group: Group) -> bool:
        """Whether a plan may change the group's width to meet a budget."""
        named = bool(self.include) and any_match(group, self.include)
        wanted = named or (not self.include and not group.held)
        tied = group.index in self.ties.fixed
        return group.can_change and wanted and not tied and not self.excludes(group)

    def excludes(self, group: Group) -> bool:
        """Whether the user wants the group left alone, or has said which channels it keeps."""
        return group.index in self.channels or any_match(group, self.exclude)

    def allowed(self, graph: ChannelGraph) -> Flags:
        """Which groups a plan may change, ``[groups]``."""
        return np.array([self.allows(group) for group in graph.groups], dtype=bool)

    def lowest(self, graph: ChannelGraph) -> IntArray:
        """The narrowest widths within these bounds with which a network is left, ``[groups]``."""
        return self.on(graph).lowest()

    def request(self) -> dict[str, object]:
        """What a plan says of the wishes for single groups, if there were any."""
        return {
            **({"set": dict(self.widths)} if self.widths else {}),
            **({"same": list(self.same)} if self.same else {}),
            **({"depth": self.depth} if self.depth != "keep" else {}),
        }


@dataclass(frozen=True, eq=False)
class AllowedWidths:
    """The widths that every group of a network may get.

    Groups that are to have one width form a *block*; every other group is one by itself.

    Attributes:
        graph: the network.
        bounds: where these widths come from.
        floors, ceilings: the least width and the largest that a shrunk network has, ``[groups]``;
            the same where the width is given by hand, or the group may not change.
        units: channels of a tensor that a channel of the group is, ``[groups]``.
        grids: the widths between them, by group.
        blocks: indices of groups, every group in one block.
        parts: branches and blocks of the network that may go as a whole.
    """

    graph: ChannelGraph
    bounds: WidthBounds
    floors: IntArray
    ceilings: IntArray
    units: IntArray
    grids: tuple[Grid, ...]
    blocks: tuple[tuple[int, ...], ...]
    parts: tuple[Branch, ...] = ()

    def least(self, index: int) -> int:
        """The smallest width above 0 that the group may get."""
        first = self.grids[index].above(0)
        return max(int(self.floors[index]), min(int(self.ceilings[index]), first))

    def below(self, index: int, width: int) -> int:
        """The next smaller width of the group."""
        return max(int(self.floors[index]), self.grids[index].at_most(width - 1))

    def nearest(self, index: int, width: float) -> int:
        """The width of the group that is nearest to a wanted one."""
        nearest = self.grids[index].nearest(width)
        return int(np.clip(nearest, self.floors[index], self.ceilings[index]))

    def why_wide(self, index: int) -> str:
        """Why the group cannot get narrower than its floor, as a person would say it."""
        group = self.graph.groups[index]
        if group.reason is not None:
            return group.reason
        if index in self.bounds.ties.fixed:
            return self.bounds.ties.fixed[index]
        if index in self.bounds.channels:
            return "its channels are given by hand"
        if not self.bounds.allows(group):
            return "left alone by include or exclude"
        if self.floors[index] == self.ceilings[index] < group.width:
            return "its width is given by hand"
        return f"{self.floors[index]} is the least by round-to and min-width"

    @property
    def is_auto(self) -> bool:
        """Whether the grids were chosen by what suits each group."""
        return self.bounds.round_to == "auto"

    def chosen_coarse(self) -> Flags:
        """Groups for which more than one channel was chosen as their step, ``[groups]``."""
        return np.array([self.is_auto and grid.pitch > 1 for grid in self.grids], dtype=bool)

    def lowest(self) -> IntArray:
        """The narrowest widths with which a network is left, ``[groups]``."""
        widths = repair_widths(self.floors, self)
        dead = frozenset(np.flatnonzero(widths == 0).tolist())
        groups = _mortal_together(self.graph, dead, [part.groups for part in self.parts])
        widths[list(with_orphans(self.graph, groups, self.removable()))] = 0
        return widths

    def removable(self) -> list[int]:
        """Indices of the groups that may go as a whole: by themselves, or with a branch."""
        alone = np.flatnonzero(self.floors == 0).tolist()
        return sorted({*alone, *(index for part in self.parts for index in part.groups)})


def with_multiples(
    graph: ChannelGraph, bounds: WidthBounds, widths: IntArray
) -> WidthBounds | None:
    """Bounds under which widths are multiples of others, where those that were chosen are not.

    The others keep what was chosen for them, so that the multiples are known.

    Args:
        graph: the network.
        bounds: under which the widths were chosen.
        widths: which those were, ``[groups]``.
    """
    broken = [each for each in bounds.ties.multiples if not each.holds(widths)]
    if not broken:
        return None
    fixed: dict[str, int | str] = {}
    factors = dict(bounds.factors)
    for each in broken:
        number = each.factor * int(widths[each.of[0]])
        fixed |= {graph.groups[k].id: int(widths[k]) for k in each.of}
        factors |= {k: lcm(number, factors.get(k, 1)) for k in each.groups}
    return replace(bounds, widths={**bounds.widths, **fixed}, factors=factors)


def _by_hand(
    bounds: WidthBounds,
    graph: ChannelGraph,
    grids: Sequence[Grid],
    blocks: Sequence[tuple[int, ...]],
) -> dict[int, int]:
    """Per group index the width that is given by hand."""
    block_of = {index: block for block in blocks for index in block}
    chosen: dict[int, int] = {}
    for pattern, wish in bounds.widths.items():
        where = f"set '{escape(pattern)}={escape(str(wish))}'"
        matching = require_match(graph, pattern, "set")
        named = [group for group in matching if group.can_change and not bounds.excludes(group)]
        # A glob that names nothing but what is held asks for that.
        free = [group for group in named if group.resizable or bounds.allows(group)] or named
        if not free:
            group = matching[0]
            why = "is excluded" if group.can_change else f"cannot be resized ({group.reason})"
            raise UnsupportedError(f"{where}: '{escape(group.name)}' {why}")
        for group in free:
            width = _wished(where, wish, group, grids[group.index])
            chosen |= _in_ratio(where, graph, group, width, block_of[group.index])
    return chosen


def _in_ratio(
    where: str, graph: ChannelGraph, group: Group, width: int, block: tuple[int, ...]
) -> dict[int, int]:
    """What a width of a group makes of all groups of its block."""
    found = {index: Fraction(width * graph.groups[index].width, group.width) for index in block}
    for index, other in found.items():
        if other.denominator > 1:
            raise UnsupportedError(
                f"{where}: '{escape(graph.groups[index].name)}' changes by the same ratio, and "
                f"{other.denominator} does not divide its width; give a multiple of "
                f"{group.width // gcd(*(graph.groups[k].width for k in block))}, or let the config "
                "be (--unequal)"
            )
    return {index: int(other) for index, other in found.items()}


def _wished(where: str, wish: int | str, group: Group, grid: Grid) -> int:
    """A width as a number of channels; a share is rounded to the grid, and is one at least."""
    match = _WIDTH.fullmatch(str(wish))
    share = float(match[2]) / 100 if match and match[2] else None
    if match is None or (share or 0) > 1 or (match[1] and int(match[1]) > group.width):
        error = UnsupportedError if match and match[1] else ArgumentError
        raise error(
            f"{where}: '{escape(group.name)}' has {group.width} channels; give a width from 0 to "
            "that, or a share from 0% to 100%"
        )
    if share is None:
        return int(match[1])
    if share in (0, 1):
        return round(share * group.width)
    nearest = grid.nearest(share * group.width)
    return min(group.width, max(nearest, grid.above(0)))


def repair_widths(wanted: IntArray, allowed: AllowedWidths) -> IntArray:
    """Wanted widths, some of them 0, made such that a network is left, ``[groups]``.

    Groups go one by one, the widest first, where they can; the others keep their least width.
    Groups that are orphaned by that go with them.
    """
    graph, widths = allowed.graph, wanted.copy()
    zero = frozenset(np.flatnonzero(widths == 0).tolist())
    by_hand = frozenset(np.flatnonzero(allowed.ceilings == 0).tolist())
    alone = sorted(zero - by_hand, key=lambda k: -graph.groups[k].width)
    dead = zero
    if not is_viable(graph, zero):
        dead = _mortal_together(graph, zero & by_hand, [(index,) for index in alone])
    for index in zero - dead:
        widths[index] = allowed.least(index)
    widths[list(with_orphans(graph, dead, allowed.removable()))] = 0
    return widths


def _mortal_together(
    graph: ChannelGraph, dead: frozenset[int], candidates: Sequence[tuple[int, ...]]
) -> frozenset[int]:
    """Dead groups and as many of the candidates, in their order, as leave a network.

    More and more at a time while they can go, so that each is looked at about once.
    """
    place, count = 0, 1
    while place < len(candidates):
        batch = candidates[place : place + count]
        if is_viable(graph, grown := dead.union(*batch)):
            dead, place, count = grown, place + count, 2 * count
        elif len(batch) == 1:
            place += 1
        else:
            count = 1
    return dead
