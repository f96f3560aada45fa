"""What ``analyze`` tells of a model: totals, layers, groups and opaque operators.

The structs are the JSON that is printed; ``docs/schema/analysis.schema.json`` is made from them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import msgspec
import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.errors import FileError
from morphgraph.graph import ChannelGraph, GraphOp
from morphgraph.onnx_io import escape, static_shape
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.version import __version__

SCHEMA_VERSION = 1

_CHUNK_BYTES = 2**20


class ModelInfo(msgspec.Struct, frozen=True):
    """The file that was analysed; ``ops`` counts the canonical model's nodes."""

    path: str
    sha256: str
    opset: int
    ops: int


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
    """Everything that is known of a model before anything is changed."""

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
    costs = {kind: cost(graph, kind, convention=convention) for kind in _KINDS}
    chosen = cost(graph, cost_kind, convention=convention)
    opsets = graph.model.opset_imports
    return Analysis(
        schema_version=SCHEMA_VERSION,
        tool_version=__version__,
        model=ModelInfo(
            path=fspath(path).encode(errors="backslashreplace").decode(),
            sha256=file_sha256(path),
            opset=opsets.get("", opsets.get("ai.onnx", 0)),
            ops=len(graph.ops),
        ),
        convention=convention,
        totals=totals(graph, convention),
        reach=_reach(graph, costs["macs"]),
        cost=ChosenCost(chosen.kind, chosen.unit, chosen.total),
        layers=layers(graph, costs, chosen),
        groups=_groups(graph, costs, chosen),
        opaque_ops=[
            OpaqueOp(node.name, node.ir.op_type, node.opaque)
            for node in graph.ops
            if node.opaque is not None
        ],
        not_finite=list(not_finite),
    )


_KINDS = ("macs", "flops", "params")


def totals(graph: ChannelGraph, convention: Convention) -> Totals:
    """The costs of a whole model."""
    kinds = ("macs", "flops", "params", "weight_bytes", "memory", "peak")
    return Totals(*(round(cost(graph, kind, convention=convention).total) for kind in kinds))


def file_sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        FileError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise FileError(f"{escape(fspath(path))}: {error.strerror or error}") from error
    return digest.hexdigest()


def lowest_widths(graph: ChannelGraph) -> IntArray:
    """The widths when every resizable group has one channel, ``[groups]``."""
    return np.array([1 if group.resizable else group.width for group in graph.groups], np.int64)


def _reach(graph: ChannelGraph, macs: Cost) -> Reach:
    lowest = lowest_widths(graph)
    after = macs.by_layer_at(lowest)
    shrinkable = sum(now for layer, now in macs.by_layer.items() if after[layer] < now)
    return Reach(round(shrinkable), round(macs.at(lowest)))


def layers(graph: ChannelGraph, costs: Mapping[str, Cost], chosen: Cost) -> list[Layer]:
    """The layers in the model's order.

    Args:
        graph: the lifted model.
        costs: ``"macs"``, ``"flops"`` and ``"params"``.
        chosen: the cost that layers give as ``cost``.
    """
    by_layer = {kind: costs[kind].by_layer for kind in _KINDS}
    members: dict[str, list[GraphOp]] = {}
    for node in graph.ops:
        members.setdefault(node.layer, []).append(node)
    return [
        Layer(
            name=name,
            op_type=_chief(nodes).ir.op_type,
            output_shape=list(static_shape(nodes[-1].ir.outputs[0])),
            cost=chosen.by_layer.get(name, 0.0),
            **{kind: round(by_layer[kind].get(name, 0.0)) for kind in _KINDS},
        )
        for name, nodes in members.items()
    ]


def _chief(nodes: Sequence[GraphOp]) -> GraphOp:
    """The node that a layer is named after: the first that computes."""
    return next((node for node in nodes if node.macs), nodes[0])


def _groups(graph: ChannelGraph, costs: Mapping[str, Cost], chosen: Cost) -> list[GroupInfo]:
    flops, params, extra = (
        resource.gradient(graph.widths) for resource in (costs["flops"], costs["params"], chosen)
    )
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
            cost_per_channel=float(extra[group.index]),
        )
        for group in graph.groups
    ]


def operators(graph: ChannelGraph) -> list[tuple[GraphOp, float]]:
    """Every node with its MACs per sample."""
    sizes = graph.couplings.sizes.astype(np.float64)
    return [
        (node, sum(float(sizes[list(term)].prod()) for term in node.macs) / graph.batch)
        for node in graph.ops
    ]
