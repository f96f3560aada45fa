"""Pass ``statistics``: in what order a group's channels may go, from what its readers see.

The original runs once over the calibration inputs, piece by piece; at every reader the second
moments of its operand are taken, and as soon as all readers of a group are through, the group's
order of removal follows from them (:mod:`morphgraph.passes.calibration.removal`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape, static_shape
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.moments import MOST_BYTES, Moments, Statistics
from morphgraph.passes.calibration.readers import Following, Reader, following, readers
from morphgraph.passes.calibration.removal import (
    Removal,
    Seen,
    column_products,
    contributions,
    remove_in_order,
    seen_alone,
    seen_by,
)
from morphgraph.passes.calibration.visits import Chooser, Look, looks, visit
from morphgraph.passes.coupling.roles import roles

#: Bytes that the covariances of one group's readers may take together.
MOST_TOGETHER = 400 * 2**20
#: Places of a batch at which what a reader gives is looked at, where its inputs are too many.
ENERGY_PLACES = 1024


@dataclass(frozen=True, eq=False)
class GroupReaders:
    """The readers of a group.

    Attributes:
        group: the group.
        blocks: by the name of each reader the inputs of every channel, taps apart,
            ``[channels, inputs per channel]``.
        complete: whether all that sums over the group's channels are among them, and nothing
            normalizes over them: then other kernels in the readers are the same as other widths.
    """

    group: Group
    blocks: Mapping[str, IntArray]
    complete: bool


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
        chosen: by index of a group of which the network chooses a few channels how often it chose
            each (:mod:`morphgraph.passes.calibration.choices`).
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


def group_readers(graph: ChannelGraph, found: Mapping[str, Reader]) -> dict[int, GroupReaders]:
    """The readers of every group that a plan may change, by group index."""
    role, couplings = roles(graph.couplings), graph.couplings
    blocks: dict[int, dict[str, IntArray]] = {}
    other: set[int] = set()
    for edge in couplings.edges:
        # The axis may hold more: heads, each of which an attention sums over by itself.
        on_them = graph.groups_on(edge.factor)
        if role.normalizes[edge.factor] or (role.sums_state[edge.factor] and edge.port >= 0):
            other |= on_them
        if not role.sums[edge.factor] or not couplings.on_activation(edge):
            continue
        reader = found.get(graph.ops[edge.op_index].name)
        dim = couplings.dims[edge.dim]
        for index in on_them:
            inputs = None
            if reader is not None and edge.port == reader.linear.operand:
                inputs = _inputs(graph, reader, graph.groups[index], edge.dim, dim.axis)
            if reader is None or inputs is None:
                other.add(index)
            else:
                blocks.setdefault(index, {})[reader.name] = inputs
    return {
        index: GroupReaders(graph.groups[index], named, index not in other)
        for index, named in sorted(blocks.items())
        if graph.groups[index].can_change
    }


def _inputs(
    graph: ChannelGraph, reader: Reader, group: Group, vertex: int, axis: int
) -> IntArray | None:
    """The inputs of every channel of a group in each of a reader's maps; ``None``: they differ."""
    rank = len(static_shape(reader.operand))
    if axis != reader.linear.input_axis(rank):
        return None
    maps, _, inputs, _ = reader.matrix_shape
    standing = graph.channels_of(vertex).reshape(-1, inputs)
    if len(standing) != maps or (standing != standing[:1]).any():
        return None
    places = np.argsort(standing[0], kind="stable")
    sorted_channels = standing[0][places]
    first = np.searchsorted(sorted_channels, group.channels)
    count = np.searchsorted(sorted_channels, group.channels, side="right") - first
    if len(count) == 0 or (count != count[0]).any() or not count[0]:
        return None
    return places[first[:, None] + np.arange(count[0])]


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
    """
    found = readers(graph.model, graph.couplings.input_independent)
    behind = {name: following(reader) for name, reader in found.items()}
    groups = {k: v for k, v in group_readers(graph, found).items() if wanted(v.group)}
    result = Calibration(graph, found, behind, groups=groups)
    listed = looks(found, {name for each in groups.values() for name in each.blocks})
    of_look = [[k for k, v in groups.items() if look.name in v.blocks] for look in listed]
    counts = {k: sum(k in each for each in of_look) for k in groups}
    waiting = {k: list[_Waiting]() for k in groups}
    walk = visit(graph.model, listed, batches, Chooser(seed, processes), threads, progress)
    for (look, samples), indices in zip(walk, of_look, strict=True):
        taps = look.readers[0].matrix_shape[3]
        blocks = {k: with_taps(groups[k].blocks[look.name], taps) for k in indices}
        room = min([MOST_BYTES, *(MOST_TOGETHER // counts[k] for k in indices)])
        moments = _moments(look, samples, blocks, room, processes)
        result.means.update({reader.name: moments.mean for reader in look.readers})
        matrix, units = look.matrix(), _units(look, behind, moments.energy)
        for k in indices:
            own = moments.alone.get(k)
            _contribute(result, k, moments, matrix * units[:, :, None], blocks[k])
            if own is not None:
                seen = seen_alone(own, moments.whole, matrix, units, blocks[k], energy=1.0)
            else:
                mine = moments.whole if k == indices[-1] else moments.whole.copied()
                seen = seen_by(mine, matrix, units, blocks[k], energy=1.0)
            waiting[k].append(_Waiting(look, units, seen))
            if len(waiting[k]) == counts[k]:
                _finish(result, k, waiting.pop(k), stops(groups[k].group))
    return result


@dataclass(frozen=True)
class _Waiting:
    """A look that waits until all of a group's are through, and in which units its outputs are."""

    look: Look
    units: FloatArray
    seen: Seen


