"""Pass ``gates``: which groups' channels a BatchNorm scale can switch off.

A group is gated if BatchNorms cut every path from its producers to its readers: after the
convolution, before the next one (pre-activation), on both arms of a residual sum, or after a
concatenation (DenseNet). A product is silent where one operand is, so there one gated operand is
enough; but not a BatchNorm before a sigmoid, which is open at zero.
"""

from collections.abc import Iterable, Sequence

from morphgraph.graph import ChannelGraph, GraphNode
from morphgraph.ops import entry_of


def gated_groups(graph: ChannelGraph) -> frozenset[int]:
    """Indices of the resizable groups whose every path passes a BatchNorm before it is read."""
    on_value = _groups_on_values(graph)
    made, read = _roles(graph)
    inside = _read_inside(graph)
    open_on: dict[str, frozenset[int]] = {}
    loud: dict[str, bool] = {}  # values that a BatchNorm does not silence, whatever its scale
    leaking: set[int] = set()
    for number, node in enumerate(graph.nodes):
        operands = [value.name or "" for value in node.ir.inputs if value is not None]
        activations = [name for name in operands if name not in graph.couplings.weights]
        for name in activations:
            leaking |= open_on.get(name, frozenset()) & read.get(number, frozenset())
        leaking |= inside.get(number, frozenset())
        silent = [name for name in activations if not loud.get(name)]
        arriving = _arriving(node, activations, silent, open_on, on_value)
        is_loud = _is_open_at_zero(node) or _stays_loud(node, activations, silent)
        for value in node.ir.outputs:
            here = on_value.get(value.name or "", frozenset())
            passed = frozenset() if node.ir.op_type == "BatchNormalization" else arriving & here
            open_on[value.name or ""] = passed | (made.get(number, frozenset()) & here)
            loud[value.name or ""] = is_loud
    resizable = {group.index for group in graph.groups if group.resizable}
    scaled = _groups_of_scales(graph, on_value)
    return frozenset((resizable & scaled) - leaking)


def deciding_scales(graph: ChannelGraph) -> dict[str, frozenset[int]]:
    """Per BatchNorm scale the groups that it gates last: no other one follows before a reader.

    A BatchNorm undoes whatever scale a channel had before: after ``conv -> bn -> relu -> depthwise
    conv -> bn`` nothing resists a penalty on the first scale, which falls at the same rate in all
    channels, useful or not, until it is zero and the channel holds nothing. The last scale alone
    says how much of a channel is read.
    """
    on_value = _groups_on_values(graph)
    _, read = _roles(graph)
    inside = _read_inside(graph)
    awaited: dict[str, frozenset[int]] = {  # groups that are read behind a value, no norm between
        value.name or "": on_value.get(value.name or "", frozenset())
        for value in graph.model.graph.outputs
    }
    found: dict[str, frozenset[int]] = {}
    for number, node in reversed(list(enumerate(graph.nodes))):
        behind = frozenset[int]().union(
            *(awaited.get(value.name or "", frozenset()) for value in node.ir.outputs)
        )
        passed = behind
        if node.ir.op_type == "BatchNormalization":
            scale = node.ir.inputs[1]
            name = scale.name if scale is not None else None
            found[name or ""] = behind
            passed = frozenset()
        here = passed | read.get(number, frozenset()) | inside.get(number, frozenset())
        for value in node.ir.inputs:
            if value is not None:
                name = value.name or ""
                groups = here & on_value.get(name, frozenset())
                awaited[name] = awaited.get(name, frozenset()) | groups
    return found


def _is_open_at_zero(node: GraphNode) -> bool:
    entry = entry_of(node.ir.op_type, node.ir.domain)
    return entry is not None and entry.open_at_zero


def _stays_loud(node: GraphNode, activations: Sequence[str], silent: Sequence[str]) -> bool:
    """Whether a result is loud because operands are: one of a sum, all of a product."""
    if node.ir.op_type == "BatchNormalization" or node.contracted:
        return False
    return bool(activations) and not silent if node.gate else len(silent) < len(activations)


def _arriving(
    node: GraphNode,
    activations: Iterable[str],
    silent: Iterable[str],
    open_on: dict[str, frozenset[int]],
    on_value: dict[str, frozenset[int]],
) -> frozenset[int]:
    """Groups that reach the node's result on a path that no BatchNorm has cut yet."""
    names = list(activations)
    arriving = frozenset().union(*(open_on.get(name, frozenset()) for name in names))
    if not node.gate:
        return arriving
    closed = frozenset().union(
        *(on_value.get(name, frozenset()) - open_on.get(name, frozenset()) for name in silent)
    )
    return arriving - closed


def _groups_on_values(graph: ChannelGraph) -> dict[str, frozenset[int]]:
    matrix = graph.per_channel
    rows = [
        frozenset(matrix.indices[matrix.indptr[k] : matrix.indptr[k + 1]].tolist())
        for k in range(matrix.shape[0])
    ]
    found: dict[str, frozenset[int]] = {}
    for number, dim in enumerate(graph.couplings.dims):
        groups = rows[graph.node_class[number]]
        if groups:
            found[dim.value] = found.get(dim.value, frozenset()) | groups
    return found


def _roles(graph: ChannelGraph) -> tuple[dict[int, frozenset[int]], dict[int, frozenset[int]]]:
    """Per node the groups that it makes, and those that it sums, normalizes or competes over."""
    on_activation: set[int] = set()
    on_weight: set[int] = set()
    for edge in graph.couplings.edges:
        if edge.port >= 0:
            weight = graph.couplings.dims[edge.dim].value in graph.couplings.weights
            (on_weight if weight else on_activation).add(edge.factor)
    matrix = graph.per_channel
    made: dict[int, frozenset[int]] = {}
    read: dict[int, frozenset[int]] = {}
    for number, node in enumerate(graph.nodes):
        for name, factor in node.factors.items():
            kind = int(graph.node_class[factor])
            groups = frozenset(
                matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist()
            )
            if name in node.contracted or name in node.statistical:
                read[number] = read.get(number, frozenset()) | groups
            elif factor in on_weight and factor not in on_activation:
                made[number] = made.get(number, frozenset()) | groups
    return made, read


def _read_inside(graph: ChannelGraph) -> dict[int, frozenset[int]]:
    """Per node the groups that it sums over before anyone else sees them: a recurrent state."""
    couplings = graph.couplings
    outside: set[int] = set()
    running: set[int] = set()
    for edge in couplings.edges:
        if edge.port >= 0 and couplings.dims[edge.dim].value not in couplings.weights:
            outside.add(edge.factor)
            running.add(edge.node)
    matrix = graph.per_channel
    found: dict[int, frozenset[int]] = {}
    for number in running:
        node = graph.nodes[number]
        for factor in (node.factors[name] for name in node.contracted):
            if factor not in outside:
                kind = int(graph.node_class[factor])
                groups = matrix.indices[matrix.indptr[kind] : matrix.indptr[kind + 1]].tolist()
                found[number] = found.get(number, frozenset()) | frozenset(groups)
    return found


def _groups_of_scales(graph: ChannelGraph, on_value: dict[str, frozenset[int]]) -> set[int]:
    found: set[int] = set()
    for node in graph.nodes:
        scale = node.ir.inputs[1] if node.ir.op_type == "BatchNormalization" else None
        if scale is not None and scale.is_initializer():
            found |= on_value.get(scale.name or "", frozenset())
    return found
