"""Inputs that are fixed to a value: what values fit, how a file notes them, what feeds may hold.

A model whose inputs are fixed does not take them any more. Its metadata say which values it holds
for, as JSON: ``{"use_cache_branch": true, "sr": 16000}``.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.keys import FIXED_KEY, UNFIXED_KEY
from morphgraph.words import did_you_mean

Fixed = Mapping[str, Any]
"""By the names of inputs the values that they are fixed to: numbers, flags, or arrays of them."""

_MOST = 4096  # numbers of a value; more are weights, and belong into the file as an initializer
_SHOWN = 16
_KINDS = "biuf"  # of NumPy: flags, whole numbers and real ones
_Given = TypeVar("_Given")


def fixed_values(model: ir.Model) -> dict[str, Any]:
    """The values that a model holds for, by input: numbers, flags, or lists of them.

    What a file says there and this program has not written is passed over.

    >>> fixed_values(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10))
    {}
    """
    try:
        noted = json.loads(model.metadata_props.get(FIXED_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(noted, dict):
        return {}
    found = {name: _array(value) for name, value in noted.items()}
    return {
        name: noted[name]
        for name, array in found.items()
        if array is not None and array.dtype.kind in _KINDS and 0 < array.size <= _MOST
    }


def note_fixed(model: ir.Model, values: Mapping[str, Array]) -> None:
    """Note in a model's metadata which values it holds for, beside those that stand there."""
    noted = fixed_values(model) | {name: plain(array) for name, array in values.items()}
    model.metadata_props[FIXED_KEY] = json.dumps(noted)


def plain(array: Array) -> Any:
    """A value as JSON has it: one number where there is one, else nested lists.

    >>> plain(np.array([True])), plain(np.array(0.1, np.float32)), plain(np.array([8, 6]))
    (True, 0.1, [8, 6])
    """
    if array.dtype.kind not in "biu":  # the shortest text that gives the same number again
        texts = [float(str(number)) for number in array.reshape(-1)]
        array = np.array(texts, np.float64).reshape(array.shape)
    return array.item() if array.size == 1 else array.tolist()


def fixed_words(values: Fixed) -> list[str]:
    """Values as the command line takes them.

    >>> fixed_words({"use_cache_branch": True, "sizes": [8, 6]})
    ['use_cache_branch=true', 'sizes=8,6']
    """
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    array = np.asarray(value)
    numbers = array.reshape(-1).tolist()
    return ",".join(str(n).lower() if isinstance(n, bool) else str(n) for n in numbers)


def _short(value: Any) -> str:
    text = _text(value)
    return escape(text if text.count(",") < _SHOWN else ",".join(text.split(",")[:_SHOWN]) + ",...")


