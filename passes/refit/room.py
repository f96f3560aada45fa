"""Room in a budget for what a fit adds: biases of layers that had none.

A plan counts the network that is sliced. Where layers without a bias are fitted they may get one,
which adds parameters and bytes, and, behind a matrix product, an addition. How much that is depends
on the plan: budgets are lowered, plans are made and costed with their biases, and the amount is
searched between one whose network fits and one whose network does not.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count

import msgspec
import onnx_ir as ir

from morphgraph.errors import ArgumentError, BudgetError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.ops.parameters import layers_weights
from morphgraph.passes.analysis.cost import Convention, cost, is_arithmetic, is_known_here
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.constraints import (
    Budget,
    Constraint,
    parse_amount,
    resolve_budget,
)
from morphgraph.passes.refit.refit import with_biases
from morphgraph.plans import Change, Plan

ROUNDS = 8
"""Rounds after which the best plans so far are taken."""
CLOSE = 0.995
"""A network that takes this share of a budget uses it."""
ROUNDING = 1 + 1e-9
"""How far a sum of floats may exceed a budget that it meets."""
NEAR = 1.0005
"""Two amounts between which there is nothing to be found."""


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


def fitted_costs(
    graph: ChannelGraph, plan: Plan, kinds: Iterable[str], convention: Convention = "default"
) -> dict[str, Change]:
    """What the network of a plan costs at most after a fit: with every bias that may come."""
    model = with_biases(graph, plan.keep_channels(graph))
    return costs_with_biases(graph, plan, model, kinds, convention)


def warn_beyond(graph: ChannelGraph, plan: Plan, costs: Mapping[str, Change]) -> None:
    """Say which budgets of a plan a fitted network exceeds.

    Args:
        graph: the original.
        plan: which channels stayed.
        costs: before and after the fit.
    """
    asked = plan.request.get("budget")
    if plan.request.get("refit") or not isinstance(asked, dict):
        return
    beyond = []
    for kind in filter(is_known_here, asked.keys() & costs.keys()):
        each, unit = costs[kind], cost(graph, kind, convention=plan.convention).unit
        try:
            limit = parse_amount(asked[kind], each.before, unit)
        except ArgumentError:  # a plan's request may be anything
            continue
        if each.before and each.after > limit * ROUNDING:
            beyond.append(f"{kind} is {each.after:.12g} {unit} ({each.after / each.before:.2%})")
            beyond[-1] += f", the budget {kind}={escape(str(asked[kind]))}"
    if beyond:
        warn(
            f"a fit gives biases to layers that have none, which the plan keeps no room for: "
            f"{'; '.join(sorted(beyond))}; plan with --for-refit (refit=True), or use `shrink`"
        )


def plan_with_room(
    graph: ChannelGraph,
    budget: Budget,
    make: Callable[[Budget], Plan],
    convention: Convention = "default",
) -> Plan:
    """A plan whose network meets a budget after it has been fitted, too.

    ``request["refit"]`` says what the budgeted costs are then at most.

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
    """The same for several budgets, whose plans are made together."""
    rooms = [_Room(graph, budget, convention) for budget in budgets]
    best: tuple[float, list[Plan], list[warnings.WarningMessage]] | None = None
    for rounds in count(1):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                plans = list(make([room.lowered() for room in rooms]))
            except BudgetError as error:
                if best is not None:
                    break
                if not any(room.is_lowered for room in rooms):
                    raise
                raise BudgetError(
                    f"{error} (less what a fit adds in biases; without one, --no-refit or "
                    "refit=False, the budget is not lowered by that)"
                ) from error
        used = [room.learn(plan) for room, plan in zip(rooms, plans, strict=True)]
        if max(used) <= ROUNDING and (best is None or sum(used) > best[0]):
            noted = [room.noted(plan) for room, plan in zip(rooms, plans, strict=True)]
            best = sum(used), noted, said
        if best is not None and (rounds >= ROUNDS or all(room.is_done for room in rooms)):
            break
    assert best is not None
    _, chosen, said = best
    for each in said:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return chosen


class _Room:
    """What to ask of a plan, so that its network meets a budget after a fit."""

    def __init__(self, graph: ChannelGraph, budget: Budget, convention: Convention) -> None:
        self.graph, self.budget, self.convention = graph, budget, convention
        limits = resolve_budget(graph, budget, convention)
        self.limits = dict(zip(budget, limits, strict=True))
        self.searches = {
            kind: _Search(each) for kind, each in self.limits.items() if not is_arithmetic(kind)
        }
        self.known: list[tuple[Plan, Mapping[str, float]]] = []
        self.is_done = False

    @property
    def is_lowered(self) -> bool:
        return any(search.above for search in self.searches.values())

    def lowered(self) -> Budget:
        """The budget with room in every amount that needs some."""
        amounts = {kind: each.amount for kind, each in self.searches.items() if each.above}
        return {**self.budget, **amounts}

    def learn(self, plan: Plan) -> float:
        """Choose what to ask for next; the largest share of a budget that a plan takes."""
        costs, widths = self._costs(plan), plan.widths(self.graph)
        shares = [_share(costs[kind], each.limit) for kind, each in self.limits.items()]
        used = max(shares, default=0.0)
        goes_on = [
            each.learn(self.limits[kind].cost.at(widths), costs[kind])
            for kind, each in self.searches.items()
        ]
        uses_it = not self.is_lowered or used >= CLOSE or not any(goes_on)
        self.is_done = used <= ROUNDING and uses_it
        return used

    def noted(self, plan: Plan) -> Plan:
        """A plan that says what was asked for, not what was left of it."""
        asked = {kind: str(amount) for kind, amount in self.budget.items()}
        request = {**plan.request, "budget": asked, "refit": dict(self._costs(plan))}
        return msgspec.structs.replace(plan, request=request)

    def _costs(self, plan: Plan) -> Mapping[str, float]:
        """What the fitted network costs at most, by the budgets' costs."""
        for other, costs in self.known:
            if other.groups == plan.groups:
                return costs
        widths = plan.widths(self.graph)
        found = {kind: each.cost.at(widths) for kind, each in self.limits.items()}
        if self.searches:
            fitted = fitted_costs(self.graph, plan, self.searches, self.convention)
            found |= {kind: change.after for kind, change in fitted.items()}
        self.known.append((plan, found))
        return found


class _Search:
    """The amount to ask for, so that what is fitted costs what was asked for."""

    def __init__(self, wanted: Constraint) -> None:
        self.limit = self.amount = wanted.limit
        self.below: tuple[float, float] | None = None  # what was asked for, and what came of it
        self.above: tuple[float, float] | None = None

    def learn(self, sliced: float, fitted: float) -> bool:
        """Choose the next amount by the costs of a plan; whether there is one to be tried."""
        here = self.amount, fitted
        if fitted <= self.limit * ROUNDING:
            self.below = max(self.below or here, here)
        else:
            self.above = min(self.above or here, here)
            if self.below is not None and self.below[0] >= self.amount:
                self.below = None  # beside other amounts of other budgets it does not fit
        if self.above is None:
            return False
        if self.below is None:
            # What is added shrinks with the network: its share is kept, not the amount.
            self.amount = min(self.amount, sliced) * self.limit / fitted
            return True
        (low, fits), (high, exceeds) = self.below, self.above
        if high <= low * NEAR:
            self.amount = low
            return fitted > self.limit
        way = (self.limit - fits) / max(exceeds - fits, 1e-9)
        self.amount = low + min(max(way, 0.1), 0.9) * (high - low)
        return True


def _share(amount: float, limit: float) -> float:
    return amount / limit if limit > 0 else float(amount > 0) * 2
