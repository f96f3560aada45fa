"""``morphgraph plan``: which channels stay."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, cast

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, settings, show, step, suggest
from morphgraph.cli.data_options import DATA_METAVAR, DataOptions
from morphgraph.cli.devices import on_told_device
from morphgraph.cli.following import (
    budget_words,
    lifting_words,
    tell_intention,
    unused,
)
from morphgraph.cli.models import Lifting, naming, open_graph, open_inputs, warn_of_weights
from morphgraph.cli.progress import ProgressLines
from morphgraph.cli.shared_options import (
    DeviceFile,
    DryRun,
    Measure,
    OutputFormat,
    Overwrite,
    budget_option,
    check_output,
    file_of_table,
    indices_of_output,
    output_file,
    refuse_repeated,
)
from morphgraph.cli.width_options import PlanOptions, refuse_for_several_files
from morphgraph.errors import ModelError
from morphgraph.options import DATA_SCORES, Format, Score, option
from morphgraph.words import escape, with_options

if TYPE_CHECKING:
    from morphgraph.calibration import Samples
    from morphgraph.folders.found import ModelFolder
    from morphgraph.graph import ChannelGraph
    from morphgraph.passes.planning.constraints import Budget
    from morphgraph.plans import Plan
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
    tokens: Annotated[
        tuple[tuple[str, Path], ...],
        option(
            "Token ids whose rows an embedding keeps, and an output tied to it: one on each line, "
            "a JSON array or .npy; where inputs number several tables, give the name. Inputs "
            "must be renumbered: the new id of a token is its place among those in the plan's "
            "request.keep_tokens.",
            "--keep-tokens",
            type=file_of_table,
            metavar="[TABLE=]FILE",
        ),
    ] = (),
    vocabulary: Annotated[
        Path | None,
        option(
            "Token ids that a language model keeps, in its embedding and in all outputs that have "
            "the tokens, tied or not; a file as for --keep-tokens. Keep special tokens among them.",
            metavar="FILE",
        ),
    ] = None,
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
            metavar="FILE.npz|FOLDER",
        ),
    ] = None,
    device: DeviceFile = None,
    measure: Measure = False,
    for_refit: Annotated[
        bool,
        option(
            "`apply --refit` follows, which gives biases to layers that have none: meet the "
            "budgets with them."
        ),
    ] = False,
    options: PlanOptions,
    data: Annotated[
        Path | None,
        option(
            f"Calibration inputs, for --score {', '.join(DATA_SCORES[:-1])} or {DATA_SCORES[-1]}.",
            metavar=DATA_METAVAR,
        ),
    ] = None,
    reading: DataOptions,
    output: Annotated[Path | None, output_file("plan.json")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
    output_format: OutputFormat = "table",
) -> None:
    """Decide which channels stay so that a model fits a budget.

    Give budgets, --uniform, or widths with --set, which goes with both others. Without -o the plan
    is shown and not written. What calibration inputs say of the channels (--score data --data FILE)
    serves networks that are not trained again; `shrink` goes the whole way.
    """
    from morphgraph.folders.found import folder_of, model_place
    from morphgraph.folders.vocabulary import warn_of_parts
    from morphgraph.onnx_io.inputs import load_indices
    from morphgraph.passes.planning import removal_path
    from morphgraph.passes.planning.vocabulary import by_vocabulary
    from morphgraph.report.planning import plan_report
    from morphgraph.steps import measured_plan, with_room

    folder, model = folder_of(model), model_place(model)
    by_index = bool(classes or tokens or vocabulary)
    if vocabulary is not None and (classes or tokens):
        raise click.UsageError(
            "--vocabulary says what outputs and tables keep; leave --keep-classes and "
            "--keep-tokens out"
        )
    if model.is_dir():
        refuse_for_several_files(by_index, options.depth)
    by_data = options.score in DATA_SCORES
    if by_data and data is None:
        raise click.UsageError(f"--score {options.score} needs calibration inputs; give --data")
    if data is not None and not by_data:
        raise click.UsageError(
            f"--data goes with --score {', '.join(DATA_SCORES[:-1])} or {DATA_SCORES[-1]}; choose "
            "one, or leave --data out"
        )
    if sensitivity:
        if budgets or ratio is not None or by_index or options.widths or output is not None:
            raise click.UsageError("--sensitivity makes no plan; leave out what a plan is for")
        if by_data:
            raise click.UsageError(
                "--sensitivity goes by scores of weights; choose another --score"
            )
        graph = open_graph(model, lifting)
        with naming(model, ModelError):
            show(_sensitivity(graph, inputs, options), output_format)
        words = [*lifting_words(lifting), "--budget", "flops=50%", "-o", unused("plan.json")]
        suggest("plan", model, *words)
        return
    if inputs is not None:
        raise click.UsageError("--inputs goes with --sensitivity")
    if (device or measure) and not any(kind.startswith("latency") for kind, _ in budgets):
        raise click.UsageError("--device and --measure go with --budget latency=...")
    _check_request(budgets, ratio, by_index or bool(options.widths))
    if for_refit and not budgets:
        raise click.UsageError("--for-refit keeps room in a --budget; give one")
    if options.depth != "keep" and not budgets:
        raise click.UsageError("--depth goes with a --budget, for which branches or blocks go")
    if options.depth != "keep" and ratio is not None:
        raise click.UsageError("--uniform multiplies widths alone; leave --depth out")
    _check_names("--keep-classes", [name for name, _ in classes])
    _check_names("--keep-tokens", [name for name, _ in tokens])
    kept: dict[str, Any] = {
        "keep_classes": _alone(dict(classes)),
        "keep_tokens": _alone({name: load_indices(path) for name, path in tokens}),
    }
    check_output(output, overwrite, model, *((data,) if data else ()))
    graph = open_graph(
        model, lifting, pin_outputs=not by_index, pin_rows=not (tokens or vocabulary)
    )
    if vocabulary is not None:
        ids = load_indices(vocabulary)
        with naming(model, ModelError):
            kept["keep_classes"], kept["keep_tokens"] = by_vocabulary(graph, ids)
        if folder is not None:
            warn_of_parts(folder, ids)
    options = options.beside(folder)
    if options.score != "random":
        warn_of_weights(model, graph)
    budget = on_told_device(dict(budgets), device)
    if dry_run and (measure or data):
        _tell(None, graph, budgets, data, measure, output, output_format)
        return
    samples = reading.read(data, graph.model, options.seed, folder) if data else None
    with step("planning"), naming(model, ModelError):
        arguments = options.arguments()
        if samples is None:
            arguments["ties"] = options.ties(graph, folder)
        make: Callable[[Budget], Plan]
        if samples is not None:
            make = _by_data(graph, samples, ratio, kept, options, folder)
        elif ratio is not None:
            share = ratio if isinstance(ratio, float) else None
            make = partial(_uniform, graph, share, kept | _widths_alone(arguments))
        else:
            make = partial(removal_path.plan, graph, **kept, **arguments)
        if for_refit:
            make = with_room(graph, make, options.convention)
        if measure:
            progress = ProgressLines()
            result = measured_plan(graph, make, budget, options.seed, progress, refit=for_refit)
        else:
            result = make(budget)
    if dry_run:
        _tell(result, graph, budgets, data, measure, output, output_format)
        return
    if output is not None:
        result.save(output, overwrite)
    show(plan_report(graph, result, options.convention), output_format)
    note(f"wrote {escape(str(output))}" if output else "nothing written; give -o to keep the plan")
    if output is None:
        suggest(*with_options(settings().arguments, "-o", str(unused("plan.json"))))
    else:
        slim = unused("slim.onnx" if folder is None else "slim")  # a folder like the model's own
        more = lifting_words(lifting, planned=True)
        more += reading.words(data) if for_refit and data is not None else []
        suggest("apply", model, output, *more, "-o", slim)


def _tell(
    plan: "Plan | None",
    graph: "ChannelGraph",
    budgets: tuple[tuple[str, str], ...],
    data: Path | None,
    measure: bool,
    output: Path | None,
    output_format: Format,
) -> None:
    """What a plan would come to, or what it takes to make it."""
    from morphgraph.report.intention import costs_of

    steps = [f"choose channels for {' '.join(budget_words(budgets)) or 'the widths by hand'}"]
    if data is not None:
        steps.insert(0, f"run the network over inputs of {data}")
    if measure:
        steps.append("time the result beside the model, and plan again until it fits")
    if plan is not None:
        steps.append(f"resize {len(plan.groups)} of {len(graph.groups)} groups of channels")
    costs = None if plan is None else costs_of(graph, plan)
    tell_intention("plan", steps, [output], output_format, costs)


def _by_data(
    graph: "ChannelGraph",
    samples: "Samples",
    ratio: float | str | None,
    kept: dict[str, Any],
    options: PlanOptions,
    folder: "ModelFolder | None",
) -> "Callable[[Budget], Plan]":
    """Makes plans by a score of calibration inputs."""
    from morphgraph.passes.planning.bounds import WidthBounds
    from morphgraph.shrinker import Shrinker

    arguments = options.arguments()
    score, convention, seed = (arguments.pop(name) for name in ("score", "convention", "seed"))
    bounds = WidthBounds(**arguments, ties=options.ties(graph, folder))
    shrinker = Shrinker(graph, samples, bounds=bounds, seed=seed, progress=ProgressLines())
    if ratio is None:
        return partial(shrinker.plan, score=score, convention=convention, **kept)
    share = ratio if isinstance(ratio, float) else None
    given = _widths_alone(arguments) | kept | {"ties": bounds.ties}
    given |= {"score": shrinker.scores(score), "convention": convention}
    return partial(_uniform, graph, share, given)


def _widths_alone(arguments: dict[str, Any]) -> dict[str, Any]:
    """What goes with one ratio for all widths."""
    return {name: value for name, value in arguments.items() if name != "depth"}


def _uniform(
    graph: "ChannelGraph", share: float | None, given: dict[str, Any], budget: "Budget"
) -> "Plan":
    from morphgraph.passes.planning.uniform import uniform

    return uniform(graph, share, budget=budget, **given)


def _sensitivity(graph: "ChannelGraph", inputs: Path | None, options: PlanOptions) -> "Report":
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
        open_inputs(inputs),
        score=cast("Score", options.score),
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
    has_wishes: bool,
) -> None:
    refuse_repeated(budgets)
    if not budgets and ratio is None and not has_wishes:
        raise click.UsageError(
            "say what the result may cost: --budget, --uniform, --set, --keep-classes, "
            "--keep-tokens or --vocabulary"
        )
    if ratio == _FIT and not budgets:
        raise click.UsageError("--uniform fit needs a --budget to fit")
    if budgets and isinstance(ratio, float):
        raise click.UsageError("--uniform with a number meets no --budget; write --uniform fit")


def _check_names(option_name: str, names: list[str]) -> None:
    """Refuse a name that is given twice, and several values of which one has no name."""
    if len(set(names)) < len(names) or ("" in names and len(names) > 1):
        raise click.UsageError(f"{option_name}: given several times, so give each with its name")


def _alone(by_name: dict[str, list[int]]) -> dict[str, list[int]] | list[int]:
    """The only value, if it has no name."""
    return by_name.get("", by_name)
