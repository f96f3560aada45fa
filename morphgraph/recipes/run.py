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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from morphgraph.calibration import Samples
from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.learning import Member as Resized, Shrinking
from morphgraph.onnx_io import PREPROCESSING_KEY, escape, static_shape
from morphgraph.options import BASELINES, Alone, Baseline
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.passes.planning.nested import Ranking
from morphgraph.plans import Change, Plan, readable_json
from morphgraph.recipes.baselines import baseline_plan, check_baselines, fits_whole
from morphgraph.recipes.checkpoint import seed_of
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.folder import Event, RunFolder, SecondaryRunFolder, manifest_of, open_folder
from morphgraph.recipes.progress import Progress
from morphgraph.recipes.results import Arm, IterationResult, Member, Result, Widths
from morphgraph.recipes.settings import (
    ELASTIC,
    FromTrained,
    Settings as Settings,
    planned_work,
    shrink_phase,
)
from morphgraph.recipes.trainer import Epoch, Recipe, accuracy, best_device, steps_per_epoch, train
from morphgraph.slicing import DRAWS, Elastic, Ladder, Sliced
from morphgraph.torch_io.to_torch import flat_network
from morphgraph.torch_io.weights import graph_with_weights, with_weights
from morphgraph.train import distributed
from morphgraph.train.loop import Iteration, rounds, start_of_last
from morphgraph.train.phases import NoPenalty, Penalty, ResumablePenalty, ShrinkPenalty
from morphgraph.train.smoke import STEPS, SmokeReport, smoke_graph
from morphgraph.workflow import resize_and_check

