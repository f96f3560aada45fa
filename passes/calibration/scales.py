"""Pass ``scales``: numbers per element that queries are multiplied with behind a norm of their own.

What normalizes queries lets no other basis pass, and its result is larger the more elements are
gone. But the logits are linear in the numbers that it multiplies its result with, whatever moves
and turns queries behind it: in these numbers elements that stay can make up for those that go
(:mod:`morphgraph.passes.calibration.normed`). Here they are found, where they are stored, and which
layer makes what is normalized.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, FloatArray, IntArray
from morphgraph.edit import array_of
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import COPIES_KEY, static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.ahead import layer_ahead
from morphgraph.passes.calibration.arrivals import arrivals
from morphgraph.passes.calibration.kernels import Store, stored
from morphgraph.passes.calibration.operands import Makers, Side, paired_heads, turned_outputs
from morphgraph.passes.calibration.readers import Following


@dataclass(frozen=True)
class Scale:
    """Numbers that queries are multiplied with, element by element.

    Attributes:
        node, port: the operator that multiplies, and which operand they are.
        value: its name.
        layer: the linear layer that makes what is normalized, for nobody else; empty: not known.
        rows: its outputs, by head and element, ``[heads, size]``.
    """

    node: str
    port: int
    value: str
    layer: str = ""
    rows: IntArray | None = None


def scale_of(
    graph: ChannelGraph, makers: Makers, side: Side, node: ir.Node, port: int
) -> tuple[Side, IntArray, Scale] | None:
    """Queries, and the numbers that they are multiplied with behind their norm.

    The outputs of the side are places among these numbers. Its heads are those that differ in them,
    or all, where the layer ahead of the norm is known, or the product turns them itself.
    With it comes of every element the one that it is added to on the way, itself where there is
    none, ``[size]``.

    Args:
        graph: the lifted network.
        makers: its linear layers, and the places of its nodes.
        side: the queries.
        node, port: the product, and which operand they are.
    """
    for maker in _behind(graph, makers.places, node.inputs[port]):
        for at in _constants(maker):
            found = _arriving(graph, makers, side, (maker, at), (node.name or "", port))
            if found is not None:
                return found
    return None


def _behind(
    graph: ChannelGraph, places: Mapping[str, int], value: ir.Value | None
) -> Iterator[ir.Node]:
    """The operators from which a value follows element by element, the last one first."""
    waiting = [value]
    known: set[str] = set()
    while waiting:
        waiting.sort(key=lambda v: places.get(_maker(v), -1))
        here = waiting.pop()
        maker = None if here is None else here.producer()
        if maker is None or (maker.name or "") in known:
            continue
        known.add(maker.name or "")
        yield maker
        op = graph.ops[places[maker.name or ""]]
        if not (op.contracted or op.statistical):
            waiting += [v for v in maker.inputs if v is not None and v.const_value is None]


def _maker(value: ir.Value | None) -> str:
    maker = None if value is None else value.producer()
    return "" if maker is None else maker.name or ""


def _constants(node: ir.Node) -> Iterator[int]:
    """Operands that may be numbers per element with which an operator multiplies its result."""
    facts = facts_of(node)
    if facts.scale is not None and facts.scale < len(node.inputs):
        yield facts.scale
    if facts.multiplies and len(node.inputs) == 2:
        yield from (0, 1)


def _arriving(
    graph: ChannelGraph,
    makers: Makers,
    side: Side,
    where: tuple[ir.Node, int],
    target: tuple[str, int],
) -> tuple[Side, IntArray, Scale] | None:
    """The numbers at an operand, if all that they are multiplied with arrives at the queries."""
    node, port = where
    value, result = node.inputs[port], node.outputs[0]
    if value is None or value.name not in graph.couplings.input_independent:
        return None
    shape, whole = static_shape(value), static_shape(result)
    size = prod(shape)
    if not 1 < size < 2**24 or holder(value, graph.model) is None:
        return None
    if len(shape) > len(whole) or np.broadcast_shapes(shape, whole) != whole:
        return None
    numbers = np.broadcast_to(np.arange(size, dtype=np.float32).reshape(shape), whole)
    paired = _arriving_at(graph, makers, side, (result, numbers), target)
    if paired is None:
        return None
    scale = Scale(node.name or "", port, value.name or "")
    ahead = layer_ahead(graph, makers.layers, result, target)
    by_layer = ahead and _arriving_at(graph, makers, side, (result, ahead[1]), target)
    if not (ahead and by_layer) or by_layer[0].outputs is None:
        return *paired, scale
    rows = by_layer[0].outputs
    if (by_layer[1] != paired[1]).any():
        return *paired, scale
    number_of = np.zeros(int(ahead[1].max()) + 1, dtype=np.int64)
    number_of[ahead[1].astype(np.int64)] = numbers
    queries = replace(by_layer[0], outputs=number_of[rows])
    return queries, by_layer[1], replace(scale, layer=ahead[0].name, rows=rows)


def _arriving_at(
    graph: ChannelGraph,
    makers: Makers,
    side: Side,
    what: tuple[ir.Value, Array],
    target: tuple[str, int],
) -> tuple[Side, IntArray] | None:
    """Queries by the numbers that arrive there alone, and by which elements turn together.

    Args:
        graph: the lifted network.
        makers: the places of its nodes.
        side: the queries.
        what: the value from which on numbers are followed, and which these are.
        target: the product, and which operand the queries are.
    """
    plain = Following(np.ones((1, 1)), np.zeros((1, 1)))
    found = arrivals(graph.model, *what, plain, makers.places)
    if [(each.node, each.port) for each in found] != [target]:
        return None
    if side.pair is not None:  # the product turns them itself, head by head
        return turned_outputs(side, found[0])
    return paired_heads(side, found[0])


@dataclass(frozen=True)
class Holder:
    """Where numbers are stored, and what is added to them on the way to who reads them."""

    store: Store
    added: FloatArray

    def array(self) -> FloatArray:
        """The numbers as they are read."""
        found: FloatArray = self.store.array().astype(np.float64) + self.added
        return found

    def write(self, array: FloatArray) -> None:
        """Store others, in place."""
        kernel = self.store.array()
        self.store.write((array - self.added).astype(kernel.dtype))


def holder(value: ir.Value, model: ir.Model) -> Holder | None:
    """Where numbers are stored that nobody else reads; ``None`` where that is not known.

    Gemma's norms multiply with ``1 + weight``.
    """
    if value.dtype != ir.DataType.FLOAT or len(value.uses()) != 1 or value.is_graph_output():
        return None
    store = _own(value, model)
    if store is not None:
        return Holder(store, np.zeros(store.shape))
    maker = value.producer()
    if maker is None or not facts_of(maker).adds or len(maker.inputs) != 2:
        return None
    for own, other in (maker.inputs, maker.inputs[::-1]):
        constant = None if other is None else other.const_value
        if own is None or other is None or constant is None or constant.size != 1:
            continue
        store = _own(own, model)
        if store is not None and static_shape(own) == static_shape(value):
            return Holder(store, np.full(store.shape, float(array_of(other).reshape(-1)[0])))
    return None


def _own(value: ir.Value, model: ir.Model) -> Store | None:
    """Where numbers are stored; ``None`` where others are tied to them."""
    store, tied = stored(value, model), model.meta.get(COPIES_KEY, {})
    return store if store is not None and not store.names & {*tied, *tied.values()} else None
