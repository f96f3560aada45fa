"""The structure of a network's arguments and results: noted at the export, kept by ``to_torch``.

ONNX knows a list of inputs and one of outputs. The metadata entry ``morphgraph.outputs`` says in
JSON how the outputs were put together, ``morphgraph.inputs`` the same of the inputs, as a dict of
arguments by name: a string is a tensor by its name, ``null`` a ``None``; a list, a tuple, a dict,
an object of named entries or a dataclass is ``{"list": [...]}``, ``{"dict": [[key, ...], ...]}``
and so on. A class is looked up among those that torch's pytree knows already; nothing is imported
for it.
"""

import json
import operator
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from morphgraph.onnx_io import INPUTS_KEY, OUTPUTS_KEY
from morphgraph.torch_io.names import as_argument
from morphgraph.torch_io.one_node import as_one_node

_NAMED = ("object", "named", "fields")  # kinds whose parts have names
_PLAIN = (str, int, float, bool, type(None))


def note_structure(model: ir.Model, results: Any) -> None:
    """Note how the results of the exported network are put together, where the outputs are not so.

    Args:
        model: with one output per tensor of the results, in their order.
        results: what the network gave.
    """
    leaves, spec = pytree.tree_flatten(results)
    outputs = [value.name for value in model.graph.outputs]
    tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    if sum(tensors) != len(outputs):
        return
    names = iter(outputs)
    named = [next(names) if is_tensor else None for is_tensor in tensors]
    described = _described(pytree.tree_unflatten(named, spec))
    plain = outputs[0] if len(outputs) == 1 else {"tuple": outputs}
    if described is not None and described != plain:
        model.metadata_props[OUTPUTS_KEY] = json.dumps(described, ensure_ascii=False)


def note_arguments(model: ir.Model, arguments: Mapping[str, Any]) -> None:
    """Note how the arguments of the exported network are put together, where one is no tensor.

    Args:
        model: with one input per tensor of the arguments, in their order.
        arguments: by name.
    """
    leaves, spec = pytree.tree_flatten(dict(arguments))
    tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    names = [value.name for value in model.graph.inputs]
    if sum(tensors) != len(names):
        return
    rest = iter(names)
    named = [next(rest) if is_tensor else None for is_tensor in tensors]
    trees = pytree.tree_unflatten(named, spec)
    trees = {name: tree for name, tree in trees.items() if pytree.tree_leaves(tree) != [None]}
    described = _described(trees)
    if described is not None and not all(isinstance(tree, str) for tree in trees.values()):
        model.metadata_props[INPUTS_KEY] = json.dumps(described, ensure_ascii=False)


def _described(tree: Any) -> Any:
    """A tree of output names as JSON; ``None`` where it holds what cannot be noted."""
    if isinstance(tree, str):
        return tree
    kind, keys, parts, name = "", None, [], ""
    if isinstance(tree, Mapping):
        kind, keys, parts = "dict", list(tree), list(tree.values())
        if type(tree) is not dict:
            kind, name = "object", _path_of(type(tree))
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind, keys, parts, name = "named", list(tree._fields), list(tree), _path_of(type(tree))
    elif is_dataclass(tree) and not isinstance(tree, type):
        kind, keys, name = "fields", [f.name for f in fields(tree)], _path_of(type(tree))
        parts = [getattr(tree, key) for key in keys]
    elif isinstance(tree, list | tuple):
        kind, parts = ("list" if isinstance(tree, list) else "tuple"), list(tree)
    described = [None if part is None else _described(part) for part in parts]
    lost = any(
        found is None and part is not None for found, part in zip(described, parts, strict=True)
    )
    if not kind or lost or any(type(key) not in _PLAIN for key in keys or ()):
        return None
    inside = described if keys is None else [list(p) for p in zip(keys, described, strict=True)]
    return {kind: inside, **({"class": name} if name else {})}


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def restore_structure(net: fx.GraphModule, model: ir.Model) -> None:
    """Let a network give its results as the exported one gave them.

    Left as it is where nothing is noted, or what is noted does not fit the outputs that are there.
    """
    names = [value.name or "" for value in model.graph.outputs]
    (output,) = net.graph.find_nodes(op="output")
    given = output.args[0]
    results = dict(zip(names, given if isinstance(given, tuple) else (given,), strict=True))
    try:
        described = json.loads(model.metadata_props.get(OUTPUTS_KEY, "null"))
        fits = set(_names(described)) == set(names)
    except (ValueError, TypeError, RecursionError):
        return
    if not fits:
        return
    with net.graph.inserting_before(output):
        output.args = (_restored(described, results, net.graph),)
    net.recompile()


def restore_arguments(net: fx.GraphModule, model: ir.Model) -> None:
    """Let a network take its arguments as the exported one took them.

    Left as it is where nothing is noted, or what is noted does not fit the inputs that are there.
    """
    given = net.graph.find_nodes(op="placeholder")
    names = [value.name or "" for value in model.graph.inputs if value.const_value is None]
    try:
        described = json.loads(model.metadata_props.get(INPUTS_KEY, "null"))
        kind, arguments = _kind(described)
        fits = kind == "dict" and list(_names(described)) == names
    except (ValueError, TypeError, RecursionError):
        return
    if not fits or len(given) != len(names):
        return
    tensors = dict(zip(names, given, strict=True))
    kept = [str(tensors[part].target) for _, part in arguments if isinstance(part, str)]
    whole = {as_argument(str(name)): part for name, part in arguments if not isinstance(part, str)}
    if len(whole) + len(kept) != len(arguments) or whole.keys() & set(kept):
        return
    for name, part in whole.items():
        first = next(_names(part), None)
        if first is None:
            continue
        with net.graph.inserting_before(tensors[first]):
            argument = net.graph.placeholder(name)
        with net.graph.inserting_before(given[-1].next):
            _taken_apart(net.graph, argument, part, tensors)
    for name in names:
        if not any(name == part for _, part in arguments):
            net.graph.erase_node(tensors[name])
    net.recompile()


