"""``morphgraph slice``: a network for any budget out of an elastic one, without training."""

from pathlib import Path
from typing import Annotated

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step, suggest
from morphgraph.cli.data_options import DATA_METAVAR, DataOptions
from morphgraph.cli.devices import on_told_device
from morphgraph.cli.following import bench_words, tell_intention
from morphgraph.cli.models import Lifting, naming, open_ranked
from morphgraph.cli.shared_options import (
    DeviceFile,
    DryRun,
    OutputFormat,
    Overwrite,
    Seed,
    budget_option,
    check_output,
    output_file,
    refuse_repeated,
)
from morphgraph.errors import ModelError
from morphgraph.options import ROUND_TO, RoundTo, option
from morphgraph.words import escape


@command
def slice(  # noqa: A001 - a command's function has its name
    model: Path,
    ranking: Path,
    *,
    budgets: Annotated[
        tuple[tuple[str, str], ...],
        budget_option(
            "flops=40%",
            "flops, params, memory or latency: an amount (300M) or a share (40%); may be "
            "repeated, all hold.",
        ),
    ],
    device: DeviceFile = None,
    data: Annotated[
        Path | None,
        option(
            "Inputs, without labels: BatchNorm statistics are measured anew with them, as the "
            "whole network's are wrong for a slice. Some hundreds do.",
            metavar=DATA_METAVAR,
        ),
    ] = None,
    reading: DataOptions,
    round_to: Annotated[RoundTo, ROUND_TO] = "auto",
    seed: Seed = 0,
    output: Annotated[Path, output_file("slim.onnx")],
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Cut a smaller network out of an elastic one, for any budget, without training.

    MODEL and RANKING are elastic.onnx and ranking.json of `morphgraph morph --from-trained
    --elastic`. The widest network within the budget is written; it is compared with the masked
    whole network before its statistics are measured.
    """
    from morphgraph.folders.found import model_file
    from morphgraph.report.checks import check_report
    from morphgraph.report.intention import costs_of
    from morphgraph.slicing import Elastic
    from morphgraph.workflow import save

    model = model_file(model)
    refuse_repeated(budgets)
    check_output(output, overwrite, model, ranking, *((data,) if data else ()))
    graph, order = open_ranked(model, ranking, lifting)
    budget = on_told_device(dict(budgets), device)
    if dry_run:
        with naming(model, ModelError):
            plan = order.plan(graph, budget, round_to=round_to)
        steps = ["cut out the widest network within the budget", "compare it with the masked whole"]
        if data is not None:
            steps.append(f"measure its statistics on inputs of {data}")
        tell_intention("slice", steps, [output], output_format, costs_of(graph, plan))
        return
    samples = None if data is None else reading.read(data, graph.model, seed)
    with step("slicing"), naming(model, ModelError):
        found = Elastic(graph, order, samples).slice(budget, round_to=round_to)
    with naming(model):
        save(found.model, output, overwrite)
    show(check_report(graph, found.plan, found.check), output_format)
    note(f"wrote {escape(str(output))}")
    suggest(*bench_words(model, output, lifting))
