"""``morphgraph plan``: which channels stay."""

from pathlib import Path

import click

from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import naming, open_graph, warn_of_weights
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    assignment,
    check_output,
    common,
    convention_option,
    format_option,
    lift_options,
    output_option,
    overwrite_option,
    refuse_repeated,
    seed_option,
    width,
)
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.planning import removal_path as budget, uniform as by_width
from morphgraph.report.planning import plan_report
from morphgraph.report.tables import Format

_FIT = "fit"


def _ratio(text: str) -> float | str:
    """A number above 0 and at most 1, or the word ``fit``."""
    if text == _FIT:
        return _FIT
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise click.BadParameter(f"'{text}' is no ratio; give a number from 0 to 1, or `fit`")
    return ratio


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--budget",
    "budgets",
    type=assignment(str, "flops=50%"),
    multiple=True,
    metavar="COST=AMOUNT",
    help="The most that the result may cost: flops=50%, params=2M, latency=5ms; may be repeated. "
    "Costs are flops, macs, params, weight_bytes, memory, peak and latency (latency@P100 names a "
    "device), and weighted sums of them: 'flops+20*params=50%'.",
)
@click.option(
    "--uniform",
    "ratio",
    type=_ratio,
    metavar="R|fit",
    help="Every width times R (the width multiplier); `fit`: the largest R that meets the budgets.",
)
@click.option(
    "--set",
    "widths",
    type=assignment(width, "'layer1*=48'"),
    multiple=True,
    metavar="GLOB=N",
    help="Widths by hand, by group id, name or producer, 0 to remove it; may be repeated.",
)
@click.option(
    "--score",
    type=click.Choice(["l2", "l1", "bn", "lasso", "random"]),
    default="l2",
    show_default=True,
    help="How channels of a group are ranked.",
)
@click.option(
    "--round-to",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Widths that change become multiples of N.",
)
@click.option(
    "--min-width",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="No group gets narrower; with 0 groups may die, and their layers vanish.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Resize these groups only; may be repeated."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these groups alone; may be repeated."
)
@convention_option
@seed_option
@output_option("plan.json", required=False)
@overwrite_option
@lift_options
@format_option
@common
def plan(
    model: Path,
    budgets: tuple[tuple[str, str], ...],
    ratio: float | str | None,
    widths: tuple[tuple[str, int], ...],
    score: Score,
    round_to: int,
    min_width: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    convention: Convention,
    seed: int,
    output: Path | None,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Decide which channels stay so that a model fits a budget.

    Give budgets, or --uniform, or widths with --set. Without -o the plan is shown and not written.
    """
    _check_request(budgets, ratio, widths)
    if widths and (round_to, min_width, include, exclude) != (1, 1, (), ()):
        raise click.UsageError(
            "--set gives widths by hand; leave out --round-to, --min-width, --include and --exclude"
        )
    check_output(output, overwrite, model)
    graph = open_graph(model, lifting)
    if score != "random":
        warn_of_weights(model, graph)
    with step("planning"), naming(model, ModelError):
        if widths:
            made = by_width.set_widths(graph, dict(widths), score=score, seed=seed)
        elif ratio is not None:
            made = by_width.uniform(
                graph,
                ratio if isinstance(ratio, float) else None,
                budget=dict(budgets),
                score=score,
                round_to=round_to,
                min_width=min_width,
                include=include,
                exclude=exclude,
                seed=seed,
                convention=convention,
            )
        else:
            made = budget.plan(
                graph,
                dict(budgets),
                score=score,
                round_to=round_to,
                min_width=min_width,
                include=include,
                exclude=exclude,
                seed=seed,
                convention=convention,
            )
    if output is not None:
        made.save(output, overwrite)
    show(plan_report(graph, made, convention), kind)
    note(f"wrote {escape(str(output))}" if output else "nothing written; give -o to keep the plan")


def _check_request(
    budgets: tuple[tuple[str, str], ...],
    ratio: float | str | None,
    widths: tuple[tuple[str, int], ...],
) -> None:
    refuse_repeated(budgets)
    if not budgets and ratio is None and not widths:
        raise click.UsageError("say what the result may cost: --budget, --uniform or --set")
    if widths and (budgets or ratio is not None):
        raise click.UsageError("--set goes with neither --budget nor --uniform")
    if ratio == _FIT and not budgets:
        raise click.UsageError("--uniform fit needs a --budget to fit")
    if budgets and isinstance(ratio, float):
        raise click.UsageError("--uniform with a number meets no --budget; write --uniform fit")
