"""``morphgraph bench``: which model is faster, and how sure that is."""

from collections.abc import Sequence
from pathlib import Path

import click

from morphgraph.benchmark import BenchResult, bench as time_models
from morphgraph.cli.console import note, show
from morphgraph.cli.models import open_graph
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    common,
    format_option,
    input_shape_option,
    ops_option,
    seed_option,
)
from morphgraph.errors import FileError, MorphError
from morphgraph.passes.analysis.cost import cost
from morphgraph.report.tables import Cell, Column, Format, Report, Table, number, plain, share


@click.command()
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Threads within an operator. CPU time is measured at one, wall time at more.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="S",
    help="How long every model runs.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="The batch, for models that leave it open.",
)
@seed_option
@input_shape_option
@ops_option
@format_option
@common
def bench(
    models: tuple[Path, ...],
    threads: int,
    seconds: float,
    batch: int | None,
    seed: int,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    kind: Format,
) -> None:
    """Time models side by side in ONNX Runtime.

    The models take turns on the same random inputs; every one is compared with the first.
    """
    result = time_models(
        models,
        threads=threads,
        seconds=seconds,
        batch=batch,
        seed=seed,
        flops=_flops(models, Lifting(input_shapes)),
        input_shapes=dict(input_shapes),
    )
    show(_report(result), kind)


def _flops(models: Sequence[Path], lifting: Lifting) -> list[float] | None:
    """FLOPs of every model, where all can be lifted and have some."""
    try:
        flops = [cost(open_graph(model, lifting), "flops").total for model in models]
    except FileError:
        raise
    except MorphError as error:
        note(f"no FLOPs beside the times: {error}")
        return None
    return flops if min(flops) > 0 else None


def _report(result: BenchResult) -> Report:
    rows: list[list[Cell]] = [
        [
            timing.name,
            timing.min_ms,
            timing.p50_ms,
            timing.p90_ms,
            timing.p99_ms,
            timing.runs,
            timing.cv,
            timing.speedup,
            None if timing.speedup_interval is None else _interval(timing.speedup_interval),
            timing.flops_ratio,
            "unstable" if timing.unstable else None,
        ]
        for timing in result.models
    ]
    clock = "CPU time" if result.clock == "cpu" else "wall time"
    return Report(
        result,
        [Table(_COLUMNS, rows, f"{clock} in ms, {result.threads} thread(s) per operator")],
        foot=[result.verdict],
    )


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _decimal(value: Cell) -> str:
    return f"{value:.3f}" if isinstance(value, float) else plain(value)


_COLUMNS = (
    Column("model"),
    number("min", _decimal),
    number("p50", _decimal),
    number("p90", _decimal),
    number("p99", _decimal),
    number("runs", plain),
    number("cv", share),
    number("speed-up", _decimal),
    Column("95 %"),
    number("FLOPs ratio", _decimal),
    Column("note"),
)
