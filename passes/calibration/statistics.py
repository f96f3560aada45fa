"""Pass ``statistics``: in what order a group's channels may go, from what its readers see.

The original runs once over the calibration inputs, piece by piece; at every reader the second
moments of its operand are taken, and as soon as all readers of a group are through, the group's
order of removal follows from them (:mod:`morphgraph.passes.calibration.removal`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import cast

import numpy as np

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.graph import ChannelGraph, Group
from morphgraph.passes.calibration.bases import remaining, seen_in_product
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.compared import Compared
from morphgraph.passes.calibration.few_bits import FewBits, without
from morphgraph.passes.calibration.group_readers import GroupReaders, group_readers
from morphgraph.passes.calibration.looked_at import (
    AnyLook,
    Found,
    experts_of,
    looked_at,
    moments_at,
    pooled,
    sums,
)
from morphgraph.passes.calibration.moments import MOST_BYTES
from morphgraph.passes.calibration.readers import (
    Following,
    Reader,
    all_readers,
    following,
    tied_readers,
)
from morphgraph.passes.calibration.removal import (
    Removal,
    Seen,
    column_products,
    contributions,
    remove_in_order,
    seen_alone,
    seen_by,
)
from morphgraph.passes.calibration.stacks import (
    AnyStackLook,
    Routed,
    Stack,
    StackMoments,
    stacks,
)
from morphgraph.passes.calibration.uncompensated import (
    TiedLook,
    Uncompensated,
    cost_of_inputs,
)
from morphgraph.passes.calibration.visits import Chooser, Look, visit

#: Bytes that the covariances of one group's readers may take together.
MOST_TOGETHER = 400 * 2**20


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the calibration inputs tell of a network.

    Attributes:
        graph: the network.
        readers: all of them, by name.
        following: what comes behind each.
        means: of what each reader sees, ``[groups, inputs]``.
        removals: by group index how it shrinks; groups without readers are left out.
        groups: by group index its readers.
        contributed: by group index, by kind, what each channel contributes to its readers.
        matrices: sets of readers' matrices, by their names, that make up best for channels that
            went, ``[maps, outputs, inputs]``; in files where they are large.
        compensated: by group index and width the number of such a set.
        chosen: by index of a group of which the network chooses a few channels how much each
            counts, ``[width]``: its share of what all give, or how often it was chosen
            (:mod:`morphgraph.passes.calibration.choices`).
        compared: products of queries and keys.
        stacks: products with chosen kernels, and mixtures in one node, by name.
    """

    graph: ChannelGraph
    readers: Mapping[str, Reader]
    following: Mapping[str, Following]
    means: dict[str, FloatArray] = field(default_factory=dict)
    removals: dict[int, Removal] = field(default_factory=dict)
    groups: Mapping[int, GroupReaders] = field(default_factory=dict)
    contributed: dict[int, dict[str, FloatArray]] = field(default_factory=dict)
    matrices: Batches = field(default_factory=Batches)
    compensated: dict[tuple[int, int], int] = field(default_factory=dict)
    chosen: dict[int, FloatArray] = field(default_factory=dict)
    compared: Compared = field(default_factory=Compared)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def contributions(self, kind: str) -> FloatArray:
        """What each channel contributes to its readers, ``[channels]``.

        Shares of what they give, summed over the readers: the variance of the contribution
        (``"variance"``), or its energy, the mean included (``"activation"``). Of groups without
        readers 1.
        """
        scores = np.ones(len(self.graph.channel_group))
        for index, by_kind in self.contributed.items():
            scores[self.graph.groups[index].channels] = by_kind[kind]
        return scores


