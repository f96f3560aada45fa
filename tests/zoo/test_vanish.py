"""Whole networks lose whole layers: proven equal, loaded back, trained."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.analysis.score import score
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan
from morphgraph.testing import randomize_weights
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch


def _vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64
    )
    torch.nn.init.normal_(net.heads.head.weight, std=0.2)  # zero by default, which feels nothing
    return net


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=10, **options)


# Per network how to build it, and a layer that is removed when all that can die does.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (_torchvision("resnet18"), "layer3.1.conv2"),
    "small vit": (_vit, "encoder.layers.encoder_layer_1.self_attention.out_proj"),
}
SLOW = {
    "mobilenet_v2": (_torchvision("mobilenet_v2"), "features.6.conv.1.0"),
    "googlenet": (_torchvision("googlenet", init_weights=True), "inception4b.branch3.1.conv"),
    "densenet121": (_torchvision("densenet121"), "features.denseblock2.denselayer5.conv2"),
    "convnext_tiny": (_torchvision("convnext_tiny"), "features.3.1.block.3"),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), "stage3.1.branch2.3"),
}
ALL = [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def graphs() -> dict[str, ChannelGraph]:
    return {}


def graph_of(name: str, graphs: dict[str, ChannelGraph]) -> ChannelGraph:
    if name not in graphs:
        torch.manual_seed(0)
        example = torch.randn(2, 3, 64, 64)
        net = randomize_weights((NETWORKS | SLOW)[name][0]().eval(), example)
        graphs[name] = lift(export(net, (example,)))
    return graphs[name]


def check(graph: ChannelGraph, made: Plan) -> None:
    small = resize(graph, made.keep_channels(graph))
    report = verify(graph, made, small)
    assert report.ok, report.worst
    assert report.sensitivity > 1e-2
    again = lift(small)
    for kind in ("flops", "params"):
        assert cost(again, kind).total == cost(graph, kind).at(made.widths(graph)), kind
    net = to_torch(small)
    x = torch.randn(2, 3, 64, 64)
    (expected,) = run(small, {small.graph.inputs[0].name or "": x.numpy()}).values()
    found = net.eval()(x).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    net.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_all_that_can_die_dies(name: str, graphs: dict[str, ChannelGraph]) -> None:
    graph = graph_of(name, graphs)
    widths = WidthBounds(min_width=0).lowest(graph)
    dead = [group for group in graph.groups if widths[group.index] == 0]
    made = set_widths(graph, {group.id: 0 for group in dead})
    assert (NETWORKS | SLOW)[name][1] in liveness(graph, [g.index for g in dead]).removed_layers
    check(graph, made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_layers_that_training_has_silenced_go(name: str, graphs: dict[str, ChannelGraph]) -> None:
    graph = graph_of(name, graphs)
    scores = score(graph, "l2")
    generator = np.random.default_rng(0)
    silent = [g for g in graph.groups if g.resizable and generator.random() < 0.5]
    for group in silent:
        scores[group.channels] = 0.0
    made = plan(graph, {"flops": "5%"}, score=scores, min_width=0)
    widths = made.widths(graph)
    assert made.cost["flops"].after <= 0.05 * made.cost["flops"].before
    assert (widths == 0).any()
    check(graph, made)
