"""Images as they are stored, in uint8: their channels, their size, their statistics."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from morphgraph.arrays import IntArray
from morphgraph.errors import DataError

Images = np.ndarray[Any, np.dtype[np.uint8]]  # [N, height, width, channels]
Labels = IntArray  # [N]
Size = tuple[int, int]  # height, width

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RESIZE_CHUNK = 1024  # images; bounds the memory of a resize


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Gray images for a network with three channels, colour images as gray for one with one.

    Raises:
        DataError: there is no such way to get this number of channels.
    """
    present = images.shape[3]
    if present == channels:
        return images
    if present == 1:
        return images.expand(-1, -1, -1, channels)
    if present == 3 and channels == 1:
        luma = (images.float() * torch.tensor(_LUMA)).sum(3, keepdim=True)
        return luma.round().to(torch.uint8)
    raise DataError(
        f"the images have {present} channels, the network takes {channels}; convert the images"
    )


def resized(images: Tensor, size: Size) -> Tensor:
    """Images of another height and width: bilinear, antialiased."""
    if images.shape[1:3] == size:
        return images
    result = torch.empty((len(images), *size, images.shape[3]), dtype=torch.uint8)
    for start in range(0, len(images), _RESIZE_CHUNK):
        chunk = images[start : start + _RESIZE_CHUNK].permute(0, 3, 1, 2).float()
        chunk = F.interpolate(chunk, size, mode="bilinear", antialias=True)
        result[start : start + _RESIZE_CHUNK] = chunk.round().permute(0, 2, 3, 1)
    return result


def mean_and_std(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel on a scale of 0..1; a channel without contrast gets one step of it as deviation.

    >>> mean, std = mean_and_std(np.array([0, 255], dtype=np.uint8).reshape(1, 2, 1, 1))
    >>> mean, std
    ((0.5,), (0.5,))
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        # From counts of the 256 levels: no copy of the images in floats is made.
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = float(np.average(levels, weights=counts))
        variance = float(np.average((levels - mean) ** 2, weights=counts))
        means.append(mean)
        deviations.append(max(variance**0.5, 1 / 255))
    return tuple(means), tuple(deviations)
