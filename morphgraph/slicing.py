"""Elastic networks: one set of weights, trained so that smaller networks can be sliced from it.

A family (:func:`morphgraph.family`) tunes a network for each budget. An elastic network is trained
once; a network for any budget between the whole one and the smallest is a slice of its weights,
with the statistics of BatchNorm measured anew (Yu and Huang, ICCV 2019).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import fx, nn

from morphgraph.calibration import Samples
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.ops import running_statistics
from morphgraph.options import RoundTo
from morphgraph.passes.analysis.cost import Device
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.passes.planning.nested import Ranking, falling
from morphgraph.plans import Plan
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import graph_with_weights
from morphgraph.train.config import SearchConfig
from morphgraph.train.lifted import lift_to_train
from morphgraph.train.loop import Fit
from morphgraph.train.sandwich import SandwichPenalty, Slice
from morphgraph.train.statistics import refresh_statistics
from morphgraph.trained import DISTILL, Ranked, Shrinking, Trained
from morphgraph.workflow import resize_and_check

BUDGETS_BETWEEN = 8
DRAWS = 2


@dataclass(frozen=True)
class Sliced:
    """A network for one budget.

    Attributes:
        plan: which channels of the elastic network it has.
        model: the network.
        check: its comparison with the masked elastic network, before statistics are measured.
    """

    plan: Plan
    model: ir.Model
    check: VerifyReport


@dataclass(frozen=True)
class Elastic:
    """A network with the order in which its channels leave, from which smaller ones are sliced.

    ``graph.model`` and ``ranking`` are all that is to be saved:
    ``Elastic(mg.lift("elastic.onnx"), mg.Ranking.load("ranking.json"))`` is the same again.

    Attributes:
        graph: the whole network with the shared weights, lifted.
        ranking: down to the smallest network.
        data: calibration inputs, from which slices get their statistics.
    """

    graph: ChannelGraph
    ranking: Ranking
    data: Any = None

    def slice(
        self,
        budget: Mapping[str, str | float | int],
        *,
        data: Any = None,
        round_to: RoundTo = "auto",
        device: Device | None = None,
    ) -> Sliced:
        """The widest network within a budget, without training.

        Args:
            budget: per cost (FLOPs, parameters, memory, milliseconds) an amount or a share.
            data: inputs without labels for the statistics of BatchNorm; by default those that the
                elastic network was made with.
            round_to: grid of the widths between two of the budgets that were trained.
            device: on which a latency counts.

        Raises:
            BudgetError: even the smallest network is above the budget.
            PlanError: the ranking is of another network.
            VerificationError: the slice does not compute what the masked network computes.
        """
        plan = self.ranking.plan(self.graph, budget, round_to=round_to, device=device)
        with warnings.catch_warnings():
            # A slice is another network, and was trained to be one.
            warnings.filterwarnings("ignore", "masking changed the outputs", MorphWarning)
            resized = resize_and_check(self.graph, plan)
        model, check = resized.model, resized.report
        assert check is not None
        given = self.data if data is None else data
        if given is not None:
            return Sliced(plan, refresh_statistics(model, given), check)
        if plan.groups and running_statistics(model):
            warnings.warn(
                "the slice has the BatchNorm statistics of the whole network, which are wrong for "
                "it; give inputs (data=...) to measure them",
                MorphWarning,
                stacklevel=2,
            )
        return Sliced(plan, model, check)


@dataclass(frozen=True, kw_only=True)
class ElasticResult(Elastic):
    """An elastic network as it was trained.

    Attributes:
        net: the whole network as a module.
        plans: the smaller networks that were trained with it, from the largest to the smallest.
    """

    net: fx.GraphModule
    plans: tuple[Plan, ...]


def elastic(
    net: nn.Module,
    example: Any,
    fit: Fit,
    *,
    budgets: Sequence[Mapping[str, str | float | int]],
    data: Any = None,
    rank: Ranked = "data",
    between: int = BUDGETS_BETWEEN,
    draws: int = DRAWS,
    distill: float = DISTILL,
    round_to: RoundTo = "auto",
    min_width: int = 1,
    seed: int = 0,
) -> ElasticResult:
    """Train one set of weights from which a network for any budget can be sliced later.

    In every step the whole network learns by the loss of ``fit``; the smallest network and
    ``draws`` others, whose weights are parts of the same, learn from its outputs.

    Args:
        net: a trained network; it is not changed.
        example: inputs for the export.
        fit: as for :func:`morphgraph.family`; it is called once, with the whole network, and adds
            ``penalty.loss()`` to its loss.
        budgets: on the same costs; the last is the smallest network. The largest one is always the
            whole network, so that a budget of 100 % can be given or left out.
        data: calibration inputs without labels, as :func:`morphgraph.shrink` takes them: they rank
            the channels, and slices get their BatchNorm statistics from them.
        rank: ``"data"``, or a score of the weights; a phase of training cannot rank here, as it
            zeroes channels that the whole network is to keep.
        between: further networks that are trained, at budgets evenly between the whole network and
            the smallest; each takes the memory of its weights.
        draws: how many networks are drawn in every step beside the smallest.
        distill: weight of the loss of the smaller networks.
        round_to, min_width, seed: as for :func:`morphgraph.morph`.

    Raises:
        ArgumentError: an argument makes no sense, or ``data`` are missing.
        BudgetError: a budget cannot be met.
        UnsupportedError: the smaller networks' weights are no slices of the whole network's.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         (net.train()(image(4)).square().mean() + penalty.loss()).backward()
    ...         optimizer.step()
    >>> net, budgets = residual_cnn((8, 16)), [{"flops": "60%"}, {"flops": "30%"}]
    >>> made = mg.elastic(net, (image(4),), fit, budgets=budgets, data=[image(64)], between=2)
    >>> small = made.slice({"flops": "45%"})
    >>> whole = mg.cost(made.graph, "flops").total
    >>> mg.cost(mg.lift(small.model), "flops").total <= 0.45 * whole
    True
    """
    if rank == "learned":
        raise ArgumentError(
            "rank='learned' zeroes channels that the whole network is to keep; give rank='data' or "
            "a score of the weights"
        )
    if between < 0 or draws < 0:
        raise ArgumentError(f"between={between}, draws={draws}: both are numbers from 0")
    graph = lift_to_train(net, example)
    smaller = below_whole(graph, budgets)
    aim = SearchConfig(smaller[-1], round_to=round_to, min_width=min_width)
    settings = Trained(aim, smaller, rank, refit=False, distill=distill)
    samples = data
    if data is not None and not isinstance(data, Samples):
        samples = Samples.of(data, graph.model, seed=seed)
    ladder = Ladder.of(graph, net, settings, samples, between=between, seed=seed)
    shared = to_torch(graph.model).to(next(net.parameters()).device)
    penalty = ladder.penalty(graph, shared, distill=distill, draws=draws, seed=seed)
    fit(shared, penalty)
    penalty.end()
    trained = graph_with_weights(graph, shared)
    return ElasticResult(
        graph=trained, ranking=ladder.ranking, data=samples, net=shared, plans=ladder.plans
    )


@dataclass(frozen=True)
class Ladder:
    """The smaller networks that are trained with an elastic one.

    Attributes:
        ranking: in which order channels leave.
        rungs: the plans of the budgets that were asked for, from the largest to the smallest.
        plans: these and those between, of different widths.
    """

    ranking: Ranking
    rungs: tuple[Plan, ...]
    plans: tuple[Plan, ...]

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        net: nn.Module,
        settings: Trained,
        samples: Samples | None,
        *,
        between: int = BUDGETS_BETWEEN,
        seed: int = 0,
    ) -> "Ladder":
        """Rank the channels, and choose the budgets between.

        Args:
            graph: the trained network, lifted.
            net: the same as a module.
            settings: its budgets are below the whole network, see :func:`below_whole`.
            samples: calibration inputs, where they rank.
            between: how many further networks.
            seed: of all that is random.
        """
        rungs = Shrinking(graph, net, settings, samples, seed=seed).plans()
        ranking = Ranking.of(graph, rungs)
        smallest, grid = settings.budgets[-1], settings.aim.round_to
        plans = _with_between(graph, ranking, rungs, smallest, between, grid)
        return cls(ranking, tuple(rungs), tuple(plans))

    def penalty(
        self, graph: ChannelGraph, shared: nn.Module, *, distill: float, draws: int, seed: int
    ) -> SandwichPenalty:
        """What lets a training of the whole network train the smaller ones, too.

        Raises:
            UnsupportedError: their weights are no slices of the whole network's.
        """
        slices = [Slice(graph, plan) for plan in self.plans]
        return SandwichPenalty(shared, slices, weight=distill, draws=draws, seed=seed)


def below_whole(
    graph: ChannelGraph, budgets: Sequence[Mapping[str, str | float | int]]
) -> tuple[Mapping[str, str | float | int], ...]:
    """The budgets that the whole network does not meet, falling."""
    ordered = falling(graph, budgets)
    found = tuple(
        budget
        for budget in ordered
        if any(goal.limit < goal.cost.total for goal in resolve_budget(graph, budget, "default"))
    )
    if not found:
        raise ArgumentError("the whole network meets every budget; give a smaller one as the last")
    return found


def _with_between(
    graph: ChannelGraph,
    ranking: Ranking,
    rungs: Sequence[Plan],
    smallest: Mapping[str, str | float | int],
    count: int,
    round_to: RoundTo,
) -> list[Plan]:
    """The plans of the ladder and others between, of different widths, the largest first."""
    goals = resolve_budget(graph, smallest, "default")
    found = list(rungs)
    for number in range(1, count + 1):
        share = number / (count + 1)
        budget = {
            goal.kind: goal.cost.total + share * min(goal.limit - goal.cost.total, 0.0)
            for goal in goals
        }
        found.append(ranking.plan(graph, budget, round_to=round_to))
    by_widths = {tuple(plan.widths(graph).tolist()): plan for plan in reversed(found)}
    return [
        by_widths[widths] for widths in sorted(by_widths, reverse=True) if by_widths[widths].groups
    ]
