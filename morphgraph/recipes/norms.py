"""BatchNorm over the whole batch, where several processes have a part of it each.

PyTorch has one for GPUs, ``SyncBatchNorm``. This is the one for CPUs: mean and variance of the
parts are merged exactly (Chan, Golub, LeVeque 1979), so that only rounding differs from one process
with the same batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn.modules.batchnorm import _BatchNorm

from morphgraph.train import distributed


@contextmanager
def synchronized(net: nn.Module) -> Iterator[None]:
    """Meanwhile every BatchNorm of the network normalizes over the batches of all processes."""
    if distributed.size() == 1:
        yield
        return
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        vars(norm)["forward"] = _whole_forward(norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _whole_forward(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    if norm.running_mean is None or not norm.running_mean.is_cuda:
        return partial(_on_cpu, norm)
    # The twin has the same parameters and buffers.
    twin: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]

    def forward(x: Tensor) -> Tensor:
        normalized: Tensor = twin.train(norm.training)(x)
        return normalized

    return forward


def _on_cpu(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    y, mean, variance, count = _Whole.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        fresh = norm.momentum or 1 / int(norm.num_batches_tracked)
        unbiased = variance * (count / (count - 1).clamp_min(1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), fresh)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), fresh)
    normalized: Tensor = y
    return normalized


class _Whole(torch.autograd.Function):
    """``x [N, C, *S]`` to the normalized x, and mean, variance ``[C]`` and count of the batch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, _others(x), correction=0)
        own_count = mean.new_tensor([x.numel() / channels])
        parts = distributed.gathered(torch.cat([mean, variance * own_count, own_count]))
        counts = parts[:, -1:]  # [processes, 1]
        count = counts.sum()
        means, squares = parts[:, :channels], parts[:, channels:-1]
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        scale = (variance + eps).rsqrt()
        standard = (exact - _along(mean, x)) * _along(scale, x)
        ctx.save_for_backward(standard, weight, scale, count)
        y = standard * _along(weight, x) + _along(bias, x)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        standard, weight, scale, count = ctx.saved_tensors
        by_y = slopes[0]
        slope = by_y.to(standard.dtype)
        by_bias = slope.sum(_others(slope))
        by_weight = (slope * standard).sum(_others(slope))
        both = torch.stack([by_bias, by_weight])
        dist.all_reduce(both)  # mean and variance are of all parts
        shift, tilt = (_along(row / count, slope) for row in both)
        by_x = (slope - shift - standard * tilt) * _along(weight * scale, slope)
        return by_x.to(by_y.dtype), by_weight, by_bias, None


def _others(x: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(row: Tensor, x: Tensor) -> Tensor:
    """A number per channel, to be broadcast against x."""
    return row.reshape(1, -1, *[1] * (x.dim() - 2))