@dataclass(frozen=True)
class _Found:
    """What a look sees: its moments, or where they are too large those of every channel alone.

    ``mean`` is that of the inputs, ``[maps, inputs]``, ``energy`` the variance of what is given,
    ``[maps, outputs]``.
    """

    whole: Statistics
    mean: FloatArray
    energy: FloatArray
    alone: dict[int, Statistics]


def _moments(
    look: Look,
    samples: Iterable[Array],
    blocks: Mapping[int, IntArray],
    room: int,
    processes: Processes,
) -> _Found:
    """Use up what is seen at a look; ``room`` are the bytes that a covariance may take."""
    maps, _, inputs, taps = look.readers[0].matrix_shape
    large = maps * (inputs * taps) ** 2 * 8 > room
    total = Moments(crossed=False)
    alone = {k: Moments(crossed=False) for k in blocks} if large else {}
    matrix = look.matrix()
    for rows in samples:
        if not large:
            total.add(rows, rows[:, :, :0])
            continue
        # What is given says how much it is, in one number: a few places tell.
        few = rows[: max(ENERGY_PLACES - total.count, 1)]
        given = few.transpose(1, 0, 2) @ matrix.astype(rows.dtype).swapaxes(1, 2)
        total.add(few[:, :, :0], given.transpose(1, 0, 2))
        for k, own in alone.items():
            seen = rows[:, :, blocks[k]].reshape(len(rows), -1, blocks[k].shape[1])
            own.add(seen, seen[:, :, :0])
    outputs = matrix.shape[1] if large else 0
    statistics = total.statistics((maps, 0 if large else inputs * taps, outputs)).shared(processes)
    energy, mean, of_each = statistics.energy, statistics.mean_in, dict[int, Statistics]()
    for k, own in alone.items():
        shape = maps * len(blocks[k]), blocks[k].shape[1], 0
        of_each[k] = own.statistics(shape).shared(processes)
        mean = np.zeros((maps, inputs * taps))
        mean[:, blocks[k]] = of_each[k].mean_in.reshape(maps, *blocks[k].shape)
    if not large:
        energy = np.einsum("goi,goi->go", matrix @ statistics.covariance, matrix)
    if not statistics.count or not np.isfinite(energy).all():
        raise ModelError(
            f"node '{escape(look.name)}' sees or gives no finite numbers on the calibration "
            "inputs; repair the model's weights, or give inputs of the kind that it expects"
        )
    return _Found(statistics, mean, energy, of_each)


def _units(look: Look, behind: Mapping[str, Following], energy: FloatArray) -> FloatArray:
    """The units in which errors of the outputs count, ``[maps, outputs]``.

    In them the energy of what each reader gives is 1, so that costs are shares of it.
    """
    parts = []
    for name, own in look.parted(energy).items():
        scale = np.abs(behind[name].scale)
        parts.append(scale / np.sqrt(max(float((own * scale**2).sum()), 1e-30)))
    return np.concatenate(parts, axis=1)


def _finish(
    result: Calibration, index: int, waiting: Sequence[_Waiting], stops: Iterable[int]
) -> None:
    """How a group shrinks, all of whose readers are through.

    What makes up for the channels that go is kept as the readers' kernels have it, each in its own
    unit.
    """
    removal = remove_in_order([each.seen for each in waiting], [*stops])
    result.removals[index] = replace(removal, matrices={})
    for width, matrices in removal.matrices.items():
        kept: Arrays = {}
        for each, matrix in zip(waiting, matrices, strict=True):
            if not matrix.shape[1]:  # nothing takes over
                continue
            # An output that nobody sees counts nothing, and keeps its kernel.
            units = each.units[:, :, None]
            plain = np.where(
                units > 0, matrix / np.where(units > 0, units, 1.0), each.look.matrix()
            )
            parts = each.look.parted(plain)
            kept |= {r.name: parts[r.name].astype(r.kernel().dtype) for r in each.look.readers}
        result.compensated[index, width] = len(result.matrices)
        result.matrices.append(kept)


def _contribute(
    result: Calibration, index: int, found: _Found, matrix: FloatArray, blocks: IntArray
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
    sums = result.contributed.setdefault(
        index, {kind: np.zeros(len(blocks)) for kind in ("variance", "activation")}
    )
    sums["variance"] += np.maximum(variance, 0.0)
    sums["activation"] += np.maximum(energies, 0.0)


def with_taps(blocks: IntArray, taps: int) -> IntArray:
    """Inputs with all their taps, ``[channels, inputs per channel * taps]``."""
    every = blocks[:, :, None] * taps + np.arange(taps)
    return every.reshape(len(blocks), -1)
