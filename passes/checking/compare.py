"""One array of a resized model beside what the masked original gives for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Array, Flags
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
            too; and where the output itself is cut, how far positions are from those beside them.
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
    if not np.issubdtype(masked.dtype, np.number):  # flags and texts are the same or are not
        error = float(np.any(masked != resized))
        moved = max((float(np.mean(masked != other)) for other in references), default=0.0)
        return OutputError(name, error, 1.0, error, float(moved > 0), moved)
    expected = masked.astype(np.float64)
    finite = np.isfinite(expected)
    scale = largest(np.abs(expected), finite)
    error = largest(_distance(expected, resized), finite)
    unit = scale or 1.0
    changes = [_distance(expected, other) for other in references]
    change = max((largest(distance, finite) for distance in changes), default=0.0)
    moved = max((float((distance > RESIZED * unit).mean()) for distance in changes), default=0.0)
    told = float(finite.mean()) if expected.size else 1.0
    return OutputError(name, error, scale, error / unit, change / unit, moved, told)


def largest(array: Array, where: Flags) -> float:
    """The largest number of an array at some places, 0 where there is none."""
    return float(np.max(array, initial=0.0, where=where))


def _distance(expected: Array, other: Array) -> Array:
    """How far numbers are apart; infinitely far where only one is a number."""
    with np.errstate(invalid="ignore"):
        distance: Array = np.nan_to_num(np.abs(expected - other), nan=np.inf, posinf=np.inf)
    return distance


def kept(selection: AxisSelection, name: str, array: Array) -> Array:
    """The positions of a value that stay, axis by axis.

    Axes on which the masked original itself gathers them have no others any more.
    """
    for axis, positions in selection.cuts(name):
        if array.shape[axis] != len(positions):
            array = np.take(array, positions, axis=axis)
    return array
