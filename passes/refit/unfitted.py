"""Which kernels lose inputs, and are fitted by nobody: they stay slices of what they were."""

from collections.abc import Collection

import onnx_ir as ir

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.coupling.roles import roles


def unfitted(
    graph: ChannelGraph, selection: AxisSelection, small: ir.Model, fitted: Collection[str]
) -> tuple[str, ...]:
    """Names of the nodes that sum over channels that go, with kernels that a fit does not reach.

    Args:
        graph: the lifted network.
        selection: which positions stay.
        small: the resized network.
        fitted: names of the nodes whose kernels are fitted.
    """
    role, couplings = roles(graph.couplings), graph.couplings
    left = {node.name or "" for node in small.graph}
    found: dict[str, None] = {}
    for edge in couplings.edges:
        name = graph.ops[edge.op_index].name
        is_kernel = edge.port >= 0 and not couplings.on_activation(edge)
        if not is_kernel or not role.sums[edge.factor] or name in fitted or name not in left:
            continue
        if selection.vertex(edge.dim) is not None:
            found[name] = None
    return tuple(found)
