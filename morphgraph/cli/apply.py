"""``morphgraph apply``: the same network in another size."""

from pathlib import Path
from typing import get_args

import click

from morphgraph.cli.checks import check_report
from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import naming, open_planned
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    check_output,
    common,
    format_option,
    lift_options,
    output_option,
    overwrite_option,
    seed_option,
)
from morphgraph.methods import Start
from morphgraph.onnx_io import escape, save
from morphgraph.report.tables import Format
from morphgraph.workflow import resize_and_check


@click.command()
@click.argument("model", type=MODEL)
@click.argument("plan", type=MODEL)
@output_option("slim.onnx")
@click.option(
    "--weights",
    type=click.Choice(get_args(Start)),
    default="keep",
    show_default=True,
    help="Keep the model's weights, or draw new ones by --seed, for training from scratch.",
)
@click.option("--no-verify", is_flag=True, help="Write the result without checking it.")
@click.option(
    "--absorb",
    is_flag=True,
    help="Move what removed channels added as a constant into the next bias.",
)
@seed_option
@overwrite_option
@lift_options
@format_option
@common
def apply(
    model: Path,
    plan: Path,
    output: Path,
    weights: Start,
    no_verify: bool,
    absorb: bool,
    seed: int,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Resize a model by a plan, and check the result.

    The result is compared, on random inputs, with the original whose removed channels are masked:
    in ONNX Runtime, or in PyTorch where that does not know an operator. A result that is wrong is
    not written. Fresh weights are drawn after the check.
    """
    check_output(output, overwrite, model, plan)
    graph, chosen = open_planned(model, plan, lifting)
    with step("resizing"), naming(model):
        result = resize_and_check(
            graph, chosen, weights=weights, verify=not no_verify, absorb=absorb, seed=seed
        )
    save(result.model, output, overwrite)
    show(check_report(graph, chosen, result.report), kind)
    note(f"wrote {escape(str(output))}")
