"""``morphgraph verify``: proof that a resized model is right."""

from pathlib import Path

import click

from morphgraph.cli.checks import check_report
from morphgraph.cli.console import show, step
from morphgraph.cli.models import naming, open_planned
from morphgraph.cli.options import MODEL, Lifting, common, format_option, lift_options, seed_option
from morphgraph.onnx_io import load
from morphgraph.report.tables import Format
from morphgraph.workflow import verify as check


@click.command()
@click.argument("model", type=MODEL)
@click.argument("plan", type=MODEL)
@click.argument("slim", type=MODEL)
@seed_option
@lift_options
@format_option
@common
def verify(
    model: Path,
    plan: Path,
    slim: Path,
    seed: int,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Check that a resized model computes what the masked original computes.

    Exits with 1 where it does not. A model with other weights than the original's is wrong in this
    sense too.
    """
    graph, chosen = open_planned(model, plan, lifting)
    small = load(slim)
    with step("comparing"), naming(slim):
        report = check(graph, chosen, small, seed=seed)
    show(check_report(graph, chosen, report), kind)
    with naming(slim):
        report.require()
