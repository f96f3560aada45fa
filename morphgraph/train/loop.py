"""Structure learning as one call: MorphNet's algorithm 1 (Gordon et al., CVPR 2018).

1. train with the regularizer until the structure is found
2. read off the widths
3. multiply them by the largest factor that the budget allows
4. repeat from there, or train what has come out
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from morphgraph.arrays import FloatArray
from morphgraph.errors import MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.options import RoundTo, Start, Strength, Update
from morphgraph.origin import Origin
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import warn_of_price
from morphgraph.passes.planning.compose import Provenance
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.passes.planning.expand import expand
from morphgraph.plans import Plan
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights
from morphgraph.train import distributed
from morphgraph.train.config import SHRINK_TO, SearchConfig
from morphgraph.train.controller import ControlStep
from morphgraph.train.lifted import lift_to_train
from morphgraph.train.phases import NoPenalty, Penalty, ShrinkPenalty, run_fit
from morphgraph.train.regularizer import Regularizer
from morphgraph.workflow import Resized, resize_and_check

Fit = Callable[[nn.Module, Penalty], None]


@dataclass(frozen=True)
class Iteration:
    """The result of one round of shrinking and expanding.

    Attributes:
        number: from 1.
        graph: the network that was shrunk, lifted; of the first round the original.
        net: its module, trained with the regularizer.
        shrunk: the structure that the training decided on, a plan for ``graph``.
        grown: the same after the expansion.
        plan: the same as a plan for the original network, ``before_growth`` the shrunk one.
        resized: the new network with its trained weights, and how far it is from the masked one.
        target: the regularized cost that the phase was to reach.
        live: the regularized cost when it ended.
        met: whether it was reached.
        trajectory: of the controller.
        strengths: of every group that may shrink its id, the strengths of its channels when the
            phase ended, and the threshold at or below which they go.
        last: whether no other round follows.
    """

    number: int
    graph: ChannelGraph
    net: nn.Module
    shrunk: Plan
    grown: Plan
    plan: Plan
    before_growth: Plan
    resized: Resized
    target: float
    live: float
    met: bool
    trajectory: tuple[ControlStep, ...]
    strengths: tuple[tuple[str, FloatArray, float], ...]
    last: bool

    @property
    def trimmed(self) -> float:
        """Share of the regularized cost that the plan still had to remove after the training."""
        change = self.shrunk.cost[self.regularized]
        return (self.live - change.after) / change.before

    @property
    def regularized(self) -> str:
        """The cost that the regularizer counted."""
        return str(self.plan.request["cost"])


def rounds(
    graph: ChannelGraph,
    net: nn.Module,
    fit: Fit,
    aim: SearchConfig,
    *,
    steps: int | None = None,
    seed: int = 0,
) -> Iterator[Iteration]:
    """Shrink and expand, one iteration at a time; each begins with the network of the one before.

    Args:
        graph: the lifted network.
        net: the same as a module, on the device where it is to train; trained in place.
        fit: trains a network for one phase, see :func:`morph`.
        aim: the budget, and how to get there.
        steps: length of a phase where ``fit`` does not call ``penalty.begin``.
        seed: of the inputs of checks, and of the weights of new channels.
    """
    device = next(net.parameters()).device
    # Amounts, not shares: they hold for the networks of all iterations.
    ceilings = {goal.kind: goal.limit for goal in resolve_budget(graph, aim.budget, "default")}
    provenance = Provenance.of(graph)
    seen: set[bytes] = set()
    for number in range(1, aim.iterations + 1):
        iteration = _round(number, provenance, net, fit, aim, ceilings, steps, seed)
        widths = iteration.plan.widths(graph).tobytes()
        # Widths that come a second time would come again and again.
        last = number == aim.iterations or widths in seen
        if last:
            warn_of_price(graph, iteration.plan)
        yield replace(iteration, last=last)
        if last:
            return
        seen.add(widths)
        small = lift(iteration.resized.model, **graph.options.arguments())
        provenance = provenance.after(iteration.grown, small)
        net = to_torch(iteration.resized.model).to(device)


def _round(
    number: int,
    provenance: Provenance,
    net: nn.Module,
    fit: Fit,
    aim: SearchConfig,
    ceilings: Mapping[str, float],
    steps: int | None,
    seed: int,
) -> Iteration:
    """Train with the regularizer, read off the widths, expand them, and resize the network."""
    graph, frozen = provenance.graph, tuple(provenance.frozen_groups())
    regularizer = Regularizer(
        graph,
        net,
        aim.regularized,
        aim.strength,
        relative=aim.relative,
        exclude=frozen,
        min_width=aim.min_width,
        absorb=aim.absorb,
    )
    target = _target(regularizer, aim.shrink_to, replace(aim.limits, exclude=frozen))
    penalty = ShrinkPenalty(regularizer, target, steps, aim.update)
    run_fit(fit, net, penalty)
    penalty.end()
    strengths = _strengths(regularizer)

    def decide() -> tuple[Plan, Plan]:
        shrunk = regularizer.plan({regularizer.cost.kind: target}, round_to=aim.round_to)
        grown = expand(
            graph,
            shrunk,
            ceilings,
            round_to=aim.round_to,
            max_width=_widest(provenance, aim.max_growth),
            exclude=frozen,
            score=regularizer.strengths().detach().cpu().double().numpy(),
        )
        return shrunk, grown

    with warnings.catch_warnings():
        # Channels that are zero are not missed; where nothing shrank, `penalty.end` has said so.
        # What widths cost is told of the last.
        told = (".* off the grid", "the budget is below what the grid")
        for words in ("masking changed the outputs", "the plan changes nothing", *told):
            warnings.filterwarnings("ignore", words, MorphWarning)
        shrunk, grown = distributed.from_first(decide)
        resized = resize_and_check(graph, grown, weights=net, seed=seed, absorb=aim.absorb)
    return Iteration(
        number=number,
        graph=graph,
        net=net,
        shrunk=shrunk,
        grown=grown,
        plan=provenance.compose(grown, aim.request() | {"omega": grown.request["omega"]}),
        before_growth=provenance.compose(shrunk, aim.request(), grown.cost),
        resized=resized,
        target=target,
        live=regularizer.live_cost(),
        met=penalty.met,
        trajectory=penalty.trajectory,
        strengths=strengths,
        last=False,
    )


def _strengths(regularizer: Regularizer) -> tuple[tuple[str, FloatArray, float], ...]:
    """Per group that may shrink its id, its channels' strengths, and its threshold."""
    graph = regularizer.graph
    found = regularizer.strengths().detach().cpu().double().numpy()
    thresholds = np.broadcast_to(
        torch.as_tensor(regularizer.threshold).detach().cpu().double().numpy(), found.shape
    )
    return tuple(
        (group.id, found[group.channels], float(thresholds[group.channels].mean()))
        for group in graph.groups
        if group.resizable and found[group.channels].any()
    )


