"""Kernels that a module computes: their strength, and the parameters by which they shrink."""

import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from morphgraph.errors import BudgetError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.passes.lift import lift
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.train.controller import Budget
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.settled import Settled

WIDTH, WEAK = 6, [1, 4]
RANK = [
    "layers.low_rank.b"
]  # the inner width of a product of two parameters, which no kernel makes


class Computed(nn.Conv2d):
    """A convolution whose kernel is ``compute`` of its parameters."""

    a: Tensor
    b: Tensor
    s: Tensor

    def __init__(self, compute: Callable[["Computed"], Tensor], **parameters: Tensor) -> None:
        super().__init__(WIDTH, WIDTH, 3, padding=1)
        self.compute = compute
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self), self.bias, padding=1)


def standardized(conv: Computed) -> Tensor:
    w = conv.weight
    centred = w - w.mean((1, 2, 3), keepdim=True)
    return centred / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def low_rank(conv: Computed) -> Tensor:
    return conv.weight + (conv.b @ conv.a).view_as(conv.weight) * 2.0


def faked(conv: Computed) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(conv.weight, 0.01, 0, -128, 127)


def directed(conv: Computed) -> Tensor:
    norms = conv.weight.flatten(1).norm(dim=1)
    return conv.weight * (conv.s / norms).view(-1, 1, 1, 1)


# Per layer the parameters that shrink.
ACTING = {
    "normed": {"parametrizations.weight.original0"},
    "masked": {"weight_orig"},
    "halved": {"weight"},
    "scaled": {"s"},
    "gated": {"weight"},
    "low_rank": {"weight", "b"},
    "spectral": {"parametrizations.weight.original"},
    "faked": {"weight"},
    "rectified": {"weight"},
    "gained": {"s"},
    "by_vector": {"s"},
    "directed": {"s"},
}


class Network(nn.Module):
    """A layer of each kind after the other, a ReLU behind each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        column = torch.rand(WIDTH, 1, 1, 1) + 0.5
        weights = {"a": torch.randn(2, 9 * WIDTH) * 0.1, "b": torch.zeros(WIDTH, 2)}
        layers: dict[str, nn.Conv2d] = {
            "normed": nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            "masked": nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            "halved": Computed(lambda conv: conv.weight * 0.5),
            "scaled": Computed(lambda conv: conv.weight * conv.s, s=column.clone()),
            "gated": Computed(lambda conv: conv.weight * conv.s.sigmoid(), s=column.clone()),
            "low_rank": Computed(low_rank, **weights),
            "spectral": nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            "faked": Computed(faked),
            "rectified": Computed(lambda conv: conv.weight.relu() - conv.weight.relu().neg()),
            "gained": Computed(lambda conv: standardized(conv) * conv.s, s=column.clone()),
            "by_vector": Computed(
                lambda conv: conv.weight * conv.s[:, None, None, None], s=column.flatten()
            ),
            "directed": Computed(directed, s=column.flatten()),
        }
        for name, layer in layers.items():
            with torch.no_grad():
                layer.weight[WEAK] *= 0.01
                if isinstance(layer, Computed) and name in ("gained", "by_vector", "directed"):
                    layer.s[WEAK] *= 0.01
        parametrizations.weight_norm(layers["normed"])
        parametrizations.spectral_norm(layers["spectral"])
        prune.random_unstructured(layers["masked"], "weight", amount=0.3)
        self.layers = nn.ModuleDict(layers)
        self.head = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out

    def norms(self, name: str) -> Tensor:
        """The norms of a layer's kernel, as PyTorch computes it."""
        layer = self.layers[name]
        assert isinstance(layer, nn.Conv2d)
        if name == "masked":  # its kernel is computed anew when the layer is called
            layer(torch.zeros(1, WIDTH, 3, 3))
        kernel = layer.compute(layer) if isinstance(layer, Computed) else layer.weight
        return kernel.flatten(1).norm(dim=1)


@cache
def lifted() -> ChannelGraph:
    return lift(export(Network().eval(), (torch.zeros(1, WIDTH, 4, 4),)))


def channels(graph: ChannelGraph, name: str) -> np.ndarray:
    return graph.channels_at(f"layers.{name}.bias", 0)


