"""The arms: ways from a trained network to a smaller one, each with the same epochs in all.

All tune by one recipe (:func:`Case.tune`) over the same batches in the same order, but for what an
arm is about: where channels go by a training of their own, that takes its epochs from the tuning.
"""

import copy
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch_pruning as tp
from networks import NETWORKS, Attention
from shrink_networks import SAMPLES, Material, module_of
from shrink_peers import CannotError, Onnxsim, Setting, flops, ratio_for, taylor_pruned
from torch import nn
from trained import trained
from tune_rows import FAMILY

import morphgraph as mg
from morphgraph.recipes.baselines import baseline_plan
from morphgraph.recipes.data import Augmentation, Dataset, load_data
from morphgraph.recipes.trainer import Recipe, accuracy, steps_per_epoch, train
from morphgraph.train.config import SearchConfig
from morphgraph.train.phases import NoPenalty, Penalty, ResumablePenalty

TRAINED, TUNED = 15, 4  # epochs
SPARSE = 2  # of the tuned ones, for a training that makes channels small first
RATE = 0.03  # of the tuning; the program's own default

Tuned = tuple[nn.Module, float]
"""A network and the seconds of the processor that its arm took."""


@dataclass(frozen=True)
class Case:
    """A trained network with a seed of all that is random.

    Args:
        network: its name.
        seed: of its training, of its calibration images and of every tuning.
        data: CIFAR-10 at 16x16 pixels.
        folder: where trained networks are kept, or made.
    """

    network: str
    seed: int
    data: Path
    folder: Path

    @cached_property
    def path(self) -> Path:
        """Its file, trained first if it is missing."""
        return trained(self.network, self.seed, self.data, self.folder, TRAINED)

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(str(self.data))

    @cached_property
    def graph(self) -> mg.ChannelGraph:
        return mg.lift(str(self.path))

    @property
    def image(self) -> torch.Tensor:
        """Two images of the right size."""
        preprocessing = self.dataset.preprocessing
        return torch.zeros(2, len(preprocessing.mean), *preprocessing.size)

    @cached_property
    def chosen(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The training images that serve calibration; the file is sorted by class."""
        rng = np.random.default_rng(self.seed)
        return rng.permutation(len(self.dataset.y_train))[:SAMPLES]

    @cached_property
    def images(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        found: np.ndarray[Any, np.dtype[np.float32]] = self.dataset.preprocessing(
            self.dataset.x_train[self.chosen]
        ).numpy()
        return found

    def original(self) -> nn.Module:
        """A copy of the trained network."""
        return mg.to_torch(self.graph.model)

    def recipe(self, epochs: int, lr: float) -> Recipe:
        network = NETWORKS[self.network]
        crops = Augmentation(crop=2, flip=True)
        return Recipe(epochs, lr=lr, augmentation=crops, bf16=network.bf16)

    def tune(
        self,
        net: nn.Module,
        penalty: Penalty | None = None,
        *,
        epochs: int = TUNED,
        lr: float = RATE,
        constant: bool = False,
        phase: str = "tune",
    ) -> nn.Module:
        """Train in place; the network."""
        recipe = replace(self.recipe(epochs, lr), constant=constant)
        used = cast("ResumablePenalty", penalty or NoPenalty())
        train(net, self.dataset, recipe, seed=self.seed, phase=phase, penalty=used)
        return net

    def fit(self, net: nn.Module, penalty: Penalty) -> None:
        """:meth:`tune` as ``mg.morph`` calls it."""
        self.tune(net, penalty)

    def accuracy(self, net: nn.Module) -> float:
        return accuracy(net, self.dataset)

    def counted(self, net: nn.Module) -> dict[str, float]:
        """FLOPs and parameters of a network as shares of the original's."""
        net = net.eval().to(memory_format=torch.contiguous_format)
        graph = mg.lift(mg.export(net, (self.image,)))
        return {
            kind: mg.cost(graph, kind).total / mg.cost(self.graph, kind).total
            for kind in ("flops", "params")
        }


def budget_of(share: float) -> dict[str, str]:
    return {"flops": f"{100 * share:g}%"}


def from_trained(case: Case, share: float) -> nn.Module:
    """``mg.morph(start="trained")`` as it is by default."""
    made = mg.morph(
        case.original(),
        (case.image,),
        case.fit,
        budget=budget_of(share),
        start="trained",
        data=case.images,
        round_to=1,
        seed=case.seed,
    )
    return made.net


def as_family(case: Case, shares: Sequence[float]) -> list[nn.Module]:
    """``mg.family`` as it is by default: a network for each budget, from one ranking."""
    made = mg.family(
        case.original(),
        (case.image,),
        case.fit,
        budgets=[budget_of(share) for share in shares],
        data=case.images,
        round_to=1,
        seed=case.seed,
    )
    return [member.net for member in made.members]


def shrunk(case: Case, share: float) -> nn.Module:
    """``mg.shrink``, then tuned by the labels."""
    made = mg.shrink(str(case.path), case.images, budget_of(share), round_to=1, seed=case.seed)
    return case.tune(mg.to_torch(made.model))


def by_norms(case: Case, share: float) -> nn.Module:
    """The channels of the smallest kernels go."""
    plan = mg.plan(case.graph, budget_of(share), score="l2", round_to=1)
    return case.tune(mg.to_torch(mg.apply(case.graph, plan)))


def multiplied(case: Case, share: float) -> nn.Module:
    """The width multiplier with new weights, trained for all epochs at the original's rate."""
    plan = baseline_plan(
        "uniform", case.graph, SearchConfig(budget_of(share), round_to=1), case.seed
    )
    assert plan is not None
    model = mg.apply(case.graph, plan, weights="fresh", seed=case.seed, verify=False)
    rate = NETWORKS[case.network].lr
    return case.tune(mg.to_torch(model), epochs=TRAINED + TUNED, lr=rate, phase="train")


def by_taylor(case: Case, share: float) -> nn.Module:
    """Torch-Pruning's first-order Taylor importance over all layers, with labels."""
    net = module_of(case.network, case.path, case.dataset)
    images = torch.from_numpy(case.images)
    labels = torch.from_numpy(case.dataset.y_train[case.chosen].astype(np.int64))
    prune = functools.partial(taylor_pruned, net, images, labels, True, told=_told)
    return case.tune(_cut(case, share, prune))


def _told(net: nn.Module) -> dict[str, Any]:
    """What Torch-Pruning has to be told of a network: the classifier, and what has heads."""
    *_, classifier = (m for m in net.modules() if isinstance(m, nn.Linear))
    heads = {
        layer: m.heads
        for m in net.modules()
        if isinstance(m, Attention)
        for layer in (m.query, m.key, m.value)
    }
    return {"ignored_layers": [classifier], "num_heads": heads}


class _Sparse(NoPenalty):
    """Torch-Pruning's regularizer: it changes gradients before each step of the optimizer."""

    def __init__(self, pruner: Any, net: nn.Module, steps: int) -> None:
        self.pruner, self.net, self.steps, self.taken = pruner, net, steps, 0

    def carry(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: self._regularize())

    def _regularize(self) -> None:
        if self.taken % self.steps == 0:  # its own examples do so once an epoch
            self.pruner.update_regularizer()
        self.taken += 1
        self.pruner.regularize(self.net)


def by_group_norm(case: Case, share: float) -> nn.Module:
    """Torch-Pruning's group-norm sparsity: half of the epochs with its regularizer."""
    net = module_of(case.network, case.path, case.dataset)
    importance = tp.importance.GroupMagnitudeImportance(p=2)

    def pruner_of(some: nn.Module, ratio: float) -> Any:
        return tp.pruner.GroupNormPruner(
            some,
            case.image[:1],
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            **_told(some),
        )

    steps = steps_per_epoch(case.dataset, case.recipe(SPARSE, RATE))
    penalty = _Sparse(pruner_of(net, 0.5), net, steps)
    case.tune(net, penalty, epochs=SPARSE, constant=True, phase="sparse")
    net = net.eval().to(memory_format=torch.contiguous_format)

    def prune(ratio: float) -> onnx.ModelProto:
        cut = copy.deepcopy(net)
        pruner_of(cut, ratio).step()
        return ir.to_proto(mg.export(cut.eval(), (case.image,), dynamic_batch=True))

    return case.tune(_cut(case, share, prune), epochs=TUNED - SPARSE)


def by_onnxsim(case: Case, share: float) -> nn.Module:
    """The calibrated pruning of onnxsim; it folds BatchNorm, as it prunes nothing before one."""
    (name,) = (value.name for value in onnx.load(case.path).graph.input)
    test = np.zeros((1, *case.images.shape[1:]), np.float32)
    material = Material(case.path, {name: case.images}, {name: test}, lambda *_: {})
    peer, most = Onnxsim(material), share * flops(onnx.load(case.path))
    setting = Setting(calibrated=peer.alike)
    ratio = peer.ratio(setting, most)
    if ratio is None:
        raise CannotError(f"no ratio comes to {100 * share:g} % of the FLOPs")
    model, _ = peer.made(setting, ratio)
    return case.tune(mg.to_torch(model))


def _cut(case: Case, share: float, prune: Callable[[float], onnx.ModelProto]) -> nn.Module:
    ratio = ratio_for(prune, share * flops(onnx.load(case.path)))
    if ratio is None:
        raise CannotError(f"no ratio comes to {100 * share:g} % of the FLOPs")
    return mg.to_torch(prune(ratio))


SINGLE: dict[str, Callable[[Case, float], nn.Module]] = {
    "from trained": from_trained,
    "shrink + tuning": shrunk,
    "l2 + tuning": by_norms,
    "width multiplier": multiplied,
    "Torch-Pruning, Taylor": by_taylor,
    "Torch-Pruning, group norm": by_group_norm,
    "onnxsim + tuning": by_onnxsim,
}
ARMS = (*SINGLE, FAMILY)


def made(case: Case, arm: str, shares: Sequence[float]) -> list[Tuned]:
    """The networks of an arm, one for each share of the FLOPs: several for a family alone."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arm == FAMILY:
            nets = as_family(case, shares)
        else:
            (share,) = shares
            nets = [SINGLE[arm](case, share)]
    return [(net, (time.process_time() - began) / len(nets)) for net in nets]
