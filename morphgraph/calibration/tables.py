"""Samples that are laid out in arrays, one for every input: held against the model, and read."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray, Shape
from morphgraph.calibration.layout import Layout
from morphgraph.calibration.rows import Rows
from morphgraph.errors import DataError, ModelError, UnsupportedError
from morphgraph.onnx_io import DEFAULT_KEY, dtype_of, escape, is_float
from morphgraph.onnx_io.inputs import described, misfit

_IMAGE_RANK = 4


@dataclass(frozen=True)
class Column:
    """What the samples have of one input.

    Attributes:
        value: the input.
        rows: the array; one part per sample along the batch axis, else along its first axis.
        axis: the batch axis of the input; none where a part is the input of a whole run.
        count: its parts.
    """

    value: ir.Value
    rows: Rows
    axis: int | None
    count: int

    def read(self, parts: Sequence[int], where: str) -> Array:
        """Some samples of the input, or its only part, in the type that the model takes.

        Raises:
            DataError: a number is none, or does not fit that type.
        """
        axis = self.axis or 0
        given = self.rows.take(axis, parts)
        target = dtype_of(self.value)
        with np.errstate(over="ignore", invalid="ignore"):
            array = given.astype(target, copy=False)
        wrong = ~np.isfinite(array) if is_float(self.value) else array != given
        if wrong.any():
            index = np.argwhere(wrong)[0]
            number = given[tuple(index)]
            index[axis] = parts[index[axis]]
            raise DataError(
                f"{where}input '{escape(self.value.name or '')}' is {number} at {index.tolist()}, "
                f"which is no finite number of {self.value.dtype}; leave that sample out or repair "
                "it"
            )
        return array if self.axis is not None else array[0]


class Table:
    """Samples whose inputs stand in one array each.

    Args:
        arrays: by the names of inputs.
        layout: of the model.
        where: what messages begin with.

    Raises:
        ModelError: an array has another shape or type than the input takes.
        DataError: the arrays have samples in different numbers.
    """

    def __init__(self, arrays: Mapping[str, Rows], layout: Layout, where: str) -> None:
        self.columns = {
            name: _column(rows, layout, layout.values[name], where) for name, rows in arrays.items()
        }
        self.where = where
        self._batch = layout.batch
        self.count = _count(self.columns, layout, where)

    def key(self, row: int) -> Hashable:
        """Equal for samples that can stand in one run, as far as this table knows."""
        return tuple(
            self._part(column, row) for column in self.columns.values() if column.axis is None
        )

    def choose(self, rows: IntArray) -> None:
        """Promise that no other samples will be asked for."""
        for column in self.columns.values():
            parts = np.array([self._part(column, row) for row in rows.tolist()], dtype=np.int64)
            column.rows.choose(column.axis or 0, parts)

    def read(self, rows: Sequence[int]) -> Arrays:
        """Samples of equal key, as inputs of one run."""
        found: Arrays = {}
        for name, column in self.columns.items():
            parts = [self._part(column, row) for row in rows]
            found[name] = column.read(parts if column.axis is not None else parts[:1], self.where)
        return found

    def _part(self, column: Column, row: int) -> int:
        """Which part of a column a sample reads; of one that has fewer, several read the same."""
        return row * column.count // self.count


def _count(columns: Mapping[str, Column], layout: Layout, where: str) -> int:
    """How many samples there are, in which all columns agree."""
    per_run = layout.batch
    counts = {
        name: column.count * (1 if column.axis is not None else per_run)
        for name, column in columns.items()
    }
    count = max(counts.values(), default=0)
    for name, column in columns.items():
        is_one_for_each = column.count == count
        if not is_one_for_each and counts[name] != count and column.count != 1:
            other = next(n for n, c in counts.items() if c == count)
            raise DataError(
                f"{where}input '{escape(name)}' has {counts[name]} samples, input "
                f"'{escape(other)}' {count}; give as many of each"
            )
    return count


def _column(rows: Rows, layout: Layout, value: ir.Value, where: str) -> Column:
    """An array as samples of an input."""
    _check_type(rows, value, where)
    given, sizes = rows.shape, list(value.shape or ())
    axis = layout.axes.get(value.name or "")
    if axis is None:
        if _fits(given, sizes):
            return Column(value, rows.reshaped((1, *given)), None, 1)
        if _fits(given[1:], sizes):
            return Column(value, rows, None, given[0])
        if several := _several(given, sizes):
            return Column(
                value, rows.reshaped((several, given[0] // several, *given[1:])), None, several
            )
        raise misfit(rows.dtype, given, value, where)
    if _fits(given, sizes, axis):
        return Column(value, rows, axis, given[axis])
    if len(given) == len(sizes) - 1 and _fits((*given[:axis], 1, *given[axis:]), sizes, axis):
        return Column(value, rows.reshaped((*given[:axis], 1, *given[axis:])), axis, 1)
    if not layout.is_open and _fits(given[1:], sizes):  # runs that are stacked
        lead = given[0] * layout.batch
        return Column(value, rows.reshaped((lead, *given[2:])), axis, lead)
    raise misfit(rows.dtype, given, value, where)


def _fits(given: Shape, sizes: Sequence[object], free: int | None = None) -> bool:
    """Whether an array has the sizes of an input, where these are fixed; one axis is free."""
    return len(given) == len(sizes) and all(
        axis == free or not isinstance(size, int) or size == present
        for axis, (present, size) in enumerate(zip(given, sizes, strict=True))
    )


def _several(given: Shape, sizes: Sequence[object]) -> int:
    """How many runs an array has the inputs of behind each other; 0 where it does not fit."""
    lead = sizes[0] if sizes else None
    if not isinstance(lead, int) or not lead or not _fits(given, sizes, 0):
        return 0
    return 0 if given[0] % lead else given[0] // lead


def _check_type(rows: Rows, value: ir.Value, where: str) -> None:
    """Refuse numbers of another kind than an input takes."""
    given, target = rows.dtype, dtype_of(value)
    if target == np.object_:
        raise UnsupportedError(
            f"input {described(value)}: networks that read text cannot be calibrated; cut off the "
            "part that makes numbers of it"
        )
    if not is_float(value):
        if not np.can_cast(given, target, "same_kind"):
            raise misfit(given, rows.shape, value, where)
        return
    if given.kind in "iub":
        words = "convert it with .astype('float32')"
        if len(rows.shape) >= _IMAGE_RANK - 1 and len(value.shape or ()) == _IMAGE_RANK:
            words = (
                "if these are pixels, give --mean and --std (in Python `images=`) or scale them as "
                f"the network was trained; else {words}"
            )
        raise ModelError(f"{misfit(given, rows.shape, value, where)}; {words}")
    if given.kind not in "fV" or (given.kind == "V" and given != target):
        raise misfit(given, rows.shape, value, where)


def defaults(layout: Layout, given: Mapping[str, Any]) -> Arrays:
    """The inputs that were not given, as they are by default."""
    return {
        name: value.meta[DEFAULT_KEY].numpy().astype(dtype_of(value))
        for name, value in layout.values.items()
        if name not in given and DEFAULT_KEY in value.meta
    }
