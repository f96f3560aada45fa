"""Several ONNX files of a folder that are one network: which they are, and what goes between them.

Exporters write an encoder and a decoder apart, and a decoder's first step and its step with a
cache. What the files take and give tells how they belong together, whatever the network is: keys
and values go by the numbers and words in their names, as runtimes hand them on, and what else is no
token but numbers comes from the file that gives it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.errors import ModelError, UnsupportedError, VerificationError, warn
from morphgraph.folders.found import folder_of, model_place
from morphgraph.folders.sizes import cache_parts
from morphgraph.onnx_io import escape, is_float, load
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.canonical.fix_inputs import fix_inputs
from morphgraph.passes.canonical.join_files import (
    Choice,
    Feed,
    Layout,
    Part,
    empty_shape,
    join_files,
    layouts,
)
from morphgraph.passes.checking.decoding import joined_shapes
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.tolerances import RESIZED

_SHOWN = 5  # files in a message
_WORDS = re.compile(r"[a-z]+")


def load_place(path: Path) -> ir.Model:
    """The model of an ONNX file or of the one in a folder, or that of all files of a folder.

    Raises: as :func:`morphgraph.load`, :func:`morphgraph.folders.model_place` and
        :func:`load_network` do.
    """
    place = model_place(path)
    if not place.is_dir():
        return load(place)
    folder = folder_of(place)
    assert folder is not None
    return load_network(place, folder.parts)


def load_network(folder: Path, files: Sequence[Path]) -> ir.Model:
    """The network that several files of a folder are, as one model.

    Args:
        folder: for errors.
        files: its ONNX files.

    Raises:
        FileError: a file cannot be read.
        ModelError: one is broken, or takes what no file gives, or two are one network.
        UnsupportedError: the files are of different opsets.
    """
    parts = [part for file in files for part in _parts(file)]
    try:
        _require_different(parts)
        feeds = found_feeds(parts)
        order = _in_order(parts, feeds)
    except ModelError as error:
        names = ", ".join(f"'{escape(str(file.relative_to(folder)))}'" for file in files[:_SHOWN])
        raise ModelError(
            f"{escape(str(folder))}: holds several models ({names}), and {error}; give the ONNX "
            "file"
        ) from error
    place = {old: new for new, old in enumerate(order)}
    moved = [Feed(place[f.part], f.taken, place[f.source], f.given) for f in feeds]
    return join_files([parts[old] for old in order], moved)


def _parts(file: Path) -> list[Part]:
    """A file as a part; one of two networks, of which an input chooses, as both of them."""
    model = load(file)
    ifs = [node for node in model.graph if node.op_type == "If" and not node.domain]
    for place, value in enumerate(model.graph.inputs):
        sizes = list(value.shape or ())
        is_flag = value.dtype == ir.DataType.BOOL and all(size == 1 for size in sizes)
        if not is_flag or not ifs:
            continue
        name = value.name or ""
        both = {flag: fix_inputs(model, {name: flag}) for flag in (True, False)}
        if any(node.op_type == "If" for each in both.values() for node in each.graph):
            continue
        shape = [1] * len(sizes)
        return [
            Part(f"{file.stem}.{flag}".lower(), each, Choice(file.stem, name, flag, place, shape))
            for flag, each in both.items()
        ]
    return [Part(file.stem, model)]


def _file(part: Part) -> str:
    return part.name if part.choice is None else part.choice.file


def _given(part: Part) -> list[ir.Value]:
    """The outputs of a part that hold numbers."""
    return [value for value in part.model.graph.outputs if empty_shape(value) is None]


def _require_different(parts: Sequence[Part]) -> None:
    """Refuse two files of one interface: one network in two precisions."""
    seen: dict[tuple[frozenset[str], ...], str] = {}
    for part in parts:
        graph = part.model.graph
        names = tuple(frozenset(v.name or "" for v in vs) for vs in (graph.inputs, graph.outputs))
        other = seen.setdefault(names, _file(part))
        if other != _file(part):
            raise ModelError(
                f"'{escape(other)}' and '{escape(_file(part))}' take and give the same, as one "
                "network that is written twice does: keep one of them in the folder"
            )


def found_feeds(parts: Sequence[Part]) -> list[Feed]:
    """What goes from file to file.

    Raises:
        ModelError: files have nothing to do with each other, or it is not plain what one takes.
    """
    feeds = [
        feed
        for place in range(len(parts))
        for feed in (*_cached(parts, place), *_handed_on(parts, place))
    ]
    linked = {p for feed in feeds if feed.part != feed.source for p in (feed.part, feed.source)}
    alone = [part.name for place, part in enumerate(parts) if place not in linked]
    if alone:
        raise ModelError(
            f"'{escape(alone[0])}' takes nothing that another gives, and gives nothing that "
            "another takes: they are no one network"
        )
    return feeds


def _cached(parts: Sequence[Part], place: int) -> Iterator[Feed]:
    """The caches that a file takes: from a file that makes them of nothing, if there is one."""
    for value in parts[place].model.graph.inputs:
        key = _cache(value, "past")
        if key is None:
            continue
        # One that continues the same cache comes after it, and cannot be before.
        sources = [
            (source, given)
            for source, part in enumerate(parts)
            if (given := _of_cache(_given(part), key, "present")) is not None
            and (source == place or not _reads(part.model, key))
        ]
        others = [(source, given) for source, given in sources if source != place]
        others.sort(key=lambda each: _file(parts[each[0]]) != _file(parts[place]))
        if others and value.uses():
            yield Feed(place, value.name or "", *others[0])
        elif not value.uses() and sources:
            yield Feed(place, value.name or "", *(others or sources)[0])


def _cache(value: ir.Value, side: str) -> tuple[int, str] | None:
    """The number of the layer whose cache it is, and which one."""
    parts = cache_parts(value.name or "", ()) if is_float(value) else None
    return (parts[1], parts[2]) if parts and parts[0].lower().startswith(side) else None


def _of_cache(values: Sequence[ir.Value], key: tuple[int, str], side: str) -> str | None:
    return next((v.name or "" for v in values if _cache(v, side) == key), None)


def _reads(model: ir.Model, key: tuple[int, str]) -> bool:
    return any(v.uses() for v in model.graph.inputs if _cache(v, "past") == key)


def _handed_on(parts: Sequence[Part], place: int) -> Iterator[Feed]:
    """What a file takes of floating-point numbers of channels, and another one gives.

    Of several outputs that would fit the one whose open sizes, then whose name is most alike.
    """
    given = [
        (source, output)
        for source, part in enumerate(parts)
        if source != place
        for output in _given(part)
        if is_float(output) and _cache(output, "present") is None
    ]
    for value in parts[place].model.graph.inputs:
        if not is_float(value) or value.is_initializer() or _cache(value, "past") is not None:
            continue
        fitting = [(s, o) for s, o in given if _fits(o, value) and not _needs(parts, s, place)]
        if not fitting:
            continue
        marks = [(_shape(o) == _shape(value), _shared_words(o, value)) for _, o in fitting]
        best = [each for each, mark in zip(fitting, marks, strict=True) if mark == max(marks)]
        if len({output.name for _, output in best}) > 1:
            names = ", ".join(f"'{escape(output.name or '')}'" for _, output in best)
            raise ModelError(
                f"input '{escape(value.name or '')}' of '{escape(parts[place].name)}' may be any "
                f"of {names}"
            )
        source, output = best[0]
        yield Feed(place, value.name or "", source, output.name or "")


def _needs(parts: Sequence[Part], part: int, of: int) -> bool:
    """Whether a file takes a cache that another one gives, and so is behind it."""
    given = {k for v in _given(parts[of]) if (k := _cache(v, "present")) is not None}
    return any(v.uses() and _cache(v, "past") in given for v in parts[part].model.graph.inputs)


def _shape(value: ir.Value) -> list[int | str | None]:
    return [size if isinstance(size, int) else size.value for size in value.shape or ()]


def _fits(given: ir.Value, taken: ir.Value) -> bool:
    """Whether what is given can be what is taken: of one type, and as long in every known axis."""
    if given.dtype != taken.dtype or given.shape is None or taken.shape is None:
        return False
    if len(given.shape) != len(taken.shape) or not any(isinstance(d, int) for d in taken.shape):
        return False
    return all(
        one == other or not (isinstance(one, int) and isinstance(other, int))
        for one, other in zip(given.shape, taken.shape, strict=True)
    )


def _shared_words(one: ir.Value, other: ir.Value) -> int:
    """How many words two names share; ``state`` and ``states`` are one."""
    words = [{w.rstrip("s") for w in _WORDS.findall((v.name or "").lower())} for v in (one, other)]
    return len(words[0] & words[1])


def _in_order(parts: Sequence[Part], feeds: Sequence[Feed]) -> list[int]:
    """The files, each behind those that feed it; else as they were named.

    Raises:
        ModelError: two files feed each other.
    """
    behind: dict[int, set[int]] = {place: set() for place in range(len(parts))}
    for feed in feeds:
        behind[feed.part] |= {feed.source} - {feed.part}
    order: list[int] = []
    while len(order) < len(parts):
        ready = [p for p in behind if p not in order and behind[p] <= set(order)]
        if not ready:
            raise ModelError("they feed each other in a circle")
        order.append(ready[0])
    return order


def require_same_files(joined: ir.Model, files: Mapping[str, ir.Model]) -> None:
    """Hold files, run one after the other, against the joined model that they are split of.

    Every file takes what those before it have given, as a runtime hands it on.

    Args:
        joined: resized or not.
        files: by name.

    Raises:
        VerificationError: one gives something else, or does not run where the joined model does.
    """
    noted = layouts(joined)
    assert noted is not None
    # Slicing does not round: in half precision files would differ by how they are fused.
    model = in_single_precision(canonicalize(joined, keep_original=False))
    for shapes in joined_shapes(model):
        feeds = random_inputs(model, shapes=shapes)
        try:
            expected = run(in_single_precision(joined), feeds)
        except UnsupportedError:
            continue
        known = {**expected, **feeds}
        for part in noted.parts:
            _require_same_part(files, part, known)
        return
    warn("the files are not run one after the other: ONNX Runtime does not run the network")


def _require_same_part(
    files: Mapping[str, ir.Model], part: Layout, known: dict[str, Array]
) -> None:
    """Run a file, and let what it gives take the place of what the joined model gave."""
    model = files[part.name if part.choice is None else part.choice.file]
    taken = {name: known[joined] for name, joined in part.inputs.items() if joined in known}
    if part.choice is not None:
        taken[part.choice.flag] = np.full(part.choice.shape, part.choice.value)
    try:
        found = run(in_single_precision(model), taken)
    except UnsupportedError as error:
        raise VerificationError(
            f"'{escape(part.name)}' does not run by itself: {error}; please report the structure"
        ) from error
    for name, given in part.outputs.items():
        if given not in known:
            continue
        joined, array = known[given], found[name]
        scale = float(np.abs(joined[np.isfinite(joined)]).max(initial=0.0)) or 1.0
        if not np.allclose(array, joined, rtol=0, atol=RESIZED * scale, equal_nan=True):
            raise VerificationError(
                f"output '{escape(name)}' of '{escape(part.name)}' is not what all files together "
                "compute; please report the structure"
            )
        known[given] = array
