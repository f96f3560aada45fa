"""Pass ``gates``: which groups' channels learned scales can switch off.

A scale is a norm's, or a parameter that multiplies every channel (a layer scale). A group is gated
if scales cut every path from its producers to its readers: after the convolution, before the next
one (pre-activation), on both arms of a residual sum, or after a concatenation (DenseNet). A product
is silent where one operand is zero, so there one gated operand is enough; but not a scale before a
sigmoid, which is open at zero. Behind a norm with a shift scale and shift close a product together
(squeeze-and-excitation): with the scale alone at zero it is still the shift times the other
operand. Elsewhere a shift leaves a constant, which the next bias can take, and the scale decides.

Some norms have statistics over the channels themselves (LayerNorm, GroupNorm). Their scale closes a
channel if the statistic is all that sees it before. Where the channel also goes around the norm, as
in the residual stream of a transformer with norms first, the norm is one of its readers.

One walk forwards follows the groups that are still *open* on every value: made, and not yet scaled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Flags
from morphgraph.graph import ChannelGraph, GraphOp, analysis
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.channel_sources import channel_scales, channel_shifts
from morphgraph.passes.coupling.roles import roles

Groups = frozenset[int]
"""Indices of groups."""
_NONE = Groups()
_Silent = Mapping[int, frozenset[str]]
"""Groups of a value that are zero where their scales are, and the shifts that must be zero, too."""


def gated_groups(graph: ChannelGraph) -> Groups:
    """Indices of the resizable groups whose every path passes a scale before it is read."""
    return _gates(graph).gated


def closing_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes."""
    gates = _gates(graph)
    return _joined((gates.scales[k], groups) for k, groups in gates.closed.items())


def closing_shifts(graph: ChannelGraph) -> dict[str, Groups]:
    """Per shift, by its parameter's name, the groups that a product cuts only if it is zero, too.

    Scale and shift then close the channel together.
    """
    return _joined(pair for by_shift in _gates(graph).relied.values() for pair in by_shift.items())


