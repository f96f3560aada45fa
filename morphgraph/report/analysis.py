"""What ``analyze`` reports of a model: totals, layers, groups and opaque operators.

The structs are the JSON that is printed; ``docs/schema/analysis.schema.json`` is made from them.
"""

import hashlib
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.errors import FileError, warn
from morphgraph.graph import ChannelGraph, GraphOp
from morphgraph.onnx_io import escape, static_shape
from morphgraph.origin import Origin
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.plans import structure_hash
from morphgraph.version import __version__

SCHEMA_VERSION = 1


class ModelInfo(msgspec.Struct, frozen=True):
    """The file that was analysed.

    ``ops`` counts the canonical model's nodes; ``structure`` is the hash by which plans know it;
    ``fixed`` has the values of inputs that it holds for.
    """

    path: str
    sha256: str
    opset: int
    ops: int
    structure: str
    fixed: dict[str, Any] = {}


class Totals(msgspec.Struct, frozen=True):
    """Costs of the whole model; arithmetic and activations are per sample."""

    macs: int
    flops: int
    params: int
    weight_bytes: int
    activation_bytes: int
    peak_activation_bytes: int


class Reach(msgspec.Struct, frozen=True):
    """How far a plan can go.

    ``shrinkable_macs`` are those of layers that some group can make smaller, ``lowest_macs`` what
    is left when every resizable group has one channel.
    """

    shrinkable_macs: int
    lowest_macs: int


class ChosenCost(msgspec.Struct, frozen=True):
    """The cost that was asked for (``--cost``); layers and groups give their part as ``cost``."""

    kind: str
    unit: str
    total: float


class Layer(msgspec.Struct, frozen=True):
    """A layer: the operators that belong to one module, or one operator."""

    name: str
    op_type: str
    macs: int
    flops: int
    params: int
    output_shape: list[int]
    cost: float


class MemberInfo(msgspec.Struct, frozen=True):
    """An axis that a group stands on, with the positions that one channel takes there."""

    tensor: str
    axis: int
    per_channel: int


class GroupInfo(msgspec.Struct, frozen=True):
    """A group of channels; costs per channel are the exact gradient at the present widths."""

    id: str
    name: str
    width: int
    resizable: bool
    reason: str | None
    statistical: bool
    producers: list[str]
    readers: list[str]
    members: list[MemberInfo]
    flops_per_channel: float
    params_per_channel: float
    cost_per_channel: float


class OpaqueOp(msgspec.Struct, frozen=True):
    """An operator that nothing is known of; the axes that it touches keep their size."""

    name: str
    op_type: str
    reason: str


class Analysis(msgspec.Struct, frozen=True):
    """Everything that is known of a model before anything is changed.

    ``origin`` says how it was made, where this program resized it.
    """

    schema_version: int
    tool_version: str
    model: ModelInfo
    convention: str
    totals: Totals
    reach: Reach
    cost: ChosenCost
    layers: list[Layer]
    groups: list[GroupInfo]
    opaque_ops: list[OpaqueOp]
    not_finite: list[str]
    origin: Origin | None


def analyze(
    graph: ChannelGraph,
    path: str | PathLike[str],
    *,
    cost_kind: str = "flops",
    convention: Convention = "default",
    not_finite: Sequence[str] = (),
) -> Analysis:
    """Analyse a lifted model.

    Args:
        graph: the lifted model.
        path: the file that it comes from.
        cost_kind: the cost that layers and groups give as ``cost``.
        convention: how costs are counted.
        not_finite: names of the tensors that hold NaN or infinite numbers.

    Raises:
        FileError: the file cannot be read.
        UnsupportedError: no such cost.
    """
    chosen = cost(graph, cost_kind, convention=convention)
    opsets = graph.model.opset_imports
    return Analysis(
        schema_version=SCHEMA_VERSION,
        tool_version=__version__,
        model=ModelInfo(
            path=path_text(path),
            sha256=file_sha256(path),
            opset=opsets.get("", opsets.get("ai.onnx", 0)),
            ops=len(graph.ops),
            structure=structure_hash(graph),
            fixed=graph.options.fixed,
        ),
        convention=convention,
        totals=totals(graph, convention),
        reach=_reach(graph, cost(graph, "macs", convention=convention)),
        cost=ChosenCost(chosen.kind, chosen.unit, chosen.total),
        layers=layers(graph, chosen, convention),
        groups=_groups(graph, chosen, convention),
        opaque_ops=[
            OpaqueOp(op.name, op.ir.op_type, op.opaque) for op in graph.ops if op.opaque is not None
        ],
        not_finite=list(not_finite),
        origin=Origin.read(graph.model),
    )


