"""Random inputs for sessions of any runtime, and rounds of runs.

Process CPU time at one thread with spinning off is the steadiest clock on a machine that others use
too; wall time is kept beside it, and is what counts for several threads and other devices.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from time import perf_counter

import numpy as np

from morphgraph.arrays import Arrays, FloatArray, IntArray, Shape
from morphgraph.errors import ModelError
from morphgraph.onnx_io import ModelLike, escape
from morphgraph.onnx_io.runtime import random_array
from morphgraph.runtimes import Clock, Runtime, Session, Spent

WARM_UP_RUNS = 2
MIN_EPOCHS = 6  # below that no interval can be told from the spread between sessions

_TURN_SECONDS = 0.02
_MAX_TURN_RUNS = 20


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of every run by both clocks, ``[rounds, models, runs]``.

    ``epochs`` tells which sessions a round used: those of one epoch are the same, ``[rounds]``.
    """

    cpu: FloatArray
    wall: FloatArray
    epochs: IntArray

    def by(self, clock: Clock) -> FloatArray:
        """The durations by one of the clocks."""
        return self.cpu if clock == "cpu" else self.wall


def model_name(model: ModelLike, position: int) -> str:
    """How to call a model: its file's name, its graph's name, or its place in the row."""
    if isinstance(model, str | PathLike):
        return escape(Path(fspath(model)).name)
    return escape(model.graph.name or "") or f"model {position + 1}"


def random_feeds(
    session: Session,
    name: str,
    batch: int | None,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    assumed: Mapping[str, Sequence[int]] | None = None,
) -> Arrays:
    """Random inputs as the model declares them, the same for the same seed and declaration.

    Floats are standard normal. Integers are 0 or 1, which is a valid index wherever one is wanted.
    A leading axis that the model leaves open gets ``batch``, or 1; ``shapes`` gives whole shapes of
    inputs by name, which other inputs follow where they call an open size the same, and ``assumed``
    the sizes of other axes that are left open.

    Raises:
        ModelError: another axis is open and nothing is assumed of it, the model fixes a size at
            another number, or has no such input; or ``shapes`` has another batch.
        UnsupportedError: an input is no tensor of numbers.
    """
    generator = np.random.default_rng(seed)
    feeds: Arrays = {}
    left_over = dict(shapes or {})
    named = _named_sizes(session, left_over)
    for declared in session.inputs:
        where = f"{name}: input '{escape(declared.name)}'"
        requested = left_over.pop(declared.name, None)
        if requested is not None:
            shape = _fitting(tuple(requested), declared.shape, where)
        else:
            known = (assumed or {}).get(declared.name, ())
            sizes = [
                known[axis] if axis and axis < len(known) and not isinstance(n, int) else n
                for axis, n in enumerate(declared.shape)
            ]
            sizes = [_as_named(n, axis, named, batch, where) for axis, n in enumerate(sizes)]
            shape = tuple(_size(n, axis, batch, where) for axis, n in enumerate(sizes))
        feeds[declared.name] = random_array(generator, shape, declared.dtype)
    if left_over:
        unknown = escape(next(iter(left_over)))
        raise ModelError(f"{name}: has no input '{unknown}' to give a shape to")
    return feeds


def _named_sizes(
    session: Session, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, str]]:
    """By the names of open sizes those that given shapes have there, and of which input."""
    found: dict[str, tuple[int, str]] = {}
    for declared in session.inputs:
        for size, name in zip(shapes.get(declared.name, ()), declared.shape, strict=False):
            if isinstance(name, str) and name:
                found.setdefault(name, (size, declared.name))
    return found


def _as_named(
    size: int | str | None,
    axis: int,
    named: Mapping[str, tuple[int, str]],
    batch: int | None,
    where: str,
) -> int | str | None:
    """An open size whose name another input's shape has given a number to, else as it is."""
    if not isinstance(size, str) or size not in named:
        return size
    given, other = named[size]
    if axis == 0 and batch is not None and batch != given:
        raise ModelError(
            f"{where} has as many samples as input '{escape(other)}' (both call it "
            f"'{escape(size)}'), whose shape has {given}, and not {batch}; give one batch"
        )
    return given


def _fitting(shape: Shape, declared: Sequence[int | str | None], where: str) -> Shape:
    """The shape that the user gives, if the model takes it."""
    fixed = [size if isinstance(size, int) and size > 0 else None for size in declared]
    fits = len(fixed) == len(shape) and all(a in (None, b) for a, b in zip(fixed, shape))
    if not fits:
        shown = ", ".join(map(str, declared))
        raise ModelError(f"{where}: shape {shape} does not fit the model, which declares ({shown})")
    return shape


