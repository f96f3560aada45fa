"""Calibration inputs that can be passed over many times, in bounded memory."""

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.calibration.images import ImageOptions
from morphgraph.calibration.layout import Layout
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.calibration.sources import Reader, Source, spread
from morphgraph.calibration.tables import defaults
from morphgraph.calibration.text import TextOptions
from morphgraph.errors import ArgumentError, DataError


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
    def of(
        cls,
        data: Any,
        model: ir.Model,
        limit: int | None = None,
        seed: int = 0,
        *,
        images: ImageOptions | None = None,
        text: TextOptions | None = None,
        progress: Progress = no_progress,
    ) -> "Samples":
        """Samples from wherever they come.

        Args:
            data: a file or folder: ``.npz`` (arrays by the names of inputs), ``.npy``, a folder of
                images (also in folders below it), of ``.npz`` files, or of ``.npy`` files: one
                for each input, named after it, or one for each sample; or arrays by the names of
                inputs; or one array, where the model has one input; or any iterable, such as a
                DataLoader or dataset, of arrays, dicts of arrays, or tuples of arrays in the order
                of the inputs. What is no input, as labels, is left out. Arrays hold samples along
                the model's batch axis; a single sample may lack that axis. Tensors are arrays too.
                For a language model also text, with a tokenizer: a file (``.txt``, or
                ``.jsonl`` with a ``"text"`` on each line), a folder of them, or a list of strings.
            model: whose inputs they are for. Samples may differ in sizes that it leaves open.
            limit: at most so many samples, spread evenly; of what can only be iterated the first.
            seed: of the choice of samples, and of :meth:`split`.
            images: how images and arrays of pixels (uint8) become an input; what is not said is
                read from the model's metadata.
            text: the tokenizer of text, and how long its sequences are.
            progress: is told how many samples are read, where that takes time.

        Raises:
            ModelError: an array has the name, shape or type of no input, or one is missing.
            DataError: there are no samples, or a number is NaN or infinite.
            ArgumentError: what is said about images does not fit the model or the data.
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
        reader = Reader(model, layout, images or ImageOptions(), limit, seed, progress, text)
        source, name = reader.open(data)
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
            runs = runs[spread(len(runs), max(limit // layout.batch, 1), seed)]
        source.choose(runs.reshape(-1))
        kind = reader.kind.removesuffix("s") if runs.size == 1 else reader.kind
        described = f"{runs.size} {kind}" + (f" of {name}" if name else "") + reader.done
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
        is_held[spread(total, held, self._seed)] = True
        return self._part(~is_held), self._part(is_held)

    def _part(self, which: Array) -> "Samples":
        runs = self._runs[which]
        described = f"{runs.size} of {self.described}"
        return Samples(self._source, self._layout, runs, self._seed, described)

    def _key(self, run: int) -> Hashable:
        return self._source.key(int(self._runs[run, 0]))


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
