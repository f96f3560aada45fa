"""What is looked at on the walk over the calibration inputs, and the moments of what is seen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from morphgraph.arrays import Array, FloatArray, IntArray
from morphgraph.calibration.processes import Processes
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.calibration.group_readers import GroupReaders
from morphgraph.passes.calibration.moments import Moments, Statistics
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.calibration.stacks import AnyStackLook, Stack, stack_looks
from morphgraph.passes.calibration.uncompensated import TiedLook
from morphgraph.passes.calibration.visits import Look, looks

AnyLook: TypeAlias = Look | AnyStackLook | TiedLook
#: Inputs of an operator whose kernel others share, whose products are not too many.
MOST_INPUTS = 5000
#: Places of a batch at which what a reader gives is looked at, where its inputs are too many.
ENERGY_PLACES = 1024


def looked_at(
    graph: ChannelGraph,
    found: Mapping[str, Reader],
    groups: Mapping[int, GroupReaders],
    others: tuple[Mapping[str, Stack], Mapping[str, Reader]],
    wanted: Callable[[Group], bool],
    threads: int,
) -> list[AnyLook]:
    """What is looked at, in the model's order.

    Stacks that tell of their experts are, where these may go.

    Args:
        graph: the network.
        found: its readers.
        groups: those of every group that is looked at.
        others: kernels of experts, and operators whose kernels others share.
        wanted: which groups are looked at.
        threads: of ONNX Runtime.
    """
    of_experts, tied = others
    read = {name for each in groups.values() for name in each.stacks}
    asked = [
        each
        for each in stack_looks(graph.model, of_experts, threads)
        if each.name in read or (each.tells and any(map(wanted, experts_of(graph, each.stack))))
    ]
    plain = looks(found, {name for each in groups.values() for name in each.blocks})
    fitted = [each for each in groups.values() if each.blocks or each.stacks]
    also = {name for each in fitted for name in each.tied}
    rest = [TiedLook((each,)) for name, each in tied.items() if name in also]
    rest = [each for each in rest if _inputs(each.reader) <= MOST_INPUTS]
    place = {node.name: number for number, node in enumerate(graph.model.graph)}
    return sorted([*plain, *asked, *rest], key=lambda look: place[look.stop])


def _inputs(reader: Reader) -> int:
    maps, _, inputs, taps = reader.matrix_shape
    return maps * inputs * taps


def experts_of(graph: ChannelGraph, stack: Stack) -> list[Group]:
    """The groups whose channels are the experts of a stack."""
    return [graph.groups[k] for k in sorted(graph.groups_on(graph.dim(stack.stack, 0)))]


def sums(samples: Iterable[Array], like: tuple[int, int, int], processes: Processes) -> Statistics:
    """Moments of what is seen, ``[places, maps, inputs]``."""
    total = Moments(crossed=False)
    for rows in samples:
        total.add(rows, rows[:, :, :0])
    return total.statistics(like).shared(processes)


@dataclass(frozen=True)
class Found:
    """What a look sees: its moments, or where they are too large those of every channel alone.

    ``mean`` is that of the inputs, ``[maps, inputs]``, ``energy`` the variance of what is given,
    ``[maps, outputs]``.
    """

    whole: Statistics
    mean: FloatArray
    energy: FloatArray
    alone: dict[int, Statistics]


def moments_at(
    look: Look,
    samples: Iterable[Array],
    blocks: Mapping[int, IntArray],
    room: int,
    processes: Processes,
) -> Found:
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
    return Found(statistics, mean, energy, of_each)


def pooled(places: Sequence[Found], matrix: FloatArray) -> Found:
    """What is seen at all places where the same kernels are read, by how often it was looked at.

    About the mean of all: what makes up for it is one constant.

    Args:
        places: what is seen at each of them.
        matrix: the kernels, ``[maps, outputs, inputs]``.
    """
    weights = [1.0] * len(places)
    whole = Statistics.pooled([each.whole for each in places], weights)
    alone = {
        k: Statistics.pooled([each.alone[k] for each in places], weights) for k in places[0].alone
    }
    counts = [each.whole.count for each in places]
    mean = np.average([each.mean for each in places], axis=0, weights=counts)
    energy = whole.energy
    if not alone:
        energy = np.einsum("goi,goi->go", matrix @ whole.covariance, matrix)
    return Found(whole, mean, energy, alone)