def deciding_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes last: no other one follows.

    A BatchNorm undoes whatever scale a channel had before: after ``conv -> bn -> relu -> depthwise
    conv -> bn`` nothing resists a penalty on the first scale, which falls at the same rate in all
    channels, useful or not, until it is zero and the channel holds nothing. The last scale alone
    says how much of a channel is read.
    """
    gates, behind = _gates(graph), _awaited_behind(graph)
    return _joined(
        (name, behind[k] & gates.closed.get(k, _NONE)) for k, name in gates.scales.items()
    )


def deciding_shifts(graph: ChannelGraph) -> dict[str, Groups]:
    """Those of :func:`closing_shifts` whose products no other scale follows."""
    behind = _awaited_behind(graph)
    return _joined(
        (name, behind[k] & groups)
        for k, by_shift in _gates(graph).relied.items()
        for name, groups in by_shift.items()
    )


def _joined(pairs: Iterable[tuple[str, Groups]]) -> dict[str, Groups]:
    """The groups of every name together."""
    joined: dict[str, Groups] = {}
    for name, groups in pairs:
        joined[name] = joined.get(name, _NONE) | groups
    return joined


@analysis
def _awaited_behind(graph: ChannelGraph) -> list[Groups]:
    """Per operator the groups that are read behind it with no scale between."""
    gates = _gates(graph)
    role = roles(graph.couplings)
    on_value = _groups_on_values(graph)
    read = _groups_by_op(graph, role.reads)
    read_by_state = _groups_by_op(graph, role.sums_state)
    # Backwards: the groups that are read behind a value with no scale between.
    awaited: dict[str, Groups] = {
        value.name or "": on_value.get(value.name or "", _NONE)
        for value in graph.model.graph.outputs
    }
    behind_ops: list[Groups] = []
    for op_index, op in reversed(list(enumerate(graph.ops))):
        behind = _union(awaited, [value.name or "" for value in op.ir.outputs])
        behind_ops.append(behind)
        before = behind - gates.closed.get(op_index, _NONE)
        before |= read.get(op_index, _NONE) - gates.seen_by_statistic_only.get(op_index, _NONE)
        before |= read_by_state.get(op_index, _NONE)
        for value in op.ir.inputs:
            if value is not None:
                name = value.name or ""
                awaited[name] = awaited.get(name, _NONE) | (before & on_value.get(name, _NONE))
    return behind_ops[::-1]


@dataclass(frozen=True)
class _Gates:
    """What the way from producers to readers shows; operators by their index.

    Attributes:
        gated: the groups that scales cut on every path.
        scales: per operator with a scale the parameter's name.
        closed: per such operator the groups that it closes.
        relied: per product and shift the groups that are cut there only if the shift is zero, too.
        seen_by_statistic_only: per operator the groups that arrive open, on no other path, and
            enter nothing of it but a statistic.
    """

    gated: Groups
    scales: Mapping[int, str]
    closed: Mapping[int, Groups]
    relied: Mapping[int, Mapping[str, Groups]]
    seen_by_statistic_only: Mapping[int, Groups]


@analysis
def _gates(graph: ChannelGraph) -> _Gates:
    role = roles(graph.couplings)
    on_value = _groups_on_values(graph)
    made = _groups_by_op(graph, role.makes)
    read = _groups_by_op(graph, role.reads)
    read_by_state = _groups_by_op(graph, role.sums_state)
    # A group that also enters the operator in a way that loses its channels is simply read.
    lost = _groups_by_op(graph, role.reads & ~role.keeps)
    keeping = _groups_by_op(graph, role.keeps)
    kept_by_statistic = {
        op_index: groups - lost.get(op_index, _NONE) for op_index, groups in keeping.items()
    }
    scales = channel_scales(graph)

    open_on: dict[str, Groups] = {}  # per value the groups that no scale has cut yet
    multi_use: dict[str, Groups] = {}  # of those the ones that also go another way
    silent: dict[str, _Silent] = {}
    ungated: set[int] = set()
    closed: dict[int, Groups] = {}
    relied: dict[int, dict[str, Groups]] = {}
    seen_by_statistic_only: dict[int, Groups] = {}
    for op_index, op in enumerate(graph.ops):
        operands = [value.name or "" for value in op.ir.inputs if value is not None]
        activations = [n for n in operands if n not in graph.couplings.input_independent]
        reading = read.get(op_index, _NONE)
        arrived = _union(open_on, activations)
        # A statistic that sees a group is no reader of it, if nobody else sees the group: a
        # scale behind the statistic still closes it.
        elsewhere = _union(multi_use, activations)
        by_statistic = (arrived & kept_by_statistic.get(op_index, _NONE)) - elsewhere
        seen_by_statistic_only[op_index] = by_statistic
        ungated |= (arrived & reading) - by_statistic
        ungated |= read_by_state.get(op_index, _NONE)

        here: _Silent = _silent_behind(op, activations, silent, on_value)
        if op.gate:
            # Of a product it is enough that one factor is cut, and zero where its scale is.
            varying = arrived | _beside(activations, on_value)
            cut = varying & here.keys()
            relied[op_index] = _joined((n, Groups({k})) for k in cut for n in here[k])
            arriving = varying - cut
        else:
            arriving = arrived
        if op_index in scales:
            scaled = Groups(graph.channel_group[scales[op_index].channels].tolist()) - {-1}
            closed[op_index] = scaled - (reading - by_statistic)
            arriving -= closed[op_index]
        # A channel at zero that enters a statistic comes out as what the others make of it.
        kept_zero = here.keys() - keeping.get(op_index, _NONE)
        here = {k: here[k] for k in kept_zero} | dict.fromkeys(
            closed.get(op_index, _NONE), frozenset()
        )
        here = _with_shifts(graph, op, here)
        results = [value for value in op.ir.outputs if value.name]
        for value in results:
            name = value.name or ""
            open_on[name] = (arriving | made.get(op_index, _NONE)) & on_value.get(name, _NONE)
            ways = len(value.uses()) + value.is_graph_output() + len(results) - 1
            multi_use[name] = open_on[name] if ways > 1 else open_on[name] & elsewhere
            left = on_value.get(name, _NONE) - open_on[name]
            silent[name] = {k: here[k] for k in here.keys() & left}
    resizable = {group.index for group in graph.groups if group.can_change}
    return _Gates(
        gated=Groups((resizable & _NONE.union(*closed.values())) - ungated),
        scales={op_index: source.parameter for op_index, source in scales.items()},
        closed=closed,
        relied=relied,
        seen_by_statistic_only=seen_by_statistic_only,
    )


def _union(groups: Mapping[str, Groups], names: Iterable[str]) -> Groups:
    return _NONE.union(*(groups.get(name, _NONE) for name in names))


def _beside(activations: Sequence[str], on_value: Mapping[str, Groups]) -> Groups:
    """Groups of some operand that another one has not: it acts on all channels (spatial gates)."""
    on_operands = [on_value.get(name, _NONE) for name in activations]
    everywhere = frozenset.intersection(*on_operands) if on_operands else _NONE
    return _NONE.union(*on_operands) - everywhere


def _silent_behind(
    op: GraphOp,
    activations: Sequence[str],
    silent: Mapping[str, _Silent],
    on_value: Mapping[str, Groups],
) -> dict[int, frozenset[str]]:
    """What the operator leaves at zero of what arrives at zero, whatever it scales and adds.

    A product is zero where one factor is: that with the fewest shifts. Others are zero where all
    operands of the group are; a sum where all operands are.
    """
    facts = facts_of(op.ir)
    if facts.open_at_zero or facts.scale is not None:
        return {}
    found: dict[int, frozenset[str]] = {}
    for index in _NONE.union(*(silent.get(name, {}) for name in activations)):
        at = [silent.get(name, {}).get(index) for name in activations]
        zero = [shifts for shifts in at if shifts is not None]
        if op.gate:
            found[index] = min(zero, key=lambda shifts: (len(shifts), sorted(shifts)))
            continue
        everything = facts.adds or facts.subtracts
        needed = [n for n in activations if everything or index in on_value.get(n, _NONE)]
        if len(zero) == len(needed):
            found[index] = frozenset().union(*zero)
    return found


def _with_shifts(graph: ChannelGraph, op: GraphOp, silent: _Silent) -> _Silent:
    """What is still zero behind what the operator adds, if that is zero."""
    for shift in channel_shifts(graph, op) if silent else ():
        if shift is None:
            return {}
        groups = set(graph.channel_group[shift.channels].tolist())
        silent = {k: silent[k] | {shift.parameter} for k in silent.keys() & groups}
    return silent


@analysis
def _groups_on_values(graph: ChannelGraph) -> dict[str, Groups]:
    on_value: dict[str, Groups] = {}
    for vertex, dim in enumerate(graph.couplings.dims):
        if groups := graph.groups_on(vertex):
            on_value[dim.value] = on_value.get(dim.value, _NONE) | groups
    return on_value


def _groups_by_op(graph: ChannelGraph, flags: Flags) -> dict[int, Groups]:
    """Per operator the groups on those of its factors that are flagged."""
    op_index = roles(graph.couplings).op_index
    by_op: dict[int, Groups] = {}
    for vertex in np.flatnonzero(flags).tolist():
        index = int(op_index[vertex])
        by_op[index] = by_op.get(index, _NONE) | graph.groups_on(vertex)
    return by_op
