"""``morphgraph plan``: which channels stay."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import Lifting, naming, open_graph, warn_of_weights
from morphgraph.cli.shared_options import (
    OutputFormat,
    Overwrite,
    assignment,
    budget_option,
    check_output,
    output_file,
    refuse_repeated,
    width,
)
from morphgraph.cli.width_options import PlanOptions
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape
from morphgraph.options import option
from morphgraph.passes.planning import removal_path, uniform as by_width
from morphgraph.report.planning import plan_report

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
    widths: Annotated[
        tuple[tuple[str, int], ...],
        option(
            "Widths by hand, by group id, name or producer, 0 to remove it; may be repeated.",
            "--set",
            type=assignment(width, "'layer1*=48'"),
            metavar="GLOB=N",
        ),
    ] = (),
    options: PlanOptions,
    output: Annotated[Path | None, output_file("plan.json")] = None,
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Decide which channels stay so that a model fits a budget.

    Give budgets, or --uniform, or widths with --set. Without -o the plan is shown and not written.
    """
    _check_request(budgets, ratio, widths)
    unused = replace(options, score="l2", convention="default", seed=0)
    if widths and unused != PlanOptions():
        raise click.UsageError(
            "--set gives widths by hand; leave out --round-to, --min-width, --include and --exclude"
        )
    check_output(output, overwrite, model)
    graph = open_graph(model, lifting)
    if options.score != "random":
        warn_of_weights(model, graph)
    with step("planning"), naming(model, ModelError):
        if widths:
            result = by_width.set_widths(
                graph, dict(widths), score=options.score, seed=options.seed
            )
        elif ratio is not None:
            result = by_width.uniform(
                graph,
                ratio if isinstance(ratio, float) else None,
                budget=dict(budgets),
                **asdict(options),
            )
        else:
            result = removal_path.plan(graph, dict(budgets), **asdict(options))
    if output is not None:
        result.save(output, overwrite)
    show(plan_report(graph, result, options.convention), output_format)
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
