"""Pass ``curves``: what it does to the outputs when one group alone gets narrower.

How wrong a layer becomes does not say what the outputs see of it, so that is measured: the group's
readers get the kernels that make up best for the channels that go, everything else stays, and the
network runs on some of the calibration inputs. A group's *curve* is the error of the outputs over
its width, as a share of their variance; between the widths that were measured it follows the error
of the group's readers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.edit import Editor
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import static_shape
from morphgraph.passes.analysis.score import score
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.bases import Turn, turns
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.carried import Carried, Changed
from morphgraph.passes.calibration.narrowed import mixed, narrowed, write_scales
from morphgraph.passes.calibration.outputs import Energies, OutputErrors
from morphgraph.passes.calibration.readers import all_readers
from morphgraph.passes.calibration.segments import run_all
from morphgraph.passes.calibration.statistics import Calibration, with_taps
from morphgraph.passes.rewrite.bias import add_constant
from morphgraph.passes.rewrite.mask import mask

Points = dict[int, float]
"""By width the error of the outputs, as a share of their variance."""


def measure(
    calibration: Calibration,
    feeds: Iterable[Arrays],
    stops: Mapping[int, Sequence[int]],
    *,
    threads: int = 0,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[int, Points]:
    """By group index the error of the outputs at some widths of that group alone.

    Args:
        calibration: what is known of the groups' readers.
        feeds: the inputs on which it is measured.
        stops: by group index the widths.
        threads: of ONNX Runtime.
        progress: told of every run.
        processes: that share the widths; all have these feeds.
    """
    widths = [(index, width) for index, each in stops.items() for width in each]
    simple = [k for k in stops if k in calibration.groups and calibration.groups[k].complete]
    own = widths[processes.rank :: processes.count]
    carried = [each for each in own if each[0] in simple]
    changes = [_change(calibration, *each) for each in carried]
    masked = [each for each in own if each[0] not in simple]
    model, whole = calibration.graph.model, 0
    walk = Carried(model, changes, threads, lambda done: progress("curves", done, whole))
    whole = walk.total + len(masked)
    errors = dict(zip(carried, walk.run(feeds), strict=True)) if changes else {}
    if masked:
        expected, energies = Batches(), Energies()
        for outputs in run_all(model, feeds, threads):
            expected.append(outputs)
            energies.add(outputs)
        for number, each in enumerate(masked):
            progress("curves", walk.total + number, whole)
            found = OutputErrors()
            for one, other in zip(expected, _masked(calibration, *each, feeds, threads)):
                found.add(one, other)
            errors[each] = found.share(energies)
        expected.close()
    progress("curves", whole, whole)
    every = processes.gather(errors)
    points: dict[int, Points] = {index: {} for index in stops}
    for index, width in widths:
        points[index][width] = next(each[index, width] for each in every if (index, width) in each)
    return points


def _change(calibration: Calibration, index: int, width: int) -> Changed:
    """The network in which a group's readers have the kernels of another width."""

    def write(model: ir.Model, which: frozenset[str]) -> None:
        _write(calibration, model, changed_kernels(calibration, index, width, which))

    group = calibration.groups[index]
    takers = {calibration.stacks[name].taker[0] for name in group.stacks}
    return Changed(frozenset({*group.blocks, *takers}), write)


Kernels = dict[str, tuple[FloatArray, FloatArray]]
"""By the name of a reader its matrices, and what is added to its result, ``[groups, outputs]``.

And by that of a stack those of all experts, to which nothing is added.
"""


def changed_kernels(
    calibration: Calibration, index: int, width: int, which: Collection[str] | None = None
) -> Kernels:
    """The kernels of a group's readers that make up best for the channels that go.

    And those that make queries and keys, where products of these read the group.

    Args:
        calibration: what is known of the readers.
        index: of the group.
        width: of the group, one at which kernels were kept.
        which: names of readers, and then of nothing else; by default all.
    """
    removal = calibration.removals.get(index)
    number = calibration.compensated.get((index, width))
    if removal is None:
        return {}
    found = _turned_kernels(calibration, index, width) if which is None else Kernels()
    if number is None:
        return found
    gone = removal.order[: calibration.graph.groups[index].width - width]
    compensated = calibration.matrices[number]
    for name, blocks in calibration.groups[index].blocks.items():
        if which is not None and name not in which:
            continue
        reader = calibration.readers[name]
        shape = reader.matrix_shape
        before = reader.matrix().reshape(*shape[:2], -1)
        if name in compensated:
            after = compensated[name].astype(np.float64)
        else:
            after = before.copy()
            after[:, :, with_taps(blocks[gone], shape[3]).ravel()] = 0.0
        shift = np.einsum("goi,gi->go", before - after, calibration.means[name])
        found[name] = after.reshape(shape), shift
    for name, blocks in calibration.groups[index].stacks.items():
        stack = calibration.stacks[name]
        taker, _ = stack.taker
        if which is None or taker in which:
            after = compensated[name] if name in compensated else stack.matrices().copy()
            if name not in compensated:
                after[:, :, blocks[gone].ravel()] = 0.0
            found[name] = after.astype(np.float64), np.zeros(after.shape[:2])
    return found


