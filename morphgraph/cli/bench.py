"""``morphgraph bench``: which model is faster, and how sure that is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import duration, note, settings, show, step, suggest
from morphgraph.cli.following import shape_words, tell_intention, unused
from morphgraph.cli.models import Lifting, fixed_alike, open_graph
from morphgraph.cli.shared_options import DryRun, FixedInputs, InputShapes, Ops, OutputFormat, Seed
from morphgraph.errors import FileError, MorphError
from morphgraph.options import option
from morphgraph.words import escape, with_options

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.benchmark import BenchResult, Structure
    from morphgraph.graph import ChannelGraph


def counts(text: str) -> tuple[int, ...]:
    """The numbers in ``1,8``.

    >>> counts("1,8")
    (1, 8)
    """
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise click.BadParameter(f"'{text}' is no list of numbers from 1; write 1 or 1,8")
    return tuple(map(int, text.split(",")))


@command
def bench(
    models: tuple[Path, ...],
    *,
    runtime: Annotated[
        tuple[str, ...],
        option(
            "Where the models run: ort, ort:cuda, openvino, or module:Class of your own; may be "
            "repeated.",
            metavar="NAME",
        ),
    ] = ("ort",),
    threads: Annotated[
        tuple[int, ...],
        option(
            "Threads within an operator. CPU time is measured at one, wall time at more. Several "
            "are measured one after the other.",
            type=counts,
            multiple=False,
            default="1",
            metavar="N[,N...]",
        ),
    ] = (1,),
    seconds: Annotated[float, option("How long every model runs.", gt=0, metavar="S")] = 5.0,
    batch: Annotated[
        tuple[int, ...] | None,
        option(
            "The batch, for models that leave it open; several are measured one after the other.",
            type=counts,
            multiple=False,
            metavar="N[,N...]",
        ),
    ] = None,
    profile: Annotated[
        bool, option("Show where the time went: by kind of operator, and by layer.")
    ] = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    input_shapes: InputShapes = (),
    fixed: FixedInputs = (),
    ops: Ops = (),
    output_format: OutputFormat = "table",
) -> None:
    """Time models side by side in ONNX Runtime, or in others.

    The models take turns on the same random inputs; every one is compared with the first. Of
    folders that hold one network in several files each file is timed beside those of its name.
    """
    from morphgraph.folders.found import model_places
    from morphgraph.report.timing import timing_report

    models = tuple(model_places(models))
    lifting = Lifting(ops=ops, input_shapes=input_shapes, fixed=fixed)
    heats = [(heat, _known(heat)) for heat in _heats(models, lifting)]
    if dry_run:
        took = len([*product(heats, models, runtime, threads, batch or (None,))]) * seconds
        files = f", each of {len(heats)} files" if heats[1:] else ""
        steps = [
            f"time {' and '.join(map(str, models))}{files} in {' and '.join(runtime)} on the same "
            f"inputs, {_settings(threads, batch)}; takes {duration(took)} and more"
        ]
        tell_intention("bench", steps, [], output_format)
        return
    points: list[BenchResult] = []
    try:
        for heat, known in heats:
            points.extend(
                _timed(heat, known, runtime, threads, seconds, batch, seed, profile=profile)
            )
    except MorphError:
        if points:  # a setting that does not run takes nothing from those before it
            show(timing_report(points), output_format)
        raise
    show(timing_report(points), output_format)
    _propose(models, points, replace(lifting, fixed=fixed), profile=profile)


@dataclass(frozen=True)
class _Heat:
    """Models that are timed beside each other.

    Attributes:
        models: their files.
        lifting: how they are lifted.
        part: which file of a network of several they are; empty for models of one.
        names: how to call them.
        shapes: of the inputs of each, where its file is one of several.
        batch: that these have.
    """

    models: Sequence[Path]
    lifting: Lifting
    part: str = ""
    names: Sequence[str] | None = None
    shapes: Sequence[Mapping[str, tuple[int, ...]]] = ()
    batch: int | None = None

    @property
    def where(self) -> str:
        """The beginning of what is said of them."""
        return f"{escape(self.part)}: " if self.part else ""


def _heats(models: Sequence[Path], lifting: Lifting) -> list[_Heat]:
    """What is timed beside each other: all models, or of folders the files of each name."""
    if not models[0].is_dir():
        return [_Heat(models, lifting)]
    from morphgraph.folders.runs import file_runs

    if lifting.fixed:
        raise click.UsageError("--fix is of one file; both networks of a merged decoder are timed")
    given = dict(lifting.input_shapes)
    batch = next((sizes[0] for sizes in given.values() if sizes), None)
    by_model = [{run.name: run for run in file_runs(model, given)} for model in models]
    names = [model.name for model in models]
    found = []
    for part, first in by_model[0].items():
        runs = [by_name[part] for by_name in by_model]
        alone = Lifting(ops=lifting.ops, fixed=tuple(first.fixed.items()))
        shapes = [run.shapes for run in runs]
        found.append(_Heat([run.file for run in runs], alone, part, names, shapes, batch))
        if first.left_open:
            told = _sizes_text({name: first.shapes[name] for name in first.left_open})
            note(f"{found[-1].where}sizes left open, timed at {told}")
    return found


@dataclass(frozen=True)
class _Known:
    """What lifting tells of models that are timed.

    Attributes:
        lifting: how they were lifted: inputs are fixed as any of their files says.
        flops: of each, where all have some.
        structures: of each; of a file that is one of several at least the shapes of its inputs.
        error: why no more is known.
    """

    lifting: Lifting
    flops: "list[float] | None" = None
    structures: "list[Structure] | None" = None
    error: MorphError | None = None


def _known(heat: _Heat) -> _Known:
    """Lift the models; those that nobody can lift are timed all the same."""
    from morphgraph.benchmark import Structure

    lifting = heat.lifting
    try:
        lifting = fixed_alike(heat.models, lifting)
        return _Known(lifting, *_structure(heat, lifting))
    except FileError:
        raise
    except MorphError as error:
        shapes = [Structure({}, (), {}, each) for each in heat.shapes]
        return _Known(lifting, None, shapes or None, error)


def _timed(
    heat: _Heat,
    known: _Known,
    runtimes: Sequence[str],
    threads: Sequence[int],
    seconds: float,
    batch: Sequence[int] | None,
    seed: int,
    *,
    profile: bool,
) -> "Iterator[BenchResult]":
    """The times of models at every number of threads and size of the batch."""
    from morphgraph.benchmark import bench as time_models

    lifting, unknown = known.lifting, known.error
    try:
        for count, size in product(threads, batch or (heat.batch,)):
            with step(f"timing {heat.part}".rstrip(), len(heat.models) * len(runtimes) * seconds):
                point = time_models(
                    heat.models,
                    runtimes=runtimes,
                    threads=count,
                    seconds=seconds,
                    batch=size,
                    seed=seed,
                    flops=known.flops,
                    input_shapes=dict(lifting.input_shapes),
                    fixed=dict(lifting.fixed),
                    profile=profile,
                    structures=known.structures,
                    names=heat.names,
                )
            yield replace(point, part=heat.part)
    except FileError:
        raise
    except MorphError as error:  # often the runtime's words; ours name node and remedy
        raise unknown or error from error
    if unknown is not None:
        note(f"{heat.where}no FLOPs beside the times: {unknown}")


def _settings(threads: Sequence[int], batch: Sequence[int] | None) -> str:
    at = f"at {' and '.join(map(str, threads))} thread{'s' * (max(threads) > 1)}"
    return at if batch is None else f"{at}, in batches of {' and '.join(map(str, batch))}"


def _propose(
    models: Sequence[Path], points: "Sequence[BenchResult]", lifting: Lifting, *, profile: bool
) -> None:
    """The next command: where the time went if nothing is gained, else all of it as a page."""
    first, last = models[0], models[-1]
    if len(models) == 1:
        suggest("analyze", first, "--by", "layer", *shape_words(lifting))
        return
    interval = points[0].models[-1].speedup_interval
    if not profile and interval is not None and interval[0] <= 1:
        suggest(*with_options(settings().arguments, "--profile"))
        return
    suggest("report", first, last, *shape_words(lifting), "-o", unused("report.html"))


def _structure(heat: _Heat, lifting: Lifting) -> "tuple[list[float] | None, list[Structure]]":
    """FLOPs, where all models have some, and layers of every model."""
    from morphgraph.benchmark import structure_of
    from morphgraph.passes.analysis.cost import cost

    if heat.shapes:
        graphs = [
            open_graph(model, replace(lifting, input_shapes=tuple(shapes.items())))
            for model, shapes in zip(heat.models, heat.shapes, strict=True)
        ]
    else:
        graphs = list(_as_one_takes(heat.models, lifting))
    flops = [cost(graph, "flops").total for graph in graphs]
    return (flops if min(flops) > 0 else None), [structure_of(graph) for graph in graphs]


def _as_one_takes(models: Sequence[Path], lifting: Lifting) -> "Iterator[ChannelGraph]":
    """The models, lifted at sizes of open inputs that the first one with such an input has."""
    from morphgraph.onnx_io import static_shape

    taken: dict[str, tuple[int, ...]] = {}  # as the models before have it
    told: dict[str, tuple[int, ...]] = {}
    for model in models:
        graph = open_graph(model, lifting)
        names = [value.name or "" for value in graph.model.graph.inputs if _open_axes(value) - {0}]
        others = _as_before(graph, taken, lifting)
        if others:
            shapes = (*lifting.input_shapes, *others.items())
            graph = open_graph(model, replace(lifting, input_shapes=shapes))
        for value in graph.model.graph.inputs:
            taken.setdefault(value.name or "", static_shape(value))
        told |= {name: taken[name] for name in names if name not in dict(lifting.input_shapes)}
        yield graph
    if told:
        note(f"sizes left open, timed as `analyze` counts them: {_sizes_text(told)}")


def _sizes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """Shapes of inputs as ``--input-shape`` takes them; of many alike the first is named.

    >>> _sizes_text({"ids": (2, 8), "past.0": (2, 4, 8, 3), "past.1": (2, 4, 8, 3)})
    'ids=Nx8, past.0=Nx4x8x3 (and 1 more)'
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault(tuple(shape[1:]), []).append(name)
    return ", ".join(
        f"{escape(names[0])}=Nx{'x'.join(map(str, sizes))}"
        + (f" (and {len(names) - 1} more)" if names[1:] else "")
        for sizes, names in alike.items()
    )


def _as_before(
    graph: "ChannelGraph", taken: Mapping[str, tuple[int, ...]], lifting: Lifting
) -> dict[str, tuple[int, ...]]:
    """The shapes of inputs that are timed at sizes of models before, and counted at others now."""
    from morphgraph.onnx_io import static_shape

    found = {}
    for value in graph.model.graph.inputs:
        name, counted = value.name or "", static_shape(value)
        before = taken.get(name, counted)
        if name in dict(lifting.input_shapes) or len(before) != len(counted):
            continue
        timed = tuple(
            other if axis and axis in _open_axes(value) else size
            for axis, (size, other) in enumerate(zip(counted, before, strict=True))
        )
        if timed != counted:
            found[name] = timed
    return found


def _open_axes(value: "ir.Value") -> set[int]:
    return {axis for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)}
