"""``morphgraph shrink``: a smaller network by calibration inputs, without training."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import be_silent, note, settings, show, step, suggest
from morphgraph.cli.data_options import DATA_METAVAR, DataOptions
from morphgraph.cli.devices import on_told_device
from morphgraph.cli.following import bench_words, tell_intention, unused
from morphgraph.cli.models import Lifting, naming, open_graph, warn_of_weights
from morphgraph.cli.outputs import Annotate, ResultFile
from morphgraph.cli.pages import ReportFile, command_line, write_page
from morphgraph.cli.progress import ProgressLines
from morphgraph.cli.shared_options import (
    DeviceFile,
    DryRun,
    Measure,
    OutputFormat,
    Overwrite,
    budget_option,
    check_output,
    output_file,
    refuse_repeated,
)
from morphgraph.cli.width_options import ShrinkOptions, refuse_for_several_files
from morphgraph.errors import ModelError, MorphError
from morphgraph.options import DataScore, Format, option
from morphgraph.words import escape, with_options

if TYPE_CHECKING:
    from morphgraph.calibration import Samples
    from morphgraph.graph import ChannelGraph
    from morphgraph.passes.planning.constraints import Budget
    from morphgraph.plans import Plan
    from morphgraph.shrinker import CurvePoint, Shrinker
    from morphgraph.shrinking import ShrinkResult


@command
def shrink(
    model: Path,
    *,
    data: Annotated[
        Path,
        option(
            "Calibration inputs, without labels: arrays by the names of inputs, or a folder of "
            "images or arrays.",
            metavar=DATA_METAVAR,
        ),
    ],
    budgets: Annotated[
        tuple[tuple[str, str], ...],
        budget_option(
            "flops=70%",
            "The most that the result may cost, as for `plan`: flops=70%, params=2M; may be "
            "repeated.",
        ),
    ] = (),
    device: DeviceFile = None,
    measure: Measure = False,
    output: Annotated[Path | None, output_file("slim.onnx")] = None,
    curve: Annotated[
        bool,
        option(
            "Show what 90, 80, 70, 60 and 50 % of the first budget's cost do to the outputs. "
            "Without -o nothing else is done."
        ),
    ] = False,
    plot: Annotated[
        Path | None, option("Draw that curve to this file, too.", metavar="curve.svg")
    ] = None,
    no_refit: Annotated[
        bool, option("Leave the kernels as they are, but for the channels that go.")
    ] = False,
    tune: Annotated[
        int,
        option(
            "Then train the result for so many steps to answer as the original does, without "
            "labels. Needs torch, and minutes.",
            ge=0,
            metavar="STEPS",
        ),
    ] = 0,
    plan: Annotated[
        Path | None, option("Write the plan to this file, too.", metavar="plan.json")
    ] = None,
    report: ReportFile = None,
    no_verify: Annotated[
        bool, option("Do not check the resize against the masked original.")
    ] = False,
    fold: Annotated[
        bool, option("Write a file for shipping: BatchNorm and scales go into the layers beside.")
    ] = False,
    annotate: Annotate = False,
    options: ShrinkOptions,
    reading: DataOptions,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Fit a model into a budget without training it, by calibration inputs.

    Chooses the channels whose removal the outputs feel least, removes them, and fits the kernels
    that are left to what the original computes for the inputs. A few hundred inputs do, and no
    labels are needed. A fifth of them is held out, and says what to expect, before anything is
    written.
    """
    from morphgraph.calibration.processes import joined
    from morphgraph.folders.found import folder_of, model_place
    from morphgraph.onnx_io import write_atomically

    refuse_repeated(budgets)
    if plot is not None:
        from morphgraph.report.vega import require_vega

        require_vega()
    folder, model = folder_of(model), model_place(model)
    if model.is_dir():
        refuse_for_several_files(False, options.depth)
    options = options.beside(folder)
    draws = curve or plot is not None
    _check_request(
        output, draws, bool(budgets or options.widths), bool(tune or plan or fold or report)
    )
    files = [path for path in (output, plan, plot, report) if path is not None]
    if len({path.absolute() for path in files}) < len(files):
        raise click.UsageError(
            "two of -o, --plan, --plot and --report name the same file; give each its own"
        )
    written = ResultFile(output or Path(), model, folder, overwrite, fold, annotate)
    for path in files:
        if path is output:
            written.check(data)
        else:
            check_output(path, overwrite, model, data)
    processes = click.get_current_context().with_resource(joined())
    if processes.rank:
        be_silent(processes.rank)
    graph = open_graph(model, lifting)
    warn_of_weights(model, graph)
    samples = reading.read(data, graph.model, options.seed, folder)
    budget = on_told_device(dict(budgets), device)
    if dry_run:
        extra = ["time the result, and plan again until it fits"] if measure else []
        extra += [] if no_refit else ["fit the kernels that are left"]
        extra += [f"train the result for {tune} steps"] if tune else []
        extra += ["show what smaller budgets do to the outputs"] if draws else []
        _tell(graph, samples, budget, options, extra, files, output_format)
        return

    from morphgraph.passes.planning.bounds import WidthBounds
    from morphgraph.report.shrinking import Calibrated, curve_svg, shrink_report
    from morphgraph.shrinker import Shrinker
    from morphgraph.shrinking import finish
    from morphgraph.steps import measured_plan

    arguments = options.arguments()
    score, convention, seed = (arguments.pop(name) for name in ("score", "convention", "seed"))
    result: ShrinkResult | None = None
    points: tuple[CurvePoint, ...] = ()
    multiplied: ShrinkResult | None = None
    kind = next(iter(budget), "flops")
    with naming(model, ModelError):
        shrinker = Shrinker(
            graph,
            samples,
            bounds=WidthBounds(**arguments, ties=options.ties(graph, folder)),
            seed=seed,
            progress=ProgressLines(),
            processes=processes,
        )
        if output is not None:
            with step("planning"):
                make = partial(
                    shrinker.plan, score=score, refit=not no_refit, convention=convention
                )
                if measure:
                    chosen = measured_plan(
                        graph, make, budget, seed, ProgressLines(), refit=not no_refit
                    )
                else:
                    chosen = make(budget)
            with step("resizing and fitting"):
                result = finish(
                    shrinker, chosen, refit=not no_refit, tune=tune, verify=not no_verify
                )
        if result is not None and report is not None and budget:
            with step("fitting the width multiplier"):
                given = {k: v for k, v in arguments.items() if k != "depth"} | {"seed": seed}
                multiplied = _multiplied(shrinker, budget, given, score, not no_refit)
        if draws:
            with step("drawing the curve"):
                points = shrinker.curve(
                    kind, score=score, refit=not no_refit, convention=convention
                )
    if processes.rank:
        return  # the first process writes and tells
    counts = shrinker.fitted.count, shrinker.held_out.count
    calibrated = Calibrated(samples.described, *counts)
    of = kind if draws else None
    show(shrink_report(graph, calibrated, result, points, of, convention), output_format)
    if result is not None and output is not None:
        tell_layers(result)
        written.save(graph, result.plan, result.model)
        written.tell()
        if plan is not None:
            result.plan.save(plan, overwrite)
    if plot is not None:
        write_atomically(plot, curve_svg(points, kind, model.name), overwrite)
    for path in files:
        if path not in (output, report):
            note(f"wrote {escape(str(path))}")
    if result is not None and report is not None:
        from morphgraph.report.pages.shrinks import shrink_facts

        names = model.name, command_line()
        shown = shrink_facts(graph, result, points, kind, calibrated, *names, multiplied)
        write_page(report, shown, overwrite)
    if output is None:
        if not files:
            note("nothing written; give -o and a --budget to shrink the model")
        words = [word for word in settings().arguments if word != "--curve"]
        asked = [] if budgets else ["--budget", "flops=70%"]
        suggest(*with_options(words, *asked, "-o", str(unused("slim.onnx"))))
    else:
        suggest(*bench_words(model, output, lifting))