def arguments_of(model: ir.Model, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name as the exported network took them; ``None`` where nothing fits is noted.

    Args:
        model: a model.
        tensors: what its inputs are, by name.
    """
    try:
        described = json.loads(model.metadata_props.get(INPUTS_KEY, "null"))
        kind, arguments = _kind(described)
        if kind != "dict" or list(_names(described)) != list(tensors):
            return None
    except (ValueError, TypeError, RecursionError):
        return None
    return {str(name): _restored(part, tensors, None) for name, part in arguments}


def _taken_apart(
    graph: fx.Graph, whole: fx.Node, described: Any, tensors: Mapping[str, fx.Node]
) -> None:
    """Read the tensors of a structure, in the place of arguments of their own."""
    if isinstance(described, str):
        tensors[described].replace_all_uses_with(whole)
    elif described is not None:
        kind, parts = _kind(described)
        keyed = kind in ("dict", "object", "fields")
        for k, part in enumerate(parts):
            inside = part[1] if keyed or kind == "named" else part
            if any(True for _ in _names(inside)):
                read = getattr if kind == "fields" else operator.getitem
                item = graph.call_function(read, (whole, part[0] if keyed else k))
                _taken_apart(graph, item, inside, tensors)


def _names(described: Any) -> Iterator[str]:
    """The outputs that a description names.

    Raises:
        ValueError: it is no description.
    """
    if isinstance(described, str):
        yield described
    elif described is not None:
        kind, parts = _kind(described)
        for part in parts:
            yield from _names(part[1] if kind in ("dict", *_NAMED) else part)


def _kind(described: Any) -> tuple[str, list[Any]]:
    if not isinstance(described, dict):
        raise ValueError("a structure is a string, null or an object")
    for kind in ("list", "tuple", "dict", *_NAMED):
        parts = described.get(kind)
        if isinstance(parts, list):
            keyed = kind in ("dict", *_NAMED)
            if keyed and not all(
                isinstance(p, list) and len(p) == 2 and type(p[0]) in _PLAIN for p in parts
            ):
                break
            if kind in _NAMED and not all(
                isinstance(p[0], str) and (kind == "object" or p[0].isidentifier()) for p in parts
            ):
                break
            return kind, parts
    raise ValueError("a structure of no known kind")


def _restored(described: Any, results: Mapping[str, Any], graph: fx.Graph | None) -> Any:
    """A described structure of results: of a graph's nodes, or of what they are."""
    if described is None:
        return None
    if isinstance(described, str):
        return results[described]
    kind, parts = _kind(described)
    if kind in ("list", "tuple"):
        inside = [_restored(part, results, graph) for part in parts]
        return inside if kind == "list" else tuple(inside)
    keys = [part[0] for part in parts]
    values = [_restored(part[1], results, graph) for part in parts]
    if kind == "dict":
        return dict(zip(keys, values, strict=True))
    function = {"object": as_object, "named": as_named_tuple, "fields": as_dataclass}[kind]
    path = str(described.get("class", ""))
    if graph is None:
        return function(path, tuple(keys), tuple(values))
    return graph.call_function(function, (path, tuple(keys), tuple(values)))


class Record(dict[str, Any]):
    """A dict whose entries are attributes, too: in the place of a class that is not there.

    >>> Record(logits=1).logits
    1
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no result is called '{name}'; there are {', '.join(self)}")


pytree.register_pytree_node(
    Record,
    lambda record: (list(record.values()), list(record)),
    lambda values, keys: Record(zip(keys, values, strict=True)),
    serialized_type_name="morphgraph.Record",
)


@as_one_node
def as_object(path: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
    """Named results as an object of the class at ``module:name``, where torch knows it."""
    fields = dict(zip(keys, values, strict=True))
    cls = _known_class(path)
    if cls is not None and cls in pytree.SUPPORTED_NODES and issubclass(cls, dict):
        return cls(**fields) if all(key.isidentifier() for key in keys) else cls(fields)
    return Record(fields)


@as_one_node
def as_dataclass(path: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
    """The same as a dataclass, where torch knows that one and it is made of these fields."""
    cls = _known_class(path)
    if cls is None or cls not in pytree.SUPPORTED_NODES or not is_dataclass(cls):
        return Record(zip(keys, values, strict=True))
    made = [field.name for field in fields(cls) if field.init]
    if made != list(keys):
        return Record(zip(keys, values, strict=True))
    return cls(*values)


@as_one_node
def as_named_tuple(path: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
    """The same as a named tuple, of that class if it is loaded."""
    cls = _known_class(path)
    known = cls is not None and issubclass(cls, tuple)
    if cls is None or not known or getattr(cls, "_fields", None) != tuple(keys):
        name = path.rpartition(":")[2].rpartition(".")[2]
        return namedtuple(name if name.isidentifier() else "Results", keys)(*values)
    return cls(*values)


def _known_class(path: str) -> type | None:
    """The class at ``module:name`` in what is imported already."""
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
