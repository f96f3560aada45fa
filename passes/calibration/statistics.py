"""Pass ``statistics``: in what order a group's channels may go, from what its readers see.

The original runs once over the calibration inputs, piece by piece; at every reader the second
moments of its operand are taken, and as soon as all readers of a group are through, the group's
order of removal follows from them (:mod:`morphgraph.passes.calibration.removal`).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray, Shape
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.calibration.bases import remaining, seen_in_product
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.group_readers import GroupReaders, group_readers
from morphgraph.passes.calibration.logits import Compared
from morphgraph.passes.calibration.moments import MOST_BYTES, Moments, Statistics
from morphgraph.passes.calibration.readers import Following, Reader, following, readers
from morphgraph.passes.calibration.removal import (
    Removal,
    Seen,
    remove_in_order,
    seen_alone,
    seen_by,
)
from morphgraph.passes.calibration.segments import Piece, live_values

#: Places at which a reader is looked at, per input of its map, and their bounds.
PLACES_PER_INPUT = 4
FEWEST_PLACES = 8192
MOST_PLACES = 20000
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
        chosen: by index of a group of which the network chooses a few channels how often it chose
            each (:mod:`morphgraph.passes.calibration.choices`).
        compared: products of queries and keys.
    """

    graph: ChannelGraph
    readers: Mapping[str, Reader]
    following: Mapping[str, Following]
    means: dict[str, FloatArray] = field(default_factory=dict)
    removals: dict[int, Removal] = field(default_factory=dict)
    groups: Mapping[int, GroupReaders] = field(default_factory=dict)
    contributed: dict[int, dict[str, FloatArray]] = field(default_factory=dict)
    chosen: dict[int, FloatArray] = field(default_factory=dict)
    compared: Compared = field(default_factory=Compared)

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
    found = readers(graph.model, graph.couplings.input_independent)
    behind = {name: following(reader) for name, reader in found.items()}
    all_groups = group_readers(graph, found, compared.products)
    groups = {k: v for k, v in all_groups.items() if wanted(v.group)}
    result = Calibration(graph, found, behind, groups=groups, compared=compared)
    for k, each in groups.items():
        if not each.blocks:
            result.removals[k] = _by_products(each, compared, [*stops(each.group)])
    waiting = {index: dict[str, Seen]() for index in groups}
    of_reader: dict[str, list[int]] = {}
    for index, each in groups.items():
        for name in each.blocks:
            of_reader.setdefault(name, []).append(index)
    chooser = Chooser(seed, processes)
    names = [name for name in found if name in of_reader]
    for name, samples in visit(graph.model, found, names, batches, chooser, threads, progress):
        matrix = found[name].matrix()
        maps, outputs, inputs, taps = matrix.shape
        of_groups = {k: _with_taps(groups[k].blocks[name], taps) for k in of_reader[name]}
        room = min(MOST_TOGETHER // len(groups[k].blocks) for k in of_groups)
        large = maps * (inputs * taps) ** 2 * 8 > min(MOST_BYTES, room)
        total = Moments(crossed=False)
        alone = {k: Moments(crossed=False) for k in of_groups} if large else {}
        mean = np.zeros((maps, inputs * taps))
        for rows, results in samples:
            if not large:
                total.add(rows, results)
                continue
            mean += rows.sum(axis=0, dtype=np.float64)
            total.add(rows[:, :, :0], results)
            for k, blocks in of_groups.items():
                own = rows[:, :, blocks].reshape(len(rows), -1, blocks.shape[1])
                alone[k].add(own, np.zeros((*own.shape[:2], 0)))
        whole_shape = maps, 0 if large else inputs * taps, outputs
        statistics = total.statistics(whole_shape).shared(processes)
        if not statistics.count:
            raise ModelError(
                f"node '{escape(name)}' sees or gives no finite numbers on the calibration inputs; "
                "repair the model's weights, or give inputs of the kind that it expects"
            )
        seen_mean = processes.total(mean) / statistics.count if large else statistics.mean_in
        result.means[name] = seen_mean
        units = np.abs(behind[name].scale)
        flat = matrix.reshape(maps, outputs, -1)
        for k, blocks in of_groups.items():
            own_moments = None
            if large:
                of_each = maps * len(blocks), blocks.shape[1], 0
                own_moments = alone[k].statistics(of_each).shared(processes)
            _contribute(
                result,
                k,
                own_moments or statistics,
                statistics,
                flat * units[:, :, None],
                units,
                blocks,
                large,
            )
            if large:
                assert own_moments is not None
                seen = seen_alone(own_moments, statistics, flat, units, blocks)
            else:
                mine = statistics if k == of_reader[name][-1] else statistics.copied()
                seen = seen_by(mine, flat, units, blocks)
            waiting[k][name] = seen
            if len(waiting[k]) == len(groups[k].blocks):
                ready = waiting.pop(k)
                ordered = [ready[each] for each in groups[k].blocks]
                ordered += _products_of(groups[k], compared)
                result.removals[k] = remove_in_order(ordered, [*stops(groups[k].group)])
    return result


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


def _contribute(
    result: Calibration,
    index: int,
    own: Statistics,
    whole: Statistics,
    scaled: FloatArray,
    units: FloatArray,
    blocks: IntArray,
    large: bool,
) -> None:
    """Add what a group's channels contribute to one reader; ``scaled`` are its matrices.

    ``own`` has every channel of every map as a map of its own where the reader is ``large``.
    """
    energy = max(float((whole.energy * units**2).sum()), 1e-30)
    weights = scaled[:, :, blocks].transpose(0, 2, 1, 3)  # [maps, channels, outputs, block]
    maps, channels, _, size = weights.shape
    if large:
        spread = own.covariance.reshape(maps, channels, size, size)
        means = own.mean_in.reshape(maps, channels, size)
    else:
        spread = own.covariance[:, blocks[:, :, None], blocks[:, None, :]]
        means = own.mean_in[:, blocks]
    variance = np.einsum("mcob,mcbd,mcod->c", weights, spread, weights, optimize=True)
    constant = np.einsum("mcob,mcb->mco", weights, means)
    energies = variance + np.square(constant).sum(axis=(0, 2))
    sums = result.contributed.setdefault(
        index, {kind: np.zeros(channels) for kind in ("variance", "activation")}
    )
    sums["variance"] += np.maximum(variance, 0.0) / energy
    sums["activation"] += np.maximum(energies, 0.0) / energy


def _with_taps(blocks: IntArray, taps: int) -> IntArray:
    """Inputs with all their taps, ``[channels, inputs per channel * taps]``."""
    every = blocks[:, :, None] * taps + np.arange(taps)
    return every.reshape(len(blocks), -1)


Samples = Iterator[tuple[Array, Array]]
"""Per batch rows ``[places, groups, inputs]`` and results ``[places, groups, outputs]``."""


def visit(
    model: ir.Model,
    found: Mapping[str, Reader],
    names: Sequence[str],
    batches: Iterable[Arrays],
    chooser: "Chooser",
    threads: int,
    progress: Progress,
) -> Iterator[tuple[str, Samples]]:
    """Run a model over batches, and stop at some readers: what they see and give, batch by batch.

    What is given for one reader must be used up before the next.
    """
    nodes = list(model.graph)
    place = {node.name: number for number, node in enumerate(nodes)}
    outputs = [value.name or "" for value in model.graph.outputs]
    kept = Batches()
    for batch in batches:
        kept.append(batch)
    cuts = [place[name] for name in names]
    # Behind the last reader nothing is asked for any more.
    for number, (name, cut) in enumerate(zip(names, cuts, strict=True)):
        progress("statistics", number, len(names))
        if not number:
            kept = advance(model, nodes, kept, (0, cut), outputs, threads)
        here = live_values(nodes, cut, outputs)
        last = number + 1 == len(names)
        ahead = [] if last else live_values(nodes, cuts[number + 1], outputs)
        reader = found[name]
        result = [] if reader.linear.inside else [reader.result.name or ""]
        piece = Piece(model, here, [*ahead, *result], threads)
        later = Batches()
        yield name, _samples(reader, piece, kept, later, ahead, chooser)
        kept.close()
        kept = later
    kept.close()
    progress("statistics", len(names), len(names))


def advance(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    kept: Batches,
    cuts: tuple[int, int],
    outputs: Sequence[str],
    threads: int,
) -> Batches:
    """What is live at the second cut, from what is live at the first."""
    here, ahead = (live_values(nodes, cut, outputs) for cut in cuts)
    if here == ahead:
        return kept
    piece, later = Piece(model, here, ahead, threads), Batches()
    for arrays in kept:
        later.append(piece.run(arrays))
    kept.close()
    return later


def _samples(
    reader: Reader,
    piece: Piece,
    kept: Batches,
    later: Batches,
    ahead: Sequence[str],
    chooser: "Chooser",
) -> Samples:
    maps, outputs, inputs, taps = reader.matrix_shape
    matrix = reader.matrix().reshape(maps, outputs, -1) if reader.linear.inside else None
    enough = chooser.enough(inputs * taps, len(kept))
    for number, arrays in enumerate(kept):
        found = piece.run(arrays)
        later.append({name: found[name] for name in ahead})
        operand = arrays[reader.operand.name or ""]
        result = operand if reader.linear.inside else found[reader.result.name or ""]
        chosen = chooser.choose(reader, operand.shape, result.shape, enough, number)
        rows = reader.linear.rows(operand, result.shape, chosen)
        rows = rows.reshape(len(rows), maps, -1)
        if matrix is None:
            yield rows, reader.linear.results(result, chosen)
        else:
            yield rows, np.einsum("ngi,goi->ngo", rows, matrix)


def places_for(inputs: int) -> int:
    """How many places are looked at for a map of so many inputs: several for each of them."""
    return int(np.clip(PLACES_PER_INPUT * inputs, FEWEST_PLACES, MOST_PLACES))


@dataclass(frozen=True)
class Chooser:
    """Which places of a batch are looked at: the same ones, whichever process has the batch.

    Attributes:
        seed: of the choice.
        processes: that share the batches.
    """

    seed: int
    processes: Processes = ALONE

    def enough(self, inputs: int, batches: int) -> int:
        """How many places of a batch are looked at for a map of so many inputs.

        Args:
            inputs: of the map.
            batches: of this process.
        """
        everywhere = int(self.processes.total(np.array([float(batches)]))[0])
        return -(-places_for(inputs) // max(everywhere, 1))

    def choose(
        self, reader: Reader, operand: Shape, result: Shape, enough: int, number: int
    ) -> IntArray:
        """Some places of a batch, the given one of this process, or all."""
        there = reader.linear.places(operand, result)
        if there <= enough:
            return np.arange(there)
        key = [self.seed, zlib.crc32(reader.name.encode()), self.processes.place(number)]
        return np.sort(np.random.default_rng(key).choice(there, enough, replace=False))
