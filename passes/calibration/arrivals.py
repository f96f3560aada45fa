"""Pass ``arrivals``: where the results of a linear layer go, number by number.

Numbers are followed that are moved, scaled and negated, multiplied with others, and added among
themselves, as a rotation by position does: a number that arrives is made of one or two results of
the layer then. What the factors are is not looked at here: whoever believes that a rotation stands
there has to try it (:mod:`morphgraph.passes.calibration.compared`).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray
from morphgraph.edit import array_of
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.runtime import run
from morphgraph.ops import Op, facts_of
from morphgraph.passes.calibration.readers import Following


@dataclass(frozen=True, eq=False)
class Arrival:
    """An operand of an operator that is made of a layer's results.

    Attributes:
        node, port: the operator and its operand; an output of the graph has no node.
        parts: results of the layer of which every number is made, as arrays of the operand's shape.
        changed: whether others than constants scale them, or two of them are added.
    """

    node: str
    port: int
    parts: tuple[Array, ...]
    changed: bool


_State = tuple[tuple[Array, ...], bool]
"""The parts of a value, and whether it is changed."""


def arrivals(
    model: ir.Model, value: ir.Value, numbers: Array, after: Following, places: Mapping[str, int]
) -> list[Arrival]:
    """Who reads a layer's results, as they are or changed.

    Args:
        model: the model.
        value: the layer's result.
        numbers: which output of the layer each of its numbers is.
        after: what scales and shifts it.
        places: of the nodes, by name, in topological order.
    """
    known: dict[str, _State] = {value.name or "": ((numbers,), False)}
    found: list[Arrival] = []
    waiting: list[tuple[int, str]] = []
    nodes: dict[str, ir.Node] = {}

    def passed_on(here: ir.Value) -> None:
        if here.is_graph_output():
            found.append(Arrival("", 0, *known[here.name or ""]))
        for use in here.uses():
            name = use.node.name or ""
            if name not in nodes:
                nodes[name] = use.node
                heapq.heappush(waiting, (places.get(name, -1), name))

    passed_on(value)
    while waiting:
        node = nodes[heapq.heappop(waiting)[1]]
        states = {
            port: known[operand.name or ""]
            for port, operand in enumerate(node.inputs)
            if operand is not None and operand.name in known
        }
        results = _passed(model, node, states, after)
        if results is None:
            name = node.name or ""
            found += [Arrival(name, port, *state) for port, state in states.items()]
            continue
        for result, state in results:
            known[result.name or ""] = state
            passed_on(result)
    return found


def _passed(
    model: ir.Model, node: ir.Node, states: Mapping[int, _State], after: Following
) -> list[tuple[ir.Value, _State]] | None:
    """What an operator makes of the numbers; ``None`` where that is something else."""
    facts, result = facts_of(node), node.outputs[0]
    if len(states) == 1:
        ((port, (parts, changed)),) = states.items()
        if node.name in after.nodes or (facts.inert and port == 0) or _scales(node, port):
            return [(result, (parts, changed))]
        if facts.negates or (facts.multiplies and _keeps_shape(node, port)):
            return [(result, (parts, True))]
        if facts.turns and port == 0:
            return _turned(model, node, facts, parts)
    if facts.joins:
        return _joined(model, node, states)
    if facts.moves and [*states] == [0]:
        ((parts, changed),) = states.values()
        found = [moved(model, node, {0: part}) for part in parts]
        if any(each is None for each in found):
            return None
        by_part = [each for each in found if each is not None]
        return [
            (value, (tuple(each[k] for each in by_part), changed))
            for k, value in enumerate(_results(node))
        ]
    if (facts.adds or facts.subtracts) and len(states) == len(node.inputs):
        if not all(_keeps_shape(node, port) for port in states):
            return None
        return [(result, (_distinct([p for parts, _ in states.values() for p in parts]), True))]
    return None


def _distinct(parts: Sequence[Array]) -> tuple[Array, ...]:
    """Without those that say the same as an earlier one."""
    found: list[Array] = []
    for part in parts:
        if not any(np.array_equal(part, other) for other in found):
            found.append(part)
    return tuple(found)


def _keeps_shape(node: ir.Node, port: int) -> bool:
    operand = node.inputs[port]
    return operand is not None and static_shape(operand) == static_shape(node.outputs[0])


def _scales(node: ir.Node, port: int) -> bool:
    """Whether an operator multiplies its operand by one number."""
    if len(node.inputs) != 2 or not facts_of(node).multiplies:
        return False
    other = node.inputs[1 - port]
    constant = None if other is None else other.const_value
    return constant is not None and constant.size == 1


def _turned(
    model: ir.Model, node: ir.Node, facts: type[Op], parts: Sequence[Array]
) -> list[tuple[ir.Value, _State]] | None:
    """What an operator makes of pairs that it turns: itself at no angle, and at a right one."""
    made: list[Array] = []
    for filled in (facts.turns[0], facts.turns[1]):
        for part in parts:
            given: dict[int, Array] = {0: part}
            for port, operand in enumerate(node.inputs):
                if port and operand is not None and operand.dtype is not None:
                    fill = np.ones if port == filled else np.zeros
                    given[port] = fill(static_shape(operand), operand.dtype.numpy())
            found = _computed(model, node, given)
            if found is None:
                return None
            made.append(np.abs(found[0]))
    return [(node.outputs[0], (_distinct(made), True))]


def _joined(
    model: ir.Model, node: ir.Node, states: Mapping[int, _State]
) -> list[tuple[ir.Value, _State]] | None:
    """Operands behind each other, all of which are made of the layer's results."""
    if len(states) != len(node.inputs):
        return None
    most = max(len(parts) for parts, _ in states.values())
    joined = []
    for k in range(most):
        # One of fewer parts is made of its first one alone.
        given = {port: parts[k if k < len(parts) else 0] for port, (parts, _) in states.items()}
        found = moved(model, node, given)
        if found is None:
            return None
        joined += found
    changed = any(changed for _, changed in states.values())
    return [(node.outputs[0], (tuple(joined), changed))]


