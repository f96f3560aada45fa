"""Where samples come from: files, folders, arrays, iterables."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays, IntArray
from morphgraph.calibration.decode import IMAGE_SUFFIXES
from morphgraph.calibration.feeds import feed_of, inputs_in, is_array
from morphgraph.calibration.folders import files_in, image_rows, no_samples
from morphgraph.calibration.images import (
    ImageInput,
    ImageOptions,
    PixelRows,
    image_input,
    stated,
    with_stated,
)
from morphgraph.calibration.layout import Layout
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.calibration.rows import MemoryRows, Rows, npy_rows, npz_rows, reading
from morphgraph.calibration.spool import Spool
from morphgraph.calibration.tables import Table
from morphgraph.calibration.text import TextOptions, is_text, sequences
from morphgraph.calibration.tokens import ids_input
from morphgraph.errors import ArgumentError, ModelError, warn
from morphgraph.onnx_io import escape, is_float
from morphgraph.onnx_io.fixed import fixed_values, without_fixed
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


class Reader:
    """Opens what a user gave.

    Attributes:
        kind: what its samples are called.
        done: in words, what is done to them.
    """

    def __init__(
        self,
        model: ir.Model,
        layout: Layout,
        options: ImageOptions,
        limit: int | None,
        seed: int,
        progress: Progress,
        text: TextOptions | None = None,
    ) -> None:
        self.kind = "samples"
        self.done = ""
        self._model = model
        self._layout = layout
        self._options = options
        self._limit = limit
        self._seed = seed
        self._text = text or TextOptions()
        self._progress = progress
        self._left_out = False  # whether it was said

    def _is_note(self, data: Any) -> bool:
        """Whether text in a folder is but a note on the rest: the model takes no ids."""
        is_folder = isinstance(data, str | PathLike) and Path(data).is_dir()
        return is_folder and ids_input(self._model) is None

    def open(self, data: Any) -> tuple[Source, str]:
        """The samples in what a user gave, and a name for it where it has one.

        Raises:
            MorphError: as of :meth:`Samples.of`.
        """
        source: Source
        if is_text(data, wanted=bool(self._text)) and (self._text or not self._is_note(data)):
            source = self._of_text(data)
            name = escape(str(data)) if isinstance(data, str | PathLike) else ""
        elif self._text:
            raise ArgumentError(
                "a tokenizer and a length are for text, and the data are none; give a .txt or "
                ".jsonl file, a folder of them or a list of strings, or leave these options out"
            )
        elif isinstance(data, str | PathLike):
            path = Path(data)
            source, name = self._of_path(path, f"{escape(str(path))}: "), escape(str(path))
        elif isinstance(data, Mapping) or is_array(data):
            source, name = self._of_arrays(self._feed(data, ""), ""), ""
        elif isinstance(data, Iterable) or hasattr(data, "__getitem__"):
            source, name = self._of_items(data), ""
        else:
            raise ArgumentError(
                f"data is of type {type(data).__name__}; give a path, arrays, or an iterable of "
                "arrays, dicts or tuples"
            )
        if self._options and not self.done:
            raise ArgumentError(
                "--size, --mean, --std and the like are for images, and the data are arrays of "
                "other numbers, which the model reads as they are; leave these options out"
            )
        return source, name

    def _of_path(self, path: Path, where: str) -> Source:
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            return self._of_images([path], where)
        if not path.is_dir():
            with reading(path), path.open("rb") as file:
                is_npy = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
            rows = (
                {self._only_input(where): npy_rows(path)}
                if is_npy
                else npz_rows(path, self._progress)
            )
            return self._of_rows(rows, where)
        if files := sorted(path.glob("*.npz")):
            return self._of_files(files, lambda file: npz_rows(file, no_progress))
        arrays = {file.stem: file for file in sorted(path.glob("*.npy"))}
        if arrays and set(self._layout.needed) <= arrays.keys():
            return self._of_rows({name: npy_rows(file) for name, file in arrays.items()}, where)
        if files := files_in(path, IMAGE_SUFFIXES):
            return self._of_images(files, where)
        if files := files_in(path, frozenset({".npy"})):
            name = self._only_input(where)
            return self._of_files(files, lambda file: {name: npy_rows(file)})
        raise no_samples(path)

    def _of_text(self, data: Any) -> Spool:
        """Sequences of text, coded once and kept in a temporary file."""
        spool = Spool()
        feeds, length = sequences(data, self._model, self._text, self._limit, self._seed)
        for feed in feeds:
            spool.add(self._of_arrays(feed, ""))
            self._progress("reading text", spool.count, self._limit or spool.count)
        self.kind, self.done = "sequences", f", {length} tokens each"
        return spool

    def _of_files(
        self, files: Sequence[Path], read: Callable[[Path], Mapping[str, Rows]]
    ) -> Source:
        """The samples of all files, or of some where there are more files than samples wanted."""
        spool = Spool()
        numbers = spread(len(files), self._limit or len(files), self._seed).tolist()
        for done, number in enumerate(numbers, 1):
            file = files[number]
            spool.add(self._of_rows(read(file), f"{escape(str(file))}: "))
            self._progress("reading files", done, len(numbers))
        return spool

    def _of_images(self, files: Sequence[Path], where: str) -> Source:
        numbers = spread(len(files), self._limit or len(files), self._seed).tolist()
        name = self._only_input(where)
        images = self._image_input(self._layout.values[name], where)
        rows = image_rows([files[number] for number in numbers], images, self._progress)
        self.kind = "images"
        return Table({name: rows}, self._layout, where)

    def _of_items(self, data: Any) -> Source:
        """Samples from an iterable, copied, for the next pass over it may give others.

        Of what can only be iterated, which may never end, the first are taken; where there are more
        items than samples wanted, and they can be indexed, some from everywhere.
        """
        spool = Spool()
        limit = self._limit
        is_indexed = _is_indexed(data)
        numbers = spread(len(data), limit or len(data), self._seed).tolist() if is_indexed else ()
        items = ((number, data[number]) for number in numbers) if is_indexed else enumerate(data)
        for number, item in items:
            where = f"sample {number} of the data: "
            spool.add(self._of_arrays(self._feed(item, where), where))
            self._progress("reading samples", spool.count, limit or len(numbers))
            if not is_indexed and limit is not None and spool.count >= limit:
                break
        return spool

    def _feed(self, item: Any, where: str) -> Arrays:
        """The inputs in a sample; says once what else is in it, and left out."""
        inputs, others = inputs_in(item, self._layout, fixed_values(self._model))
        if others and not self._left_out:
            self._left_out = True
            names = ", ".join(f"'{escape(name)}'" for name in others)
            verb = "is no input" if len(others) == 1 else "are no inputs"
            warn(f"{where}{names} {verb} of the model, and left out")
        return feed_of(inputs, self._layout, where)

    def _of_arrays(self, arrays: Arrays, where: str) -> Table:
        return self._of_rows({name: MemoryRows(array) for name, array in arrays.items()}, where)

    def _of_rows(self, arrays: Mapping[str, Rows], where: str) -> Table:
        arrays = without_fixed(arrays, self._model, where)
        check_names(arrays, self._model, where)
        values = self._layout.values
        fitted = {name: self._fitted(rows, values[name], where) for name, rows in arrays.items()}
        return Table(fitted, self._layout, where)

    def _fitted(self, rows: Rows, value: ir.Value, where: str) -> Rows:
        """An array as it is, or as the preprocessing of images makes it where it holds pixels."""
        is_image = rows.dtype == np.uint8 and is_float(value) and len(value.shape or ()) in (3, 4)
        if not is_image or not (self._options or stated(self._model)):
            return rows
        return PixelRows(rows, self._image_input(value, where), where)

    def _image_input(self, value: ir.Value, where: str) -> ImageInput:
        """What is done to images for an input; says it, and where it is known from."""
        found = stated(self._model)
        images = image_input(value, with_stated(self._options, found, value), where)
        if self._options and found:
            origin = "as given, and from the model's metadata"
        elif self._options:
            origin = "as given"
        elif found:
            origin = "from the model's metadata"
        else:
            origin = "assumed"
            warn(
                f"{where}nothing says what is done to images before the network reads them; they "
                f"are {images.described}; give --mean and --std if it was trained otherwise",
            )
        self.done = f", {images.described} ({origin})"
        return images

    def _only_input(self, where: str) -> str:
        """The input of a model that needs one."""
        needed = self._layout.needed
        if len(needed) != 1:
            names = ", ".join(f"'{escape(name)}'" for name in needed)
            raise ModelError(
                f"{where}holds the samples of one input, but the model takes {len(needed)}: "
                f"{names}; give an .npz file with an array for each, by these names"
            )
        return needed[0]


def _is_indexed(data: Any) -> bool:
    """Whether items can be had by their numbers; PyTorch's iterable datasets only look like it."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or not len(data):
        return False
    try:
        data[0]
    except (NotImplementedError, TypeError, KeyError):
        return False
    return True


def spread(total: int, count: int, seed: int) -> IntArray:
    """So many of a number of places, one at random from each of as many stretches of them.

    >>> spread(10, 3, seed=0).tolist()
    [2, 4, 8]
    """
    if count >= total:
        return np.arange(total)
    bounds = np.arange(count + 1) * total // count
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])
