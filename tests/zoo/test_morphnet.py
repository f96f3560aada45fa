"""Whole networks in MorphNet's convention against the original's printed numbers."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.testing.examples import image, residual_cnn

pytestmark = pytest.mark.filterwarnings("ignore")


def graph_of(name: str) -> ChannelGraph:
    net = torchvision.models.get_model(name, weights=None)
    return mg.lift(mg.export(net.eval(), (torch.zeros(1, 3, 224, 224),)))


def half_widths(graph: ChannelGraph) -> np.ndarray:
    """In every BatchNorm the first n//2 scales are 1, the rest 0; who has none stays alive."""
    widths = graph.widths.copy()
    for group in graph.groups:
        if group.resizable:
            widths[group.index] = group.width // 2
    return widths


def penalty_with_all_scales_at_one(graph: ChannelGraph, kind: str) -> float:
    """The regularizer: marginal costs times summed strengths, 1 per resizable channel."""
    function = mg.cost(graph, kind, convention="morphnet")
    strengths = [group.width if group.resizable else 0 for group in graph.groups]
    return float(function.marginals(graph.widths) @ np.array(strengths, dtype=np.float64))


@pytest.fixture(scope="module")
def resnet18() -> ChannelGraph:
    return graph_of("resnet18")


def test_resnet18(resnet18: ChannelGraph) -> None:
    flops = mg.cost(resnet18, "flops", convention="morphnet")
    size = mg.cost(resnet18, "params", convention="morphnet")
    assert (flops.total, size.total) == (3_628_146_688, 11_678_912)
    halved = half_widths(resnet18)
    assert (flops.at(halved), size.at(halved)) == (966_299_648, 3_050_080)


def test_resnet18_regularizer_is_twice_the_cost_without_the_ends(resnet18: ChannelGraph) -> None:
    for kind in ("flops", "params"):
        function = mg.cost(resnet18, kind, convention="morphnet")
        ends = function.by_layer["conv1"] + function.by_layer["fc"]
        assert penalty_with_all_scales_at_one(resnet18, kind) == 2 * function.total - ends


@pytest.mark.long
def test_mobilenet_v2() -> None:
    graph = graph_of("mobilenet_v2")
    assert mg.cost(graph, "flops", convention="morphnet").total == 601_548_544
    assert mg.cost(graph, "params", convention="morphnet").total == 3_469_760
    assert mg.cost(graph, "params").total == 3_504_872


class Attention(nn.Module):
    """Layers of every kind that costs, attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.attention = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.grouped(torch.relu(self.stem(x)))))
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_half_of_what_torch_counts(batch: int) -> None:
    net, example = Attention().eval(), torch.zeros(batch, 3, 16, 16)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            net(example)
        graph = mg.lift(mg.export(net, (example,)))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert mg.cost(graph, "macs").total == counter.get_total_flops() / 2 / batch


def test_example_network_counts_as_torch_does() -> None:
    net, example = residual_cnn().eval(), image()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(example)
    graph = mg.lift(mg.export(net, (example,)))
    assert mg.cost(graph, "flops").total == counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert mg.cost(graph, "params").total == parameters


# Slow to export; `make zoo-small` runs them (python -m pytest -m slow tests/zoo does, too).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flops", "size", "half_flops", "half_size", "groups", "residual"),
    [
        (
            *("resnet50", 8_178_368_512, 25_502_912, 2_104_623_104, 6_890_080),
            *(37, [4, 5, 7, 4]),
        ),
        (
            *("resnet101", 15_602_810_880, 44_442_816, 3_960_733_696, 11_625_056),
            *(71, [4, 5, 24, 4]),
        ),
    ],
)
def test_deep_residual_networks(
    name: str,
    flops: int,
    size: int,
    half_flops: int,
    half_size: int,
    groups: int,
    residual: list[int],
) -> None:
    graph = graph_of(name)
    free = [group for group in graph.groups if group.resizable]
    assert len(free) == groups
    assert [len(group.producers) for group in free if len(group.producers) > 1] == residual
    halved = half_widths(graph)
    for kind, whole, half in (("flops", flops, half_flops), ("params", size, half_size)):
        function = mg.cost(graph, kind, convention="morphnet")
        assert (function.total, function.at(halved)) == (whole, half)
        ends = function.by_layer["conv1"] + function.by_layer["fc"]
        assert penalty_with_all_scales_at_one(graph, kind) == 2 * whole - ends


@pytest.mark.slow
def test_vgg16_bn() -> None:
    graph = graph_of("vgg16_bn")
    assert mg.cost(graph, "flops", convention="morphnet").total == 30_940_528_640
    assert mg.cost(graph, "params", convention="morphnet").total == 138_344_128
