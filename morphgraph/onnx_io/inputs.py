"""Arrays that a model is to be run on: read from files, and held against what it takes."""

import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import FileError, ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.keys import DEFAULT_KEY
from morphgraph.onnx_io.values import dtype_of

Inputs = Mapping[str, Array] | Sequence[Mapping[str, Array]]
"""Arrays by the names of inputs, or several such sets."""


def read_inputs(path: str | PathLike[str]) -> list[Arrays]:
    """Read sets of inputs.

    Args:
        path: an ``.npz`` file with one array per input, by its name; a folder of such files, one
            set each; or a folder of ``.npy`` files, one set, each named after its input.

    Raises:
        FileError: there is no such file, or it holds no arrays.
    """
    where = Path(path)
    if not where.is_dir():
        return [_read_npz(where)]
    if sets := sorted(where.glob("*.npz")):
        return [_read_npz(file) for file in sets]
    arrays = {file.stem: _read_npy(file) for file in sorted(where.glob("*.npy"))}
    if not arrays:
        raise FileError(
            f"{escape(str(where))}: holds neither .npz nor .npy files; save one with "
            "numpy.savez(FILE, NAME=array)"
        )
    return [arrays]


def _read_npz(path: Path) -> Arrays:
    where = escape(str(path))
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                return {name: found[name] for name in found.files}
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the path") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise FileError(f"{where}: not an .npz file of plain arrays: {error}") from error
    raise FileError(f"{where}: holds one array without a name; save it with numpy.savez(NAME=...)")


def _read_npy(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{escape(str(path))}: not an .npy file of plain numbers: {error}"
        ) from error
    return array


def fit_inputs(inputs: Inputs, model: ir.Model) -> list[Arrays]:
    """Sets of inputs, each complete and in the model's types.

    Raises:
        ModelError: an input is unknown or missing, or has another shape or kind of numbers.
    """
    sets = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not sets:
        raise ModelError("inputs is empty; give a dict of arrays, or a list of such dicts")
    fitted = []
    for index, arrays in enumerate(sets):
        where = "" if len(sets) == 1 else f"set {index} of inputs: "
        fitted.append(_fit(arrays, model, where))
    return fitted


def _fit(arrays: Mapping[str, Array], model: ir.Model, where: str) -> Arrays:
    values = {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}
    known = ", ".join(map(_described, values.values()))
    for name in arrays:
        if name not in values:
            raise ModelError(f"{where}the model has no input '{escape(name)}'; it takes {known}")
    fitted: Arrays = {}
    for name, value in values.items():
        default = value.meta.get(DEFAULT_KEY)
        if name not in arrays and default is None:
            raise ModelError(f"{where}input '{escape(name)}' is missing; the model takes {known}")
        array = np.asarray(arrays[name] if default is None or name in arrays else default.numpy())
        sizes = list(value.shape or ())
        fits = len(sizes) == array.ndim and all(
            not isinstance(size, int) or size == given
            for size, given in zip(sizes, array.shape, strict=True)
        )
        if not fits or not np.can_cast(array.dtype, dtype_of(value), "same_kind"):
            given = ",".join(map(str, array.shape))
            raise ModelError(
                f"{where}input '{escape(name)}' is {array.dtype} [{given}]; the model takes "
                f"{_described(value)}"
            )
        fitted[name] = array.astype(dtype_of(value))
    return fitted


def _described(value: ir.Value) -> str:
    """``'x' (FLOAT [batch,3,8,8])``."""
    sizes = ",".join(
        str(size) if isinstance(size, int) else escape(size.value or "?")
        for size in value.shape or ()
    )
    return f"'{escape(value.name or '')}' ({value.dtype} [{sizes}])"
