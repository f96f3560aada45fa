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
)
from morphgraph.onnx_io import escape
from morphgraph.passes.cost import Convention
from morphgraph.passes.expand import expand as expand_plan
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
@click.option("--round-to", default=1, show_default=True, type=click.IntRange(1))
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
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    convention: Convention,
    output: Path,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Multiply the widths of a plan by the largest factor that fits a budget.

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
            include=include,
            exclude=exclude,
            convention=convention,
        )
    wide.save(output, overwrite)
    show(plan_report(graph, wide, convention), kind)
    note(f"wrote {escape(str(output))}")
