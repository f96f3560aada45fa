"""``morphgraph sweep``: trade-off curves over budgets, methods and seeds."""

import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, resumed_by, show, suggest
from morphgraph.cli.following import tell_intention, unused
from morphgraph.cli.models import Lifting, open_graph
from morphgraph.cli.pages import write_picture
from morphgraph.cli.shared_options import DryRun, OutputFormat, assignment, refuse_repeated
from morphgraph.cli.training_options import Training
from morphgraph.options import METHODS, Format, Method, option

if TYPE_CHECKING:
    from morphgraph.recipes.settings import Settings
    from morphgraph.recipes.sweep import Row

_PICTURE = "curves.svg"


def _words(text: str) -> tuple[str, ...]:
    """The words of ``one,two``, each once.

    >>> _words("25%,50%,25%")
    ('25%', '50%')
    """
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(found):
        raise click.BadParameter(f"'{text}' has an empty place; write one,two,three")
    return found


_words.__name__ = "list"


def _methods(text: str) -> tuple[str, ...]:
    found = _words(text)
    for word in found:
        if word not in METHODS:
            raise click.BadParameter(f"'{word}' is none of {', '.join(METHODS)}")
    return found


_methods.__name__ = "list"


@command
def sweep(
    model: Path,
    *,
    budgets: Annotated[
        tuple[tuple[str, tuple[str, ...]], ...],
        option(
            "flops, params, memory or latency: amounts (300M) or shares (50%), each a point of "
            "the curves; may be repeated with other costs, for curves of their own.",
            "--budget",
            type=assignment(_words, "flops=25%,50%,100%"),
            metavar="COST=AMOUNT,...",
        ),
    ],
    methods: Annotated[
        tuple[Method, ...],
        option(
            "morph, the baselines uniform, l2, bn and random, and base, the original.",
            "--method",
            type=_methods,
            multiple=False,
            default="morph,uniform",
            metavar="NAME,...",
        ),
    ] = ("morph", "uniform"),
    costs: Annotated[
        tuple[str, ...] | None,
        option(
            "What the regularizer counts, a curve of morph for each; by default the budget's cost.",
            "--cost",
            type=_words,
            multiple=False,
            metavar="COST,...",
        ),
    ] = None,
    seeds: Annotated[int, option("Runs of every point, with the seeds 0, 1, ...", ge=1)] = 3,
    training: Training,
    jobs: Annotated[
        int,
        option("Processes at a time on this machine, each with one thread.", ge=1),
    ] = 1,
    ray: Annotated[
        str | None,
        option(
            "Run on the Ray cluster at this address; 'local' starts one here, with --jobs "
            "processes.",
            metavar="ADDRESS",
        ),
    ] = None,
    folder: Annotated[Path, option(None, "-o", "--output", metavar="runs/NAME")],
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Draw trade-off curves: train a model at several budgets by several methods.

    Each point is a run of `morph` with each of the seeds, in a folder of its own. Writes a row per
    run to rows.jsonl and a picture to curves.svg in the output folder. Runs that have a row there
    are not done again: the same command goes on where it was stopped, a larger one adds to it.
    """
    from morphgraph.folders.found import model_file
    from morphgraph.recipes.sweep import ROWS, grid, sweep as sweep_runs
    from morphgraph.report.curves import curves_svg, row_line, sweep_report

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("a sweep starts its own processes; start it without torchrun")
    refuse_repeated(tuple((cost, "") for cost, _ in budgets))
    model = model_file(model)
    graph = open_graph(model, lifting)
    dataset = training.load_data(graph, model)
    wanted = dict(budgets)
    first, amounts = next(iter(wanted.items()))
    one = training.settings(graph, {first: amounts[0]}, None)
    runs = grid(one, wanted, methods, range(seeds), costs or ())
    if dry_run:
        _tell_runs(runs, folder, output_format)
        return
    resumed_by()
    began, before = monotonic(), []

    def tell(row: "Row", done: int, of: int) -> None:
        before.append(done)
        each = (monotonic() - began) / len(before)
        note(row_line(row, done, of, each * (of - done)))

    rows = sweep_runs(
        graph, dataset, runs, folder, jobs=jobs, ray=ray, ops=lifting.ops, on_row=tell
    )
    drawn = write_picture(folder / _PICTURE, lambda: curves_svg(rows, dataset.name))
    written = [ROWS, *([_PICTURE] if drawn else [])]
    show(sweep_report(rows, [str(folder / name) for name in written]), output_format)
    best = max(rows, key=lambda row: row.accuracy)
    suggest("report", folder / best.folder, "-o", unused("report.html", folder / best.folder))


def _tell_runs(runs: "Sequence[Settings]", folder: Path, output_format: Format) -> None:
    from morphgraph.report.runs import budget_text

    steps = [f"{each.method} at {budget_text(each.aim.budget)}, seed {each.seed}" for each in runs]
    tell_intention("sweep", steps, [folder], output_format)
