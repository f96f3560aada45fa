"""From a new network: shrink and expand until the structure is found; the baselines beside it."""

from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import nn

from morphgraph.graph import ChannelGraph
from morphgraph.options import Alone, Baseline
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.plans import Change, Plan, readable_json
from morphgraph.recipes.baselines import baseline_plan, fits_whole
from morphgraph.recipes.results import Arm, IterationResult, Result, Widths
from morphgraph.recipes.settings import shrink_phase
from morphgraph.recipes.trainer import accuracy
from morphgraph.recipes.work import Work
from morphgraph.torch_io.weights import with_weights
from morphgraph.train import distributed
from morphgraph.train.loop import Iteration, rounds, start_of_last
from morphgraph.train.phases import Penalty, ShrinkPenalty
from morphgraph.workflow import resize_and_check


@dataclass
class Fresh:
    """A run that learns a structure, then trains the network that has it."""

    work: Work
    trained: ChannelGraph | None = None  # the original, for baselines that score it

    def go(self) -> Result:
        """The whole loop, or one baseline by itself."""
        settings, aim = self.work.settings, self.work.settings.aim
        if settings.method != "morph":
            return self.work.end(*self._alone(settings.method), [])
        iterations, last = self._learn()
        self.work.folder.write("plan.json", last.plan.to_json())
        shrinking = settings.shrink.epochs * last.number
        slim_model = start_of_last(self.work.graph, last, aim.weights, settings.seed)
        slim = self.work.to_torch(slim_model)
        self.work.train("retrain", slim, settings.retrain)
        epochs = shrinking + settings.retrain.epochs
        slim_arm = self.work.arm("slim", slim_model, slim, epochs)
        arms = {**self._baselines(shrinking), "slim": slim_arm}
        return self.work.end(arms, last.plan.cost, iterations)

    def _learn(self) -> tuple[list[IterationResult], Iteration]:
        """Shrink and expand until the structure is found."""
        settings = self.work.settings
        net = self.work.to_torch(self.work.graph.model)
        done = 0

        def fit(net: nn.Module, penalty: Penalty) -> None:
            assert isinstance(penalty, ShrinkPenalty)
            self.work.train(shrink_phase(done + 1), net, settings.shrink, penalty)

        results = []
        for iteration in rounds(self.work.graph, net, fit, settings.aim, seed=settings.seed):
            done = iteration.number
            results.append(self._iteration(iteration))
            last = iteration
        for number in range(done + 1, settings.aim.iterations + 1):
            self.work.progress.finish(shrink_phase(number))
        return results, last

    def _iteration(self, iteration: Iteration) -> IterationResult:
        """Write the result of an iteration."""
        name = f"iteration-{iteration.number}"
        plan, model = f"{name}/plan.json", f"{name}/model.onnx"
        self.work.folder.write(plan, iteration.plan.to_json())
        self.work.save(iteration.resized.model, model)
        steps = [asdict(step) for step in iteration.trajectory]
        self.work.folder.write(f"{name}/trajectory.json", readable_json(steps))
        names = {group.id: group.name for group in iteration.graph.groups}
        strengths = [
            {"name": names[group], "strengths": values.tolist(), "threshold": threshold}
            for group, values, threshold in iteration.strengths
        ]
        self.work.folder.write(f"{name}/strengths.json", readable_json(strengths))
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
            widths=_widths(self.work.graph, iteration),
            accuracy=accuracy(iteration.net, self.work.dataset),
            resized_accuracy=accuracy(
                self.work.to_torch(iteration.resized.model), self.work.dataset
            ),
            error=report.worst.relative,
            sensitivity=report.sensitivity,
            felt=report.sensitivity,
            plan=plan,
            model=model,
        )
        self.work.folder.log(
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
        settings = self.work.settings
        net = self.work.to_torch(self.work.graph.model)
        if not settings.baselines:
            return {"base": self.work.arm("base", self.work.graph.model, net, 0)}
        arms = {"base": self._original(shrinking)}
        for name in settings.baselines:
            trained = self._baseline(name, shrinking)
            if trained is None:
                reason = "the budget leaves the original whole"
                self.work.folder.log("left out", name=name, reason=reason)
            else:
                arms[name] = trained[0]
        return arms

    def _alone(self, method: Alone) -> tuple[dict[str, Arm], dict[str, Change]]:
        """One baseline by itself; the original, where the baseline leaves it as it is."""
        settings = self.work.settings
        shrinking = settings.shrink.epochs * settings.aim.iterations
        trained = None if method == "base" else self._baseline(method, shrinking)
        if trained is not None:
            arm, structure = trained
            self.work.folder.write("plan.json", structure.to_json())
            return {method: arm}, structure.cost
        goals = resolve_budget(self.work.graph, settings.aim.budget, "default")
        costs = {goal.kind: Change(goal.cost.total, goal.cost.total) for goal in goals}
        return {"base": self._original(shrinking)}, costs

    def _original(self, shrinking: int) -> Arm:
        """The original, trained for the epochs of all phases."""
        settings = self.work.settings
        epochs = shrinking + settings.retrain.epochs
        net = self.work.to_torch(self.work.graph.model)
        self.work.train("base", net, replace(settings.retrain, epochs=epochs))
        return self.work.arm("base", self.work.graph.model, net, epochs)

    def _baseline(self, name: Baseline, shrinking: int) -> tuple[Arm, Plan] | None:
        """A baseline, trained, and its structure; ``None`` where that is the original's."""
        settings = self.work.settings
        pruned = name != "uniform" and not fits_whole(self.work.graph, settings.aim)
        if pruned and self.trained is None:
            self.trained = self._pretrained(shrinking)
        graph = self.trained if pruned and self.trained is not None else self.work.graph
        structure = distributed.from_first(
            partial(baseline_plan, name, graph, settings.aim, settings.seed)
        )
        if structure is None:
            return None
        weights, epochs = settings.aim.weights, shrinking + settings.retrain.epochs
        resized = resize_and_check(graph, structure, weights=weights, seed=settings.seed)
        narrow = self.work.to_torch(resized.model)
        whole = replace(settings.retrain, epochs=epochs)
        self.work.train(name, narrow, whole if name == "uniform" else settings.retrain)
        return self.work.arm(name, resized.model, narrow, epochs), structure

    def _pretrained(self, epochs: int) -> ChannelGraph:
        """The original, trained for as long as the structure was learned, without a regularizer."""
        net = self.work.to_torch(self.work.graph.model)
        self.work.train("pretrain", net, replace(self.work.settings.shrink, epochs=epochs))
        model = with_weights(self.work.graph.model, net)
        return lift(model, **self.work.graph.options.arguments())


def _widths(graph: ChannelGraph, iteration: Iteration) -> dict[str, Widths]:
    shrunk, grown = iteration.before_growth.widths(graph), iteration.plan.widths(graph)
    return {
        group.id: Widths(group.name, group.width, int(shrunk[group.index]), int(grown[group.index]))
        for group in graph.groups
        if group.resizable
    }
