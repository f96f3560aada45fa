"""What weight decay acts on: kernels, and no scales whatever their shape."""

import torch
from torch import nn

from morphgraph.recipes.trainer import Recipe, make_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.batched_scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.temperature = nn.Parameter(torch.ones(1, 1))
        self.position = nn.Parameter(torch.zeros(1, 4, 6))
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.one_output = nn.Linear(6, 1)


def test_kernels_alone_decay() -> None:
    net = Net()
    names = {p: name for name, p in net.named_parameters()}
    decayed = {
        names[p]
        for group in make_optimizer(net, Recipe(1, weight_decay=0.1)).param_groups
        if group["weight_decay"] > 0
        for p in group["params"]
    }
    assert decayed == {"conv.weight", "position", "depthwise.weight", "one_output.weight"}
    total = sum(len(g["params"]) for g in make_optimizer(net, Recipe(1)).param_groups)
    assert total == len(names)
