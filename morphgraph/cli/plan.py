"""``morphgraph plan``: which channels stay."""

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import Lifting, naming, open_graph, warn_of_weights
from morphgraph.cli.shared_options import (
    OutputFormat,
    Overwrite,
    budget_option,
    check_output,
    indices_of_output,
    output_file,
    refuse_repeated,
)
from morphgraph.cli.width_options import PlanOptions
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape
from morphgraph.options import option
from morphgraph.passes.planning import removal_path, uniform as by_width
from morphgraph.report.planning import plan_report

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.report.tables import Report

_FIT = "fit"
_SECONDS = 3  # between two lines of progress


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


@command
def plan(
    model: Path,
    *,
    budgets: Annotated[
        tuple[tuple[str, str], ...],
        budget_option(
            "flops=50%",
            "The most that the result may cost: flops=50%, params=2M, latency=5ms; may be "
            "repeated. Costs are flops, macs, params, weight_bytes, memory, peak and latency "
            "(latency@P100 names a device), and weighted sums of them: 'flops+20*params=50%'.",
        ),
    ] = (),
    ratio: Annotated[
        float | str | None,
        option(
            "Every width times R (the width multiplier); `fit`: the largest R that meets the "
            "budgets.",
            "--uniform",
            type=_ratio,
            metavar="R|fit",
        ),
    ] = None,
    classes: Annotated[
        tuple[tuple[str, list[int]], ...],
        option(
            "Classes that an output keeps, in the order that they have; of several outputs give "
            "the name, and OUTPUT:AXIS where it has several axes of channels. The scores of these "
            "classes stay what they are, but for what the budget removes elsewhere.",
            "--keep-classes",
            type=indices_of_output,
            metavar="[OUTPUT=]0,3,7",
        ),
    ] = (),
    sensitivity: Annotated[
        bool,
        option(
            "Instead of a plan, show what halving each group alone does to the outputs, and what "
            "it saves, the least harmful first."
        ),
    ] = False,
    inputs: Annotated[
        Path | None,
        option(
            "For --sensitivity: what the model reads, an array per input; random numbers, if not "
            "given.",
            metavar="FILE.npz",
        ),
    ] = None,
    options: PlanOptions,
    output: Annotated[Path | None, output_file("plan.json")] = None,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Decide which channels stay so that a model fits a budget.

    Give budgets, --uniform, or widths with --set, which goes with both others. Without -o the plan
    is shown and not written.
    """
    if sensitivity:
        if budgets or ratio is not None or classes or options.widths or output is not None:
            raise click.UsageError("--sensitivity makes no plan; leave out what a plan is for")
        graph = open_graph(model, lifting)
        with naming(model, ModelError):
            show(_sensitivity(graph, inputs, options), output_format)
        return
    if inputs is not None:
        raise click.UsageError("--inputs goes with --sensitivity")
    _check_request(budgets, ratio, options, classes)
    kept = dict(classes)
    check_output(output, overwrite, model)
    graph = open_graph(model, lifting, pin_outputs=not classes)
    if options.score != "random":
        warn_of_weights(model, graph)
    with step("planning"), naming(model, ModelError):
        if ratio is not None:
            result = by_width.uniform(
                graph,
                ratio if isinstance(ratio, float) else None,
                budget=dict(budgets),
                keep_classes=kept.get("", kept),
                **options.arguments(),
            )
        else:
            result = removal_path.plan(
                graph, dict(budgets), keep_classes=kept.get("", kept), **options.arguments()
            )
    if output is not None:
        result.save(output, overwrite)
    show(plan_report(graph, result, options.convention), output_format)
    note(f"wrote {escape(str(output))}" if output else "nothing written; give -o to keep the plan")


def _sensitivity(graph: "ChannelGraph", inputs: Path | None, options: PlanOptions) -> "Report":
    from morphgraph.onnx_io.feeds import load_feeds
    from morphgraph.passes.checking.sensitivity import sensitivity
    from morphgraph.report.sensitivity import sensitivity_report

    last = monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last > _SECONDS:
            last = monotonic()
            note(f"{done} of {total} groups")

    rows = sensitivity(
        graph,
        None if inputs is None else load_feeds(inputs, graph.model),
        score=options.score,
        include=options.include,
        exclude=options.exclude,
        seed=options.seed,
        on_row=tell,
    )
    where = "random numbers" if inputs is None else escape(str(inputs))
    return sensitivity_report(rows, where)


def _check_request(
    budgets: tuple[tuple[str, str], ...],
    ratio: float | str | None,
    options: PlanOptions,
    classes: tuple[tuple[str, list[int]], ...],
) -> None:
    refuse_repeated(budgets)
    if not budgets and ratio is None and not options.widths and not classes:
        raise click.UsageError(
            "say what the result may cost: --budget, --uniform, --set or --keep-classes"
        )
    outputs = [output for output, _ in classes]
    if len(set(outputs)) < len(outputs) or ("" in outputs and len(outputs) > 1):
        raise click.UsageError("--keep-classes: give each output once, by its name")
    if ratio == _FIT and not budgets:
        raise click.UsageError("--uniform fit needs a --budget to fit")
    if budgets and isinstance(ratio, float):
        raise click.UsageError("--uniform with a number meets no --budget; write --uniform fit")
