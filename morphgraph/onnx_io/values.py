"""Reading values and nodes of a graph: their sizes and types, and what subgraphs read."""

from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.keys import STATIC_SHAPE_KEY, UNSIZED_KEY


class Expected(NamedTuple):
    """The numbers that the readers of an input expect: ``low`` to ``high``, which is excluded.

    Attributes:
        kind: numbers of rows; lengths; flags, most of which are set; or any numbers of a range.
        low: the lowest number.
        high: the first that is too high.
        part: the axis of the input, and the positions there, that the readers take these numbers
            from; empty for all of it.
    """

    kind: Literal["rows", "length", "mask", "range", "number"]
    low: int
    high: int
    part: tuple[int, tuple[int, ...]] | tuple[()] = ()


def static_shape(value: ir.Value) -> Shape:
    """The sizes of a value; where some are dynamic, those that it is analysed with.

    A value whose size nobody knows (:func:`is_unsized`) has no axes here.

    Raises:
        ModelError: a size is not known.

    >>> static_shape(ir.val("x", ir.DataType.FLOAT, [1, 3, 8, 8]))
    (1, 3, 8, 8)
    """
    analysed: Shape | None = value.meta.data.get(STATIC_SHAPE_KEY)  # of a UserDict, at once
    if analysed is not None:
        return analysed
    sizes = known_shape(value)
    if sizes is None:
        raise ModelError(
            f"value '{escape(value.name or '')}': its shape is not known; "
            "canonicalize the model, giving --input-shape where inputs are dynamic"
        )
    return sizes


def known_shape(value: ir.Value | None) -> Shape | None:
    """The sizes of a value, if there is one and all of them are known."""
    shape = None if value is None else value.shape
    if shape is None:
        return None
    dims = shape.dims
    for size in dims:  # without calls, since it is asked thousands of times
        if not isinstance(size, int):
            return None
    return cast("Shape", dims)


@lru_cache(2**14)  # of thousands of values a few hundred differ
def shape_of(sizes: Shape) -> ir.Shape:
    """Known sizes as a shape, which cannot be changed, so that values share it.

    >>> shape_of((1, 3)) is shape_of((1, 3)), shape_of((1, 3)) == ir.Shape([1, 3])
    (True, True)
    """
    return ir.Shape(sizes, frozen=True)


_STRING_BYTES = 8.0  # a reference: how long the text is, no type says


def item_bytes(dtype: ir.DataType | None) -> float:
    """Bytes of one element of a type, 0.5 for one of four bits; of no known type, of a float32.

    >>> item_bytes(ir.DataType.FLOAT16), item_bytes(ir.DataType.STRING)
    (2.0, 8.0)
    """
    if dtype is None:
        return ir.DataType.FLOAT.itemsize
    return _STRING_BYTES if dtype == ir.DataType.STRING else dtype.itemsize


def is_unsized(value: ir.Value | None) -> bool:
    """Whether a value of a canonical model has a size that only running the model tells."""
    return value is not None and bool(value.meta.data.get(UNSIZED_KEY))


def mark_unsized(value: ir.Value) -> None:
    """Say that nobody knows a value's size: it has no axes, whatever its file declares."""
    value.meta[UNSIZED_KEY] = True
    value.meta[STATIC_SHAPE_KEY] = ()


def is_float(value: ir.Value) -> bool:
    """Whether a value holds floating-point numbers, as far as its type is known."""
    return value.dtype is not None and value.dtype.is_floating_point()


def dtype_of(value: ir.Value) -> np.dtype[Any]:
    """The type of a value's elements; float32 where it is not declared."""
    return np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """All values that a graph itself has: inputs, initializers, and results of nodes."""
    # An initializer may stand among the inputs as well.
    own = dict.fromkeys([*graph.inputs, *graph.initializers.values()])
    return [*own, *(value for node in graph for value in node.outputs)]


def node_label(node: ir.Node) -> str:
    """A node as messages call it.

    >>> node_label(ir.node("Relu", [ir.val("x")], name="act"))
    "node 'act' (Relu)"
    """
    return f"node '{escape(node.name or '')}' ({escape(node.op_type)})"


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs among a node's attributes: the branches of an If, the body of a Loop."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.data.values():
        kind = attribute.type
        if kind == _GRAPH:
            graphs.append(attribute.as_graph())
        elif kind == _GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


# Asked for at every node of every walk, where an enumeration looks its members up for long.
_GRAPH, _GRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS


def graphs_of(model: ir.Model) -> list[ir.Graph]:
    """The model's graph and all subgraphs in it; local functions are left out."""
    graphs: list[ir.Graph] = [model.graph]
    for graph in graphs:  # grows while nested ones are found
        for node in graph:
            graphs += subgraphs(node)
    return graphs


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values from around a node that its subgraphs read."""
    inner: list[ir.Graph] = subgraphs(node)
    if not inner:
        return []
    for graph in inner:  # grows while nested ones are found
        inner.extend(nested for child in graph for nested in subgraphs(child))
    read = (
        value
        for graph in inner
        for value in (*(v for child in graph for v in child.inputs), *graph.outputs)
        if value is not None
    )
    own = set(inner)
    return [value for value in dict.fromkeys(read) if value.graph not in own]
