"""Pass ``group``: from couplings to channels and groups.

1. Dims and factors joined by identity maps form classes, which share their positions.
2. Pins spread over classes. An axis with several factors (a *site*) is a product, or segments side
by
   side: a pinned axis pins its factors; an axis all of whose factors are pinned is pinned.
3. A product with several free factors chooses one carrier; the others are pinned, and pins spread.
   Preferences are properties of classes, so that two sites never tie a channel to two masters.
4. The remaining maps tie positions of classes to each other: one sparse connected-components call.
5. Channels that touch the same classes equally often are one group.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from morphgraph.graph import (
    Attention,
    ChannelGraph,
    Couplings,
    Dim,
    Edge,
    GraphNode,
    Group,
    IntArray,
    Pin,
)


@dataclass(frozen=True, slots=True)
class _Site:
    """An axis of one operator that several factors share, or one factor covers in part."""

    dim_class: int
    factor_classes: tuple[int, ...]
    edges: tuple[Edge, ...]
    product: bool
    covers: bool
    order: tuple[int, ...]


def group(couplings: Couplings, attention: Attention = "heads") -> ChannelGraph:
    """Find the channels that live and die together, and the groups that they form.

    Args:
        couplings: what the pass ``couple`` found.
        attention: whether an attention shrinks by whole heads or by the size of every head.
    """
    classes = _classes(couplings)
    sites = _sites(couplings, classes)
    reasons = _pins(couplings, classes)
    _spread(sites, reasons, reasons.keys())
    _choose_carriers(couplings, classes, sites, reasons, attention)
    return _Solver(couplings, classes, sites, reasons).graph()


def _classes(couplings: Couplings) -> IntArray:
    """Class of every node, numbered in the order of their first nodes."""
    whole = [edge for edge in couplings.edges if edge.whole]
    return _components(
        len(couplings.sizes),
        np.array([edge.factor for edge in whole], dtype=np.int64),
        np.array([edge.dim for edge in whole], dtype=np.int64),
    )


def _components(count: int, left: IntArray, right: IntArray) -> IntArray:
    """Connected component of every node, numbered in the order of their first nodes.

    The same as ``networkx.connected_components`` on ``ChannelGraph.networkx``, whose building alone
    would take a third of the time of lifting.
    """
    ties = sparse.coo_array((np.ones(len(left), dtype=np.int8), (left, right)), (count, count))
    _, labels = connected_components(ties, directed=False)
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbered: IntArray = rank[labels]
    return numbered


def _sites(couplings: Couplings, classes: IntArray) -> list[_Site]:
    parts: dict[tuple[int, int, int], list[Edge]] = defaultdict(list)
    for edge in couplings.edges:
        if not edge.whole:
            parts[edge.node, edge.port, edge.dim].append(edge)
    sites = []
    for (node, _, dim), edges in parts.items():
        product = any(edge.map.outer * edge.map.inner > 1 for edge in edges)
        preferred = couplings.preferences.get(node, ())
        rank = {couplings.nodes[node].factors[name]: k for k, name in enumerate(preferred)}
        sites.append(
            _Site(
                dim_class=int(classes[dim]),
                factor_classes=tuple(int(classes[edge.factor]) for edge in edges),
                edges=tuple(edges),
                product=product,
                covers=product
                or sum(int(couplings.sizes[e.factor]) for e in edges) == couplings.sizes[dim],
                order=tuple(rank.get(edge.factor, len(rank)) for edge in edges),
            )
        )
    return sites


def _pins(couplings: Couplings, classes: IntArray) -> dict[int, Pin]:
    """The reason why a class keeps its size, for those that something pins directly."""
    reasons: dict[int, Pin] = {}
    for node, reason in couplings.pins.items():
        kind = int(classes[node])
        if kind not in reasons or reason.startswith("graph "):
            reasons[kind] = Pin(reason, node)
    return reasons


def _spread(sites: Sequence[_Site], reasons: dict[int, Pin], start: Iterable[int]) -> None:
    """Carry pins over the sites until nothing changes."""
    touching: dict[int, list[_Site]] = defaultdict(list)
    for site in sites:
        for kind in {site.dim_class, *site.factor_classes}:
            touching[kind].append(site)
    pending = list(start)
    while pending:
        kind = pending.pop()
        for site in touching[kind]:
            if site.dim_class in reasons:
                reason = reasons[site.dim_class].reason
                found = [
                    (other, Pin(reason, edge.factor, edge.dim, edge.node))
                    for other, edge in zip(site.factor_classes, site.edges, strict=True)
                ]
            elif site.covers and all(k in reasons for k in site.factor_classes):
                edge = site.edges[0]
                reason = reasons[site.factor_classes[0]].reason
                found = [(site.dim_class, Pin(reason, edge.dim, edge.factor, edge.node))]
            else:
                continue
            for other, pin in found:
                if other not in reasons:
                    reasons[other] = pin
                    pending.append(other)


def _choose_carriers(
    couplings: Couplings,
    classes: IntArray,
    sites: Sequence[_Site],
    reasons: dict[int, Pin],
    attention: Attention,
) -> None:
    """Leave every product axis one free factor at most; the pins of the losers spread."""
    eager = {int(classes[factor]) for factor in couplings.eager}
    reluctant = {int(classes[factor]) for factor in couplings.reluctant}
    if attention == "head-dim":
        eager, reluctant = reluctant, eager
    carriers: set[int] = set()
    for site in sites:
        if not site.product:
            continue
        free = {
            kind: rank
            for kind, rank in sorted(zip(site.factor_classes, site.order, strict=True))[::-1]
            if kind not in reasons
        }
        repeated = {k for k in free if site.factor_classes.count(k) > 1}
        if not free:
            continue
        candidates = [k for k in free if k not in repeated]
        if candidates:
            winner = min(
                candidates,
                key=lambda k: (k not in eager, k in reluctant, k not in carriers, free[k]),
            )
            carriers.add(winner)
        else:
            winner = -1
        losers = [kind for kind in free if kind != winner]
        for kind in losers:
            edge = site.edges[site.factor_classes.index(kind)]
            reasons[kind] = Pin(
                "shares an axis with the factor that shrinks there", edge.factor, through=edge.node
            )
        _spread(sites, reasons, losers)


class _Solver:
    """Solves for channels and groups once classes, pins and carriers are settled."""

    def __init__(
        self,
        couplings: Couplings,
        classes: IntArray,
        sites: Sequence[_Site],
        reasons: Mapping[int, Pin],
    ) -> None:
        self.couplings = couplings
        self.classes = classes
        self.sites = sites
        self.reasons = reasons
        count = int(classes.max()) + 1 if len(classes) else 0
        class_size = np.zeros(count, dtype=np.int64)
        class_size[classes] = couplings.sizes
        self.class_size = class_size
        self.start = np.concatenate([[0], np.cumsum(class_size)])

    def graph(self) -> ChannelGraph:
        atom_channel, pinned_by = self._channels()
        pairs_channel, pairs_class, per_channel = self._incidence(atom_channel)
        channel_set, representatives = self._group_channels(
            len(pinned_by), pairs_channel, pairs_class, per_channel, pinned_by
        )
        order = np.argsort(pairs_channel, kind="stable")
        bounds = np.searchsorted(pairs_channel[order], np.arange(len(pinned_by) + 1))
        nodes_of_class = self._nodes_of_class()
        roles = _Roles(self.couplings, self.classes)
        groups: list[Group] = []
        listed = np.full(len(representatives), -1, dtype=np.int64)
        channels_by_set = np.split(
            np.argsort(channel_set, kind="stable"),
            np.cumsum(np.bincount(channel_set, minlength=len(representatives)))[:-1],
        )
        rows, columns, counts = [], [], []
        for number, channel in enumerate(representatives):
            span = order[bounds[channel] : bounds[channel + 1]]
            touched = pairs_class[span]
            pin = self.reasons.get(int(pinned_by[channel]))
            reason = None if pin is None else pin.reason
            stands_on = tuple(
                (nodes_of_class[kind], int(per))
                for kind, per in zip(touched, per_channel[span], strict=True)
                if nodes_of_class[kind]
            )
            if not stands_on or not (reason is None or roles.on_weights(touched)):
                continue
            channels = channels_by_set[number]
            producers = roles.producers(touched)
            index = len(groups)
            listed[number] = index
            groups.append(
                Group(
                    index=index,
                    id=f"g{index}",
                    name=roles.name(producers, touched) or stands_on[0][0][0].value,
                    width=len(channels),
                    reason=reason,
                    statistical=roles.is_statistical(touched),
                    producers=producers,
                    readers=roles.readers(touched),
                    channels=channels,
                    stands_on=stands_on,
                    pinned_by=int(pinned_by[channel]),
                )
            )
            rows += list(touched)
            columns += [index] * len(touched)
            counts += list(per_channel[span])
        matrix = sparse.csr_array(
            (np.array(counts, dtype=np.float64), (rows, columns)),
            shape=(len(self.class_size), len(groups)),
        )
        widths = np.array([group.width for group in groups], dtype=np.float64)
        return ChannelGraph(
            couplings=self.couplings,
            groups=_unique_names(groups),
            node_class=self.classes,
            class_start=self.start,
            atom_channel=atom_channel,
            channel_group=listed[channel_set],
            per_channel=matrix,
            fixed_size=self.class_size - matrix @ widths,
            pins=self.reasons,
        )

    def _channels(self) -> tuple[IntArray, IntArray]:
        """Channel of every atom, and per channel a class that pins it (-1: none)."""
        left: list[IntArray] = []
        right: list[IntArray] = []
        atoms = int(self.start[-1])
        pinned_by = np.full(atoms, -1, dtype=np.int64)
        for kind in self.reasons:
            pinned_by[self.start[kind] : self.start[kind + 1]] = kind
        for site in self.sites:
            if site.dim_class in self.reasons:
                continue
            for edge, kind in zip(site.edges, site.factor_classes, strict=True):
                elements, positions = edge.map.pairs(int(self.couplings.sizes[edge.factor]))
                positions = positions + self.start[site.dim_class]
                if kind in self.reasons:
                    if not site.product:
                        pinned_by[positions] = kind
                    continue
                left.append(elements + self.start[kind])
                right.append(positions)
        nothing = np.zeros(0, dtype=np.int64)
        channels = _components(
            atoms, np.concatenate([nothing, *left]), np.concatenate([nothing, *right])
        )
        count = int(channels.max(initial=-1)) + 1
        channel_pin = np.full(count, -1, dtype=np.int64)
        np.maximum.at(channel_pin, channels, pinned_by)
        return channels, channel_pin

    def _incidence(self, atom_channel: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """How often every channel stands on every class: (channel, class, count) triples."""
        count = len(self.class_size)
        atom_class = np.repeat(np.arange(count), self.class_size)
        keys, counts = np.unique(atom_channel * count + atom_class, return_counts=True)
        return keys // count, keys % count, counts

    def _group_channels(
        self,
        channels: int,
        pairs_channel: IntArray,
        pairs_class: IntArray,
        per_channel: IntArray,
        pinned_by: IntArray,
    ) -> tuple[IntArray, IntArray]:
        """Set of every channel, and one channel of every set; equal members make a set."""
        words = _mix(
            pairs_class.astype(np.uint64) * np.uint64(1 << 32) + per_channel.astype(np.uint64)
        )
        signature = np.zeros(channels, dtype=np.uint64)
        np.add.at(signature, pairs_channel, words)
        signature = _mix(signature + (pinned_by + 1).astype(np.uint64))
        _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        order = np.argsort(first, kind="stable")
        rank[order] = np.arange(len(first))
        return rank[inverse], first[order]

    def _nodes_of_class(self) -> list[list[Dim]]:
        """The dims of every class."""
        found: list[list[Dim]] = [[] for _ in self.class_size]
        for dim, kind in zip(self.couplings.dims, self.classes, strict=False):
            found[kind].append(dim)
        return found


def _mix(words: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Scramble 64-bit words (SplitMix64's finalizer), so that sums of them identify multisets."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def makes(couplings: Couplings, node: GraphNode, ports: Sequence[int]) -> bool:
    """Whether a factor at these ports stands on a result and on weights, and on no activation."""
    return any(port < 0 for port in ports) and not _activations(couplings, node, ports)


def ties(couplings: Couplings, node: GraphNode, ports: Sequence[int]) -> bool:
    """Whether a factor at these ports stands on two activation operands."""
    return len(_activations(couplings, node, ports)) > 1


def _activations(couplings: Couplings, node: GraphNode, ports: Sequence[int]) -> list[str]:
    """The operands at these ports that are no weights."""
    operands = [node.ir.inputs[port] for port in ports if port >= 0]
    names = [value.name or "" for value in operands if value is not None]
    return [name for name in names if name not in couplings.weights]


class _Roles:
    """What layers do with a class: produce its channels, sum over them, compete over them."""

    def __init__(self, couplings: Couplings, classes: IntArray) -> None:
        self.couplings = couplings
        self.produced: dict[int, list[int]] = defaultdict(list)
        self.read: dict[int, list[int]] = defaultdict(list)
        self.statistical: set[int] = set()
        self.kernels: set[int] = set()
        self.added: set[int] = set()
        standing: dict[int, list[int]] = defaultdict(list)
        counted = {f for node in couplings.nodes for term in node.macs for f in term}
        for edge in couplings.edges:
            standing[edge.factor].append(edge.port)
            dim = couplings.dims[edge.dim]
            free = edge.factor in counted and edge.factor not in couplings.pins
            if free and dim.value in couplings.weights:
                self.kernels.add(int(classes[edge.dim]))
        for number, node in enumerate(couplings.nodes):
            for name in node.statistical:
                self.statistical.add(int(classes[node.factors[name]]))
            for name, factor in node.factors.items():
                kind = int(classes[factor])
                ports = standing[factor]
                if name in node.contracted:
                    self.read[kind].append(number)
                made = factor in counted and name not in node.contracted
                if made and makes(couplings, node, ports):
                    self.produced[kind].append(number)
                if node.ir.op_type in ("Add", "Sum", "Sub") and ties(couplings, node, ports):
                    self.added.add(kind)

    def on_weights(self, touched: IntArray) -> bool:
        """Whether a weight has these channels, so that a user would ask about them."""
        return any(int(kind) in self.kernels for kind in touched)

    def is_statistical(self, touched: IntArray) -> bool:
        return any(int(kind) in self.statistical for kind in touched)

    def producers(self, touched: IntArray) -> tuple[str, ...]:
        return self._layers(self.produced, touched)

    def readers(self, touched: IntArray) -> tuple[str, ...]:
        return self._layers(self.read, touched)

    def _layers(self, role: Mapping[int, Sequence[int]], touched: IntArray) -> tuple[str, ...]:
        numbers = sorted({number for kind in touched for number in role.get(int(kind), ())})
        return tuple(dict.fromkeys(self.couplings.nodes[number].layer for number in numbers))

    def name(self, producers: Sequence[str], touched: IntArray) -> str:
        """``layer1 (residual, 7 producers)``; empty without a producer."""
        if len(producers) < 2:
            return "".join(producers)
        how = "residual" if any(int(kind) in self.added for kind in touched) else "tied"
        split = [name.split(".") for name in producers]
        levels = zip(*split, strict=False)
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
        return f"{'.'.join(common) or producers[0]} ({how}, {len(producers)} producers)"


def _unique_names(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Groups that one layer produces together get a number behind its name."""
    total: dict[str, int] = defaultdict(int)
    for item in groups:
        total[item.name] += 1
    seen: dict[str, int] = defaultdict(int)
    named = []
    for item in groups:
        seen[item.name] += 1
        part = f" #{seen[item.name]}" if total[item.name] > 1 else ""
        named.append(replace(item, name=item.name + part))
    return tuple(named)
