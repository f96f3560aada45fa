"""How each file of a network of several is run by itself: with what those before it hand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from morphgraph.arrays import Shape
from morphgraph.folders.found import folder_of
from morphgraph.folders.parts import load_place
from morphgraph.folders.sizes import cache_parts
from morphgraph.onnx_io import bind_inputs, static_shape, values_of
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.canonical.join_files import Layout, layouts
from morphgraph.passes.canonical.symbols import input_shapes, input_symbols


@dataclass(frozen=True)
class FileRun:
    """One of the networks of a folder, as a runtime runs it.

    Attributes:
        name: of its file; of one of two networks in a file also what chooses it.
        file: where it stands.
        fixed: what chooses it, where its file holds two.
        shapes: of its inputs.
        left_open: inputs of which the file leaves sizes behind the batch open.
    """

    name: str
    file: Path
    fixed: Mapping[str, bool] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    left_open: tuple[str, ...] = ()


def file_runs(folder: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> list[FileRun]:
    """The networks of a folder in the order in which they run.

    Sizes that the files leave open are those of an analysis, but that a step behind a cache takes
    one new token. Caches and what else files hand on are as long as what makes them.

    Args:
        folder: whose files are one network.
        shapes: of inputs of the joined model (``decoder_model/input_ids``), instead.

    Raises: as :func:`morphgraph.folders.parts.load_network`, and
        ModelError: there is no such input, or it has another shape.
    """
    given = {name: tuple(sizes) for name, sizes in (shapes or {}).items()}
    found, joined = folder_of(folder), bind_inputs(load_place(folder), given)
    noted = layouts(joined)
    assert found is not None
    assert noted is not None
    files = {path.stem: path for path in found.parts}
    later = {part.name for part in noted.parts if _is_behind_a_cache(part)}
    batch = next((sizes[0] for sizes in given.values() if sizes), None)
    symbols = []
    for symbol in input_symbols(joined):
        size = symbol.size
        if symbol.is_batch:
            size = batch or size
        elif {name.partition("/")[0] for name, _ in symbol.axes} <= later:
            size = 1
        symbols.append(replace(symbol, size=size))
    sizes = {name: tuple(shape) for name, shape in input_shapes(joined, symbols).items()}
    sized = canonicalize(joined, sizes, keep_original=False)
    values = {value.name or "": value for value in values_of(sized.graph)}
    runs = []
    for part in noted.parts:
        choice = part.choice
        fixed = {} if choice is None else {choice.flag: choice.value}
        file = files[part.name if choice is None else choice.file]
        words = "".join(f" ({flag}={str(value).lower()})" for flag, value in fixed.items())
        taken = {
            name: static_shape(values[given])
            for name, given in part.inputs.items()
            if given in values
        }
        free = (n for n in taken if any(type(size) is not int for size in part.sizes[n][1:]))
        runs.append(FileRun(f"{file.stem}{words}", file, fixed, taken, tuple(free)))
    return runs


def _is_behind_a_cache(part: Layout) -> bool:
    """Whether a part takes a cache that another one has made."""
    return any(
        cache_parts(name, ()) is not None and not given.startswith(f"{part.name}/")
        for name, given in part.inputs.items()
    )
