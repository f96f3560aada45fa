"""Samples that can be read once only, kept in a temporary file."""

import hashlib
from array import array
from collections.abc import Hashable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from morphgraph.arrays import Array, Arrays, IntArray, Shape
from morphgraph.calibration.rows import Scratch, read_fully
from morphgraph.calibration.tables import Table

_CHUNK = 32  # samples that are copied at once


class _Part(NamedTuple):
    """What a sample has of one input.

    Attributes:
        name: of the input.
        axis: its batch axis; none of an input that belongs to the run as a whole.
        shape, dtype: of what the sample has.
        offset: where an input of a whole run stands in the file.
    """

    name: str
    axis: int | None
    shape: Shape
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


class Spool:
    """Samples of any shapes. Of a sample, the inputs stand behind each other in the file."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._end = 0
        self._kinds: dict[tuple[_Part, ...], int] = {}  # what samples may be like, numbered
        self._kind_of = array("q")  # by sample
        self._offset = array("q")  # by sample
        self._wholes: dict[bytes, int] = {}  # where inputs of whole runs stand, by their hash

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._offset)

    def add(self, table: Table) -> None:
        """Copy the samples of a table."""
        start = 0
        while start < table.count:
            key, stop = table.key(start), start + 1
            while stop < min(table.count, start + _CHUNK) and table.key(stop) == key:
                stop += 1
            self._add(table, table.read(range(start, stop)), stop - start)
            start = stop

    def _add(self, table: Table, arrays: Arrays, count: int) -> None:
        parts: list[_Part] = []
        by_sample: list[Array] = []
        for name, found in arrays.items():
            axis = table.columns[name].axis
            if axis is None:
                parts.append(_Part(name, None, found.shape, found.dtype, self._whole(found)))
                continue
            shape = (*found.shape[:axis], 1, *found.shape[axis + 1 :])
            parts.append(_Part(name, axis, shape, found.dtype, 0))
            samples = np.broadcast_to(found, (*shape[:axis], count, *shape[axis + 1 :]))
            by_sample.append(np.moveaxis(samples, axis, 0))
        kind = self._kinds.setdefault(tuple(parts), len(self._kinds))
        for number in range(count):
            self._kind_of.append(kind)
            self._offset.append(self._end)
            for samples in by_sample:
                self._write(samples[number].tobytes())

    def _whole(self, found: Array) -> int:
        """Where an input of a whole run stands; equal ones stand there once."""
        content = found.tobytes()
        digest = hashlib.blake2b(content).digest()
        if digest not in self._wholes:
            self._wholes[digest] = self._end
            self._write(content)
        return self._wholes[digest]

    def _write(self, content: bytes) -> None:
        self._scratch.file.seek(self._end)
        self._scratch.file.write(content)
        self._end += len(content)

    def key(self, row: int) -> Hashable:
        """Equal for samples that can stand in one run."""
        return self._kind_of[row]

    def choose(self, rows: IntArray) -> None:
        """Do nothing: all samples are in the file."""

    def read(self, rows: Sequence[int]) -> Arrays:
        """Samples of equal key, as inputs of one run."""
        kind = list(self._kinds)[self._kind_of[rows[0]]]
        found: dict[str, list[Array]] = {part.name: [] for part in kind}
        for row in rows:
            offset = self._offset[row]
            for part in kind:
                if part.axis is not None:
                    found[part.name].append(self._read(part, offset))
                    offset += part.nbytes
        return {
            part.name: self._read(part, part.offset)
            if part.axis is None
            else np.concatenate(found[part.name], part.axis)
            for part in kind
        }

    def _read(self, part: _Part, offset: int) -> Array:
        array = np.empty(part.nbytes, np.uint8)
        self._scratch.file.seek(offset)
        read_fully(self._scratch.file, array.data)
        return array.view(part.dtype).reshape(part.shape)
