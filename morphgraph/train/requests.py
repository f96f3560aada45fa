"""What users ask of a training, looked at before it begins."""

import inspect
from collections.abc import Callable, Mapping
from operator import index
from typing import Any, SupportsIndex, get_args

from torch import nn

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import require_budget
from morphgraph.words import did_you_mean, escape


def require_amounts(budget: object) -> None:
    """Refuse what is no mapping of costs to amounts, or of none.

    Raises:
        ArgumentError: says how a budget is written.
    """
    require_budget(budget or None)


def require_steps(steps: object) -> int:
    """The length of a phase as a whole number.

    Raises:
        ArgumentError: it is none, or below 1.
    """
    whole = 0
    if isinstance(steps, SupportsIndex):
        whole = index(steps)
    elif isinstance(steps, float) and steps.is_integer():
        whole = int(steps)
    if whole < 1:
        raise ArgumentError(
            f"steps={escape(repr(steps))}: give the optimizer steps of the phase, a whole number "
            "from 1"
        )
    return whole


def require_schedule(start: float, end: float, interval: int | None) -> None:
    """Refuse a reference that does not fall, or penalties that never come.

    Raises:
        ArgumentError: names what is wrong.
    """
    if not 0 <= start < end <= 1:
        raise ArgumentError(
            f"start={start}, end={end}: give shares of the phase with 0 <= start < end <= 1"
        )
    if interval is not None and interval < 1:
        raise ArgumentError(f"interval={interval}: give training steps, from 1")


def require_one_of(name: str, value: object, choices: Any) -> None:
    """Refuse what is none of a ``Literal``'s words.

    Raises:
        ArgumentError: lists them.
    """
    known = [str(each) for each in get_args(choices)]
    if value not in known:
        meant = did_you_mean(str(value), known)
        raise ArgumentError(
            f"{name}={escape(repr(value))} is unknown{meant}; use one of {', '.join(known)}"
        )


def require_network(graph: object, net: object) -> None:
    """Refuse what is no lifted network, or no module.

    Raises:
        ArgumentError: says how to make one.
    """
    if not isinstance(graph, ChannelGraph):
        raise ArgumentError(
            f"the first argument is a {type(graph).__name__}, no lifted network; give "
            "mg.lift(model), then the module"
        )
    if not isinstance(net, nn.Module):
        raise ArgumentError(
            f"the second argument is a {type(net).__name__}; give the torch.nn.Module that is "
            "trained, whose parameters have the graph's names"
        )


def require_regularizer(given: object, kind: type) -> None:
    """Refuse what is no regularizer.

    Raises:
        ArgumentError: says how to make one.
    """
    if not isinstance(given, kind):
        wanted = f"mg.{kind.__name__}"
        raise ArgumentError(f"a {type(given).__name__} is no {wanted}; give {wanted}(graph, net)")


def require_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a function does not have, long before it is called.

    Raises:
        ArgumentError: names the first, and what was meant.
    """
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            meant = did_you_mean(name, known)
            raise ArgumentError(
                f"{name}= is no option of {function.__qualname__}{meant}; it has "
                f"{', '.join(list(known)[3:])}"
            )
