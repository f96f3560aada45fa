"""Inputs for a model, and indices, from files."""

import json
import os
import re
import zipfile
from os import PathLike
from pathlib import Path

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays
from morphgraph.errors import FileError, UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.values import dtype_of, static_shape


def load_indices(path: str | PathLike[str]) -> list[int]:
    """Whole numbers from a file: one on each line, a JSON array of them, or an ``.npy`` array.

    Raises:
        FileError: the file cannot be read, or holds something else.
    """
    where = escape(os.fspath(path))
    try:
        if Path(path).suffix == ".npy":
            numbers = np.load(path, allow_pickle=False).ravel().tolist()
        else:
            text = Path(path).read_text(encoding="utf-8").strip()
            if not text.startswith("["):
                text = "[" + re.sub(r"\s+", ",", text) + "]"
            numbers = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{where}: cannot be read as a list of ids: {error}") from None
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise FileError(
            f"{where}: is no list of ids; write one whole number on each line, a JSON array or .npy"
        )
    return list(numbers)


def load_feeds(path: str | PathLike[str], model: ir.Model) -> list[Arrays]:
    """What a model reads, from an ``.npz`` file with an array per input, by its name.

    Arrays may hold several samples: where the first axis is a multiple of the model's, they are
    cut into as many runs.

    Raises:
        FileError: the file cannot be read, or is no ``.npz`` file.
        UnsupportedError: an input has no array, or one of another shape or type.
    """
    where = escape(os.fspath(path))
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: np.asarray(data[name]) for name in data.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise FileError(f"{where}: is no .npz file ({error}); write one by numpy.savez") from None
    runs: dict[str, int] = {}
    for value in model.graph.inputs:
        name, shape = value.name or "", static_shape(value)
        if name not in arrays:
            raise UnsupportedError(
                f"{where}: has no array '{escape(name)}'; it has {', '.join(map(escape, arrays))}"
            )
        array, lead = arrays[name], shape[0] if shape else 1
        alike = array.shape == shape or (shape and lead and array.shape[1:] == shape[1:])
        if not alike or array.ndim != len(shape) or (shape and array.shape[0] % lead):
            raise UnsupportedError(
                f"{where}: '{escape(name)}' has shape {array.shape}, the model reads {shape}"
            )
        if not np.can_cast(array.dtype, dtype_of(value), "same_kind"):
            raise UnsupportedError(
                f"{where}: '{escape(name)}' holds {array.dtype}, the model reads {dtype_of(value)}"
            )
        arrays[name] = array.astype(dtype_of(value))
        runs[name] = array.shape[0] // lead if shape else 1
    count = max(runs.values(), default=1)
    if any(each not in (1, count) for each in runs.values()) or count == 0:
        raise UnsupportedError(
            f"{where}: inputs have samples for {sorted(set(runs.values()))} runs; give as many of "
            "each"
        )

    def part(name: str, number: int) -> Arrays:
        array = arrays[name]
        if runs[name] == 1:
            return {name: array}
        lead = len(array) // count
        return {name: array[number * lead : (number + 1) * lead]}

    return [{k: v for name in runs for k, v in part(name, n).items()} for n in range(count)]