@pytest.fixture
def measured() -> tuple[Network, Regularizer]:
    net = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        return net, Regularizer(lifted(), net, exclude=RANK)


def test_strengths_are_those_of_the_kernels(measured: tuple[Network, Regularizer]) -> None:
    net, regularizer = measured
    strengths = regularizer.strengths().detach()
    for name in ACTING:
        norms = net.norms(name).detach()
        found = strengths[channels(lifted(), name)]
        assert found.numpy() == pytest.approx((norms / norms.mean()).numpy(), rel=1e-4), name


def test_gradients_and_steps_act_on_what_scales_a_channel(
    measured: tuple[Network, Regularizer],
) -> None:
    net, regularizer = measured
    regularizer().backward()
    with_gradient = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    before = {name: net.norms(name).detach() for name in ACTING}
    old = {name: p.detach().clone() for name, p in net.named_parameters()}
    regularizer.weight = 0.3
    regularizer.proximal_step(5.0)  # far enough for the steps of a quantization
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, old[name])}
    for name, acting in ACTING.items():
        wanted = {f"layers.{name}.{leaf}" for leaf in acting}
        wanted.discard("layers.low_rank.b")  # zero at first
        assert {n for n in changed if n.startswith(f"layers.{name}.")} == wanted, name
        assert wanted <= with_gradient, name
        now = net.norms(name).detach()
        if name != "spectral":  # whose largest singular value, the divisor, falls as well
            assert bool((now <= before[name] * 1.0001).all()), name
        assert float(now[[0, 2, 3, 5]].sum()) < 0.999 * float(before[name][[0, 2, 3, 5]].sum())


def test_dead_channels_are_zero_in_the_kernel(measured: tuple[Network, Regularizer]) -> None:
    net, regularizer = measured
    dead = torch.zeros(len(lifted().channel_group), dtype=torch.bool)
    for name in ACTING:
        dead[channels(lifted(), name)[WEAK]] = True
    Settled(regularizer, dead).hold()
    for name in ACTING:
        norms = net.norms(name).detach()
        assert norms[WEAK].tolist() == [0.0, 0.0], name
        assert bool((norms[[0, 2, 3, 5]] > 0).all())


def test_a_budget_is_met_and_the_weak_go(measured: tuple[Network, Regularizer]) -> None:
    _, regularizer = measured
    graph = lifted()
    budget = Budget(regularizer, {"flops": "60%"}, steps=40)
    for _ in range(40):
        budget.step(lr=0.1)
    assert budget.met
    keep = regularizer.plan().keep_channels(graph)
    for name in ACTING:
        group = int(graph.channel_group[channels(graph, name)[0]])
        lost = np.setdiff1d(np.arange(WIDTH), keep.get(group, np.arange(WIDTH)))
        assert len(lost) <= 2 or set(WEAK) <= set(lost.tolist()), name


def test_the_network_that_to_torch_makes_is_measured_alike(
    measured: tuple[Network, Regularizer],
) -> None:
    graph = lifted()
    found = Regularizer(graph, to_torch(graph.model), exclude=RANK).strengths()
    assert torch.allclose(found, measured[1].strengths(), rtol=1e-4)


def of(layer: nn.Module, *behind: nn.Module) -> tuple[nn.Module, ChannelGraph]:
    net = nn.Sequential(layer, *behind, nn.ReLU(), nn.Conv2d(WIDTH, 2, 1)).eval()
    return net, lift(export(net, (torch.zeros(1, WIDTH, 4, 4),)))


def test_what_nothing_scales_is_named_with_the_reason() -> None:
    net, graph = of(Computed(standardized))
    with pytest.warns(
        MorphWarning, match="left alone, since nothing measures or trains them: g1 '0' .kernel"
    ):
        regularizer = Regularizer(graph, net)
    with pytest.raises(BudgetError, match=r"narrowest network needs 100.0%.*no trained parameter"):
        Budget(regularizer, {"flops": "50%"}, steps=10)


def test_a_norm_behind_a_standardized_kernel_measures_it() -> None:
    net, graph = of(Computed(standardized), nn.BatchNorm2d(WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        regularizer = Regularizer(graph, net)
    assert [source.parameter is net[1].weight for source in regularizer.scales] == [True]  # type: ignore[index]
    Budget(regularizer, {"flops": "50%"}, steps=10)
