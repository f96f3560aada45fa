"""Torch-Pruning's BN-scale pruner (network slimming, Liu et al., ICCV 2017) as an arm.

It trains with an L1 penalty on all BatchNorm scales and prunes globally by them. What it leaves of
the budget is filled as for every other arm.
"""

import copy
from typing import TYPE_CHECKING

import torch
import torch_pruning as tp
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.plans import Plan
from morphgraph.train.phases import NoPenalty

if TYPE_CHECKING:
    from arms import Bench

REGULARIZATION = 1e-4  # of the paper, ten times what Torch-Pruning's pruner has by default


class Slimming(NoPenalty):
    """The gradient that ``BNScalePruner.regularize`` adds, as a term of the loss."""

    def __init__(self, net: nn.Module) -> None:
        self.scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def loss(self) -> Tensor:
        return REGULARIZATION * sum((s.abs().sum() for s in self.scales), torch.zeros(()))


def bn_scale_pruned(bench: "Bench", share: float) -> Plan:
    """The widths that the pruner leaves at a share of the seed's FLOPs, the budget filled."""
    net = bench.slimmed
    low, high = 0.0, 1.0
    widths: dict[str, int] = {}
    for _ in range(12):
        ratio = (low + high) / 2
        found = _pruned(bench, net, ratio)
        if _share(bench, found) <= share:
            high, widths = ratio, found
        else:
            low = ratio
    plan = set_widths(bench.graph, widths)
    return mg.expand(bench.graph, plan, {"flops": f"{100 * share:g}%"})


def slimmed(bench: "Bench") -> nn.Module:
    """The seed network trained with the penalty, for as many epochs as the arms."""
    size, channels = bench.dataset.preprocessing.size, len(bench.dataset.preprocessing.mean)
    net = bench.network.make(channels, len(bench.dataset.classes), size[0])
    net.load_state_dict(mg.to_torch(mg.fresh(bench.graph, bench.study.seed)).state_dict())
    bench.train(net.to(bench.device), bench.recipe, Slimming(net), "train")
    return net.cpu()


def _pruned(bench: "Bench", net: nn.Module, ratio: float) -> dict[str, int]:
    """Group ids and widths after global pruning by the scales."""
    net = copy.deepcopy(net).eval().to(memory_format=torch.contiguous_format)
    size, channels = bench.dataset.preprocessing.size, len(bench.dataset.preprocessing.mean)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BNScalePruner(
        net,
        torch.zeros(1, channels, *size),
        importance=tp.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[last],
    )
    pruner.step()
    widths = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            (group,) = {
                int(k)
                for k in bench.graph.channel_group[bench.graph.channels_at(f"{name}.weight", 0)]
            }
            widths[bench.graph.groups[group].id] = module.out_channels
    return widths


def _share(bench: "Bench", widths: dict[str, int]) -> float:
    resource = mg.cost(bench.graph, "flops")
    numbers = bench.graph.widths.copy()
    for name, width in widths.items():
        numbers[bench.graph.group(name).index] = width
    return resource.at(numbers) / resource.total
