"""Arrays that a model is to be run on: read from files, and held against what it takes.

And indices, from files.
"""

import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import FileError, ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.fixed import without_fixed
from morphgraph.onnx_io.keys import DEFAULT_KEY
from morphgraph.onnx_io.npy import UNREADABLE, check_memory
from morphgraph.onnx_io.reading import read_bounded, require_ordinary
from morphgraph.onnx_io.values import dtype_of

Inputs = Mapping[str, Array] | Sequence[Mapping[str, Array]]
"""Arrays by the names of inputs, or several such sets."""


class FileArrays(dict[str, Array]):
    """A set of inputs that came from a file or folder, which errors name.

    Attributes:
        source: its path.
    """

    def __init__(self, arrays: Mapping[str, Array], source: Path) -> None:
        super().__init__(arrays)
        self.source = source


def read_inputs(path: str | PathLike[str]) -> list[FileArrays]:
    """Read sets of inputs.

    Args:
        path: an ``.npz`` file with one array per input, by its name; a folder of such files, one
            set each; or a folder of ``.npy`` files, one set, each named after its input.

    Raises:
        FileError: there is no such file, or it holds no arrays.
    """
    where = Path(path)
    if not where.is_dir():
        return [FileArrays(_read_npz(where), where)]
    if sets := sorted(where.glob("*.npz")):
        return [FileArrays(_read_npz(file), file) for file in sets]
    arrays = {file.stem: _read_npy(file) for file in sorted(where.glob("*.npy"))}
    if not arrays:
        raise FileError(
            f"{escape(str(where))}: holds neither .npz nor .npy files; save one with "
            "numpy.savez(FILE, NAME=array)"
        )
    return [FileArrays(arrays, where)]


def _read_npz(path: Path) -> Arrays:
    where = escape(str(path))
    try:
        require_ordinary(path)
        check_memory(path)
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                return {name: found[name] for name in found.files}
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the path") from error
    except UNREADABLE as error:
        raise FileError(
            f"{where}: not an .npz file of plain arrays ({escape(str(error))}); save it with "
            "numpy.savez(FILE, NAME=array)"
        ) from error
    raise FileError(f"{where}: holds one array without a name; save it with numpy.savez(NAME=...)")


def _read_npy(path: Path) -> Array:
    where = escape(str(path))
    try:
        require_ordinary(path)
        check_memory(path)
        array: Array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the path") from error
    except UNREADABLE as error:
        raise FileError(
            f"{where}: not an .npy file of plain numbers ({escape(str(error))}); save it with "
            "numpy.save(FILE, array)"
        ) from error
    return array


def fit_inputs(inputs: Inputs, model: ir.Model) -> list[Arrays]:
    """Sets of inputs, each complete and in the model's types, one for every run.

    Arrays may hold several samples: where the first axis is a multiple of the model's, they are cut
    into as many sets.

    Raises:
        ModelError: an input is unknown or missing, or has another shape or kind of numbers.
    """
    sets = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not sets:
        raise ModelError("inputs is empty; give a dict of arrays, or a list of such dicts")
    fitted: list[Arrays] = []
    for index, arrays in enumerate(sets):
        where = "" if len(sets) == 1 else f"set {index} of inputs: "
        if isinstance(arrays, FileArrays):
            where = f"{escape(str(arrays.source))}: "
        fitted.extend(_fit(arrays, model, where))
    return fitted


def takes(model: ir.Model) -> dict[str, ir.Value]:
    """By name, the inputs that arrays may be given for: not weights that are listed as inputs."""
    return {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}


def check_names(names: Collection[str], model: ir.Model, where: str = "") -> None:
    """Refuse names of arrays of which one is no input, or that leave one out without a default.

    Raises:
        ModelError: begins with ``where``.
    """
    values = takes(model)
    known = ", ".join(map(described, values.values())) or "none"
    for name in names:
        if name not in values:
            raise ModelError(f"{where}the model has no input '{escape(name)}'; it takes {known}")
    for name, value in values.items():
        if name not in names and DEFAULT_KEY not in value.meta:
            raise ModelError(f"{where}input '{escape(name)}' is missing; the model takes {known}")


