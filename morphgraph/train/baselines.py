"""What a learned structure is compared with: plans for the same budget without a regularizer."""

from typing import Literal, get_args

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.budget import plan
from morphgraph.passes.expand import expand
from morphgraph.passes.goals import goals_of
from morphgraph.passes.widths import uniform
from morphgraph.plans import Plan, make_plan
from morphgraph.train.loop import Aim

Baseline = Literal["uniform", "l2", "bn", "random"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""``uniform`` is the width multiplier. The others remove the channels with the lowest score from a
trained network: the norm of their kernels (``l2``), the BatchNorm scale (``bn``), or by chance."""


def check_baselines(names: tuple[Baseline, ...]) -> None:
    """Refuse a baseline that there is not.

    Raises:
        ArgumentError: names it.
    """
    for name in names:
        if name not in BASELINES:
            raise ArgumentError(f"baseline '{name}' is unknown; use {', '.join(BASELINES)}")


def fits_whole(graph: ChannelGraph, aim: Aim) -> bool:
    """Whether the budget leaves the original as it is, so that nothing is to be pruned."""
    return all(g.limit >= g.cost.total for g in goals_of(graph, aim.budget, "default"))


def baseline_plan(name: Baseline, graph: ChannelGraph, aim: Aim, seed: int) -> Plan | None:
    """A baseline's structure within the same budget, on the same grid.

    Args:
        name: which.
        graph: the network, with trained weights where they are scored.
        aim: whose budget and limits hold.
        seed: of ``"random"``.

    Returns:
        The plan; ``None`` where the budget leaves the original as it is.
    """
    roomy = fits_whole(graph, aim)
    if roomy and name != "uniform":
        return None
    limits = {"round_to": aim.round_to, "min_width": aim.min_width}
    if not roomy:
        if name == "uniform":
            return uniform(graph, budget=aim.budget, round_to=aim.round_to, min_width=aim.min_width)
        return plan(
            graph, aim.budget, score=name, round_to=aim.round_to, min_width=aim.min_width, seed=seed
        )
    same = make_plan(graph, {}, {"uniform": 1.0, **limits}, {})
    wider = expand(graph, same, aim.budget, round_to=aim.round_to, max_growth=aim.max_growth)
    return wider if wider.groups else None
