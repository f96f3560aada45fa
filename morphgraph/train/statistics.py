"""Running statistics of BatchNorm, measured anew."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from morphgraph.calibration import Samples
from morphgraph.onnx_io import ModelLike, as_model
from morphgraph.torch_io.batch import FREE
from morphgraph.torch_io.to_torch import batch_of, flat_network
from morphgraph.torch_io.weights import with_weights

_TOGETHER = 64  # samples of a run, where the network takes any number
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def refresh_statistics(model: ModelLike, data: Any) -> ir.Model:
    """A copy of a model whose BatchNorm layers have the means and variances of the data.

    A network that was cut, or a slice of shared weights, has others than the network that they were
    measured in. Nothing is trained.

    Args:
        model: an ONNX model or a path, with its BatchNorm layers; it is not changed.
        data: inputs without labels, as :func:`morphgraph.shrink` takes them; some hundreds do.

    Raises:
        ModelError, DataError, FileError: the data do not fit the model, or cannot be read.
        UnsupportedError: an operator has no torch counterpart.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> model = mg.export(residual_cnn((8,)), (image(2),))
    >>> fresh = mg.refresh_statistics(model, [image(32)])
    >>> before, after = (each.graph.initializers["bn.running_mean"] for each in (model, fresh))
    >>> bool((before.const_value.numpy() == after.const_value.numpy()).all())
    False
    """
    source = as_model(model)
    net = flat_network(source)
    norms = [module for module in net.modules() if isinstance(module, _NORMS)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return source.clone()
    samples = data if isinstance(data, Samples) else Samples.of(data, source)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    with torch.no_grad():
        for feed in _joined(samples, batch_of(net) == FREE):
            net(
                *(
                    torch.from_numpy(feed[i.name or ""])
                    for i in source.graph.inputs
                    if i.name in feed
                )
            )
    return with_weights(source, net)


def _joined(samples: Samples, free: bool) -> Iterator[dict[str, Any]]:
    """Runs of several samples where the network takes any number, or else as many as it takes."""
    waiting: list[dict[str, Any]] = []

    def whole() -> dict[str, Any]:
        return {name: np.concatenate([each[name] for each in waiting]) for name in waiting[0]}

    for feed in samples.batches(_TOGETHER):
        if not free or any(np.ndim(array) == 0 for array in feed.values()):
            yield dict(feed)
            continue
        if waiting and _shapes(waiting[0]) != _shapes(feed):
            yield whole()
            waiting.clear()
        waiting.append(dict(feed))
        if sum(len(next(iter(each.values()))) for each in waiting) >= _TOGETHER:
            yield whole()
            waiting.clear()
    if waiting:
        yield whole()


def _shapes(feed: Any) -> list[tuple[int, ...]]:
    return [np.shape(array)[1:] for array in feed.values()]
