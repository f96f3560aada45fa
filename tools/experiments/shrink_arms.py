"""The arms: ways from a network and some inputs to one with fewer FLOPs that still works."""

import time
import warnings
from dataclasses import dataclass, fields
from typing import Any

import onnx_ir as ir
import torch
from shrink_networks import Material
from shrink_peers import Made, by_onnxsim, by_torch_pruning
from torch import nn

import morphgraph as mg
from morphgraph.options import Attention
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        method: ``l2``: the plan by weights and nothing else; ``l2 + bn``: BatchNorm's statistics
            are taken anew from the inputs; ``l2 + refit``: kernels are fitted by them; ``onnxsim``;
            ``torch-pruning``; ``shrink``, for which the other fields are options of ``mg.shrink``
            and of ``mg.lift``, None where they are left to it.
    """

    method: str
    score: str | None = None
    refit: bool | None = None
    tune: int | None = None
    attention: Attention | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those that are given, by name."""
        own = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def name(self) -> str:
        """A row's name: the method and what is not the default."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])


PEERS = (Arm("l2"), Arm("l2 + bn"), Arm("onnxsim"), Arm("torch-pruning"))
OURS = (
    Arm("l2 + refit"),
    Arm("shrink", score="variance"),
    Arm("shrink", refit=False),
    Arm("shrink"),
    Arm("shrink", tune=300),
    Arm("shrink", attention="all"),
)
ARMS = (*PEERS, *OURS)


def made(arm: Arm, material: Material, share: float, seed: int) -> Made:
    """What an arm makes of a network at a share of its FLOPs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arm.method == "onnxsim":
            return by_onnxsim(material, share)
        if arm.method == "torch-pruning":
            return by_torch_pruning(material, share)
        began = time.process_time()
        model = _by_us(arm, material, {"flops": f"{100 * share:g}%"}, seed)
        return Made(ir.to_proto(model), "", time.process_time() - began)


def _by_us(arm: Arm, material: Material, budget: dict[str, str], seed: int) -> ir.Model:
    if arm.method == "shrink":
        options = arm.options
        graph = mg.lift(str(material.path), attention=options.pop("attention", "heads"))
        return mg.shrink(graph, material.inputs, budget, round_to=1, seed=seed, **options).model
    graph = mg.lift(str(material.path))
    plan = mg.plan(graph, budget, score="l2", round_to=1)
    if arm.method == "l2 + refit":
        return finish(Shrinker(graph, material.inputs, seed=seed), plan).model
    model = mg.apply(graph, plan)
    return _statistics_anew(model, material) if arm.method == "l2 + bn" else model


def _statistics_anew(model: ir.Model, material: Material) -> ir.Model:
    """The model with BatchNorm's means and variances as they are in it for the inputs."""
    net = mg.to_torch(model)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # torch has no other name for it
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    with torch.no_grad():
        for feeds in material.batches(250):
            net(*(torch.from_numpy(array) for array in feeds.values()))
    return mg.with_weights(model, net.eval())