def calibrate(
    graph: ChannelGraph,
    batches: Iterable[Arrays],
    *,
    stops: Callable[[Group], Iterable[int]],
    wanted: Callable[[Group], bool] = lambda group: group.resizable,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
    compared: Compared | None = None,
) -> Calibration:
    """Run the original over the calibration inputs, and see in what order channels may go.

    Args:
        graph: the lifted network.
        batches: feeds of the model; passed over once.
        stops: by group the widths at which compensated matrices are kept.
        wanted: which groups are looked at.
        seed: of the places that are looked at where there are more than enough.
        threads: of ONNX Runtime.
        progress: told of every reader.
        processes: that share the batches; these are of one of them.
        compared: products of queries and keys, with what the calibration inputs make of them.
    """
    compared = compared or Compared()
    found = all_readers(graph.model, graph.couplings.input_independent)
    behind = {name: following(reader) for name, reader in found.items()}
    of_experts = stacks(graph.model, graph.couplings.input_independent)
    tied = tied_readers(graph.model, graph.couplings.input_independent, found)
    all_groups = group_readers(graph, found, compared.products, of_experts, tied)
    groups = {k: v for k, v in all_groups.items() if wanted(v.group)}
    result = Calibration(graph, found, behind, groups=groups, compared=compared, stacks=of_experts)
    for k, each in groups.items():
        if not each.blocks and not each.stacks:
            result.removals[k] = _by_products(each, compared, [*stops(each.group)])
    listed = looked_at(result.graph, found, groups, (of_experts, tied), wanted, threads)
    collected = _Collected(result, listed, stops, processes)
    walk = visit(graph.model, listed, batches, Chooser(seed, processes), threads, progress)
    for look, samples in walk:
        if isinstance(look, TiedLook):
            collected.look_at_tied(look, cast("Iterator[Array]", samples))
        elif isinstance(look, Look):
            collected.look_at(look, cast("Iterator[Array]", samples))
        else:
            stack = cast("AnyStackLook", look)
            collected.look_at_stack(stack, cast("Iterator[Routed]", samples))
    return result


