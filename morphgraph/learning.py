"""``morph`` as users call it: from a new network, or from a trained one; and families of networks.

From a trained network the weights are kept throughout. Which channels stay is either found from
calibration inputs, before anything is trained, or learned by a fine-tuning with the regularizer.
Then the network is resized, fitted to those inputs (:mod:`morphgraph.passes.refit`) and fine-tuned,
with its original as a teacher.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from torch import fx, nn

from morphgraph.arrays import FloatArray
from morphgraph.calibration import Samples
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.options import RoundTo, Start, Strength, Update
from morphgraph.passes.analysis.cost import cost as cost_of
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import scores_of, warn_of_price
from morphgraph.passes.planning.constraints import Budget, resolve_budget
from morphgraph.passes.planning.nested import Ranking, falling, nested
from morphgraph.passes.planning.removal_path import continue_plan, plan as plan_by_score
from morphgraph.passes.refit.room import plans_with_room
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights
from morphgraph.train import distributed, loop
from morphgraph.train.config import SHRINK_TO, SearchConfig
from morphgraph.train.loop import Fit, MorphResult
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.tuning import Distillation, LadderPenalty, TunePenalty, carrying
from morphgraph.workflow import resize_and_check, with_weights as graph_with_weights

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
            limits = {"round_to": bounds.round_to, "min_width": bounds.min_width}
            plans = [
                plan_by_score(self.graph, budget, score=settings.rank, **limits)  # type: ignore[arg-type]
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
                resized = resize_and_check(
                    graph, plan, seed=self.seed, absorb=self.settings.aim.absorb
                )
                model, report = resized.model, resized.report
        assert report is not None
        budget = self.settings.budgets[rung]
        return Member(budget, plan, model, report.worst.relative, report.sensitivity, rung)


@dataclass(frozen=True)
class Family:
    """Networks for several budgets from one trained network, each a part of the larger ones.

    Attributes:
        graph: the original, lifted.
        members: the networks, fine-tuned, from the largest to the smallest; their ``iterations``
            are empty.
        ranking: the order in which channels leave, from which plans for other budgets follow.
    """

    graph: ChannelGraph
    members: tuple[MorphResult, ...]
    ranking: Ranking


def family(
    net: nn.Module,
    example: Any,
    fit: Fit,
    *,
    budgets: Sequence[Mapping[str, str | float | int]],
    data: Any = None,
    rank: Ranked = "data",
    refit: bool | None = None,
    distill: float = DISTILL,
    inside: float = 0.0,
    cost: str | None = None,
    steps: int | None = None,
    strength: Strength = "auto",
    round_to: RoundTo = "auto",
    min_width: int = 1,
    absorb: bool = False,
    update: Update = "proximal",
    relative: bool | None = None,
    seed: int = 0,
) -> Family:
    """Shrink a trained network to several budgets, and fine-tune each of the smaller networks.

    Args:
        net: the trained network. A learned ranking trains it in place; otherwise it is not changed.
        example: inputs for the export.
        fit: as for :func:`morph`: it trains a network for one phase, at a rate that suits a
            fine-tuning. It is called once for a learned ranking, and once for each budget.
            ``penalty.carry(optimizer)``, once the optimizer is made, gives it the state of the one
            before the resize; ``loss + penalty.loss()`` learns from the original.
        budgets: on the same costs.
        data: calibration inputs without labels, as :func:`morphgraph.shrink` takes them.
        rank, distill, inside: see :class:`Trained`.
        refit: whether what is left is fitted to ``data`` after the resize; by default where there
            are any.
        cost, strength, update, relative: of the regularizer, where the ranking is learned.
        steps, round_to, min_width, absorb, seed: as for :func:`morph`.

    Raises:
        ArgumentError: an argument makes no sense, or ``data`` are missing.
        BudgetError: a budget cannot be met.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    ...     penalty.carry(optimizer)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         (net.train()(image(2)).square().mean() + penalty.loss()).backward()
    ...         optimizer.step()
    ...         penalty.step(lr=0.01 / (1 - 0.9))
    >>> budgets = [{"flops": "70%"}, {"flops": "40%"}]
    >>> made = mg.family(residual_cnn(), (image(2),), fit, budgets=budgets, data=[image(64)])
    >>> large, small = (member.plan.widths(made.graph) for member in made.members)
    >>> bool((small <= large).all())
    True
    """
    graph = lift(export(net, example))
    aim = SearchConfig(
        budgets[-1] if budgets else {},
        cost=cost,
        strength=strength,
        round_to=round_to,
        min_width=min_width,
        absorb=absorb,
        update=update,
        relative=relative,
    )
    ordered = tuple(falling(graph, list(budgets)))
    settings = Trained(
        replace(aim, budget=ordered[-1]),
        ordered,
        rank,
        data is not None if refit is None else refit,
        distill,
        inside,
    )
    samples = None
    if data is not None:
        samples = data if isinstance(data, Samples) else Samples.of(data, graph.model, seed=seed)
    shrinking = Shrinking(graph, net, settings, samples, steps, seed)
    shrinking.learn(fit)
    device = next(net.parameters()).device
    results = []
    for member in shrinking.members():
        small = to_torch(member.model).to(device)
        penalty = shrinking.tuning(member, small)
        fit(small, penalty)
        penalty.end()
        model = with_weights(member.model, small)
        results.append(MorphResult(graph, member.plan, model, small, ()))
    ranking = Ranking.of(graph, [result.plan for result in results])
    return Family(graph, tuple(results), ranking)


def morph(
    net: nn.Module,
    example: Any,
    fit: Fit,
    *,
    budget: Mapping[str, str | float | int],
    iterations: int = 1,
    cost: str | None = None,
    steps: int | None = None,
    shrink_to: float = SHRINK_TO,
    strength: Strength = "auto",
    round_to: RoundTo = "auto",
    min_width: int = 1,
    max_growth: float | None = None,
    weights: Start = "keep",
    absorb: bool = False,
    update: Update = "proximal",
    relative: bool | None = None,
    seed: int = 0,
    start: Literal["new", "trained"] = "new",
    data: Any = None,
    rank: Ranked = "data",
    refit: bool | None = None,
    distill: float = DISTILL,
    inside: float = 0.0,
) -> MorphResult:
    """Learn a structure within a budget, resize the network to it, and train it again.

    Each iteration shrinks the network while it trains, and multiplies the widths that are left by
    one factor so that the budget is used. A budget of 100 % gives a better network of the same
    cost.

    Args:
        net: the seed network; it is trained in place by the first phase. From a trained network
            with a ranking by data it is not changed.
        example: inputs for the export.
        fit: ``fit(net, penalty)`` trains a network for one phase, on any data with any loss. It
            calls ``penalty.begin(steps)`` first, to say how many optimizer steps it takes, and
            ``penalty.attach(optimizer)``, or ``penalty.step()`` after each of them. It makes its
            own optimizer each time: after a resize the old one's state has the wrong sizes.
        budget: ``{"flops": "50%"}``; per cost an amount or a share.
        iterations: how often to shrink and expand before the last training.
        cost: what the regularizer counts; the first of the budget's costs if not given.
        steps: optimizer steps of a phase, for a ``fit`` that does not call ``penalty.begin``; 1000
            are assumed without either.
        shrink_to, strength, round_to, min_width, max_growth, weights, absorb, update, relative: see
            :class:`~morphgraph.train.config.SearchConfig`; with ``update="subgradient"`` ``fit``
            adds ``penalty.loss()`` to the loss.
        seed: of the inputs of checks, and of new weights.
        start: ``"trained"`` keeps the weights of ``net`` throughout: its channels are ranked by
            ``data`` (``rank="learned"``: by a phase with the regularizer, at the budget itself),
            the network is resized, fitted to ``data`` and fine-tuned by ``fit``, with the original
            as a teacher where ``fit`` adds ``penalty.loss()`` to its loss. ``iterations``,
            ``shrink_to``, ``max_growth`` and ``weights`` are of ``"new"`` alone.
        data, rank, refit, distill, inside: from a trained network, as for :func:`family`.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ...     penalty.begin(80)
    ...     penalty.attach(optimizer)
    ...     for _ in range(80):
    ...         optimizer.zero_grad()
    ...         net(image(2)).square().mean().backward()
    ...         optimizer.step()
    >>> result = mg.morph(residual_cnn(), (image(2),), fit, budget={"flops": "50%"})
    >>> mg.cost(mg.lift(result.model), "flops").total <= 0.5 * mg.cost(result.graph, "flops").total
    True

    Raises:
        ArgumentError: an argument makes no sense.
        BudgetError: the budget cannot be met.
    """
    regularizing: dict[str, Any] = {
        "cost": cost,
        "steps": steps,
        "strength": strength,
        "round_to": round_to,
        "min_width": min_width,
        "absorb": absorb,
        "update": update,
        "relative": relative,
        "seed": seed,
    }
    if start == "new":
        return loop.morph(
            net,
            example,
            fit,
            budget=budget,
            iterations=iterations,
            shrink_to=shrink_to,
            max_growth=max_growth,
            weights=weights,
            **regularizing,
        )
    if start != "trained":
        raise ArgumentError(f"start={start!r} is unknown; use 'new' or 'trained'")
    given = {
        "iterations": iterations != 1,
        "max_growth": max_growth is not None,
        "weights": weights != "keep",
        "shrink_to": shrink_to != SHRINK_TO,
    }
    if any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise ArgumentError(f"{name} goes with start='new'; a trained network keeps its weights")
    made = family(
        net,
        example,
        fit,
        budgets=[budget],
        data=data,
        rank=rank,
        refit=refit,
        distill=distill,
        inside=inside,
        **regularizing,
    )
    return made.members[0]
