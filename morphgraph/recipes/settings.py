"""How a run goes, and how much there is to do."""

from dataclasses import dataclass

from morphgraph.graph import ChannelGraph
from morphgraph.options import Baseline, Method
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.recipes.baselines import fits_whole
from morphgraph.recipes.trainer import Recipe
from morphgraph.train.config import SearchConfig


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
    """

    aim: SearchConfig
    shrink: Recipe
    retrain: Recipe
    baselines: tuple[Baseline, ...] = ()
    seed: int = 0
    method: Method = "morph"


def shrink_phase(number: int) -> str:
    """What the phase of an iteration is called."""
    return f"shrink-{number}"


def planned_work(graph: ChannelGraph, settings: Settings) -> dict[str, tuple[int, float]]:
    """Per phase, in their order, its epochs and what one of them costs beside the original."""
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
