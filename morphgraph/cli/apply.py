"""``morphgraph apply``: the same network in another size."""

from pathlib import Path
from typing import Annotated

from morphgraph.cli.checks import check_report
from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import Lifting, naming, open_inputs, open_planned
from morphgraph.cli.shared_options import (
    InputFiles,
    OutputFormat,
    Overwrite,
    Seed,
    check_output,
    output_file,
)
from morphgraph.onnx_io import escape
from morphgraph.options import Start, option
from morphgraph.workflow import resize_and_check, save


@command
def apply(
    model: Path,
    plan: Path,
    *,
    output: Annotated[Path, output_file("slim.onnx")],
    weights: Annotated[
        Start,
        option("Keep the model's weights, or draw new ones by --seed, for training from scratch."),
    ] = "keep",
    no_verify: Annotated[bool, option("Write the result without checking it.")] = False,
    absorb: Annotated[
        bool, option("Move what removed channels added as a constant into the next bias.")
    ] = False,
    fold: Annotated[
        bool, option("Write a file for shipping: BatchNorm and scales go into the layers beside.")
    ] = False,
    seed: Seed = 0,
    inputs: InputFiles = None,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Resize a model by a plan, and check the result.

    The result is compared, on random inputs or those given, with the original whose removed
    channels are masked: in ONNX Runtime, or in PyTorch where that does not know an operator. A
    result that is wrong is not written. Fresh weights are drawn after the check. With
    ``--fold``, what is written is compared with the result once more.
    """
    check_output(output, overwrite, model, plan)
    batches = open_inputs(inputs)
    graph, chosen = open_planned(model, plan, lifting)
    with step("resizing"), naming(model):
        result = resize_and_check(
            graph,
            chosen,
            weights=weights,
            verify=not no_verify,
            absorb=absorb,
            seed=seed,
            inputs=batches,
        )
    with naming(model):
        save(result.model, output, overwrite, folded=fold)
    show(check_report(graph, chosen, result.report), output_format)
    note(f"wrote {escape(str(output))}")