def _size(size: int | str | None, axis: int, batch: int | None, where: str) -> int:
    if isinstance(size, int) and size >= 0:
        if axis == 0 and batch is not None and size != batch:
            raise ModelError(
                f"{where} has a fixed batch of {size}, not {batch}; leave the batch out, or export "
                "the model with a dynamic one"
            )
        return size
    if axis == 0:
        return 1 if batch is None else batch
    raise ModelError(
        f"{where} leaves axis {axis} open ({size!r}); give --input-shape (input_shapes), or save "
        "the model with a fixed size"
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """Who takes part in the rounds: a model in a runtime; ``name`` is how errors call it."""

    runtime: Runtime
    model: ModelLike
    name: str


@dataclass(frozen=True, slots=True)
class Feeding:
    """What sessions are fed: sizes of open axes, and the seed of random numbers."""

    batch: int | None = None
    seed: int = 0
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    assumed: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def feeds(self, session: Session, name: str) -> Arrays:
        """Random inputs of a session."""
        return random_feeds(session, name, self.batch, self.seed, self.shapes, self.assumed)


Run = Callable[[], Spent]


def time_rounds(
    entries: Sequence[Entry],
    threads: int,
    seconds: float,
    feeding: Feeding,
    min_rounds: int,
) -> Durations:
    """Run models in turn until their share of time is spent, and take both clocks at every run.

    In a round every model has a turn: one run that is not timed, for the models before have left
    their own data in the caches (a run is up to 1.3 times as long then), and some that are. The
    order is shuffled, and each second round takes the order of the round before backwards (A B,
    B A): a machine that grows steadily slower favours nobody.

    After some rounds all sessions are built anew. Where a session's memory comes to lie is luck,
    and stays with it: two sessions of one model may differ by several percent however long they
    run. What building takes stands beside what running takes, by the rule of two-stage samples.

    Args:
        entries: what to run, and where.
        threads: a runtime's threads within an operator.
        seconds: of wall time per model, building apart; rounds are whole and come in twos.
        feeding: what they are fed; its seed is that of the order too.
        min_rounds: run at least so many, however long that takes.

    Raises:
        FileError: there is no such file.
        ModelError: a file is broken, or the models do not take the same batch.
        UnsupportedError: a runtime does not run a model.
    """
    total = seconds * len(entries)
    order = round_orders(len(entries), feeding.seed)
    rounds: list[list[list[Spent]]] = []
    epochs: list[int] = []
    building = running = 0.0
    epoch, turn_runs = 0, 0
    while len(rounds) < min_rounds or running < total or _wants_epoch(epoch, building, total):
        start = perf_counter()
        runs = _build(entries, threads, feeding)
        turn_runs = turn_runs or _turn_runs(runs)
        built = perf_counter()
        with _no_collections():
            pairs = 0
            while pairs == 0 or _stays(pairs, built - start, perf_counter() - built, total):
                rounds += [_round(runs, next(order), turn_runs) for _ in range(2)]
                pairs += 1
        epochs += [epoch] * (2 * pairs)
        building += built - start
        running += perf_counter() - built
        epoch += 1
    cpu, wall = np.moveaxis(np.array(rounds), -1, 0)  # each [rounds, models, runs]
    return Durations(cpu, wall, np.array(epochs))


def _wants_epoch(epochs: int, building: float, total: float) -> bool:
    """Whether more sessions are needed, and no dearer than the time that was asked for."""
    return epochs < MIN_EPOCHS and building < total


def _stays(pairs: int, building: float, running: float, total: float) -> bool:
    """Whether an epoch goes on after so many pairs of rounds, which took so long.

    Sessions differ about as much as rounds do. Then the mean is known best, at given time, with
    sqrt(building / running of a pair) pairs a session (Cochran, *Sampling Techniques*, 10.6).
    """
    return pairs < (building / (running / pairs)) ** 0.5 and running < total / MIN_EPOCHS


def _build(entries: Sequence[Entry], threads: int, feeding: Feeding) -> list[Run]:
    """Sessions of all models, warmed up."""
    runs: list[Run] = []
    batches: list[int | None] = []
    for entry in entries:
        session = entry.runtime.session(entry.model, threads, name=entry.name)
        feeds = feeding.feeds(session, entry.name)
        first = next(iter(feeds.values()), None)
        batches.append(first.shape[0] if first is not None and first.ndim else None)
        if batches[-1] != batches[0]:
            raise ModelError(
                f"{entry.name}: takes a batch of {batches[-1]}, {entries[0].name} one of "
                f"{batches[0]}; give a batch that both can take"
            )
        runs.append(partial(session.timed_run, feeds))
        for _ in range(WARM_UP_RUNS):
            runs[-1]()
    return runs


def _turn_runs(runs: Sequence[Run]) -> int:
    """How many timed runs make a turn: some for quick models, one for slow ones."""
    slowest = max(run().wall for run in runs)
    return int(min(max(_TURN_SECONDS / max(slowest, 1e-6), 1), _MAX_TURN_RUNS))


def _round(runs: Sequence[Run], order: Sequence[int], turn_runs: int) -> list[list[Spent]]:
    spent: list[list[Spent]] = [[] for _ in runs]
    for index in order:
        runs[index]()
        spent[index] = [runs[index]() for _ in range(turn_runs)]
    return spent


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection, which would be charged to whoever runs when it comes."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def round_orders(count: int, seed: int) -> Iterator[list[int]]:
    """Orders of ``count`` models, without end: one at random, the same backwards, and so on."""
    generator = np.random.default_rng(seed)
    while True:
        order = [int(index) for index in generator.permutation(count)]
        yield order
        yield order[::-1]
