"""Running a part of a model: constants that a rewrite needs are computed, not derived again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.onnx_io import static_shape

Array = np.ndarray[Any, np.dtype[Any]]


def ancestors(wanted: Iterable[str], maker: Callable[[str], ir.Node | None]) -> list[str]:
    """Names of what is needed to compute values, themselves included."""
    found: dict[str, None] = {}
    pending = list(wanted)
    while pending:
        name = pending.pop()
        node = maker(name)
        if name not in found and node is not None:
            found[name] = None
            pending += [value.name or "" for value in node.inputs if value is not None]
    return list(found)


def evaluate(
    wanted: Sequence[str],
    makers: Mapping[str | None, ir.Node],
    given: Mapping[str, Array],
    model: ir.Model,
) -> dict[str, Array]:
    """Compute values of a model in ONNX Runtime from given ones and from initializers.

    Raises:
        UnsupportedError: ONNX Runtime does not run one of the operators.
    """
    from morphgraph.ort import run

    if not wanted:
        return {}
    needed = ancestors(wanted, lambda name: None if name in given else makers.get(name))
    nodes = [node for node in model.graph if any(v.name in needed for v in node.outputs)]
    values: dict[str | None, ir.Value] = {}
    initializers: list[ir.Value] = []
    for node in nodes:
        for operand in node.inputs:
            if operand is None or operand.name in values or operand.name in needed:
                continue
            array = given.get(operand.name or "")
            tensor = operand.const_value if array is None else ir.Tensor(array, dtype=operand.dtype)
            assert tensor is not None
            sizes = tensor.shape.numpy()
            value = values[operand.name] = ir.Value(
                name=operand.name,
                shape=ir.Shape(sizes),
                type=operand.type,
                const_value=tensor,
            )
            initializers.append(value)
        for result in node.outputs:
            values[result.name or None] = ir.Value(
                name=result.name,
                shape=ir.Shape(static_shape(result)) if result.name else None,
                type=result.type,
            )
    copies = [
        ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else values[v.name] for v in node.inputs],
            node.attributes.values(),
            outputs=[values[v.name] if v.name else ir.Value(name="") for v in node.outputs],
            name=node.name,
        )
        for node in nodes
    ]
    graph = ir.Graph(
        [],
        [values[name] for name in wanted],
        nodes=copies,
        initializers=initializers,
        opset_imports=model.graph.opset_imports,
        name="constants",
    )
    return run(ir.Model(graph, ir_version=model.ir_version), {})
