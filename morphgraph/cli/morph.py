"""``morphgraph morph``: learn a structure within a budget, and train it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import be_silent, note, resumed_by, show, suggest
from morphgraph.cli.following import tell_intention, unused
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.pages import write_picture
from morphgraph.cli.shared_options import (
    DryRun,
    OutputFormat,
    Overwrite,
    Seed,
    budget_option,
    refuse_repeated,
)
from morphgraph.cli.training_options import Training
from morphgraph.errors import FileError
from morphgraph.options import BASELINES, Baseline, Format, option
from morphgraph.words import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from morphgraph.graph import ChannelGraph
    from morphgraph.recipes.results import Result
    from morphgraph.recipes.settings import FromTrained, Settings
    from morphgraph.trained import Ranked


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
    ] = (),
    cost: Annotated[
        str | None,
        option("What the regularizer counts; by default the first budget's.", metavar="COST"),
    ] = None,
    training: Training,
    from_trained: Annotated[
        bool,
        option(
            "The model is trained: keep its weights, and fine-tune what is left with it as a "
            "teacher. --epochs are those in all."
        ),
    ] = False,
    several: Annotated[
        str | None,
        option(
            "A network for each of these budgets on --cost (by default flops), every smaller one a "
            "part of the larger; with --from-trained.",
            "--budgets",
            metavar="75%,50%,25%",
        ),
    ] = None,
    elastic: Annotated[
        bool,
        option(
            "Train one set of weights for all networks between the model and the smallest budget; "
            "`morphgraph slice` cuts them out, for any budget. With --from-trained."
        ),
    ] = False,
    refit: Annotated[
        int,
        option(
            "Training images, without labels, that rank the channels of a trained network and that "
            "what is left is fitted to; 0: neither.",
            ge=0,
            metavar="IMAGES",
        ),
    ] = 512,
    distill: Annotated[
        float,
        option("Weight of the original's answers in the loss of a fine-tuning.", ge=0),
    ] = 4.0,
    inside: Annotated[
        float,
        option("Weight of its layers' results beside its answers.", "--distill-inside", ge=0),
    ] = 0.0,
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
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> int:
    """Learn a network's structure within a budget, and train it.

    Each iteration trains the model with the regularizer until its cost has fallen far, and
    multiplies the widths that are left by the factor that brings them to the budget. Then the
    network that came out is trained. A budget of 100% gives another network of the same cost.
    With --from-trained the model's weights are kept: its channels are ranked by calibration images
    or by a phase of training, and what is left is fitted to these images and fine-tuned.
    With --elastic the whole network is trained, and smaller ones that share its weights with it.
    Writes base.onnx, plan.json, slim.onnx, result.json and events.jsonl into the output folder.
    """
    import torch

    from morphgraph.folders.found import model_file
    from morphgraph.recipes.run import run, smoke_run
    from morphgraph.report.runs import result_report, smoke_report
    from morphgraph.train import distributed

    torch.set_num_threads(1)  # two training threads in one process are slower than one
    click.get_current_context().with_resource(distributed.launched())
    if not distributed.is_first():
        be_silent(distributed.rank())
    refuse_repeated(budgets)
    asked = _asked(dict(budgets), several, cost)
    if (several is not None or elastic) and not from_trained:
        what = "--budgets" if several is not None else "--elastic"
        raise click.UsageError(f"{what} begins with a trained network; add --from-trained")
    if elastic and (training.shrink_epochs or inside):
        raise click.UsageError(
            "--elastic trains the whole network and ranks its channels before: leave out "
            "--shrink-epochs and --distill-inside"
        )
    if from_trained and (chosen or baselines or smoke):
        raise click.UsageError("--baseline and --smoke are for new networks, not --from-trained")
    if folder is None and not smoke:
        raise click.UsageError("Missing option '-o'")
    if folder is not None:
        _spare(model, folder)
    model = model_file(model)
    graph = open_graph(model, lifting)
    dataset = training.load_data(graph, model)
    trained = None
    if from_trained:
        trained = _from_trained(graph, asked, refit, distill, inside, elastic=elastic)
    settings = replace(
        training.settings(
            graph,
            asked[-1] if trained is None else dict(trained.budgets[-1]),
            cost,
            seed,
            trained,
        ),
        baselines=BASELINES if baselines else tuple(dict.fromkeys(chosen)),
    )
    if dry_run:
        settings.aim.check(graph)
        _tell_work(graph, settings, dataset.name, folder, output_format)
        return 0
    if smoke:
        checked = smoke_run(graph, dataset, settings)
        show(smoke_report(checked), output_format)
        return 0 if checked.passed else 1
    assert folder is not None
    resumed_by("--resume")
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
    if len(result.family) > 1 and distributed.is_first():
        _draw(result, folder)
    show(result_report(result, folder), output_format)
    suggest("report", folder, "-o", unused("report.html", folder))
    return 0


def _tell_work(
    graph: "ChannelGraph",
    settings: "Settings",
    data: str,
    folder: Path | None,
    output_format: Format,
) -> None:
    """The phases of a run, and the most that its result may cost."""
    from morphgraph.passes.planning.constraints import resolve_budget
    from morphgraph.plans import Change
    from morphgraph.recipes.settings import planned_work

    steps = [
        f"{phase}: {epochs} epochs on {data}, each {cost:.3g} of the original's work"
        for phase, (epochs, cost) in planned_work(graph, settings).items()
    ]
    limits = resolve_budget(graph, settings.aim.budget, "default")
    costs = {each.kind: Change(each.cost.total, each.limit) for each in limits}
    tell_intention("morph", steps, [folder], output_format, costs)


def _draw(result: "Result", folder: Path) -> None:
    """The family's accuracies over their costs, as a picture beside the result."""
    from morphgraph.report.curves import curves_svg
    from morphgraph.report.runs import family_rows

    rows = family_rows(result, folder)
    write_picture(folder / "curves.svg", lambda: curves_svg(rows, result.data))


def _asked(
    budget: dict[str, str], several: str | None, cost: str | None
) -> tuple[dict[str, str], ...]:
    """The budgets of the networks that are to be made."""
    if several is None and not budget:
        raise click.UsageError("Missing option '--budget'")
    if several is None:
        return (budget,)
    if budget:
        raise click.UsageError("give --budget for one network, or --budgets for several")
    amounts = [part.strip() for part in several.split(",")]
    if not all(amounts):
        raise click.UsageError(f"--budgets '{several}' has an empty place; write 75%,50%,25%")
    return tuple({cost or "flops": amount} for amount in amounts)


def _from_trained(
    graph: "ChannelGraph",
    budgets: tuple[dict[str, str], ...],
    images: int,
    distill: float,
    inside: float,
    *,
    elastic: bool,
) -> "FromTrained":
    from morphgraph.passes.planning.nested import falling
    from morphgraph.recipes.settings import FromTrained
    from morphgraph.slicing import below_whole

    found = below_whole(graph, budgets) if elastic else falling(graph, budgets)
    ordered = tuple({kind: str(amount) for kind, amount in budget.items()} for budget in found)
    rank: Ranked = "data" if images else "l2"
    return FromTrained(ordered, rank, images, distill, inside, elastic)


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
