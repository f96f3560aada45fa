"""Whole networks, shrunk and grown: within budget, the same function, trainable from scratch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.testing import randomize_weights

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = torch.zeros(8, 3, 64, 64)
VIT = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32}
LIGHT = ("vit",)
SLOW = (
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "densenet121",
    "googlenet",
    "vgg11_bn",
    "squeezenet1_1",
    "mnasnet0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "convnext_tiny",
    "swin_t",
)
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("resnet18", "mobilenet_v2")]
ALL = [*LIGHT, *LONG, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return torchvision.models.VisionTransformer(**VIT, mlp_dim=64, num_classes=10)
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


@pytest.fixture(scope="module")
def graph_of() -> Callable[[str], ChannelGraph]:
    made: dict[str, ChannelGraph] = {}

    def lifted(name: str) -> ChannelGraph:
        if name not in made:
            net = randomize_weights(built(name), EXAMPLE)
            made[name] = mg.lift(mg.export(net, (EXAMPLE,)))
        return made[name]

    return lifted


@pytest.mark.parametrize("name", ALL)
def test_shrunk_to_half_and_grown_to_the_whole(
    name: str, graph_of: Callable[[str], ChannelGraph]
) -> None:
    graph = graph_of(name)
    flops = mg.cost(graph, "flops")
    small = mg.plan(graph, {"flops": "50%"}, round_to=1)
    wide = mg.expand(graph, small, {"flops": "100%"}, max_growth=4, round_to=1)
    assert (wide.widths(graph) > small.widths(graph)).any()
    before, after = (mg.apply(graph, plan, verify=False) for plan in (small, wide))
    total = mg.cost(mg.lift(after), "flops").total
    assert total == wide.cost["flops"].after <= flops.total
    ceilings = 4 * graph.widths
    feeds = random_inputs(graph.model)
    for output, expected in run(before, feeds).items():
        error = np.abs(run(after, feeds)[output] - expected).max() / np.abs(expected).max()
        assert error < 1e-5
    # No group that grew has room for a channel more.
    for group in graph.groups:
        width = wide.widths(graph)[group.index]
        more = wide.widths(graph)
        more[group.index] += 1
        grew = width > small.widths(graph)[group.index]
        assert not grew or width == ceilings[group.index] or flops.at(more) > flops.total


@pytest.mark.long
@pytest.mark.parametrize("name", [*LIGHT, *LONG])
def test_fresh_weights_of_a_grown_network_train(
    name: str, graph_of: Callable[[str], ChannelGraph]
) -> None:
    """They start where the network's own class starts, and the loss falls to a third."""
    graph = graph_of(name)
    small = mg.plan(graph, {"flops": "40%"})
    wide = mg.expand(graph, small, {"flops": "50%"})
    net = mg.to_torch(mg.apply(graph, wide, weights="fresh", seed=1))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(EXAMPLE.shape, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    net.train()
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 1.5 < losses[0] < 4.5  # log(10) is 2.3
    assert losses[-1] < losses[0] / 3
