"""``morphgraph morph``: learn a structure within a budget, and train it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import be_silent, note, show
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.shared_options import (
    OutputFormat,
    Overwrite,
    Seed,
    budget_option,
    refuse_repeated,
)
from morphgraph.cli.training_options import Training
from morphgraph.errors import FileError
from morphgraph.onnx_io import escape
from morphgraph.options import BASELINES, Baseline, option

if TYPE_CHECKING:
    from collections.abc import Mapping


@command
def morph(
    model: Path,
    *,
    budgets: Annotated[
        tuple[tuple[str, str], ...],
        budget_option(
            "flops=50%",
            "flops, params, memory or latency: an amount (300M) or a share (50%); may be "
            "repeated, all hold.",
        ),
    ],
    cost: Annotated[
        str | None,
        option("What the regularizer counts; by default the first budget's.", metavar="COST"),
    ] = None,
    training: Training,
    chosen: Annotated[
        tuple[Baseline, ...],
        option(
            "Also train the original and this, for as many epochs; may be repeated.", "--baseline"
        ),
    ] = (),
    baselines: Annotated[bool, option("All of them.")] = False,
    smoke: Annotated[
        bool,
        option(
            "Only check within a few steps that a much too strong penalty collapses the cost and "
            "that none does not move it; writes nothing."
        ),
    ] = False,
    resume: Annotated[
        bool, option("Go on with the run in the output folder, or begin one.")
    ] = False,
    checkpoint_seconds: Annotated[
        float, option("Between two checkpoints within an epoch.", ge=0)
    ] = 60.0,
    folder: Annotated[Path | None, option(None, "-o", "--output", metavar="runs/NAME")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
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
        show(smoke_report(checked), output_format)
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
    show(result_report(result, folder), output_format)
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
