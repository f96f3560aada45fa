"""Pass ``nested``: plans of one network for several budgets, each a part of the one before.

What a smaller network keeps, the larger ones keep as well. So one ranking of channels serves all of
them, and a plan for any budget in between lies between two of them (:class:`Ranking`).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import msgspec
import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import ArgumentError, PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, write_atomically
from morphgraph.onnx_io.reading import from_json, read_bounded
from morphgraph.options import RoundTo
from morphgraph.passes.analysis.cost import Convention, Device, on_device
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import top_channels
from morphgraph.passes.planning.constraints import (
    Budget,
    fits,
    require_reachable,
    resolve_budget,
    shown_costs,
    spend_rest,
    unreachable,
)
from morphgraph.passes.planning.finer import within_reach
from morphgraph.plans import ModelRef, Plan, make_plan, readable_json, structure_hash

SCHEMA_VERSION = 1


def nested(
    graph: ChannelGraph,
    budgets: Sequence[Budget],
    wanted: Sequence[Plan],
    scores: Sequence[FloatArray],
    bounds: WidthBounds,
    request: Mapping[str, Any] | None = None,
) -> list[Plan]:
    """Plans for several budgets, the largest first, each a part of the one before.

    No group gets wider than in the plan before, and its channels are some of those there. What that
    leaves of a budget is spent.

    Args:
        graph: the lifted network.
        budgets: from the largest to the smallest.
        wanted: the plan for each budget alone, which meets it.
        scores: by which channels are chosen, of each plan, ``[channels]``.
        bounds: grid and floor of the widths.
        request: what the plans are made for, beside the budget.

    Raises:
        ArgumentError: the budgets do not fall.
        BudgetError: a budget cannot be met.
    """
    plans: list[Plan] = []
    ceilings, among = graph.widths, None
    for budget, plan, ranked in zip(budgets, wanted, scores, strict=True):
        constraints = resolve_budget(graph, budget, "default")
        allowed = within_reach(graph, bounds, constraints)
        require_reachable(constraints, allowed)
        alone = plan.widths(graph)
        widths = np.minimum(alone, ceilings)
        if not fits(constraints, widths):
            raise unreachable(constraints, widths, allowed, "give budgets from large to small")
        widths = spend_rest(constraints, widths, np.maximum(alone, 1), ceilings, allowed)
        keep = top_channels(graph, widths, ranked, among)
        shown = {kind: str(amount) for kind, amount in budget.items()}
        asked = {"budget": shown, "round_to": bounds.round_to, "min_width": bounds.min_width}
        costs = shown_costs(graph, constraints, "default")
        plans.append(make_plan(graph, keep, asked | dict(request or {}), costs))
        ceilings, among = widths, keep
    return plans


def falling(graph: ChannelGraph, budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets from the largest to the smallest.

    Raises:
        ArgumentError: there are none, they are on different costs, or none of two is the smaller.
    """
    if not budgets:
        raise ArgumentError("no budget is given; write some such as 75%,50%,25%")
    if isinstance(budgets, Mapping | str) or not isinstance(budgets, Sequence):
        raise ArgumentError(
            f"budgets={escape(str(budgets))} is no list of budgets; write one such as "
            "[{'flops': '75%'}, {'flops': '50%'}]"
        )
    amounts = [{c.kind: c.limit for c in resolve_budget(graph, b, "default")} for b in budgets]
    if any(each.keys() != amounts[0].keys() for each in amounts):
        raise ArgumentError("the budgets of a family are on the same costs; give one cost for all")
    order = sorted(range(len(budgets)), key=lambda k: tuple(-v for v in amounts[k].values()))
    for k, after in pairwise(order):
        larger, smaller = amounts[k], amounts[after]
        if larger == smaller or any(smaller[kind] > larger[kind] for kind in larger):
            raise ArgumentError(
                f"budgets {_said(budgets[k])} and {_said(budgets[after])}: none is below the other"
            )
    return [budgets[k] for k in order]


def _said(budget: Budget) -> str:
    return ", ".join(f"{kind}={amount}" for kind, amount in budget.items())


