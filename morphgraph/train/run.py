"""A run folder: one model, one dataset, one budget, and everything that came of them.

    base.onnx      the original (trained by the same recipe, where baselines are asked for)
    plan.json      the structure that the training decided on
    slim.onnx      the resized network, trained
    uniform.onnx   the width multiplier at the same cost (with baselines)
    result.json    costs, accuracies, checks, seconds
    events.jsonl   what happened, one line each, as it happened

Models carry their preprocessing, layout and classes in their metadata.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import torch
from torch import fx

from morphgraph.errors import FileError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, save, static_shape, write_atomically
from morphgraph.passes.cost import cost
from morphgraph.passes.goals import goals_of, require_reachable
from morphgraph.passes.lift import lift
from morphgraph.passes.limits import Limits
from morphgraph.passes.widths import uniform
from morphgraph.plans import Change
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights
from morphgraph.train.controller import Budget
from morphgraph.train.data import Dataset
from morphgraph.train.regularizer import Regularizer, Strength
from morphgraph.train.trainer import Epoch, Recipe, accuracy, train
from morphgraph.version import __version__
from morphgraph.workflow import resize_and_check

PREPROCESSING_KEY = "morphgraph.preprocessing"
CLASSES_KEY = "morphgraph.classes"

FILES = ("base.onnx", "plan.json", "slim.onnx", "uniform.onnx", "result.json", "events.jsonl")

Event = Mapping[str, Any]


class Arm(msgspec.Struct, frozen=True):
    """One network of a comparison: test accuracy (0 to 1), costs, epochs trained in this run."""

    accuracy: float
    macs: float
    params: float
    epochs: int
    file: str


class Result(msgspec.Struct, frozen=True):
    """What ``result.json`` holds.

    ``error`` is the resized network's largest difference from the masked original, relative to the
    output's scale; ``felt`` how far masking moved the original; ``trimmed`` the share of the
    budgeted cost that the plan still had to remove after training.
    """

    data: str
    seed: int
    budget: dict[str, str]
    cost: dict[str, Change]
    arms: dict[str, Arm]
    resized_accuracy: float
    error: float
    felt: float
    trimmed: float
    seconds: float
    schema_version: int = 1
    tool_version: str = __version__


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        budget: one cost with an amount or a share, such as ``{"flops": "50%"}``.
        shrink: the recipe of the phase that learns the structure.
        retrain: the recipe of the phase after the resize; baselines train for the epochs of both.
        strength: see :class:`~morphgraph.train.regularizer.Regularizer`.
        round_to, min_width: grid and floor of the new widths; with 0 layers may vanish.
        baselines: also train the original and the width multiplier at the same cost.
        seed: of everything random.
    """

    budget: Mapping[str, str]
    shrink: Recipe
    retrain: Recipe
    strength: Strength = "auto"
    round_to: int = 1
    min_width: int = 1
    baselines: bool = False
    seed: int = 0


