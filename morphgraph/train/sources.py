"""Axes of parameters whose slices are strengths: a module's scales and kernels, by channels."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import Flags
from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.passes.analysis.channel_sources import Source

_ROWS = 64  # of a matrix, that fit into a cache


class BoundSource:
    """A parameter's axis with the channels that the regularizer acts on.

    ``positions`` are places on the axis, ``index`` their channels; a channel may have several, as a
    recurrent unit has one in every gate. ``channels`` are those channels once each, ``slot`` the
    place of every position's channel among them, ``count`` how many numbers each has. A parameter
    that several processes share (a ``DTensor``) counts as a whole, and each changes its own part.
    """

    def __init__(
        self, name: str, parameter: Tensor, axis: int, positions: Tensor, index: Tensor
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.shape = parameter.shape  # what stands there may get another one in place
        self.axis = axis
        self.positions = positions
        self.index = index
        self.channels, self.slot = torch.unique(index, return_inverse=True)
        size = parameter.shape[axis]
        numbers = parameter.numel() // size
        self.count = numbers * torch.bincount(self.slot, minlength=len(self.channels))
        # All positions in their order, each its own channel: nothing has to be picked or summed.
        # Nor stored: sources of one size share their positions.
        self._is_whole = torch.equal(positions, _counting(size, positions.device))
        self._one_each = torch.equal(self.slot, _counting(len(index), index.device))
        if self._is_whole:
            self.positions = _counting(size, positions.device)
        if self._one_each:
            self.channels, self.slot = index, _counting(len(index), index.device)
            self.count = self.count[:1].clone().expand(len(index))

    @property
    def numbers(self) -> Tensor:
        """What is measured: the parameter."""
        return self.parameter

    @property
    def rows(self) -> Tensor:
        """The same with the axis in front, a view, ``[positions on the axis, ...]``."""
        return self.numbers.movedim(self.axis, 0)

    @property
    def frozen(self) -> bool:
        """Whether nobody trains the parameter: then it is never changed."""
        return isinstance(self.parameter, nn.Parameter) and not self.parameter.requires_grad

    def picked(self, numbers: Tensor) -> Tensor:
        """Of a number for every place on the axis those of the positions."""
        return numbers if self._is_whole else numbers[self.positions]

    def multiply(self, factors: Tensor) -> None:
        """Multiply the numbers of every position in place, ``factors`` one for each."""
        if self.frozen:
            return
        if not self._is_whole:
            every = torch.ones(
                self.parameter.shape[self.axis], dtype=factors.dtype, device=factors.device
            )
            factors = every.index_copy(0, self.positions, factors)
        self.parameter.mul_(_placed_as(self.parameter, self._along(factors)))

    def values(self) -> Tensor:
        """A scale's numbers at the positions, ``[positions]``."""
        return self.picked(whole(self.parameter).reshape(-1))

    def gradient(self) -> Tensor | None:
        """The same of a scale's gradient, if it has one."""
        found = self.parameter.grad
        return None if found is None else self.picked(whole(found).reshape(-1))

    def set(self, values: Tensor) -> None:
        """Give a scale other numbers at the positions."""
        values = values.to(self.parameter.dtype)
        if not self._is_whole:
            now = whole(self.parameter).reshape(-1)
            values = now.index_copy(0, self.positions, values)
        shaped = values.reshape(self.parameter.shape)
        self.parameter.copy_(_placed_as(self.parameter, shaped))

    def per_channel(self, values: Tensor) -> Tensor:
        """Sums over the positions of every channel."""
        if self._one_each:
            return values
        total = torch.zeros(len(self.channels), dtype=values.dtype, device=values.device)
        return total.index_add(0, self.slot, values)

    def norms(self) -> Tensor:
        """The root of the sum of squares of every channel's numbers, one for each channel."""
        numbers = self.numbers
        others = [k for k in range(numbers.dim()) if k != self.axis]
        # Sums in single precision: squares of halves are soon too small.
        halves = numbers.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if halves else numbers.dtype
        if not others:
            by_place = whole(numbers).abs()
        elif others == [0] and not is_shared(numbers):
            by_place = _norms_of_columns(numbers, dtype)
        else:
            by_place = whole(torch.linalg.vector_norm(numbers, dim=others, dtype=dtype))
        by_position = self.picked(by_place)
        if self._one_each:
            return by_position
        return root(self.per_channel(by_position.square()))

    def magnitudes(self) -> Tensor:
        """The sum of magnitudes of every channel's numbers, one for each channel."""
        others = [k for k in range(self.numbers.dim()) if k != self.axis]
        magnitudes = self.numbers.abs()
        by_place = whole(magnitudes.sum(dim=others) if others else magnitudes)
        return self.per_channel(self.picked(by_place))

    def _along(self, numbers: Tensor) -> Tensor:
        """A number for every place on the axis, to be multiplied with the parameter."""
        shape = [1] * self.parameter.dim()
        shape[self.axis] = -1
        return numbers.to(self.parameter.dtype).reshape(shape)


