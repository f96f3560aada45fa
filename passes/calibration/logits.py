"""Pass ``logits``: products of two activations, as an attention's queries and keys.

What a head loses that gets smaller depends on their second moments alone
(:mod:`morphgraph.passes.calibration.bases`); they are taken here, at the operands of every product
that can be made up for, because a linear layer alone makes one of them at least.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.calibration.moments import Moments
from morphgraph.passes.calibration.readers import Following, Reader, following, readers
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.coupling.roles import roles


@dataclass(frozen=True)
class Side:
    """One operand of a product.

    Attributes:
        value: its name.
        parts: per axis the factors of which it is the product, outermost first, and their sizes.
        heads: those of them that tell heads apart.
        summed: the factor that is summed over.
        reader: who makes it, and nobody else sees it; empty where there is none.
        outputs: of the reader, by head and element, ``[heads, size]``.
    """

    value: str
    parts: tuple[tuple[tuple[int, int], ...], ...]
    heads: tuple[int, ...]
    summed: int
    reader: str = ""
    outputs: IntArray | None = None

    def rows(self, array: Array) -> Array:
        """The operand's numbers, ``[places, heads, size]``."""
        names: list[int] = []
        sizes: list[int] = []
        for axis, parts in enumerate(self.parts):
            names += [vertex for vertex, _ in parts] or [~axis]
            one = len(parts) < 2  # a batch or a length may have any size
            sizes += [array.shape[axis]] if one else [size for _, size in parts]
        last = [*self.heads, self.summed]
        order = [k for k, name in enumerate(names) if name not in last]
        ends = [names.index(vertex) for vertex in last]
        heads = prod(sizes[k] for k in ends[:-1])
        return array.reshape(sizes).transpose(order + ends).reshape(-1, heads, sizes[ends[-1]])


@dataclass(frozen=True)
class Logits:
    """A product of two activations.

    Attributes:
        name: of the operator.
        summed: the factor that it sums over, as a vertex.
        queries, keys: its operands; a head of queries meets one head of keys.
        key_of: that head, ``[heads of queries]``.
    """

    name: str
    summed: int
    queries: Side
    keys: Side
    key_of: IntArray


SecondMoments = Mapping[str, tuple[FloatArray, FloatArray]]
"""By product those of queries and of keys, ``[heads, size, size]``."""


@dataclass(frozen=True, eq=False)
class Compared:
    """The products of a network that can be made up for, and second moments of their operands."""

    products: Sequence[Logits] = ()
    moments: SecondMoments = field(default_factory=dict)


def compared(
    graph: ChannelGraph,
    batches: Callable[[], Iterable[Arrays]],
    *,
    threads: int = 0,
    processes: Processes = ALONE,
) -> Compared:
    """Products of queries and keys, and what the calibration inputs make of their operands.

    Args:
        graph: the lifted network.
        batches: feeds of the model, of this process; not asked for where there are no products.
        threads: of ONNX Runtime.
        processes: that share the batches.
    """
    found = products(graph)
    if not found:
        return Compared()
    inputs = [value.name or "" for value in graph.model.graph.inputs]
    sides = {side.value: side for each in found for side in (each.queries, each.keys)}
    piece = Piece(graph.model, inputs, list(sides), threads)
    sums = {name: Moments(crossed=False) for name in sides}
    for feed in batches():
        arrays = piece.run(feed)
        for name, side in sides.items():
            rows = side.rows(arrays[name])
            sums[name].add(rows, np.zeros((*rows.shape[:2], 0), dtype=rows.dtype))
    moments = {}
    for name, side in sides.items():
        sizes = {vertex: size for parts in side.parts for vertex, size in parts}
        like = prod(sizes[v] for v in side.heads), sizes[side.summed], 0
        counted = sums[name].statistics(like).shared(processes)
        mean = counted.mean_in
        moments[name] = counted.covariance + mean[:, :, None] * mean[:, None, :]
    pairs = {p.name: (moments[p.queries.value], moments[p.keys.value]) for p in found}
    return Compared(found, pairs)


def products(graph: ChannelGraph) -> tuple[Logits, ...]:
    """The products that can be made up for: a linear layer alone makes one of their operands."""
    role, couplings = roles(graph.couplings), graph.couplings
    found: list[Logits] = []
    makers: _Makers | None = None
    for op_index, op in enumerate(graph.ops):
        for name in sorted(op.contracted):
            vertex = op.factors[name]
            shrinks = any(graph.groups[k].can_change for k in graph.groups_on(vertex))
            on_it = [edge for edge in graph.edges_of(op_index) if edge.factor == vertex]
            two = len(on_it) == 2 and all(couplings.on_activation(edge) for edge in on_it)
            if not shrinks or not two or not role.sums[vertex]:
                continue
            makers = makers or _Makers(graph)
            product = _product(graph, op_index, on_it, makers)
            if product is not None:
                found.append(product)
    return tuple(found)


