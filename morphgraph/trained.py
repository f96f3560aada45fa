"""How a trained network is shrunk: which channels stay, and the networks of the budgets.

The weights are kept throughout. Which channels stay is either found from calibration inputs, before
anything is trained, or learned by a fine-tuning with the regularizer. Then the network is resized
and fitted to those inputs (:mod:`morphgraph.passes.refit`).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir
from torch import fx, nn

from morphgraph.arrays import FloatArray
from morphgraph.calibration import Samples
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost as cost_of
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import scores_of, warn_of_price
from morphgraph.passes.planning.constraints import Budget, resolve_budget
from morphgraph.passes.planning.nested import falling, nested
from morphgraph.passes.planning.removal_path import continue_plan, plan as plan_by_score
from morphgraph.passes.refit.room import plans_with_room
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.train import distributed
from morphgraph.train.config import SearchConfig
from morphgraph.train.loop import Fit
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.tuning import Distillation, LadderPenalty, TunePenalty, carrying
from morphgraph.workflow import recounted, resize_and_check, with_weights as graph_with_weights

Ranked = Literal["data", "learned", "l2", "l1", "bn", "lasso"]
"""What ranks the channels of a trained network, see :class:`Trained`."""

DISTILL = 4.0
"""Weight of the distillation from the original beside the loss of the training."""


@dataclass(frozen=True)
class Trained:
    """How a trained network is shrunk.

    Attributes:
        aim: bounds of the widths, and how a regularizer counts; its budget is the smallest.
        budgets: from the largest to the smallest, each a network of the family.
        rank: what decides which channels stay: ``"data"``: what calibration inputs say that the
            outputs lose without them; ``"learned"``: a phase of training with the regularizer; or a
            score of the weights.
        refit: whether what is left is fitted to calibration inputs after the resize.
        distill, inside: weights of the distillation, and of the results of layers within it.
    """

    aim: SearchConfig
    budgets: tuple[Budget, ...]
    rank: Ranked = "data"
    refit: bool = True
    distill: float = DISTILL
    inside: float = 0.0

    def check(self, graph: ChannelGraph) -> None:
        """Refuse before anything is trained what no training could reach.

        Raises:
            ArgumentError: a weight is negative, or the budgets make no sense.
            BudgetError: the narrowest network is above a budget.
        """
        if not (self.distill >= 0 and self.inside >= 0):
            raise ArgumentError(
                f"distill={self.distill}, inside={self.inside}: weights of a loss are 0 or more"
            )
        if list(falling(graph, self.budgets)) != list(self.budgets):
            raise ArgumentError("give the budgets of a family from large to small")
        for budget in self.budgets:
            replace(self.aim, budget=budget).check(graph)


@dataclass(frozen=True)
class Member:
    """A network of a family before its fine-tuning.

    Attributes:
        budget: that it meets.
        plan: which channels of the original stay.
        model: the resized network, fitted where that was asked for.
        error: largest difference of the resize from the masked original, before the fit.
        sensitivity: how far masking moved the original's outputs.
        rung: its number in the family, from 0.
    """

    budget: Budget
    plan: Plan
    model: ir.Model
    error: float
    sensitivity: float
    rung: int


@dataclass
class Shrinking:
    """A trained network on its way to the smaller ones of a family.

    Args:
        graph: the lifted network, with its trained weights.
        net: the same as a module, which a learned ranking trains in place.
        settings: how.
        samples: calibration inputs; needed for a ranking by data, and for a refit.
        steps: of the phase that learns a ranking, where ``fit`` does not say.
        seed: of all that is random.
    """

    graph: ChannelGraph
    net: nn.Module
    settings: Trained
    samples: Samples | None = None
    steps: int | None = None
    seed: int = 0
    penalty: LadderPenalty | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.settings.check(self.graph)
        needs = [self.settings.rank == "data", self.settings.refit]
        if any(needs) and self.samples is None:
            raise ArgumentError(
                "a ranking by data and a refit need calibration inputs: give some (data=...), or "
                "rank='learned' and refit=False"
            )
        if self.settings.rank == "learned":
            self.penalty = self._penalty()

    def learn(self, fit: Fit) -> None:
        """Train the phase that learns the ranking, if there is one."""
        if self.penalty is not None:
            fit(self.net, self.penalty)
            self.penalty.end()

    def members(self) -> list[Member]:
        """The networks of the family, resized, from the largest to the smallest."""
        plans = distributed.from_first(self.plans)
        return [self._member(rung, plan) for rung, plan in enumerate(plans)]

    def tuning(self, member: Member, small: fx.GraphModule) -> TunePenalty:
        """The penalty of a member's fine-tuning; ``small`` is its network."""
        settings, distillation, before = self.settings, None, None
        if settings.distill:
            distillation = Distillation(
                to_torch(self.graph.model),
                small,
                AxisSelection(self.graph, member.plan.keep_channels(self.graph)),
                weight=settings.distill,
                inside=settings.inside,
            )
        if self.penalty is not None:
            known = self.penalty.optimizer_at(member.rung)
            before = carrying(known, self.graph, member.plan, self.net, small)
        return TunePenalty(distillation, before)

    # -- which channels stay ------------------------------------------------------------------

    @property
    def _bounds(self) -> WidthBounds:
        return self.settings.aim.limits

    def _penalty(self) -> LadderPenalty:
        aim = self.settings.aim
        regularizer = Regularizer(
            self.graph,
            self.net,
            aim.regularized,
            aim.strength,
            relative=aim.relative,
            min_width=aim.min_width,
            absorb=aim.absorb,
        )
        lowest = regularizer.lowest_share() * regularizer.initial_cost
        targets = [max(self._target(budget), lowest) for budget in self.settings.budgets]
        return LadderPenalty(regularizer, self.net, targets, self.steps)

    def _target(self, budget: Budget) -> float:
        """The regularized cost at a budget: its own, or the same share of it as of the others."""
        regularized = cost_of(self.graph, self.settings.aim.regularized)
        goals = {goal.kind: goal for goal in resolve_budget(self.graph, budget, "default")}
        own = goals.get(regularized.kind)
        if own is not None:
            return min(own.limit, regularized.total)
        share = min(goal.limit / goal.cost.total for goal in goals.values())
        return min(share, 1.0) * regularized.total

    def plans(self) -> list[Plan]:
        """The plans of the family, from the largest to the smallest, each a part of the former."""
        settings, bounds = self.settings, self._bounds
        with warnings.catch_warnings():
            # What widths cost is told of the plans that come out.
            for words in (".* off the grid", "the budget is below what the grid", "the plan chan"):
                warnings.filterwarnings("ignore", words, MorphWarning)
            request = {"family": settings.rank, "cost": settings.aim.regularized}

            def made(budgets: Sequence[Budget]) -> list[Plan]:
                wanted, scores = self._wanted(budgets)
                return nested(self.graph, budgets, wanted, scores, bounds, request)

            if settings.refit:
                plans = plans_with_room(self.graph, settings.budgets, made)
            else:
                plans = made(settings.budgets)
        warn_of_price(self.graph, plans[-1])
        return plans

    def _wanted(self, budgets: Sequence[Budget]) -> tuple[list[Plan], list[FloatArray]]:
        """For each budget alone a plan, and the scores of its channels."""
        settings, bounds = self.settings, self._bounds
        if self.penalty is not None:
            return self._learned(self.penalty, budgets)
        if settings.rank == "data":
            scores = self._shrinker.scores("data")
            plans = [self._shrinker.plan(budget) for budget in budgets]
        else:
            assert settings.rank != "learned"
            scores = scores_of(self.graph, settings.rank, self.seed)
            plans = [
                plan_by_score(
                    self.graph,
                    budget,
                    score=settings.rank,
                    round_to=bounds.round_to,
                    min_width=bounds.min_width,
                )
                for budget in budgets
            ]
        return plans, [scores] * len(plans)

    def _learned(
        self, penalty: LadderPenalty, budgets: Sequence[Budget]
    ) -> tuple[list[Plan], list[FloatArray]]:
        plans, scores = [], []
        regularizer = penalty.regularizer
        for budget, rung in zip(budgets, penalty.rungs, strict=True):
            ranked = rung["scores"].cpu().double().numpy()
            alive = rung["alive"].cpu().numpy()
            keep = {}
            for group in self.graph.groups:
                living = np.flatnonzero(alive[group.channels])
                if not len(living):
                    living = np.array([int(np.argmax(ranked[group.channels]))])
                keep[group.index] = living
            limits = self._bounds
            plans.append(continue_plan(self.graph, keep, ranked, budget, regularizer.cost, limits))
            scores.append(ranked)
        return plans, scores

    # -- what is left -------------------------------------------------------------------------

    @cached_property
    def _shrinker(self) -> Shrinker:
        """Of the original."""
        return Shrinker(self.graph, self.samples, bounds=self._bounds, seed=self.seed)

    def _member(self, rung: int, plan: Plan) -> Member:
        graph = self.graph
        if self.penalty is not None:
            graph = graph_with_weights(graph, self.penalty.rungs[rung]["weights"])
        with warnings.catch_warnings():
            # Channels that are zero are not missed.
            warnings.filterwarnings("ignore", "masking changed the outputs", MorphWarning)
            if self.settings.refit:
                shrinker = self._shrinker
                if self.penalty is not None:
                    shrinker = Shrinker(graph, self.samples, bounds=self._bounds, seed=self.seed)
                done = finish(shrinker, plan)
                model, report = done.model, done.check
            else:
                if self.penalty is not None:
                    graph = recounted(graph, plan.keep_channels(graph))
                resized = resize_and_check(
                    graph, plan, seed=self.seed, absorb=self.settings.aim.absorb
                )
                model, report = resized.model, resized.report
        assert report is not None
        budget = self.settings.budgets[rung]
        return Member(budget, plan, model, report.worst.relative, report.sensitivity, rung)
