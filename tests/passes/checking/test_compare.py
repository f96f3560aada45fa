"""Errors of arrays, beside the same formulas written out in double precision."""

import numpy as np
import pytest

from morphgraph.arrays import Array
from morphgraph.passes.checking.compare import compare
from morphgraph.tolerances import RESIZED

NORMAL = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def with_numbers(*numbers: float) -> Array:
    """Ordinary numbers with some others among them."""
    array = NORMAL.copy()
    array.flat[: len(numbers)] = numbers
    return array


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 5e37, 3e38], ids=str)
@pytest.mark.parametrize(
    "masked",
    [
        NORMAL,
        NORMAL.astype(np.float64),
        (10 * NORMAL).astype(np.int8),
        with_numbers(np.nan, 1.0),
        with_numbers(np.inf, -np.inf, np.nan),
        np.full((2, 2), np.nan, np.float32),
        np.zeros((0, 3), np.float32),
        np.float32(2.5).reshape(()),
    ],
    ids=["single", "double", "int8", "nan", "infinite", "nothing", "empty", "scalar"],
)
def test_errors_are_those_of_double_precision(masked: Array, scale: float) -> None:
    if np.issubdtype(masked.dtype, np.floating):
        top = np.abs(masked[np.isfinite(masked)]).max(initial=0.0) or 1.0
        with np.errstate(invalid="ignore"):
            masked = np.asarray(masked / top * scale, masked.dtype)
    resized = np.asarray(
        np.negative(masked)
    )  # the differences of the largest overflow in single precision
    other = np.roll(masked, 1)
    found = compare("y", masked, resized, [other])

    with np.errstate(invalid="ignore"):
        wide = masked.astype(np.float64)
        finite = np.isfinite(wide)
        error, change = (np.abs(wide - array.astype(np.float64)) for array in (resized, other))
    change = np.where(np.isnan(change), np.inf, change)
    largest = np.abs(wide[finite]).max(initial=0.0)
    unit = largest or 1.0
    assert found.scale == pytest.approx(largest)
    assert found.max_abs == pytest.approx(error[finite].max(initial=0.0))
    assert found.relative == pytest.approx(error[finite].max(initial=0.0) / unit)
    assert found.sensitivity == pytest.approx(change[finite].max(initial=0.0) / unit)
    assert found.told == (finite.mean() if finite.size else 1.0)
    assert found.moved == ((change > RESIZED * unit).mean() if finite.size else 0.0)
