"""How a run goes, and how much there is to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from morphgraph.graph import ChannelGraph
from morphgraph.options import Baseline, Method
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.recipes.baselines import fits_whole
from morphgraph.recipes.trainer import Recipe
from morphgraph.slicing import DRAWS
from morphgraph.train.config import SearchConfig
from morphgraph.trained import DISTILL, Ranked, Trained

ELASTIC = "elastic"
"""The phase that trains an elastic network, and what it is called."""


@dataclass(frozen=True)
class FromTrained:
    """What is particular where a run begins with a trained network.

    Attributes:
        budgets: from the largest to the smallest; the run's own is the last.
        rank, distill, inside: see :class:`~morphgraph.trained.Trained`.
        images: calibration images, of those to train on; without any there is no refit.
        elastic: one set of weights is trained, of which the network of every budget is a slice.
    """

    budgets: tuple[Mapping[str, str], ...]
    rank: Ranked = "data"
    images: int = 512
    distill: float = DISTILL
    inside: float = 0.0
    elastic: bool = False

    def of(self, aim: SearchConfig) -> Trained:
        """The same as the library takes it."""
        refit = self.images > 0 and not self.elastic
        return Trained(aim, self.budgets, self.rank, refit, self.distill, self.inside)

    def name(self, rung: int) -> str:
        """What the network of a budget is called."""
        if len(self.budgets) == 1:
            return "slim"
        amounts = "-".join(re.sub(r"[^\w.]+", "", str(a)) for a in self.budgets[rung].values())
        return f"slim-{amounts}"


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        aim: the budget, and how to get there.
        shrink: the recipe of a phase that learns the structure.
        retrain: the recipe of the last phase. The original and the width multiplier train by it for
            the epochs of all phases; networks that are pruned by a score train by the first one
            before, without a regularizer, and by this one after.
        baselines: what else to train, see :mod:`morphgraph.recipes.baselines`; with any of them
            also the original.
        seed: of everything random.
        method: how the structure is found. Anything but ``"morph"`` is that baseline by itself, for
            as many epochs.
        trained: given where the run begins with a trained network, whose weights are kept; then
            ``retrain`` is the fine-tuning of each budget's network.
    """

    aim: SearchConfig
    shrink: Recipe
    retrain: Recipe
    baselines: tuple[Baseline, ...] = ()
    seed: int = 0
    method: Method = "morph"
    trained: FromTrained | None = None


def shrink_phase(number: int) -> str:
    """What the phase of an iteration is called."""
    return f"shrink-{number}"


def planned_work(graph: ChannelGraph, settings: Settings) -> dict[str, tuple[int, float]]:
    """Per phase, in their order, its epochs and what one of them costs beside the original."""
    if settings.trained is not None:
        return _work_from_trained(graph, settings, settings.trained)
    goals = resolve_budget(graph, settings.aim.budget, "default")
    small = min(goal.limit / goal.cost.total for goal in goals)
    rounds = settings.aim.iterations
    shrinking = settings.shrink.epochs * rounds
    whole = shrinking + settings.retrain.epochs
    roomy = fits_whole(graph, settings.aim)
    if settings.method == "morph":
        work = {shrink_phase(k): (settings.shrink.epochs, 1.0) for k in range(1, rounds + 1)}
        work["retrain"] = (settings.retrain.epochs, small)
        names: tuple[str, ...] = settings.baselines
    else:
        work, names = {}, (settings.method,)
    if settings.baselines or "base" in names or (roomy and work == {}):
        work["base"] = (whole, 1.0)
    pruned = [name for name in names if name not in ("base", "uniform") and not roomy]
    if "uniform" in names and small != 1.0:
        work["uniform"] = (whole, small)
    if pruned:
        work["pretrain"] = (shrinking, 1.0)
    return work | dict.fromkeys(pruned, (settings.retrain.epochs, small))


def _work_from_trained(
    graph: ChannelGraph, settings: Settings, trained: FromTrained
) -> dict[str, tuple[int, float]]:
    if trained.elastic:
        whole_and_slices = 1.0 + (1 + DRAWS) / 2  # the cost of a slice: half, more or less
        return {ELASTIC: (settings.retrain.epochs, whole_and_slices)}
    learning = settings.shrink.epochs if trained.rank == "learned" else 0
    work = {shrink_phase(1): (learning, 1.0)} if learning else {}
    shares = []
    for budget in trained.budgets:
        goals = resolve_budget(graph, budget, "default")
        shares.append(min(1.0, *(goal.limit / goal.cost.total for goal in goals)))
    return work | {
        f"tune {trained.name(k)}": (settings.retrain.epochs, share)
        for k, share in enumerate(shares)
    }
