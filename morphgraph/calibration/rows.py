"""Arrays of which some rows are read at a time: in memory, in a file, packed in a zip.

What is read from files is read and not mapped: mapped pages would count as the program's memory.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.calibration.progress import Progress
from morphgraph.errors import DataError, FileError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.npy import UNREADABLE, Header, headers, read_header
from morphgraph.onnx_io.reading import require_ordinary

_MEGABYTE = 10**6
_BLOCK = 2**20  # bytes that pass at a time where a zip is unpacked


class Scratch:
    """A temporary file without a name: it is gone when nobody holds it or the program ends."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="morphgraph-")  # noqa: SIM115  # closed below

    def __del__(self) -> None:
        self.file.close()


class Rows(Protocol):
    """An array, some of whose rows can be asked for."""

    @property
    def shape(self) -> Shape:
        """The sizes of the whole array."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its numbers."""

    def reshaped(self, shape: Shape) -> "Rows":
        """The same numbers in another shape."""

    def choose(self, axis: int, indices: IntArray) -> None:
        """Promise that no other rows along this axis will be asked for."""

    def take(self, axis: int, indices: Sequence[int]) -> Array:
        """Some rows along an axis."""


@dataclass(frozen=True)
class MemoryRows:
    """Rows of an array in memory."""

    array: Array

    @property
    def shape(self) -> Shape:
        """The sizes of the whole array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its numbers."""
        return self.array.dtype

    def reshaped(self, shape: Shape) -> "MemoryRows":
        """The same numbers in another shape."""
        return MemoryRows(self.array.reshape(shape))

    def choose(self, axis: int, indices: IntArray) -> None:
        """Do nothing: all rows are there."""

    def take(self, axis: int, indices: Sequence[int]) -> Array:
        """Some rows along an axis."""
        return np.take(self.array, indices, axis)


@dataclass(frozen=True)
class FileRows:
    """Rows of an array that stands in a file.

    Attributes:
        file: its path, or a temporary file.
        offset: bytes before the array.
        shape, dtype: of the whole array.
        columns: whether its first axis runs fastest (Fortran's order).
    """

    file: Path | Scratch
    offset: int
    shape: Shape
    dtype: np.dtype[Any]
    columns: bool = False

    def reshaped(self, shape: Shape) -> Rows:
        """The same numbers in another shape."""
        if self.columns:
            return MemoryRows(np.array(self._mapped()).reshape(shape))
        return replace(self, shape=shape)

    def choose(self, axis: int, indices: IntArray) -> None:
        """Do nothing: all rows are there."""

    def take(self, axis: int, indices: Sequence[int]) -> Array:
        """Some rows along an axis."""
        if axis or self.columns:
            return np.take(self._mapped(), indices, axis)
        if isinstance(self.file, Path):
            with reading(self.file), self.file.open("rb") as file:
                return self._read(file, indices)
        return self._read(self.file.file, indices)

    def _read(self, file: IO[bytes], indices: Sequence[int]) -> Array:
        result = np.empty((len(indices), *self.shape[1:]), self.dtype)
        size = prod(self.shape[1:]) * self.dtype.itemsize
        target = result.view(np.uint8).reshape(-1).data if result.size else memoryview(b"")
        for place, (first, count) in _runs(indices):
            file.seek(self.offset + first * size)
            read_fully(file, target[place * size : (place + count) * size])
        return result

    def _mapped(self) -> Array:
        order: Any = "F" if self.columns else "C"
        file: Any = self.file if isinstance(self.file, Path) else self.file.file
        return np.memmap(file, self.dtype, "r", self.offset, self.shape, order)


def read_fully(file: IO[bytes], target: memoryview) -> None:
    """Fill a buffer from a file.

    Raises:
        EOFError: the file ends before.
    """
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]  # binary files have it
        if not count:
            raise EOFError("it is cut short")
        target = target[count:]


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Neighbours that are read at once: a place among the indices, the first index, how many."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield start, (indices[start], place - start)
            start = place


