"""``morphgraph verify``: proof that a resized model is right."""

from pathlib import Path

from morphgraph.cli.command import command
from morphgraph.cli.console import show, step, suggest
from morphgraph.cli.following import bench_words, tell_intention
from morphgraph.cli.models import Lifting, naming, open_inputs, open_model, open_planned
from morphgraph.cli.shared_options import DryRun, InputFiles, OutputFormat, Seed


@command
def verify(
    model: Path,
    plan: Path,
    slim: Path,
    *,
    seed: Seed = 0,
    inputs: InputFiles = None,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Check that a resized model computes what the masked original computes.

    Exits with 1 where it does not. A model with other weights than the original's is wrong in this
    sense too.
    """
    from morphgraph.folders.found import model_places
    from morphgraph.report.checks import check_report
    from morphgraph.workflow import verify as check

    model, slim = model_places([model, slim])
    batches = open_inputs(inputs)
    graph, chosen = open_planned(model, plan, lifting)
    small = open_model(slim)
    if dry_run:
        steps = [
            f"mask what the plan removes of {model}",
            f"run it and {slim} over {inputs or 'random inputs'}, and compare what they give",
        ]
        tell_intention("verify", steps, [], output_format)
        return
    with step("comparing"), naming(slim):
        report = check(graph, chosen, small, seed=seed, inputs=batches)
    show(check_report(graph, chosen, report), output_format)
    with naming(slim):
        report.require()
    suggest(*bench_words(model, slim, lifting, report))
