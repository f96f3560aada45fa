"""Torch-Pruning's BN-scale pruner (network slimming, Liu et al., ICCV 2017) as an arm.

It trains with an L1 penalty on all BatchNorm scales and prunes globally by them. What it leaves of
the budget is filled as for every other arm.
"""

import copy

import torch
import torch_pruning as tp
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.plans import Plan
from morphgraph.train.phases import NoPenalty

REGULARIZATION = 1e-4  # of the paper, ten times what Torch-Pruning's pruner has by default


class Slimming(NoPenalty):
    """The gradient that ``BNScalePruner.regularize`` adds, as a term of the loss."""

    def __init__(self, net: nn.Module) -> None:
        self.scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def loss(self) -> Tensor:  # type: ignore[override]  # a penalty may add a tensor
        return REGULARIZATION * sum((s.abs().sum() for s in self.scales), torch.zeros(()))


def bn_scale_pruned(net: nn.Module, graph: ChannelGraph, image: Tensor, share: float) -> Plan:
    """The widths that the pruner leaves at a share of the seed's FLOPs, the budget filled.

    Args:
        net: the seed network, trained with :class:`Slimming`.
        graph: of the seed network.
        image: what it takes, ``[1, channels, height, width]``.
        share: of the FLOPs, 0 to 1.
    """
    low, high = 0.0, 1.0
    widths: dict[str, int] = {}
    for _ in range(12):
        ratio = (low + high) / 2
        found = _pruned(net, graph, image, ratio)
        if _share(graph, found) <= share:
            high, widths = ratio, found
        else:
            low = ratio
    plan = set_widths(graph, widths)
    return mg.expand(graph, plan, {"flops": f"{100 * share:g}%"}, round_to=1)


def _pruned(net: nn.Module, graph: ChannelGraph, image: Tensor, ratio: float) -> dict[str, int]:
    """Group ids and widths after global pruning by the scales."""
    net = copy.deepcopy(net).eval().to(memory_format=torch.contiguous_format)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BNScalePruner(
        net,
        image,
        importance=tp.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[last],
    )
    pruner.step()
    widths = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            (group,) = {int(k) for k in graph.channel_group[graph.channels_at(f"{name}.weight", 0)]}
            widths[graph.groups[group].id] = module.out_channels
    return widths


def _share(graph: ChannelGraph, widths: dict[str, int]) -> float:
    resource = mg.cost(graph, "flops")
    numbers = graph.widths.copy()
    for name, width in widths.items():
        numbers[graph.group(name).index] = width
    return resource.at(numbers) / resource.total