def _product(
    graph: ChannelGraph, op_index: int, on_it: Sequence[Edge], makers: "_Makers"
) -> Logits | None:
    """The product of these operands, where a linear layer alone makes one of them at least."""
    node, sides = graph.ops[op_index].ir, []
    for edge in on_it:
        parts = _parts(graph, op_index, edge.port)
        if parts is None:
            return None
        value = node.inputs[edge.port]
        side = Side((value and value.name) or "", parts, (), edge.factor)
        sides.append(makers.known(side, node, edge.port))
    heads = dict.fromkeys(vertex for side in sides for vertex in side.heads)
    if not any(side.reader for side in sides):
        return None
    complete = []
    for side in sides:
        there = {vertex for parts in side.parts for vertex, _ in parts}
        own = tuple(vertex for vertex in heads if vertex in there)
        if side.reader and own != side.heads:
            side = makers.with_heads(side, own, node)
        complete.append(side if side.reader else Side(side.value, side.parts, own, side.summed))
    sizes = {vertex: size for side in sides for parts in side.parts for vertex, size in parts}
    places = np.arange(prod(sizes[v] for v in heads)).reshape([sizes[v] for v in heads])
    meet = []
    for side in complete:
        numbers = np.arange(prod(sizes[v] for v in side.heads))
        shape = [sizes[v] if v in side.heads else 1 for v in heads]
        meet.append(np.broadcast_to(numbers.reshape(shape), places.shape).ravel())
    for queries, keys in ((0, 1), (1, 0)):
        if len(np.unique(meet[queries])) == len(meet[queries]):
            key_of = meet[keys][np.argsort(meet[queries])]
            return Logits(
                node.name or "", on_it[0].factor, complete[queries], complete[keys], key_of
            )
    return None


def _parts(
    graph: ChannelGraph, op_index: int, port: int
) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    """The factors of every axis of an operand; ``None`` where an axis is not their product."""
    value = graph.ops[op_index].ir.inputs[port]
    name = (value and value.name) or ""
    parts = []
    for axis, size in enumerate(graph.shapes[name]):
        dim = graph.dim(name, axis)
        edges = [e for e in graph.edges_of(op_index) if (e.port, e.dim) == (port, dim)]
        if any(e.map.table is not None or e.map.offset for e in edges):
            return None
        edges.sort(key=lambda e: -e.map.inner)
        sizes = [int(graph.couplings.sizes[e.factor]) for e in edges]
        if edges and prod(sizes) != size:
            return None
        parts.append(tuple(zip((e.factor for e in edges), sizes, strict=True)))
    return tuple(parts)


class _Makers:
    """Which outputs of which linear layers arrive where, moved and scaled but not changed."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.arriving: dict[tuple[str, int], tuple[str, Array]] = {}
        for name, reader in readers(graph.model, graph.couplings.input_independent).items():
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
        arrived = _arrived(self.graph.model, reader.result, np.broadcast_to(numbers, shape), after)
        seen = np.zeros(scale.size, dtype=np.int64)
        for _, _, there in arrived:
            seen[np.unique(there).astype(np.int64)] += 1
        for node, port, there in arrived:
            if node and (seen[there.astype(np.int64)] == 1).all():
                self.arriving[node, port] = name, there

    def known(self, side: Side, node: ir.Node, port: int) -> Side:
        """The same with the layer that makes it, and the factors that tell heads apart."""
        name, there = self.arriving.get((node.name or "", port), ("", None))
        if there is None:
            return side
        axes = [vertex for parts in side.parts for vertex, _ in parts if vertex != side.summed]
        heads = tuple(
            vertex
            for vertex in axes
            if np.ptp(
                Side(side.value, side.parts, (vertex,), side.summed).rows(there), axis=1
            ).any()
        )
        return self.with_heads(Side(side.value, side.parts, heads, side.summed, name), heads, node)

    def with_heads(self, side: Side, heads: tuple[int, ...], node: ir.Node) -> Side:
        """The same with these heads; without its layer where an output has two places."""
        port = next(k for k, v in enumerate(node.inputs) if v is not None and v.name == side.value)
        made = Side(side.value, side.parts, heads, side.summed)
        rows = made.rows(self.arriving[node.name or "", port][1])
        outputs = rows[0].astype(np.int64)
        if (rows != rows[:1]).any() or len(np.unique(outputs)) < outputs.size:
            return made
        return Side(side.value, side.parts, heads, side.summed, side.reader, outputs)


def _arrived(
    model: ir.Model, value: ir.Value, numbers: Array, after: Following
) -> list[tuple[str, int, Array]]:
    """Who reads numbers, by name and port, at which places; outputs of the graph without a name."""
    found: list[tuple[str, int, Array]] = []
    pending = [(value, numbers)]
    while pending:
        here, there = pending.pop()
        if here.is_graph_output():
            found.append(("", 0, there))
        for use in here.uses():
            node, facts = use.node, facts_of(use.node)
            moved: list[tuple[ir.Value, Array]] | None = None
            if node.name in after.nodes or (facts.inert and use.idx == 0) or _scales(node, use.idx):
                moved = [(node.outputs[0], there)]
            elif facts.moves and use.idx == 0:
                moved = _moved(model, node, there)
            if moved is None:
                found.append((node.name or "", use.idx, there))
            else:
                pending += moved
    return found


def _scales(node: ir.Node, port: int) -> bool:
    """Whether an operator multiplies its operand by one number."""
    if len(node.inputs) != 2 or not facts_of(node).multiplies:
        return False
    other = node.inputs[1 - port]
    constant = None if other is None else other.const_value
    return constant is not None and constant.size == 1


def _moved(model: ir.Model, node: ir.Node, there: Array) -> list[tuple[ir.Value, Array]] | None:
    """Where a moving operator puts numbers; ``None`` where others mix with them or it depends."""
    operands = [v for v in node.inputs[1:] if v is not None]
    results = [v for v in node.outputs if v.name]
    first = node.inputs[0]
    if first is None or any(v.const_value is None or v.dtype == first.dtype for v in operands):
        return None
    try:
        arrays = evaluate([v.name or "" for v in results], {first.name or "": there}, model)
    except UnsupportedError:
        return None
    return [(value, arrays[value.name or ""]) for value in results]
