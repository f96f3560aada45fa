"""Pass ``ahead``: the linear layer ahead of a norm of queries, which makes what it normalizes.

From the numbers behind the norm it is followed backwards to the layer, operator by operator: of
each there is one operand of which its result is made, number by number. What they do with it, the
norm among them, is not looked at here: that is tried
(:mod:`morphgraph.passes.calibration.narrowed`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.arrivals import moved
from morphgraph.passes.calibration.readers import Reader


@dataclass(frozen=True)
class _Step:
    """An operator on the way from a layer to a value.

    Attributes:
        node: the operator.
        port: the operand that it passes on.
        result: what it makes of that.
    """

    node: ir.Node
    port: int
    result: ir.Value


def layer_ahead(
    graph: ChannelGraph, layers: Mapping[str, Reader], value: ir.Value, target: tuple[str, int]
) -> tuple[Reader, Array] | None:
    """The layer of which a value is made, number by number, if nobody else sees these outputs.

    With it comes which of its outputs every number is made of, in the value's shape.

    Args:
        graph: the lifted network.
        layers: its linear layers, by name.
        value: the value.
        target: the operator that may see them, by name, and as which operand.
    """
    way: list[_Step] = []
    here, maker = value, value.producer()
    linear = {name for name, each in layers.items() if not each.is_norm}
    while maker is not None and maker.name not in linear:
        port = _made_of(maker, here, graph.couplings.input_independent)
        operand = None if port is None else maker.inputs[port]
        if port is None or operand is None:
            return None
        way.append(_Step(maker, port, here))
        here, maker = operand, operand.producer()
    layer = None if maker is None else layers[maker.name or ""]
    if layer is None or layer.linear.inside or layer.result is not here:
        return None
    passed = [(here, _outputs(layer))]
    for step in reversed(way):
        numbers = _passed_on(graph.model, step.node, step.port, step.result, passed[-1][1])
        if numbers is None:
            return None
        passed.append((step.result, numbers))
    return (layer, passed[-1][1]) if _alone(graph.model, passed, target) else None


def _outputs(layer: Reader) -> Array:
    """Which output of a layer every number of its result is."""
    shape = static_shape(layer.result)
    along = [1] * len(shape)
    along[layer.linear.output_axis(len(shape))] = -1
    count = layer.matrix_shape[0] * layer.matrix_shape[1]
    numbers = np.arange(count, dtype=np.float32).reshape(along)
    return np.broadcast_to(numbers, shape)


def _made_of(node: ir.Node, result: ir.Value, constant: Collection[str]) -> int | None:
    """The one operand of which a result is made, number by number; ``None``: of several."""
    ports = [
        port
        for port, value in enumerate(node.inputs)
        if value is not None and value.name not in constant
    ]
    if facts_of(node).moves:
        return 0 if ports == [0] else None
    alike = [port for port in ports if _size(node.inputs[port]) == _size(result)]
    return alike[0] if len(alike) == 1 else None


def _size(value: ir.Value | None) -> tuple[int, ...]:
    return () if value is None else tuple(static_shape(value))


def _passed_on(
    model: ir.Model, node: ir.Node, port: int, result: ir.Value, numbers: Array
) -> Array | None:
    """Which outputs of a layer stand in a result; ``None`` where that is not known."""
    if not facts_of(node).moves:
        return numbers if _size(result) == numbers.shape else None
    found = moved(model, node, {port: numbers})
    there = [each for each in node.outputs if each.name]
    return None if found is None else found[there.index(result)]


def _alone(
    model: ir.Model, passed: Sequence[tuple[ir.Value, Array]], target: tuple[str, int]
) -> bool:
    """Whether what is made of a layer's outputs goes to one operand, and nowhere else.

    Args:
        model: the network.
        passed: values on the way, the layer's result first, and which outputs stand there.
        target: the operator, and which operand.
    """
    own = np.unique(passed[-1][1])
    for (value, numbers), (later, _) in pairwise(passed):
        if len(np.unique(numbers)) == len(own):
            return _ends(value, target)
        # Others are still beside them: a joint layer of queries, keys and values.
        for use in value.uses():
            parts = [
                _passed_on(model, use.node, use.idx, each, numbers)
                for each in use.node.outputs
                if each.name and each is not later
            ]
            if not facts_of(use.node).moves or value.is_graph_output():
                return False
            if any(part is None or np.isin(own, part).any() for part in parts):
                return False
    return _ends(passed[-1][0], target)


def _ends(value: ir.Value, target: tuple[str, int]) -> bool:
    """Whether all that follows from a value follows from one operand of an operator."""
    waiting, known = [value], {value.name}
    while waiting:
        here = waiting.pop()
        if here.is_graph_output():
            return False
        for use in here.uses():
            if use.node.name == target[0]:
                if use.idx != target[1]:
                    return False
                continue
            results = [v for v in use.node.outputs if v.name and v.name not in known]
            known.update(each.name for each in results)
            waiting += results
    return True
