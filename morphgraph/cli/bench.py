"""``morphgraph bench``: which model is faster, and how sure that is."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import click

from morphgraph.benchmark import (
    BenchResult,
    BenchSweep,
    Convolutions,
    ModelTiming,
    Profile,
    Structure,
    TimeRow,
    bench as time_models,
    structure_of,
)
from morphgraph.cli.command import command
from morphgraph.cli.console import note, show
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.shared_options import InputShapes, Ops, OutputFormat, Seed
from morphgraph.errors import FileError, MorphError
from morphgraph.folders.found import model_file
from morphgraph.options import option
from morphgraph.passes.analysis.cost import cost
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    number_column,
    plain,
    share,
    table_of,
)

_LAYERS_SHOWN = 12
_KINDS_SHOWN = 3
_WORTH_SHOWING = 0.005  # of a network's time


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
    input_shapes: InputShapes = (),
    ops: Ops = (),
    output_format: OutputFormat = "table",
) -> None:
    """Time models side by side in ONNX Runtime, or in others.

    The models take turns on the same random inputs; every one is compared with the first.
    """
    del ops  # they have run already
    models = tuple(map(model_file, models))
    flops: list[float] | None = None
    structures: list[Structure] | None = None
    unknown: MorphError | None = None
    try:
        flops, structures = _structure(models, Lifting(input_shapes=input_shapes))
    except FileError:
        raise
    except MorphError as error:
        unknown = error
    try:
        points = [
            time_models(
                models,
                runtimes=runtime,
                threads=count,
                seconds=seconds,
                batch=size,
                seed=seed,
                flops=flops,
                input_shapes=dict(input_shapes),
                profile=profile,
                structures=structures,
            )
            for count, size in product(threads, batch or (None,))
        ]
    except FileError:
        raise
    except MorphError as error:  # often the runtime's words; ours name node and remedy
        raise unknown or error from error
    if unknown is not None:
        note(f"no FLOPs beside the times: {unknown}")
    show(_report(points), output_format)


def _structure(
    models: Sequence[Path], lifting: Lifting
) -> tuple[list[float] | None, list[Structure]]:
    """FLOPs, where all models have some, and layers of every model."""
    graphs = [open_graph(model, lifting) for model in models]
    flops = [cost(graph, "flops").total for graph in graphs]
    return (flops if min(flops) > 0 else None), [structure_of(graph) for graph in graphs]


def _report(points: Sequence[BenchResult]) -> Report:
    first = points[0]
    if len(points) == 1:
        title = f"{_clock(first)} in ms, {first.threads} thread(s) per operator"
        return Report(first, [_times(points, title), *_profiles(first)], foot=[first.verdict])
    tables = [_times(points, "times in ms")]
    for point in points:
        tables += _profiles(point, f"{_point(point)}: ")
    sweep = BenchSweep(tuple(points))
    return Report(sweep, tables, foot=[f"{_point(point)}: {point.verdict}" for point in points])


def _clock(result: BenchResult) -> str:
    return "CPU time" if result.clock == "cpu" else "wall time"


def _point(result: BenchResult) -> str:
    """Which point of a sweep a result is."""
    batch = "" if result.batch is None else f", batch {result.batch}"
    return f"{result.threads} thread(s){batch}"


_Row = tuple[BenchResult, ModelTiming]


def _times(points: Sequence[BenchResult], title: str) -> Table:
    rows: list[_Row] = [(point, timing) for point in points for timing in point.models]
    several = len({timing.runtime for _, timing in rows}) > 1
    columns: list[tuple[Column | str, Callable[[_Row], Cell]] | None] = [
        ("model", lambda row: row[1].name),
        ("runtime", lambda row: row[1].runtime) if several else None,
        (number_column("threads", plain), lambda row: row[0].threads) if points[1:] else None,
        (number_column("batch", plain), lambda row: row[0].batch) if points[1:] else None,
        ("clock", lambda row: row[0].clock) if points[1:] else None,
        (number_column("min", _decimal), lambda row: row[1].min_ms),
        (number_column("p50", _decimal), lambda row: row[1].p50_ms),
        (number_column("p90", _decimal), lambda row: row[1].p90_ms),
        (number_column("p99", _decimal), lambda row: row[1].p99_ms),
        (number_column("runs", plain), lambda row: row[1].runs),
        (number_column("cv", share), lambda row: row[1].cv),
        (number_column("speed-up", _decimal), lambda row: row[1].speedup),
        ("95 %", lambda row: _interval(row[1].speedup_interval)),
        (number_column("FLOPs ratio", _decimal), lambda row: row[1].flops_ratio),
        ("convs out of blocks", lambda row: _outside(row[1].convolutions)),
        ("note", lambda row: "unstable" if row[1].unstable else None),
    ]
    return table_of(rows, *filter(None, columns), title=title)


def _outside(convolutions: Convolutions | None) -> str | None:
    if convolutions is None:
        return None
    return f"{len(convolutions.outside)} of {convolutions.count}"


def _interval(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _decimal(value: Cell) -> str:
    return f"{value:.3f}" if isinstance(value, float) else plain(value)


def _profiles(result: BenchResult, prefix: str = "") -> list[Table]:
    return [table for one in result.profiles for table in _profile(one, prefix)]


def _profile(profile: Profile, prefix: str) -> list[Table]:
    """Where the time went: kinds of kernels, then the layers that hold most of what was missed."""
    total = max(profile.before_ms, profile.after_ms)
    worth = [
        row
        for row in profile.layers
        if (row.after_ms if profile.base is None else row.missed_ms) >= _WORTH_SHOWING * total
    ]
    shown, rest = worth[:_LAYERS_SHOWN], len(profile.layers) - len(worth[:_LAYERS_SHOWN])
    behind = f" ({rest} more in the JSON)" if rest else ""
    if profile.base is None:
        head = f"{prefix}{profile.model} in {profile.runtime}: ms"
        return [
            table_of(
                profile.kinds,
                ("kernel", lambda row: row.name),
                (number_column("runs", plain), lambda row: sum(row.after.values())),
                *_alone(profile),
                title=f"{head} by kind",
            ),
            table_of(
                shown,
                ("layer", lambda row: row.name),
                *_alone(profile),
                ("kernels", lambda row: _kinds(row.after)),
                title=f"{head} by layer{behind}",
            ),
        ]
    head = f"{prefix}{profile.model} against {profile.base} in {profile.runtime}: ms"
    kinds = table_of(
        profile.kinds,
        ("kernel", lambda row: row.name),
        ("runs", lambda row: f"{sum(row.before.values())} -> {sum(row.after.values())}"),
        *_BEFORE_AFTER,
        title=f"{head} by kind",
    )
    if not shown:
        return [kinds]
    layers = table_of(
        shown,
        ("layer", lambda row: row.name),
        *_BEFORE_AFTER,
        (number_column("time left", share), lambda row: _left(row.before_ms, row.after_ms)),
        (number_column("FLOPs left", share), lambda row: _left(row.flops_before, row.flops_after)),
        (number_column("missed", _decimal), lambda row: row.missed_ms),
        ("kernels", _change),
        title=f"{head} by layer, most missed of what FLOPs promised first{behind}",
    )
    return [kinds, layers]


_RowColumn = tuple[Column, Callable[[TimeRow], Cell]]

_BEFORE_AFTER: tuple[_RowColumn, ...] = (
    (number_column("before", _decimal), lambda row: row.before_ms),
    (number_column("after", _decimal), lambda row: row.after_ms),
    (number_column("saved", _decimal), lambda row: row.saved_ms),
)


def _alone(profile: Profile) -> tuple[_RowColumn, _RowColumn]:
    return (
        (number_column("time", _decimal), lambda row: row.after_ms),
        (number_column("share", share), lambda row: _left(profile.after_ms, row.after_ms)),
    )


def _left(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def _kinds(kernels: Mapping[str, int]) -> str:
    """The most frequent kinds of kernels.

    >>> _kinds({"Gemm": 1, "Reshape": 2, "Split": 1, "Softmax": 1})
    '2 Reshape + Gemm + Split + 1 more'
    """
    ordered = sorted(kernels.items(), key=lambda item: -item[1])
    texts = [f"{count} {kind}" if count > 1 else kind for kind, count in ordered[:_KINDS_SHOWN]]
    rest = sum(count for _, count in ordered[_KINDS_SHOWN:])
    return " + ".join([*texts, *([f"{rest} more"] if rest else [])])


def _change(row: TimeRow) -> str:
    before, after = _kinds(row.before), _kinds(row.after)
    return after if before == after else f"{before or 'none'} -> {after or 'none'}"
