"""What a learned structure is compared with: plans for the same budget without a regularizer."""

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.options import BASELINES, Baseline, Score
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.score import score
from morphgraph.passes.planning.build import build_plan, top_channels
from morphgraph.passes.planning.constraints import resolve_budget, spend_rest
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.finer import within_reach
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import uniform
from morphgraph.plans import Plan, make_plan
from morphgraph.train.config import SearchConfig


def check_baselines(names: tuple[Baseline, ...]) -> None:
    """Refuse a baseline that there is not.

    Raises:
        ArgumentError: names it.
    """
    for name in names:
        if name not in BASELINES:
            raise ArgumentError(f"baseline '{name}' is unknown; use {', '.join(BASELINES)}")


def fits_whole(graph: ChannelGraph, aim: SearchConfig) -> bool:
    """Whether the budget leaves the original as it is, so that nothing is to be pruned."""
    return all(g.limit >= g.cost.total for g in resolve_budget(graph, aim.budget, "default"))


def baseline_plan(name: Baseline, graph: ChannelGraph, aim: SearchConfig, seed: int) -> Plan | None:
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
    if roomy:
        same = make_plan(graph, {}, {"uniform": 1.0})
        wider = expand(graph, same, aim.budget, round_to=aim.round_to, max_growth=aim.max_growth)
        return wider if wider.groups else None
    if name == "uniform":
        return uniform(graph, budget=aim.budget, round_to=aim.round_to, min_width=aim.min_width)
    return _pruned(name, graph, aim, seed)


def _pruned(name: Score, graph: ChannelGraph, aim: SearchConfig, seed: int) -> Plan:
    """The channels with the highest scores; the budget is used up as the other plans use it."""
    scores = score(graph, name, seed)
    pruned = plan(graph, aim.budget, score=scores, round_to=aim.round_to, min_width=aim.min_width)
    constraints = resolve_budget(graph, aim.budget, "default")
    start = pruned.widths(graph)
    allowed = within_reach(graph, aim.limits, constraints)
    widths = spend_rest(constraints, start, start, allowed.ceilings, allowed)
    request = pruned.request | {"score": name, "seed": seed, "fill": True}
    costs = [cost(graph, unit) for unit in pruned.cost]
    return build_plan(graph, top_channels(graph, widths, scores), request, costs, scores)
