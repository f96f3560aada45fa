"""The first of some data as a network's arguments."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from morphgraph.errors import ArgumentError


def first_example(net: nn.Module, data: Any) -> Any:
    """Arguments with which a network is exported: the first sample or batch of calibration data.

    Of a tuple as many as the network needs: labels behind them are left out. A dataset hands out
    single samples, and networks take batches.

    Raises:
        ArgumentError: data can be read once only, or are a file; export the network first.

    >>> example = first_example(nn.Linear(3, 2), np.zeros((10, 3), np.float32))
    >>> [tuple(each.shape) for each in example]
    [(1, 3)]
    """
    if isinstance(data, np.ndarray | torch.Tensor):
        return (_tensor(data[:1]),)
    if isinstance(data, Mapping):
        return {name: _tensor(array[:1]) for name, array in data.items()}
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return pytree.tree_map(lambda tensor: tensor[None], _of_item(net, data[0]))
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__") or iter(data) is data:
        raise ArgumentError(
            "a module is exported with the first of the data, which must be arrays or a loader "
            "that can be passed over again; else export it first: mg.export(net, example)"
        )
    return _of_item(net, next(iter(data)))


def _of_item(net: nn.Module, item: Any) -> Any:
    """What a loader or dataset hands out as arguments."""
    if isinstance(item, Mapping):
        return {name: _tensor(array) for name, array in item.items()}
    if isinstance(item, tuple | list):
        return tuple(_tensor(each) for each in item[: _needed(net)])
    return (_tensor(item),)


def _needed(net: nn.Module) -> int:
    """How many positional arguments a network's forward cannot do without."""
    parameters = inspect.signature(net.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(sum(p.kind in plain and p.default is p.empty for p in parameters), 1)


def _tensor(array: Any) -> torch.Tensor:
    tensor = torch.as_tensor(array)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
