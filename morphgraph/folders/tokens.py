"""Tokenizers of a smaller vocabulary: ``tokenizer.json`` as the library `tokenizers` reads it.

Tokens that have gone leave the vocabulary, and the others get their new ids. Text that the original
splits into tokens that stay is split alike: a piece of Unigram or WordPiece that was the best is so
among fewer; of BPE the merges that formed it are still there, if the parts of every token stay,
which :func:`tokens_with_parts` sees to.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from morphgraph.errors import DataError, UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.reading import from_json, read_bounded

_Table = dict[str, Any]
_MAX_BYTES = 200_000_000
_KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
_POST_PROCESSORS = ("sep", "cls")  # of BERT's and RoBERTa's: token and id


def read_tokenizer(path: str | Path) -> _Table:
    """What a ``tokenizer.json`` says.

    Raises:
        FileError: it cannot be read.
        DataError: it is no tokenizer.
    """
    where = escape(str(path))
    try:
        found = from_json(read_bounded(path, DataError, _MAX_BYTES), object)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error}); give tokenizer.json") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise DataError(f"{where}: is no tokenizer; give the tokenizer.json of the model")
    return found


def tokens_with_parts(kept: Iterable[int], tokenizer: str | Path) -> list[int]:
    """Tokens, and those without which the tokenizer does not form them; ascending.

    Added are tokens that the tokenizer adds or takes for unknown text, single letters and bytes (of
    which any other text can be put together), and of BPE the parts of which tokens are merged.

    Args:
        kept: ids of the tokens that stay.
        tokenizer: the ``tokenizer.json`` that made the ids.

    Raises:
        FileError: the file cannot be read.
        DataError: it is no tokenizer, or does not have these ids.
        UnsupportedError: its model is none of BPE, WordPiece, WordLevel and Unigram.

    >>> import json, pathlib, tempfile
    >>> words = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    >>> model = {"type": "BPE", "vocab": words, "merges": ["a b", "ab c", "b c"]}
    >>> path = pathlib.Path(tempfile.mkdtemp(), "tokenizer.json")
    >>> _ = path.write_text(json.dumps({"model": model}))
    >>> tokens_with_parts([4], path)  # the letters, and "ab", of which "abc" is merged
    [0, 1, 2, 3, 4]
    """
    table, ids = read_tokenizer(tokenizer), set(kept)
    model, tokens = _model(table), vocabulary(table)
    unknown = ids - set(tokens.values())
    if unknown:
        raise DataError(
            f"{escape(str(tokenizer))}: has no token {min(unknown)} ({len(tokens)} tokens); give "
            "ids of this tokenizer"
        )
    ids |= {added["id"] for added in table.get("added_tokens") or []}
    ids |= {tokens[name] for name in _needed(model) if name in tokens}
    prefix = model.get("continuing_subword_prefix") or ""
    letters = {name for name in tokens if len(name.removeprefix(prefix).replace("▁", "")) <= 1}
    ids |= {tokens[name] for name in letters}
    ids |= {tokens[name] for name in tokens if _is_byte(name)}
    if model["type"] == "BPE":
        names = {number: name for name, number in tokens.items()}
        parts = dict(_parts(model))
        todo = [names[number] for number in ids]
        while todo:
            for part in parts.get(todo.pop(), ()):
                if part in tokens and tokens[part] not in ids:
                    ids.add(tokens[part])
                    todo.append(part)
    return sorted(ids)


def vocabulary(table: Mapping[str, Any]) -> dict[str, int]:
    """By token its id, of the model and of tokens that were added."""
    words = _model(table)["vocab"]
    if isinstance(words, list):
        found = {piece[0]: number for number, piece in enumerate(words)}
    else:
        found = dict(words)
    return found | {added["content"]: added["id"] for added in table.get("added_tokens") or []}


def smaller_tokenizer(table: Mapping[str, Any], ids: Mapping[int, int]) -> _Table:
    """A tokenizer with fewer tokens.

    Args:
        table: what ``tokenizer.json`` says.
        ids: by old id of every token that stays the new one, in the same order.

    Raises:
        UnsupportedError: its model is of no known kind, or it needs a token that has gone.
    """
    made: _Table = copy.deepcopy(dict(table))
    model, tokens = _model(made), vocabulary(table)
    for name in _needed(model):
        if tokens.get(name, -1) not in ids:
            raise UnsupportedError(_gone(name, "unknown text becomes"))
    made["model"] = _shrunk(model, ids)
    made["added_tokens"] = [
        added | {"id": ids[added["id"]]}
        for added in table.get("added_tokens") or []
        if added["id"] in ids
    ]
    made["post_processor"] = _processed(made.get("post_processor"), ids)
    padding = made.get("padding")
    if isinstance(padding, dict):
        new = ids.get(padding.get("pad_id", -1))
        made["padding"] = None if new is None else padding | {"pad_id": new}
    return made


def not_formed(table: Mapping[str, Any], ids: Mapping[int, int]) -> list[str]:
    """Tokens that stay, but of which BPE has lost the merges that form them."""
    model, tokens = _model(table), vocabulary(table)
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return []
    added = {each["content"] for each in table.get("added_tokens") or []}
    return [
        name
        for name, parts in _parts(model)
        if tokens.get(name, -1) in ids
        and name not in added
        and any(tokens.get(part, -1) not in ids for part in parts)
    ]


def _model(table: Mapping[str, Any]) -> _Table:
    model: _Table = table["model"]
    kind = model.get("type") or _kind(model)
    if kind not in _KINDS or not isinstance(model.get("vocab"), dict | list):
        raise UnsupportedError(
            f"tokenizer: its model '{escape(str(kind))}' is none of {', '.join(_KINDS)}; map its "
            "ids with mg.token_map"
        )
    return model | {"type": kind}


def _kind(model: Mapping[str, Any]) -> str:
    """Of a file of an older version, which does not say it."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _needed(model: Mapping[str, Any]) -> list[str]:
    """Tokens that a model falls back to."""
    unknown = model.get("unk_token")
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return [] if number is None else [model["vocab"][number][0]]
    return [unknown] if unknown is not None and unknown in model["vocab"] else []


