"""Pass ``silence``: what has to be zero beside a dead channel, so that nobody reads a constant.

A channel is dead in training where the kernels that make it, or the scales that switch it off, are
zero. It may be a constant then, and no zero: the bias behind the kernel, the shift behind the
scale, what a sigmoid makes of zero. The resize cuts that off. A network that is to compute the same
before it must not read the constant either: of every operator that sums over the channel, the
kernel is zero there. Where no kernel reads it (keys and queries that are multiplied, a statistic),
what is added to the channel has to be zero.

Channels that are zero by themselves need nothing. So one that a plan takes back always has a
gradient: of its kernel, or of the kernels that read it.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from morphgraph.graph import ChannelGraph, Edge, GraphOp
from morphgraph.ops import OpNode, facts_of
from morphgraph.passes.analysis.zeros import NONE, Groups, added_operands, edges_on, zeros
from morphgraph.passes.coupling.roles import roles


@dataclass(frozen=True)
class Silencing:
    """An axis of a parameter whose slices of the dead channels of some groups are zero."""

    parameter: str
    axis: int
    groups: Groups


def silence(
    graph: ChannelGraph, killed: Iterable[Silencing], trained: Collection[str]
) -> list[Silencing]:
    """What has to be zero beside dead channels.

    Args:
        graph: the lifted network.
        killed: what is zero where a channel is dead: kernels or scales.
        trained: names of the parameters that may be changed.
    """
    return _Silencer(graph, killed, trained).run()


class _Silencer:
    def __init__(
        self, graph: ChannelGraph, killed: Iterable[Silencing], trained: Collection[str]
    ) -> None:
        self.graph = graph
        self.couplings = graph.couplings
        self.role = roles(graph.couplings)
        self.trained = trained
        at: dict[int, Groups] = {}
        for each in killed:
            dim = graph.dim(each.parameter, each.axis)
            at[dim] = at.get(dim, NONE) | each.groups
        self.dying = NONE.union(*at.values())
        self.zero = zeros(graph, at)
        self.found: dict[int, Groups] = {}  # per axis of a parameter

    def run(self) -> list[Silencing]:
        audible = NONE  # groups that someone reads who has no kernel to be zero
        for op_index, op in enumerate(self.graph.ops):
            for factor, places in edges_on(self.graph, op_index, self.dying).items():
                groups = self.dying & self.graph.groups_on(factor)
                outside = NONE.union(*(groups - self.zero[e.dim] for e in places if e.port < 0))
                audible |= self._read(op, factor, places, groups, groups - outside)
        self._silence_addends(audible)
        dims = self.couplings.dims
        return [Silencing(dims[k].value, dims[k].axis, groups) for k, groups in self.found.items()]

    # -- who reads the others ------------------------------------------------------------------

    def _read(
        self, op: GraphOp, factor: int, places: Sequence[Edge], groups: Groups, zero: Groups
    ) -> Groups:
        """Let an operator read nothing of a factor; the groups of which it reads all the same."""
        if self.role.sums_state[factor]:
            return self._silence_kernels(op, places, groups - zero)
        heard = NONE
        for edge in places if self.role.reads[factor] else ():
            if self.couplings.on_activation(edge):
                heard |= groups - self.zero.get(edge.dim, NONE)
        if not heard or self.role.normalizes[factor]:
            return heard
        return self._silence_kernels(op, places, heard)

    def _silence_kernels(self, op: GraphOp, places: Sequence[Edge], groups: Groups) -> Groups:
        """Let kernels be zero on these axes; the groups, where none can be."""
        if not groups:
            return NONE
        added = added_operands(op)
        kernels = [
            edge.dim
            for edge in places
            if edge.port >= 0 and edge.port not in added and self.couplings.on_weight(edge)
        ]
        parameters = [self._zeroed_by(dim) for dim in kernels]
        if not kernels or any(found is None for found in parameters):
            return groups
        for found in parameters:
            for dim in found or ():
                self.found[dim] = self.found.get(dim, NONE) | groups
        return NONE

    def _silence_addends(self, groups: Groups) -> None:
        """Let nothing be added to the channels of some groups, nor looked up in a table."""
        for op_index, op in enumerate(self.graph.ops if groups else ()):
            facts = facts_of(op.ir)
            ports = {*added_operands(op), *facts.tables}
            edges = self.graph.edges_of(op_index)
            if all(self.couplings.on_weight(edge) for edge in edges if edge.port < 0):
                continue  # it computes a weight: that is zero as a whole where somebody adds it
            for edge in edges:
                adds = facts.adds or facts.subtracts or edge.port in ports
                adds |= self.role.makes[edge.factor] and not self.role.counted[edge.factor]
                here = groups & self.graph.groups_on(edge.factor)
                if not adds or not here or edge.port < 0 or not self.couplings.on_weight(edge):
                    continue
                for dim in self._zeroed_by(edge.dim) or ():
                    self.found[dim] = self.found.get(dim, NONE) | here

    def _zeroed_by(self, dim: int) -> tuple[int, ...] | None:
        """The axes of parameters that must be zero for an axis of a weight; None: none can."""
        name = self.couplings.dims[dim].value
        if name in self.trained:
            return (dim,)
        op_index = self.graph.makers.get(name)
        if op_index is None:
            return None
        op = self.graph.ops[op_index]
        facts, edges = facts_of(op.ir), self.graph.edges_of(op_index)
        factors = {edge.factor for edge in edges if edge.dim == dim and edge.port < 0}
        places = {e.port: e.dim for e in edges if e.factor in factors and e.port >= 0}
        wanted = self.graph.groups_on(dim) & self.dying
        places = {port: at for port, at in places.items() if self.graph.groups_on(at) & wanted}
        parts = [self._zeroed_by(at) for at in places.values()]
        if facts.adds or facts.subtracts:
            every = len(places) == sum(value is not None for value in op.ir.inputs)
        elif op.gate or op.macs or facts.powers is not None:
            powers = _powers(op)
            found = [part for port, part in zip(places, parts, strict=True) if powers(port) > 0]
            divisors = self._divisors(dim)
            return next((p for p in found if p is not None and not divisors & set(p)), None)
        else:
            every = bool(places) and (facts.moves or facts.inert or facts.converts)
        if not every or any(part is None for part in parts):
            return None
        return tuple(dict.fromkeys(axis for part in parts for axis in part or ()))

    def _divisors(self, dim: int, *, below: bool = False) -> set[int]:
        """The axes of parameters that a weight is divided by on this axis: never to be zero.

        Args:
            below: whether the axis is that of a divisor.
        """
        name = self.couplings.dims[dim].value
        op_index = self.graph.makers.get(name)
        if op_index is None:
            return {dim} if below else set()
        edges = self.graph.edges_of(op_index)
        factors = {edge.factor for edge in edges if edge.dim == dim and edge.port < 0}
        powers = _powers(self.graph.ops[op_index])
        return {
            axis
            for edge in edges
            if edge.port >= 0 and edge.factor in factors
            for axis in self._divisors(edge.dim, below=below or powers(edge.port) < 0)
        }


def _powers(op: GraphOp) -> Callable[[int], float]:
    """By operand the power of it that a product is proportional to; where nothing says it, 1."""
    facts = facts_of(op.ir)
    if facts.powers is None:
        return lambda _port: 1.0
    powers = facts.call(facts.powers, op.ir, OpNode(op.ir))
    return lambda port: powers.get(port, 0.0)
