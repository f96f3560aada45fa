"""``morphgraph morph``: learn a structure within a budget, and train it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from morphgraph.cli.console import be_silent, note, show
from morphgraph.cli.models import open_graph
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    assignment,
    common,
    format_option,
    lift_options,
    overwrite_option,
    refuse_repeated,
    seed_option,
)
from morphgraph.cli.training import Training, train_options
from morphgraph.errors import FileError
from morphgraph.methods import BASELINES, Baseline
from morphgraph.onnx_io import escape
from morphgraph.report.tables import Format

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    type=assignment(str, "flops=50%"),
    metavar="COST=AMOUNT",
    help="flops, params, memory or latency: an amount (300M) or a share (50%); may be repeated, "
    "all hold.",
)
@click.option(
    "--cost", metavar="COST", help="What the regularizer counts; by default the first budget's."
)
@train_options
@click.option(
    "--baseline",
    "chosen",
    multiple=True,
    type=click.Choice(BASELINES),
    help="Also train the original and this, for as many epochs; may be repeated.",
)
@click.option("--baselines", is_flag=True, help="All of them.")
@click.option(
    "--smoke",
    is_flag=True,
    help="Only check within a few steps that a much too strong penalty collapses the cost and that "
    "none does not move it; writes nothing.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the run in the output folder, or begin one."
)
@click.option(
    "--checkpoint-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Between two checkpoints within an epoch.",
)
@click.option("-o", "--output", "folder", type=MODEL, metavar="runs/NAME")
@seed_option
@overwrite_option
@lift_options
@format_option
@common
def morph(
    model: Path,
    budgets: tuple[tuple[str, str], ...],
    cost: str | None,
    training: Training,
    chosen: tuple[Baseline, ...],
    baselines: bool,
    smoke: bool,
    resume: bool,
    checkpoint_seconds: float,
    folder: Path | None,
    seed: int,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> int:
    """Learn a network's structure within a budget, and train it.

    Each iteration trains the model with the regularizer until its cost has fallen far, and
    multiplies the widths that are left by the factor that brings them to the budget. Then the
    network that came out is trained. A budget of 100% gives another network of the same cost.
    Writes base.onnx, plan.json, slim.onnx, result.json and events.jsonl into the output folder.
    """
    import torch

    from morphgraph.recipes.run import run, smoke_run
    from morphgraph.report.runs import result_report, smoke_report
    from morphgraph.train import distributed

    torch.set_num_threads(1)  # two training threads in one process are slower than one
    click.get_current_context().with_resource(distributed.launched())
    if not distributed.is_first():
        be_silent(distributed.rank())
    refuse_repeated(budgets)
    if folder is None and not smoke:
        raise click.UsageError("Missing option '-o'")
    if folder is not None:
        _spare(model, folder)
    graph = open_graph(model, lifting)
    dataset = training.load_data(graph, model)
    settings = replace(
        training.settings(graph, dict(budgets), cost, seed),
        baselines=BASELINES if baselines else tuple(dict.fromkeys(chosen)),
    )
    if smoke:
        checked = smoke_run(graph, dataset, settings)
        show(smoke_report(checked), kind)
        return 0 if checked.passed else 1
    assert folder is not None
    result = run(
        graph,
        dataset,
        settings,
        folder,
        overwrite=overwrite,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        on_event=_tell,
    )
    show(result_report(result, folder), kind)
    return 0


def _spare(model: Path, folder: Path) -> None:
    """Refuse a folder where the run would replace its own input."""
    from morphgraph.recipes.run import FILES

    files = [path.resolve() for name in FILES for path in folder.glob(name)]
    if any(model.resolve().is_relative_to(path) for path in files):
        raise FileError(
            f"{escape(str(model))}: is an input, which is never changed; choose another folder"
        )


def _tell(event: "Mapping[str, Any]") -> None:
    """One line of progress per event."""
    from morphgraph.report.runs import event_line

    line = event_line(event)
    if line is not None:
        note(line)
