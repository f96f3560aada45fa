"""Files beside a model that number tokens, brought to a smaller vocabulary."""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from morphgraph.arrays import IntArray
from morphgraph.errors import MorphError, UnsupportedError, warn
from morphgraph.folders.found import GENAI, ModelFolder
from morphgraph.folders.tokens import (
    not_formed,
    read_tokenizer,
    smaller_tokenizer,
    tokens_with_parts,
    vocabulary,
)
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.rows import tables
from morphgraph.passes.planning.vocabulary import token_map

TOKENIZER = "tokenizer.json"
_GENERATION = "generation_config.json"
_OF_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_ENDS = ("_token_id", "_token_ids")
_TOLD = ("tokenizer_config.json", "special_tokens_map.json")  # which tokens are special
_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def warn_of_parts(source: ModelFolder, kept: Iterable[int]) -> None:
    """Warn where the folder's tokenizer needs more tokens than are to stay."""
    path, ids = source.path / TOKENIZER, set(kept)
    try:
        more = set(tokens_with_parts(ids, path)) - ids if path.is_file() else set()
    except MorphError:
        return  # a tokenizer that is not known is told where it would be written
    if more:
        warn(
            f"{escape(str(path))}: needs {len(more)} more tokens to split text as it does now "
            "(parts of tokens, letters, special ones); mg.tokens_with_parts gives all"
        )


def token_ids(graph: ChannelGraph, keep: Mapping[int, IntArray], size: int) -> dict[int, int]:
    """By the old id of every token that stays its new one; empty where nobody can tell.

    Args:
        graph: the network before.
        keep: per index of a group that changes the positions that stay.
        size: of the vocabulary before.
    """
    found = {
        tuple(keep[index].tolist())
        for rows in tables(graph).values()
        for index in rows.groups & keep.keys()
        if rows.inputs and rows.count == size == graph.groups[index].width
    }
    return token_map(found.pop()) if len(found) == 1 else {}


def renumbered_files(
    source: ModelFolder, configs: Mapping[str, dict[str, Any]], ids: Mapping[int, int], size: int
) -> tuple[dict[str, str], set[str]]:
    """The files that number tokens, as text by name, and those that are left out.

    Warns where a tokenizer is left as it is, or splits text otherwise.

    Args:
        source: the folder before.
        configs: the configs with the new sizes.
        ids: by old id of every token that stays the new one.
        size: of the vocabulary before.
    """
    texts = {name: as_text(_with_ids(name, config, ids, size)) for name, config in configs.items()}
    generation = source.path / _GENERATION
    if generation.is_file():
        texts[_GENERATION] = as_text(_with_ids(_GENERATION, _read_json(generation), ids, size))
    path = source.path / TOKENIZER
    try:
        if not path.is_file():
            raise UnsupportedError(f"the folder has no {TOKENIZER}")
        table = read_tokenizer(path)
        made = smaller_tokenizer(table, ids)
    except MorphError as error:
        warn(
            "the model has fewer tokens, and the tokenizer's files are copied as they are "
            f"({error}): their ids are those of before; give the model mg.token_map(kept)[id]"
        )
        return texts, set()
    lost = not_formed(table, ids)
    if lost:
        warn(
            f"{TOKENIZER}: {len(lost)} tokens stay, but not the parts that they are merged of "
            f"(first '{escape(lost[0])}'), so that text is split otherwise; keep the tokens of "
            "mg.tokens_with_parts"
        )
    texts[TOKENIZER] = as_text(made)
    words = {name: ids[n] for name, n in _words(source.path, "vocab.json") if n in ids}
    texts |= {"vocab.json": as_text(words)} if words else {}
    more = {name: ids[n] for name, n in _words(source.path, "added_tokens.json") if n in ids}
    texts |= {"added_tokens.json": as_text(more)} if more else {}
    texts |= dict(_lines(source.path, made["model"], ids))
    gone = {name for name, number in vocabulary(table).items() if number not in ids}
    for name in _TOLD:
        if (source.path / name).is_file():
            texts[name] = as_text(_without(name, _read_json(source.path / name), gone, ids))
    return texts, {name for name in _OF_SENTENCEPIECE if (source.path / name).is_file()}


def _without(
    file: str, said: dict[str, Any], gone: Set[str], ids: Mapping[int, int]
) -> dict[str, Any]:
    """What a tokenizer's settings say, without tokens that have gone.

    The tokenizer would add them again, under ids that the model has no rows for.
    """

    def is_gone(token: Any) -> bool:
        name = token.get("content") if isinstance(token, dict) else token
        return isinstance(name, str) and name in gone

    made: dict[str, Any] = {}
    for entry, value in said.items():
        if entry == "added_tokens_decoder" and isinstance(value, dict):
            numbered = {int(n): each for n, each in value.items()}
            made[entry] = {str(ids[n]): each for n, each in numbered.items() if n in ids}
        elif entry.endswith("_token") and is_gone(value):
            warn(f"{file}: {entry} is a token that has gone; keep it, or state another")
        elif entry in _SPECIAL and isinstance(value, list):
            made[entry] = [each for each in value if not is_gone(each)]
        elif entry in _SPECIAL and isinstance(value, dict):
            made[entry] = {name: each for name, each in value.items() if not is_gone(each)}
        else:
            made[entry] = value
    return made


def _read_json(path: Path) -> dict[str, Any]:
    """A table of a folder that was read already, or is small and of the tokenizer's writer."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def as_text(table: Mapping[str, Any]) -> str:
    """JSON as configs are written."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _words(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    path = folder / name
    if path.is_file():
        yield from ((word, n) for word, n in _read_json(path).items() if type(n) is int)


def _lines(folder: Path, model: Mapping[str, Any], ids: Mapping[int, int]) -> Iterator[Any]:
    """Files with a token or a merge on each line."""
    path = folder / "vocab.txt"
    if path.is_file():
        words = path.read_text(encoding="utf-8").splitlines()
        left = [word for number, word in enumerate(words) if number in ids]
        yield path.name, "".join(f"{word}\n" for word in left)
    path = folder / "merges.txt"
    if path.is_file():
        head = path.read_text(encoding="utf-8").splitlines()[:1]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
        lines = [*(line for line in head if line.startswith("#version")), *merges]
        yield path.name, "".join(f"{line}\n" for line in lines)


def _with_ids(
    file: str, table: Mapping[str, Any], ids: Mapping[int, int], size: int
) -> dict[str, Any]:
    """A config whose entries name the tokens by their new ids; told where one has gone.

    GenAI refuses null, and takes an entry that is not there for one without a token.
    """

    def new(entry: str, number: Any) -> Any:
        if isinstance(number, list):
            mapped = (new(entry, each) for each in number)
            return [each for each in mapped if each is not None]
        if type(number) is not int or not 0 <= number < size:
            return number
        if number not in ids:
            warn(f"{file}: {entry} {number} is a token that has gone; keep it, or state another")
        return ids.get(number)

    made: dict[str, Any] = {}
    for entry, value in table.items():
        if isinstance(value, dict):
            made[entry] = _with_ids(file, value, ids, size)
        elif entry.endswith(_ENDS) or entry in _LISTS:
            number = new(entry, value)
            if number is not None or file != GENAI:
                made[entry] = number
        else:
            made[entry] = value
    return made
