"""``morphgraph expand``: the widths of a plan times one factor, as far as a budget allows."""

from pathlib import Path
from typing import Annotated

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step, suggest
from morphgraph.cli.devices import on_told_device
from morphgraph.cli.following import lifting_words, tell_intention, unused
from morphgraph.cli.models import Lifting, open_planned
from morphgraph.cli.shared_options import (
    DeviceFile,
    DryRun,
    OutputFormat,
    Overwrite,
    budget_option,
    check_output,
    output_file,
    refuse_repeated,
)
from morphgraph.cli.width_options import ExpandOptions
from morphgraph.words import escape


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
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Multiply the widths of a plan by the largest factor that fits a budget.

    What rounding leaves of the budget is filled, one step of one group at a time.

    Applied, the result computes what the plan's network computes, since nothing reads the new
    channels yet; train it to make use of them.
    """
    from morphgraph.folders.found import folder_of
    from morphgraph.passes.planning.expand import expand as expand_plan
    from morphgraph.report.intention import costs_of
    from morphgraph.report.planning import plan_report

    refuse_repeated(budgets)
    check_output(output, overwrite, model, plan)
    graph, small = open_planned(model, plan, lifting)
    with step("expanding"):
        wide = expand_plan(
            graph, small, on_told_device(dict(budgets), device), **options.arguments()
        )
    if dry_run:
        steps = ["write the plan with wider groups"]
        tell_intention("expand", steps, [output], output_format, costs_of(graph, wide))
        return
    wide.save(output, overwrite)
    show(plan_report(graph, wide, options.convention), output_format)
    note(f"wrote {escape(str(output))}")
    words = lifting_words(lifting, planned=True)
    # Beside a folder's model another folder is written.
    applied = unused("wide.onnx" if folder_of(model) is None else "wide")
    suggest("apply", model, output, *words, "-o", applied)
