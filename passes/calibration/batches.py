"""Arrays of many samples, in memory as long as they are few, else in temporary files."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from morphgraph.arrays import Arrays

IN_MEMORY = 24 * 2**20
"""Bytes that one such sequence holds in memory; in the lockstep of two networks there are eight."""


class Batches:
    """Sets of arrays by name, one per batch of samples, written once and read many times.

    >>> kept = Batches()
    >>> kept.append({"x": np.zeros((2, 3))})
    >>> [{name: array.shape for name, array in each.items()} for each in kept]
    [{'x': (2, 3)}]
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self.room = in_memory
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.sets: list[Arrays | list[str]] = []

    def __len__(self) -> int:
        return len(self.sets)

    def append(self, arrays: Arrays) -> None:
        """Add the arrays of one batch."""
        plain = all(isinstance(array, np.ndarray) for array in arrays.values())
        size = sum(array.nbytes for array in arrays.values()) if plain else 0
        if size <= self.room or not plain:  # sequences and maps are small
            self.room -= size
            self.sets.append(dict(arrays))
            return
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="morphgraph-")
        for number, array in enumerate(arrays.values()):
            np.save(self._path(len(self.sets), number), array, allow_pickle=False)
        self.sets.append(list(arrays))

    def _path(self, place: int, number: int) -> Path:
        assert self.folder is not None
        return Path(self.folder.name) / f"{place}-{number}.npy"

    def __getitem__(self, place: int) -> Arrays:
        arrays = self.sets[place]
        if isinstance(arrays, dict):
            return arrays
        return {
            name: np.load(self._path(place, number), allow_pickle=False)
            for number, name in enumerate(arrays)
        }

    def __iter__(self) -> Iterator[Arrays]:
        return (self[place] for place in range(len(self.sets)))

    def close(self) -> None:
        """Drop all arrays, and the files."""
        self.sets.clear()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None
