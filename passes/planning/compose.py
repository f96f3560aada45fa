"""Pass ``compose``: several resizes, one after the other, as one plan for the first network.

Every channel of the network that a resize has made is a channel of the network before it, or new.
Which one is read off the axes that both have: values keep their names, and ``AxisSelection`` knows
which positions of an axis stayed. Ids of groups are no help, for they can differ after a layer
vanished.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.plans import Plan, make_plan

_NEW, _UNKNOWN = -1, -2


@dataclass(frozen=True)
class Provenance:
    """Where the channels of a network come from.

    Attributes:
        first: the network before all resizes.
        graph: the network after the resizes so far.
        origin: per channel of ``graph`` its channel in ``first``; -1 where a resize has added it,
            -2 where that is not known, ``[channels]``.
        origin_group: per group of ``graph`` the group of ``first``; -1 where there is no single
            one, ``[groups]``.
        plan: the resizes so far as a plan for ``first``; ``None`` where there were none.
    """

    first: ChannelGraph
    graph: ChannelGraph
    origin: IntArray
    origin_group: IntArray
    plan: Plan | None = None

    @classmethod
    def of(cls, graph: ChannelGraph) -> "Provenance":
        """A network that has not been resized yet."""
        return cls(graph, graph, np.arange(len(graph.channel_group)), np.arange(len(graph.groups)))

    def after(self, plan: Plan, small: ChannelGraph) -> "Provenance":
        """The provenance of ``small``, which is ``graph`` resized by this plan and lifted again."""
        keep, added = plan.keep_channels(self.graph), plan.added(self.graph)
        selection = AxisSelection(self.graph, keep, added)
        origin = np.full(len(small.channel_group), _UNKNOWN)
        group_before = np.full(len(small.channel_group), -1)  # of every channel; -1: not known
        ambiguous = np.zeros(len(small.channel_group), dtype=bool)
        for dim in small.couplings.dims:
            if dim.value not in self.graph.couplings.first_dim:
                continue
            now = small.channels_at(dim.value, dim.axis)
            before = self.graph.channels_at(dim.value, dim.axis)
            positions = selection.axis(dim.value, dim.axis)
            if positions is not None:
                before = before[positions]
            if len(before) != len(now):
                continue  # a constant that has taken the place of a vanished layer's result
            source = self.origin[before]
            source[selection.fresh(dim.value, dim.axis)] = _NEW
            # The first axis that has a channel decides; where another one differs, nobody can say.
            unknown = origin[now] == _UNKNOWN
            origin[now[unknown]] = source[unknown]
            group_before[now[unknown]] = self.graph.channel_group[before[unknown]]
            ambiguous[now[origin[now] != source]] = True
        origin[ambiguous] = _UNKNOWN
        groups = [self._origin_group(group_before[group.channels]) for group in small.groups]
        origin_group = np.array(groups, dtype=int)
        return Provenance(self.first, small, origin, origin_group, self.compose(plan, {}))

    def _origin_group(self, groups: IntArray) -> int:
        """The group of ``first`` behind channels that were in these groups of ``graph``."""
        alone = len(np.unique(groups)) == 1 and groups[0] >= 0
        return int(self.origin_group[groups[0]]) if alone else -1

    def frozen_groups(self) -> list[str]:
        """Ids of groups that must keep their widths, or no plan for ``first`` could say it.

        A layer that vanishes can take with it what tied two groups, pinned one, or tied the
        channels of one together. They are free now, but not in ``first``.
        """
        free = set(self._successors().values())
        return [g.id for g in self.graph.groups if g.resizable and g.index not in free]

    def _successors(self) -> dict[int, int]:
        """Per resizable group of ``first`` the group that has its channels, one to one."""
        descendants = Counter(self.origin_group.tolist())
        successors = {}
        for group, first in zip(self.graph.groups, self.origin_group.tolist(), strict=True):
            origin = self.origin[group.channels]
            known = origin[origin != _NEW]
            one_to_one = len(np.unique(known)) == len(known) and _UNKNOWN not in known
            alone = first >= 0 and descendants[first] == 1 and self.first.groups[first].can_change
            if alone and one_to_one:
                successors[first] = group.index
        return successors

    def compose(
        self, plan: Plan, request: Mapping[str, Any], costs: Iterable[str] | None = None
    ) -> Plan:
        """All resizes so far and then this plan for ``graph``, as one plan for ``first``.

        Channels that stay throughout are kept, those that a resize has added are ``new``. Where no
        channel of a group stays throughout but some of the new ones do, the first stands for one of
        them, since a plan adds channels behind those that it keeps.

        Args:
            plan: for ``graph``.
            request: what the new plan says it was made for.
            costs: those that it states; by default those that ``plan`` states.

        Raises:
            PlanError: the plan is for another network than ``graph``.
        """
        last_keep, last_new = plan.keep_channels(self.graph), plan.added(self.graph)
        keep = {} if self.plan is None else self.plan.keep_channels(self.first)
        new = {} if self.plan is None else self.plan.added(self.first)
        for first, index in self._successors().items():
            successor = self.graph.groups[index]
            origin = self.origin[
                successor.channels[last_keep.get(index, np.arange(successor.width))]
            ]
            stays = np.isin(self.first.groups[first].channels, origin[origin >= 0])
            keep[first] = np.flatnonzero(stays)
            new[first] = int((origin == _NEW).sum()) + last_new.get(index, 0)
            if new[first] and not len(keep[first]):
                keep[first], new[first] = np.zeros(1, dtype=np.int64), new[first] - 1
        stated = [cost(self.first, kind) for kind in (plan.cost if costs is None else costs)]
        return make_plan(self.first, keep, request, stated, new)
