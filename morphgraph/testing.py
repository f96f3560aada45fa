"""Networks whose weights can be felt, for tests and for proofs on networks that nobody has trained.

A freshly built network has every BatchNorm at (1, 0, 0, 1), biases at zero, layer scales at 1e-6: a
wrong slice can go unnoticed, and outputs may be 1e-14. :func:`make_felt` gives every such tensor
random values and calibrates the rest, so that outputs are of order 1 and depend on the input.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def make_felt(net: "nn.Module", example: "torch.Tensor", seed: int = 0) -> "nn.Module":
    """Randomize and calibrate a network's parameters and statistics in place; returns it.

    Args:
        net: any module; left in eval mode.
        example: one input, ``[N, ...]``; calibration runs on noise of the same shape, 4 samples.
        seed: of all random numbers.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def uniform(like: "torch.Tensor", low: float, high: float) -> "torch.Tensor":
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    norms = _norms(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if parameter.dim() == 1 and leaf == "bias":
                parameter.copy_(uniform(parameter, -0.3, 0.3))
            elif parameter.dim() == 1 or owner in norms or _is_scale(leaf):
                parameter.copy_(uniform(parameter, 0.5, 1.5))
        noise = torch.randn((4, *example.shape[1:]), generator=generator)
        _calibrate_statistics(net, noise)
        for norm in norms.values():
            mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
            if mean is not None and var is not None:
                mean += uniform(mean, -0.2, 0.2) * var.sqrt()
                var *= uniform(var, 0.7, 1.4)
        net.eval()
        _scale_output(net, noise)
    return net


def _norms(net: "nn.Module") -> dict[str, "nn.Module"]:
    return {name: module for name, module in net.named_modules() if "Norm" in type(module).__name__}


def _is_scale(leaf: str) -> bool:
    """Parameters that scale a layer's output: ``gamma``, ``layer_scale``, ..."""
    return leaf.startswith(("gamma", "layer_scale", "scale", "ls"))


def _calibrate_statistics(net: "nn.Module", noise: "torch.Tensor") -> None:
    """Let BatchNorm take its statistics from noise, everything else in eval mode."""
    import torch

    net.eval()
    moving = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in moving]
    for module in moving:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    net(noise)
    for module, momentum in zip(moving, momenta, strict=True):
        module.momentum = momentum
        module.eval()


def _scale_output(net: "nn.Module", noise: "torch.Tensor") -> None:
    """Bring the last weighted layer's outputs to a spread of order 1 over inputs."""
    import torch

    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    found: list[torch.Tensor] = []
    last: list[torch.nn.Linear | torch.nn.Conv2d] = []

    def note(module: torch.nn.Module, _args: object, out: torch.Tensor) -> None:
        assert isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        last[:] = [module]
        found[:] = [out]

    hooks = [layer.register_forward_hook(note) for layer in layers]
    net(noise)
    for hook in hooks:
        hook.remove()
    if last:
        spread = (found[0] - found[0].mean(0)).std()
        last[0].weight /= float(spread) or 1.0