def misfit(dtype: object, shape: Sequence[int], value: ir.Value, where: str = "") -> ModelError:
    """The error for an array of a type or shape that an input does not take."""
    given = ",".join(map(str, shape))
    return ModelError(
        f"{where}input '{escape(value.name or '')}' is {dtype} [{given}]; the model takes "
        f"{described(value)}{_turned(shape, value)}"
    )


def _turned(shape: Sequence[int], value: ir.Value) -> str:
    """What to do where an array fits once its channels stand elsewhere."""
    if value.shape is None or len(shape) != len(value.shape) or len(shape) < 3:
        return ""
    axes = range(len(shape))
    for order in ((0, axes[-1], *axes[1:-1]), (0, *axes[2:], 1)):
        moved = zip((shape[axis] for axis in order), value.shape, strict=True)
        if all(size == wanted or not isinstance(wanted, int) for size, wanted in moved):
            return f"; move the channels: .transpose{order}"
    return ""


def _fit(given: Mapping[str, Array], model: ir.Model, where: str) -> Iterator[Arrays]:
    arrays = without_fixed(given, model, where)
    check_names(arrays, model, where)
    parts: dict[str, list[Array]] = {}
    for name, value in takes(model).items():
        array = np.asarray(arrays[name] if name in arrays else value.meta[DEFAULT_KEY].numpy())
        runs = _runs(array, value)
        if not runs or not np.can_cast(array.dtype, dtype_of(value), "same_kind"):
            raise misfit(array.dtype, array.shape, value, where)
        typed = array.astype(dtype_of(value))
        parts[name] = [typed] if runs == 1 else np.split(typed, runs)
    count = max(map(len, parts.values()), default=1)
    odd = {name: len(part) for name, part in parts.items() if len(part) not in (1, count)}
    if odd:
        few = next(iter(odd))
        raise ModelError(
            f"{where}input '{escape(few)}' has samples for {odd[few]} runs, another input for "
            f"{count}; give as many of each"
        )
    for number in range(count):
        yield {name: part[number % len(part)] for name, part in parts.items()}


def _runs(array: Array, value: ir.Value) -> int:
    """For how many runs an array has samples; 0 where its shape does not fit."""
    sizes = list(value.shape or ())
    if len(sizes) != array.ndim:
        return 0
    fits = [
        not isinstance(size, int) or size == given
        for size, given in zip(sizes, array.shape, strict=True)
    ]
    if all(fits):
        return 1
    lead = sizes[0]
    several = all(fits[1:]) and isinstance(lead, int) and lead and array.shape[0] % lead == 0
    return array.shape[0] // lead if several and isinstance(lead, int) else 0


def described(value: ir.Value) -> str:
    """An input as messages call it: ``'x' (FLOAT [batch,3,8,8])``."""
    sizes = ",".join(
        str(size) if isinstance(size, int) else escape(size.value or "?")
        for size in value.shape or ()
    )
    return f"'{escape(value.name or '')}' ({value.dtype} [{sizes}])"


def load_indices(path: str | PathLike[str]) -> list[int]:
    """Whole numbers from a file: one on each line, a JSON array of them, or an ``.npy`` array.

    Raises:
        FileError: the file cannot be read, or holds something else.
    """
    where = escape(os.fspath(path))
    content = read_bounded(path, FileError)
    try:
        if Path(path).suffix == ".npy":
            numbers = np.load(io.BytesIO(content), allow_pickle=False).ravel().tolist()
        else:
            text = content.decode().strip()
            if not text.startswith("["):
                text = "[" + re.sub(r"\s+", ",", text) + "]"
            numbers = json.loads(text)
    except (EOFError, ValueError, RecursionError, MemoryError) as error:
        raise FileError(f"{where}: cannot be read as a list of ids: {error}") from None
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise FileError(
            f"{where}: is no list of ids; write one whole number on each line, a JSON array or .npy"
        )
    return list(numbers)
