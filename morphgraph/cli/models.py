"""Opening models for commands: errors name the file, steps are timed, weights are checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from morphgraph.cli.console import step
from morphgraph.cli.shared_options import FixedInputs, InputShapes, Ops
from morphgraph.errors import MorphError, PlanError, warn
from morphgraph.options import Attention, option
from morphgraph.words import escape

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.graph import ChannelGraph, LiftOptions
    from morphgraph.onnx_io.inputs import FileArrays
    from morphgraph.passes.planning.nested import Ranking
    from morphgraph.plans import Plan

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Lifting:
    """How the user wants models lifted; ``None`` and no shapes where a plan, or the default, says.

    Attributes:
        ops: Python files that teach operators; they have run already.
        attention: whether attentions shrink by ``"heads"``, ``"query-heads"``, ``"head-dim"`` or
            ``"all"``.
        input_shapes: sizes of inputs that files leave open.
        fixed: values that inputs are fixed to.
    """

    ops: Ops = ()
    attention: Annotated[
        Attention | None,
        option(
            "Shrink attentions by whole heads (the default; of keys and values, with the query "
            "heads that share them), by query heads within these groups, by the size of every "
            "head, or by all of these under one budget. A plan remembers the choice."
        ),
    ] = None
    input_shapes: InputShapes = ()
    fixed: FixedInputs = ()


@contextmanager
def naming(
    path: Path, errors: type[MorphError] | tuple[type[MorphError], ...] = MorphError
) -> Iterator[None]:
    """Errors of these types begin with the file that they are about."""
    try:
        yield
    except errors as error:
        raise type(error)(f"{escape(str(path))}: {error}") from error


def open_model(path: Path) -> "ir.Model":
    """The model of an ONNX file or of the one in a folder, or that of all files of a folder.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or the model in it is broken; names the file.
    """
    from morphgraph.folders.found import model_place
    from morphgraph.onnx_io import load

    place = model_place(path)
    if not place.is_dir():
        return load(place)
    from morphgraph.folders.parts import load_place

    return load_place(place)


def open_inputs(path: Path | None) -> "list[FileArrays] | None":
    """The sets of inputs in a file or folder that the user named."""
    from morphgraph.onnx_io.inputs import read_inputs

    return None if path is None else read_inputs(path)


_BY_DEFAULT = Lifting()


def open_graph(
    path: Path,
    lifting: Lifting = _BY_DEFAULT,
    *,
    pin_outputs: bool = True,
    pin_rows: bool = True,
) -> "ChannelGraph":
    """Load a file and lift it; graph outputs and rows of tables stay, or may go.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or the model in it is broken; names the file.
    """
    from morphgraph.graph import LiftOptions

    options = LiftOptions(
        attention=lifting.attention or "heads",
        pin_outputs=pin_outputs,
        pin_rows=pin_rows,
        input_shapes=dict(lifting.input_shapes),
        fixed=dict(lifting.fixed),
    )
    return _lift(path, options)


def open_planned(
    path: Path, plan_path: Path, lifting: Lifting = _BY_DEFAULT
) -> "tuple[ChannelGraph, Plan]":
    """Load a plan, and the model that it is for, lifted as it was when the plan was made.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or the model in it is broken; names the file.
        PlanError: the file is no plan, or one for another model; names the file.
    """
    from msgspec import structs

    from morphgraph.plans import Plan

    plan = Plan.load(plan_path)
    made = plan.model.lift
    if lifting.attention not in (None, made.attention):
        raise PlanError(
            f"{escape(str(plan_path))}: was made with --attention {made.attention}; leave "
            f"--attention out, or make a plan with --attention {lifting.attention}"
        )
    shapes = dict(lifting.input_shapes) or made.input_shapes
    shaped_by = None if lifting.input_shapes else plan_path
    options = structs.replace(made, input_shapes=shapes, fixed=made.fixed | dict(lifting.fixed))
    graph = _lift(path, options, shaped_by)
    with naming(plan_path):
        plan.keep_channels(graph)
    return graph, plan


def fixed_alike(models: Sequence[Path], lifting: Lifting) -> Lifting:
    """How models are lifted that stand beside each other: inputs fixed as any of their files says.

    So a file whose input chooses between networks is compared as the one that a resized file holds.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: a file is broken.
    """
    from morphgraph.onnx_io.fixed import fixed_values

    found: dict[str, Any] = {}
    taken: list[set[str]] = []
    for path in models if len(models) > 1 else ():
        model = open_model(path)
        own = fixed_values(model)
        taken.append({*own, *(value.name or "" for value in model.graph.inputs)})
        found |= own
    alike = {name: value for name, value in found.items() if all(name in each for each in taken)}
    return replace(lifting, fixed=tuple((alike | dict(lifting.fixed)).items()))


def open_ranked(
    path: Path, ranking_path: Path, lifting: Lifting = _BY_DEFAULT
) -> "tuple[ChannelGraph, Ranking]":
    """Load a ranking, and the model that it is of, lifted as it was when the ranking was made.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or the model in it is broken; names the file.
        PlanError: the file is no ranking, or one of another model; names the file.
    """
    from msgspec import structs

    from morphgraph.passes.planning.nested import Ranking

    ranking = Ranking.load(ranking_path)
    made = ranking.model.lift
    attention = lifting.attention or made.attention
    shapes = dict(lifting.input_shapes) or made.input_shapes
    fixed = made.fixed | dict(lifting.fixed)
    options = structs.replace(made, attention=attention, input_shapes=shapes, fixed=fixed)
    graph = _lift(path, options, None if lifting.input_shapes else ranking_path)
    with naming(ranking_path):
        ranking.model.check(graph)
    return graph, ranking


def _lift(path: Path, options: "LiftOptions", shaped_by: Path | None = None) -> "ChannelGraph":
    """Load a file and lift it, at sizes of inputs that the user gave, or this file says."""
    from morphgraph.onnx_io import bind_inputs
    from morphgraph.passes.lift import lift

    with step(f"loading {path.name}"):
        model = open_model(path)
    if shaped_by is not None and options.input_shapes:
        with naming(shaped_by):
            bind_inputs(model, options.input_shapes)  # what does not fit is the file's
    with step(f"lifting {path.name}"), naming(path):
        return lift(model, **options.arguments())


def warn_of_weights(path: Path, graph: "ChannelGraph") -> list[str]:
    """Warn of weights that are NaN or infinite; returns the tensors' names."""
    from morphgraph.onnx_io import not_finite

    broken = list(not_finite(graph.model))
    if broken:
        warn(
            f"{escape(str(path))}: NaN or infinite weights in {some(broken)}; repair or retrain "
            "the model, whatever it computes is not a number",
        )
    return broken


def some(names: list[str]) -> str:
    """The first few of many names, escaped for a message."""
    shown = ", ".join(f"'{escape(name)}'" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
