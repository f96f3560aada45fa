"""``morphgraph analyze``: which channels live and die together, and what they cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from morphgraph.cli.command import command
from morphgraph.cli.console import note, show, step, suggest
from morphgraph.cli.devices import on_told_device
from morphgraph.cli.following import lifting_words, tell_intention, unused
from morphgraph.cli.models import Lifting, open_graph, some, warn_of_weights
from morphgraph.cli.pages import ReportFile, command_line, write_page
from morphgraph.cli.shared_options import DeviceFile, DryRun, OutputFormat, Overwrite, check_output
from morphgraph.cli.width_options import Counting
from morphgraph.errors import warn
from morphgraph.options import Convention, Format, option
from morphgraph.words import escape

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.report.analysis import Analysis

_LEAST, _STEP = 50, 10  # percent: what is proposed as a budget


@command
def analyze(
    model: Path,
    *,
    by: Annotated[
        Literal["group", "layer", "op"], option("What a row of the table stands for.")
    ] = "group",
    cost_kind: Annotated[
        str,
        option(
            "The cost that rows are priced with: flops, params, memory, latency@P100 (a device), "
            "flops+20*params (a weighted sum), ...",
            "--cost",
            metavar="COST",
        ),
    ] = "flops",
    device: DeviceFile = None,
    name: Annotated[
        str | None,
        option(
            "Tell the life of a group: by its id or name, a layer, a tensor, an operator, or a "
            "glob.",
            "--explain",
            metavar="NAME",
        ),
    ] = None,
    top: Annotated[
        int | None,
        option("Only the N most expensive rows.", ge=1, metavar="N"),
    ] = None,
    convention: Counting = "default",
    annotate: Annotated[
        Path | None,
        option(
            "Write a copy whose nodes are labelled with their channel groups in its metadata, as "
            "Netron shows it.",
            metavar="labelled.onnx",
        ),
    ] = None,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Show a model's channel groups, what they cost, and which can shrink.

    JSON always holds all layers and groups; --by and --top choose the rows of the other formats.
    """
    from morphgraph.folders.found import model_place
    from morphgraph.report.analysis import analyze as analyze_graph
    from morphgraph.report.overview import overview

    for output in (annotate, report):
        check_output(output, overwrite, model)
    model = model_place(model)
    graph = open_graph(model, lifting)
    if dry_run:
        steps = [
            f"tell the life of {name}"
            if name
            else f"count what {len(graph.groups)} groups of channels cost"
        ]
        steps += ["label the nodes of a copy"] if annotate else []
        steps += ["draw the page"] if report else []
        tell_intention("analyze", steps, [annotate, report], output_format)
        return
    if name is not None:
        _explain(graph, name, convention, output_format)
        return
    broken = warn_of_weights(model, graph)
    with step("counting"):
        analysis = analyze_graph(
            graph,
            model,
            cost_kind=next(iter(on_told_device({cost_kind: None}, device))),
            convention=convention,
            not_finite=broken,
        )
    _warn_of_opaque(model, analysis)
    show(overview(graph, analysis, by, top), output_format)
    if report is not None:
        from morphgraph.report.pages.gather import Resized, resized_facts

        shown = Resized(model.name, graph, command=command_line())
        write_page(report, resized_facts(shown), overwrite)
    if annotate is not None:
        _write_labelled(graph, model, annotate, overwrite)
    _propose(model, analysis, lifting)


def _explain(
    graph: "ChannelGraph", name: str, convention: Convention, output_format: Format
) -> None:
    from morphgraph.report.explain import explain
    from morphgraph.report.explanation import explanation_report

    show(explanation_report(explain(graph, name, convention=convention)), output_format)


def _propose(model: Path, analysis: "Analysis", lifting: Lifting) -> None:
    """The next command: a plan that can be met, or why there is none."""
    fixed = next((group for group in analysis.groups if not group.resizable), None)
    macs, lowest = analysis.totals.macs, analysis.reach.lowest_macs
    if macs and lowest < macs:
        reachable = (_STEP * share for share in range(_LEAST // _STEP, 10))
        budget = next((share for share in reachable if lowest < macs * share / 100), 95)
        words = ["--budget", f"flops={budget}%", "-o", unused("plan.json")]
        suggest("plan", model, *lifting_words(lifting), *words)
    elif fixed is not None:
        suggest("analyze", model, *lifting_words(lifting), "--explain", fixed.id)


def _write_labelled(graph: "ChannelGraph", model: Path, output: Path, overwrite: bool) -> None:
    """Write a model as its file has it, with the names of its groups."""
    from morphgraph.labels import label
    from morphgraph.workflow import load, save

    labelled = load(model, fixed=graph.options.fixed)
    count = label(labelled, graph)
    save(labelled, output, overwrite)
    note(f"wrote {escape(str(output))}: {count} nodes are labelled")


def _warn_of_opaque(model: Path, analysis: "Analysis") -> None:
    if analysis.opaque_ops:
        names = some([op.name for op in analysis.opaque_ops])
        warn(
            f"{escape(str(model))}: operators that are not described; the channels that they touch "
            f"keep their size: {names}",
        )