@lru_cache
def _counting(size: int, device: torch.device) -> Tensor:
    """0, 1, 2 and so on; nobody changes it."""
    return torch.arange(size, device=device)


def is_shared(tensor: Tensor) -> bool:
    """Whether every process has a part of it: a ``DTensor``, as ``fully_shard`` makes them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, whatever part of it this process has; all processes must ask for it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _placed_as(parameter: Tensor, value: Tensor) -> Tensor:
    """What all processes have alike, such that it goes with a parameter that they share."""
    if not is_shared(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


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
    bound: list[BoundSource] = []
    for source, wanted in sources:
        positions = np.flatnonzero(wanted[source.channels])
        if not len(positions):
            continue
        parameter = parameters.get(source.parameter)
        if parameter is None:
            raise ModelError(
                f"parameter '{escape(source.parameter)}' is not in the module; "
                f"{_where(source.parameter, parameters)}"
            )
        if parameter.shape[source.axis] != len(source.channels):
            raise ModelError(
                f"parameter '{escape(source.parameter)}' has shape {tuple(parameter.shape)}, but "
                f"the graph has {len(source.channels)} channels on axis {source.axis}; lift the "
                "model that this module was exported to"
            )
        index = torch.from_numpy(source.channels[positions]).to(device)
        bound.append(
            BoundSource(
                source.parameter,
                parameter,
                source.axis,
                torch.from_numpy(positions).to(device),
                index,
            )
        )
    return bound


def _where(name: str, parameters: Mapping[str, Tensor]) -> str:
    """What to give instead of a module that has no parameter of a name."""
    inside = [each for each in parameters if each.endswith(f".{name}")]
    outside = [each for each in parameters if name.endswith(f".{each}")]
    if inside:
        path = inside[0].removesuffix(f".{name}")
        return f"it has '{escape(inside[0])}': give the part of it at '{escape(path)}'"
    if outside:
        return f"it has '{escape(outside[0])}': give the whole that was exported, not a part"
    return "give the module that was exported, or what to_torch made of the model"


def _norms_of_columns(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows at a time; PyTorch's own norm, column by column, takes 4 to 12 times as long."""
    parts = [rows.to(dtype).square().sum(0) for rows in torch.split(matrix, _ROWS)]
    return root(torch.stack(parts).sum(0))


def scale_strength(source: BoundSource) -> Tensor:
    """The magnitude of every position's scale."""
    return source.values().abs()


def root(squares: Tensor) -> Tensor:
    """The square root of every number; at zero, where its slope has no bound, the slope is 0.

    So the penalty is defined for dead channels, and does not move them.
    """
    dead = squares == 0
    return squares.masked_fill(dead, 1.0).sqrt().masked_fill(dead, 0.0)


def kernel_strength(source: BoundSource, l1_fraction: float) -> Tensor:
    """``(1 - f) sqrt(mean w^2) + f mean |w|`` over the numbers of every channel."""
    strength = source.norms() / source.count.sqrt()
    if l1_fraction:
        magnitude = source.magnitudes() / source.count
        strength = (1 - l1_fraction) * strength + l1_fraction * magnitude
    return strength
