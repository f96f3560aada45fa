"""What all frameworks need: a shrinking phase that begins once the framework has the network ready.

A framework moves, wraps and loads networks between the line that makes a callback and the first
step. So the regularizer and the budget are made when training begins, and a state that is loaded
before waits until then. From then on the budget follows the optimizer by itself.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from morphgraph.errors import ArgumentError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.ops import parameter_names
from morphgraph.options import RoundTo
from morphgraph.plans import Plan
from morphgraph.torch_io.weights import named_tensors
from morphgraph.train.controller import Budget
from morphgraph.train.distributed import from_first
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.requests import require_amounts, require_options, require_steps
from morphgraph.train.watch import require_state


class ShrinkPhase:
    """A budget that is met while somebody else's loop trains the network.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> phase = ShrinkPhase(graph, {"flops": "50%"})
    >>> trainer = torch.nn.ModuleDict({"net": net})         # what a framework is given
    >>> optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-2, weight_decay=0)
    >>> phase.begin(trainer, [optimizer], steps=60)
    >>> for _ in range(60):
    ...     loss = net.train()(image(2)).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> phase.end()
    >>> plan = phase.plan()
    >>> plan.cost["flops"].after <= 0.5 * plan.cost["flops"].before
    True

    Args:
        graph: the network as it was exported, lifted.
        budget: as for :class:`morphgraph.Budget`, ``{"flops": "50%"}``.
        steps: optimizer steps of the phase, by default all that the training takes.
        options: of :class:`morphgraph.Regularizer`, such as ``exclude`` or ``min_width``.

    Attributes:
        budget: once training has begun.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        budget: Mapping[str, str | float | int],
        *,
        steps: int | None = None,
        **options: Any,
    ) -> None:
        require_amounts(budget)
        require_options(Regularizer, options)
        self.graph = graph
        self.amounts = dict(budget)
        self.steps = None if steps is None else require_steps(steps)
        self.options = {"cost": next(iter(self.amounts)), **options}
        self.budget: Budget | None = None
        self._loaded: Mapping[str, Any] = {}

    def begin(self, net: nn.Module, optimizers: Iterable[Any], steps: int) -> None:
        """Make the budget, and let it follow the optimizers.

        Args:
            net: what is trained, on its device: the network, or a module that it is a part of.
            optimizers: that train it, wrapped by the framework or not.
            steps: optimizer steps that the training takes, for a phase of no other length.

        Raises:
            ModelError: the graph's parameters are not in the module.
            ArgumentError: the optimizers have none of them.
        """
        regularizer = Regularizer(self.graph, part_with(net, self.graph), **self.options)
        # First the units: what the network is now is not what it began with.
        if self._loaded:
            self._loaded = _moved(self._loaded, regularizer)
            regularizer.load_state_dict(self._loaded["strengths"])
        self.budget = Budget(regularizer, self.amounts, self.steps or steps)
        if self._loaded:
            self.budget.load_state_dict(self._loaded)
            self._loaded = {}
        self.budget.attach(*optimizers)

    def end(self) -> None:
        """Follow the optimizers no longer, and warn where the phase was stopped before its end."""
        if self.budget is None:
            return
        self.budget.detach()
        missed = self.budget.shortfall()
        if missed and self.budget.step_number != self.budget.steps:  # then the budget has said so
            warn(
                f"the training ended at {missed}: the plan will remove the rest at once; give "
                "steps, the optimizer steps that it really takes"
            )

    @property
    def regularizer(self) -> Regularizer:
        """What measures the network.

        Raises:
            ArgumentError: training has not begun.
        """
        if self.budget is None:
            raise ArgumentError("the training has not begun: there is nothing to read off yet")
        return self.budget.regularizer

    def plan(self, *, round_to: RoundTo = 1) -> Plan:
        """What the training has decided; on all processes that of the first.

        Args:
            round_to: the grid of widths, see :meth:`morphgraph.Regularizer.plan`.

        Raises:
            ArgumentError: training has not begun.
            BudgetError: the budget cannot be met on this grid.
        """
        regularizer = self.regularizer
        return from_first(lambda: regularizer.plan(self.amounts, round_to=round_to))

    def state_dict(self) -> dict[str, Any]:
        """All that changes: plain data and tensors, for the framework's checkpoint."""
        return dict(self._loaded) if self.budget is None else self.budget.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state; before the training has begun it is kept until then.

        Raises:
            ArgumentError: the state is of other budgets, or of another network.
        """
        if not state_dict:
            return
        require_state(state_dict)
        if self.budget is None:
            self._loaded = state_dict
        else:
            self.budget.load_state_dict(_moved(state_dict, self.budget.regularizer))


def part_with(net: nn.Module, graph: ChannelGraph) -> nn.Module:
    """The outermost module that has all parameters of a graph under their names.

    A framework is given the network as a part of something: a ``LightningModule``, a wrapper with a
    loss. Where no module has them all, the given one: the regularizer says which are missing.
    """
    wanted = set(parameter_names(graph.model))
    return next((part for part in net.modules() if wanted <= named_tensors(part).keys()), net)


def _moved(state: Mapping[str, Any], regularizer: Regularizer) -> Mapping[str, Any]:
    """The state with its tensors where the regularizer measures: copies."""
    device = regularizer.strengths().device
    moved: Mapping[str, Any] = pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device, copy=True), dict(state)
    )
    return moved
