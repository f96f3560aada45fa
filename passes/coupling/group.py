"""Pass ``group``: from couplings to channels and groups.

1. Dims and factors joined by identity maps form classes, which share their positions; what several
   factors stand on is a shared axis (:mod:`morphgraph.passes.coupling.factorize_axes`).
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

from morphgraph.arrays import Flags, IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import Attention, ChannelGraph, Couplings, Dim, Group, Pin
from morphgraph.onnx_io import escape
from morphgraph.passes.coupling.carriers import choose_carriers
from morphgraph.passes.coupling.couple import MAX_POSITIONS, too_large
from morphgraph.passes.coupling.factorize_axes import FactorizedAxes, components, factorize_axes
from morphgraph.passes.coupling.roles import roles
from morphgraph.passes.coupling.views import STAYS, View, Views, merge

# Positions of all classes together; every one takes some 40 bytes while channels are found.


def group(couplings: Couplings, attention: Attention = "heads") -> ChannelGraph:
    """Find the channels that live and die together, and the groups that they form.

    Args:
        couplings: what the pass ``couple`` found.
        attention: whether an attention shrinks by whole heads, by query heads within the groups
            that share keys and values, by the size of every head, or by all of them.
    """
    found = factorize_axes(couplings)
    if attention != "all":
        return _Solver(couplings, found, choose_carriers(couplings, found, attention)).graph()
    by_carriers: list[Attention] = ["heads", "query-heads", "head-dim"]
    solvers = [_Solver(couplings, found, choose_carriers(couplings, found, k)) for k in by_carriers]
    merged = merge(found.sizes, [solver.view() for solver in solvers])
    return _Solver(couplings, found, merged.view.reasons).graph(merged)


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
        self.shared_axes = found.shared_axes
        self.reasons = reasons
        self.class_size = found.sizes
        self.start = np.concatenate([[0], np.cumsum(found.sizes)])
        self.base = np.arange(len(found.sizes))

    def view(self) -> View:
        """The channels that these carriers give."""
        return View(*self._channels(), self.reasons)

    def graph(self, merged: Views | None = None) -> ChannelGraph:
        """The channel graph; of several choices of carriers where these are ``merged``."""
        merged = merged or Views(np.arange(len(self.class_size)), self.view())
        atom_channel, pinned_by = merged.view.atom_channel, merged.view.pinned_by
        self.base, self.class_size = merged.base, self.class_size[merged.base]
        self.start = np.concatenate([[0], np.cumsum(self.class_size)])
        touches = self._incidence(atom_channel)
        channel_set, representatives = self._sets_of_channels(len(pinned_by), touches, pinned_by)
        touched_channel, touched_class, per_channel = touches
        # Touches come channel by channel.
        bounds = np.searchsorted(touched_channel, representatives).tolist()
        stops = np.searchsorted(touched_channel, representatives, side="right").tolist()
        base = self.base.tolist()
        channels_of_set = np.split(
            np.argsort(channel_set, kind="stable"),
            np.cumsum(np.bincount(channel_set, minlength=len(representatives)))[:-1],
        )
        dims_of_class = self._dims_of_class()
        members = _Members(self.couplings, self.classes)
        groups: list[Group] = []
        group_of_set = np.full(len(representatives), -1, dtype=np.int64)
        rows, columns, counts = [], [], []
        for number, pinned in enumerate(pinned_by[representatives].tolist()):
            if pinned == STAYS:
                continue
            span = slice(bounds[number], stops[number])
            standing, taken = touched_class[span].tolist(), per_channel[span].tolist()
            touched = [base[axis_class] for axis_class in standing]
            pin = self.reasons.get(pinned)
            stands_on = tuple(
                (dims_of_class[axis_class], per)
                for axis_class, per in zip(standing, taken, strict=True)
                if dims_of_class[axis_class]
            )
            # Pinned channels that no weight has (batch, space, shape vectors) are no groups, and
            # neither is a single one, which something else broadcasts.
            is_bare = pin is not None or len(channels_of_set[number]) == 1
            if not stands_on or (is_bare and not members.on_weights(touched)):
                continue
            producers = members.producers(touched)
            index = len(groups)
            group_of_set[number] = index
            groups.append(
                Group(
                    index=index,
                    id=f"g{index}",
                    name=members.name(producers, touched) or self._of_weight(stands_on),
                    width=len(channels_of_set[number]),
                    reason=None if pin is None else pin.reason,
                    statistical=members.is_statistical(touched),
                    producers=producers,
                    readers=members.readers(touched),
                    channels=channels_of_set[number],
                    stands_on=stands_on,
                    pinned_by=pinned,
                )
            )
            rows += standing
            columns += [index] * len(standing)
            counts += taken
        matrix = sparse.csr_array(
            (np.array(counts, dtype=np.float64), (rows, columns)),
            shape=(len(self.class_size), len(groups)),
        )
        widths = np.array([group.width for group in groups], dtype=np.float64)
        units = self._units(matrix, widths.astype(np.int64))
        matrix = sparse.csr_array(
            (matrix.data / np.repeat(units, np.diff(matrix.indptr)), matrix.indices, matrix.indptr),
            shape=matrix.shape,
        )
        return ChannelGraph(
            couplings=self.couplings,
            groups=_unique_names(groups),
            vertex_class=self.classes,
            class_start=self.start,
            atom_channel=atom_channel,
            channel_group=group_of_set[channel_set],
            per_channel=matrix,
            fixed_size=self.class_size // units - matrix @ widths,
            pins=self.reasons,
            base=self.base,
            units=units,
        )

    def _units(self, matrix: sparse.csr_array, widths: IntArray) -> IntArray:
        """What sizes of classes are counted in: where there are several views, their rows' divisor.

        So their product is that of numbers of heads and of elements, and exact.
        """
        units = np.ones(len(self.base), dtype=np.int64)
        further = np.flatnonzero(self.base != np.arange(len(self.base)))
        for view in {*further.tolist(), *self.base[further].tolist()}:
            span = slice(matrix.indptr[view], matrix.indptr[view + 1])
            taken = matrix.data[span].astype(np.int64)
            left = int(self.class_size[view] - taken @ widths[matrix.indices[span]])
            units[view] = np.gcd.reduce([*taken.tolist(), left])
        return units

    def _of_weight(self, stands_on: Sequence[tuple[Sequence[Dim], int]]) -> str:
        """The first value that has these channels; of what is made of a parameter, that."""
        held = self.couplings.model.graph.initializers
        named = [dim.value for dims, _ in stands_on for dim in dims]
        if named[0] not in self.couplings.input_independent:
            return named[0]
        return next((name for name in named if name in held), named[0])

    def _channels(self) -> tuple[IntArray, IntArray]:
        """Channel of every atom, and per channel a class that pins it (-1: none).

        Atoms are (class, position) pairs. Every axis that several factors share says which atoms
        are one channel: the element of a factor and its positions on the axis. A product axis that
        is pinned ties nothing, nor does a pinned factor; a pinned segment pins its positions.
        """
        atoms = int(self.start[-1])
        if atoms > MAX_POSITIONS:
            raise UnsupportedError(self._too_large())
        pinned = _most_informative_last(self.reasons)
        rank = {axis_class: place for place, axis_class in enumerate(pinned)}
        atom_rank = np.full(atoms, -1, dtype=np.int64)
        for axis_class in pinned:
            atom_rank[self.start[axis_class] : self.start[axis_class + 1]] = rank[axis_class]
        nothing = np.zeros(0, dtype=np.int64)
        of_factors, of_axes = [nothing], [nothing]
        for axis in self.shared_axes:
            if axis.axis_class in self.reasons:
                continue
            for factor in axis.factors:
                elements, positions = factor.pairs()
                positions = positions + self.start[axis.axis_class]
                if factor.axis_class not in self.reasons:
                    of_factors.append(elements + self.start[factor.axis_class])
                    of_axes.append(positions)
                elif not axis.product:
                    informative = np.maximum(atom_rank[positions], rank[factor.axis_class])
                    atom_rank[positions] = informative
        channels = components(atoms, np.concatenate(of_factors), np.concatenate(of_axes))
        count = int(channels.max(initial=-1)) + 1
        channel_rank = np.full(count, -1, dtype=np.int64)
        np.maximum.at(channel_rank, channels, atom_rank)
        return channels, np.array([*pinned, -1], dtype=np.int64)[channel_rank]

    def _too_large(self) -> str:
        largest = int(np.argmax(self.class_size))
        dims = self._dims_of_class()[largest]
        where = f"axis {dims[0].axis} of '{escape(dims[0].value)}'" if dims else "an axis"
        return too_large(where, self.class_size[largest])

    def _incidence(self, atom_channel: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """How often every channel stands on every class: (channel, class, count) triples."""
        count = len(self.class_size)
        atom_class = np.repeat(np.arange(count), self.class_size)
        keys, counts = np.unique(atom_channel * count + atom_class, return_counts=True)
        return keys // count, keys % count, counts

    def _sets_of_channels(
        self, channels: int, touches: tuple[IntArray, IntArray, IntArray], pinned_by: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Set of every channel, and one channel of every set: those that touch the same classes.

        A set is known by the sum of hashed (class, count) pairs of its channels: no Python loop
        runs over channels. Sets come in the order of their classes, in which the model's order
        shows; not of their channels, since of two that alternate on an axis the one would come
        first that happens to keep its first channel.
        """
        touched_channel, touched_class, per_channel = touches
        words = _mix(
            touched_class.astype(np.uint64) * np.uint64(1 << 32) + per_channel.astype(np.uint64)
        )
        signature = np.zeros(channels, dtype=np.uint64)
        np.add.at(signature, touched_channel, words)
        signature = _mix(signature + (pinned_by + 1).astype(np.uint64))
        _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
        starts = np.searchsorted(touched_channel, first)
        stops = np.searchsorted(touched_channel, first, side="right")
        spans = [slice(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
        keys = [(touched_class[s].tolist(), per_channel[s].tolist()) for s in spans]
        rank = np.empty(len(first), dtype=np.int64)
        order = np.array(sorted(range(len(first)), key=lambda k: (*keys[k], first[k])), dtype=int)
        rank[order] = np.arange(len(first))
        return rank[inverse], first[order]

    def _dims_of_class(self) -> list[list[Dim]]:
        """The dims of every class."""
        dims: list[list[Dim]] = [[] for _ in self.class_size]
        for dim, axis_class in zip(self.couplings.dims, self.classes.tolist(), strict=False):
            dims[axis_class].append(dim)
        return [dims[axis_class] for axis_class in self.base]


def _most_informative_last(reasons: Mapping[int, Pin]) -> list[int]:
    """Pinned classes by how informative their reason is; of several, a channel shows the last.

    A graph input or output says most, then a reason that arose at the class itself; of those the
    first in the model's order.
    """

    def informative(axis_class: int) -> tuple[bool, bool, int]:
        pin = reasons[axis_class]
        return pin.reason.startswith("graph "), pin.source is None, -axis_class

    return sorted(reasons, key=informative)


def _mix(words: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Scramble 64-bit words (SplitMix64's finalizer), so that sums of them identify multisets."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _Members:
    """What the operators on a class do with it: make its channels, sum over them, normalize."""

    def __init__(self, couplings: Couplings, classes: IntArray) -> None:
        self.ops = couplings.ops
        self.classes = classes
        role = roles(couplings)
        self.op_index = role.op_index.tolist()
        self.produced = self._vertices_by_class(role.produces)
        self.summed = self._vertices_by_class(role.sums)
        self.normalized = self._classes_of(role.normalizes)
        edges = couplings.columns
        counted = role.counted.copy()
        counted[list(couplings.pins)] = False
        of_kernels = classes[edges.dim[counted[edges.factor] & edges.on_weight]]
        self.kernels = frozenset(np.unique(of_kernels).tolist())
        heads = frozenset(int(classes[factor]) for factor in couplings.eager)
        # Attentions come first: rotary embeddings add within a head, and no layers to each other.
        self.ways = (("attention", heads), ("residual", self._classes_of(role.adds)))

    def _classes_of(self, which: Flags) -> frozenset[int]:
        return frozenset(self.classes[np.flatnonzero(which)].tolist())

    def _vertices_by_class(self, which: Flags) -> Mapping[int, list[int]]:
        listed: dict[int, list[int]] = defaultdict(list)
        vertices = np.flatnonzero(which)
        for vertex, axis_class in zip(
            vertices.tolist(), self.classes[vertices].tolist(), strict=True
        ):
            listed[axis_class].append(vertex)
        return listed

    def on_weights(self, touched: Sequence[int]) -> bool:
        """Whether a weight has these channels, so that a user would ask about them."""
        return not self.kernels.isdisjoint(touched)

    def is_statistical(self, touched: Sequence[int]) -> bool:
        return not self.normalized.isdisjoint(touched)

    def producers(self, touched: Sequence[int]) -> tuple[str, ...]:
        return self._layers(self.produced, touched)

    def readers(self, touched: Sequence[int]) -> tuple[str, ...]:
        return self._layers(self.summed, touched)

    def _layers(self, by_class: Mapping[int, list[int]], touched: Sequence[int]) -> tuple[str, ...]:
        vertices = [vertex for k in touched for vertex in by_class.get(k, ())]
        op_indices = sorted({self.op_index[vertex] for vertex in vertices})
        return tuple(dict.fromkeys(self.ops[op_index].layer for op_index in op_indices))

    def name(self, producers: Sequence[str], touched: Sequence[int]) -> str:
        """``layer1 (residual, 7 producers)``; empty without a producer."""
        if len(producers) < 2:
            return "".join(producers)
        how = next((how for how, classes in self.ways if not classes.isdisjoint(touched)), "tied")
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
