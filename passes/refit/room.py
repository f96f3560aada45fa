"""Room in a budget for what a fit adds: biases of layers that had none.

A plan counts the network that is sliced. Where layers without a bias are fitted they may get one,
which adds parameters and bytes, and, behind a matrix product, an addition.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence

import msgspec
import onnx_ir as ir

from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.ops.parameters import layers_weights
from morphgraph.passes.analysis.cost import Convention, cost, is_arithmetic
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.constraints import Budget, Constraint, resolve_budget
from morphgraph.passes.refit.refit import with_biases
from morphgraph.plans import Change, Plan


def costs_with_biases(
    graph: ChannelGraph,
    plan: Plan,
    model: ir.Model,
    kinds: Iterable[str],
    convention: Convention = "default",
) -> dict[str, Change]:
    """What a fitted network costs: a plan knows nothing of the biases that a refit makes.

    Args:
        graph: the original.
        plan: which channels stayed.
        model: the fitted network.
        kinds: of cost, as of :func:`morphgraph.cost`.
        convention: of the costs.
    """
    made = layers_weights(model) - set(graph.model.graph.initializers)
    small = lift(model, **graph.options.arguments()) if made else None
    widths, found = plan.widths(graph), {}
    for kind in kinds:
        price = cost(graph, kind, convention=convention)
        reached = (
            price.at(widths) if small is None else cost(small, kind, convention=convention).total
        )
        found[kind] = Change(price.total, reached)
    return found


def plan_with_room(
    graph: ChannelGraph,
    budget: Budget,
    make: Callable[[Budget], Plan],
    convention: Convention = "default",
) -> Plan:
    """A plan whose network meets a budget after it has been fitted, too.

    Args:
        graph: the lifted network.
        budget: per cost an amount or a share.
        make: makes a plan for a budget.
        convention: of the costs.

    Raises:
        BudgetError: no plan meets the budget, or none that leaves room.
    """
    (plan,) = plans_with_room(graph, [budget], lambda each: [make(each[0])], convention)
    return plan


def plans_with_room(
    graph: ChannelGraph,
    budgets: Sequence[Budget],
    make: Callable[[Sequence[Budget]], Sequence[Plan]],
    convention: Convention = "default",
) -> list[Plan]:
    """The same for several budgets, whose plans are made together.

    Where a plan leaves too little room, its budget is lowered, and plans are made again; more is
    kept in every round, and never more than the biases of the plan before.
    """
    wanted = [resolve_budget(graph, budget, convention) for budget in budgets]
    room = [[0.0] * len(each) for each in wanted]
    while True:
        lowered = [_lowered(*each) for each in zip(budgets, wanted, room, strict=True)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                plans = list(make(lowered))
            except BudgetError as error:
                if not any(map(any, room)):
                    raise
                raise BudgetError(
                    f"{error} (less what a fit adds in biases; without one, --no-refit or "
                    "refit=False, the budget is not lowered by that)"
                ) from error
        more = [_needed(graph, *pair, convention) for pair in zip(plans, wanted, strict=True)]
        grown = [
            [max(pair) for pair in zip(*each, strict=True)] for each in zip(room, more, strict=True)
        ]
        if grown == room:
            break
        room = grown
    for each in said:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return [_asked_for(*pair) for pair in zip(plans, budgets, strict=True)]


def _lowered(budget: Budget, limits: Sequence[Constraint], room: Sequence[float]) -> Budget:
    """A budget with room in every amount that needs some."""
    rows = zip(budget.items(), limits, room, strict=True)
    return {kind: each.limit - kept if kept else text for (kind, text), each, kept in rows}


def _needed(
    graph: ChannelGraph, plan: Plan, limits: Sequence[Constraint], convention: Convention
) -> list[float]:
    """Per budget what of it biases take where they exceed it, else 0."""
    kinds = [each.kind for each in limits if not is_arithmetic(each.kind)]
    if not kinds:
        return [0.0] * len(limits)
    model = with_biases(graph, plan.keep_channels(graph))
    costs = costs_with_biases(graph, plan, model, kinds, convention)
    widths, needed = plan.widths(graph), []
    for each in limits:
        after = costs[each.kind].after if each.kind in costs else 0.0
        # What is added shrinks with the network: its share is kept, not the amount.
        share = 1 - each.cost.at(widths) / after if after > each.limit else 0.0
        needed.append(share * each.limit)
    return needed


def _asked_for(plan: Plan, budget: Budget) -> Plan:
    """A plan that says what was asked for, not what was left of it."""
    asked = {kind: str(amount) for kind, amount in budget.items()}
    return msgspec.structs.replace(plan, request={**plan.request, "budget": asked})
