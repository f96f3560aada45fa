"""Pass ``group``: from couplings to channels and groups.

1. Dims and factors joined by identity maps form classes, which share their positions; what several
   factors stand on is a site (:mod:`morphgraph.passes.coupling.factorize_axes`).
2. Pins spread, and every product chooses one carrier (:mod:`morphgraph.passes.coupling.carriers`).
3. The remaining maps tie positions of classes to each other: one sparse connected-components call.
4. Channels that touch the same classes equally often are one group.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import sparse

from morphgraph.arrays import IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import Attention, ChannelGraph, Couplings, Dim, GraphOp, Group, Pin
from morphgraph.onnx_io import escape
from morphgraph.passes.coupling.carriers import choose_carriers
from morphgraph.passes.coupling.factorize_axes import FactorizedAxes, components, factorize_axes

# Positions of all classes together; every one takes some 40 bytes while channels are found.
_MAX_POSITIONS = 2**26


def group(couplings: Couplings, attention: Attention = "heads") -> ChannelGraph:
    """Find the channels that live and die together, and the groups that they form.

    Args:
        couplings: what the pass ``couple`` found.
        attention: whether an attention shrinks by whole heads or by the size of every head.
    """
    found = factorize_axes(couplings)
    return _Solver(couplings, found, choose_carriers(couplings, found, attention)).graph()


class _Solver:
    """Solves for channels and groups once classes, pins and carriers are settled."""

    def __init__(
        self,
        couplings: Couplings,
        found: FactorizedAxes,
        reasons: Mapping[int, Pin],
    ) -> None:
        self.couplings = couplings
        self.classes = found.classes
        self.sites = found.shared_axes
        self.reasons = reasons
        self.class_size = found.sizes
        self.start = np.concatenate([[0], np.cumsum(found.sizes)])

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
            vertex_class=self.classes,
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
        if atoms > _MAX_POSITIONS:
            raise UnsupportedError(self._too_large())
        telling = _most_telling_last(self.reasons)
        rank = {kind: place for place, kind in enumerate(telling)}
        pinned_by = np.full(atoms, -1, dtype=np.int64)
        for kind in telling:
            pinned_by[self.start[kind] : self.start[kind + 1]] = rank[kind]
        for site in self.sites:
            if site.axis_class in self.reasons:
                continue
            for part in site.factors:
                elements, positions = part.pairs()
                positions = positions + self.start[site.axis_class]
                if part.axis_class in self.reasons:
                    if not site.product:
                        pinned_by[positions] = np.maximum(
                            pinned_by[positions], rank[part.axis_class]
                        )
                    continue
                left.append(elements + self.start[part.axis_class])
                right.append(positions)
        nothing = np.zeros(0, dtype=np.int64)
        channels = components(
            atoms, np.concatenate([nothing, *left]), np.concatenate([nothing, *right])
        )
        count = int(channels.max(initial=-1)) + 1
        channel_pin = np.full(count, -1, dtype=np.int64)
        np.maximum.at(channel_pin, channels, pinned_by)
        return channels, np.array([*telling, -1], dtype=np.int64)[channel_pin]

    def _too_large(self) -> str:
        largest = int(np.argmax(self.class_size))
        dims = self._nodes_of_class()[largest]
        where = f"axis {dims[0].axis} of '{escape(dims[0].value)}' has" if dims else "an axis has"
        return (
            f"{where} {self.class_size[largest]} positions; at most {_MAX_POSITIONS} in all axes "
            "can be followed: export the model for smaller inputs, or without that tensor"
        )

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


def _most_telling_last(reasons: Mapping[int, Pin]) -> list[int]:
    """Classes in the order in which their reasons speak for a channel that has several.

    That it leaves the network tells most, then what arose at the class itself; of those the first
    in the model's order.
    """

    def telling(kind: int) -> tuple[bool, bool, int]:
        pin = reasons[kind]
        return pin.reason.startswith("graph "), pin.source is None, -kind

    return sorted(reasons, key=telling)


def _mix(words: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Scramble 64-bit words (SplitMix64's finalizer), so that sums of them identify multisets."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def makes(couplings: Couplings, node: GraphOp, ports: Sequence[int]) -> bool:
    """Whether a factor at these ports stands on a result and on weights, and on no activation."""
    return any(port < 0 for port in ports) and not _activations(couplings, node, ports)


def ties(couplings: Couplings, node: GraphOp, ports: Sequence[int]) -> bool:
    """Whether a factor at these ports stands on two activation operands."""
    return len(_activations(couplings, node, ports)) > 1


def _activations(couplings: Couplings, node: GraphOp, ports: Sequence[int]) -> list[str]:
    """The operands at these ports that are no weights."""
    operands = [node.ir.inputs[port] for port in ports if port >= 0]
    names = [value.name or "" for value in operands if value is not None]
    return [name for name in names if name not in couplings.input_independent]


class _Roles:
    """What layers do with a class: produce its channels, sum over them, compete over them."""

    def __init__(self, couplings: Couplings, classes: IntArray) -> None:
        self.couplings = couplings
        self.produced: dict[int, list[int]] = defaultdict(list)
        self.read: dict[int, list[int]] = defaultdict(list)
        self.statistical: set[int] = set()
        self.kernels: set[int] = set()
        self.added: set[int] = set()
        heads = {int(classes[factor]) for factor in couplings.eager}
        self.ways = (("attention", heads), ("residual", self.added))
        standing: dict[int, list[int]] = defaultdict(list)
        counted = {f for node in couplings.ops for term in node.macs for f in term}
        for edge in couplings.edges:
            standing[edge.factor].append(edge.port)
            dim = couplings.dims[edge.dim]
            free = edge.factor in counted and edge.factor not in couplings.pins
            if free and dim.value in couplings.input_independent:
                self.kernels.add(int(classes[edge.dim]))
        for number, node in enumerate(couplings.ops):
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
        return tuple(dict.fromkeys(self.couplings.ops[number].layer for number in numbers))

    def name(self, producers: Sequence[str], touched: IntArray) -> str:
        """``layer1 (residual, 7 producers)``; empty without a producer.

        Attentions come first: rotary embeddings add within a head, and no layers to each other.
        """
        if len(producers) < 2:
            return "".join(producers)
        how = next(
            (how for how, kinds in self.ways if not kinds.isdisjoint(map(int, touched))), "tied"
        )
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
