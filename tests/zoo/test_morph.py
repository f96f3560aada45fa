"""Three rounds of shrinking and growing on whole networks, with training replaced by chance."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.train.config import SearchConfig
from morphgraph.train.loop import rounds
from morphgraph.train.phases import Penalty, ShrinkPenalty
from morphgraph.train.settled import Settled

pytestmark = pytest.mark.slow

NETWORKS = ("densenet121", "efficientnet_b0", "googlenet", "mobilenet_v2", "shufflenet_v2_x0_5")
BUDGET = {"flops": "80%", "params": "120%"}


def network(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": False}
    net: nn.Module = getattr(torchvision.models, name)(**options)
    return net.eval()


def shapes(graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
    values = graph.model.graph.initializers
    return {name: static_shape(value) for name, value in values.items()}


@pytest.mark.filterwarnings("ignore::morphgraph.errors.MorphWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_of_the_original_gives_the_network_of_every_round(name: str) -> None:
    torch.manual_seed(0)
    net, x = network(name), torch.randn(1, 3, 64, 64)
    graph = mg.lift(mg.export(net, (x,)))
    chance = torch.Generator().manual_seed(0)

    def fit(_net: nn.Module, penalty: Penalty) -> None:
        """Silence 40 % of the channels, and some groups as a whole."""
        assert isinstance(penalty, ShrinkPenalty)
        regularizer = penalty.regularizer
        channels = len(regularizer.graph.channel_group)
        dead = torch.rand(channels, generator=chance) < 0.4
        for group in regularizer.graph.groups:
            if torch.rand(1, generator=chance) < 0.15:
                dead[torch.from_numpy(group.channels)] = True
        Settled(regularizer, dead).hold()

    aim = SearchConfig(BUDGET, iterations=3, min_width=0, shrink_to=1.0)
    done = list(rounds(graph, net, fit, aim))
    assert len(done) == 3
    for found in done:
        told = mg.lift(mg.apply(graph, found.plan, verify=False))
        made = mg.lift(found.resized.model)
        assert shapes(told) == shapes(made)
        for kind, share in BUDGET.items():
            need = mg.cost(made, kind).total
            assert need == found.plan.cost[kind].after
            assert need <= float(share.rstrip("%")) / 100 * mg.cost(graph, kind).total