class _Collected:
    """What is found at one look after the other, until all of a group's are through."""

    def __init__(
        self,
        result: Calibration,
        listed: Sequence[AnyLook],
        stops: Callable[[Group], Iterable[int]],
        processes: Processes,
    ) -> None:
        self.result, self.stops, self.processes = result, stops, processes
        groups = result.groups.items()
        self.of_look = {
            look.name: [k for k, v in groups if look.name in v.blocks or look.name in v.stacks]
            for look in listed
        }
        of_kernels = {_family(look): self.of_look[look.name] for look in listed}
        self.counts = {k: sum(k in each for each in of_kernels.values()) for k, _ in groups}
        #: Looks at some of the places where the same kernels are read, and what was found there.
        self.places: dict[tuple[str, ...], tuple[list[Look], Found]] = {}
        self.waiting: dict[int, list[_Waiting | _WaitingStack]] = {k: [] for k, _ in groups}
        tied = {look.name: look for look in listed if isinstance(look, TiedLook)}
        self.others = {
            k: Uncompensated(
                {
                    name: with_taps(at, tied[name].reader.matrix_shape[3])
                    for name, at in each.tied.items()
                    if name in tied
                }
            )
            for k, each in groups
        }

    def _room(self, indices: Sequence[int]) -> int:
        """Bytes that the covariances of one look may take."""
        return min([MOST_BYTES, *(MOST_TOGETHER // self.counts[k] for k in indices)])

    def look_at(self, look: Look, samples: Iterable[Array]) -> None:
        """Readers that see the same rows."""
        indices, result = self.of_look[look.name], self.result
        taps = look.readers[0].matrix_shape[3]
        blocks = {k: with_taps(result.groups[k].blocks[look.name], taps) for k in indices}
        moments = moments_at(look, samples, blocks, self._room(indices), self.processes)
        matrix, units = look.matrix(), _units(look, result.following, moments.energy)
        for k in indices:
            _contribute(result, k, moments, matrix * units[:, :, None], blocks[k])
        places = [look]
        if look.family in self.places:
            before, found = self.places.pop(look.family)
            places, moments = [*before, look], pooled([found, moments], matrix)
        if len(places) < len(look.family):
            self.places[look.family] = places, moments
            return
        if len(places) > 1:
            units = _units_of_all(places, result.following, moments.energy)
        for each in places:
            result.means.update({reader.name: moments.mean for reader in each.readers})
        for k in indices:
            own = moments.alone.get(k)
            # Costs are shares of what is given at one place, and count at all of them.
            energy = 1.0 / len(places)
            if own is not None:
                seen = seen_alone(own, moments.whole, matrix, units, blocks[k], energy=energy)
            else:
                mine = moments.whole if k == indices[-1] else moments.whole.copied()
                seen = seen_by(mine, matrix, units, blocks[k], energy=energy)
            self._wait(k, _Waiting(look, units, seen))

    def look_at_stack(self, look: AnyStackLook, samples: Iterable[Routed]) -> None:
        """Kernels of experts."""
        indices, result, graph = self.of_look[look.name], self.result, self.result.graph
        blocks = {k: result.groups[k].stacks[look.name] for k in indices}
        moments = StackMoments(look.stack, samples, blocks, self._room(indices), self.processes)
        if look.tells:
            experts = graph.channels_of(graph.dim(look.stack.stack, 0))
            size = len(graph.channel_group)
            every: FloatArray = np.bincount(experts, moments.energies, size).astype(np.float64)
            for group in experts_of(graph, look.stack):
                given = every[group.channels]
                _add_contributions(result, group.index, given, given)
                sums = result.chosen.setdefault(group.index, np.zeros(group.width))
                sums += given
        for k in indices:
            contributed = moments.contributed(k)  # about zero: the means are in both kinds
            _add_contributions(result, k, contributed, contributed)
            seen = moments.seen(k, is_last=k == indices[-1])
            inverses = [each.inverse for each in seen if each.inverse is not None]
            few = isinstance(look.stack.store, FewBits)
            whole = [np.linalg.inv(inverse[0]) for inverse in inverses] if few else []
            self._wait(k, _WaitingStack(look.stack, moments.units, seen, whole))

    def look_at_tied(self, look: TiedLook, samples: Iterable[Array]) -> None:
        """An operator whose kernel others share."""
        maps, outputs, inputs, taps = look.reader.matrix_shape
        statistics = sums(samples, (maps, inputs * taps, 0), self.processes)
        matrix = look.reader.linear.matrix(look.reader.kernel())
        cost = cost_of_inputs(statistics, matrix.reshape(maps, outputs, inputs * taps))
        for k, other in self.others.items():
            if look.name in other.inputs:
                other.add(look.name, cost)
                self._finish_if_through(k)

    def _wait(self, index: int, each: "_Waiting | _WaitingStack") -> None:
        self.waiting[index].append(each)
        self._finish_if_through(index)

    def _finish_if_through(self, index: int) -> None:
        waiting, other = self.waiting[index], self.others[index]
        if waiting and len(waiting) == self.counts[index] and not other.left:
            stops = self.stops(self.result.groups[index].group)
            _finish(self.result, index, self.waiting.pop(index), stops, other.spread)


def _products_of(group: GroupReaders, compared: Compared) -> list[Seen]:
    """What a group's channels are to products of queries and keys."""
    known = {each.name: each for each in compared.products}
    return [
        seen_in_product(known[name], compared.moments[name], elements)
        for name, elements in group.products.items()
    ]


def _by_products(group: GroupReaders, compared: Compared, stops: Sequence[int]) -> Removal:
    """How a group shrinks that products of queries and keys alone read."""
    removal = remove_in_order(_products_of(group, compared), stops)
    known = {each.name: each for each in compared.products}
    left = [
        remaining(known[name], compared.moments[name], elements)
        for name, elements in group.products.items()
    ]
    if any(losses is None for losses in left):
        return removal
    together = np.sum([losses for losses in left if losses is not None], axis=0)
    return replace(removal, losses=together)


@dataclass(frozen=True)
class _Waiting:
    """A look that waits until all of a group's are through, and in which units its outputs are."""

    look: Look
    units: FloatArray
    seen: Seen

    @property
    def all_seen(self) -> list[Seen]:
        """What the group's channels are to it."""
        return [self.seen]

    def kernels(self, matrices: Sequence[FloatArray]) -> Arrays:
        """What makes up for the channels that go, as the readers' kernels have it."""
        (matrix,) = matrices
        if not matrix.shape[1]:  # nothing takes over
            return {}
        # An output that nobody sees counts nothing, and keeps its kernel.
        units = self.units[:, :, None]
        plain = np.where(units > 0, matrix / np.where(units > 0, units, 1.0), self.look.matrix())
        parts = self.look.parted(plain)
        return {
            name: parts[reader.name].astype(reader.kernel().dtype)
            for reader in self.look.readers
            for name in reader.peers or (reader.name,)
        }


@dataclass(frozen=True)
class _WaitingStack:
    """The same of a stack; the units are those of the experts, ``[experts]``.

    In few bits ``moments`` are those of what each expert sees, before anything went.
    """

    stack: Stack
    units: FloatArray
    seen: list[Seen]
    moments: Sequence[FloatArray] = ()

    @property
    def all_seen(self) -> list[Seen]:
        """What the group's channels are to each expert."""
        return self.seen

    def kernels(self, matrices: Sequence[FloatArray]) -> Arrays:
        """What makes up for the channels that go, ``[experts, outputs, inputs]``."""
        if not matrices[0].shape[1]:
            return {}
        plain = np.concatenate(matrices) / self.units[:, None, None]
        if isinstance(self.stack.store, FewBits):
            of_each = zip(self.stack.store.grids(), plain, self.moments, strict=True)
            plain = np.stack([without(*each) for each in of_each])
        return {self.stack.name: plain.astype(self.stack.store.array().dtype)}


def _units(look: Look, behind: Mapping[str, Following], energy: FloatArray) -> FloatArray:
    """The units in which errors of the outputs count, ``[maps, outputs]``.

    In them the energy of what each reader gives is 1, so that costs are shares of it.
    """
    parts = []
    for name, own in look.parted(energy).items():
        scale = np.abs(behind[name].scale)
        parts.append(scale / np.sqrt(max(float((own * scale**2).sum()), 1e-30)))
    return np.concatenate(parts, axis=1)


def _units_of_all(
    looks: Sequence[Look], behind: Mapping[str, Following], energy: FloatArray
) -> FloatArray:
    """The same for all places where some kernels are read, by the energy at all of them."""
    parts, first = [], looks[0]
    for place, own in enumerate(first.parted(energy).values()):
        names = [look.readers[place].name for look in looks]
        scale = np.sqrt(np.mean([np.square(behind[name].scale) for name in names], axis=0))
        parts.append(scale / np.sqrt(max(float((own * scale**2).sum()), 1e-30)))
    return np.concatenate(parts, axis=1)


def _family(look: AnyLook) -> tuple[str, ...]:
    """What looks at the same kernels have in common."""
    return look.family if isinstance(look, Look) else (look.name,)


def _finish(
    result: Calibration,
    index: int,
    waiting: Sequence[_Waiting | _WaitingStack],
    stops: Iterable[int],
    spread: FloatArray | None,
) -> None:
    """How a group shrinks, all of whose readers are through."""
    products = _products_of(result.groups[index], result.compared)
    seen = [each for one in waiting for each in one.all_seen]
    removal = remove_in_order([*seen, *products], [*stops], spread)
    result.removals[index] = replace(removal, matrices={})
    for width, matrices in removal.matrices.items():
        # Behind those of the readers stand the products', whose operands change instead.
        kept, rest = dict[str, Array](), iter(matrices)
        for each in waiting:
            kept |= each.kernels([*islice(rest, len(each.all_seen))])
        result.compensated[index, width] = len(result.matrices)
        result.matrices.append(kept)


def _contribute(
    result: Calibration, index: int, found: Found, matrix: FloatArray, blocks: IntArray
) -> None:
    """Add what a group's channels contribute to the readers of a look.

    ``matrix`` is theirs in the units in which errors count.
    """
    own = found.alone.get(index)
    if own is not None:
        spread = own.covariance
    else:
        spread = found.whole.covariance[:, blocks[:, :, None], blocks[:, None, :]]
    products, means = column_products(matrix, blocks), found.mean[:, blocks]
    variance = contributions(spread, products)
    energies = variance + np.einsum("gcbd,gcb,gcd->c", products, means, means)
    _add_contributions(result, index, np.maximum(variance, 0.0), np.maximum(energies, 0.0))


def _add_contributions(
    result: Calibration, index: int, variance: FloatArray, activation: FloatArray
) -> None:
    """Of a group's channels to one more of its readers, ``[channels]``."""
    sums = result.contributed.setdefault(
        index, {kind: np.zeros(len(variance)) for kind in ("variance", "activation")}
    )
    sums["variance"] += variance
    sums["activation"] += activation


def with_taps(blocks: IntArray, taps: int) -> IntArray:
    """Inputs with all their taps, ``[channels, inputs per channel * taps]``."""
    every = blocks[:, :, None] * taps + np.arange(taps)
    return every.reshape(len(blocks), -1)