class PackedRows:
    """Rows of an array that is compressed in a zip; they are unpacked to a temporary file.

    Those that were chosen before the first is asked for, else all of them.
    """

    def __init__(
        self, path: Path, member: str, header: Header, shape: Shape, progress: Progress
    ) -> None:
        self.path, self.member, self.header, self.shape = path, member, header, shape
        self._progress = progress
        self._unpacked: FileRows | None = None
        self._places: IntArray | None = None  # index of every row in the temporary file

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its numbers."""
        return self.header.dtype

    def reshaped(self, shape: Shape) -> Rows:
        """The same numbers in another shape."""
        if self.header.columns:
            self._unpack(None)
            assert self._unpacked is not None
            return self._unpacked.reshaped(shape)
        return PackedRows(self.path, self.member, self.header, shape, self._progress)

    def choose(self, axis: int, indices: IntArray) -> None:
        """Unpack these rows."""
        if self._unpacked is not None:
            return
        by_row = axis == 0 and not self.header.columns and len(indices) < self.shape[0]
        self._unpack(np.unique(indices) if by_row else None)

    def take(self, axis: int, indices: Sequence[int]) -> Array:
        """Some rows along an axis."""
        if self._unpacked is None:
            self._unpack(None)
        assert self._unpacked is not None
        if self._places is not None:
            indices = np.searchsorted(self._places, indices).tolist()
        return self._unpacked.take(axis, indices)

    def _unpack(self, places: IntArray | None) -> None:
        scratch = Scratch()
        file = scratch.file
        shape = self.shape if places is None else (len(places), *self.shape[1:])
        with (
            reading(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.member) as packed,
        ):
            packed.read(self.header.offset)
            if places is None:
                self._pass(packed, 0, self.header.nbytes, file)
            else:
                self._copy(packed, file, places)
        file.flush()
        self._places = places
        self._unpacked = FileRows(scratch, 0, shape, self.dtype, self.header.columns)

    def _copy(self, packed: IO[bytes], file: IO[bytes], places: IntArray) -> None:
        size = prod(self.shape[1:]) * self.dtype.itemsize
        at = 0
        for place in places.tolist():
            self._pass(packed, at, place * size)
            at = (place + 1) * size
            self._pass(packed, place * size, at, file)

    def _pass(
        self, packed: IO[bytes], start: int, stop: int, file: IO[bytes] | None = None
    ) -> None:
        """Read the numbers from one byte to another, into a file or to skip them."""
        while start < stop:
            block = packed.read(min(stop - start, _BLOCK))
            if not block:
                raise EOFError("it is cut short")
            start += len(block)
            if file is not None:
                file.write(block)
            done, total = (count // _MEGABYTE for count in (start, self.header.nbytes))
            if total:
                self._progress(f"unpacking {escape(self.member)} (MB)", done, total)


def npy_rows(path: Path) -> FileRows:
    """The array of an ``.npy`` file.

    Raises:
        FileError: it cannot be read.
        DataError: it is no such file, or is cut short.
    """
    with reading(path), path.open("rb") as file:
        header = read_header(file)
        present = file.seek(0, os.SEEK_END) - header.offset
        if present < header.nbytes:
            raise ValueError(f"its numbers take {header.nbytes} bytes, {present} are there")
    return FileRows(path, header.offset, header.shape, header.dtype, header.columns)


def npz_rows(path: Path, progress: Progress) -> dict[str, Rows]:
    """The arrays of an ``.npz`` file by name; none of their numbers is read.

    Args:
        path: the file.
        progress: is told how much is unpacked, where numbers are asked for that are compressed.

    Raises:
        FileError: it cannot be read.
        DataError: it is no such file, is damaged, or holds something else than arrays.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        found: dict[str, Rows] = {}
        for info, header in headers(archive):
            name = info.filename.removesuffix(".npy")
            if info.compress_type == zipfile.ZIP_STORED:
                offset = _data_offset(path, info) + header.offset
                found[name] = FileRows(path, offset, header.shape, header.dtype, header.columns)
            else:
                found[name] = PackedRows(path, info.filename, header, header.shape, progress)
    return found


_LOCAL_HEADER_BYTES = 30
_LENGTHS_AT = 26  # in it: how long the name and the extra field are that follow


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the content of a member begins; its own header may be longer than the directory's."""
    with path.open("rb") as file:
        file.seek(info.header_offset + _LENGTHS_AT)
        lengths = np.frombuffer(file.read(_LOCAL_HEADER_BYTES - _LENGTHS_AT), "<u2")
    return info.header_offset + _LOCAL_HEADER_BYTES + int(lengths.sum())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read names the file, and says what to do."""
    where = escape(str(path))
    try:
        require_ordinary(path)
        yield
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the path") from error
    except UNREADABLE as error:
        words = escape(str(error))
        raise DataError(
            f"{where}: cannot be read as arrays ({words}); save it with numpy.savez(FILE, "
            "NAME=array), or one array with numpy.save"
        ) from error
