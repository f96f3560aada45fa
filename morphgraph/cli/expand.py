"""``morphgraph expand``: the widths of a plan times one factor, as far as a budget allows."""

from pathlib import Path

import click

from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import open_planned
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
    width,
)
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.planning.expand import expand as expand_plan
from morphgraph.report.planning import plan_report
from morphgraph.report.tables import Format


@click.command()
@click.argument("model", type=MODEL)
@click.argument("plan", type=MODEL)
@click.option(
    "--budget",
    "budgets",
    type=assignment(str, "flops=100%"),
    multiple=True,
    required=True,
    metavar="COST=AMOUNT",
    help="The most that the result may cost; shares are of the model's. May be repeated.",
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
    help="Narrower groups are raised to N first, as far as the budget allows.",
)
@click.option(
    "--max-growth",
    type=click.FloatRange(min=1),
    metavar="R",
    help="No group gets wider than R times its width in the model.",
)
@click.option(
    "--max-width",
    "max_widths",
    type=assignment(width, "'layer4*=512'"),
    multiple=True,
    metavar="GLOB=N",
    help="These groups get no wider than N; may be repeated.",
)
@click.option(
    "--fill/--no-fill",
    default=True,
    show_default=True,
    help="Use what rounding leaves of the budget, one step of one group at a time.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Grow these groups only.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Do not grow these groups.")
@convention_option
@output_option("wide.json")
@overwrite_option
@lift_options
@format_option
@common
def expand(
    model: Path,
    plan: Path,
    budgets: tuple[tuple[str, str], ...],
    round_to: int,
    min_width: int,
    max_growth: float | None,
    max_widths: tuple[tuple[str, int], ...],
    fill: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    convention: Convention,
    output: Path,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Multiply the widths of a plan by the largest factor that fits a budget.

    What rounding leaves of the budget is filled, one step of one group at a time.

    Applied, the result computes what the plan's network computes, since nothing reads the new
    channels yet; train it to make use of them.
    """
    refuse_repeated(budgets)
    check_output(output, overwrite, model, plan)
    graph, small = open_planned(model, plan, lifting)
    with step("expanding"):
        wide = expand_plan(
            graph,
            small,
            dict(budgets),
            round_to=round_to,
            min_width=min_width,
            max_growth=max_growth,
            max_width=dict(max_widths),
            fill=fill,
            include=include,
            exclude=exclude,
            convention=convention,
        )
    wide.save(output, overwrite)
    show(plan_report(graph, wide, convention), kind)
    note(f"wrote {escape(str(output))}")
