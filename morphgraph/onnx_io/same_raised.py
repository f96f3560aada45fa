"""Whether a model that was raised to a newer opset computes what it did.

The conversion is another program's, and what it gets wrong no later check could see: they all
compare with the raised model. So both are run once in ONNX Runtime, which still runs old opsets.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, Shape
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.runtime import random_inputs, run, run_each
from morphgraph.tolerances import REBUILT

_OPEN_SIZES = (32, 224, 1)  # to try for axes behind the first
_EQUAL_INTEGERS = 0.99  # share of them; of others rounding may decide, as in an ArgMax


def require_same(before: ir.Model, after: ir.Model) -> str:
    """Compare one run of both, on random inputs of the declared sizes.

    Args:
        before: the model as it was read.
        after: the same at a newer opset.

    Returns:
        Why nothing could be compared; empty where both compute the same.

    Raises:
        ModelError: a result differs, or the raised model alone does not run; names the output.
    """
    why = "its inputs state no number of axes"
    for shapes in _shapes(before):
        try:
            feeds = random_inputs(before, shapes=shapes)
            expected, again = run_each(before, [feeds, feeds])
        except (UnsupportedError, ModelError) as error:
            why = str(error)
            continue
        if any(_difference(expected[name], again[name]) > REBUILT for name in expected):
            return "it draws random numbers"
        _compare(expected, after, feeds)
        return ""
    return why


def _compare(expected: Arrays, after: ir.Model, feeds: Arrays) -> None:
    try:
        found = run(after, feeds)
    except UnsupportedError as error:
        raise ModelError(f"{_FAULT}: {error}; {_WAY_OUT}") from error
    for name, array in expected.items():
        difference = _difference(array, found[name])
        if not difference <= REBUILT:
            raise ModelError(
                f"{_FAULT}: output '{escape(name)}' differs by {difference:.1g} of its largest "
                f"value; {_WAY_OUT}"
            )


_FAULT = "onnx's version converter, which raises old opsets, makes another function of this model"
_WAY_OUT = "export again with a newer opset"


def _shapes(model: ir.Model) -> Iterator[dict[str, Shape]]:
    """Sizes of the inputs to try: the declared ones, and some where none is declared."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if any(value.shape is None for value in inputs):
        return
    tried: list[dict[str, Shape]] = []
    for size in _OPEN_SIZES:
        shapes = {
            value.name or "": tuple(
                axis if isinstance(axis, int) and axis > 0 else size if number else 1
                for number, axis in enumerate(value.shape or ())
            )
            for value in inputs
        }
        if shapes not in tried:
            tried.append(shapes)
            yield shapes


def _difference(expected: Array, found: Array) -> float:
    """The largest difference as a share of the largest magnitude; infinite of other shapes."""
    if expected.shape != found.shape:
        return np.inf
    if not np.issubdtype(expected.dtype, np.inexact):
        same = expected == found
        return 0.0 if same.sum() >= _EQUAL_INTEGERS * same.size else np.inf
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return np.inf
    gap = np.abs(expected[finite] - found[finite]).max(initial=0.0)
    return float(gap / max(np.abs(expected[finite]).max(initial=0.0), np.finfo(np.float32).tiny))
