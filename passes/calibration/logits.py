"""Pass ``logits``: products of two activations, as an attention's queries and keys.

What a head loses that gets smaller can be made up for where a linear layer alone makes one of the
operands at least (:mod:`morphgraph.passes.calibration.operands`), and where queries have a norm of
their own that scales them (:mod:`morphgraph.passes.calibration.scales`). Which products these are
is found here, what the calibration inputs make of their operands in
:mod:`morphgraph.passes.calibration.compared`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import static_shape
from morphgraph.ops import OpNode, facts_of
from morphgraph.ops.op import Angles
from morphgraph.passes.calibration.operands import Makers, Parts, Side
from morphgraph.passes.calibration.scales import Scale, scale_of
from morphgraph.passes.coupling.roles import roles

#: So many operators may stand between a product and the softmax that reads it.
STEPS = 8


@dataclass(frozen=True)
class Logits:
    """A product of two activations.

    Attributes:
        name: of the operator.
        summed: the factor that it sums over, as a vertex.
        queries, keys: its operands; a head of queries meets one head of keys.
        key_of: that head, ``[heads of queries]``.
        partner: where something turns or scales queries by their places, of every element the one
            that it is added to, itself where there is none, ``[size]``. Then their layer can take
            factors alone: a complex one for a pair, a real one for an element by itself.
        weights: the value that says how much every query takes of every key, where there is one.
        mixed: where there is none, the values of which it takes that, and what comes of them.
        scale: where queries have a norm of their own, the numbers that it scales them with; the
            queries' outputs are places among these.
        keys_scale: the same of keys whose layer nobody else sees; its outputs are by heads of the
            keys as they meet queries, of which some may have the same.
    """

    name: str
    summed: int
    queries: Side
    keys: Side
    key_of: IntArray
    partner: IntArray | None = None
    weights: Side | None = None
    mixed: tuple[Side, Side] | None = None
    scale: Scale | None = None
    keys_scale: Scale | None = None

    def elements(self, summed: IntArray) -> IntArray:
        """Elements of a head by positions of the factor that is summed over."""
        if self.queries.pair is None or self.partner is None:
            return summed
        return np.concatenate([summed, summed + len(self.partner) // 2], axis=-1)


def products(graph: ChannelGraph) -> tuple[Logits, ...]:
    """The products that can be made up for: a linear layer, or a norm, makes one operand alone."""
    role, couplings = roles(graph.couplings), graph.couplings
    found: list[Logits] = []
    makers: Makers | None = None
    for op_index, op in enumerate(graph.ops):
        for name in sorted(op.contracted):
            vertex, apart = op.factors[name], _held_apart(op.ir)
            shrinks = any(graph.groups[k].can_change for k in graph.groups_on(vertex))
            on_it = [
                edge
                for edge in graph.edges_of(op_index)
                if edge.factor == vertex and edge.port not in apart and edge.port >= 0
            ]
            two = len(on_it) == 2 and all(couplings.on_activation(edge) for edge in on_it)
            if not shrinks or not two or not role.sums[vertex]:
                continue
            makers = makers or Makers(graph)
            sides = _sides(graph, op_index, on_it)
            if sides is None:
                continue
            product = _normed_product(graph, op_index, sides, makers)
            product = product or _product(graph, op_index, sides, makers)
            product = product or _turned_product(graph, op_index, sides, makers)
            if product is not None:
                found.append(product)
    return tuple(found)


def _held_apart(node: ir.Node) -> set[int]:
    """Operands of an attention that are no new queries and keys: caches, values and tables."""
    facts = facts_of(node)
    if facts.mixes is None:
        return set()
    return {*facts.extends} | {*range(facts.mixes, len(node.inputs))}


def _sides(
    graph: ChannelGraph, op_index: int, on_it: Sequence[Edge]
) -> tuple[tuple[int, Side], ...] | None:
    """The operands of a product, with their ports."""
    sides = []
    for edge in on_it:
        parts = _parts(graph, op_index, edge.port)
        if parts is None:
            return None
        value = graph.ops[op_index].ir.inputs[edge.port]
        side = Side((value and value.name) or "", parts, (), edge.factor)
        if angles_of(graph.ops[op_index].ir) is not None:
            side = replace(side, pair=_pair(side))
        sides.append((edge.port, side))
    return tuple(sides)


def angles_of(node: ir.Node) -> Angles | None:
    """What gives the angles by which an attention turns its queries and keys, if it does."""
    facts = facts_of(node)
    if facts.angles is None:
        return None
    found: Angles | None = facts.call(facts.angles, node, OpNode(node))
    return found


def turned_by(node: ir.Node, arrays: Arrays, operand: Array) -> Array:
    """Queries or keys as an attention turns them itself, ``[samples, heads, places, size]``.

    Args:
        node: the attention.
        arrays: its operands, by name.
        operand: the queries or keys.
    """
    angles = angles_of(node)
    assert angles is not None
    operands = {k: arrays[v.name] for k, v in enumerate(node.inputs) if v is not None and v.name}
    cosines, sines = (table[:, None] for table in angles(operands))
    one, other = np.split(operand, 2, axis=-1)
    turned = one * cosines - other * sines, one * sines + other * cosines
    found: Array = np.concatenate(turned, axis=-1)
    return found


def _pair(side: Side) -> int:
    """The factor beside the one that is summed over: in front of it, or behind, of neighbours."""
    (axis,) = (parts for parts in side.parts if side.summed in dict(parts))
    vertices = [vertex for vertex, _ in axis]
    place = vertices.index(side.summed)
    return vertices[place - 1 if place == len(vertices) - 1 else place + 1]


def _product(
    graph: ChannelGraph, op_index: int, bare: Sequence[tuple[int, Side]], makers: Makers
) -> Logits | None:
    """The product of these operands, where a linear layer alone makes one of them at least."""
    node = graph.ops[op_index].ir
    if bare[0][1].pair is not None:
        return None
    sides = [makers.known(side, node, port) for port, side in bare]
    if _cached(node):
        sides[1] = bare[1][1]  # a cache holds the keys
    heads = tuple(dict.fromkeys(vertex for side in sides for vertex in side.heads))
    if not any(side.reader for side in sides):
        return None
    complete = []
    for side in sides:
        own = _among(side, heads)
        if side.reader and own != side.heads:
            side = makers.with_heads(side, own, node)
        complete.append(side if side.reader else replace(side, heads=own))
    for queries, keys in (complete, complete[::-1]):
        key_of = _met(queries, keys, heads)
        if key_of is not None:
            return Logits(node.name or "", queries.summed, queries, keys, key_of)
    return None


def _turned_product(
    graph: ChannelGraph, op_index: int, bare: Sequence[tuple[int, Side]], makers: Makers
) -> Logits | None:
    """The same where queries are turned, or scaled, by their places on the way from their layer.

    The layer can take no other basis then, but factors that commute with the turn. They are
    fitted to what a softmax sees: so it has to be known which keys compete.
    """
    node, weights = graph.ops[op_index].ir, _weights(graph, op_index, makers.places)
    (port, side), (_, keys) = _queries_first(bare, weights)
    found = makers.turned(side, node, port)
    if side.pair is not None:
        found = makers.turned_by_reader(side, node, port)
    if found is None or _normalized(graph, side.summed):
        return None
    return _competing(graph, op_index, (*found, None), keys, weights)


def _normed_product(
    graph: ChannelGraph, op_index: int, bare: Sequence[tuple[int, Side]], makers: Makers
) -> Logits | None:
    """The same where queries have a norm: what scales them behind it can take factors."""
    if not _normalized(graph, bare[0][1].summed):
        return None
    node, weights = graph.ops[op_index].ir, _weights(graph, op_index, makers.places)
    (port, side), (keys_port, keys) = _queries_first(bare, weights)
    found = scale_of(graph, makers, side, node, port)
    product = None if found is None else _competing(graph, op_index, found, keys, weights)
    if product is None or product.scale is None or not product.scale.layer or _cached(node):
        return product
    of_keys = scale_of(graph, makers, keys, node, keys_port)
    if of_keys is None or not {*of_keys[0].heads} <= {*product.keys.heads}:
        return product
    side, partner, scale = of_keys
    head = _met(product.keys, side, product.keys.heads)
    if scale.rows is None or head is None or (partner != product.partner).any():
        return product
    return replace(product, keys_scale=replace(scale, rows=scale.rows[head]))


def _cached(node: ir.Node) -> bool:
    """Whether an attention gives the keys that it was given, for a cache."""
    given = (k for k in facts_of(node).extends.values() if k < len(node.outputs))
    return any(node.outputs[k].name for k in given)


def _queries_first(
    bare: Sequence[tuple[int, Side]], weights: Side | None
) -> Sequence[tuple[int, Side]]:
    """The operands with their ports; those that a softmax competes over are the keys."""
    if weights is not None and weights.summed not in bare[1][1].vertices:
        return bare[::-1]
    return bare


def _competing(
    graph: ChannelGraph,
    op_index: int,
    made: tuple[Side, IntArray, Scale | None],
    keys: Side,
    weights: Side | None,
) -> Logits | None:
    """A product with what says how much its queries take of its keys; ``None``: nothing does."""
    queries, partner, scale = made
    keys = replace(keys, heads=_among(keys, queries.heads))
    key_of = _met(queries, keys, queries.heads)
    if key_of is None:
        return None
    name = graph.ops[op_index].name
    product = Logits(name, queries.summed, queries, keys, key_of, partner, scale=scale)
    if weights is None:
        mixed = _mixed(graph, op_index, product)
        return None if mixed is None else replace(product, mixed=mixed)
    weights = replace(weights, heads=_among(weights, queries.heads))
    return replace(product, weights=weights) if weights.heads == queries.heads else None


def _among(side: Side, heads: Sequence[int]) -> tuple[int, ...]:
    """Those of some factors that stand on a side's axes."""
    return tuple(vertex for vertex in heads if vertex in side.vertices)


