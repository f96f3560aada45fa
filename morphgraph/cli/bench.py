"""``morphgraph bench``: which model is faster, and how sure that is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from morphgraph.benchmark import BenchResult, bench as time_models
from morphgraph.cli.command import command
from morphgraph.cli.console import note, show
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.shared_options import InputShapes, Ops, OutputFormat, Seed
from morphgraph.errors import FileError, MorphError
from morphgraph.options import option
from morphgraph.passes.analysis.cost import cost
from morphgraph.report.tables import Cell, Report, number_column, plain, share, table_of


@command
def bench(
    models: tuple[Path, ...],
    *,
    threads: Annotated[
        int,
        option(
            "Threads within an operator. CPU time is measured at one, wall time at more.",
            ge=1,
            metavar="N",
        ),
    ] = 1,
    seconds: Annotated[float, option("How long every model runs.", gt=0, metavar="S")] = 5.0,
    batch: Annotated[
        int | None,
        option("The batch, for models that leave it open.", ge=1, metavar="N"),
    ] = None,
    seed: Seed = 0,
    input_shapes: InputShapes = (),
    ops: Ops = (),
    output_format: OutputFormat = "table",
) -> None:
    """Time models side by side in ONNX Runtime.

    The models take turns on the same random inputs; every one is compared with the first.
    """
    del ops  # they have run already
    result = time_models(
        models,
        threads=threads,
        seconds=seconds,
        batch=batch,
        seed=seed,
        flops=_flops(models, Lifting(input_shapes=input_shapes)),
        input_shapes=dict(input_shapes),
    )
    show(_report(result), output_format)


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
    clock = "CPU time" if result.clock == "cpu" else "wall time"
    times = table_of(
        result.models,
        ("model", lambda timing: timing.name),
        (number_column("min", _decimal), lambda timing: timing.min_ms),
        (number_column("p50", _decimal), lambda timing: timing.p50_ms),
        (number_column("p90", _decimal), lambda timing: timing.p90_ms),
        (number_column("p99", _decimal), lambda timing: timing.p99_ms),
        (number_column("runs", plain), lambda timing: timing.runs),
        (number_column("cv", share), lambda timing: timing.cv),
        (number_column("speed-up", _decimal), lambda timing: timing.speedup),
        ("95 %", lambda timing: _interval(timing.speedup_interval)),
        (number_column("FLOPs ratio", _decimal), lambda timing: timing.flops_ratio),
        ("note", lambda timing: "unstable" if timing.unstable else None),
        title=f"{clock} in ms, {result.threads} thread(s) per operator",
    )
    return Report(result, [times], foot=[result.verdict])


def _interval(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _decimal(value: Cell) -> str:
    return f"{value:.3f}" if isinstance(value, float) else plain(value)
