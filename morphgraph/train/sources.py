"""Axes of parameters whose slices are strengths: a module's scales and kernels, by channels."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import Flags
from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.passes.analysis.channel_sources import Source


class BoundSource:
    """A parameter's axis with the channels that the regularizer acts on.

    ``positions`` are places on the axis, ``index`` their channels; a channel may have several, as a
    recurrent unit has one in every gate. ``channels`` are those channels once each, ``slot`` the
    place of every position's channel among them, ``count`` how many numbers each has.
    """

    def __init__(self, parameter: Tensor, axis: int, positions: Tensor, index: Tensor) -> None:
        self.parameter = parameter
        self.axis = axis
        self.positions = positions
        self.index = index
        self.channels, self.slot = torch.unique(index, return_inverse=True)
        numbers = parameter.numel() // parameter.shape[axis]
        self.count = numbers * torch.bincount(self.slot, minlength=len(self.channels))

    @property
    def rows(self) -> Tensor:
        """The parameter with the axis in front, a view, ``[positions on the axis, ...]``."""
        return self.parameter.movedim(self.axis, 0)

    @property
    def frozen(self) -> bool:
        """Whether nobody trains the parameter: then it is never changed."""
        return isinstance(self.parameter, nn.Parameter) and not self.parameter.requires_grad

    def multiply(self, factors: Tensor) -> None:
        """Multiply the numbers of every position in place, ``factors`` one for each."""
        if self.frozen:
            return
        rows = self.rows
        rows[self.positions] *= factors.to(rows.dtype).reshape(-1, *[1] * (rows.dim() - 1))

    def per_channel(self, values: Tensor) -> Tensor:
        """Sums over the positions of every channel."""
        total = torch.zeros(len(self.channels), dtype=values.dtype, device=values.device)
        return total.index_add(0, self.slot, values)


def bind(
    sources: Iterable[tuple[Source, Flags]],
    parameters: Mapping[str, Tensor],
    device: torch.device,
) -> list[BoundSource]:
    """Find the parameters of sources by their names.

    Args:
        sources: each with the channels that it is wanted for, a flag per channel.
        parameters: of the module, by name.
        device: where the module is.

    Raises:
        ModelError: a parameter is not there, or has another size.
    """
    bound = []
    for source, wanted in sources:
        positions = np.flatnonzero(wanted[source.channels])
        if not len(positions):
            continue
        parameter = parameters.get(source.parameter)
        if parameter is None:
            raise ModelError(
                f"parameter '{escape(source.parameter)}' is not in the module; give the "
                "module that was exported, or what to_torch made of the model"
            )
        if parameter.shape[source.axis] != len(source.channels):
            raise ModelError(
                f"parameter '{escape(source.parameter)}' has shape {tuple(parameter.shape)}, but "
                f"the graph has {len(source.channels)} channels on axis {source.axis}; lift the "
                "model that this module was exported to"
            )
        index = torch.from_numpy(source.channels[positions]).to(device)
        bound.append(
            BoundSource(parameter, source.axis, torch.from_numpy(positions).to(device), index)
        )
    return bound


def scale_strength(source: BoundSource) -> Tensor:
    """The magnitude of every position's scale."""
    return source.parameter.reshape(-1).abs()[source.positions]


def root(squares: Tensor) -> Tensor:
    """The square root of every number; at zero, where its slope has no bound, the slope is 0.

    So the penalty is defined for dead channels, and does not move them.
    """
    dead = squares == 0
    return squares.masked_fill(dead, 1.0).sqrt().masked_fill(dead, 0.0)


def kernel_strength(source: BoundSource, l1_fraction: float) -> Tensor:
    """``(1 - f) sqrt(mean w^2) + f mean |w|`` over the numbers of every channel."""
    rows = source.rows.flatten(1)[source.positions]
    mean = source.per_channel(rows.square().sum(dim=1)) / source.count
    strength = root(mean)
    if l1_fraction:
        magnitude = source.per_channel(rows.abs().sum(dim=1)) / source.count
        strength = (1 - l1_fraction) * strength + l1_fraction * magnitude
    return strength
