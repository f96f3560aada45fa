"""What a fine-tuning from a trained network adds: its original as a teacher, and carried state.

    loss = weight * (mean over outputs of E(output) + inside * mean over layers of E(result))
    E(v) = |v - v of the original|^2 / variance of the original's v

The original answers the same inputs as the network in training (Hinton, Vinyals and Dean 2015); the
results of its layers are hints (Romero et al. 2015) at the positions that the resized network still
has. Both are taken by hooks, so that the training loop stays as it is and adds ``penalty.loss()``.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from morphgraph.errors import warn
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.plans import Plan
from morphgraph.torch_io.optimizer_state import Optimizer, transfer_optimizer_state
from morphgraph.torch_io.to_torch import value_nodes
from morphgraph.train import distributed
from morphgraph.train.pair import layer_results
from morphgraph.train.phases import NoPenalty, ShrinkPenalty
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.settled import Settled

_LEAST = 1e-12  # of a variance


class Distillation:
    """How far a network in training is from its original, on the inputs that it is trained with.

    Attributes:
        spreads: the variances of outputs, by number, and of layers' results, by name.

    Args:
        teacher: the original, as :func:`morphgraph.to_torch` makes it; put into ``eval``.
        net: the resized network, likewise.
        selection: which positions of the original's values it has.
        weight: of the whole loss.
        inside: weight of the results of layers beside the outputs; 0 leaves them out.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> plan = mg.uniform(graph, 0.5)
    >>> net = mg.to_torch(mg.apply(graph, plan))
    >>> selection = AxisSelection(graph, plan.keep_channels(graph))
    >>> distillation = Distillation(mg.to_torch(graph.model), net, selection)
    >>> logits = net.train()(image())
    >>> float(distillation.loss()) > 0
    True
    >>> distillation.remove()
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        net: fx.GraphModule,
        selection: AxisSelection,
        *,
        weight: float = 1.0,
        inside: float = 0.0,
    ) -> None:
        device = next(iter(net.parameters())).device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.weight, self.inside = weight, inside
        self.asked = False
        self._loss: Tensor | float = 0.0
        self.spreads: dict[int | str, Tensor] = {}
        names = layer_results(selection.graph) if inside else []
        layers, originals = _layers_of(net, names), _layers_of(teacher, names)
        shared = [name for name in names if name in layers and name in originals]
        self._cuts: dict[str, list[tuple[int, Tensor]]] = {
            name: [(a, torch.from_numpy(kept).to(device)) for a, kept in selection.cuts(name)]
            for name in shared
        }
        self._found: dict[str, Tensor] = {}
        self._expected: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            net.register_forward_hook(self._answered, with_kwargs=True)
        ]
        for name in shared:
            for module, results in ((layers[name], self._found), (originals[name], self._expected)):
                self._handles.append(module.register_forward_hook(_noting(results, name)))

    def loss(self) -> Tensor | float:
        """Of the last forward in training, to be added to the loss once; 0 before the first."""
        self.asked = True
        loss, self._loss = self._loss, 0.0
        return loss

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _answered(
        self, net: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], results: Any
    ) -> None:
        """Let the teacher answer what the network has just answered."""
        if not net.training or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            expected = self.teacher(*arguments, **keywords)
        pairs = list(zip(float_results(results), float_results(expected), strict=False))
        errors = [self._error(k, found, wanted) for k, (found, wanted) in enumerate(pairs)]
        loss = torch.stack(errors).mean()
        hints = [self._error(name, self._found[name], self._hint(name)) for name in self._found]
        if hints:
            loss = loss + self.inside * torch.stack(hints).mean()
        self._found.clear()
        self._expected.clear()
        self._loss = self.weight * loss

    def _hint(self, name: str) -> Tensor:
        value = self._expected[name]
        for axis, kept in self._cuts[name]:
            value = value.index_select(axis, kept)
        return value

    def _error(self, key: int | str, found: Tensor, wanted: Tensor) -> Tensor:
        if found.shape != wanted.shape:  # classes that the plan removes
            return found.new_zeros(())
        both = wanted.isfinite() & found.isfinite()
        if key not in self.spreads:  # of the first batch, then the same for all
            self.spreads[key] = distributed.variance(wanted[both].float()).clamp_min(_LEAST)
        difference = found.where(both, 0.0) - wanted.where(both, 0.0)
        return difference.float().square().mean() / self.spreads[key]


def float_results(results: Any) -> list[Tensor]:
    """The floating-point tensors in a network's results, in order."""
    leaves = pytree.tree_leaves(results)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _layers_of(net: fx.GraphModule, names: Sequence[str]) -> dict[str, nn.Module]:
    """By value the module that alone computes it, and nothing else."""
    nodes = value_nodes(net)
    calls = [node.target for node in net.graph.nodes if node.op == "call_module"]
    return {
        name: net.get_submodule(str(node.target))
        for name in names
        if (node := nodes.get(name)) is not None
        and node.op == "call_module"
        and calls.count(node.target) == 1
    }