def _tell(
    graph: "ChannelGraph",
    samples: "Samples",
    budget: "Budget",
    options: ShrinkOptions,
    extra: list[str],
    files: list[Path],
    output_format: Format,
) -> None:
    """What the work would be; the most that the result may cost stands for what it will."""
    from morphgraph.passes.planning.constraints import resolve_budget
    from morphgraph.plans import Change

    limits = resolve_budget(graph, budget, options.convention)
    steps = [
        f"run the network over {samples.described}",
        f"choose channels by {options.score}, and remove them",
        *extra,
    ]
    costs = {each.kind: Change(each.cost.total, each.limit) for each in limits}
    tell_intention("shrink", steps, files, output_format, costs)


def _multiplied(
    shrinker: "Shrinker",
    budget: "Budget",
    options: dict[str, Any],
    score: DataScore,
    refit: bool,
) -> "ShrinkResult | None":
    """The naive way to the same budget, for comparison; ``None`` where one ratio does not fit."""
    from morphgraph.passes.planning.uniform import uniform
    from morphgraph.passes.refit.room import plan_with_room
    from morphgraph.shrinking import finish

    try:
        scores = shrinker.scores(score)

        def make(limits: "Budget") -> "Plan":
            return uniform(shrinker.graph, None, budget=limits, score=scores, **options)

        plan = plan_with_room(shrinker.graph, budget, make) if refit else make(budget)
        return finish(shrinker, plan, refit=refit, verify=False)
    except MorphError as error:
        note(f"no width multiplier for comparison: {error}")
        return None


def _check_request(output: Path | None, draws: bool, has_budget: bool, has_more: bool) -> None:
    if output is None and not draws:
        raise click.UsageError(
            "give -o, the file to write, or --curve to see first what budgets cost"
        )
    if output is None and has_more:
        raise click.UsageError(
            "--tune, --plan, --fold and --report are of a result; give -o, the file to write"
        )
    if output is not None and not has_budget:
        raise click.UsageError(
            "say what the result may cost: --budget flops=70%, or --set; --curve without -o shows "
            "what budgets cost"
        )


def tell_layers(result: "ShrinkResult") -> None:
    """With ``-v`` the layers that are furthest from the original's."""
    if settings().verbosity > 0:
        from morphgraph.report.shrinking import layer_lines

        for line in layer_lines(result):
            note(line)
