"""Pass ``zeros``: on which axes the dead channels of a group are zero, whatever the inputs are.

One walk forwards, from the weights that are zero there. A product is zero where one of its operands
is, a sum where all are, and a function of one operand where it is zero at zero.
"""

from collections.abc import Mapping, Sequence

from morphgraph.graph import ChannelGraph, Edge, GraphOp
from morphgraph.ops import OpNode, facts_of
from morphgraph.passes.coupling.roles import roles

Groups = frozenset[int]
"""Indices of groups."""
NONE = Groups()


def zeros(
    graph: ChannelGraph, killed: Mapping[int, Groups], *, nearly: bool = False
) -> dict[int, Groups]:
    """Per axis the groups whose dead channels are zero there.

    Args:
        graph: the lifted network.
        killed: the same of weights alone: by axis of a weight the groups whose dead channels have
            zeros there.
        nearly: whether zeros less a mean over the channels count as zeros: the mean is small
            beside the channels that are left.
    """
    return _Walk(graph, killed, nearly).run()


class _Walk:
    def __init__(self, graph: ChannelGraph, killed: Mapping[int, Groups], nearly: bool) -> None:
        self.graph = graph
        self.nearly = nearly
        self.couplings = graph.couplings
        self.role = roles(graph.couplings)
        self.zero = dict(killed)
        self.dying = NONE.union(*killed.values())

    def run(self) -> dict[int, Groups]:
        for op_index, op in enumerate(self.graph.ops):
            results: dict[int, list[tuple[Groups, Groups]]] = {}
            for factor, places in edges_on(self.graph, op_index, self.dying).items():
                groups = self.dying & self.graph.groups_on(factor)
                zero = Groups(k for k in groups if self._is_zero(op, factor, places, k))
                for edge in places:
                    if edge.port < 0:
                        results.setdefault(edge.dim, []).append((groups, zero))
            for dim, parts in results.items():
                on_axis = NONE.union(*(groups for groups, _ in parts))
                loud = NONE.union(*(groups - zero for groups, zero in parts))
                self.zero[dim] = on_axis - loud
        return self.zero

    def _is_zero(self, op: GraphOp, factor: int, places: Sequence[Edge], group: int) -> bool:
        """Whether dead channels of a group are zero in what an operator gives."""
        facts = facts_of(op.ir)
        there: dict[int, bool] = {}
        for edge in places:
            if edge.port >= 0:
                here = group in self.zero.get(edge.dim, NONE)
                there[edge.port] = here or there.get(edge.port, False)
        given = [port for port, value in enumerate(op.ir.inputs) if value is not None]
        if op.opaque is not None or facts.open_at_zero or not there:
            return False
        if self.nearly and facts.subtracts and self._is_mean(op):
            return there.get(0, False)
        added = given if facts.adds or facts.subtracts else added_operands(op)
        if not all(there.get(port, False) for port in added):
            return False
        if facts.adds or facts.subtracts:
            return True
        factors = {port: zero for port, zero in there.items() if port not in added}
        if facts.mixes is not None:
            return factors.get(facts.mixes, False)
        if facts.scale is not None:
            normed = bool(facts.mean_power) and not facts.centers and factors.get(0, False)
            return normed or factors.get(facts.scale, False)
        if facts.powers is not None:
            powers = facts.call(facts.powers, op.ir, OpNode(op.ir))
            return any(powers.get(port, 0) > 0 for port, zero in factors.items() if zero)
        if self.role.sums_state[factor] or facts.moves or facts.inert or facts.converts:
            return bool(factors) and all(factors.values())
        if op.gate or op.macs:
            return any(factors.values())
        return all(factors.values()) and _is_zero_at_zero(op, given)

    def _is_mean(self, op: GraphOp) -> bool:
        """Whether what an operator subtracts is a mean."""
        value = op.ir.inputs[1]
        maker = self.graph.makers.get("" if value is None else value.name or "")
        return maker is not None and facts_of(self.graph.ops[maker].ir).mean_power == 1


def edges_on(graph: ChannelGraph, op_index: int, groups: Groups) -> dict[int, list[Edge]]:
    """By factor of an operator that some groups are on where it stands."""
    found: dict[int, list[Edge]] = {}
    for edge in graph.edges_of(op_index):
        if groups & graph.groups_on(edge.factor):
            found.setdefault(edge.factor, []).append(edge)
    return found


def _is_zero_at_zero(op: GraphOp, given: Sequence[int]) -> bool:
    """Whether an operator that is not described as open is a function of one operand."""
    clamp = facts_of(op.ir).clamp
    if clamp is not None:
        ends = facts_of(op.ir).call(clamp, op.ir, OpNode(op.ir))
        return ends is not None and ends[0] <= 0 <= ends[1]
    # Whole numbers beside the operand are sizes or axes.
    values = [value for port in given if (value := op.ir.inputs[port]) is not None]
    return sum(v.dtype is None or not v.dtype.is_integer() for v in values) == 1


def added_operands(op: GraphOp) -> list[int]:
    """The operands that an operator adds to what it has multiplied."""
    facts = facts_of(op.ir)
    ports = {facts.offset, facts.shift, *facts.zeros}
    return [port for port, value in enumerate(op.ir.inputs) if value is not None and port in ports]