CLASSES_KEY = "morphgraph.classes"

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
    """
    require_classes(graph, dataset)
    check_baselines(settings.baselines)
    settings.aim.check(graph)
    device = best_device()
    manifest = manifest_of(graph, dataset, asdict(settings), device)
    for name in ("settings", "model", "data"):
        distributed.require_equal(name, json.dumps(manifest[name]))
    make = partial(
        RunFolder, overwrite=overwrite, resume=resume, every=checkpoint_seconds, on_event=on_event
    )
    place, finished = open_folder(lambda: make(folder, manifest, FILES))
    with closing(place):
        for text in place.warnings:
            place.log("warning", name=text)
        if finished is not None:
            place.tell("finished")
            return Result.from_json(finished, str(folder / "result.json"))
        return _Run(graph, dataset, settings, place, device).go()


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


@dataclass
class _Run:
    graph: ChannelGraph
    dataset: Dataset
    settings: Settings
    folder: RunFolder | SecondaryRunFolder
    device: torch.device
    trained: ChannelGraph | None = None  # the original, for baselines that score it

    def __post_init__(self) -> None:
        self.progress = Progress(planned_work(self.graph, self.settings))

    def go(self) -> Result:
        with warnings.catch_warnings():
            self._log_warnings()
            return self._go()

    def _log_warnings(self) -> None:
        """Let ``MorphWarning`` become events: they must be in the log, each once."""
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, MorphWarning):
                self.folder.log("warning", name=str(message))
            else:
                others(message, category, *place, **more)

        warnings.simplefilter("always", MorphWarning)
        warnings.showwarning = show

    def _go(self) -> Result:
        settings, aim = self.settings, self.settings.aim
        torch.backends.cudnn.deterministic = True  # a resumed run must give the same result
        if settings.trained is not None and settings.trained.elastic:
            return self._elastic(settings.trained)
        if settings.trained is not None:
            return self._from_trained(settings.trained)
        if settings.method != "morph":
            return self._end(*self._alone(settings.method), [])
        iterations, last = self._learn()
        self.folder.write("plan.json", last.plan.to_json())
        shrinking = settings.shrink.epochs * last.number
        slim_model = start_of_last(last, aim.weights, settings.seed)
        slim = self._to_torch(slim_model)
        self._train("retrain", slim, settings.retrain)
        epochs = shrinking + settings.retrain.epochs
        slim_arm = self._arm("slim", slim_model, slim, epochs)
        arms = {**self._baselines(shrinking), "slim": slim_arm}
        return self._end(arms, last.plan.cost, iterations)

    def _end(
        self,
        arms: dict[str, Arm],
        costs: dict[str, Change],
        iterations: list[IterationResult],
        members: Sequence[Member] = (),
    ) -> Result:
        aim = self.settings.aim
        result = Result(
            data=self.dataset.name,
            seed=self.settings.seed,
            budget={name: str(amount) for name, amount in aim.budget.items()},
            regularized=aim.regularized,
            cost=costs,
            arms=arms,
            iterations=iterations,
            seconds=round(self.folder.seconds, 1),
            family=list(members),
        )
        self.folder.finish(result.to_json())
        return distributed.from_first(lambda: result)

    # -- from a trained network ----------------------------------------------------------------

    def _from_trained(self, trained: FromTrained) -> Result:
        """One network per budget, each fine-tuned."""
        settings = self.settings
        net = self._to_torch(self.graph.model)
        shrinking = Shrinking(
            self.graph,
            net,
            trained.of(settings.aim),
            self._calibration(trained.images),
            seed=settings.seed,
        )

        def learn(net: nn.Module, penalty: Penalty) -> None:
            self._train(shrink_phase(1), net, settings.shrink, cast("ResumablePenalty", penalty))

        arms = {"base": self._arm("base", self.graph.model, self._to_torch(self.graph.model), 0)}
        shrinking.learn(learn)
        made = shrinking.members()
        plans = [member.plan for member in made]
        if len(made) > 1:
            self.folder.write("ranking.json", Ranking.of(self.graph, plans).to_json())
        learned = settings.shrink.epochs if trained.rank == "learned" else 0
        members = []
        for member in made:
            name = trained.name(member.rung)
            arms[name], told = self._tuned(shrinking, member, name, learned)
            members.append(told)
        return self._end(arms, plans[-1].cost, [], members)

    def _tuned(
        self, shrinking: Shrinking, member: Resized, name: str, epochs: int
    ) -> tuple[Arm, Member]:
        """Fine-tune the network of one budget, and say what became of it."""
        recipe = self.settings.retrain
        plan = f"{name.replace('slim', 'plan')}.json"
        self.folder.write(plan, member.plan.to_json())
        small = self._to_torch(member.model)
        before = accuracy(small, self.dataset)
        shares = {unit: c.after / c.before for unit, c in member.plan.cost.items()}
        self.folder.log("resized", name=name, cost=shares, error=member.error, accuracy=before)
        penalty = shrinking.tuning(member, small)
        self._train(f"tune {name}", small, recipe, penalty)
        penalty.release()
        arm = self._arm(name, member.model, small, epochs + recipe.epochs)
        told = Member(
            name=name,
            budget={unit: str(amount) for unit, amount in member.budget.items()},
            cost=member.plan.cost,
            accuracy=arm.accuracy,
            resized_accuracy=before,
            error=member.error,
            sensitivity=member.sensitivity,
            plan=plan,
            model=arm.file,
        )
        return arm, told

    def _elastic(self, trained: FromTrained) -> Result:
        """One set of weights for all budgets between the whole network and the smallest."""
        settings, recipe, seed = self.settings, self.settings.retrain, self.settings.seed
        samples = self._calibration(trained.images)
        shared = self._to_torch(self.graph.model)
        ladder = distributed.from_first(
            lambda: Ladder.of(self.graph, shared, trained.of(settings.aim), samples, seed=seed)
        )
        self.folder.write("ranking.json", ladder.ranking.to_json())
        arms = {"base": self._arm("base", self.graph.model, shared, 0)}
        penalty = ladder.penalty(
            self.graph, shared, distill=trained.distill, draws=DRAWS, seed=seed
        )
        self._train(ELASTIC, shared, recipe, penalty)
        penalty.end()
        arms[ELASTIC] = self._arm(ELASTIC, self.graph.model, shared, recipe.epochs)
        before, after = (
            Elastic(graph, ladder.ranking, samples)
            for graph in (self.graph, graph_with_weights(self.graph, shared))
        )
        members = []
        for rung, budget in enumerate(trained.budgets):
            untrained, sliced = (
                each.slice(budget, round_to=settings.aim.round_to) for each in (before, after)
            )
            name = trained.name(rung)
            arm, told = self._sliced(name, budget, sliced, untrained, recipe.epochs)
            arms[name] = arm
            members.append(told)
        return self._end(arms, members[-1].cost, [], members)

    def _sliced(
        self, name: str, budget: Mapping[str, str], sliced: Sliced, untrained: Sliced, epochs: int
    ) -> tuple[Arm, Member]:
        """Write a slice of the elastic network, and say what the training did for it."""
        plan = f"{name.replace('slim', 'plan')}.json"
        self.folder.write(plan, sliced.plan.to_json())
        first = accuracy(self._to_torch(untrained.model), self.dataset)
        shares = {unit: c.after / c.before for unit, c in sliced.plan.cost.items()}
        error = sliced.check.worst.relative
        self.folder.log("resized", name=name, cost=shares, error=error, accuracy=first)
        arm = self._arm(name, sliced.model, self._to_torch(sliced.model), epochs)
        told = Member(
            name=name,
            budget=dict(budget),
            cost=sliced.plan.cost,
            accuracy=arm.accuracy,
            resized_accuracy=first,
            error=error,
            sensitivity=sliced.check.sensitivity,
            plan=plan,
            model=arm.file,
        )
        return arm, told

    def _calibration(self, count: int) -> Samples | None:
        """Some of the training images, as the network takes them."""
        if not count:
            return None
        chosen = np.random.default_rng(seed_of(self.settings.seed, "calibration"))
        images = len(self.dataset.y_train)
        picked = np.sort(chosen.permutation(images)[: min(count, images)])
        inputs = self.dataset.preprocessing(self.dataset.x_train[picked]).numpy()
        return Samples.of(inputs, self.graph.model, None, self.settings.seed)

    # -- from a new network --------------------------------------------------------------------

    def _learn(self) -> tuple[list[IterationResult], Iteration]:
        """Shrink and expand until the structure is found."""
        settings = self.settings
        net = self._to_torch(self.graph.model)
        done = 0

        def fit(net: nn.Module, penalty: Penalty) -> None:
            assert isinstance(penalty, ShrinkPenalty)
            self._train(shrink_phase(done + 1), net, settings.shrink, penalty)

        results = []
        for iteration in rounds(self.graph, net, fit, settings.aim, seed=settings.seed):
            done = iteration.number
            results.append(self._iteration(iteration))
            last = iteration
        for number in range(done + 1, settings.aim.iterations + 1):
            self.progress.finish(shrink_phase(number))
        return results, last

    def _iteration(self, iteration: Iteration) -> IterationResult:
        """Write the result of an iteration."""
        name = f"iteration-{iteration.number}"
        plan, model = f"{name}/plan.json", f"{name}/model.onnx"
        self.folder.write(plan, iteration.plan.to_json())
        self._save(iteration.resized.model, model)
        steps = [asdict(step) for step in iteration.trajectory]
        self.folder.write(f"{name}/trajectory.json", readable_json(steps))
        names = {group.id: group.name for group in iteration.graph.groups}
        strengths = [
            {"name": names[group], "strengths": values.tolist(), "threshold": threshold}
            for group, values, threshold in iteration.strengths
        ]
        self.folder.write(f"{name}/strengths.json", readable_json(strengths))
        report = iteration.resized.report
        assert report is not None
        initial = cost(iteration.graph, iteration.regularized).total
        result = IterationResult(
            number=iteration.number,
            target=iteration.target / initial,
            live=iteration.live / initial,
            met=iteration.met,
            trimmed=iteration.trimmed,
            omega=float(iteration.grown.request["omega"]),
            shrunk=iteration.before_growth.cost,
            cost=iteration.plan.cost,
            widths=_widths(self.graph, iteration),
            accuracy=accuracy(iteration.net, self.dataset),
            resized_accuracy=accuracy(self._to_torch(iteration.resized.model), self.dataset),
            error=report.worst.relative,
            sensitivity=report.sensitivity,
            felt=report.sensitivity,
            plan=plan,
            model=model,
        )
        self.folder.log(
            "iteration",
            number=iteration.number,
            live=result.live,
            target=result.target,
            met=result.met,
            omega=result.omega,
            cost={unit: change.after / change.before for unit, change in result.cost.items()},
            widths={w.name: w.grown for w in result.widths.values()},
            accuracy=result.accuracy,
            resized_accuracy=result.resized_accuracy,
            error=result.error,
            last=iteration.last,
        )
        return result

    def _baselines(self, shrinking: int) -> dict[str, Arm]:
        """The original as given; or trained alike, and the baselines that were asked for."""
        settings = self.settings
        net = self._to_torch(self.graph.model)
        if not settings.baselines:
            return {"base": self._arm("base", self.graph.model, net, 0)}
        arms = {"base": self._original(shrinking)}
        for name in settings.baselines:
            trained = self._baseline(name, shrinking)
            if trained is None:
                reason = "the budget leaves the original whole"
                self.folder.log("left out", name=name, reason=reason)
            else:
                arms[name] = trained[0]
        return arms

    def _alone(self, method: Alone) -> tuple[dict[str, Arm], dict[str, Change]]:
        """One baseline by itself; the original, where the baseline leaves it as it is."""
        settings = self.settings
        shrinking = settings.shrink.epochs * settings.aim.iterations
        trained = None if method == "base" else self._baseline(method, shrinking)
        if trained is not None:
            arm, structure = trained
            self.folder.write("plan.json", structure.to_json())
            return {method: arm}, structure.cost
        goals = resolve_budget(self.graph, settings.aim.budget, "default")
        costs = {goal.kind: Change(goal.cost.total, goal.cost.total) for goal in goals}
        return {"base": self._original(shrinking)}, costs

    def _original(self, shrinking: int) -> Arm:
        """The original, trained for the epochs of all phases."""
        settings = self.settings
        epochs = shrinking + settings.retrain.epochs
        net = self._to_torch(self.graph.model)
        self._train("base", net, replace(settings.retrain, epochs=epochs))
        return self._arm("base", self.graph.model, net, epochs)

    def _baseline(self, name: Baseline, shrinking: int) -> tuple[Arm, Plan] | None:
        """A baseline, trained, and its structure; ``None`` where that is the original's."""
        settings = self.settings
        pruned = name != "uniform" and not fits_whole(self.graph, settings.aim)
        if pruned and self.trained is None:
            self.trained = self._pretrained(shrinking)
        graph = self.trained if pruned and self.trained is not None else self.graph
        structure = distributed.from_first(
            partial(baseline_plan, name, graph, settings.aim, settings.seed)
        )
        if structure is None:
            return None
        weights, epochs = settings.aim.weights, shrinking + settings.retrain.epochs
        resized = resize_and_check(graph, structure, weights=weights, seed=settings.seed)
        narrow = self._to_torch(resized.model)
        whole = replace(settings.retrain, epochs=epochs)
        self._train(name, narrow, whole if name == "uniform" else settings.retrain)
        return self._arm(name, resized.model, narrow, epochs), structure

    def _pretrained(self, epochs: int) -> ChannelGraph:
        """The original, trained for as long as the structure was learned, without a regularizer."""
        net = self._to_torch(self.graph.model)
        self._train("pretrain", net, replace(self.settings.shrink, epochs=epochs))
        model = with_weights(self.graph.model, net)
        return lift(model, **self.graph.options.arguments())

    def _to_torch(self, model: ir.Model) -> fx.GraphModule:
        net: fx.GraphModule = flat_network(model).to(self.device)
        return net

    def _train(
        self, phase: str, net: nn.Module, recipe: Recipe, penalty: ResumablePenalty | None = None
    ) -> None:
        self.folder.log("phase", phase=phase, epochs=recipe.epochs)

        def tell(epoch: Epoch) -> None:
            seconds = self.progress.remaining(phase, epoch.number, epoch.seconds)
            self.folder.log("epoch", phase=phase, **asdict(epoch), left=round(seconds, 1))

        train(
            net,
            self.dataset,
            recipe,
            seed=self.settings.seed,
            phase=phase,
            penalty=penalty or NoPenalty(),
            on_epoch=tell,
            checkpoint=self.folder.checkpoint(phase),
        )
        self.progress.finish(phase)

    def _save(self, model: ir.Model, name: str) -> None:
        """Write a model that says what images it takes."""
        preprocessing = asdict(self.dataset.preprocessing)
        model.metadata_props[PREPROCESSING_KEY] = json.dumps(preprocessing)
        model.metadata_props[CLASSES_KEY] = json.dumps(self.dataset.classes)
        self.folder.save(model, name)

    def _arm(self, name: str, model: ir.Model, net: fx.GraphModule, epochs: int) -> Arm:
        """Write a trained network, and measure it."""
        trained = with_weights(model, net)
        self._save(trained, f"{name}.onnx")
        graph = lift(trained, **self.graph.options.arguments())
        arm = Arm(
            accuracy=accuracy(net, self.dataset),
            macs=cost(graph, "macs").total,
            params=cost(graph, "params").total,
            epochs=epochs,
            file=f"{name}.onnx",
        )
        self.folder.log("arm", name=name, accuracy=arm.accuracy, macs=arm.macs, params=arm.params)
        return arm


def _widths(graph: ChannelGraph, iteration: Iteration) -> dict[str, Widths]:
    shrunk, grown = iteration.before_growth.widths(graph), iteration.plan.widths(graph)
    return {
        group.id: Widths(group.name, group.width, int(shrunk[group.index]), int(grown[group.index]))
        for group in graph.groups
        if group.resizable
    }