def _merge(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """By token the two of which it is merged first of all."""
    seen: set[str] = set()
    for merge in model.get("merges") or []:
        left, right = _merge(merge)
        name = _merged(model, left, right)
        if name not in seen:
            seen.add(name)
            yield name, (left, right)


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _shrunk(model: _Table, ids: Mapping[int, int]) -> _Table:
    words = model["vocab"]
    if model["type"] == "Unigram":
        pieces = [piece for number, piece in enumerate(words) if number in ids]
        unknown = model.get("unk_id")
        return model | {"vocab": pieces, "unk_id": None if unknown is None else ids[unknown]}
    left = {name: ids[number] for name, number in words.items() if number in ids}
    if model["type"] != "BPE":
        return model | {"vocab": left}
    merges = [
        merge
        for merge in model.get("merges") or []
        if all(name in left for name in (*_merge(merge), _merged(model, *_merge(merge))))
    ]
    return model | {"vocab": left, "merges": merges}


def _processed(processor: Any, ids: Mapping[int, int]) -> Any:
    """What adds tokens around a text, with their new ids."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    for name in _POST_PROCESSORS:
        if isinstance(made.get(name), list):
            token, number = made[name]
            made[name] = [token, _new(token, number, ids)]
    if isinstance(made.get("processors"), list):
        made["processors"] = [_processed(each, ids) for each in made["processors"]]
    if isinstance(made.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: said | {"ids": [_new(name, number, ids) for number in said["ids"]]}
            for name, said in made["special_tokens"].items()
        }
    return made


def _new(token: str, number: int, ids: Mapping[int, int]) -> int:
    if number not in ids:
        raise UnsupportedError(_gone(token, "the tokenizer adds to every text"))
    return ids[number]


def _gone(token: str, why: str) -> str:
    return (
        f"tokenizer: the token '{escape(token)}', which {why}, has gone; keep it "
        "(mg.tokens_with_parts gives what a tokenizer needs), or map its ids with mg.token_map"
    )