def fixed_arrays(model: ir.Model, fixed: Fixed) -> Arrays:
    """The arrays that inputs of a model are fixed to, in the types and shapes that it takes.

    Inputs that the model holds for already, and for the same values, are left out.

    Raises:
        ModelError: there is no such input, it takes something else, or is fixed to another value.
        UnsupportedError: the input is no tensor of numbers, or the value has too many.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    known, found = fixed_values(model), {}
    for name, given in fixed.items():
        if name in inputs:
            found[name] = _fitting(inputs[name], given, model)
        elif name not in known:
            named = ", ".join(map(escape, inputs)) or "none"
            raise ModelError(
                f"input '{escape(name)}': the model has no such input to be fixed; its inputs are "
                f"{named}{did_you_mean(name, inputs)}"
            )
        elif not _is_same(_array(given), known[name]):
            raise ModelError(
                f"input '{escape(name)}': the model was made for "
                f"{escape(name)}={_short(known[name])} and takes it no more, so that it cannot be "
                f"fixed to {_short(given)}; give the file that it was made of"
            )
    if found and len(found) == len(inputs):
        raise ModelError(
            f"inputs {', '.join(map(escape, found))}: all inputs would be fixed, so that nothing "
            "is left for the network to compute; leave one out"
        )
    return found


def without_fixed(given: Mapping[str, _Given], model: ir.Model, where: str) -> dict[str, _Given]:
    """What is given for inputs, without those that the model is fixed to, which must be the same.

    Args:
        given: by input an array, or rows of one that can be taken.
        model: what it is given to.
        where: begins an error.

    Raises:
        ModelError: a value is not the one that the model is fixed to.
    """
    fixed = fixed_values(model)
    takes = {value.name for value in model.graph.inputs}
    found: dict[str, _Given] = {}
    for name, rows in given.items():
        if name in takes or name not in fixed:
            found[name] = rows
            continue
        array = _taken(rows)
        if not _is_same(array, fixed[name]):
            raise ModelError(
                f"{where}input '{escape(name)}' is {_short(array.reshape(-1)[: _SHOWN + 1])}, and "
                f"the model is fixed to {escape(name)}={_short(fixed[name])}; leave it out, or fix "
                "the input to what these samples are for"
            )
    return found


def _taken(rows: Any) -> Array:
    """All numbers of an array, or of rows that are read from a file."""
    if not hasattr(rows, "take") or isinstance(rows, np.ndarray | np.generic):
        return np.asarray(rows)
    count = math.prod(rows.shape)
    array: Array = rows.reshaped((count,)).take(0, range(count)).reshape(rows.shape)
    return array


def _is_same(array: Array | None, value: Any) -> bool:
    """Whether an array holds a value, once or once for each of several samples."""
    if array is None or array.dtype.kind not in _KINDS or not array.size:
        return False
    wanted = np.asarray(value)
    if wanted.ndim == 0:
        return bool((_rounded(array) == wanted).all())
    if array.size % wanted.size:
        return False
    numbers = _rounded(array).reshape(-1, wanted.size)
    return bool((numbers == wanted.reshape(-1)).all())


def _rounded(array: Array) -> Array:
    """Numbers as :func:`plain` writes them."""
    return array if array.dtype.kind in "biu" else np.asarray(plain(array)).reshape(array.shape)


def _array(given: Any) -> Array | None:
    """What is given as an array; ``None``: it is none."""
    try:
        return np.asarray(given)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None


def _fitting(value: ir.Value, given: Any, model: ir.Model) -> Array:
    """A value in the type and shape of an input."""
    name = escape(value.name or "")
    where = f"input '{name}' cannot be fixed"
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
        kind = "text" if value.dtype == ir.DataType.STRING else "no tensor"
        raise UnsupportedError(f"{where}: it is {kind}; inputs of numbers and flags can be fixed")
    array = _array(given)
    if array is None or array.dtype.kind not in _KINDS or not array.size:
        raise ModelError(
            f"{where} to {escape(repr(given))}, which is no number; write {name}="
            f"{'true' if value.dtype == ir.DataType.BOOL else '1'}"
        )
    if array.size > _MOST:
        raise UnsupportedError(
            f"{where}: {array.size} numbers are more than {_MOST}, which are weights and no "
            "setting; make it an initializer of the file"
        )
    return _shaped(_typed(array, value, where), value, model, where)


def _typed(array: Array, value: ir.Value, where: str) -> Array:
    """Numbers in the type that an input takes."""
    assert value.dtype is not None
    target = value.dtype.numpy()
    what = "true or false"
    if value.dtype == ir.DataType.BOOL:
        fits = bool(np.isin(array, (0, 1)).all())
    elif value.dtype.is_integer():
        what = f"whole numbers ({value.dtype})"
        with np.errstate(invalid="ignore", over="ignore"):
            fits = array.dtype.kind != "b" and bool((array.astype(target) == array).all())
    else:
        what = f"finite numbers ({value.dtype})"
        with np.errstate(over="ignore"):
            fits = array.dtype.kind != "b" and bool(np.isfinite(array.astype(target)).all())
    if not fits:
        raise ModelError(f"{where} to {_short(array)}: it takes {what}")
    return array.astype(target)


def _shaped(array: Array, value: ir.Value, model: ir.Model, where: str) -> Array:
    """Numbers in the shape that an input takes; a single number fills one place."""
    if value.shape is None:
        return array
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if len(sizes) == array.ndim and all(
        size in (None, 0, given) for size, given in zip(sizes, array.shape, strict=True)
    ):
        return array
    declared = "x".join(
        str(size) if isinstance(size, int) else escape(size.value or "?") for size in value.shape
    )
    if array.size == 1 and all(size in (None, 0, 1) for size in sizes):
        shared = _shared_size(value, model)
        if shared is not None:
            raise ModelError(
                f"{where} to one number: its shape is {declared}, and '{escape(shared)}' is a size "
                "of other inputs, too; give the numbers of all its places as an array (fixed=...)"
            )
        return array.reshape([1] * len(sizes))
    whole = [size for size in sizes if size is not None]
    if array.ndim < 2 and len(whole) == len(sizes) and array.size == math.prod(whole):
        return array.reshape(whole)
    given = "x".join(map(str, array.shape)) or "one number"
    raise ModelError(
        f"{where} to {_short(array)}: that is {given}, and its shape is {declared or 'scalar'}; "
        "give a number for every place, with commas between them"
    )


def _shared_size(value: ir.Value, model: ir.Model) -> str | None:
    """An open size of an input that others have as well."""
    names = {size.value for size in value.shape or () if isinstance(size, ir.SymbolicDim)} - {None}
    for other in model.graph.inputs:
        for size in () if other is value else other.shape or ():
            if isinstance(size, ir.SymbolicDim) and size.value in names:
                return size.value
    return None


def unfixed(model: ir.Model) -> ir.Model | None:
    """The model before its inputs were fixed; ``None`` where it is not known, or no more the same.

    Who gives the fixed model other weights has another network.
    """
    source: ir.Model | None = model.meta.get(UNFIXED_KEY)
    if source is None:
        return None
    before, fixed = source.graph.initializers, fixed_values(model)
    is_same = all(
        before[name].const_value is value.const_value
        for name, value in model.graph.initializers.items()
        if name in before and name not in fixed
    )
    return source if is_same else None


def values_for(source: ir.Model, model: ir.Model) -> Arrays:
    """What a model before its inputs were fixed is given for them."""
    fixed = fixed_values(model)
    names = [value.name for value in source.graph.inputs]
    return fixed_arrays(source, {name: v for name, v in fixed.items() if name in names})
