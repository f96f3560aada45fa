"""Kernels that a module computes from its parameters: weight norm, masks, products with scales.

The strength of a channel is that of the computed kernel. What shrinks it is a parameter, or several
together, whose slices scale the channel: of weight norm the magnitude ``g``, of a product with a
learned scale the scale, behind a mask or a quantization the raw kernel. Which they are is found by
running the computation, with the slices of every other channel halved, and with them at zero: then
those channels must fall, and be zero, and the rest stay as they are. Of standardized kernels
nothing scales a channel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from morphgraph.arrays import Flags
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.check import escape
from morphgraph.ops import parameter_names
from morphgraph.passes.analysis.channel_sources import ComputedKernel, Source
from morphgraph.passes.analysis.evaluate import nodes_by_result
from morphgraph.torch_io.to_torch import to_function
from morphgraph.train.sources import BoundSource, bind, root

_FALLS = 0.05, 0.8  # what is left of a channel's norm when what scales it is halved
_NOISE = 0.1  # of a parameter's spread; what holds by chance alone shows

Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""A kernel from the tensors of a module, by their names."""


class ComputedSource(BoundSource):
    """A computed kernel's axis, with the parameters that scale its channels.

    ``scaling`` are axes of parameters on which the same channels stand. All are multiplied alike.
    """

    def __init__(
        self,
        name: str,
        compute: Compute,
        tensors: Mapping[str, Tensor],
        axis: int,
        positions: Tensor,
        index: Tensor,
        scaling: Sequence[BoundSource],
    ) -> None:
        self.compute = compute
        self.tensors = tensors
        self.scaling = tuple(scaling)
        with torch.no_grad():
            super().__init__(name, compute(tensors), axis, positions, index)

    @property
    def numbers(self) -> Tensor:
        """The kernel as it is now; it has no gradient."""
        with torch.no_grad():
            return self.compute(self.tensors).float()

    def scaling_norms(self) -> Tensor:
        """The norm of all that scales a channel, one number for each of ``channels``."""
        return root(torch.stack([part.norms().float().square() for part in self.scaling]).sum(0))


def _by_row(rows: Tensor) -> Tensor:
    """Every row flat, of a vector each number: ``[rows, numbers]``."""
    return rows.float().reshape(len(rows), -1)


def find_computed(
    graph: ChannelGraph,
    kernels: Iterable[ComputedKernel],
    tensors: Mapping[str, Tensor],
    wanted: Flags,
    device: torch.device,
) -> tuple[list[ComputedSource], dict[int, str]]:
    """Computed kernels with what scales them; per group why it has no such strength.

    Args:
        graph: the lifted network.
        kernels: of the graph.
        tensors: of the module, by name.
        wanted: the channels that are to be measured, ``[channels]``.
        device: where the module is.
    """
    learned = [name for name in parameter_names(graph.model) if name in tensors]
    found: list[ComputedSource] = []
    without: dict[int, str] = {}
    for kernel in kernels:
        positions = np.flatnonzero(wanted[kernel.channels])
        if not len(positions):
            continue
        index = torch.from_numpy(kernel.channels[positions]).to(device)
        places = torch.from_numpy(positions).to(device)
        why = "holds whole numbers, which no step of training changes"
        if not kernel.scales and kernel.zero_point is None:
            stored = _stored_in(graph, kernel.value)
            try:
                compute = _compute(graph, kernel.value, stored & tensors.keys(), device)
            except UnsupportedError as error:
                why = f"is computed, and not in PyTorch: {error}"
            else:
                bare = ComputedSource(
                    kernel.value, compute, tensors, kernel.axis, places, index, ()
                )
                candidates = _candidates(
                    graph, bare, [name for name in learned if name in stored], tensors, device
                )
                scaling = _scaling(bare, candidates)
                if scaling:
                    bare.scaling = tuple(scaling)
                    found.append(bare)
                    continue
                why = "is computed such that no trained parameter scales its channels"
        for group in set(graph.channel_group[kernel.channels[positions]].tolist()):
            without[group] = f"kernel '{escape(kernel.value)}' {why}"
    return found, without


