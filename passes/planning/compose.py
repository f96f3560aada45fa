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
        first: the network that everything is told of.
        graph: the network after the resizes so far.
        origin: per channel of ``graph`` its channel in ``first``; -1 where a resize has added it,
            -2 where that cannot be told, ``[channels]``.
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
        kept = AxisSelection(self.graph, keep, added)
        origin = np.full(len(small.channel_group), _UNKNOWN)
        owner = np.full(len(small.channel_group), -1)  # the group before, where it is known
        ambiguous = np.zeros(len(small.channel_group), dtype=bool)
        for dim in small.couplings.dims:
            if dim.value not in self.graph.couplings.first_dim:
                continue
            now = small.channels_at(dim.value, dim.axis)
            before = self.graph.channels_at(dim.value, dim.axis)
            positions = kept.axis(dim.value, dim.axis)
            if positions is not None:
                before = before[positions]
            if len(before) != len(now):
                continue  # a constant that has taken the place of a vanished layer's result
            source = self.origin[before]
            source[kept.fresh(dim.value, dim.axis)] = _NEW
            unknown = origin[now] == _UNKNOWN
            origin[now[unknown]] = source[unknown]
            owner[now[unknown]] = self.graph.channel_group[before[unknown]]
            ambiguous[now[origin[now] != source]] = True
        origin[ambiguous] = _UNKNOWN
        groups = [self._origin_group(owner[group.channels]) for group in small.groups]
        origin_group = np.array(groups, dtype=int)
        return Provenance(self.first, small, origin, origin_group, self.compose(plan, {}))

    def _origin_group(self, owners: IntArray) -> int:
        found = np.unique(owners)
        return int(self.origin_group[found[0]]) if len(found) == 1 and found[0] >= 0 else -1

    def frozen_groups(self) -> list[str]:
        """Ids of groups that must keep their widths, or no plan for ``first`` could say it.

        A layer that vanishes can take with it what tied two groups, pinned one, or tied the
        channels of one together. They are free now, but not in ``first``.
        """
        free = set(self._successors().values())
        return [g.id for g in self.graph.groups if g.resizable and g.index not in free]

    def _successors(self) -> dict[int, int]:
        """Per resizable group of ``first`` the group that has its channels, one to one."""
        children = Counter(self.origin_group.tolist())
        found = {}
        for group, home in zip(self.graph.groups, self.origin_group.tolist(), strict=True):
            origin = self.origin[group.channels]
            known = origin[origin != _NEW]
            one_to_one = len(np.unique(known)) == len(known) and _UNKNOWN not in known
            alone = home >= 0 and children[home] == 1 and self.first.groups[home].resizable
            if alone and one_to_one:
                found[home] = group.index
        return found

    def compose(
        self, plan: Plan, request: Mapping[str, Any], costs: Iterable[str] | None = None
    ) -> Plan:
        """What all resizes and then this plan for ``graph`` come to, as a plan for ``first``.

        Channels that stay throughout are kept, those that a resize has added are ``new``. Where no
        channel of a group stays throughout but some of the new ones do, the first stands for one of
        them, since a plan adds channels behind those that it keeps. States these ``costs``, by
        default those that ``plan`` states.

        Raises:
            PlanError: the plan is for another network than ``graph``.
        """
        kept, added = plan.keep_channels(self.graph), plan.added(self.graph)
        keep = {} if self.plan is None else self.plan.keep_channels(self.first)
        new = {} if self.plan is None else self.plan.added(self.first)
        for home, index in self._successors().items():
            heir = self.graph.groups[index]
            staying = heir.channels[kept.get(index, np.arange(heir.width))]
            origin = self.origin[staying]
            known = np.isin(self.first.groups[home].channels, origin[origin >= 0])
            keep[home] = np.flatnonzero(known)
            new[home] = int((origin == _NEW).sum()) + added.get(index, 0)
            if new[home] and not len(keep[home]):
                keep[home], new[home] = np.zeros(1, dtype=np.int64), new[home] - 1
        stated = [cost(self.first, kind) for kind in (plan.cost if costs is None else costs)]
        return make_plan(self.first, keep, request, stated, new)
