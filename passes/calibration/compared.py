"""Pass ``compared``: what the calibration inputs make of the operands of products.

The original runs from product to product, piece by piece: of each product second moments alone are
kept, of its operands or, where queries are turned, of their terms
(:mod:`morphgraph.passes.calibration.factors`). Where queries have a norm of their own, which
divides by another number whenever other elements stay, samples are kept, too
(:mod:`morphgraph.passes.calibration.normed`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.graph import ChannelGraph
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.factors import moments_of_terms
from morphgraph.passes.calibration.logits import Logits, products, turned_by
from morphgraph.passes.calibration.moments import Moments
from morphgraph.passes.calibration.normed import IN_MEMORY, Named, Sampled, Terms, sources
from morphgraph.passes.calibration.readers import Reader, following, readers
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.calibration.visits import advance, beginning

SecondMoments = Mapping[str, tuple[FloatArray, FloatArray]]
"""By product those of queries and of keys, ``[heads, size, size]``; where queries are turned or
have a norm those of their terms, on inputs to fit to and on inputs kept aside."""

#: Queries of a head that are looked at per element, and the fewest.
QUERIES_PER_ELEMENT, FEWEST_QUERIES = 16, 2048
#: Bytes of the values that are kept of a product whose queries have a norm, and its queries.
SAMPLED_BYTES, QUERIES = 24 * 2**20, 8192
#: A difference from a rotation, as a share of what it gives, that is rounding.
ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Compared:
    """The products of a network that can be made up for, and what is known of their operands.

    Attributes:
        products: the products.
        moments: second moments of their operands, or terms.
        samples: by product whose queries have a norm places that it is fitted to, and others that
            were kept aside.
    """

    products: Sequence[Logits] = ()
    moments: SecondMoments = field(default_factory=dict)
    samples: Mapping[str, tuple[Sampled, Sampled]] = field(default_factory=dict)


def compared(
    graph: ChannelGraph,
    batches: Callable[[], Iterable[Arrays]],
    *,
    aside: Callable[[], Iterable[Arrays]] | None = None,
    threads: int = 0,
    processes: Processes = ALONE,
) -> Compared:
    """Products of queries and keys, and what the calibration inputs make of their operands.

    Args:
        graph: the lifted network.
        batches: feeds of the model, of this process; not asked for where there are no products.
        aside: others, which all processes have, to choose by; by default the same.
        threads: of ONNX Runtime.
        processes: that share the batches.
    """
    found = products(graph)
    if not found:
        return Compared()
    moments: dict[str, tuple[FloatArray, FloatArray]] = {}
    samples: dict[str, tuple[Sampled, Sampled]] = {}
    tried: list[Logits] = []
    makers = readers(graph.model, graph.couplings.input_independent)
    for stop in _stops(graph, found, batches(), threads):
        product: Logits | None = stop.product
        if stop.terms is not None:
            seen = _sampled(stop, stop.terms, processes)
            if seen is not None:
                tried.append(stop.product)
                samples[stop.product.name] = seen, seen
                terms = stop.terms.moments(seen, np.arange(stop.terms.size))[:, :-1, :-1]
                moments[stop.product.name] = terms, terms
            continue
        if product is not None and product.partner is not None and product.queries.pair is None:
            product = _tried(makers[product.queries.reader], stop, processes)
        if product is None:
            continue
        tried.append(product)
        if product.partner is None:
            moments[product.name] = _of_operands(stop, processes)
        else:
            terms = _of_terms(stop, processes)
            moments[product.name] = terms, terms
    turned = [each for each in tried if each.partner is not None]
    if aside is not None and turned:
        for stop in _stops(graph, turned, aside(), threads):
            name = stop.product.name
            if stop.terms is None:
                moments[name] = moments[name][0], _of_terms(stop, ALONE)
            elif (seen := _sampled(stop, stop.terms, ALONE)) is not None:
                samples[name] = samples[name][0], seen
    return Compared(tuple(tried), moments, samples)


@dataclass(eq=False)
class _Stop:
    """Where the walk stands in front of a product.

    Attributes:
        product: the product.
        node: its operator.
        threads: of ONNX Runtime.
        before: names of the nodes from the former product on, of what is live there, and the first
            of the batches there.
        model: the network.
        samples: its operands, what else its operator reads and its weights, batch by batch; to be
            used up before the next.
        batches: how many there are.
        given: where queries have a norm names of what they and the keys are computed from.
        terms: the terms of its queries then.
    """

    product: Logits
    node: ir.Node
    threads: int
    before: tuple[frozenset[str], Sequence[str], Arrays | None]
    model: ir.Model
    samples: Iterator[Arrays]
    batches: int
    given: Sequence[str] = ()
    terms: Terms | None = None


def _stops(
    graph: ChannelGraph, found: Sequence[Logits], batches: Iterable[Arrays], threads: int
) -> Iterator[_Stop]:
    model = graph.model
    nodes = list(model.graph)
    place, lifetimes, kept = beginning(model, batches)
    here, named = 0, Named(model)
    for product in sorted(found, key=lambda each: place[each.name]):
        cut = place[product.name]
        between = frozenset(each.name or "" for each in nodes[here:cut])
        before = between, lifetimes.at(here), kept[0] if len(kept) else None
        node = nodes[cut]
        asked = [value.name for value in node.inputs if value is not None and value.name]
        asked += [] if product.weights is None else [product.weights.value]
        given: list[str] = []
        terms = None
        if product.scale is None:
            kept, here = advance(model, lifetimes, kept, (here, cut), threads), cut
        else:  # what its norms see is there no more where it stands
            given = sources(graph, place, product, lifetimes.at(here))
            terms = Terms(product, node, named, given, threads)
        piece = Piece(model, lifetimes.at(here), [*asked, *given], threads)
        samples = (piece.run(arrays) for arrays in kept)
        yield _Stop(product, node, threads, before, model, samples, len(kept), given, terms)
        piece.close()
        if terms is not None:
            terms.close()
        kept, here = advance(model, lifetimes, kept, (here, cut), threads), cut
    kept.close()


def _sampled(stop: _Stop, terms: Terms, processes: Processes) -> Sampled | None:
    """What is kept of the inputs; ``None`` where queries are no sum of terms."""
    product = stop.product
    mixing = _Mixing(stop) if product.weights is None else None
    found = Sampled(stop.given, Batches(IN_MEMORY), Batches(IN_MEMORY))
    left, good = SAMPLED_BYTES // processes.count, True
    everywhere = int(processes.total(np.array([float(stop.batches)]))[0])
    for arrays in stop.samples:
        if left <= 0:
            break
        good = good and terms.agree(arrays)
        weights = _weights(product, mixing, arrays)
        samples, _, places, _ = weights.shape
        few = max(-(-QUERIES // (everywhere * samples)), places // 8)
        chosen = np.linspace(places - 1, 0, min(places, few)).round().astype(np.int64)
        read = [] if product.queries.pair is None else stop.node.inputs
        needed = {*stop.given, *(value.name or "" for value in read if value is not None)}
        found.values.append({name: arrays[name] for name in needed if name in arrays})
        found.seen.append(
            {
                "places": chosen,
                "weights": weights[:, :, chosen],
                "logits": terms.logits(arrays, chosen),
            }
        )
        left -= sum(arrays[name].nbytes for name in needed if name in arrays)
    return found.shared(processes) if all(processes.gather(good)) else None


def _of_operands(stop: _Stop, processes: Processes) -> tuple[FloatArray, FloatArray]:
    """Second moments of queries and of keys, ``[heads, size, size]``."""
    sides = stop.product.queries, stop.product.keys
    sums = [Moments(crossed=False) for _ in sides]
    for arrays in stop.samples:
        for side, each in zip(sides, sums, strict=True):
            rows = side.rows(arrays[side.value])
            each.add(rows, np.zeros((*rows.shape[:2], 0), dtype=rows.dtype))
    found = []
    for side, each in zip(sides, sums, strict=True):
        sizes = {vertex: size for parts in side.parts for vertex, size in parts}
        like = prod(sizes[v] for v in side.heads), sizes[side.summed], 0
        counted = each.statistics(like).shared(processes)
        mean = counted.mean_in
        found.append(counted.covariance + mean[:, :, None] * mean[:, None, :])
    return found[0], found[1]


def _of_terms(stop: _Stop, processes: Processes) -> FloatArray:
    """Second moments of the terms of turned queries, ``[heads, size, size]``."""
    product = stop.product
    assert product.partner is not None
    size = len(product.partner)
    heads = len(product.key_of)
    total, count = np.zeros((heads, size, size)), 0
    everywhere = processes.total(np.array([float(stop.batches)]))[0]
    enough = max(FEWEST_QUERIES, QUERIES_PER_ELEMENT * size) / max(everywhere, 1.0)
    mixing = _Mixing(stop) if product.weights is None else None
    for arrays in stop.samples:
        queries = product.queries.by_heads(arrays[product.queries.value], product.keys)
        keys = product.keys.by_heads(arrays[product.keys.value], product.queries)
        if product.queries.pair is not None:
            queries, keys = (turned_by(stop.node, arrays, each) for each in (queries, keys))
        weights = _weights(product, mixing, arrays)
        samples, _, places, _ = queries.shape
        few = min(places, max(1, round(enough / samples)))
        chosen = np.linspace(places - 1, 0, few).round().astype(np.int64)
        total += moments_of_terms(
            queries[:, :, chosen], keys, weights[:, :, chosen], product.key_of, product.partner
        )
        count += samples * few
    seen = float(processes.total(np.array([float(count)]))[0])
    return processes.total(total) / max(seen, 1.0)


def _weights(product: Logits, mixing: "_Mixing | None", arrays: Arrays) -> Array:
    """How much queries take of keys, ``[samples, heads, places, places of keys]``."""
    if product.weights is not None:
        return product.weights.by_heads(arrays[product.weights.value], product.keys)
    assert mixing is not None
    return mixing.weights(arrays)


class _Mixing:
    """How much queries take of keys in an attention of one node: what it makes of unit rows.

    Masks, windows and whatever else the operator knows are its own so.
    """

    def __init__(self, stop: _Stop) -> None:
        assert stop.product.mixed is not None
        self.values, self.result = stop.product.mixed
        self.keys = stop.product.keys
        node, initializers = stop.node, stop.model.graph.initializers
        operands = [value.name or "" for value in node.inputs if value is not None]
        given = [name for name in operands if name and name not in initializers]
        self.piece = Piece(stop.model, given, [self.result.value], stop.threads)
        port = max(facts_of(node).extends, default=len(node.inputs))
        past = node.inputs[port] if port < len(node.inputs) else None
        self.past = "" if past is None else past.name or ""

    def weights(self, arrays: Arrays) -> Array:
        """``[samples, heads, places, places of keys]``."""
        fed = dict(arrays)
        if self.past:
            fed[self.past] = np.zeros_like(fed[self.past])
        found, start = [], 0
        keys = self.keys.by_heads(arrays[self.keys.value], self.result).shape[2]
        while start < keys:
            fed[self.values.value], size = self._units(arrays[self.values.value], start)
            mixed = self.piece.run(fed)[self.result.value]
            found.append(self.result.by_heads(mixed, self.keys))
            start += size
        whole: Array = np.concatenate(found, axis=3)[..., :keys]
        return whole

    def _units(self, like: Array, start: int) -> tuple[Array, int]:
        """Values that are unit rows from a key on, and how many."""
        names, sizes = self.values.split(like)
        ends = [names.index(vertex) for vertex in self.values.inner]
        size = prod(sizes[k] for k in ends)
        (place,) = [
            k
            for k, name in enumerate(names)
            if name in self.keys.vertices and name not in self.result.vertices
        ]
        at = np.indices(sizes, sparse=True)
        column = sum(at[k] * prod(sizes[j] for j in ends[n + 1 :]) for n, k in enumerate(ends))
        same = at[place] == start + column
        units = np.broadcast_to(same, sizes).reshape(like.shape).astype(like.dtype)
        return units, size


def _tried(reader: Reader, stop: _Stop, processes: Processes) -> Logits | None:
    """A product whose queries are turned, its layer's outputs in the order in which pairs turn.

    ``None`` where factors do not pass what stands between: it is no rotation.
    """
    between, live, arrays = stop.before
    outcome: tuple[Logits | None] | None = None
    if reader.name not in between:  # what it gives is no more at hand
        outcome = (None,)
    elif arrays is not None:
        outcome = (_as_it_turns(stop, reader, live, arrays),)
    known = [each for each in processes.gather((outcome,)) if each[0] is not None]
    found = [each[0][0] for each in known if each[0] is not None]
    return found[0] if found and all(each is not None for each in found) else None


def _as_it_turns(stop: _Stop, reader: Reader, live: Sequence[str], arrays: Arrays) -> Logits | None:
    product, result = stop.product, reader.result.name or ""
    queries, partner = product.queries, product.partner
    assert queries.outputs is not None
    assert partner is not None
    whole = Piece(stop.model, live, [result], stop.threads)
    behind = Piece(stop.model, [*live, result], [queries.value], stop.threads)
    generator = np.random.default_rng(0)
    shape = whole.run(arrays)[result].shape
    after, axis = following(reader), reader.linear.output_axis(len(shape))
    scale, shift = after.scale[0], after.shift[0]

    def given(results: Array) -> Array:
        """What queries are where the layer gives these results, ``[places, heads, size]``."""
        plain = np.moveaxis((results - shift) / scale, -1, axis).astype(np.float32)
        found = behind.run({**arrays, result: plain})[queries.value]
        return queries.rows(found).astype(np.float64)

    plain = generator.normal(size=(*np.delete(shape, axis), shape[axis]))
    numbers = generator.normal(size=(*queries.outputs.shape, 2))
    numbers = (numbers + numbers[:, partner]) / 2  # the same for both of a pair
    expected = _times(given(plain), numbers, partner)
    size = np.abs(expected).max()
    outputs = queries.outputs
    for _ in range(2):
        changed = plain.copy()
        changed[..., outputs] = _times(plain[..., outputs], numbers, partner)
        wrong = np.abs(given(changed) - expected).max(axis=0) > ROUNDING * size
        if not wrong.any():
            return replace(product, queries=replace(queries, outputs=outputs))
        wrong |= wrong[:, partner]
        outputs = np.where(wrong, outputs[:, partner], outputs)
    return None


def _times(elements: FloatArray, numbers: FloatArray, partner: Array) -> FloatArray:
    """Pairs times complex numbers ``[heads, size, 2]``, single elements times the real parts."""
    sign = np.sign(np.arange(len(partner)) - partner)  # the first of a pair is the real part
    found: FloatArray = elements * numbers[..., 0] + elements[..., partner] * numbers[..., 1] * sign
    return found
