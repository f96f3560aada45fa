"""Pass ``gates``: which groups' channels learned scales can switch off.

A scale is a norm's, or a parameter that multiplies every channel (a layer scale). A group is gated
if scales cut every path from its producers to its readers: after the convolution, before the next
one (pre-activation), on both arms of a residual sum, or after a concatenation (DenseNet). A product
is silent where one operand is zero, so there one gated operand is enough; but not a scale before a
sigmoid, which is open at zero, and not that of a norm with a shift: at a scale of zero the product
is still the shift times the other operand.

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
from morphgraph.ops import facts_of, parameter_names
from morphgraph.passes.analysis.channel_sources import channel_scales
from morphgraph.passes.coupling.roles import roles

Groups = frozenset[int]
"""Indices of groups."""
_NONE = Groups()


def gated_groups(graph: ChannelGraph) -> Groups:
    """Indices of the resizable groups whose every path passes a scale before it is read."""
    return _gates(graph).gated


def closing_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes."""
    gates = _gates(graph)
    by_scale: dict[str, Groups] = {}
    for op_index, groups in gates.closed.items():
        name = gates.scales[op_index]
        by_scale[name] = by_scale.get(name, _NONE) | groups
    return by_scale


def deciding_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes last: no other one follows.

    A BatchNorm undoes whatever scale a channel had before: after ``conv -> bn -> relu -> depthwise
    conv -> bn`` nothing resists a penalty on the first scale, which falls at the same rate in all
    channels, useful or not, until it is zero and the channel holds nothing. The last scale alone
    says how much of a channel is read.
    """
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
    deciding = dict.fromkeys(gates.scales.values(), _NONE)
    for op_index, op in reversed(list(enumerate(graph.ops))):
        behind = _union(awaited, [value.name or "" for value in op.ir.outputs])
        closed = gates.closed.get(op_index, _NONE)
        if op_index in gates.scales:
            deciding[gates.scales[op_index]] |= behind & closed
        before = behind - closed
        before |= read.get(op_index, _NONE) - gates.seen_by_statistic_only.get(op_index, _NONE)
        before |= read_by_state.get(op_index, _NONE)
        for value in op.ir.inputs:
            if value is not None:
                name = value.name or ""
                awaited[name] = awaited.get(name, _NONE) | (before & on_value.get(name, _NONE))
    return deciding


@dataclass(frozen=True)
class _Gates:
    """What the way from producers to readers shows; operators by their index.

    Attributes:
        gated: the groups that scales cut on every path.
        scales: per operator with a scale the parameter's name.
        closed: per such operator the groups that it closes.
        seen_by_statistic_only: per operator the groups that arrive open, on no other path, and
            enter nothing of it but a statistic.
    """

    gated: Groups
    scales: Mapping[int, str]
    closed: Mapping[int, Groups]
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
    kept_by_statistic = {
        op_index: groups - lost.get(op_index, _NONE)
        for op_index, groups in _groups_by_op(graph, role.keeps).items()
    }
    scales = channel_scales(graph)

    open_on: dict[str, Groups] = {}  # per value the groups that no scale has cut yet
    multi_use: dict[str, Groups] = {}  # of those the ones that also go another way
    nonzero_when_off: dict[str, bool] = {}  # values that are not zero where their scale is
    ungated: set[int] = set()
    closed: dict[int, Groups] = {}
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

        zero_when_off = [name for name in activations if not nonzero_when_off.get(name)]
        arriving = _arriving(op, activations, zero_when_off, open_on, on_value)
        if op_index in scales:
            scaled = Groups(graph.channel_group[scales[op_index].channels].tolist()) - {-1}
            closed[op_index] = scaled - (reading - by_statistic)
            arriving -= closed[op_index]
        if op_index in scales:
            is_nonzero = _has_shift(graph, op)
        else:
            is_nonzero = _is_nonzero_at_zero(op) or _stays_nonzero(op, activations, zero_when_off)
        results = [value for value in op.ir.outputs if value.name]
        for value in results:
            name = value.name or ""
            open_on[name] = (arriving | made.get(op_index, _NONE)) & on_value.get(name, _NONE)
            ways = len(value.uses()) + value.is_graph_output() + len(results) - 1
            multi_use[name] = open_on[name] if ways > 1 else open_on[name] & elsewhere
            nonzero_when_off[name] = is_nonzero
    resizable = {group.index for group in graph.groups if group.can_change}
    return _Gates(
        gated=Groups((resizable & _NONE.union(*closed.values())) - ungated),
        scales={op_index: source.parameter for op_index, source in scales.items()},
        closed=closed,
        seen_by_statistic_only=seen_by_statistic_only,
    )


def _union(groups: Mapping[str, Groups], names: Iterable[str]) -> Groups:
    return _NONE.union(*(groups.get(name, _NONE) for name in names))


def _is_nonzero_at_zero(op: GraphOp) -> bool:
    return facts_of(op.ir).open_at_zero


def _has_shift(graph: ChannelGraph, op: GraphOp) -> bool:
    """Whether an operator adds something to what it scales, or will after training."""
    port = facts_of(op.ir).offset
    shift = op.ir.inputs[port] if port is not None and port < len(op.ir.inputs) else None
    if shift is None:
        return False
    constant = shift.const_value
    if constant is None or shift.name in parameter_names(graph.model):
        return True
    return bool(constant.numpy().any())


def _stays_nonzero(op: GraphOp, activations: Sequence[str], zero_when_off: Sequence[str]) -> bool:
    """Whether a result is not zero because operands are not: one of a sum, all of a product."""
    if op.contracted:
        return False
    if op.gate:
        return bool(activations) and not zero_when_off
    return len(zero_when_off) < len(activations)


def _arriving(
    op: GraphOp,
    activations: Iterable[str],
    zero_when_off: Iterable[str],
    open_on: Mapping[str, Groups],
    on_value: Mapping[str, Groups],
) -> Groups:
    """Groups that reach the operator's result on a path that no scale has cut yet."""
    arriving = _union(open_on, activations)
    if not op.gate:
        return arriving
    # Of a product it is enough that one factor is cut, and zero where its scale is.
    cut = (on_value.get(name, _NONE) - open_on.get(name, _NONE) for name in zero_when_off)
    return arriving - _NONE.union(*cut)


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
