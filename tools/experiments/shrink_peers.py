"""What other programs make of a network at the same FLOPs: onnxsim and Torch-Pruning.

Both search their ratio by bisection until the FLOPs, counted by this program on the file that they
gave, are within the budget.
"""

import copy
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir
import torch
import torch_pruning as tp
from shrink_networks import Feeds, Material
from torch import nn
from torch.nn import functional as F

import morphgraph as mg

PATIENCE = 60  # seconds of the processor, of a refit whose strength is varied
STEPS = 8  # of a bisection: ratios are exact to 0.4 %


class CannotError(Exception):
    """A program cannot do what it is asked for."""


@dataclass(frozen=True)
class Made:
    """What an arm made.

    Attributes:
        model: as a file would hold it.
        setting: of the arm's options, where it chose among several.
        seconds: of the processor, for this one setting at the ratio that was found.
    """

    model: onnx.ModelProto
    setting: str
    seconds: float


def counted(model: onnx.ModelProto, kind: str) -> float:
    """The FLOPs (of a sample) or parameters of a model, as this program counts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights have other names than the file's metadata says
        return mg.cost(mg.lift(model), kind).total


def flops(model: onnx.ModelProto) -> float:
    return counted(model, "flops")


def ratio_for(prune: Callable[[float], onnx.ModelProto], most: float) -> float | None:
    """The least ratio whose result has at most so many FLOPs; None if there is none."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        ratio = (low + high) / 2
        if flops(prune(ratio)) <= most:
            high = ratio
        else:
            low = ratio
    return high if high < 1 else None


def by_onnxsim(material: Material, share: float) -> Made:
    """Calibrated structured pruning of onnxsim and its ridge refit, in the best of its settings.

    Calibrated or not, one ratio for each layer or one for all, and the norm of weights are tried
    together, then, from the best of these eight, in turn: heads of attention too, the refit with
    three strengths of the ridge (with its default alone where that takes minutes), and two
    corrections that fit a changed model to the original (means of outputs, moments behind
    LayerNorm); what is better is kept. *Better* is by the test inputs: more than a user would get.

    Raises:
        CannotError: no setting comes within the budget.
    """
    peer = Onnxsim(material)
    most = share * flops(onnx.load(material.path))
    best: tuple[float, Setting, Made] | None = None

    def attempt(setting: Setting) -> None:
        nonlocal best
        ratio = peer.ratio(setting, most)
        if ratio is not None:
            model, seconds = peer.made(setting, ratio)
            score = _score(material, model)
            if best is None or score > best[0]:
                best = score, setting, Made(model, setting.name, seconds)

    for calibrated, pooled, norm in itertools.product((True, False), (False, True), ("l2", "l1")):
        attempt(Setting(calibrated, pooled, norm))
    if peer.knows_heads:
        attempt(replace(best[1] if best else Setting(), heads=True))
    if best is None:
        raise CannotError(f"no setting comes to {100 * share:g} % of the FLOPs")
    plain = best[1]
    for strength in (1e-2, 1e-1, 1e-4):  # the first is its default
        began = time.process_time()
        attempt(replace(plain, ridge=strength))
        if time.process_time() - began > PATIENCE:
            break
    for correction in ("correct_bias", "apply_norm_tweaking"):
        attempt(replace(best[1], corrections=(*best[1].corrections, correction)))
    return best[2]


@dataclass(frozen=True)
class Setting:
    """Options of onnxsim, as :func:`by_onnxsim` says."""

    calibrated: bool = True
    pooled: bool = False
    norm: str = "l2"
    heads: bool = False
    ridge: float | None = None
    corrections: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = ["wanda" if self.calibrated else "plain", self.norm]
        words += ["global"] * self.pooled + ["and heads"] * self.heads
        words += [] if self.ridge is None else [f"+ ridge {self.ridge:g}"]
        return " ".join([*words, *(f"+ {name}" for name in self.corrections)])


