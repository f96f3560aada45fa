"""Text as calibration inputs of a language model: cut into sequences, as ids and what goes along.

A file is read piece by piece, and of a large one only as much as is wanted, from everywhere in it.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays, IntArray
from morphgraph.calibration.decode import IMAGE_SUFFIXES
from morphgraph.calibration.folders import files_in
from morphgraph.calibration.tokens import TokenInputs
from morphgraph.errors import (
    ArgumentError,
    DataError,
    FileError,
    ModelError,
    UnsupportedError,
    warn,
)
from morphgraph.onnx_io import escape

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".text", ".jsonl"})
LENGTH = 512
"""Tokens of a sequence where neither the model nor anybody else says it."""
_PIECE = 2**18  # characters that are coded at once
_BYTES = 16  # of a token; longer ones are rare, so that a stretch of text holds a sequence
_SHORTEST = 8  # tokens of a sequence that are proposed
_FEWEST = 2  # sequences: one to fit to, and one held out


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How text becomes sequences.

    Attributes:
        tokenizer: a ``tokenizer.json``, the folder that holds it, or a tokenizer of the libraries
            tokenizers or transformers.
        length: tokens of a sequence; by default what the model takes, or 512 where that is open.
        longest: the most where ``length`` is left out, as a model's config states it.
    """

    tokenizer: Any = None
    length: int | None = None
    longest: int | None = None

    def __bool__(self) -> bool:
        return self.tokenizer is not None or self.length is not None


