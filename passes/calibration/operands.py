"""Pass ``operands``: operands of products of two activations, and the linear layers that make them.

An operand has heads, places and the elements of every head. A layer *makes* it where its outputs
arrive there and nowhere else, moved and scaled by one number, or turned in pairs.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.passes.calibration.arrivals import Arrival, arrivals, pairs
from morphgraph.passes.calibration.readers import Reader, following, readers

Parts = tuple[tuple[tuple[int, int], ...], ...]
"""Per axis the factors, as vertices, of which it is the product, outermost first, with sizes."""


@dataclass(frozen=True)
class Side:
    """One operand of a product.

    Attributes:
        value: its name.
        parts: the factors of its axes.
        heads: those of them that tell heads apart.
        summed: the factor that is summed over.
        pair: where its operator turns it, the factor that tells the two of a pair apart; elements
            are all first ones then, and all second ones.
        reader: who makes it, and nobody else sees it; empty where there is none.
        outputs: of the reader, by head and element, ``[heads, size]``.
    """

    value: str
    parts: Parts
    heads: tuple[int, ...]
    summed: int
    reader: str = ""
    outputs: IntArray | None = None
    pair: int | None = None

    @property
    def inner(self) -> tuple[int, ...]:
        """The factors that tell a head's elements apart."""
        return (self.summed,) if self.pair is None else (self.pair, self.summed)

    @property
    def vertices(self) -> frozenset[int]:
        """The factors on its axes."""
        return frozenset(vertex for parts in self.parts for vertex, _ in parts)

    def rows(self, array: Array) -> Array:
        """The operand's numbers, ``[places, heads, size]``."""
        names, sizes = self.split(array)
        order = [k for k, name in enumerate(names) if name not in (*self.heads, *self.inner)]
        return self._ordered(array, names, sizes, order).reshape(-1, *self._ends(names, sizes))

    def by_heads(self, array: Array, other: "Side") -> Array:
        """The same apart for what both operands have, ``[samples, heads, places, size]``."""
        names, sizes = self.split(array)
        free = [k for k, name in enumerate(names) if name not in (*self.heads, *self.inner)]
        free.sort(key=lambda k: names[k])  # the same order in all operands
        samples = [k for k in free if names[k] < 0 or names[k] in other.vertices]
        places = [k for k in free if k not in samples]
        heads, size = self._ends(names, sizes)
        shape = prod(sizes[k] for k in samples), prod(sizes[k] for k in places), heads, size
        return self._ordered(array, names, sizes, samples + places).reshape(shape).swapaxes(1, 2)

    def split(self, array: Array) -> tuple[list[int], list[int]]:
        """The factors of all axes, and their sizes; axes without one have a negative name."""
        names: list[int] = []
        sizes: list[int] = []
        for axis, parts in enumerate(self.parts):
            names += [vertex for vertex, _ in parts] or [~axis]
            own = [size for _, size in parts] or [array.shape[axis]]
            free = [k for k, (v, _) in enumerate(parts) if v not in (*self.heads, *self.inner)]
            if len(free) == 1 or len(parts) == 1:  # a batch or a length may have any size
                place = free[0] if free else 0
                own[place] = array.shape[axis] // prod(own[:place] + own[place + 1 :])
            sizes += own
        return names, sizes

    def _ends(self, names: list[int], sizes: list[int]) -> tuple[int, int]:
        """How many heads there are, and of what size."""
        heads = prod(sizes[names.index(vertex)] for vertex in self.heads)
        return heads, prod(sizes[names.index(vertex)] for vertex in self.inner)

    def _ordered(self, array: Array, names: list[int], sizes: list[int], order: list[int]) -> Array:
        ends = [names.index(vertex) for vertex in (*self.heads, *self.inner)]
        return array.reshape(sizes).transpose(order + ends)


