"""Configs of language models, brought to the sizes of a resized network.

An entry is known by its name, whatever the network is: what Hugging Face and ONNX Runtime GenAI
call the same size.
"""

import copy
from collections.abc import Mapping
from typing import Any

from morphgraph.errors import ModelError
from morphgraph.folders.found import GENAI
from morphgraph.folders.sizes import (
    EXPERTS,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    SizeChanges,
)
from morphgraph.onnx_io import escape

_Table = dict[str, Any]

_ENTRIES = {
    HIDDEN: ("hidden_size", "n_embd", "d_model", "dim"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    KV_HEADS: ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    HEAD_SIZE: ("head_size", "head_dim", "d_kv"),
    INNER: (
        *("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "ffn_hidden_size", "d_ff"),
        *("moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    EXPERTS: ("num_local_experts", "num_experts", "n_routed_experts"),
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    VOCABULARY: ("vocab_size",),
}
_KINDS = {name: kind for kind, names in _ENTRIES.items() for name in names}
#: Entries about one side of a network of two, which only files of both can tell apart.
_SIDED = {
    f"{side}_{entry}": kind
    for side in ("encoder", "decoder")
    for entry, kind in (("ffn_dim", INNER), ("attention_heads", HEADS))
}
_INNER_TABLES = ("model", "decoder", "text_config")
_INNER_PER_HIDDEN = 4  # of an inner width that a config leaves out, by Hugging Face's usage


def rewritten(
    file: str, config: Mapping[str, Any], changes: SizeChanges
) -> tuple[_Table, list[str]]:
    """A config with the new sizes, and what is to be said of it: sentences without a subject.

    Raises:
        ModelError: it contradicts the network as it was.
    """
    made = copy.deepcopy(dict(config))
    unequal: list[str] = []
    _rewrite(file, made, changes, unequal)
    notes = []
    if unequal:
        notes.append(
            f"cannot say unequal widths ({', '.join(unequal)}; the largest is written): ONNX "
            "Runtime itself runs the model, what reads the config may not"
        )
    if not file.endswith(GENAI):
        tables = [(config, made)]
        tables += [(config[k], made[k]) for k in _INNER_TABLES if isinstance(made.get(k), dict)]
        found = [note for pair in tables if (note := _misfit(*pair, changes))]
        notes += found if found and not _is_accepted(made) else []
    return made, notes


def _is_accepted(config: _Table) -> bool:
    """Whether Hugging Face's class of this config takes it; not, where nobody is here to say."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING
    except ImportError:
        return False
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return False
    try:
        CONFIG_MAPPING[kind](**config)
    except (StrictDataclassError, ValueError, TypeError):
        return False
    return True


def _misfit(old: Mapping[str, Any], table: _Table, changes: SizeChanges) -> str:
    """What is wrong where the hidden width was a multiple of the heads, and is none any more.

    Some of Hugging Face's classes refuse that, whatever the size of a head is.
    """
    before = _first_of(HIDDEN, old), _first_of(HEADS, old)
    after = _first_of(HIDDEN, table), _first_of(HEADS, table)
    if not (before[0] and before[1] and after[0] and after[1]):
        return ""
    (_, whole), (_, every) = before[0], before[1]
    (hidden, width), (heads, count) = after[0], after[1]
    if whole % every or not width % count:
        return ""
    groups = changes.hidden_groups(whole)
    remedy = ""
    if groups:
        remedy = (
            f"; plan with --set {groups[0]}={max(width - width % count, count)}, or leave that "
        )
        remedy += f"width as it is (--exclude {groups[0]})"
    return (
        f"says {hidden} {width}, which is no multiple of {heads} {count}: ONNX Runtime itself runs "
        f"the model, but transformers refuses that of Llama, Gemma and some more{remedy}"
    )


def cache_note(old: Mapping[str, Any], new: Mapping[str, Any], changes: SizeChanges) -> str:
    """What is to be said where a head's size was the hidden width by the heads, and is not now.

    Optimum makes a decoder's first caches by that quotient, for most of Hugging Face's classes.
    Empty where it does not matter: no cache, or a network whose heads had another size before.
    """
    stated = [
        found[1]
        for table in (old, new)
        for kind in (HIDDEN, HEADS)
        if (found := _first_of(kind, table))
    ]
    if not changes.layers or len(stated) < 4 or 0 in stated:
        return ""
    whole, every, width, count = stated
    size = whole // every
    sizes = changes.after(HEAD_SIZE, size)
    if set(changes.before[HEAD_SIZE]) != {size} or len(sizes) != 1 or width == count * sizes[0]:
        return ""
    groups = changes.hidden_groups(whole)
    fitting = count * sizes[0]
    remedy = f"; if it has to, plan with --set {groups[0]}={fitting}" if groups else ""
    return (
        f"says heads of {sizes[0]}, and no more {width} / {count}: ONNX Runtime and transformers "
        "run the model, but ORTModelForCausalLM of optimum-onnx makes the first caches by that "
        f"quotient for Llama, Qwen, Mistral and more, and does not generate{remedy}"
    )


def _first_of(kind: str, table: Mapping[str, Any]) -> tuple[str, int] | None:
    """The entry that says a size, with it."""
    entries = ((name, table.get(name)) for name in _ENTRIES[kind])
    return next(((name, size) for name, size in entries if type(size) is int), None)


def stated_layers(config: Mapping[str, Any]) -> int:
    """The number of blocks that a config states; 0 where it states none."""
    own = [n for name in _ENTRIES[LAYERS] if type(n := config.get(name)) is int]
    inner = [table for name in _INNER_TABLES if isinstance(table := config.get(name), dict)]
    return own[0] if own else max(map(stated_layers, inner), default=0)


def _rewrite(file: str, table: _Table, changes: SizeChanges, unequal: list[str]) -> None:
    old = copy.deepcopy(table)
    new = {layer: place for place, layer in enumerate(changes.layers_left)}
    for entry, size in list(table.items()):
        kind = _KINDS.get(entry) or (_SIDED.get(entry) if changes.is_joined else None)
        if isinstance(size, dict) and entry in _INNER_TABLES:
            _rewrite(file, size, changes, unequal)
        elif kind is not None and type(size) is int:
            table[entry] = _changed(file, entry, kind, size, changes, unequal)
        elif isinstance(size, dict) and isinstance(size.get("layers"), list):
            size["layers"] = [new[layer] for layer in size["layers"] if layer in new]
        elif isinstance(size, list) and len(size) == len(changes.layers) > 0:
            table[entry] = [
                each for layer, each in zip(changes.layers, size, strict=True) if layer in new
            ]
    if not file.endswith(GENAI):
        _say_what_followed(old, table, changes)


def _changed(
    file: str, entry: str, kind: str, size: int, changes: SizeChanges, unequal: list[str]
) -> int:
    """The new size; of several the largest."""
    stated = changes.before.get(kind)
    if stated and size not in stated:
        raise ModelError(
            f"{file}: says {entry} {size}, and the model has {kind} {_words(stated)}: the config "
            "belongs to another model; correct it, or resize the ONNX file outside of its folder"
        )
    found = changes.after(kind, size, entry)
    if len(found) > 1:
        unequal.append(f"{entry} {_words(found)}")
    return max(found, default=size)


def _words(sizes: list[int]) -> str:
    return " and ".join(escape(str(size)) for size in sorted(set(sizes)))


def _say_what_followed(old: _Table, table: _Table, changes: SizeChanges) -> None:
    """State sizes that followed from others, where they do not any more."""
    hidden, heads = _first_of(HIDDEN, old), _first_of(HEADS, old)
    new_hidden, new_heads = _first_of(HIDDEN, table), _first_of(HEADS, table)
    if hidden is None or new_hidden is None:
        return
    if heads is not None and new_heads is not None and _first_of(HEAD_SIZE, old) is None:
        size = hidden[1] // heads[1]
        new_size = max(changes.after(HEAD_SIZE, size), default=size)
        if new_heads[1] * new_size != new_hidden[1]:
            table["head_dim"] = new_size
    for name in _ENTRIES[INNER]:
        if name in old and old[name] is None:
            inner = max(changes.after(INNER, _INNER_PER_HIDDEN * hidden[1], name), default=0)
            if inner and inner != _INNER_PER_HIDDEN * new_hidden[1]:
                table[name] = inner
