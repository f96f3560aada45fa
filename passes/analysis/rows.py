"""Tables whose rows are named by number at run time (embeddings), and which inputs name them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.graph import ChannelGraph, analysis


@dataclass(frozen=True)
class Rows:
    """The rows of a table.

    Attributes:
        axis: of the rows.
        count: how many there are.
        groups: indices of the groups that the rows are channels of.
        inputs: graph inputs that hold numbers of rows, as they are.
    """

    axis: int
    count: int
    groups: frozenset[int]
    inputs: frozenset[str]


@analysis
def tables(graph: ChannelGraph) -> Mapping[str, Rows]:
    """By name the tables whose rows may change: of a graph lifted with ``pin_rows=False``."""
    found: dict[str, Rows] = {}
    couplings = graph.couplings
    for edge in couplings.edges:
        if edge.factor in couplings.rows and edge.port >= 0:
            dim = couplings.dims[edge.dim]
            numbers = _source(graph.ops[edge.op_index].ir.inputs[1 - edge.port])
            before = found.get(dim.value)
            inputs = {name for name in [numbers] if name} | (before.inputs if before else set())
            groups = graph.groups_on(edge.factor)
            found[dim.value] = Rows(
                dim.axis, int(couplings.sizes[edge.dim]), groups, frozenset(inputs)
            )
    return found


def _source(value: ir.Value | None) -> str | None:
    """The graph input that a value holds as it is, in whatever shape and type."""
    while value is not None and (node := value.producer()) is not None:
        operands = [each for each in node.inputs if each is not None and each.const_value is None]
        if len(operands) != 1 or len(node.outputs) != 1:
            return None
        value = operands[0]
    return value.name if value is not None and value.is_graph_input() else None


def renumbered(
    graph: ChannelGraph, keep: Mapping[int, IntArray], feeds: Mapping[str, Array]
) -> tuple[Arrays, Arrays]:
    """Inputs for the original and for the resized network, where rows of tables go.

    Numbers of rows that stay are counted anew for the resized network; in place of a row that does
    not stay both get one that does.

    Args:
        graph: the original.
        keep: per group index the channels that stay.
        feeds: inputs of the original.
    """
    original, small = dict(feeds), dict(feeds)
    for rows in tables(graph).values():
        for index in rows.groups & keep.keys():
            kept = keep[index]
            if len(kept) < rows.count:
                number = np.arange(rows.count) % len(kept)
                number[kept] = np.arange(len(kept))
                for name in rows.inputs & feeds.keys():
                    small[name] = number[feeds[name]].astype(feeds[name].dtype)
                    original[name] = kept[small[name]].astype(feeds[name].dtype)
    return original, small
