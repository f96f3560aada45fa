"""``morphgraph diff``: what changed between two models."""

from pathlib import Path

from morphgraph.cli.command import command
from morphgraph.cli.console import show, suggest
from morphgraph.cli.following import shape_words, tell_intention, unused
from morphgraph.cli.models import Lifting, fixed_alike, open_graph
from morphgraph.cli.pages import ReportFile, command_line, write_page
from morphgraph.cli.shared_options import DryRun, OutputFormat, Overwrite, check_output


@command
def diff(
    base: Path,
    slim: Path,
    *,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Show what changed between two models, layer by layer.

    Layers and nodes are matched by name; MACs are per sample.
    """
    from morphgraph.folders.found import model_places
    from morphgraph.report.diff_tables import diff_report
    from morphgraph.report.differences import compare

    check_output(report, overwrite, base, slim)
    base, slim = model_places([base, slim])
    lifting = fixed_alike([base, slim], lifting)
    before, after = open_graph(base, lifting), open_graph(slim, lifting)
    if dry_run:
        steps = ["compare the models layer by layer", *(["draw the page"] if report else [])]
        tell_intention("diff", steps, [report], output_format)
        return
    show(diff_report(compare(before, after, base, slim)), output_format)
    if report is not None:
        from morphgraph.report.pages.gather import Resized, resized_facts

        shown = Resized(base.name, before, after, command=command_line())
        write_page(report, resized_facts(shown), overwrite)
    else:
        suggest("report", base, slim, *shape_words(lifting), "-o", unused("report.html"))
