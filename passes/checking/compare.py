"""One array of a resized model beside what the masked original gives for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphgraph.arrays import Array, Arrays, Flags
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.tolerances import RESIZED


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the resized model is from the masked original's.

    Attributes:
        name: of the output.
        max_abs: the largest error of a number.
        scale: the largest magnitude of the masked original's output.
        relative: ``max_abs`` as a share of ``scale``.
        sensitivity: how far masking moved the original's output, as a share of ``scale``. Near
            zero the output alone tells nothing: a wrong slice would go unnoticed in it. Where
            channels were absorbed, and masking may change nothing, masking those as well counts
            too, and where all that is removed was zero, masking others in its place; and where the
            output itself is cut, how far positions are from those beside them.
        moved: share of its numbers that masking moved beyond rounding. Where it is low, as behind a
            sigmoid that is 0 or 1 nearly everywhere, the output alone tells little.
        told: share of the numbers that were compared. Where the masked original gives infinity or
            what is not a number (0 / 0), nothing can be told.
        floor: how far rounding alone moves the masked original's output, as a share of ``scale``;
            ``None`` where that was not needed for the verdict.
    """

    name: str
    max_abs: float
    scale: float
    relative: float
    sensitivity: float
    moved: float = 0.0
    told: float = 1.0
    floor: float | None = None


def compare(
    name: str, masked: Array, resized: Array | None, references: Sequence[Array] = ()
) -> OutputError:
    """One array of the masked original beside the resized model's, of numbers, flags or texts.

    Args:
        name: of the output.
        masked: what the resized model must give.
        resized: what it gives, if anything.
        references: outputs of the models that the masked original is to differ from.
    """
    if resized is None or resized.shape != masked.shape:
        return OutputError(name, float("inf"), 0.0, float("inf"), 0.0)
    # What is listed or cut out by what is computed (the places of positive numbers) has as many
    # rows as there are: where masking changes how many, it moves all.
    resized_by_masking = any(other.shape != masked.shape for other in references)
    references = [other for other in references if other.shape == masked.shape]
    if not np.issubdtype(masked.dtype, np.number):  # flags and texts are the same or are not
        error = float(np.any(masked != resized))
        moved = max((_share(masked != other) for other in references), default=0.0)
        moved = 1.0 if resized_by_masking else moved
        return OutputError(name, error, 1.0, error, float(moved > 0), moved)
    expected, finite, scale = _numbers(masked)
    error = largest(_distance(expected, resized), finite)
    unit = scale or 1.0
    changes = [_distance(expected, other) for other in references]
    change = max((largest(distance, finite) for distance in changes), default=0.0)
    moved = max((_share(distance > RESIZED * unit) for distance in changes), default=0.0)
    told = 1.0 if finite is None else float(finite.mean())
    if resized_by_masking:
        change, moved = max(change, unit), 1.0
    return OutputError(name, error, scale, error / unit, change / unit, moved, told)


def _share(flags: Flags) -> float:
    return float(flags.mean()) if flags.size else 0.0


def as_arrays(results: Mapping[str, Any]) -> Arrays:
    """Results by name, with one name for each element of a sequence and each entry of a map.

    An optional value that is absent has no numbers.

    >>> as_arrays({"y": np.ones(1), "s": [np.ones(2), np.ones(3)], "none": None}).keys()
    dict_keys(['y', 's[0]', 's[1]', 'none'])
    """
    arrays: Arrays = {}
    for name, value in results.items():
        if isinstance(value, dict):
            arrays.update(as_arrays({f"{name}[{key}]": each for key, each in value.items()}))
        elif isinstance(value, list):
            arrays.update(as_arrays({f"{name}[{k}]": each for k, each in enumerate(value)}))
            if not value:
                arrays[name] = np.zeros(0, dtype=np.bool_)
        else:
            arrays[name] = np.zeros(0, dtype=np.bool_) if value is None else np.asarray(value)
    return arrays


def _numbers(masked: Array) -> tuple[Array, Flags | None, float]:
    """The numbers, where they are finite (``None``: everywhere), and their largest magnitude.

    Numbers of single precision stay as they are: differences of them are as exact as need be, and
    quicker, as long as they are not too large for it.
    """
    single = masked.dtype == np.float32
    magnitudes = np.abs(masked if single else masked.astype(np.float64))
    finite = None
    scale = float(np.max(magnitudes, initial=0.0))
    if not np.isfinite(scale):
        finite = np.isfinite(magnitudes)
        scale = largest(magnitudes, finite)
    is_fit = single and scale < _LARGEST_SINGLE
    return masked if is_fit else masked.astype(np.float64), finite, scale


_LARGEST_SINGLE = 1e38


def largest(array: Array, where: Flags | None) -> float:
    """The largest number of an array at some places or all, 0 where there is none."""
    if where is None:
        return float(np.max(array, initial=0.0))
    return float(np.max(array, initial=0.0, where=where))


def _distance(expected: Array, other: Array) -> Array:
    """How far numbers are apart; infinitely far where only one is a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance: Array = np.abs(expected - other)
    if np.isnan(np.max(distance, initial=0.0)):  # which is rare, and a look at each number is slow
        distance = np.where(np.isnan(distance), np.inf, distance)
    return distance


def kept(selection: AxisSelection, name: str, array: Array) -> Array:
    """The positions of a value that stay, axis by axis.

    Axes on which the masked original itself gathers them have no others any more.
    """
    for axis, positions in selection.cuts(name):
        if array.shape[axis] != len(positions):
            array = np.take(array, positions, axis=axis)
    return array
