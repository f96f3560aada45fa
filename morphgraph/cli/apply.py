"""``morphgraph apply``: the same network in another size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import show, step, suggest
from morphgraph.cli.data_options import DATA_METAVAR, DataOptions
from morphgraph.cli.following import bench_words, tell_intention
from morphgraph.cli.models import Lifting, naming, open_inputs, open_planned
from morphgraph.cli.outputs import Annotate, ResultFile
from morphgraph.cli.progress import ProgressLines
from morphgraph.cli.shared_options import (
    DryRun,
    InputFiles,
    OutputFormat,
    Overwrite,
    Seed,
    output_file,
)
from morphgraph.errors import ModelError
from morphgraph.options import Format, Start, option

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.calibration import Samples
    from morphgraph.graph import ChannelGraph
    from morphgraph.onnx_io.inputs import Inputs
    from morphgraph.plans import Plan
    from morphgraph.report.tables import Report


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
    refit: Annotated[
        Path | None,
        option(
            "Calibration inputs, without labels: fit the kernels that are left to what the "
            "original computes for them.",
            metavar=DATA_METAVAR,
        ),
    ] = None,
    reading: DataOptions,
    fold: Annotated[
        bool, option("Write a file for shipping: BatchNorm and scales go into the layers beside.")
    ] = False,
    annotate: Annotate = False,
    seed: Seed = 0,
    inputs: InputFiles = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Resize a model by a plan, and check the result.

    The result is compared, on random inputs or those given, with the original whose removed
    channels are masked: in ONNX Runtime, or in PyTorch where that does not know an operator. A
    result that is wrong is not written. Fresh weights are drawn after the check. With
    ``--fold``, what is written is compared with the result once more. With ``--refit`` kernels are
    fitted after the check, and what the outputs lose on inputs that were held out is told.
    """
    from morphgraph.folders.found import folder_of, model_place
    from morphgraph.passes.planning.build import warn_of_price
    from morphgraph.report.checks import check_report
    from morphgraph.workflow import resize_and_check

    if refit is not None and weights == "fresh":
        raise click.UsageError("--refit fits the weights that are kept; leave out --weights fresh")
    if refit is not None and absorb:
        raise click.UsageError("--refit moves more into the biases than --absorb; leave that out")
    folder, model = folder_of(model), model_place(model)
    written = ResultFile(output, model, folder, overwrite, fold, annotate)
    written.check(plan, *((refit,) if refit else ()))
    batches = open_inputs(inputs)
    graph, chosen = open_planned(model, plan, lifting)
    warn_of_price(graph, chosen)
    if dry_run:
        _tell(graph, chosen, written, no_verify, refit, output_format)
        return
    if refit is not None:
        samples = reading.read(refit, graph.model, seed, folder)
        with naming(model, ModelError):
            fitted, report = _refit(graph, chosen, samples, not no_verify, seed, batches)
        show(report, output_format)
        written.save(graph, chosen, fitted)
        written.tell()
        suggest(*bench_words(model, output, lifting))
        return
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
    report = check_report(graph, chosen, result.report)
    written.save(graph, chosen, result.model)
    show(report, output_format)
    written.tell()
    suggest(*bench_words(model, output, lifting, result.report))


def _tell(
    graph: "ChannelGraph",
    plan: "Plan",
    written: ResultFile,
    no_verify: bool,
    refit: Path | None,
    output_format: Format,
) -> None:
    from morphgraph.passes.analysis.cost import is_known_here
    from morphgraph.passes.refit.room import fitted_costs, warn_beyond
    from morphgraph.report.intention import costs_of

    costs = costs_of(graph, plan)
    if refit is not None:
        costs |= fitted_costs(graph, plan, filter(is_known_here, list(costs)))
        warn_beyond(graph, plan, costs)
    steps = [f"resize {len(plan.groups)} of {len(graph.groups)} groups of channels"]
    if not no_verify:
        steps.append("compare the result with the masked original")
    if refit is not None:
        steps.append(f"fit the kernels that are left to inputs of {refit}")
    tell_intention("apply", steps, [written.path], output_format, costs)


def _refit(
    graph: "ChannelGraph",
    plan: "Plan",
    samples: "Samples",
    verify: bool,
    seed: int,
    inputs: "Inputs | None",
) -> "tuple[ir.Model, Report]":
    """The fitted network, and what is to be expected of it."""
    from morphgraph.cli.shrink import tell_layers
    from morphgraph.report.shrinking import Calibrated, shrink_report
    from morphgraph.shrinker import Shrinker
    from morphgraph.shrinking import finish

    shrinker = Shrinker(graph, samples, seed=seed, progress=ProgressLines())
    result = finish(shrinker, plan, verify=verify, inputs=inputs)
    tell_layers(result)
    counts = shrinker.fitted.count, shrinker.held_out.count
    return result.model, shrink_report(graph, Calibrated(samples.described, *counts), result)
