"""Calibration inputs that can be passed over many times, in bounded memory."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.calibration.feeds import feed_of, is_array
from morphgraph.calibration.layout import Layout
from morphgraph.calibration.rows import MemoryRows, Rows, npy_rows, npz_rows, reading
from morphgraph.calibration.spool import Spool
from morphgraph.calibration.tables import Table, defaults
from morphgraph.errors import ArgumentError, DataError, FileError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.inputs import check_names


class Source(Protocol):
    """Samples that can be read by their numbers, as often as anybody likes."""

    @property
    def count(self) -> int:
        """How many samples there are."""

    def key(self, row: int) -> Hashable:
        """Equal for samples that can stand in one run."""

    def choose(self, rows: IntArray) -> None:
        """Promise that no other samples will be asked for."""

    def read(self, rows: Sequence[int]) -> Arrays:
        """Samples of equal key, as inputs of one run."""


class Samples:
    """Inputs that fit a model, to be passed over many times; every pass is the same.

    They are made by :meth:`of`. What can be read once only is kept in a temporary file, which is
    gone with the last that reads it.

    Attributes:
        described: in words, what they are.
    """

    def __init__(
        self, source: Source, layout: Layout, runs: IntArray, seed: int, described: str
    ) -> None:
        self._source = source
        self._layout = layout
        self._runs = runs  # [runs, samples of one], numbers of samples
        self._seed = seed
        self.described = described

    @classmethod
    def of(cls, data: Any, model: ir.Model, limit: int | None = None, seed: int = 0) -> "Samples":
        """Samples from wherever they come.

        Args:
            data: a file or folder: ``.npz`` (arrays by the names of inputs), ``.npy``, a folder of
                ``.npz`` files or of ``.npy`` files named after the inputs; or arrays by the names
                of inputs; or one array, where the model has one input; or any iterable, such as a
                DataLoader or dataset, of arrays, dicts of arrays, or tuples of arrays in the order
                of the inputs, of which what follows the inputs is ignored. Arrays hold samples
                along the model's batch axis; those of an iterable may also be one sample without
                that axis. Tensors are arrays too.
            model: whose inputs they are for. Samples may differ in sizes that it leaves open.
            limit: at most so many samples, spread evenly; of what can only be iterated the first.
            seed: of the choice of samples, and of :meth:`split`.

        Raises:
            ModelError: an array has the name, shape or type of no input, or one is missing.
            DataError: there are no samples, or a number is NaN or infinite.
            FileError: a file cannot be read.

        >>> x = ir.val("x", ir.DataType.FLOAT, ["N", 3])
        >>> model = ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10)
        >>> samples = Samples.of(np.ones((10, 3)), model)
        >>> samples.count, [feed["x"].shape for feed in samples.batches(4)]
        (10, [(4, 3), (4, 3), (2, 3)])
        >>> [part.count for part in samples.split()]
        [8, 2]
        """
        if limit is not None and limit < 1:
            raise ArgumentError(f"limit={limit}: give the most samples to read, at least 1")
        layout = Layout.of(model)
        source, name = _source_of(data, model, layout, limit, seed)
        where = f"{name}: " if name else ""
        if not source.count:
            raise DataError(
                f"{where}there are no samples in the data; give some (an iterator can be read once "
                "only)"
            )
        runs = _runs(source, layout.batch)
        if not len(runs):
            raise DataError(
                f"{where}has {source.count} samples, but the model takes {layout.batch} of one "
                "shape in every run; give more of them, or export the model with an open batch"
            )
        if limit is not None:
            runs = runs[_spread(len(runs), max(limit // layout.batch, 1), seed)]
        source.choose(runs.reshape(-1))
        described = f"{runs.size} samples" + (f" of {name}" if name else "")
        return cls(source, layout, runs, seed, described)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self._runs.size

    def batches(self, size: int) -> Iterator[Arrays]:
        """Inputs of one run after the other, by name.

        Args:
            size: samples of a run at most, where the model leaves it open; else they are as many
                as it takes. Samples of different shapes never stand in one run.

        Raises:
            DataError: a number is NaN or infinite; says where.
        """
        step = max(size, 1) if self._layout.is_open else 1
        start = 0
        while start < len(self._runs):
            key, stop = self._key(start), start + 1
            while stop < min(len(self._runs), start + step) and self._key(stop) == key:
                stop += 1
            feeds = self._source.read(self._runs[start:stop].reshape(-1).tolist())
            yield feeds | defaults(self._layout, feeds)
            start = stop

    def split(self, share: float = 0.2) -> tuple["Samples", "Samples"]:
        """The samples in two parts that have none in common: the rest, and those held out.

        Args:
            share: of all that is held out, at least one run and at most all but one.

        Raises:
            DataError: there are not enough for two parts.
        """
        total = len(self._runs)
        if total < 2:
            one = "one sample is" if self.count == 1 else f"{self.count} samples of one run are"
            raise DataError(
                f"{self.described}: {one} too few to hold some out; give at least "
                f"{2 * self._layout.batch}, better hundreds"
            )
        held = min(max(round(total * share), 1), total - 1)
        is_held = np.zeros(total, dtype=np.bool_)
        is_held[_spread(total, held, self._seed)] = True
        return self._part(~is_held), self._part(is_held)

    def _part(self, which: Array) -> "Samples":
        runs = self._runs[which]
        described = f"{runs.size} of {self.described}"
        return Samples(self._source, self._layout, runs, self._seed, described)

    def _key(self, run: int) -> Hashable:
        return self._source.key(int(self._runs[run, 0]))


def _spread(total: int, count: int, seed: int) -> IntArray:
    """So many of a number of places, one at random from each of as many stretches of them.

    >>> _spread(10, 3, seed=0).tolist()
    [2, 4, 8]
    """
    if count >= total:
        return np.arange(total)
    bounds = np.arange(count + 1) * total // count
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])


def _runs(source: Source, batch: int) -> IntArray:
    """The numbers of samples that stand in a run together, ``[runs, batch]``.

    Those of one shape follow each other, so that they can be joined.
    """
    by_key: dict[Hashable, list[int]] = {}
    for row in range(source.count):
        by_key.setdefault(source.key(row), []).append(row)
    whole = [
        np.array(rows[: len(rows) // batch * batch], dtype=np.int64).reshape(-1, batch)
        for rows in by_key.values()
    ]
    return np.concatenate(whole) if whole else np.empty((0, batch), dtype=np.int64)


def _source_of(
    data: Any, model: ir.Model, layout: Layout, limit: int | None, seed: int
) -> tuple[Source, str]:
    """The samples in what the user gave, and a name for it where it has one."""
    if isinstance(data, str | PathLike):
        path = Path(data)
        return _of_path(path, model, layout, limit, seed), escape(str(path))
    if isinstance(data, Mapping) or is_array(data):
        return _table(feed_of(data, layout, ""), model, layout, ""), ""
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ArgumentError(
            f"data is a {type(data).__name__}; give a path, arrays, or an iterable of arrays, "
            "dicts or tuples"
        )
    return _spooled(data, model, layout, limit, seed), ""


def _of_path(path: Path, model: ir.Model, layout: Layout, limit: int | None, seed: int) -> Source:
    where = f"{escape(str(path))}: "
    if not path.is_dir():
        return _of_rows(_rows_of_file(path, layout), model, layout, where)
    if files := sorted(path.glob("*.npz")):
        return _of_files(files, model, layout, limit, seed)
    if files := sorted(path.glob("*.npy")):
        return _of_rows({file.stem: npy_rows(file) for file in files}, model, layout, where)
    raise FileError(
        f"{where}holds no images and neither .npz nor .npy files; save arrays with "
        "numpy.savez(FILE, NAME=array)"
    )


def _of_files(
    files: Sequence[Path], model: ir.Model, layout: Layout, limit: int | None, seed: int
) -> Source:
    """The samples of all files, or of some where there are more files than samples wanted."""
    spool = Spool()
    for number in _spread(len(files), limit or len(files), seed):
        where = f"{escape(str(files[number]))}: "
        spool.add(_of_rows(npz_rows(files[number]), model, layout, where))
    return spool


def _rows_of_file(path: Path, layout: Layout) -> Mapping[str, Rows]:
    with reading(path), path.open("rb") as file:
        is_npy = file.read(6) == b"\x93NUMPY"
    return {layout.needed[0]: npy_rows(path)} if is_npy else npz_rows(path)


def _of_rows(arrays: Mapping[str, Rows], model: ir.Model, layout: Layout, where: str) -> Table:
    check_names(arrays, model, where)
    return Table(arrays, layout, where)


def _table(arrays: Arrays, model: ir.Model, layout: Layout, where: str) -> Table:
    rows = {name: MemoryRows(array) for name, array in arrays.items()}
    return _of_rows(rows, model, layout, where)


def _spooled(data: Any, model: ir.Model, layout: Layout, limit: int | None, seed: int) -> Spool:
    """Samples from an iterable, copied, for the next pass over it may give others.

    Of what can only be iterated, which may never end, the first are taken; where there are more
    items than samples wanted, and they can be indexed, some from everywhere.
    """
    spool = Spool()
    is_indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    numbers = _spread(len(data), limit or len(data), seed).tolist() if is_indexed else ()
    items = ((number, data[number]) for number in numbers) if is_indexed else enumerate(data)
    for number, item in items:
        where = f"sample {number} of the data: "
        spool.add(_table(feed_of(item, layout, where), model, layout, where))
        if not is_indexed and limit is not None and spool.count >= limit:
            break
    return spool
