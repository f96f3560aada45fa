"""``morphgraph report``: one HTML file that shows what a resize did."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, step
from morphgraph.cli.following import tell_intention
from morphgraph.cli.models import Lifting, fixed_alike, open_graph, open_planned
from morphgraph.cli.pages import command_line, write_page
from morphgraph.cli.shared_options import DeviceFile, DryRun, Overwrite, check_output, output_file
from morphgraph.errors import ArgumentError
from morphgraph.options import option
from morphgraph.words import escape, file_word

if TYPE_CHECKING:
    from morphgraph.benchmark import BenchResult
    from morphgraph.graph import ChannelGraph
    from morphgraph.report.pages.facts import Facts, LayerTime

    _Graphs = tuple[ChannelGraph, ChannelGraph | None]

Seconds = Annotated[
    float,
    option("How long each of both models is timed; 0 leaves times out.", ge=0, metavar="S"),
]


@command
def report(
    subjects: Annotated[tuple[Path, ...], option(metavar="RUN|MODEL [PLAN] [SLIM]")],
    *,
    output: Annotated[Path, output_file("report.html")],
    seconds: Seconds = 3.0,
    device: DeviceFile = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
) -> None:
    """Show a run, a plan, or a resize as one HTML file.

    Of a folder that `morph` has written, of a model, of a model and its plan, or of a model and
    its resized version (and the plan between). The file needs no other and no network. With
    --device, times of layers are shown as predicted and as measured.
    """
    check_output(output, overwrite, *subjects)
    if dry_run:
        steps = ["lift the models, and draw the page"]
        if seconds:
            steps.insert(0, f"time every model for {seconds:g} s")
        tell_intention("report", steps, [output], "table")
        return
    write_page(output, _facts(subjects, seconds, device, lifting), overwrite)


def _facts(
    subjects: Sequence[Path], seconds: float, device: Path | None, lifting: Lifting
) -> "Facts":
    from morphgraph.folders.found import folder_of, model_places
    from morphgraph.report.pages.gather import Resized, resized_facts
    from morphgraph.report.pages.runs import arm_quality, chosen_arm, run_facts, run_result

    first = subjects[0]
    if first.is_dir() and folder_of(first) is None:
        if subjects[1:]:
            raise click.UsageError(f"{escape(str(first))} is a folder; give nothing beside it")
        result = run_result(first)
        name = chosen_arm(result)
        arms = dict.fromkeys([next(iter(result.arms)), name])
        files = [first / result.arms[arm].file for arm in arms]
        graphs, timing, times = _measured(files, seconds, device, lifting)
        quality = arm_quality(result, name)
        before, after = graphs
        shown = Resized(first.name, before, after, timing=timing, quality=quality, times=times)
        return run_facts(first, result, replace(shown, command=command_line()))
    plans = [path for path in subjects if path.suffix == ".json"]
    models = model_places([path for path in subjects if path.suffix != ".json"])
    if plans and not models:
        line = f"morphgraph report MODEL {file_word(plans[0])}"
        raise click.UsageError(f"a plan is shown beside its model: `{line}`")
    if not 1 <= len(models) <= 2 or len(plans) > 1:
        raise click.UsageError(
            "give the folder of a run; or a model and, as far as there are any, its plan and its "
            "resized version"
        )
    lifted, plan = open_planned(models[0], plans[0], lifting) if plans else (None, None)
    graphs, timing, times = _measured(models, seconds, device, lifting, lifted)
    before, after = graphs
    shown = Resized(models[0].name, before, after, plan=plan, timing=timing, times=times)
    return resized_facts(replace(shown, command=command_line()))


def _measured(
    models: Sequence[Path],
    seconds: float,
    device: Path | None,
    lifting: Lifting,
    first: "ChannelGraph | None" = None,
) -> "tuple[_Graphs, BenchResult | None, list[LayerTime]]":
    """One or two models, lifted; timed where that is asked for, and by layer on a device."""
    from morphgraph.benchmark import bench, structure_of
    from morphgraph.report.pages.gather import layer_times

    if device is not None and not seconds:
        raise ArgumentError("--device shows its times beside measured ones; drop --seconds 0")
    if seconds and models[0].is_dir():
        # A page shows the times of two models; these are several runs of each.
        if device is not None:
            raise ArgumentError(
                f"{escape(str(models[0]))}: is a network of several files, which a page shows no "
                "times of; drop --device, or give a file of each"
            )
        note("no times of a network of several files on the page; `morphgraph bench` shows them")
        seconds = 0
    lifting = fixed_alike(models, lifting)
    graphs = [first] if first is not None else [open_graph(models[0], lifting)]
    graphs += [open_graph(path, lifting) for path in models[1:]]
    both = graphs[0], (graphs[1] if graphs[1:] else None)
    if not seconds:
        return both, None, []
    with step("timing", seconds * len(models)):
        timing = bench(
            models,
            seconds=seconds,
            input_shapes=dict(lifting.input_shapes),
            fixed=dict(lifting.fixed if first is None else first.options.fixed),
            profile=device is not None,
            structures=[structure_of(graph) for graph in graphs],
        )
    times = [] if device is None else layer_times(graphs, timing, device)
    return both, timing, times
