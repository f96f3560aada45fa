"""Layers whose kernels were frozen at the export: their channels are held.

What nobody trains keeps what it learned elsewhere; a plan leaves it alone unless it is asked. A
network that is frozen as a whole is one in inference, and says nothing.
"""

from dataclasses import replace

import onnx_ir as ir

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, frozen_names
from morphgraph.passes.coupling.fixed_readers import stored_in
from morphgraph.passes.coupling.roles import roles


def hold_frozen(graph: ChannelGraph) -> ChannelGraph:
    """The graph with those groups held whose channels a frozen kernel makes."""
    frozen = frozen_names(graph.model)
    if not frozen:
        return graph
    role, couplings = roles(graph.couplings), graph.couplings
    found: dict[int, str] = {}
    for edge in couplings.edges:
        makes = role.counted[edge.factor] and role.on_results[edge.factor]
        if edge.port < 0 or not makes or role.sums[edge.factor] or not couplings.on_weight(edge):
            continue
        value = graph.ops[edge.op_index].ir.inputs[edge.port]
        name = _frozen_part(value, frozen)
        if name is not None:
            for index in graph.groups_on(edge.factor):
                found.setdefault(index, f"'{escape(name)}' is frozen (include overrides)")
    return replace(
        graph,
        groups=tuple(
            replace(group, reason=found[group.index], held=True)
            if group.resizable and group.index in found
            else group
            for group in graph.groups
        ),
    )


def _frozen_part(value: ir.Value | None, frozen: frozenset[str]) -> str | None:
    """The frozen parameter that a weight is, or is computed from."""
    stored = [] if value is None else stored_in(value)
    return next((v.name for v in stored if v.name in frozen), None)
