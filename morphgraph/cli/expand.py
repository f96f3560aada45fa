"""``morphgraph expand``: the widths of a plan times one factor, as far as a budget allows."""

from pathlib import Path
from typing import Annotated

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step
from morphgraph.cli.models import Lifting, open_planned
from morphgraph.cli.shared_options import (
    DeviceFile,
    OutputFormat,
    Overwrite,
    budget_option,
    check_output,
    output_file,
    refuse_repeated,
)
from morphgraph.cli.width_options import ExpandOptions
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import on_device
from morphgraph.passes.planning.expand import expand as expand_plan
from morphgraph.report.planning import plan_report


@command
def expand(
    model: Path,
    plan: Path,
    *,
    budgets: Annotated[
        tuple[tuple[str, str], ...],
        budget_option(
            "flops=100%",
            "The most that the result may cost; shares are of the model's. May be repeated.",
        ),
    ],
    device: DeviceFile = None,
    options: ExpandOptions,
    output: Annotated[Path, output_file("wide.json")],
    overwrite: Overwrite = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
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
        wide = expand_plan(graph, small, on_device(dict(budgets), device), **options.arguments())
    wide.save(output, overwrite)
    show(plan_report(graph, wide, options.convention), output_format)
    note(f"wrote {escape(str(output))}")
