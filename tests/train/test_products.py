"""Products behind a norm with a shift: scale and shift close a channel together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from morphgraph.options import Strength, Tied
from morphgraph.train.settled import Settled


class SqueezeExcite(nn.Module):
    """``h * gate(h)``, the gate from the means of all channels."""

    def __init__(self, width: int, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.inner, self.outer = inner, outer

    def forward(self, h: Tensor) -> Tensor:
        squeezed = self.inner(self.less(h.mean((2, 3), keepdim=True)))
        return h * self.outer(self.more(squeezed))


def inverted_residual(act: Callable[[], nn.Module], outer: nn.Module) -> nn.Module:
    """As in MobileNetV3 and EfficientNet."""
    return nn.Sequential(
        nn.Conv2d(2, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        act(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        act(),
        SqueezeExcite(16, nn.ReLU(), outer),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class RegNetY(nn.Module):
    """A residual sum around a squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.se = SqueezeExcite(16, nn.ReLU(), nn.Sigmoid())
        self.c = nn.Sequential(nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.c(self.se(self.b(self.a(x)))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class GatedUnit(nn.Module):
    """A gated linear unit with a norm on one arm."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.value, self.gate = nn.Linear(162, 16), nn.Linear(162, 16)
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        y: Tensor = self.out(self.value(x) * F.silu(self.norm(self.gate(x))))
        return y


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    # with the norms whose scales and shifts close products
    "MobileNetV3": (lambda: inverted_residual(nn.Hardswish, nn.Hardsigmoid()), ["4"]),
    "EfficientNet": (lambda: inverted_residual(nn.SiLU, nn.Sigmoid()), ["4"]),
    "RegNetY": (RegNetY, ["b.1"]),
    "a gated unit": (GatedUnit, ["norm"]),
}
EXAMPLE = torch.rand(2, 2, 9, 9, generator=torch.Generator().manual_seed(1))


def made(name: str, **options: Any) -> tuple[nn.Module, mg.ChannelGraph, mg.Regularizer]:
    """With shifts away from zero, as training leaves them."""
    torch.manual_seed(0)
    net = NETS[name][0]()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.bias.uniform_(-0.3, 0.3)
    graph = mg.lift(mg.export(net.eval(), (EXAMPLE,)))
    return net, graph, mg.Regularizer(graph, net, exclude=squeezed(graph), **options)


def squeezed(graph: mg.ChannelGraph) -> list[str]:
    """What a gate squeezes to has no norm."""
    return [group.id for group in graph.groups if group.name.endswith("less")]


def train(net: nn.Module, reg: mg.Regularizer, steps: int) -> bool:
    noise = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 2, 9, 9, generator=noise)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    budget = mg.Budget(reg, {"flops": "50%"}, steps)
    net.train()
    for _ in range(steps):
        labels = torch.randint(0, 3, (8,), generator=noise)
        images = patterns[labels] + torch.randn(8, 2, 9, 9, generator=noise)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step(lr=0.05 / (1 - 0.9))
    net.eval()
    return budget.met


@pytest.mark.parametrize(
    ("name", "strength", "tied"),
    [
        ("MobileNetV3", "bn", "max"),
        ("EfficientNet", "auto", "l2"),
        ("RegNetY", "bn", "max"),
        ("a gated unit", "auto", "max"),
    ],
)
def test_training_closes_scale_and_shift(name: str, strength: Strength, tied: Tied) -> None:
    net, graph, reg = made(name, strength=strength, tied=tied)
    assert not reg.kernels
    assert train(net, reg, 100)
    assert reg.live_share() <= 0.5
    for norm in NETS[name][1]:
        scale, shift = (net.get_parameter(f"{norm}.{p}").detach() for p in ("weight", "bias"))
        dead = ~reg.alive()[torch.from_numpy(graph.channels_at(f"{norm}.weight", 0))]
        assert 0 < dead.sum() < len(dead)
        assert not scale[dead].any()
        assert not shift[dead].any()
        assert scale[~dead].all()
        assert shift[~dead].abs().max() > 0.01
    # What is removed was zero, or a constant behind a norm outside of products: the resized model
    # computes what the module does in PyTorch.
    small = mg.apply(graph, reg.plan(), weights=net, absorb=True)
    assert mg.cost(mg.lift(small), "flops").total <= 0.5 * reg.initial_cost
    (name_of_input,) = (value.name or "" for value in small.graph.inputs)
    (result,) = run(small, {name_of_input: EXAMPLE.numpy()}).values()
    np.testing.assert_allclose(result, net(EXAMPLE).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_strength_is_that_of_the_pair() -> None:
    net, graph, reg = made("RegNetY")
    scale, shift = (net.get_parameter(f"b.1.{p}") for p in ("weight", "bias"))
    with torch.no_grad():
        scale.copy_(torch.linspace(-1, 1, 16))
        shift.copy_(torch.linspace(0.5, -2, 16))
    index = torch.from_numpy(graph.channels_at("b.1.weight", 0))
    pair = torch.stack([scale, shift]).detach().abs()
    assert torch.equal(reg.strengths()[index].detach(), pair.amax(0))
    reg.value().backward()
    assert scale.grad is not None
    assert shift.grad is not None
    assert torch.equal(scale.grad != 0, pair[0] > pair[1])  # the slope of the larger of both
    assert torch.equal(shift.grad != 0, pair[1] > pair[0])
    before, dead = net.state_dict(), torch.zeros_like(reg.alive())
    before = {name: tensor.clone() for name, tensor in before.items()}
    dead[index[:3]] = True
    Settled(reg, dead).hold()
    assert not scale[:3].any()
    assert not shift[:3].any()
    net.load_state_dict(before)
    root = mg.Regularizer(graph, net, exclude=squeezed(graph), tied="l2")
    torch.testing.assert_close(root.strengths()[index].detach(), pair.norm(dim=0))


def test_a_norm_outside_of_products_has_no_shift_in_its_strength() -> None:
    net, graph, reg = made("RegNetY")
    index = torch.from_numpy(graph.channels_at("a.1.weight", 0))
    with torch.no_grad():
        net.get_parameter("a.1.bias").fill_(5.0)
    assert torch.equal(reg.strengths()[index].detach(), net.get_parameter("a.1.weight").detach())


@pytest.mark.parametrize("zero", [True, False])
def test_a_shift_that_is_frozen(zero: bool) -> None:
    """At zero it is in nobody's way; elsewhere no step can close the channel."""
    torch.manual_seed(0)
    net = GatedUnit()
    net.norm.bias.requires_grad_(False).fill_(0.0 if zero else 0.3)
    graph = mg.lift(mg.export(net.eval(), (EXAMPLE,)))
    if not zero:
        with pytest.warns(mg.MorphWarning, match=r"norm.bias is frozen"):
            reg = mg.Regularizer(graph, net)
        assert not reg.scales
        return
    reg = mg.Regularizer(graph, net)
    reg.weight = 1e6
    reg.proximal_step(1.0)
    assert int((net.norm.weight == 0).sum()) == 15  # all but one
    small = mg.apply(graph, reg.plan(), weights=net)
    (name,) = (value.name or "" for value in small.graph.inputs)
    (result,) = run(small, {name: EXAMPLE.numpy()}).values()
    np.testing.assert_allclose(result, net(EXAMPLE).detach().numpy(), rtol=1e-4, atol=1e-5)
