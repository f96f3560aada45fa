"""The first half of a row: build a network, make its weights felt, export it, and store all that.

What is stored beside the model (inputs, PyTorch's own outputs, its MACs) lets the second half run
without the network.
"""

import copy
import json
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from entry import ROOT, Entry, Feeds, File, Network, export_digest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import morphgraph as mg
from morphgraph import onnx_io
from morphgraph.onnx_io.runtime import run
from morphgraph.testing import randomize_weights

MODELS = ROOT / "runs" / "zoo" / "models"

#: Layers whose MACs torch's counter takes for 0.
UNCOUNTED = (nn.RNNBase,)


@dataclass
class Prepared:
    """An exported model with what PyTorch says about it."""

    digest: str
    route: str
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    rounding: float = math.nan
    torch_macs: float = math.nan
    memory_mib: float = math.nan


def paths(entry: Entry) -> tuple[Path, Path, Path]:
    """Of the model, its arrays, and its facts."""
    first = MODELS / entry.stem
    model, arrays, facts = (first.with_name(first.name + end) for end in (".onnx", ".npz", ".json"))
    return model, arrays, facts


def is_prepared(entry: Entry, any_version: bool) -> bool:
    """Whether the stored model is there and is what would be exported now."""
    model, _, facts = paths(entry)
    if not (model.exists() and facts.exists()):
        return False
    return any_version or json.loads(facts.read_text())["digest"] == export_digest(entry)


def prepare(entry: Entry) -> None:
    """Build, export and store; a failure is raised."""
    start = time.perf_counter()
    MODELS.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    built = entry.build()
    prepared = Prepared(export_digest(entry), "file")
    model, feeds, outputs = (
        _from_file(built)
        if isinstance(built, File)
        else _from_network(built, prepared, entry.structure_only)
    )
    prepared.seconds["build"] = time.perf_counter() - start - prepared.seconds.get("export", 0.0)
    to_model, to_arrays, to_facts = paths(entry)
    to_facts.unlink(missing_ok=True)
    onnx_io.save(model, to_model, overwrite=True)
    arrays: dict[str, Any] = {f"in:{name}": array for name, array in feeds.items()}
    arrays |= {f"out:{index}": array for index, array in enumerate(outputs)}
    np.savez(to_arrays, **arrays)
    to_facts.write_text(json.dumps(vars(prepared)))


def note_memory(entry: Entry, mib: float) -> None:
    """Store how much memory the preparation took."""
    facts = paths(entry)[2]
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"memory_mib": mib}))


def stored(entry: Entry) -> tuple[ir.Model, Feeds, list[np.ndarray[Any, Any]], Prepared]:
    """What ``prepare`` stored: the model, its inputs, PyTorch's outputs, facts."""
    at_model, at_arrays, at_facts = paths(entry)
    with np.load(at_arrays, allow_pickle=False) as arrays:
        feeds = {key[3:]: arrays[key] for key in arrays if key.startswith("in:")}
        count = sum(key.startswith("out:") for key in arrays)
        outputs = [arrays[f"out:{index}"] for index in range(count)]
    return onnx_io.load(at_model), feeds, outputs, Prepared(**json.loads(at_facts.read_text()))


def _from_file(built: File) -> tuple[ir.Model, Feeds, list[np.ndarray[Any, Any]]]:
    return built.model, built.feeds, list(run(built.model, built.feeds).values())


def _from_network(
    built: Network, prepared: Prepared, structure_only: bool
) -> tuple[ir.Model, Feeds, list[np.ndarray[Any, Any]]]:
    net, arguments = built.net.eval(), built.arguments
    if not (structure_only or built.trained):
        randomize_weights(net, arguments)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = mg.export(net, arguments)
    prepared.seconds["export"] = time.perf_counter() - start
    words = [str(w.message) for w in said if "by way of TorchScript" in str(w.message)]
    prepared.route, prepared.note = ("TorchScript", words[0]) if words else ("dynamo", "")
    tensors = [a for a in pytree.tree_leaves(arguments) if isinstance(a, torch.Tensor)]
    feeds = {
        value.name or "": tensor.numpy()
        for value, tensor in zip(model.graph.inputs, tensors, strict=True)
    }
    if structure_only:
        return model, feeds, []
    outputs = flat_outputs(net, arguments)
    if not any(isinstance(module, UNCOUNTED) for module in net.modules()):
        prepared.torch_macs = torch_macs(net, arguments) / len(tensors[0])
    try:
        exact = flat_outputs(copy.deepcopy(net).double(), pytree.tree_map(_double, arguments))
        prepared.rounding = worst_error(outputs, exact)
        outputs = exact
    except (RuntimeError, TypeError, AttributeError):  # some networks fix their own types
        prepared.rounding = math.nan
    return model, feeds, outputs


def _double(argument: Any) -> Any:
    floats = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if floats else argument


def flat_outputs(net: nn.Module, arguments: tuple[Any, ...]) -> list[np.ndarray[Any, Any]]:
    """Every tensor that a network returns."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(net(*arguments))
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def worst_error(found: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> float:
    """The largest difference of any output, as a share of that output's scale."""
    if [a.shape for a in found] != [a.shape for a in expected]:
        return math.inf
    return max((_relative(a, b) for a, b in zip(found, expected, strict=True)), default=math.nan)


def _relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    wide = expected.astype(np.float64)
    error = float(np.abs(found - wide).max(initial=0.0))
    return error / (float(np.abs(wide).max(initial=0.0)) or 1.0) if error == error else math.inf


def torch_macs(net: nn.Module, arguments: tuple[Any, ...]) -> float:
    """Multiply-adds of one run by torch's own counter; fused attention would count as 0.

    The network's parameters are frozen: the counter stumbles over those that a module passes on.
    """
    net.requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            net(*arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2