class Makers:
    """Which outputs of which linear layers arrive where, and how they are changed on the way."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.places = {node.name or "": k for k, node in enumerate(graph.model.graph)}
        self.arriving: dict[tuple[str, int], tuple[str, Arrival]] = {}
        self.layers = readers(graph.model, graph.couplings.input_independent)
        for name, reader in self.layers.items():
            if not reader.is_norm and not reader.linear.inside:
                self._follow(name, reader)

    def _follow(self, name: str, reader: Reader) -> None:
        after, shape = following(reader), static_shape(reader.result)
        scale = after.scale
        if after.added or after.clamps or len(scale) != 1 or not scale.all():
            return
        if reader.result.dtype != ir.DataType.FLOAT or scale.size >= 2**24:
            return
        along = [1] * len(shape)
        along[reader.linear.output_axis(len(shape))] = -1
        numbers = np.arange(scale.size, dtype=np.float32).reshape(along)
        numbers = np.broadcast_to(numbers, shape)
        found = arrivals(self.graph.model, reader.result, numbers, after, self.places)
        seen = np.zeros(scale.size, dtype=np.int64)
        arrived = [(each, np.unique(np.stack(each.parts)).astype(np.int64)) for each in found]
        for _, outputs in arrived:
            seen[outputs] += 1
        for each, outputs in arrived:
            if each.node and (seen[outputs] == 1).all():
                self.arriving[each.node, each.port] = name, each

    def known(self, side: Side, node: ir.Node, port: int) -> Side:
        """The same with the layer that alone makes it, and the factors that tell heads apart."""
        name, arrival = self.arriving.get((node.name or "", port), ("", None))
        if arrival is None or arrival.changed:
            return side
        heads = _heads(side, arrival)
        return self.with_heads(replace(side, heads=heads, reader=name), heads, node)

    def with_heads(self, side: Side, heads: tuple[int, ...], node: ir.Node) -> Side:
        """The same with these heads; without its layer where an output has two places."""
        port = next(k for k, v in enumerate(node.inputs) if v is not None and v.name == side.value)
        made = replace(side, heads=heads, reader="", outputs=None)
        outputs = _outputs(made, self.arriving[node.name or "", port][1].parts[0])
        if outputs is None or len(np.unique(outputs)) < outputs.size:
            return made
        return replace(made, reader=side.reader, outputs=outputs)

    def turned(self, side: Side, node: ir.Node, port: int) -> tuple[Side, IntArray] | None:
        """The same with the layer whose results are turned, or scaled by place, on the way.

        With it comes of every element the one that is turned with it, itself where there is none,
        ``[size]``.
        """
        name, arrival = self.arriving.get((node.name or "", port), ("", None))
        if arrival is None or not arrival.changed:
            return None
        found = paired_outputs(side, arrival)
        return None if found is None else (replace(found[0], reader=name), found[1])

    def turned_by_reader(
        self, side: Side, node: ir.Node, port: int
    ) -> tuple[Side, IntArray] | None:
        """The same where the operator that reads it turns it itself."""
        made = self.known(side, node, port)
        if made.outputs is None:
            return None
        size = made.outputs.shape[1]
        return made, np.roll(np.arange(size), size // 2)


def paired_outputs(side: Side, arrival: Arrival) -> tuple[Side, IntArray] | None:
    """An operand with its heads and outputs, each of which comes alone or in pairs.

    With it comes of every element the one that it is made together with, itself where there is
    none, ``[size]``; ``None`` where outputs arrive otherwise.
    """
    made, both = _made_of(side, arrival)
    found = None if both is None else pairs(*both)
    return None if found is None else (replace(made, outputs=found[0]), found[1])


def paired_heads(side: Side, arrival: Arrival) -> tuple[Side, IntArray] | None:
    """The same where several heads may have the same outputs, as keys that are repeated."""
    made, both = _made_of(side, arrival)
    if both is None:
        return None
    every, head = np.unique(np.concatenate(both, axis=1), axis=0, return_inverse=True)
    found = pairs(*np.split(every, 2, axis=1))
    if found is None:
        return None
    return replace(made, outputs=found[0][head.reshape(-1)]), found[1]


def _made_of(side: Side, arrival: Arrival) -> tuple[Side, tuple[IntArray, IntArray] | None]:
    """An operand with its heads, and the outputs of which its elements are made; two of each."""
    made = replace(side, heads=_heads(side, arrival))
    if len(arrival.parts) > 2:
        return made, None
    one, other = (_outputs(made, part) for part in (arrival.parts[0], arrival.parts[-1]))
    return made, None if one is None or other is None else (one, other)


def turned_outputs(side: Side, arrival: Arrival) -> tuple[Side, IntArray] | None:
    """The same of an operand that its operator turns, where each output comes alone; of all heads.

    Heads may have the same outputs.
    """
    (axis,) = (parts for parts in side.parts if side.summed in dict(parts))
    heads = tuple(vertex for vertex, _ in axis if vertex not in side.inner)
    outputs = _outputs(replace(side, heads=heads), arrival.parts[0])
    if len(arrival.parts) > 1 or outputs is None:
        return None
    size = outputs.shape[1]
    return replace(side, heads=heads, outputs=outputs), np.roll(np.arange(size), size // 2)


def _heads(side: Side, arrival: Arrival) -> tuple[int, ...]:
    """The factors that tell heads apart."""
    axes = [vertex for parts in side.parts for vertex, _ in parts if vertex not in side.inner]
    return tuple(
        vertex
        for vertex in axes
        if np.ptp(replace(side, heads=(vertex,)).rows(arrival.parts[0]), axis=1).any()
    )


def _outputs(side: Side, there: Array) -> IntArray | None:
    """Which outputs of a layer stand where, ``[heads, size]``; ``None`` where places differ."""
    rows = side.rows(there)
    if (rows != rows[:1]).any():
        return None
    outputs: IntArray = rows[0].astype(np.int64)
    return outputs
