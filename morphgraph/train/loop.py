"""Structure learning as one call: shrink under a budget, resize, train again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import torch
from torch import nn

from morphgraph.graph import ChannelGraph
from morphgraph.passes.goals import goals_of, require_reachable
from morphgraph.passes.lift import lift
from morphgraph.passes.limits import Limits
from morphgraph.plans import Plan
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights
from morphgraph.train.controller import Budget
from morphgraph.train.regularizer import Regularizer, Strength
from morphgraph.workflow import apply


class Penalty(Protocol):
    """What a training phase must call after every optimizer step."""

    def step(self, lr: float) -> None:
        """``lr`` is the optimizer's effective step: its learning rate over (1 - momentum)."""


class NoPenalty:
    """The penalty of a phase that trains the weights alone."""

    def step(self, lr: float) -> None:
        """Do nothing."""


Fit = Callable[[nn.Module, Penalty], None]


@dataclass(frozen=True)
class MorphResult:
    """What structure learning came to.

    Attributes:
        graph: the original network, lifted.
        plan: the structure that the training decided on.
        model: the resized network with its trained weights.
        net: the same as a torch module.
    """

    graph: ChannelGraph
    plan: Plan
    model: ir.Model
    net: nn.Module


def morph(
    net: nn.Module,
    example: tuple[torch.Tensor, ...],
    fit: Fit,
    *,
    budget: Mapping[str, str | float | int],
    steps: int,
    strength: Strength = "auto",
    round_to: int = 1,
    min_width: int = 1,
) -> MorphResult:
    """Learn a structure within a budget, resize the network to it, and train it again.

    Args:
        net: the seed network; it is trained in place by the first phase.
        example: inputs for the export.
        fit: ``fit(net, penalty)`` trains a network for one phase, on any data with any loss. It
            calls ``penalty.step(lr / (1 - momentum))`` after every optimizer step. It makes its own
            optimizer each time: after a resize the old one's state has the wrong sizes.
        budget: ``{"flops": "50%"}``; one cost, an amount or a share.
        steps: optimizer steps that the first phase will take; the structure is decided within them.
        strength: how a channel's use is measured, see :class:`Regularizer`.
        round_to, min_width: grid and floor of the new widths; with 0 layers may vanish.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    ...     for _ in range(60):
    ...         optimizer.zero_grad()
    ...         net(image(2)).square().mean().backward()
    ...         optimizer.step()
    ...         penalty.step(lr=0.05)
    >>> result = mg.morph(residual_cnn(), (image(2),), fit, budget={"flops": "50%"}, steps=60)
    >>> mg.cost(mg.lift(result.model), "flops").total <= 0.5 * mg.cost(result.graph, "flops").total
    True

    Raises:
        BudgetError: the budget cannot be met.
    """
    model = export(net, example)
    graph = lift(model)
    (kind,) = budget
    require_reachable(graph, goals_of(graph, budget, "default"), Limits(round_to, min_width))
    regularizer = Regularizer(graph, net, kind, strength, min_width=min_width)
    fit(net, Budget(regularizer, budget, steps))
    plan = regularizer.plan(budget, round_to=round_to, min_width=min_width)
    slim = apply(graph, plan, weights=net)
    small = to_torch(slim)
    fit(small, NoPenalty())
    return MorphResult(graph, plan, with_weights(slim, small), small)
