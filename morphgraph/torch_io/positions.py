"""Positions of pooled values, counted as ONNX counts them."""

from collections.abc import Sequence
from math import prod

import torch


def over_the_tensor(
    positions: torch.Tensor, pooled: torch.Tensor, space: Sequence[int], shift: Sequence[int]
) -> torch.Tensor:
    """Positions that ``max_pool`` gives within every plane, counted over a whole tensor.

    Args:
        positions: [batch, channels, *windows], flat within a plane of ``pooled``.
        pooled: [batch, channels, *padded space].
        space: the spatial sizes of the tensor in which is counted, before it was padded.
        shift: how many positions were put before each spatial axis.

    >>> over_the_tensor(torch.tensor([[[0, 3]], [[1, 2]]]), torch.empty(2, 1, 4), [4], [0])
    tensor([[[0, 3]],
    <BLANKLINE>
            [[5, 6]]])
    """
    count, channels = pooled.shape[:2]
    planes = torch.arange(count * channels, device=positions.device)
    flat = planes.reshape(count, channels, *[1] * len(space)) * prod(space)
    rest, step = positions, 1
    for size, whole, before in zip(
        reversed(pooled.shape[2:]), reversed(space), reversed(shift), strict=True
    ):
        flat = flat + (rest % size - before) * step
        rest = rest // size
        step *= whole
    return flat
