"""A run of the whole loop on images: one model, one dataset, one budget, one folder.

    run.json         what the run is of, for --resume
    events.jsonl     what happened, one line each, as it happened
    iteration-1/...  plan.json and model.onnx of every round of shrinking and expanding
    base.onnx        the original (trained by the same recipe, where baselines are asked for)
    plan.json        the structure that the training decided on
    slim.onnx        the resized network, trained
    uniform.onnx     the width multiplier at the same cost, and so on for every baseline
    slim-75.onnx     of several budgets one each, with plan-75.json
    ranking.json     in which order channels leave, for budgets between these
    elastic.onnx     the whole network of an elastic run, from which `morphgraph slice` cuts others
    result.json      costs, accuracies, checks, seconds; its presence says that the run is finished

Models carry their preprocessing, layout and classes in their metadata.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, static_shape
from morphgraph.options import BASELINES
from morphgraph.passes.checking.fixing import require_fixed
from morphgraph.recipes.baselines import check_baselines
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.folder import Event, RunFolder, SecondaryRunFolder, manifest_of, open_folder
from morphgraph.recipes.from_new import Fresh
from morphgraph.recipes.from_trained import elastic, tuned_family
from morphgraph.recipes.results import Result
from morphgraph.recipes.settings import Settings as Settings
from morphgraph.recipes.trainer import best_device, steps_per_epoch, train
from morphgraph.recipes.work import Work
from morphgraph.torch_io.to_torch import flat_network
from morphgraph.train import distributed
from morphgraph.train.phases import ResumablePenalty
from morphgraph.train.smoke import STEPS, SmokeReport, smoke_graph

FILES = (
    "run.json",
    "events.jsonl",
    "checkpoints",
    "iteration-*",
    "plan.json",
    "base.onnx",
    "slim.onnx",
    *(f"{name}.onnx" for name in BASELINES),
    "slim-*.onnx",
    "plan-*.json",
    "ranking.json",
    "elastic.onnx",
    "curves.svg",
    "result.json",
)


def run(
    graph: ChannelGraph,
    dataset: Dataset,
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    on_event: Callable[[Event], None] | None = None,
) -> Result:
    """Learn a structure within a budget on a dataset, and write everything into a folder.

    Args:
        graph: the lifted model, an image classifier,
            ``[N, channels, height, width] -> [N, classes]``.
        dataset: images of the model's size and channels (see :func:`load_data`).
        settings: how.
        folder: made if missing.
        overwrite: whether files of an earlier run may be replaced.
        resume: continue the run in the folder from the last checkpoint. On the same machine with
            as many threads the plan and the accuracies are the same, to the last digit, as if it
            had not been stopped. What is finished is read; what has not begun begins.
        checkpoint_seconds: between two checkpoints within an epoch.
        on_event: called with every event as it is logged.

    Raises:
        ArgumentError: the budget is on no cost, or no amount; or what is to be resumed was begun
            with other settings, another model or other data.
        BudgetError: the budget cannot be met.
        FileError: the folder holds a run already, or cannot be written.
        UnsupportedError: the model is no classifier of these images, or the training diverges.
        VerificationError: the model computes something else than its file does for the values
            that inputs are fixed to.
    """
    require_classes(graph, dataset)
    check_baselines(settings.baselines)
    settings.aim.check(graph)
    require_fixed(graph, settings.seed)  # afterwards the weights are others than the file's
    device = best_device()
    manifest = manifest_of(graph, dataset, asdict(settings), device)
    for name in ("settings", "model", "data"):
        distributed.require_equal(name, json.dumps(manifest[name]))
    make = partial(
        RunFolder, overwrite=overwrite, resume=resume, every=checkpoint_seconds, on_event=on_event
    )
    place, finished = open_folder(lambda: make(folder, manifest, FILES))
    torch.backends.cudnn.deterministic = True  # a resumed run must give the same result
    with closing(place), warnings.catch_warnings():
        for text in place.warnings:
            place.log("warning", name=text)
        if finished is not None:
            place.tell("finished")
            return Result.from_json(finished, str(folder / "result.json"))
        _log_warnings(place)
        work = Work(graph, dataset, settings, place, device)
        if settings.trained is None:
            return Fresh(work).go()
        return (elastic if settings.trained.elastic else tuned_family)(work, settings.trained)


def smoke_run(graph: ChannelGraph, dataset: Dataset, settings: Settings) -> SmokeReport:
    """The checks of :mod:`morphgraph.train.smoke` with what a run would train, for a few steps.

    Raises:
        UnsupportedError: the model is no classifier of these images, or the training diverges.
    """
    require_classes(graph, dataset)
    recipe = replace(settings.shrink, warmup=0.0)  # the first steps are all that there is

    def fit(net: nn.Module, penalty: ResumablePenalty) -> None:
        train(net, dataset, recipe, seed=settings.seed, phase="smoke", penalty=penalty)

    aim, device = settings.aim, best_device()
    # Few images fill few steps: as many epochs as it takes.
    recipe = replace(recipe, epochs=-(-STEPS // steps_per_epoch(dataset, recipe)))
    return smoke_graph(
        graph,
        lambda: flat_network(graph.model).to(device),
        fit,
        aim.regularized,
        aim.strength,
        min_width=aim.min_width,
    )


def require_classes(graph: ChannelGraph, dataset: Dataset) -> None:
    """Refuse a model with fewer classes than the data have.

    Raises:
        UnsupportedError: says how many.
    """
    classes = static_shape(graph.model.graph.outputs[0])[-1]
    if classes < len(dataset.classes):
        raise UnsupportedError(
            f"the model tells {classes} classes apart, {escape(dataset.name)} has "
            f"{len(dataset.classes)}; give a model with as many outputs as the data has classes"
        )


def _log_warnings(folder: RunFolder | SecondaryRunFolder) -> None:
    """Let ``MorphWarning`` become events: they must be in the log, each once."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, MorphWarning):
            folder.log("warning", name=str(message))
        else:
            others(message, category, *place, **more)

    warnings.simplefilter("always", MorphWarning)
    warnings.showwarning = show
