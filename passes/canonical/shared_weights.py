"""Weights that several files hold alike, though exporters name them anew in each."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.onnx_io import graphs_of, is_float

_Key = tuple[ir.DataType, tuple[int, ...], bytes]


def shared_weights(names: Sequence[str], models: Sequence[ir.Model]) -> list[dict[str, str]]:
    """By part, and by the name that an initializer has in the joined model, that in the file.

    Weights of two files are one where they hold the same numbers: under the same name, or where
    both files have as many of them, in the order in which they are used. Vectors of one number over
    and over (biases at zero, scales at one) are alike everywhere, so that there only names tell. A
    weight keeps the name of the first file that holds it, with the file's before it where that is
    taken.

    Args:
        names: of the files.
        models: of them.
    """
    alike = Counter(
        kind for model in models for kind in {_kind(v) for v in model.graph.initializers.values()}
    )
    found: list[dict[str, str]] = []
    taken: set[str] = set()
    classes: dict[_Key, list[dict[str, None]]] = {}  # of a content the weights, by all their names
    joined_name: dict[int, str] = {}  # by id of a weight's names
    for file, model in zip(names, models, strict=True):
        mine: dict[str, str] = {}
        contents: dict[_Key, list[ir.Value]] = {}
        for value in _by_use(model):
            if is_float(value) and alike[_kind(value)] > 1 and len(value.shape or ()):
                contents.setdefault(_key(value), []).append(value)
        pairs: dict[str, dict[str, None]] = {}
        for key, values in contents.items():
            known = classes.setdefault(key, [])
            pairs |= _paired(values, known)
            for value in values:
                if (value.name or "") not in pairs:
                    fresh: dict[str, None] = {}
                    known.append(fresh)
                    pairs[value.name or ""] = fresh
        for name in [value.name or "" for value in model.graph.initializers.values()]:
            one = pairs.get(name)
            if one is not None and id(one) in joined_name:
                wanted = joined_name[id(one)]
            else:
                wanted = name if name not in taken else f"{file}/{name}"
                if one is not None:
                    joined_name[id(one)] = wanted
            if one is not None:
                one[name] = None
            taken.add(wanted)
            mine[wanted] = name
        found.append(mine)
    return found


def _paired(
    values: Sequence[ir.Value], known: Sequence[dict[str, None]]
) -> dict[str, dict[str, None]]:
    """Which weights of a file are weights of others, of those that hold the same numbers."""
    found: dict[str, dict[str, None]] = {}
    left, others = list(values), list(known)
    for value in values:
        one = next((names for names in others if (value.name or "") in names), None)
        if one is not None:
            found[value.name or ""] = one
            left.remove(value)
            others = [names for names in others if names is not one]
    if left and len(left) == len(others) and not _is_uniform(left[0]):
        found |= {value.name or "": one for value, one in zip(left, others, strict=True)}
    return found


def _kind(value: ir.Value) -> tuple[object, ...]:
    tensor = value.const_value
    return (None,) if tensor is None else (tensor.dtype, tuple(tensor.shape.numpy()))


def _key(value: ir.Value) -> _Key:
    tensor = value.const_value
    assert tensor is not None
    return (
        tensor.dtype,
        tuple(tensor.shape.numpy()),
        # As bytes: NumPy hands out no buffer of bfloat16.
        hashlib.sha256(
            np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
        ).digest(),
    )


def _is_uniform(value: ir.Value) -> bool:
    assert value.const_value is not None
    array = value.const_value.numpy().reshape(-1)
    return not array.size or bool((array == array[0]).all())


def _by_use(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers in the order in which nodes read them; those that nobody reads are left."""
    seen: dict[ir.Value, None] = {}
    for graph in graphs_of(model):
        for node in graph:
            seen |= {v: None for v in node.inputs if v is not None and v.is_initializer()}
    yield from (value for value in seen if value.graph is model.graph)
