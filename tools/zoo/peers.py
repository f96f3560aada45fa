"""What peers make of the same networks at half the width: onnxsim's pruning and Torch-Pruning.

Both remove half of the channels of every layer that they can; morphgraph gives every group half of
its width. A removal is exact where the pruned network computes what the original does whose layers
do not read the removed channels: of the weights that are left, which ones those are can be read off
by their values, with nobody's word for it.
"""

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from entry import Entry, Network
from onnx import numpy_helper
from prepare import flat_outputs, torch_macs, worst_error
from torch import nn

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from morphgraph.testing import randomize_weights

SHARE = 0.5
#: A peer that has no result after this many seconds has none.
LIMIT_S = 60


@dataclass
class PeerFindings:
    """One network: by program the MACs kept, whether it runs, how far it is from the masked one.

    An error is NaN where it cannot be said: a normalization lost channels of its statistic.
    """

    name: str
    family: str
    kept: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PeerFindings":
        """Of a stored row."""
        return cls(**data)

    @property
    def holds(self) -> bool:
        """Whether morphgraph's own part is as wanted; what peers do is only reported."""
        return "morphgraph" not in self.crashes and self.errors.get("morphgraph", 1) <= 1e-5

    @property
    def shortfalls(self) -> list[str]:
        """What did not work, in words."""
        return [f"{program}: {error}" for program, error in self.crashes.items()]


@dataclass(frozen=True)
class PeerEntry(Entry):
    """A network that peers prune, too."""


def blank(entry: Entry) -> PeerFindings:
    """A row that holds only what the entry says."""
    return PeerFindings(entry.name, entry.family)


def examine(entry: PeerEntry, note: Callable[[PeerFindings], None]) -> PeerFindings:
    """Every program in turn."""
    found = blank(entry)
    built = entry.build()
    assert isinstance(built, Network)
    net, arguments = built.net.eval(), built.arguments
    torch.manual_seed(0)
    randomize_weights(net, arguments)
    exported = mg.export(net, arguments)
    for program, prune in _PROGRAMS.items():
        start = time.perf_counter()
        try:
            with _limited():
                found.kept[program], found.errors[program] = prune(net, arguments, exported)
        except Exception as error:  # noqa: BLE001 - whatever fails is what is looked for
            words = str(error).strip().splitlines() or [""]
            found.crashes[program] = f"{type(error).__name__}: {words[0][:200]}"
        found.seconds[program] = round(time.perf_counter() - start, 3)
        note(found)
    return found


@contextmanager
def _limited() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no result in {LIMIT_S} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _morphgraph(
    _net: nn.Module, _arguments: tuple[Any, ...], exported: ir.Model
) -> tuple[float, float]:
    graph = mg.lift(exported)
    macs = mg.cost(graph, "macs")
    plan = mg.uniform(graph, SHARE, round_to=1)
    small = mg.apply(graph, plan, verify=False)
    report = mg.verify(graph, plan, small)
    return mg.cost(mg.lift(small), "macs").total / macs.total, report.worst.relative


