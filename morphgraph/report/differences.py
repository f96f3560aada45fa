"""What ``diff`` reports of two models: layers that changed, nodes that came and went."""

from os import PathLike

import msgspec

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.report.analysis import Layer, Totals, layers, path_text, totals
from morphgraph.version import __version__

SCHEMA_VERSION = 1


class Side(msgspec.Struct, frozen=True):
    """One of the two models."""

    path: str
    totals: Totals


class Change(msgspec.Struct, frozen=True):
    """An integer before and after."""

    before: int
    after: int


class LayerDiff(msgspec.Struct, frozen=True):
    """A layer that both models have, and that is not the same in both."""

    name: str
    op_type: str
    output_before: list[int]
    output_after: list[int]
    macs: Change
    params: Change


class RemovedLayer(msgspec.Struct, frozen=True):
    """A layer that the second model does not have any more."""

    name: str
    op_type: str
    output: list[int]
    macs: int
    params: int


class Diff(msgspec.Struct, frozen=True):
    """What changed between two models; ``added`` and ``removed`` are nodes by name."""

    schema_version: int
    tool_version: str
    before: Side
    after: Side
    layers: list[LayerDiff]
    removed_layers: list[RemovedLayer]
    unchanged: int
    added: list[str]
    removed: list[str]


def compare(
    before: ChannelGraph,
    after: ChannelGraph,
    before_path: str | PathLike[str],
    after_path: str | PathLike[str],
) -> Diff:
    """Compare two lifted models by the names of their layers and nodes."""
    old, new = _layers(before), _layers(after)
    both = [(old[name], new[name]) for name in old if name in new]
    changed = [_layer_diff(a, b) for a, b in both if a != b]
    old_nodes = dict.fromkeys(op.name for op in before.ops)
    new_nodes = dict.fromkeys(op.name for op in after.ops)
    return Diff(
        schema_version=SCHEMA_VERSION,
        tool_version=__version__,
        before=Side(path_text(before_path), totals(before, "default")),
        after=Side(path_text(after_path), totals(after, "default")),
        layers=changed,
        removed_layers=[
            RemovedLayer(layer.name, layer.op_type, layer.output_shape, layer.macs, layer.params)
            for name, layer in old.items()
            if name not in new
        ],
        unchanged=len(both) - len(changed),
        added=[name for name in new_nodes if name not in old_nodes],
        removed=[name for name in old_nodes if name not in new_nodes],
    )


def _layers(graph: ChannelGraph) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers(graph, cost(graph, "macs"), "default")}


def _layer_diff(before: Layer, after: Layer) -> LayerDiff:
    return LayerDiff(
        name=before.name,
        op_type=after.op_type,
        output_before=before.output_shape,
        output_after=after.output_shape,
        macs=Change(before.macs, after.macs),
        params=Change(before.params, after.params),
    )
