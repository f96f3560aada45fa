"""Random inputs for sessions of any runtime, and rounds of runs.

Process CPU time at one thread with spinning off is the steadiest clock on a machine that others use
too; wall time is kept beside it, and is what counts for several threads and other devices.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from time import perf_counter

import numpy as np

from morphgraph.arrays import Arrays, FloatArray, Shape
from morphgraph.benchmark.runtimes import Clock, Runtime, Session, Spent
from morphgraph.benchmark.runtimes.sources import runtime_errors
from morphgraph.errors import ModelError
from morphgraph.onnx_io import ModelLike, escape
from morphgraph.onnx_io.runtime import random_array

WARM_UP_RUNS = 3


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds per round and model by both clocks, ``[rounds, models]``."""

    cpu: FloatArray
    wall: FloatArray

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
) -> Arrays:
    """Random inputs as the model declares them, the same for the same seed and declaration.

    Floats are standard normal. Integers are 0 or 1, which is a valid index wherever one is wanted.
    A leading axis that the model leaves open gets ``batch``, or 1; ``shapes`` gives whole shapes of
    inputs by name.

    Raises:
        ModelError: another axis is open, the model fixes a size at another number, or has no such
            input.
        UnsupportedError: an input is no tensor of numbers.
    """
    generator = np.random.default_rng(seed)
    feeds: Arrays = {}
    left_over = dict(shapes or {})
    for declared in session.inputs:
        where = f"{name}: input '{escape(declared.name)}'"
        requested = left_over.pop(declared.name, None)
        if requested is not None:
            shape = _fitting(tuple(requested), declared.shape, where)
        else:
            shape = tuple(_size(n, axis, batch, where) for axis, n in enumerate(declared.shape))
        feeds[declared.name] = random_array(generator, shape, declared.dtype)
    if left_over:
        unknown = escape(next(iter(left_over)))
        raise ModelError(f"{name}: has no input '{unknown}' to give a shape to")
    return feeds


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

    def feeds(self, session: Session, name: str) -> Arrays:
        """Random inputs of a session."""
        return random_feeds(session, name, self.batch, self.seed, self.shapes)


def time_rounds(
    entries: Sequence[Entry],
    threads: int,
    seconds: float,
    feeding: Feeding,
    min_rounds: int,
) -> Durations:
    """Run models in turn until their share of time is spent, and take both clocks at every run.

    Every round runs each model once. The order is shuffled, and each second round takes the order
    of the round before backwards (A B, B A): a machine that grows steadily slower favours nobody.

    Args:
        entries: what to run, and where.
        threads: a runtime's threads within an operator.
        seconds: of wall time per model, warm-up apart; rounds are whole and come in twos.
        feeding: what they are fed; its seed is that of the order too.
        min_rounds: run at least so many, however long that takes.

    Raises:
        FileError: there is no such file.
        ModelError: a file is broken, or the models do not take the same batch.
        UnsupportedError: a runtime does not run a model.
    """
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
        with runtime_errors(entry.runtime.name, entry.name):
            for _ in range(WARM_UP_RUNS):
                runs[-1]()
    return _alternate(runs, seconds * len(runs), feeding.seed, min_rounds)


Run = Callable[[], Spent]


def _alternate(runs: Sequence[Run], seconds: float, seed: int, min_rounds: int) -> Durations:
    rounds: list[list[Spent]] = []
    order = round_orders(len(runs), seed)
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever runs when it comes
    try:
        end = perf_counter() + seconds
        while len(rounds) < min_rounds or len(rounds) % 2 or perf_counter() < end:
            spent = [Spent(0.0, 0.0)] * len(runs)
            for index in next(order):
                spent[index] = runs[index]()
            rounds.append(spent)
    finally:
        if collecting:
            gc.enable()
    cpu, wall = np.moveaxis(np.array(rounds), -1, 0)  # each [rounds, models]
    return Durations(cpu, wall)


def round_orders(count: int, seed: int) -> Iterator[list[int]]:
    """Orders of ``count`` models, without end: one at random, the same backwards, and so on."""
    generator = np.random.default_rng(seed)
    while True:
        order = [int(index) for index in generator.permutation(count)]
        yield order
        yield order[::-1]