def _stored_in(graph: ChannelGraph, value: str) -> set[str]:
    """Names of the initializers that a value is computed from."""
    makers = nodes_by_result(graph.model)
    pending, seen = [value], {value}
    while pending:
        node = makers.get(pending.pop())
        for operand in () if node is None else node.inputs:
            if operand is not None and operand.name and operand.name not in seen:
                seen.add(operand.name)
                pending.append(operand.name)
    return seen & graph.model.graph.initializers.keys()


def _compute(graph: ChannelGraph, value: str, given: set[str], device: torch.device) -> Compute:
    """The computation of a weight, as a function of the module's tensors."""
    initializers = graph.model.graph.initializers
    names = [n for n in given if (d := initializers[n].dtype) and d.is_floating_point()]
    net = to_function(graph.model, names, value).to(device)

    def compute(tensors: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = net(*(tensors[name] for name in names))
        return result

    return compute


def _candidates(
    graph: ChannelGraph,
    kernel: BoundSource,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> list[BoundSource]:
    """Axes of parameters on which all of a kernel's channels stand, those of scales first."""
    wanted = np.zeros(len(graph.channel_group), dtype=bool)
    wanted[kernel.channels.cpu().numpy()] = True
    sources = [
        (Source(name, axis, graph.channels_at(name, axis)), wanted)
        for name in names
        if name in graph.couplings.first_dim and tensors[name].requires_grad
        for axis in range(len(graph.shapes[name]))
    ]
    complete = [
        s for s in bind(sources, tensors, device) if torch.equal(s.channels, kernel.channels)
    ]
    return sorted(complete, key=lambda source: source.parameter.numel())


@torch.no_grad()
def _scaling(kernel: ComputedSource, candidates: Sequence[BoundSource]) -> Sequence[BoundSource]:
    """The first parameter that scales the kernel's channels, or all together if they do."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(kernel.tensors)
    moved = {}  # not as they happen to be: what is zero at first (LoRA) says nothing
    for source in candidates:
        p = source.parameter
        spread = p.float().std(correction=0) if p.numel() > 1 else p.float().abs().mean()
        noise = torch.randn(p.shape, generator=generator).to(p.device)
        moved[id(p)] = (p + _NOISE * torch.where(spread > 0, spread, 1.0) * noise).to(p.dtype)
    names = {name: id(t) for name, t in tensors.items() if id(t) in moved}

    def norms(factor: float, of: Sequence[BoundSource]) -> Tensor:
        scaled = {key: tensor.clone() for key, tensor in moved.items()}
        for source in of:
            every_other = source.slot % 2 == 0
            rows = scaled[id(source.parameter)].movedim(source.axis, 0)
            rows[source.positions[every_other]] *= factor
        now = kernel.compute(tensors | {name: scaled[key] for name, key in names.items()})
        rows = _by_row(now.movedim(kernel.axis, 0))[kernel.positions]
        return kernel.per_channel(rows.square().sum(dim=1)).sqrt()

    before = norms(1.0, ())
    for chosen in chain(((source,) for source in candidates), (candidates,)):
        half, zero = norms(0.5, chosen), norms(0.0, chosen)
        if _scales(before, half, zero):
            return chosen
    return ()


def _scales(before: Tensor, half: Tensor, zero: Tensor) -> bool:
    """Whether every other norm falls where its parameter does, and is zero where that is."""
    if not bool(torch.stack([before, half, zero]).isfinite().all()):
        return False
    falling = before[::2] > 0  # masked channels are zero whatever happens
    left = half[::2][falling] / before[::2][falling]
    staying = before[1::2] > 0
    common = (half[1::2][staying] / before[1::2][staying]).median() if staying.any() else 1.0
    low, high = _FALLS
    shares = left / common
    fall = bool(((low < shares) & (shares < high)).all())
    return bool(falling.any() or staying.any()) and fall and not bool(zero[::2].any())
