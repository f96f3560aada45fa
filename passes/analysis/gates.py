"""Pass ``gates``: which groups' channels learned scales can switch off.

A scale is a norm's, or a parameter that multiplies every channel (a layer scale). A group is gated
if scales cut every path from its producers to its readers: after the convolution, before the next
one (pre-activation), on both arms of a residual sum, or after a concatenation (DenseNet). A product
is silent where one operand is, so there one gated operand is enough; but not a scale before a
sigmoid, which is open at zero.

Some norms have statistics over the channels themselves (LayerNorm, GroupNorm). Their scale closes a
channel if the statistic is all that sees it before. Where the channel also goes around the norm, as
in the residual stream of a transformer with norms first, the norm is one of its readers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from morphgraph.graph import ChannelGraph, GraphOp
from morphgraph.ops import entry_of
from morphgraph.passes.analysis.channel_sources import channel_scales

Groups = frozenset[int]
"""Indices of groups."""


def gated_groups(graph: ChannelGraph) -> Groups:
    """Indices of the resizable groups whose every path passes a scale before it is read."""
    return _gates(graph).gated


def closing_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes."""
    found: dict[str, Groups] = {}
    for number, groups in _gates(graph).closed.items():
        name = _gates(graph).scales[number]
        found[name] = found.get(name, Groups()) | groups
    return found


def deciding_scales(graph: ChannelGraph) -> dict[str, Groups]:
    """Per scale, by its parameter's name, the groups that it closes last: no other one follows.

    A BatchNorm undoes whatever scale a channel had before: after ``conv -> bn -> relu -> depthwise
    conv -> bn`` nothing resists a penalty on the first scale, which falls at the same rate in all
    channels, useful or not, until it is zero and the channel holds nothing. The last scale alone
    says how much of a channel is read.
    """
    gates = _gates(graph)
    on_value = _groups_on_values(graph)
    _, read = _roles(graph)
    inside = _read_inside(graph)
    awaited: dict[str, Groups] = {  # groups that are read behind a value, no scale between
        value.name or "": on_value.get(value.name or "", Groups())
        for value in graph.model.graph.outputs
    }
    found = dict.fromkeys(gates.scales.values(), Groups())
    for number, node in reversed(list(enumerate(graph.ops))):
        passed = Groups().union(
            *(awaited.get(value.name or "", Groups()) for value in node.ir.outputs)
        )
        closed = gates.closed.get(number, Groups())
        if number in gates.scales:
            found[gates.scales[number]] |= passed & closed
        here = passed - closed
        here |= read.get(number, Groups()) - gates.noticed.get(number, Groups())
        here |= inside.get(number, Groups())
        for value in node.ir.inputs:
            if value is not None:
                name = value.name or ""
                groups = here & on_value.get(name, Groups())
                awaited[name] = awaited.get(name, Groups()) | groups
    return found


@dataclass(frozen=True)
class _Gates:
    """What the way from producers to readers shows; nodes by their place in ``graph.ops``.

    Attributes:
        gated: the groups that scales cut on every path.
        scales: per node with a scale the parameter's name.
        closed: per such node the groups that it closes.
        noticed: per node the groups that arrive open, on no other path, and enter a statistic only.
    """

    gated: Groups
    scales: Mapping[int, str]
    closed: Mapping[int, Groups]
    noticed: Mapping[int, Groups]


def _gates(graph: ChannelGraph) -> _Gates:
    if "gates" not in graph.cache:
        graph.cache["gates"] = _found_gates(graph)
    found: _Gates = graph.cache["gates"]
    return found


def _found_gates(graph: ChannelGraph) -> _Gates:
    on_value = _groups_on_values(graph)
    made, read = _roles(graph)
    inside = _read_inside(graph)
    kept = _kept_by_statistics(graph)
    sources = channel_scales(graph)
    open_on: dict[str, Groups] = {}
    forked: dict[str, Groups] = {}  # of those the ones that also go another way
    loud: dict[str, bool] = {}  # values that a scale does not silence, whatever it is
    leaking: set[int] = set()
    closed: dict[int, Groups] = {}
    noticed: dict[int, Groups] = {}
    for number, node in enumerate(graph.ops):
        operands = [value.name or "" for value in node.ir.inputs if value is not None]
        activations = [name for name in operands if name not in graph.couplings.input_independent]
        reading = read.get(number, Groups())
        unnoticed = Groups().union(*(forked.get(name, Groups()) for name in activations))
        arrived = Groups().union(*(open_on.get(name, Groups()) for name in activations))
        noticed[number] = (arrived & kept.get(number, Groups())) - unnoticed
        leaking |= (arrived & reading) - noticed[number]
        leaking |= inside.get(number, Groups())
        silent = [name for name in activations if not loud.get(name)]
        arriving = _arriving(node, activations, silent, open_on, on_value)
        is_loud = _is_open_at_zero(node) or (
            number not in sources and _stays_loud(node, activations, silent)
        )
        if number in sources:
            scaled = Groups(graph.channel_group[sources[number].channels].tolist()) - {-1}
            closed[number] = scaled - (reading - noticed[number])
            arriving -= closed[number]
        results = [value for value in node.ir.outputs if value.name]
        for value in results:
            name = value.name or ""
            here = on_value.get(name, Groups())
            open_on[name] = (arriving | made.get(number, Groups())) & here
            ways = len(value.uses()) + value.is_graph_output() + len(results) - 1
            forked[name] = open_on[name] if ways > 1 else open_on[name] & unnoticed
            loud[name] = is_loud
    resizable = {group.index for group in graph.groups if group.resizable}
    gated = (resizable & Groups().union(*closed.values())) - leaking
    scales = {number: source.parameter for number, source in sources.items()}
    return _Gates(Groups(gated), scales, closed, noticed)


