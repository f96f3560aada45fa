"""Weights under which a wrong size shows, lent to a network while it is checked.

A network that was built and not trained may hardly depend on its layers: attention is uniform under
small weights, layer scales are 1e-6, last layers zero. A wrong number of heads would go unnoticed.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from morphgraph.torch_io.module_state import replace_data


def lend_lively_weights(net: nn.Module, seed: int) -> None:
    """Give parameters and running statistics random numbers, in new memory.

    Kernels are normal with a variance of one over their inputs, so that results stay of order 1;
    embeddings and tokens have a variance of one, scales lie around 1, biases around 0. What is
    frozen stays: it may be a fixed function.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for tensor in dict.fromkeys(p for p in net.parameters() if p.requires_grad):
        if tensor.is_floating_point() and tensor.numel():
            numbers = _drawn(tensor.detach(), id(tensor) in tables, generator)
            replace_data(tensor, numbers.to(tensor.device, tensor.dtype))
    for mean, var in _statistics(net):
        mean.data = torch.rand(mean.shape, generator=generator).sub(0.5).to(mean)
        var.data = torch.rand(var.shape, generator=generator).add(0.5).to(var)


def _drawn(old: torch.Tensor, is_table: bool, generator: torch.Generator) -> torch.Tensor:
    long_axes = [size for size in old.shape if size > 1]
    if len(long_axes) > 1:
        fan_in = 1 if is_table or old.shape[0] == 1 else old.numel() // old.shape[0]
        return torch.randn(old.shape, generator=generator).div(math.sqrt(fan_in))
    numbers = torch.rand(old.shape, generator=generator)
    # Biases are near zero on the whole, scales are not and must not vanish.
    centred = abs(float(old.float().mean())) < float(old.float().std(correction=0))
    return numbers - 0.5 if centred or not old.any() else numbers + 0.5


def _statistics(net: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for module in net.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            yield mean, var