def _turned_kernels(calibration: Calibration, index: int, width: int) -> Kernels:
    """The kernels that make queries and keys, in the bases that change their products least."""
    graph, readers = calibration.graph, calibration.readers
    if not calibration.groups[index].products:
        return {}
    keep = np.sort(order_of(calibration, index)[graph.groups[index].width - width :])
    found = turns(calibration.compared, readers, AxisSelection(graph, {index: keep}))
    return _kernels(calibration, found)


def _kernels(calibration: Calibration, turned: Mapping[str, Turn]) -> Kernels:
    """The kernels of layers whose results are in another basis."""
    return {
        name: turn.kernel(calibration.readers[name], calibration.following[name])
        for name, turn in turned.items()
    }


def _write(calibration: Calibration, model: ir.Model, changed: Kernels) -> None:
    """Give readers of a copy of the network, or of a part, other kernels and biases, in place."""
    editor = Editor(model)
    weights = calibration.graph.couplings.input_independent
    for name, reader in all_readers(model, weights).items():
        if name in changed:
            matrix, shift = changed[name]
            reader.write(matrix)
            if not reader.linear.inside:
                rank = len(static_shape(reader.result))
                constant = reader.linear.spread(shift.astype(reader.kernel().dtype), rank)
                add_constant(editor, reader.node, constant, frozenset(range(rank)))
    nodes = {node.name or "": node for node in model.graph}
    for name, stack in calibration.stacks.items():
        taker = nodes.get(stack.taker[0])
        here = stack.within(taker, model) if taker is not None and name in changed else None
        if here is not None:
            here.write(changed[name][0])


def _masked(
    calibration: Calibration, index: int, width: int, feeds: Iterable[Arrays], threads: int
) -> Iterator[Arrays]:
    """The outputs of the masked original, for groups over which something normalizes."""
    graph = calibration.graph
    keep = order_of(calibration, index)[graph.groups[index].width - width :]
    kept = {index: np.sort(keep)}
    model = mask(graph, kept)
    kernels = changed_kernels(calibration, index, width)
    found = narrowed(graph, calibration.compared, calibration.readers, (model, kept), threads)
    turned = mixed(found, calibration.readers, AxisSelection(graph, kept))
    _write(calibration, model, kernels | _kernels(calibration, turned))
    write_scales(model, found)
    try:
        yield from run_all(model, feeds, threads)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise UnsupportedError(f"ONNX Runtime does not run the masked model: {error}") from error


def order_of(calibration: Calibration, index: int) -> IntArray:
    """The order in which a group's channels go, 0-based.

    What counts least goes first where the network chooses; by their kernels where neither that
    nor a reader tells.
    """
    removal, chosen = calibration.removals.get(index), calibration.chosen.get(index)
    if removal is not None and chosen is None:
        return removal.order
    group = calibration.graph.groups[index]
    by_kernels = score(calibration.graph, "l2")[group.channels]
    return np.lexsort((by_kernels, by_kernels if chosen is None else chosen))


def curve(width: int, points: Points, losses: FloatArray | None) -> FloatArray:
    """The error of the outputs at every width of a group, ``[width + 1]``; falls with the width.

    Args:
        width: of the group as it is, where there is no error.
        points: what was measured.
        losses: of the group's readers after each removal, ``[width]``, or ``None``.
    """
    shape = np.arange(width, -1.0, -1.0) / width
    if losses is not None:
        shape = np.append(losses[::-1], 0.0)  # by the number that stay
    shape = np.maximum(shape, 1e-12 * max(float(shape[0]), 1e-12))
    measured = sorted(points)
    ratios = [points[k] / shape[k] for k in measured]
    kept = np.arange(width + 1)
    found = np.interp(kept, measured, ratios) * shape if measured else shape
    found[width] = 0.0
    return np.maximum.accumulate(found[::-1])[::-1]


def convex(curve: FloatArray) -> FloatArray:
    """The greatest convex function that is nowhere above a curve, ``[width + 1]``.

    >>> convex(np.array([8.0, 7.0, 2.0, 0.0])).tolist()
    [8.0, 5.0, 2.0, 0.0]
    """
    hull: list[int] = []
    for k in range(len(curve)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (curve[b] - curve[a]) * (k - b) < (curve[k] - curve[b]) * (b - a):
                break
            hull.pop()
        hull.append(k)
    return np.interp(np.arange(len(curve)), hull, curve[hull])


def channel_scores(calibration: Calibration, points: Mapping[int, Points]) -> FloatArray:
    """What each channel costs the outputs when its turn comes, ``[channels]``.

    The sum over the channels that a group loses is its curve (made convex), so that scores of all
    groups are on one scale: shares of the outputs' variance. Channels of groups that were not
    measured count nothing.
    """
    graph = calibration.graph
    scores = np.zeros(len(graph.channel_group))
    for index, measured in points.items():
        group, removal = graph.groups[index], calibration.removals.get(index)
        whole = curve(group.width, measured, None if removal is None else removal.losses)
        steps = -np.diff(convex(whole))[::-1]  # the first to go first
        # Equal steps of a hull would let the order of removal be lost.
        steps = np.maximum.accumulate(np.maximum(steps, 1e-12))
        rising = 1 + 1e-9 * np.arange(len(steps))
        scores[group.channels[order_of(calibration, index)]] = steps * rising
    return scores
