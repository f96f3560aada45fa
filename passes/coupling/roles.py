"""Pass ``roles``: what every factor does at its operator.

A factor stands on axes of operands and of results. Its role follows from which of the operands
depend on a graph input (*activations*) and which do not (*weights*), from what the operator's
notation declares (it sums over the factor, or normalizes over it), and from whether the factor is
counted as arithmetic:

=============  ============================================================================
makes          its channels come from a weight: a kernel's output axis, an embedding's columns
sums over      removed elements contribute nothing: a kernel's input axis
normalizes     the others become something else without it: the axis of a LayerNorm or softmax
ties           it stands on several activations: their channels live and die together
passes on      it stands on one activation and on a result
=============  ============================================================================

Groups' producers and readers, gates, scores, costs, masks and explanations all read these flags.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.graph import Couplings, analysis
from morphgraph.ops import facts_of


@dataclass(frozen=True, eq=False)
class Roles:
    """Flags and counts per dim and factor, ``[vertices]`` each; those of dims are 0.

    Attributes:
        op_index: the factor's operator, by its place in ``ChannelGraph.ops``; -1 for dims.
        on_activations: on how many operands' axes it stands that a graph input reaches.
        on_weights: on how many operands' axes that none reaches.
        on_results: on how many results' axes.
        counted: it multiplies in one of the operator's cost terms.
        sums: the operator sums over it.
        normalizes: the operator normalizes, averages or competes over it.
        sums_operands: it belongs to an operator that adds or subtracts its operands.
        runs: its operator reads some activation.
    """

    op_index: IntArray
    on_activations: IntArray
    on_weights: IntArray
    on_results: IntArray
    counted: Flags
    sums: Flags
    normalizes: Flags
    sums_operands: Flags
    runs: Flags

    @cached_property
    def makes(self) -> Flags:
        """Its channels come from a weight, counted as arithmetic or not."""
        return _all(self.on_weights > 0, self.on_activations == 0, ~self.sums, ~self.normalizes)

    @cached_property
    def produces(self) -> Flags:
        """A layer makes its channels by arithmetic, so that a person would name that layer."""
        return _all(self.on_results > 0, self.on_activations == 0, self.counted, ~self.sums)

    @cached_property
    def reads(self) -> Flags:
        """The operator sums over it, or needs all of it for a statistic."""
        return self.sums | self.normalizes

    @cached_property
    def keeps(self) -> Flags:
        """It enters a statistic, and the result still has its channels, each in its place."""
        return _all(self.normalizes, ~self.sums, self.on_results > 0)

    @cached_property
    def sums_state(self) -> Flags:
        """Summed over before anybody outside sees it: the hidden state of a recurrent layer."""
        return _all(self.sums, self.runs, self.on_activations == 0)

    @cached_property
    def ties(self) -> Flags:
        """It stands on several activations."""
        return self.on_activations > 1

    @cached_property
    def adds(self) -> Flags:
        """It ties the terms of a sum: a residual connection."""
        return self.ties & self.sums_operands


def _all(*flags: Flags) -> Flags:
    together: Flags = np.logical_and.reduce(flags)
    return together


@analysis
def roles(couplings: Couplings) -> Roles:
    """The role of every factor at its operator.

    >>> from morphgraph.passes.coupling.couple import couple
    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text('''
    ... net (float[1,3] x, float[3,4] w) => (float[1,4] y) { y = MatMul(x, w) }''')
    >>> couplings = couple(model)
    >>> found = roles(couplings)
    >>> (op,) = couplings.ops
    >>> {name: bool(found.sums[vertex]) for name, vertex in sorted(op.factors.items())}
    {'k': True, 'm': False, 'n': False}
    """
    vertices = len(couplings.sizes)
    edges = couplings.columns
    on_result, on_weight = edges.port < 0, edges.on_weight

    def count(which: Flags) -> IntArray:
        return np.bincount(edges.factor[which], minlength=vertices)

    def flags(members: list[int]) -> Flags:
        chosen = np.zeros(vertices, dtype=bool)
        chosen[members] = True
        return chosen

    ops = couplings.ops
    op_index = np.full(vertices, -1, dtype=np.int64)
    for index, op in enumerate(ops):
        op_index[list(op.factors.values())] = index
    running = np.unique(edges.op_index[~on_result & ~on_weight])
    facts = [facts_of(op.ir) for op in ops]
    summing = [k for k, fact in enumerate(facts) if fact.adds or fact.subtracts]
    return Roles(
        op_index=op_index,
        on_activations=count(~on_result & ~on_weight),
        on_weights=count(~on_result & on_weight),
        on_results=count(on_result),
        counted=flags([factor for op in ops for term in op.macs for factor in term]),
        sums=flags([op.factors[name] for op in ops for name in op.contracted]),
        normalizes=flags([op.factors[name] for op in ops for name in op.statistical]),
        sums_operands=np.isin(op_index, summing),
        runs=np.isin(op_index, running),
    )