def _widest(provenance: Provenance, max_growth: float | None) -> dict[str, int]:
    """Per group the widest that it may get, by the width of its origin in the first network."""
    if max_growth is None:
        return {}
    origins = provenance.origin_group.tolist()
    return {
        group.id: max(1, int(max_growth * provenance.first.groups[origin].width))
        for group, origin in zip(provenance.graph.groups, origins, strict=True)
        if group.resizable and origin >= 0
    }


def _target(regularizer: Regularizer, shrink_to: float, limits: WidthBounds) -> float:
    """The regularized cost that a phase is to reach."""
    graph, resource = regularizer.graph, regularizer.cost
    least = max(
        resource.at(limits.lowest(graph)),
        regularizer.lowest_share() * regularizer.initial_cost,
    )
    return least + shrink_to * (regularizer.initial_cost - least)


def start_of_last(original: ChannelGraph, last: Iteration, weights: Start, seed: int) -> ir.Model:
    """The network that the last phase trains: with the weights so far, or with new ones."""
    model = last.resized.model
    if weights != "keep":  # the resize itself is checked already
        model = resize_and_check(
            last.graph, last.grown, weights="fresh", verify=False, seed=seed
        ).model
    Origin.of(original, last.plan, last.resized.report).write(model)
    return model


@dataclass(frozen=True)
class MorphResult:
    """The result of structure learning.

    Attributes:
        graph: the original network, lifted.
        plan: the structure that the training decided on, as a plan for the original.
        model: the resized network with its trained weights.
        net: the same as a torch module.
        iterations: the results of all iterations.
    """

    graph: ChannelGraph
    plan: Plan
    model: ir.Model
    net: nn.Module
    iterations: tuple[Iteration, ...]


def morph(
    net: nn.Module,
    example: tuple[torch.Tensor, ...],
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
) -> MorphResult:
    """Learn a structure within a budget, resize the network to it, and train it again.

    What :func:`morphgraph.learning.morph` calls for a new network, which says what is given.
    """
    aim = SearchConfig(
        budget,
        cost=cost,
        iterations=iterations,
        shrink_to=shrink_to,
        strength=strength,
        round_to=round_to,
        min_width=min_width,
        max_growth=max_growth,
        weights=weights,
        absorb=absorb,
        update=update,
        relative=relative,
    )
    graph = lift_to_train(net, example)
    aim.check(graph)
    done = tuple(rounds(graph, net, fit, aim, steps=steps, seed=seed))
    last = done[-1]
    model = start_of_last(graph, last, weights, seed)
    small = to_torch(model).to(next(net.parameters()).device)
    run_fit(fit, small, NoPenalty())
    return MorphResult(graph, last.plan, with_weights(model, small), small, done)
