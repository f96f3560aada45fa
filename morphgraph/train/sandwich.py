"""One set of weights for networks of many widths: the sandwich rule with distillation in place.

    loss = task loss of the whole network + weight * (mean over smaller networks of E(output))
    E(v) = |v - v of the whole network|^2 / variance of the whole network's v

In every step the whole network learns from the labels, and the smallest one and some between learn
from what the whole network answers (Yu and Huang, Universally Slimmable Networks, ICCV 2019). The
smaller networks have no weights of their own: theirs are slices of the whole network's, through
which the gradients flow. Statistics of BatchNorm differ from width to width; each has its own.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.plans import Plan
from morphgraph.torch_io.names import recorded_names
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import named_tensors
from morphgraph.train import distributed
from morphgraph.train.phases import NoPenalty
from morphgraph.train.tuning import float_results
from morphgraph.workflow import apply

_LEAST = 1e-12  # of a variance


class Slice(nn.Module):
    """A smaller network whose weights are slices of a larger one's; statistics are its own.

    Args:
        graph: the larger network, lifted.
        plan: which of its channels the smaller one has.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> net = mg.to_torch(graph.model)
    >>> half = Slice(graph, mg.uniform(graph, 0.5))
    >>> half(named_tensors(net), image()).sum().backward()
    >>> net.get_parameter("fc.weight").grad is not None
    True

    Raises:
        UnsupportedError: a weight of the smaller network is no slice of one of the larger.
    """

    def __init__(self, graph: ChannelGraph, plan: Plan) -> None:
        super().__init__()
        selection = AxisSelection(graph, plan.keep_channels(graph))
        self.net = to_torch(apply(graph, plan, verify=False))
        onnx_names = recorded_names(self.net)
        self._sources: dict[str, tuple[str, list[tuple[int, str]]]] = {}
        for number, (path, parameter) in enumerate(self.net.named_parameters()):
            name = onnx_names.get(path, path)
            cuts = selection.cuts(name)
            expected = list(graph.shapes.get(name, ()))
            axes = []
            for axis, kept in cuts:
                expected[axis] = len(kept)
                axes.append((axis, f"kept_{number}_{axis}"))
                self.register_buffer(axes[-1][1], torch.from_numpy(kept), persistent=False)
            if expected != list(parameter.shape):
                raise UnsupportedError(
                    f"weight '{escape(name)}' of a smaller network is no slice of one of the whole "
                    "network, so that they cannot share it; train a family of networks instead"
                )
            self._sources[path] = name, axes

    def weights(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The smaller network's weights by its own names.

        Args:
            shared: the larger network's by their ONNX names; gradients flow to them.
        """
        found = {}
        for path, (name, axes) in self._sources.items():
            value = shared[name]
            for axis, kept in axes:
                value = value.index_select(axis, self.get_buffer(kept))
            found[path] = value
        return found

    def forward(self, shared: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
        """What the smaller network answers, with weights out of ``shared``."""
        return functional_call(self.net, self.weights(shared), arguments, keywords)


class SandwichPenalty(NoPenalty):
    """The penalty of a phase that trains a network and its slices together.

    A hook on the network passes what it is given to the smallest slice and to some others, drawn
    anew for every forward in training; :meth:`loss` is how far they are from the whole network.

    Args:
        net: the whole network, as :func:`morphgraph.to_torch` makes it.
        slices: of it, the smallest last.
        weight: of the loss.
        draws: how many slices beside the smallest answer in every step.
        seed: of the choice.
    """

    def __init__(
        self,
        net: nn.Module,
        slices: Sequence[Slice],
        *,
        weight: float = 1.0,
        draws: int = 2,
        seed: int = 0,
    ) -> None:
        self.slices = nn.ModuleList(slices)
        self.weight, self.draws = weight, draws
        self._random = torch.Generator().manual_seed(seed)
        self._asked = False
        self._loss: Tensor | float = 0.0
        self._hook = net.register_forward_hook(self._answered, with_kwargs=True)

    def loss(self) -> Any:
        """Of the last forward in training, to be added to the loss once; 0 before the first."""
        self._asked = True
        loss, self._loss = self._loss, 0.0
        return loss

    def end(self) -> None:
        """Leave the network as it was; warn where nothing was learned for the slices."""
        self._hook.remove()
        if not self._asked:
            warnings.warn(
                "fit never added penalty.loss() to its loss, so that the smaller networks learned "
                "nothing; add it",
                MorphWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The slices' statistics, and where the draws are."""
        statistics = {name: value.clone() for name, value in self.slices.named_buffers()}
        random = self._random.get_state()
        return {"statistics": statistics, "random": random, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self._random.set_state(state["random"].cpu())
        self._asked = state["asked"]
        for name, value in self.slices.named_buffers():
            value.copy_(state["statistics"][name])

    def drawn(self) -> list[int]:
        """The numbers of the slices of one step, the smallest last."""
        last = len(self.slices) - 1
        order: list[int] = torch.randperm(last, generator=self._random).tolist()
        return [*sorted(order[: self.draws]), last]

    def _answered(
        self, net: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], results: Any
    ) -> None:
        """Let slices answer what the network has just answered."""
        if not net.training or not torch.is_grad_enabled():
            return
        shared = named_tensors(net)
        self.slices.to(next(net.parameters()).device).train()
        wanted = [each.detach() for each in float_results(results)]
        errors = []
        for number in self.drawn():
            found = float_results(self.slices[number](shared, *arguments, **keywords))
            errors += [_error(*pair) for pair in zip(found, wanted, strict=True)]
        self._loss = self.weight * torch.stack(errors).mean()


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """Their squared difference in units of the variance of what is wanted."""
    if found.shape != wanted.shape:  # classes that the plan removes
        return found.new_zeros(())
    both = wanted.isfinite() & found.isfinite()
    spread = distributed.variance(wanted[both].float()).clamp_min(_LEAST)
    difference = found.where(both, 0.0) - wanted.where(both, 0.0)
    return difference.float().square().mean() / spread