def totals(graph: ChannelGraph, convention: Convention) -> Totals:
    """The costs of a whole model."""
    units = ("macs", "flops", "params", "weight_bytes", "memory", "peak")
    return Totals(*(round(cost(graph, unit, convention=convention).total) for unit in units))


def path_text(path: str | PathLike[str]) -> str:
    """A path that JSON can hold: bytes that are no UTF-8 are written as escapes."""
    return fspath(path).encode(errors="backslashreplace").decode()


def file_sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a file's bytes; of a folder that of what ``sha256sum *.onnx`` prints in it.

    Raises:
        FileError: it cannot be read.
    """
    try:
        if Path(path).is_dir():
            files = sorted(Path(path).glob("*.onnx")) or sorted(Path(path).glob("*/*.onnx"))
            lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
            return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{escape(fspath(path))}: {error.strerror or error}") from error


def _reach(graph: ChannelGraph, macs: Cost) -> Reach:
    lowest = WidthBounds().lowest(graph)
    after = macs.by_layer_at(lowest)
    shrinkable = sum(now for layer, now in macs.by_layer.items() if after[layer] < now)
    return Reach(round(shrinkable), round(macs.at(lowest)))


def layers(graph: ChannelGraph, chosen: Cost, convention: Convention) -> list[Layer]:
    """The layers in the model's order; ``chosen`` is the cost that they give as ``cost``."""
    by_layer = {
        unit: cost(graph, unit, convention=convention).by_layer
        for unit in ("macs", "flops", "params")
    }
    members: dict[str, list[GraphOp]] = {}
    for op in graph.ops:
        members.setdefault(op.layer, []).append(op)
    return [
        Layer(
            name=name,
            # A layer is of the type of the first operator that computes.
            op_type=next((op for op in ops if op.macs), ops[0]).ir.op_type,
            output_shape=list(static_shape(ops[-1].ir.outputs[0])),
            cost=chosen.by_layer.get(name, 0.0),
            **{unit: round(costs.get(name, 0.0)) for unit, costs in by_layer.items()},
        )
        for name, ops in members.items()
    ]


def _groups(graph: ChannelGraph, chosen: Cost, convention: Convention) -> list[GroupInfo]:
    resources = [cost(graph, unit, convention=convention) for unit in ("flops", "params")]
    flops, params, asked = (c.gradient(graph.widths) for c in (*resources, chosen))
    return [
        GroupInfo(
            id=group.id,
            name=group.name,
            width=group.width,
            resizable=group.resizable,
            reason=group.reason,
            statistical=group.statistical,
            producers=list(group.producers),
            readers=list(group.readers),
            members=[MemberInfo(m.value, m.axis, m.per_channel) for m in group.members],
            flops_per_channel=float(flops[group.index]),
            params_per_channel=float(params[group.index]),
            cost_per_channel=float(asked[group.index]),
        )
        for group in graph.groups
    ]


def operators(graph: ChannelGraph) -> list[tuple[GraphOp, float]]:
    """Every operator with its MACs per sample."""
    sizes = graph.couplings.sizes.astype(np.float64)
    return [
        (op, sum(float(sizes[list(term)].prod()) for term in op.macs) / graph.batch)
        for op in graph.ops
    ]


def lowest_widths(graph: ChannelGraph) -> IntArray:
    """The former name of ``WidthBounds().lowest(graph)``, for one version."""
    warn("lowest_widths is now WidthBounds().lowest", DeprecationWarning)
    return WidthBounds().lowest(graph)
