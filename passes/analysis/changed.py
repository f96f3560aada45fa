"""Which values of a network become others when channels go, and which are slices of what they were.

A value changes where its operator sums over removed elements, or needs all of an axis for a
statistic, or reads a value that has changed.
"""

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.coupling.roles import roles


def changed_values(graph: ChannelGraph, selection: AxisSelection) -> frozenset[str]:
    """The names of values whose elements that stay are not what they were.

    >>> import numpy as np
    >>> from morphgraph.passes.lift import lift
    >>> from morphgraph.testing import model_from_text
    >>> graph = lift(model_from_text('''
    ... net (float[1,3] x, float[3,4] a, float[4,2] b) => (float[1,2] y) {
    ...     p = MatMul(x, a)  r = Relu(p)  y = MatMul(r, b)
    ... }'''))
    >>> hidden = next(group.index for group in graph.groups if group.resizable)
    >>> sorted(changed_values(graph, AxisSelection(graph, {hidden: np.arange(3)})))
    ['y']
    """
    couplings, role = graph.couplings, roles(graph.couplings)
    losing = {
        edge.op_index
        for edge in couplings.edges
        if role.reads[edge.factor] and selection.vertex(edge.dim) is not None
    }
    losing |= {  # they number the elements of an axis
        op_index
        for op_index, numbers in couplings.numbered.items()
        if any(selection.vertex(factor) is not None for factor in numbers.values())
    }
    changed: set[str] = set()
    for op_index, op in enumerate(graph.ops):
        operands = (*(value.name for value in op.ir.inputs if value is not None), *op.captured)
        if op_index in losing or any(name in changed for name in operands):
            changed.update(value.name for value in op.ir.outputs if value.name)
    return frozenset(changed)
