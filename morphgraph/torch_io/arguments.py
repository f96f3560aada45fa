"""The arguments of a network's forward, and what the inputs of its model are called."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape

BATCH = "batch"
"""What the open first size of inputs is called."""


class Call(NamedTuple):
    """Arguments of a forward by position and by name, in the order of its signature."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def call_of(net: nn.Module, example: Any) -> Call:
    """The example as arguments: by position as far as it gives all, by name from there on."""
    if isinstance(example, torch.Tensor):
        return Call((example,), {})
    if not isinstance(example, Mapping):
        return Call(tuple(example), {})
    parameters = inspect.signature(net.forward).parameters
    of = inspect.Parameter
    kinds = {name: p.kind for name, p in parameters.items()}
    places = [name for name, kind in kinds.items() if kind is of.POSITIONAL_OR_KEYWORD]
    by_name = [name for name, kind in kinds.items() if kind is of.KEYWORD_ONLY]
    leading = list(takewhile(lambda name: name in example, places))
    others = [name for name in example if name not in places and name not in by_name]
    unknown = [] if of.VAR_KEYWORD in kinds.values() else others
    absent = [
        name
        for name in (*places, *by_name)
        if name not in example and parameters[name].default is of.empty
    ]
    if unknown or absent:
        wrong = [f"'{escape(name)}' cannot be given" for name in unknown]
        wrong += [f"'{name}' is missing" for name in absent]
        raise UnsupportedError(
            f"network {type(net).__name__}: of the example's arguments {', '.join(wrong)}; its "
            f"forward takes {', '.join((*places, *by_name)) or 'none'}; a dict that is itself an "
            "argument is given as (dict,)"
        )
    rest = (*places[len(leading) :], *by_name, *others)
    return Call(
        tuple(example[name] for name in leading),
        {name: example[name] for name in rest if name in example},
    )


def dynamic_batch_of(net: nn.Module, call: Call) -> Any:
    """The first size of every tensor open, said as ``torch.export`` wants it."""
    if not call.keywords:
        return pytree.tree_map(first_axis_dynamic, call.arguments)
    bound = inspect.signature(net.forward).bind(*call.arguments, **call.keywords)
    return pytree.tree_map(first_axis_dynamic, dict(bound.arguments))


def at_least_two(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with its sample twice where it has one: 1 is exported as a size that is fixed."""
    if tensor.ndim == 0 or tensor.shape[0] != 1:
        return tensor
    return torch.cat([tensor, tensor])


def input_names_of(
    net: nn.Module, arguments: Mapping[str, Any], given: Sequence[str] | None
) -> list[str]:
    """One name per tensor: the given one, or what its argument is called; each only once.

    Raises:
        UnsupportedError: a given name is there twice.
    """
    names: list[str] = []
    for name in given or _tensor_names(arguments):
        unique = name
        while unique in names:
            unique += "_"
        if given and unique != name:
            raise UnsupportedError(
                f"network {type(net).__name__}: two inputs are called '{escape(name)}'; give each "
                "a name of its own"
            )
        names.append(unique)
    return names


def named_arguments(net: nn.Module, call: Call) -> dict[str, Any]:
    """Arguments by the names of the forward's parameters, or by their number."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional]
    names += [f"input_{index}" for index in range(len(names), len(call.arguments))]
    return {**dict(zip(names, call.arguments, strict=False)), **call.keywords}


def _tensor_names(arguments: Mapping[str, Any]) -> list[str]:
    """Per tensor what its argument is called; in a structure with its key or number behind it."""
    return [
        "_".join([name, *(str(key_of(place)) for place in path)])
        for name, argument in arguments.items()
        for path, leaf in pytree.tree_flatten_with_path(argument)[0]
        if isinstance(leaf, torch.Tensor)
    ]


def key_of(place: Any) -> Any:
    """The key, name or number of one step into a structure."""
    return next(getattr(place, kind) for kind in ("key", "idx", "name") if hasattr(place, kind))


def first_axis_dynamic(argument: Any) -> Any:
    """The open sizes of one argument as ``torch.export`` wants them; ``None``: it has no axes."""
    if isinstance(argument, torch.Tensor) and argument.ndim > 0:
        return {0: torch.export.Dim.DYNAMIC}
    return None