def _results(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if value.name]


def moved(model: ir.Model, node: ir.Node, given: Mapping[int, Array]) -> list[Array] | None:
    """Where a moving operator puts numbers; ``None`` where others mix with them or it depends."""
    operands = [v for port, v in enumerate(node.inputs) if v is not None and port not in given]
    first = node.inputs[0]
    if first is None or any(v.const_value is None or v.dtype == first.dtype for v in operands):
        return None
    held = {
        port: array_of(v) for port, v in enumerate(node.inputs) if v is not None and v in operands
    }
    return _computed(model, node, {**held, **given})


def _computed(model: ir.Model, node: ir.Node, given: Mapping[int, Array]) -> list[Array] | None:
    """What a node gives for operands by port; the time does not depend on the model around it."""
    operands = [
        ir.Value(name=f"operand{port}", const_value=ir.tensor(given[port]))
        if port in given
        else None
        for port in range(len(node.inputs))
    ]
    results = [ir.Value(name=f"result{k}", type=v.type) for k, v in enumerate(_results(node))]
    alone = ir.Node(
        node.domain, node.op_type, operands, list(node.attributes.values()), outputs=results
    )
    graph = ir.Graph(
        [],
        results,
        nodes=[alone],
        initializers=[value for value in operands if value is not None],
        opset_imports=model.graph.opset_imports,
    )
    try:
        return list(run(ir.Model(graph, ir_version=model.ir_version), {}).values())
    except UnsupportedError:
        return None


def pairs(first: IntArray, second: IntArray) -> tuple[IntArray, IntArray] | None:
    """Numbers that are each made of one result, or two of the same two: who they are.

    Args:
        first, second: results of which every number is made, ``[heads, size]``.

    Returns:
        A result for every number, ``[heads, size]``, and the number of which the other one is,
        itself where there is none, ``[size]``; ``None`` where numbers do not come in pairs, or not
        in the same ones in all heads.

    >>> first = np.array([[0, 1, 2, 3, 4]])
    >>> pairs(first, np.array([[2, 3, 0, 1, 4]]))
    (array([[0, 1, 2, 3, 4]]), array([2, 3, 0, 1, 4]))
    >>> pairs(first, np.array([[1, 2, 3, 4, 0]])) is None
    True
    """
    heads, size = first.shape
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((high, low), axis=1)
    partner = np.tile(np.arange(size), (heads, 1))
    for head, along in enumerate(order):
        same = np.flatnonzero(
            (low[head, along[1:]] == low[head, along[:-1]])
            & (high[head, along[1:]] == high[head, along[:-1]])
        )
        if len(same) and (np.diff(same) == 1).any():
            return None
        one, other = along[same], along[same + 1]
        partner[head, one], partner[head, other] = other, one
    alone = partner == np.arange(size)
    if (partner != partner[:1]).any() or (alone != (low == high)).any():
        return None
    outputs = first
    if len(np.unique(first)) < first.size:
        outputs = np.where(partner > np.arange(size), low, high)
    return (outputs, partner[0]) if len(np.unique(outputs)) == outputs.size else None
