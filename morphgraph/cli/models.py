"""Opening models for commands: errors name the file, steps are timed, doubts are said."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from morphgraph.cli.console import step
from morphgraph.errors import MorphError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, load
from morphgraph.passes.lift import lift
from morphgraph.passes.score import not_finite
from morphgraph.plans import Plan

Shapes = Iterable[tuple[str, tuple[int, ...]]]

_SHOWN = 5


@contextmanager
def naming(path: Path, kind: type[MorphError] = MorphError) -> Iterator[None]:
    """Errors of this kind begin with the file that they are about."""
    try:
        yield
    except kind as error:
        raise type(error)(f"{escape(str(path))}: {error}") from error


def open_graph(path: Path, input_shapes: Shapes = ()) -> ChannelGraph:
    """Load a file and lift it.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or the model in it is broken; names the file.
    """
    with step(f"loading {path.name}"):
        model = load(path)
    with step(f"lifting {path.name}"), naming(path):
        return lift(model, input_shapes=dict(input_shapes))


def open_plan(path: Path, graph: ChannelGraph) -> Plan:
    """Load a plan that fits a model.

    Raises:
        FileError: there is no such file, or it cannot be read.
        PlanError: the file is no plan, or one for another model; names the file.
    """
    plan = Plan.load(path)
    with naming(path):
        plan.kept(graph)
    return plan


def warn_of_weights(path: Path, graph: ChannelGraph) -> list[str]:
    """Warn of weights that are NaN or infinite; returns the tensors' names."""
    broken = list(not_finite(graph))
    if broken:
        warnings.warn(
            f"{escape(str(path))}: NaN or infinite weights in {some(broken)}; repair or retrain "
            "the model, whatever it computes is not a number",
            MorphWarning,
            stacklevel=2,
        )
    return broken


def some(names: list[str]) -> str:
    """The first few of many names, as they may stand in a message."""
    shown = ", ".join(f"'{escape(name)}'" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