class GroupRanking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one group: its channels, those that stay longest first, and its width at every rung."""

    name: str
    order: tuple[int, ...]
    widths: tuple[int, ...]


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nested plans of one network as a ladder, from which any budget in between can be sliced.

    Rung 0 is the whole network, the last the smallest. Widths in between are those on the straight
    way from one rung to the next, rounded down to the grid; so the plan for a smaller budget keeps
    a part of what that for a larger one keeps, on the same grid.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn((16, 32)), (image(),)))
    >>> plan = mg.plan(graph, {"flops": "30%"})
    >>> half = Ranking.of(graph, [plan]).plan(graph, {"flops": "50%"}, round_to=1)
    >>> 0.4 < half.cost["flops"].after / half.cost["flops"].before <= 0.5
    True

    Attributes:
        model: the network that it is of.
        groups: by id those that change.
    """

    model: ModelRef
    groups: dict[str, GroupRanking]
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, graph: ChannelGraph, plans: Sequence[Plan]) -> "Ranking":
        """The ranking of nested plans, the largest first.

        Raises:
            ArgumentError: a plan keeps what the one before does not, or adds channels.
            PlanError: a plan is for another network.
        """
        kept = [plan.keep_channels(graph) for plan in plans]
        if any(plan.added(graph) for plan in plans):
            raise ArgumentError("a ranking has no place for channels that a plan adds")
        groups = {}
        for group in graph.groups:
            rungs = [np.arange(group.width)]
            rungs += [keep.get(group.index, rungs[0]) for keep in kept]
            leaving = [np.setdiff1d(a, b) for a, b in pairwise(rungs)]
            order = np.concatenate([rungs[-1], *reversed(leaving)])
            if len(order) != group.width:
                raise ArgumentError(
                    f"group '{escape(group.name)}': a plan keeps channels that a larger one "
                    "removes; give nested plans, the largest first"
                )
            if len(rungs[-1]) < group.width:
                widths = tuple(map(len, rungs))
                groups[group.id] = GroupRanking(group.name, tuple(order.tolist()), widths)
        ref = ModelRef(structure_hash(graph))
        if graph.options != ref.lift:
            ref = ModelRef(ref.structure, graph.options)
        return cls(ref, groups)

    def plan(
        self,
        graph: ChannelGraph,
        budget: Budget,
        *,
        round_to: RoundTo = "auto",
        device: Device | None = None,
        convention: Convention = "default",
    ) -> Plan:
        """The plan for a budget on this ladder: the widest that holds, without training.

        Args:
            graph: the network, lifted.
            budget: per cost an amount or a share.
            round_to: widths between two rungs are rounded down to this grid; rungs stay as they
                are.
            device: on which a latency counts that names none.
            convention: of the costs.

        Raises:
            BudgetError: even the smallest network is above the budget.
            PlanError: the ranking is of another network.
        """
        self.model.check(graph)
        constraints = resolve_budget(graph, on_device(budget, device), convention)
        bounds = WidthBounds(round_to)
        allowed = bounds.on(graph)
        rungs = self._rungs(graph)
        below = next((k for k, widths in enumerate(rungs) if fits(constraints, widths)), None)
        if below is None:
            remedy = "the smallest rung of the ranking is above it; raise the budget"
            raise unreachable(constraints, rungs[-1], allowed, remedy)
        widths = rungs[below]
        if below:
            above = rungs[below - 1]

            def at(share: float) -> IntArray:
                free = np.floor(widths + share * (above - widths) + 1e-9).astype(np.int64)
                grid = [g.at_most(int(w)) for g, w in zip(allowed.grids, free, strict=True)]
                return np.clip(grid, widths, above)

            low, high = 0.0, 1.0
            while high - low > 1e-4:
                middle = (low + high) / 2
                low, high = (middle, high) if fits(constraints, at(middle)) else (low, middle)
            widths = at(low)
        keep = {
            group.index: np.sort(np.array(ranked.order[: widths[group.index]], dtype=np.int64))
            for group in graph.groups
            if (ranked := self.groups.get(group.id)) is not None
        }
        shown = {kind: str(amount) for kind, amount in budget.items()}
        request = {"slice": shown, "round_to": round_to}
        return make_plan(graph, keep, request, shown_costs(graph, constraints, convention))

    def _rungs(self, graph: ChannelGraph) -> list[IntArray]:
        """Widths of all groups at every rung, the whole network first."""
        index = {group.id: group.index for group in graph.groups}
        counts = {len(ranked.widths) for ranked in self.groups.values()}
        for key, ranked in self.groups.items():
            group = graph.groups[index[key]] if key in index else None
            whole = group is not None and sorted(ranked.order) == list(range(group.width))
            falls = whole and ranked.widths[:1] == (len(ranked.order),) and len(counts) == 1
            steps = pairwise(ranked.widths)
            if not falls or any(b > a for a, b in steps) or min(ranked.widths) < 0:
                raise PlanError(
                    f"groups.{escape(key)}: does not fit the model; make the ranking again"
                )
        rungs = [graph.widths.copy() for _ in range(max(counts, default=1))]
        for key, ranked in self.groups.items():
            for widths, width in zip(rungs, ranked.widths, strict=True):
                widths[index[key]] = width
        return rungs

    def to_json(self) -> bytes:
        """The file's bytes; the same ranking gives the same bytes."""
        return readable_json(
            {
                "schema_version": self.schema_version,
                "model": self.model,
                "groups": self.groups,
            }
        )

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the ranking; the file appears whole or not at all.

        Raises:
            FileError: the file exists already (without ``overwrite``) or cannot be written.
        """
        write_atomically(path, self.to_json(), overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Ranking":
        """Read a ranking.

        Raises:
            FileError: there is no such file, or it cannot be read.
            PlanError: it is no ranking.
        """
        try:
            return from_json(read_bounded(path, PlanError), cls)
        except ValueError as error:
            raise PlanError(
                f"{escape(str(path))}: is no ranking ({error}); "
                "`morph --from-trained --budgets ...` writes them"
            ) from None