class Onnxsim:
    """A file, brought into what onnxsim (0.8.1) prunes, and the inputs for it.

    It prunes no convolution with a BatchNorm behind it, so that the file is simplified first; no
    PRelu whose slope has an axis for the batch; MLPs of transformers only as MatMul and Add, heads
    of attention only as the Gemm that its ``simplify`` makes of these. The refit knows layers by
    the names of their results, which that would change.
    """

    _UNFUSED = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched")

    def __init__(self, material: Material) -> None:
        import onnxsim

        self.tool = onnxsim
        model, _ = onnxsim.simplify(onnx.load(material.path), skipped_optimizers=[*self._UNFUSED])
        self.base = _with_plain_slopes(model)
        self.feeds = material.batches(min(125, len(next(iter(material.inputs.values())))))
        fused, _ = onnxsim.simplify(self.base)
        whole = flops(fused)
        halved = flops(onnxsim.apply_attention_head_pruning(fused, sparsity=0.5))
        self.knows_heads = halved < whole
        # Its calibrated pruning passes by chains that the other knows: with pooling, with
        # HardSwish.
        half = [
            self._channels(Setting(calibrated), 0.5, self.feeds[:1]) for calibrated in (True, False)
        ]
        self.alike = flops(half[0]) == flops(half[1])
        self._ratios: dict[Setting, float | None] = {}
        self._kept: dict[tuple[Setting, float], tuple[onnx.ModelProto, float]] = {}

    def ratio(self, setting: Setting, most: float) -> float | None:
        """The least one with which a setting comes to so many FLOPs; None if there is none.

        It is sought with a part of the inputs, and from there on with all. With one ratio for each
        layer the widths are the same whichever channels go.
        """
        trial = replace(setting, ridge=None, corrections=())
        if self.alike and not setting.pooled:
            trial = replace(trial, calibrated=False, norm="l2")
        if trial not in self._ratios:
            found = ratio_for(partial(self._cut, trial, self.feeds[:1]), most)
            if trial.calibrated:
                while found is not None and flops(self._cut(trial, self.feeds, found)) > most:
                    found = found + 0.5**STEPS if found < 0.99 else None
            self._ratios[trial] = found
        return self._ratios[trial]

    def _cut(self, setting: Setting, feeds: list[Feeds], ratio: float) -> onnx.ModelProto:
        return self._fused(setting, self._channels(setting, ratio, feeds), ratio, feeds)

    def made(self, setting: Setting, ratio: float) -> tuple[onnx.ModelProto, float]:
        """The file with a share of its channels gone, and the processor's seconds for it."""
        model, before = self._refitted(replace(setting, corrections=()), ratio)
        began = time.process_time()
        for name in setting.corrections:
            model = getattr(self.tool, name)(self.base, model, self.feeds)
        model = self._fused(setting, model, ratio, self.feeds)
        return model, before + time.process_time() - began

    def _refitted(self, setting: Setting, ratio: float) -> tuple[onnx.ModelProto, float]:
        """As :meth:`made`, before corrections; what was refitted is kept, since it takes long."""
        if (setting, ratio) in self._kept:
            return self._kept[setting, ratio]
        began = time.process_time()
        model = self._channels(setting, ratio, self.feeds)
        if setting.ridge is None:
            return model, time.process_time() - began
        model = self.tool.apply_pruning_finetune(
            self.base, model, self.feeds, reg_param=setting.ridge
        )
        self._kept[setting, ratio] = model, time.process_time() - began
        return self._kept[setting, ratio]

    def _fused(
        self, setting: Setting, model: onnx.ModelProto, ratio: float, feeds: list[Feeds]
    ) -> onnx.ModelProto:
        """The model, with fewer heads of attention where they are to go."""
        if not setting.heads:
            return model
        fused, _ = self.tool.simplify(model)
        if not setting.calibrated:
            return self.tool.apply_attention_head_pruning(fused, sparsity=ratio)
        return self.tool.apply_attention_head_wanda_pruning(
            fused, feeds, sparsity=ratio, importance_norm=setting.norm
        )

    def _channels(self, setting: Setting, ratio: float, feeds: list[Feeds]) -> onnx.ModelProto:
        options = {"importance_norm": setting.norm, "global_sparsity": setting.pooled}
        if not setting.calibrated:
            return self.tool.apply_structured_pruning(self.base, sparsity=ratio, **options)
        return self.tool.apply_structured_wanda_pruning(self.base, feeds, sparsity=ratio, **options)


def _with_plain_slopes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with slopes ``[C, 1, 1]`` of PRelu in place of ``[1, C, 1, 1]``."""
    slopes = {node.input[1] for node in model.graph.node if node.op_type == "PRelu"}
    for tensor in model.graph.initializer:
        if tensor.name in slopes and len(tensor.dims) > 1 and tensor.dims[0] == 1:
            array = onnx.numpy_helper.to_array(tensor)[0]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def _timed(make: Callable[[Any], onnx.ModelProto], argument: Any) -> tuple[onnx.ModelProto, float]:
    began = time.process_time()
    return make(argument), time.process_time() - began


def _score(material: Material, model: onnx.ModelProto) -> float:
    return next(iter(material.judged(model).values()))


def by_torch_pruning(material: Material, share: float) -> Made:
    """Torch-Pruning by first-order Taylor importance of the labelled inputs.

    One ratio for each layer or one for all, whichever is better on the test inputs.

    Raises:
        CannotError: no ratio comes within the budget.
    """
    assert material.module is not None
    assert material.labels is not None
    net = material.module()
    most = share * flops(onnx.load(material.path))
    (images,) = (torch.from_numpy(array) for array in material.inputs.values())
    labels = torch.from_numpy(material.labels)
    best: tuple[float, Made] | None = None
    for pooled in (False, True):
        prune = partial(taylor_pruned, net, images, labels, pooled)
        ratio = ratio_for(prune, most)
        if ratio is not None:
            model, seconds = _timed(prune, ratio)
            score = _score(material, model)
            if best is None or score > best[0]:
                best = score, Made(model, "taylor global" if pooled else "taylor", seconds)
    if best is None:
        raise CannotError(f"no ratio comes to {100 * share:g} % of the FLOPs")
    return best[1]


def without_linear(net: nn.Module) -> dict[str, Any]:
    """What Torch-Pruning is told of a convolutional network: its linear layers stay."""
    return {"ignored_layers": [m for m in net.modules() if isinstance(m, nn.Linear)]}


def taylor_pruned(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    pooled: bool,
    ratio: float,
    told: Callable[[nn.Module], dict[str, Any]] = without_linear,
) -> onnx.ModelProto:
    """The network after Torch-Pruning's Taylor pruner; ``told`` gives its options for a network."""
    net = copy.deepcopy(net).eval()
    pruner = tp.pruner.MetaPruner(
        net,
        images[:1],
        importance=tp.importance.TaylorImportance(),
        global_pruning=pooled,
        pruning_ratio=ratio,
        **told(net),
    )
    for some, truth in zip(images.split(250), labels.split(250), strict=True):
        F.cross_entropy(net(some), truth).backward()
    pruner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ir.to_proto(mg.export(net, (images[:2],), dynamic_batch=True))
