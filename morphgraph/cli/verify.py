"""``morphgraph verify``: proof that a resized model is right."""

from pathlib import Path

import click

from morphgraph.cli.checks import check_report
from morphgraph.cli.console import show, step
from morphgraph.cli.models import naming, open_graph, open_plan
from morphgraph.cli.options import MODEL, common, format_option, input_shape_option, seed_option
from morphgraph.onnx_io import load
from morphgraph.passes.verify import verify as check
from morphgraph.report.tables import Format


@click.command()
@click.argument("model", type=MODEL)
@click.argument("plan", type=MODEL)
@click.argument("slim", type=MODEL)
@seed_option
@input_shape_option
@format_option
@common
def verify(
    model: Path,
    plan: Path,
    slim: Path,
    seed: int,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    kind: Format,
) -> None:
    """Check that a resized model computes what the masked original computes.

    Exits with 1 where it does not. A model with other weights than the original's is wrong in this
    sense too.
    """
    graph = open_graph(model, input_shapes)
    chosen = open_plan(plan, graph)
    small = load(slim)
    with step("comparing in ONNX Runtime"), naming(slim):
        report = check(graph, chosen, small, seed=seed)
    show(check_report(graph, chosen, report), kind)
    with naming(slim):
        report.require()