def _met(queries: Side, keys: Side, heads: Sequence[int]) -> IntArray | None:
    """Which head of keys every head of queries meets; ``None`` where it meets several."""
    sizes = {v: size for side in (queries, keys) for parts in side.parts for v, size in parts}
    meet = []
    for side in (queries, keys):
        numbers = np.arange(prod(sizes[v] for v in side.heads))
        shape = [sizes[v] if v in side.heads else 1 for v in heads]
        whole = [sizes[v] for v in heads]
        meet.append(np.broadcast_to(numbers.reshape(shape), whole).ravel())
    if len(np.unique(meet[0])) < len(meet[0]):
        return None
    found: IntArray = meet[1][np.argsort(meet[0])]
    return found


def _normalized(graph: ChannelGraph, vertex: int) -> bool:
    """Whether something normalizes over the channels on a factor: a norm of queries or keys."""
    role, on_it = roles(graph.couplings), graph.groups_on(vertex)
    return any(on_it & graph.groups_on(int(each)) for each in np.flatnonzero(role.normalizes))


def _mixed(graph: ChannelGraph, op_index: int, product: Logits) -> tuple[Side, Side] | None:
    """The values of an attention of one node and their mixtures, elements as what is summed."""
    node = graph.ops[op_index].ir
    port = facts_of(node).mixes
    parts = [None if port is None else _parts(graph, op_index, each) for each in (port or 0, ~0)]
    value = None if port is None else node.inputs[port]
    if parts[0] is None or parts[1] is None or value is None:
        return None
    queries, keys = product.queries, product.keys
    names = [value.name or "", node.outputs[0].name or ""]
    sides = [Side(n, p, (), keys.summed) for n, p in zip(names, parts, strict=True) if p]
    sides = [replace(side, heads=_among(side, queries.heads), pair=keys.pair) for side in sides]
    own = sides[0].vertices - keys.vertices - {*queries.heads} or {keys.summed}
    if own != {keys.summed}:
        sides = [replace(side, pair=None) for side in sides]
    if len(own) != 1 or names[0] in (queries.value, keys.value) or not own <= sides[1].vertices:
        return None
    values, result = (replace(side, summed=min(own)) for side in sides)
    return (values, result) if result.heads == queries.heads else None