def _noting(results: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, _arguments: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            results[name] = result

    return note


class TunePenalty(NoPenalty):
    """The penalty of a phase that tunes a resized network: it shrinks nothing.

    Args:
        distillation: what is added to the loss, if anything is.
        before: gives a new optimizer the state of the one before the resize, if there was one.
    """

    def __init__(
        self,
        distillation: Distillation | None = None,
        before: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self.distillation = distillation
        self.before = before

    def loss(self) -> Any:
        """How far the network is from its original, weighted; nothing without distillation."""
        return 0.0 if self.distillation is None else self.distillation.loss()

    def carry(self, optimizer: Optimizer) -> None:
        """Give an optimizer of the network the state that the one before the resize had."""
        if self.before is not None:
            self.before(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The scale of the distillation, which the first batch has set."""
        return {} if self.distillation is None else {"spreads": self.distillation.spreads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        if self.distillation is not None:
            self.distillation.spreads = dict(state["spreads"])

    def release(self) -> None:
        """Take the teacher away."""
        if self.distillation is not None:
            self.distillation.remove()

    def end(self) -> None:
        """Take the teacher away; warn where nobody has asked it."""
        self.release()
        if self.distillation is None:
            return
        if not self.distillation.asked:
            warn(
                "fit never added penalty.loss() to its loss, so that nothing was learned from the "
                "original; add it, or leave distillation out (distill=0)"
            )


class LadderPenalty(ShrinkPenalty):
    """The penalty of a phase that shrinks a trained network past several targets, one by one.

    At each target the network is noted as it is then: it computes what it will when it is resized.
    What has died by then stays dead, so that every smaller network is a part of the larger ones.

    Args:
        regularizer: of the network that is trained.
        net: that network.
        targets: costs, of the regularizer's own kind and in its units, falling; the phase shrinks
            to the last.
        steps: of the phase, where :meth:`begin` is not called.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        net: nn.Module,
        targets: Sequence[float],
        steps: int | None = None,
    ) -> None:
        super().__init__(regularizer, targets[-1], steps)
        self.net = net
        self.targets = targets
        self.optimizer: Optimizer | None = None
        self.rungs: list[dict[str, Any]] = []
        self._died = torch.full_like(regularizer.strengths().detach(), -1.0)
        self._held: Settled | None = None  # what had died at the last target

    def carry(self, optimizer: Optimizer) -> None:
        """Note the optimizer, whose state the resized networks' ones go on with."""
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Shrink once, after the optimizer's step."""
        interval = self._controller().interval
        due = (self.taken + 1) % interval == 0
        # Before the controller looks at them: the optimizer has moved them.
        if due and self._held is not None and not self.met:
            self._held.hold()
        super().step(lr)
        if not due:
            return
        strengths = self.regularizer.strengths()
        alive = self.regularizer.alive()
        self._died[alive] = self.taken
        live = self.regularizer.live_cost()
        while len(self.rungs) < len(self.targets) - 1 and live <= self.targets[len(self.rungs)]:
            self._note(strengths, alive)

    def end(self) -> None:
        """Note the last network, and those whose target was not reached."""
        super().end()
        strengths = self.regularizer.strengths().detach()
        alive = self.regularizer.alive()
        self._died[alive] = max(self.taken, 1)
        while len(self.rungs) < len(self.targets):
            self._note(strengths, alive)

    @torch.no_grad()
    def _note(self, strengths: Tensor, alive: Tensor) -> None:
        """Keep the network as it is now, which channels live, and how much each is used."""
        # The loss may have pushed a whole group below the threshold.
        alive = alive | self.regularizer.protected(strengths, ~alive)
        self._held = Settled(self.regularizer, ~alive)
        self._held.hold()
        # The living first, by strength; then the dead, those that died last first.
        use = strengths.clamp_min(0) / strengths.max().clamp_min(1e-30)
        before = (self._died + 1) / (max(self.taken, 1) + 2)
        self.rungs.append(
            {
                "weights": {k: v.detach().clone() for k, v in self.net.state_dict().items()},
                "scores": torch.where(alive, 1.0 + use, before),
                "alive": alive.clone(),
                "optimizer": None
                if self.optimizer is None
                else copy.deepcopy(self.optimizer.state_dict()["state"]),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """All that changes during the phase, the network apart."""
        held = self._held
        own = {"rungs": self.rungs, "died": self._died}
        own |= {"dead": held and held.dead, "silent": held and held.silent}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of a phase of the same length; the network is loaded already."""
        super().load_state_dict(state)
        self.rungs, self._died, dead = state["rungs"], state["died"], state["dead"]
        known = state.get("silent")
        self._held = None if dead is None else Settled(self.regularizer, dead, known)

    def optimizer_at(self, rung: int) -> Optimizer | None:
        """The optimizer with the state that it had at a rung; ``None`` where it is not known."""
        state = self.rungs[rung]["optimizer"]
        if self.optimizer is None or state is None:
            return None
        found = copy.copy(self.optimizer)
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        found.state = {p: state[k] for k, p in enumerate(parameters) if k in state}  # type: ignore[assignment]
        return found


def carrying(
    optimizer: Optimizer | None, graph: ChannelGraph, plan: Plan, net: nn.Module, new: nn.Module
) -> Callable[[Optimizer], None] | None:
    """What gives an optimizer of a resized network the state of the one before."""
    if optimizer is None:
        return None
    known = optimizer

    def carry(owner: Optimizer) -> None:
        transfer_optimizer_state(known, owner, graph, plan, net=net, new_net=new)

    return carry