def run(
    graph: ChannelGraph,
    dataset: Dataset,
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool = False,
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
        on_event: called with every event as it is logged.

    Raises:
        ArgumentError: the budget is on no cost, or no amount.
        BudgetError: the budget cannot be met.
        FileError: the folder holds a run already, or cannot be written.
        UnsupportedError: the model is no classifier of these images, or the training diverges.
    """
    classes = static_shape(graph.model.graph.outputs[0])[-1]
    if classes < len(dataset.classes):
        raise UnsupportedError(
            f"the model tells {classes} classes apart, {escape(dataset.name)} has "
            f"{len(dataset.classes)}; give a model with as many outputs as the data has classes"
        )
    limits = Limits(settings.round_to, settings.min_width)
    require_reachable(graph, goals_of(graph, settings.budget, "default"), limits)
    return _Run(graph, dataset, settings, folder, overwrite, on_event).go()


class _Run:
    def __init__(
        self,
        graph: ChannelGraph,
        dataset: Dataset,
        settings: Settings,
        folder: Path,
        overwrite: bool,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.graph = graph
        self.dataset = dataset
        self.settings = settings
        self.folder = folder
        self.overwrite = overwrite
        self.on_event = on_event
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.began = time.perf_counter()
        self._open_folder()

    def go(self) -> Result:
        settings = self.settings
        (kind,) = settings.budget
        torch.manual_seed(settings.seed)
        arms: dict[str, Arm] = {}
        both = settings.shrink.epochs + settings.retrain.epochs
        shrunk = self._to_torch(self.graph.model)
        floor = settings.min_width
        regularizer = Regularizer(self.graph, shrunk, kind, settings.strength, min_width=floor)
        self._train(
            "shrink", shrunk, settings.shrink, lambda n: Budget(regularizer, settings.budget, n)
        )
        plan = regularizer.plan(settings.budget, round_to=settings.round_to)
        trimmed = regularizer.live_share() - plan.cost[kind].after / plan.cost[kind].before
        plan.save(self.folder / "plan.json", self.overwrite)
        resized = resize_and_check(self.graph, plan, weights=shrunk, seed=settings.seed)
        assert resized.report is not None
        slim = self._to_torch(resized.model)
        before = accuracy(slim, self.dataset)
        self._log("resized", accuracy=before, error=resized.report.worst.relative)
        self._train("retrain", slim, settings.retrain)
        arms["slim"] = self._arm("slim", resized.model, slim, both)
        arms = self._baselines(kind, both) | arms
        result = Result(
            data=self.dataset.name,
            seed=settings.seed,
            budget={name: str(amount) for name, amount in settings.budget.items()},
            cost=plan.cost,
            arms=arms,
            resized_accuracy=before,
            error=resized.report.worst.relative,
            felt=resized.report.felt,
            trimmed=trimmed,
            seconds=round(time.perf_counter() - self.began, 1),
        )
        data = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
        write_atomically(self.folder / "result.json", data, self.overwrite)
        self._log("done", seconds=result.seconds)
        return result

    def _baselines(self, kind: str, epochs: int) -> dict[str, Arm]:
        """The original as given; or, trained alike, with the width multiplier at the same cost."""
        net = self._to_torch(self.graph.model)
        if not self.settings.baselines:
            return {"base": self._arm("base", self.graph.model, net, 0)}
        recipe = replace(self.settings.retrain, epochs=epochs)
        self._train("base", net, recipe)
        arms = {"base": self._arm("base", self.graph.model, net, epochs)}
        even = uniform(
            self.graph,
            budget={kind: self.settings.budget[kind]},
            round_to=self.settings.round_to,
            min_width=self.settings.min_width,
        )
        model = resize_and_check(self.graph, even, seed=self.settings.seed).model
        narrow = self._to_torch(model)
        self._train("uniform", narrow, recipe)
        arms["uniform"] = self._arm("uniform", model, narrow, epochs)
        return arms

    def _to_torch(self, model: ir.Model) -> fx.GraphModule:
        net: fx.GraphModule = to_torch(model).to(self.device)
        return net

    def _train(
        self,
        phase: str,
        net: fx.GraphModule,
        recipe: Recipe,
        make_budget: Callable[[int], Budget] | None = None,
    ) -> None:
        self._log("phase", phase=phase, epochs=recipe.epochs)

        def tell(epoch: Epoch) -> None:
            self._log("epoch", phase=phase, **asdict(epoch))

        train(
            net,
            self.dataset,
            recipe,
            seed=self.settings.seed,
            make_budget=make_budget,
            on_epoch=tell,
        )

    def _arm(self, name: str, model: ir.Model, net: fx.GraphModule, epochs: int) -> Arm:
        """Write a trained network and say what it is worth."""
        trained = with_weights(model, net)
        preprocessing = asdict(self.dataset.preprocessing)
        trained.metadata_props[PREPROCESSING_KEY] = json.dumps(preprocessing)
        trained.metadata_props[CLASSES_KEY] = json.dumps(self.dataset.classes)
        graph = lift(trained)
        path = self.folder / f"{name}.onnx"
        save(trained, path, self.overwrite)
        arm = Arm(
            accuracy=accuracy(net, self.dataset),
            macs=cost(graph, "macs").total,
            params=cost(graph, "params").total,
            epochs=epochs,
            file=path.name,
        )
        self._log("arm", name=name, accuracy=arm.accuracy, macs=arm.macs, params=arm.params)
        return arm

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"{escape(str(self.folder))}: {error.strerror}; give a folder that can be written"
            ) from None
        earlier = [self.folder / name for name in FILES if (self.folder / name).exists()]
        if earlier and not self.overwrite:
            raise FileError(
                f"{escape(str(self.folder))}: holds a run already; "
                "give another folder or --overwrite"
            )
        for path in earlier:  # not every run writes all files; what stayed would look like its own
            path.unlink()

    def _log(self, event: str, **fields: object) -> None:
        entry = {"event": event, "at": round(time.perf_counter() - self.began, 2), **fields}
        with (self.folder / "events.jsonl").open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        if self.on_event is not None:
            self.on_event(entry)
