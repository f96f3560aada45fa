"""ONNX Runtime sessions made for timing, random inputs for them, and rounds of runs.

Process CPU time at one thread with spinning off is the steadiest clock on a machine that others use
too; wall time is kept beside it, and is what counts for several threads.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Literal

import numpy as np
import onnxruntime

from morphgraph.arrays import Arrays, FloatArray, Shape
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_io import ModelLike, as_model, escape, load, save
from morphgraph.onnx_io.runtime import random_array

Clock = Literal["cpu", "wall"]

WARM_UP_RUNS = 3

# ONNX Runtime's names of the types that inputs may have.
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    **{
        f"tensor({name})": np.dtype(name)
        for size in ("8", "16", "32", "64")
        for name in (f"int{size}", f"uint{size}")
    },
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
}


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


@contextmanager
def model_file(model: ModelLike) -> Iterator[Path]:
    """A file that holds the model: its own, or a temporary one that lasts as long as the block.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file is not ONNX or is damaged.
    """
    if isinstance(model, str | PathLike):
        load(model)  # for what it says about a broken file; ONNX Runtime says INVALID_PROTOBUF
        yield Path(model).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="morphgraph-") as folder:
        path = Path(folder) / "model.onnx"
        save(as_model(model), path)
        yield path


def timing_session(path: Path, name: str, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU with all optimizations and so many threads, which sleep when idle.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model; carries its words.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait burn the CPU time that is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _runtime_errors(name):
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


@contextmanager
def _runtime_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors share no base class
        words = " ".join(str(error).split())
        raise UnsupportedError(
            f"{name}: ONNX Runtime does not run it: {escape(words)[:300]}; "
            "`morphgraph doctor` tells its version"
        ) from error


def random_feeds(
    session: onnxruntime.InferenceSession,
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
    for declared in session.get_inputs():
        where = f"{name}: input '{escape(declared.name)}'"
        dtype = _DTYPES.get(declared.type)
        if dtype is None:
            raise UnsupportedError(f"{where} is a {declared.type}; only tensors of numbers are fed")
        requested = left_over.pop(declared.name, None)
        if requested is not None:
            shape = _fitting(tuple(requested), declared.shape, where)
        else:
            shape = tuple(_size(n, axis, batch, where) for axis, n in enumerate(declared.shape))
        feeds[declared.name] = random_array(generator, shape, dtype)
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


def time_rounds(
    models: Sequence[ModelLike],
    names: Sequence[str],
    threads: int,
    seconds: float,
    batch: int | None,
    seed: int,
    min_rounds: int,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Durations:
    """Run models in turn until their share of time is spent, and take both clocks at every run.

    Every round runs each model once. The order is shuffled, and each second round takes the order
    of the round before backwards (A B, B A): a machine that grows steadily slower favours nobody.

    Args:
        models: what to run.
        names: how errors call them.
        threads: ONNX Runtime's threads within an operator.
        seconds: of wall time per model, warm-up apart; rounds are whole and come in twos.
        batch: size of the models' open leading axes.
        seed: of the inputs and the order.
        min_rounds: run at least so many, however long that takes.
        input_shapes: shapes of inputs that the models leave open, by name.

    Raises:
        FileError: there is no such file.
        ModelError: a file is broken, or the models do not take the same batch.
        UnsupportedError: ONNX Runtime does not run a model.
    """
    with ExitStack() as files:
        runs: list[Callable[[], object]] = []
        batches: list[int | None] = []
        for model, name in zip(models, names, strict=True):
            path = files.enter_context(model_file(model))
            session = timing_session(path, name, threads)
            feeds = random_feeds(session, name, batch, seed, input_shapes)
            first = next(iter(feeds.values()), None)
            batches.append(first.shape[0] if first is not None and first.ndim else None)
            if batches[-1] != batches[0]:
                raise ModelError(
                    f"{name}: takes a batch of {batches[-1]}, {names[0]} one of {batches[0]}; "
                    "give a batch that both can take"
                )
            runs.append(_runner(session, feeds))
            with _runtime_errors(name):
                for _ in range(WARM_UP_RUNS):
                    runs[-1]()
        return _alternate(runs, seconds * len(runs), seed, min_rounds)


def _runner(session: onnxruntime.InferenceSession, feeds: Arrays) -> Callable[[], object]:
    outputs = [output.name for output in session.get_outputs()]
    return lambda: session.run(outputs, feeds)


def _alternate(
    runs: Sequence[Callable[[], object]], seconds: float, seed: int, min_rounds: int
) -> Durations:
    cpu: list[FloatArray] = []
    wall: list[FloatArray] = []
    order = round_orders(len(runs), seed)
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever runs when it comes
    try:
        end = perf_counter() + seconds
        while len(cpu) < min_rounds or len(cpu) % 2 or perf_counter() < end:
            cpu.append(np.empty(len(runs)))
            wall.append(np.empty(len(runs)))
            for index in next(order):
                wall_start, cpu_start = perf_counter(), process_time()
                runs[index]()
                cpu_end, wall_end = process_time(), perf_counter()
                cpu[-1][index] = cpu_end - cpu_start
                wall[-1][index] = wall_end - wall_start
    finally:
        if collecting:
            gc.enable()
    return Durations(np.stack(cpu), np.stack(wall))


def round_orders(count: int, seed: int) -> Iterator[list[int]]:
    """Orders of ``count`` models, without end: one at random, the same backwards, and so on."""
    generator = np.random.default_rng(seed)
    while True:
        order = [int(index) for index in generator.permutation(count)]
        yield order
        yield order[::-1]
