"""What an iterable of samples hands out, as arrays by the names of inputs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from morphgraph.arrays import Array, Arrays
from morphgraph.calibration.layout import Layout
from morphgraph.errors import DataError, ModelError
from morphgraph.onnx_io import escape


def is_array(value: object) -> bool:
    """Whether a value is an array or a tensor of some library, or an image."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def as_array(value: Any, where: str) -> Array:
    """An array from an array, a tensor, or nested lists of numbers.

    Raises:
        DataError: it is nothing of the kind.
    """
    if hasattr(value, "detach"):  # a tensor of torch, on whatever device
        value = value.detach().cpu()
        try:
            return np.asarray(value.numpy())
        except TypeError:  # bfloat16, which numpy does not know
            return np.asarray(value.float().numpy())
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"{where}lists of different lengths are no array; give one array per sample"
        ) from error
    if found.dtype.kind in "OUSMm":
        kind = type(value).__name__
        raise DataError(f"{where}what is of type {kind} is no array of numbers; give arrays")
    return found


def inputs_in(item: Any, layout: Layout, fixed: Collection[str]) -> tuple[Any, list[str]]:
    """An item without what is no input, as labels, and the names of that where it has names.

    Of a dict that lacks an input all is left, so that errors name what it has.

    Args:
        item: as for :func:`feed_of`.
        layout: of the model.
        fixed: inputs that it is fixed to, which may be given.
    """
    if isinstance(item, Sequence) and item and isinstance(item[0], Mapping):  # and labels
        return inputs_in(item[0], layout, fixed)
    if not isinstance(item, Mapping) or not set(layout.needed) <= set(item):
        return item, []
    others = [name for name in item if name not in layout.values and name not in fixed]
    return {name: item[name] for name in item if name not in others}, list(map(str, others))


def feed_of(item: Any, layout: Layout, where: str) -> Arrays:
    """Arrays by the names of inputs, from a dict, an array, or a tuple in the inputs' order.

    Raises:
        ModelError: there are fewer arrays than inputs.
        DataError: something is no array.
    """
    if isinstance(item, Mapping):
        return {str(name): as_array(value, where) for name, value in item.items()}
    if isinstance(item, Sequence) and item and not _is_numbers(item, len(layout.needed)):
        if isinstance(item[0], Mapping):
            return feed_of(item[0], layout, where)
        return _in_order(item, layout, where)
    return _in_order([item], layout, where)


def _is_numbers(item: Sequence[Any], needed: int) -> bool:
    """Whether a sequence is an array written as numbers, or lists of them, and no row of inputs."""
    if isinstance(item[0], int | float):
        return True
    return needed == 1 and isinstance(item, list) and isinstance(item[0], list)


def _in_order(arrays: Sequence[Any], layout: Layout, where: str) -> Arrays:
    needed = layout.needed
    if len(arrays) < len(needed):
        names = ", ".join(f"'{escape(name)}'" for name in needed)
        count = "one array is" if len(arrays) == 1 else f"{len(arrays)} arrays are"
        raise ModelError(
            f"{where}{count} given, but the model takes {len(needed)} inputs: {names}; give dicts "
            "of arrays by these names"
        )
    return {name: as_array(value, where) for name, value in zip(needed, arrays)}
