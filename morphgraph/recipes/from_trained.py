"""From a trained network: one network per budget, or one set of weights for all of them."""

from collections.abc import Mapping
from typing import cast

from torch import nn

from morphgraph.passes.planning.nested import Ranking
from morphgraph.recipes import norms
from morphgraph.recipes.results import Arm, Member, Result
from morphgraph.recipes.settings import ELASTIC, FromTrained, shrink_phase
from morphgraph.recipes.trainer import accuracy
from morphgraph.recipes.work import Work
from morphgraph.slicing import DRAWS, Elastic, Ladder, Sliced
from morphgraph.torch_io.weights import graph_with_weights
from morphgraph.train import distributed
from morphgraph.train.phases import Penalty, ResumablePenalty
from morphgraph.trained import Member as Resized, Shrinking


def tuned_family(work: Work, trained: FromTrained) -> Result:
    """One network per budget, each fine-tuned."""
    settings = work.settings
    net = work.to_torch(work.graph.model)
    shrinking = Shrinking(
        work.graph,
        net,
        trained.of(settings.aim),
        work.calibration(trained.images),
        seed=settings.seed,
    )

    def learn(net: nn.Module, penalty: Penalty) -> None:
        work.train(shrink_phase(1), net, settings.shrink, cast("ResumablePenalty", penalty))

    arms = {"base": work.arm("base", work.graph.model, work.to_torch(work.graph.model), 0)}
    shrinking.learn(learn)
    made = shrinking.members()
    plans = [member.plan for member in made]
    if len(made) > 1:
        work.folder.write("ranking.json", Ranking.of(work.graph, plans).to_json())
    learned = settings.shrink.epochs if trained.rank == "learned" else 0
    members = []
    for member in made:
        name = trained.name(member.rung)
        arms[name], told = _tuned(work, shrinking, member, name, learned)
        members.append(told)
    return work.end(arms, plans[-1].cost, [], members)


def _tuned(
    work: Work, shrinking: Shrinking, member: Resized, name: str, epochs: int
) -> tuple[Arm, Member]:
    """Fine-tune the network of one budget, and say what became of it."""
    recipe = work.settings.retrain
    plan = f"{name.replace('slim', 'plan')}.json"
    work.folder.write(plan, member.plan.to_json())
    small = work.to_torch(member.model)
    before = accuracy(small, work.dataset)
    shares = {unit: c.after / c.before for unit, c in member.plan.cost.items()}
    work.folder.log("resized", name=name, cost=shares, error=member.error, accuracy=before)
    penalty = shrinking.tuning(member, small)
    work.train(f"tune {name}", small, recipe, penalty)
    penalty.release()
    arm = work.arm(name, member.model, small, epochs + recipe.epochs)
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


def elastic(work: Work, trained: FromTrained) -> Result:
    """One set of weights for all budgets between the whole network and the smallest."""
    settings, recipe, seed = work.settings, work.settings.retrain, work.settings.seed
    samples = work.calibration(trained.images)
    shared = work.to_torch(work.graph.model)
    ladder = distributed.from_first(
        lambda: Ladder.of(work.graph, shared, trained.of(settings.aim), samples, seed=seed)
    )
    work.folder.write("ranking.json", ladder.ranking.to_json())
    arms = {"base": work.arm("base", work.graph.model, shared, 0)}
    penalty = ladder.penalty(work.graph, shared, distill=trained.distill, draws=DRAWS, seed=seed)
    with norms.synchronized(penalty.slices.to(work.device)):
        work.train(ELASTIC, shared, recipe, penalty)
    penalty.end()
    arms[ELASTIC] = work.arm(ELASTIC, work.graph.model, shared, recipe.epochs)
    before, after = (
        Elastic(graph, ladder.ranking, samples)
        for graph in (work.graph, graph_with_weights(work.graph, shared))
    )
    members = []
    for rung, budget in enumerate(trained.budgets):
        untrained, sliced = (
            each.slice(budget, round_to=settings.aim.round_to) for each in (before, after)
        )
        name = trained.name(rung)
        arm, told = _sliced(work, name, budget, sliced, untrained, recipe.epochs)
        arms[name] = arm
        members.append(told)
    return work.end(arms, members[-1].cost, [], members)


def _sliced(
    work: Work, name: str, budget: Mapping[str, str], sliced: Sliced, untrained: Sliced, epochs: int
) -> tuple[Arm, Member]:
    """Write a slice of the elastic network, and say what the training did for it."""
    plan = f"{name.replace('slim', 'plan')}.json"
    work.folder.write(plan, sliced.plan.to_json())
    first = accuracy(work.to_torch(untrained.model), work.dataset)
    shares = {unit: c.after / c.before for unit, c in sliced.plan.cost.items()}
    error = sliced.check.worst.relative
    work.folder.log("resized", name=name, cost=shares, error=error, accuracy=first)
    arm = work.arm(name, sliced.model, work.to_torch(sliced.model), epochs)
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