def _onnxsim(
    _net: nn.Module, arguments: tuple[Any, ...], exported: ir.Model
) -> tuple[float, float]:
    import onnxsim

    whole, _ = onnxsim.simplify(ir.to_proto(exported))
    pruned = onnxsim.apply_structured_pruning(whole, sparsity=SHARE)
    del pruned.graph.value_info[:]  # some still say the old sizes
    feeds = {
        value.name: tensor.numpy()
        for value, tensor in zip(whole.graph.input, _tensors(arguments), strict=True)
    }
    results = list(run(ir.from_proto(pruned), feeds).values())
    kept = _macs(pruned) / _macs(whole)
    masked = onnx.ModelProto.FromString(whole.SerializeToString())
    left = {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    readers = {node.input[1]: node for node in masked.graph.node if len(node.input) > 1}
    for tensor in masked.graph.initializer:
        node = readers.get(tensor.name)
        array = numpy_helper.to_array(tensor)
        few = left.get(tensor.name, array)
        if node is None or few.shape == array.shape:
            continue
        if node.op_type in ("LayerNormalization", "GroupNormalization"):
            return kept, math.nan
        if node.op_type in _READS:
            axis, groups = _reading(node)
            if groups > 1 and array.shape[1] == 1:  # depthwise: every channel reads itself
                continue
            silent = _silent(array, few, axis, groups)
            tensor.CopyFrom(numpy_helper.from_array(silent, tensor.name))
    expected = list(run(ir.from_proto(masked), feeds).values())
    return kept, worst_error(results, expected)


_READS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _reading(node: onnx.NodeProto) -> tuple[int, int]:
    """The axis of a weight along which a node reads channels, and the groups of its first axis."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    groups = attributes.get("group", 1)
    if node.op_type == "Conv":
        return 1, groups
    return int(node.op_type == "Gemm" and attributes.get("transB", 0) == 1), groups


def _silent(whole: np.ndarray[Any, Any], left: np.ndarray[Any, Any], axis: int, groups: int) -> Any:
    """A weight with zeros where it no longer reads; every group of the first axis for itself."""
    pairs = zip(np.split(whole, groups), np.split(left, groups), strict=True)
    return np.concatenate([_without(a, b, axis) for a, b in pairs])


def _without(whole: np.ndarray[Any, Any], left: np.ndarray[Any, Any], axis: int) -> Any:
    """A weight with zeros in the channels that it no longer reads.

    Random values are as good as names: where those are that are left tells which channels are. Of
    millions some are equal by chance; a channel that is left has most of its share.
    """
    order = np.argsort(whole, axis=None)
    places = np.searchsorted(whole.ravel()[order], left.ravel())
    places = order[np.minimum(places, whole.size - 1)]
    channels = np.unravel_index(places, whole.shape)[axis]
    counts = np.bincount(channels, minlength=whole.shape[axis])
    gone = counts < left.size / left.shape[axis] / 2
    assert gone.sum() == whole.shape[axis] - left.shape[axis], "channels cannot be told by values"
    masked = whole.copy()
    masked[(slice(None),) * axis + (gone,)] = 0
    return masked


def _macs(model: onnx.ModelProto) -> float:
    return mg.cost(mg.lift(ir.from_proto(model)), "macs").total


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def _torch_pruning(
    net: nn.Module, arguments: tuple[Any, ...], _exported: ir.Model
) -> tuple[float, float]:
    import torch_pruning as tp

    pruned = copy.deepcopy(net)
    layers = [module for module in pruned.modules() if isinstance(module, _LAYERS)]
    tp.pruner.MagnitudePruner(
        pruned,
        arguments if len(arguments) > 1 else arguments[0],
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=SHARE,
        ignored_layers=layers[-1:],  # the classifier keeps its classes
    ).step()
    results = flat_outputs(pruned, arguments)
    kept = torch_macs(pruned, arguments) / torch_macs(copy.deepcopy(net), arguments)
    masked = copy.deepcopy(net)
    if not _mask_modules(masked, dict(pruned.named_modules())):
        return kept, math.nan
    return kept, worst_error(results, flat_outputs(masked, arguments))


_LAYERS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_STATISTICAL = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)


def _mask_modules(masked: nn.Module, pruned: Mapping[str, nn.Module]) -> bool:
    """Silence what the pruned modules no longer read; False where that cannot be said."""
    for name, module in masked.named_modules():
        left = pruned[name]
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        if shapes == [parameter.shape for parameter in left.parameters(recurse=False)]:
            continue
        if isinstance(module, _STATISTICAL):
            return False
        if isinstance(module, _LAYERS):
            weight, few = module.weight.detach(), left.get_parameter("weight").detach()
            transposed, groups = getattr(module, "transposed", False), getattr(left, "groups", 1)
            if groups != getattr(module, "groups", 1):  # depthwise: every channel reads itself
                continue
            silent = _silent(weight.numpy(), few.numpy(), int(not transposed), groups)
            module.weight.data = torch.from_numpy(silent)
    return True


_PROGRAMS: dict[str, Callable[..., tuple[float, float]]] = {
    "morphgraph": _morphgraph,
    "onnxsim": _onnxsim,
    "Torch-Pruning": _torch_pruning,
}


def _classifier(name: str, size: int = 224) -> Network:
    import vision

    return vision.torchvision_classifier(name, size)


def _sequence(name: str) -> Network:
    import sequences

    made: Network = getattr(sequences, name)()
    return made


_VISION = """
resnet18 resnet50 mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 squeezenet1_1
shufflenet_v2_x0_5 regnet_x_400mf mnasnet0_5 convnext_tiny vit_b_16 swin_t
"""
PEERS: dict[str, Entry] = {
    **{
        f"peers/{name}": PeerEntry(f"peers/{name}", "cnn", _classifier, {"name": name})
        for name in _VISION.split()
    },
    **{
        f"peers/{name}": PeerEntry(f"peers/{name}", "transformer", _sequence, {"name": name})
        for name in ("bert", "gpt2", "llama")
    },
}
