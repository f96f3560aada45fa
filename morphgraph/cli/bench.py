"""``morphgraph bench``: which model is faster, and how sure that is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

    The models take turns on the same random inputs; every one is compared with the first.
    """
    from morphgraph.benchmark import bench as time_models
    from morphgraph.folders.found import model_file
    from morphgraph.report.timing import timing_report

    models = tuple(map(model_file, models))
    lifting = Lifting(ops=ops, input_shapes=input_shapes, fixed=fixed)
    flops: list[float] | None = None
    structures: list[Structure] | None = None
    unknown: MorphError | None = None
    try:
        lifting = fixed_alike(models, lifting)
        flops, structures = _structure(models, lifting)
    except FileError:
        raise
    except MorphError as error:
        unknown = error
    if dry_run:
        runs = [*product(threads, batch or (None,))]
        took = len(runs) * len(models) * len(runtime) * seconds
        steps = [
            f"time {' and '.join(map(str, models))} in {' and '.join(runtime)} on the same inputs, "
            f"{_settings(threads, batch)}; takes {duration(took)} and more"
        ]
        tell_intention("bench", steps, [], output_format)
        return
    points = []
    try:
        for count, size in product(threads, batch or (None,)):
            with step("timing", len(models) * len(runtime) * seconds):
                point = time_models(
                    models,
                    runtimes=runtime,
                    threads=count,
                    seconds=seconds,
                    batch=size,
                    seed=seed,
                    flops=flops,
                    input_shapes=dict(input_shapes),
                    fixed=dict(lifting.fixed),
                    profile=profile,
                    structures=structures,
                )
            points.append(point)
    except FileError:
        raise
    except MorphError as error:  # often the runtime's words; ours name node and remedy
        raise unknown or error from error
    if unknown is not None:
        note(f"no FLOPs beside the times: {unknown}")
    show(timing_report(points), output_format)
    _propose(models, points, replace(lifting, fixed=fixed), profile=profile)


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


def _structure(
    models: Sequence[Path], lifting: Lifting
) -> "tuple[list[float] | None, list[Structure]]":
    """FLOPs, where all models have some, and layers of every model."""
    from morphgraph.benchmark import structure_of
    from morphgraph.onnx_io import static_shape
    from morphgraph.passes.analysis.cost import cost

    graphs: list[ChannelGraph] = []
    taken: dict[str, tuple[int, ...]] = {}  # as the models before have it
    told: dict[str, None] = {}
    for model in models:
        graph = open_graph(model, lifting)
        names = [value.name or "" for value in graph.model.graph.inputs if _open_axes(value) - {0}]
        others = _as_before(graph, taken, lifting)
        if others:
            shapes = (*lifting.input_shapes, *others.items())
            graph = open_graph(model, replace(lifting, input_shapes=shapes))
        graphs.append(graph)
        for value in graph.model.graph.inputs:
            taken.setdefault(value.name or "", static_shape(value))
        for name in names:
            if name not in dict(lifting.input_shapes):
                told[f"{escape(name)}=Nx{'x'.join(map(str, taken[name][1:]))}"] = None
    if told:
        note(f"sizes left open, timed as `analyze` counts them: {', '.join(told)}")
    flops = [cost(graph, "flops").total for graph in graphs]
    return (flops if min(flops) > 0 else None), [structure_of(graph) for graph in graphs]


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