def _is_open_at_zero(node: GraphOp) -> bool:
    entry = entry_of(node.ir.op_type, node.ir.domain)
    return entry is not None and entry.open_at_zero


def _stays_loud(node: GraphOp, activations: Sequence[str], silent: Sequence[str]) -> bool:
    """Whether a result is loud because operands are: one of a sum, all of a product."""
    if node.contracted:
        return False
    return bool(activations) and not silent if node.gate else len(silent) < len(activations)


def _arriving(
    node: GraphOp,
    activations: Iterable[str],
    silent: Iterable[str],
    open_on: Mapping[str, Groups],
    on_value: Mapping[str, Groups],
) -> Groups:
    """Groups that reach the node's result on a path that no scale has cut yet."""
    names = list(activations)
    arriving = Groups().union(*(open_on.get(name, Groups()) for name in names))
    if not node.gate:
        return arriving
    closed = Groups().union(
        *(on_value.get(name, Groups()) - open_on.get(name, Groups()) for name in silent)
    )
    return arriving - closed


def _groups_on_values(graph: ChannelGraph) -> dict[str, Groups]:
    matrix = graph.per_channel
    rows = [
        Groups(matrix.indices[matrix.indptr[k] : matrix.indptr[k + 1]].tolist())
        for k in range(matrix.shape[0])
    ]
    found: dict[str, Groups] = {}
    for number, dim in enumerate(graph.couplings.dims):
        groups = rows[graph.vertex_class[number]]
        if groups:
            found[dim.value] = found.get(dim.value, Groups()) | groups
    return found


def _roles(graph: ChannelGraph) -> tuple[dict[int, Groups], dict[int, Groups]]:
    """Per node the groups that it makes, and those that it sums, normalizes or competes over."""
    on_activation: set[int] = set()
    on_weight: set[int] = set()
    for edge in graph.couplings.edges:
        if edge.port >= 0:
            weight = graph.couplings.dims[edge.dim].value in graph.couplings.input_independent
            (on_weight if weight else on_activation).add(edge.factor)
    matrix = graph.per_channel
    made: dict[int, Groups] = {}
    read: dict[int, Groups] = {}
    for number, node in enumerate(graph.ops):
        for name, factor in node.factors.items():
            kind = int(graph.vertex_class[factor])
            groups = Groups(matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist())
            if name in node.contracted or name in node.statistical:
                read[number] = read.get(number, Groups()) | groups
            elif factor in on_weight and factor not in on_activation:
                made[number] = made.get(number, Groups()) | groups
    return made, read


def _kept_by_statistics(graph: ChannelGraph) -> dict[int, Groups]:
    """Per node the groups that enter a statistic of it, and that it hands on channel by channel."""
    on_result = {edge.factor for edge in graph.couplings.edges if edge.port < 0}
    matrix = graph.per_channel
    found: dict[int, Groups] = {}
    for number, node in enumerate(graph.ops):
        kept: set[int] = set()
        lost: set[int] = set()
        for name in node.statistical | node.contracted:
            kind = int(graph.vertex_class[node.factors[name]])
            groups = matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist()
            hands_on = node.factors[name] in on_result and name not in node.contracted
            (kept if hands_on else lost).update(groups)
        if kept - lost:
            found[number] = Groups(kept - lost)
    return found


def _read_inside(graph: ChannelGraph) -> dict[int, Groups]:
    """Per node the groups that it sums over before anyone else sees them: a recurrent state."""
    couplings = graph.couplings
    outside: set[int] = set()
    running: set[int] = set()
    for edge in couplings.edges:
        if edge.port >= 0 and couplings.dims[edge.dim].value not in couplings.input_independent:
            outside.add(edge.factor)
            running.add(edge.op_index)
    matrix = graph.per_channel
    found: dict[int, Groups] = {}
    for number in running:
        node = graph.ops[number]
        for factor in (node.factors[name] for name in node.contracted):
            if factor not in outside:
                kind = int(graph.vertex_class[factor])
                groups = matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist()
                found[number] = found.get(number, Groups()) | Groups(groups)
    return found