class Coder(NamedTuple):
    """A tokenizer, and what it puts around every sequence."""

    encode: Callable[[str], list[int]]
    before: list[int]
    behind: list[int]
    name: str
    size: int
    unknown: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> "Coder":
        """The coder of whatever a user gave.

        Raises:
            UnsupportedError: tokenizers is not installed.
            FileError: there is no such file, or it is no tokenizer.
            ArgumentError: it is neither a path nor a tokenizer.
        """
        name = type(tokenizer).__name__
        if isinstance(tokenizer, str | PathLike):
            path = Path(tokenizer)
            path = path / "tokenizer.json" if path.is_dir() else path
            name, tokenizer = f"'{escape(str(path))}'", _read(path)
        tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "get_vocab_size"):
            raise ArgumentError(
                f"tokenizer is of type {type(tokenizer).__name__}; give the path of a "
                "tokenizer.json, or a tokenizer of the libraries tokenizers or transformers"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = tokenizer.encode("a")
        special = found.special_tokens_mask
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        size = tokenizer.get_vocab_size()
        return cls(encode, found.ids[:first], found.ids[last:], name, size, _unknown(tokenizer))


def _unknown(tokenizer: Any) -> int | None:
    """The id of what a tokenizer does not know; ``None`` where it has no such token."""
    token = getattr(getattr(tokenizer, "model", None), "unk_token", None)
    number: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return number


def _read(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UnsupportedError(
            f"{escape(str(path))}: the package tokenizers is not installed; "
            "pip install 'morphgraph[text]'"
        ) from None
    if not path.is_file():
        raise FileError(
            f"{escape(str(path))}: there is no such file; a model's tokenizer.json stands beside "
            "its config.json, and AutoTokenizer.from_pretrained(...).save_pretrained('.') writes it"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # the library raises Exception itself
        raise FileError(
            f"{escape(str(path))}: not a tokenizer of the library tokenizers "
            f"({escape(' '.join(str(error).split()))}); give a tokenizer.json"
        ) from None


def is_text(data: Any, wanted: bool = False) -> bool:
    """Whether what a user gave is text: a file or folder of it, or strings.

    A folder that also holds images or arrays is one of these, with a note for its readers, unless
    text is ``wanted``.
    """
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(each, str) for each in data)
    if not isinstance(data, str | PathLike):
        return False
    path = Path(data)
    if path.is_dir():
        others = () if wanted else files_in(path, IMAGE_SUFFIXES | {".npy", ".npz"})
        return not others and bool(files_in(path, TEXT_SUFFIXES))
    return path.suffix.lower() in TEXT_SUFFIXES


def sequences(
    data: Any, model: ir.Model, options: TextOptions, limit: int | None, seed: int
) -> tuple[Iterator[Arrays], int]:
    """Feeds of one sequence each, and how many tokens a sequence has.

    Args:
        data: as :func:`is_text` knows it.
        model: what they are for.
        options: tokenizer and length.
        limit: as many are wanted at most; those of a large text come from everywhere in it.
        seed: of the places.

    Raises:
        MorphError: there is no text, no tokenizer or no language model, or they do not fit.
    """
    where = _where(data)
    inputs = TokenInputs.of(model, where)
    if options.tokenizer is None:
        raise ArgumentError(
            f"{where}holds text; give the model's tokenizer.json, too: --tokenizer tokenizer.json, "
            "in Python text=TextOptions('tokenizer.json')"
        )
    coder = Coder.of(options.tokenizer)
    if inputs.rows is not None and 2 * coder.size < inputs.rows:
        warn(
            f"the tokenizer {coder.name} has {coder.size} tokens, and the model's embedding "
            f"'{escape(inputs.table)}' {inputs.rows} rows; is it the tokenizer of this model?"
        )
    length = _length(inputs, options, where)
    room = length - len(coder.before) - len(coder.behind)
    if room < 1:
        raise ArgumentError(
            f"{where}a sequence of {length} tokens holds nothing but the tokenizer's own marks; "
            "give a greater length"
        )
    return _feeds(data, coder, inputs, (length, room), limit, seed, where), length


def _where(data: Any) -> str:
    return f"{escape(str(data))}: " if isinstance(data, str | PathLike) else "the data: "


def _length(inputs: TokenInputs, options: TextOptions, where: str) -> int:
    asked = options.length
    if asked is not None and inputs.length is not None and asked != inputs.length:
        raise ArgumentError(
            f"{where}length {asked}: the model takes sequences of {inputs.length} tokens; leave "
            "the length out, or export the model with an open one"
        )
    if asked is not None and asked < 1:
        raise ArgumentError(f"length {asked}: give the tokens of a sequence, at least 1")
    known = asked or inputs.length
    return known or min(LENGTH, inputs.longest or LENGTH, options.longest or LENGTH)


def _feeds(
    data: Any,
    coder: Coder,
    inputs: TokenInputs,
    sizes: tuple[int, int],
    limit: int | None,
    seed: int,
    where: str,
) -> Iterator[Arrays]:
    length, room = sizes
    count, total, unknown = 0, 0, 0
    waiting: list[int] = []
    for text, is_alone in _pieces(data, limit, room, seed):
        waiting += coder.encode(text)
        total += len(waiting)
        while len(waiting) >= room:
            ids = np.array([[*coder.before, *waiting[:room], *coder.behind]], np.int64)
            del waiting[:room]
            _check_ids(ids, inputs, coder, where)
            unknown += int((ids == coder.unknown).sum())
            yield inputs.feed(ids)
            count += 1
            if is_alone:
                break
        total -= len(waiting)
        if is_alone:
            waiting.clear()
    total += len(waiting)
    if not total:
        raise DataError(f"{where}holds no text; give some that is like what the model is for")
    if count and 2 * unknown > count * room:
        raise DataError(
            f"{where}the tokenizer {coder.name} does not know {unknown} of {count * room} tokens; "
            "give the tokenizer that belongs to this model, or text that it was made for"
        )
    if count < _FEWEST:
        few = inputs.length is None and total >= _FEWEST * _SHORTEST
        shorter = f" or shorter ones: length={max(total // 32, _SHORTEST)}" if few else ""
        raise DataError(
            f"{where}too short: {total} tokens, and the sequences have {length}; give more text"
            f"{shorter}"
        )


def _check_ids(ids: IntArray, inputs: TokenInputs, coder: Coder, where: str) -> None:
    if inputs.rows is not None and ids.max() >= inputs.rows:
        raise ModelError(
            f"{where}the tokenizer {coder.name} gives the id {ids.max()}, and the model's "
            f"embedding '{escape(inputs.table)}' has {inputs.rows} rows; give the tokenizer that "
            "belongs to this model"
        )


def _pieces(data: Any, limit: int | None, room: int, seed: int) -> Iterator[tuple[str, bool]]:
    """Pieces of the text, and whether a piece is for one sequence alone, from anywhere."""
    if isinstance(data, list | tuple):
        for text in data:
            yield text, False
        return
    path = Path(data)
    files = files_in(path, TEXT_SUFFIXES) if path.is_dir() else [path]
    total = sum(_size(file) for file in files)
    stretch = _BYTES * room
    if limit is None or total <= 4 * limit * stretch:
        for file in files:
            for text in _whole(file):
                yield text, False
        return
    generator = np.random.default_rng(seed)
    for file in files:
        wanted = -(-limit * _size(file) // total)
        bounds = np.arange(wanted + 1) * (_size(file) - stretch) // max(wanted, 1)
        for low, high in itertools.pairwise(bounds.tolist()):
            place = int(generator.integers(low, max(high, low + 1)))
            yield _stretch(file, max(place, 0), stretch), True


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise FileError(
            f"{escape(str(file))}: {error.strerror or error}; check the path"
        ) from error


def _whole(file: Path) -> Iterator[str]:
    """The text of a file, piece by piece, each cut in front of a space."""
    rest = ""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            if file.suffix.lower() == ".jsonl":
                yield from (_text_of(line, file) for line in opened if line.strip())
                return
            while piece := opened.read(_PIECE):
                rest += piece
                cut = max(rest.rfind(" "), rest.rfind("\n"))
                if cut > 0:
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise FileError(f"{escape(str(file))}: not text in UTF-8 ({error}); convert it") from error
    except OSError as error:
        raise FileError(
            f"{escape(str(file))}: {error.strerror or error}; check the path"
        ) from error
    if rest:
        yield rest


def _stretch(file: Path, place: int, size: int) -> str:
    """So many bytes from somewhere, without the words and lines that are cut."""
    with file.open("rb") as opened:
        opened.seek(place)
        found = opened.read(size)
    if file.suffix.lower() == ".jsonl":
        lines = found.split(b"\n")[1:-1]
        return "\n".join(_text_of(line.decode("utf-8"), file) for line in lines if line.strip())
    text = found.decode("utf-8", errors="ignore")
    ends = [match.start() for match in re.finditer(r"\s", text)]
    return text[ends[0] + 1 : ends[-1]] if len(ends) > 1 else text


def _text_of(line: str, file: Path) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FileError(
            f"{escape(str(file))}: a line is no JSON ({error}); one per line"
        ) from error
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise FileError(
            f'{escape(str(file))}: a line has no "text"; write {{"text": "..."}} on each line'
        )
    return text