def _weights(graph: ChannelGraph, op_index: int, places: Mapping[str, int]) -> Side | None:
    """What a softmax makes of a product, summed over the keys; ``None`` where none is found."""
    value = graph.ops[op_index].ir.outputs[0]
    shape, parts = static_shape(value), _parts(graph, op_index, ~0)
    for _ in range(STEPS):
        uses = [use.node for use in value.uses() if len(use.node.outputs) == 1]
        ahead = [node for node in uses if static_shape(node.outputs[0]) == shape]
        if len(ahead) != 1 or parts is None:
            return None
        node, value = ahead[0], ahead[0].outputs[0]
        place = places[node.name or ""]
        op = graph.ops[place]
        if facts_of(node).distribution:
            return _distribution(graph, place, value.name or "", parts)
        if op.contracted or op.statistical:
            return None
    return None


def _distribution(graph: ChannelGraph, op_index: int, name: str, parts: Parts) -> Side | None:
    """A softmax's result, with the factors of the product that it competes over."""
    competing = {graph.ops[op_index].factors[each] for each in graph.ops[op_index].statistical}
    axes = {
        graph.couplings.dims[edge.dim].axis
        for edge in graph.edges_of(op_index)
        if edge.factor in competing and edge.port < 0
    }
    if len(axes) != 1 or len(parts[min(axes)]) != 1:
        return None
    return Side(name, parts, (), parts[min(axes)][0][0])


def _parts(graph: ChannelGraph, op_index: int, port: int) -> Parts | None:
    """The factors of every axis of an operand; ``None`` where an axis is not their product.

    Of a result ``port`` is its complement.
    """
    node = graph.ops[op_index].ir
    value = node.inputs[port] if port >= 0 else node.outputs[~port]
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
