"""Pass ``narrowed``: norms of queries and keys in a narrower network, and the layers ahead of them.

Where the result of the queries' norm is multiplied with numbers, these are fitted to the logits of
the whole network (:mod:`morphgraph.passes.calibration.normed`). Where the layer that makes what is
normalized is known, too, each of a head's elements that stay becomes a mixture of all
(:mod:`morphgraph.passes.calibration.mixing`); that of keys, where nobody else sees these.

What the norm computes is tried, not read: the layer's outputs are replaced by patterns of different
sizes, which tells what is added to the mean of squares, and what comes behind the norm. Then the
norm of each head by itself, or of all together, with a mean taken off before or without, must give
what the network gives. Where none does, the elements that stay are slices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.mapped import take
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.bases import Turn, outputs_that_stay
from morphgraph.passes.calibration.compared import FEWEST_QUERIES, QUERIES_PER_ELEMENT, Compared
from morphgraph.passes.calibration.factors import shares_of
from morphgraph.passes.calibration.logits import Logits
from morphgraph.passes.calibration.mixing import Mixtures, Norm, Operand, Sample, best_mixtures
from morphgraph.passes.calibration.normed import ROUNDING, Named, Sampled, Terms, best_scales
from morphgraph.passes.calibration.readers import Reader, following

#: Bytes of the shares and logits to which mixtures are fitted.
SAMPLES_BYTES = 2**28
#: Sizes of the patterns by which a norm is tried, relative to what it normalizes.
SMALL, LARGE = 0.1, 1000.0

Part = tuple[IntArray, IntArray, FloatArray]
"""Outputs of a layer by head and element ``[heads, size]``, where mixtures of them stand ``[heads,
kept]``, and these, ``[heads, size, kept]``."""


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What changes ahead of a product and behind the norm of its queries.

    Attributes:
        product: the product.
        factors: of the numbers that its queries are multiplied with, in their shape.
        mixtures: names of layers ahead of norms, and how their elements are mixed.
    """

    product: Logits
    factors: FloatArray
    mixtures: Sequence[tuple[str, Part]]


def narrowed(
    graph: ChannelGraph,
    seen: Compared,
    layers: Mapping[str, Reader],
    masked: tuple[ir.Model, Mapping[int, IntArray]],
    threads: int,
) -> list[Narrowed]:
    """What brings products of queries with a norm nearest to those in the whole network.

    Args:
        graph: the lifted network.
        seen: its products.
        layers: its linear layers, by name.
        masked: the masked network, and per group index the channels that stay.
        threads: of ONNX Runtime.
    """
    named, whole = Named(masked[0]), Named(graph.model)
    selection = AxisSelection(graph, masked[1])
    made: list[Narrowed] = []
    for product in seen.products:
        if product.name not in seen.samples or not _touched(graph, product, selection):
            continue
        both = seen.samples[product.name]
        terms = Terms(product, whole.nodes[product.name], named, both[0].given, threads)
        made.append(_narrowed(product, both, terms, layers, selection))
        terms.close()
    return made


def _narrowed(
    product: Logits,
    both: tuple[Sampled, Sampled],
    terms: Terms,
    layers: Mapping[str, Reader],
    selection: AxisSelection,
) -> Narrowed:
    """What is best for one product."""
    positions = selection.vertex(product.summed)
    kept = np.arange(terms.size) if positions is None else product.elements(positions)
    moments = [terms.moments(each, kept, selection) for each in both]
    start = np.ones(len(kept))
    factors = np.stack(
        [best_scales(fitted, aside, start) for fitted, aside in zip(*moments, strict=True)]
    )
    mixtures: Sequence[tuple[str, Part]] = ()
    if 1 < len(kept) < terms.size:
        factors, mixtures = _Mixing(terms, layers, selection, kept).fitted(both, factors)
    numbers = np.ones(terms.numbers.size)
    for own, each in zip(terms.rows, factors, strict=True):
        numbers[own[kept]] = each
    return Narrowed(product, numbers.reshape(terms.numbers.shape), mixtures)


def _touched(graph: ChannelGraph, product: Logits, selection: AxisSelection) -> bool:
    """Whether queries or keys lose something, and not all."""
    sides = product.queries, product.keys
    axes = [(side.value, axis) for side in sides for axis in range(len(graph.shapes[side.value]))]
    left = [selection.axis(*each) for each in axes]
    return any(each is not None for each in left) and all(
        each is None or len(each) for each in left
    )


class _Mixing:
    """The mixtures ahead of one product.

    Args:
        terms: of the narrower network.
        layers: the network's linear layers, by name.
        selection: what stays.
        kept: the elements that stay.
    """

    def __init__(
        self,
        terms: Terms,
        layers: Mapping[str, Reader],
        selection: AxisSelection,
        kept: IntArray,
    ) -> None:
        self.terms, self.layers, self.selection, self.kept = terms, layers, selection, kept
        self.alive = np.zeros(0, dtype=np.int64)

    def fitted(
        self, both: tuple[Sampled, Sampled], factors: FloatArray
    ) -> tuple[FloatArray, Sequence[tuple[str, Part]]]:
        """Factors of the numbers, ``[sets, kept]``, and mixtures by layer; as it was, where best.

        Args:
            both: what is fitted to, and what was kept aside.
            factors: of the numbers, for slices.
        """
        product = self.terms.product
        values = next(iter(both[0].values), None)
        queries = self._side(0, np.arange(len(product.key_of)))
        if queries is None or values is None or not queries.tried(values):
            return factors, ()
        self.alive = queries.heads
        # Heads of keys that queries meet, every one once.
        rows = None if product.keys_scale is None else product.keys_scale.rows
        met = product.key_of[self.alive]
        names = met[:, None] if rows is None else rows[met]
        _, first, key_of = np.unique(names, axis=0, return_index=True, return_inverse=True)
        keys = self._side(1, met[first])
        if keys is not None and (len(keys.heads) < len(first) or not keys.tried(values)):
            keys = None
        sides = queries, keys, met[first], key_of.reshape(-1)
        start = Mixtures(
            queries.slices(),
            None if keys is None else keys.slices(),
            factors,
            self.terms.set_of[self.alive],
        )
        found = best_mixtures(start, *(list(self._samples(each, *sides)) for each in both))
        if found is start:
            return factors, ()
        made = [(queries.layer.name, queries.part(found.queries))]
        if keys is not None and found.keys is not None:
            made.append((keys.layer.name, keys.part(found.keys)))
        return found.factors, made

    def _side(self, which: int, heads: IntArray) -> "_Side | None":
        """Queries, or keys, whose layer is known and may make anything else instead.

        Args:
            which: 0: queries, 1: keys.
            heads: of the operand.
        """
        product = self.terms.product
        scale = (product.scale, product.keys_scale)[which]
        layer = None if scale is None else self.layers.get(scale.layer)
        if scale is None or layer is None or scale.rows is None:
            return None
        rows, stay = scale.rows[heads], outputs_that_stay(layer, self.selection)
        alive = np.isin(rows[:, self.kept], stay).all(axis=1)
        after = following(layer)
        free = not (after.added or after.clamps) and len(after.scale) == 1 and after.scale.all()
        if not free or not alive.any() or len(np.unique(rows)) < rows.size:
            return None
        return _Side(self.terms, which, layer, rows[alive], heads[alive], self.kept)

    def _samples(
        self,
        sampled: Sampled,
        queries: "_Side",
        keys: "_Side | None",
        met: IntArray,
        key_of: IntArray,
    ) -> Iterator[Sample]:
        """What is fitted to, sample by sample.

        Args:
            sampled: what is known.
            queries: the queries.
            keys: the keys; ``None``: they stay as they are.
            met: their heads.
            key_of: of every head of queries its place among these.
        """
        shapes = [seen["weights"].shape for seen in sampled.seen]
        if not shapes:
            return
        count, (_, _, places, width) = sum(shape[0] for shape in shapes), shapes[0]
        room = SAMPLES_BYTES // (8 * len(self.alive) * width)
        enough = max(1, min(room, max(FEWEST_QUERIES, QUERIES_PER_ELEMENT * self.terms.size)))
        wanted = _spread(count, -(-enough // places))
        few, first = -(-enough // len(wanted)), 0
        for values, seen in zip(sampled.values, sampled.seen, strict=True):
            here = wanted[(wanted >= first) & (wanted < first + len(seen["weights"]))] - first
            first += len(seen["weights"])
            if not len(here):
                continue
            every = _spread(len(seen["places"]), few)
            one = queries.operands(values, seen["places"][every])
            other = self._as_they_are(values, met) if keys is None else keys.operands(values)
            for n in here:
                weights = seen["weights"][n][self.alive][:, every]
                shares = shares_of(weights.reshape(-1, weights.shape[2])).reshape(weights.shape)
                logits = seen["logits"][n][self.alive][:, every]
                yield Sample(one[n], other[n], key_of, shares, logits)

    def _as_they_are(self, values: Arrays, heads: IntArray) -> list[Operand]:
        """Keys that stay as they are, of every sample."""
        found = self.terms.operands(values)[1][:, heads][..., self.kept]
        none, nobody = np.zeros((0, 0, 0)), np.zeros(0, dtype=np.int64)
        return [Operand(none, none, none, each, Norm(0.0), nobody) for each in found]


def _spread(count: int, wanted: int) -> IntArray:
    """Some of so many, evenly.

    >>> _spread(10, 3)
    array([0, 4, 9])
    """
    found: IntArray = np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)
    return found


class _Side:
    """Queries or keys, and the layer ahead of their norm.

    Args:
        terms: of the narrower network.
        which: 0: queries, 1: keys.
        layer: the layer ahead of the norm.
        rows: its outputs, by head and element, ``[heads, size]``.
        heads: of the operand.
        kept: the elements that stay.
    """

    def __init__(
        self,
        terms: Terms,
        which: int,
        layer: Reader,
        rows: IntArray,
        heads: IntArray,
        kept: IntArray,
    ) -> None:
        self.terms, self.which, self.layer = terms, which, layer
        self.rows, self.heads, self.kept = rows, heads, kept
        self.partner = np.searchsorted(kept, terms.partner[kept])
        self.after, self.name = following(layer), layer.result.name or ""
        self.axis = layer.linear.output_axis(len(static_shape(layer.result)))
        self.norm, self.size = Norm(0.0), 1.0
        #: Two patterns of elements, of which no mean is large, and of no pair a multiple.
        signs = 1.0 - 2.0 * (np.arange(len(kept)) % 2)
        first = self.partner >= np.arange(len(kept))
        halves: FloatArray = np.where(first, [[1.0], [0.5]], [[0.5], [1.0]])
        self.patterns: FloatArray = signs * halves

    def slices(self) -> FloatArray:
        """The elements that stay as they are, ``[heads, size, kept]``."""
        return np.tile(np.eye(self.rows.shape[1])[:, self.kept], (len(self.rows), 1, 1))

    def part(self, mixtures: FloatArray) -> Part:
        """Where mixtures stand."""
        return self.rows, self.rows[:, self.kept], mixtures

    def tried(self, values: Arrays) -> bool:
        """Whether a norm gives what the network gives; it is known from then on."""
        if self.name not in values:
            return False
        elements = self._elements(values)
        if elements is None:
            return False
        self.size = max(float(np.sqrt(np.square(elements, dtype=np.float64).mean())), 1e-30)
        small, large = SMALL * self.size, LARGE * self.size
        one, other = (self._odd(values, self.patterns[0] * each) for each in (small, large))
        share = float((one * other).sum() / max(float(np.square(other).sum()), 1e-30))
        left = (share * large) ** 2 - small**2
        expected = self._operand(values)
        for centered in (False, True) if share > 0 and left > 0 else ():
            spread = float(Norm(0.0, centered)(self.patterns[0][None, None])[1].item()) ** 2
            epsilon = max((small * large) ** 2 * spread * (1 - share**2) / left, 0.0)
            for together in (False, True):
                self.norm = Norm(epsilon, centered, together)
                ones = np.ones((len(self.rows), len(self.kept)))
                operands = self.operands(values)
                given = np.stack([each(self.slices(), ones)[0] for each in operands])
                nothing = np.stack([each.nothing for each in operands])
                wrong, size = np.abs(given - expected).max(), np.abs(expected - nothing).max()
                if wrong <= ROUNDING * size:
                    return True
        return False

    def operands(self, values: Arrays, places: IntArray | None = None) -> list[Operand]:
        """Of every sample what its layer makes, and what comes behind the norm.

        Args:
            values: what is given.
            places: those that are looked at; by default all.
        """
        patterns = [each * LARGE * self.size for each in self.patterns]
        units = [self.norm(each[None, None])[0][0, 0] for each in patterns]
        back = self._operand(self._filled(values, -patterns[0]))
        ahead = [self._operand(self._filled(values, each)) for each in patterns]
        nothing = (ahead[0] + back) / 2
        one, other = (each - nothing for each in ahead)
        # Each element is what it adds to itself and what the other one of its pair adds to it.
        (a, b), (c, d) = ((unit, unit[self.partner]) for unit in units)
        alone = self.partner == np.arange(len(self.kept))
        size = np.where(alone, 1.0, a * d - b * c)
        own = np.where(alone, one / a, (one * d - other * b) / size)
        added = np.where(alone, 0.0, (other * a - one * c) / size)
        beside = added[..., self.partner]
        elements = self._elements(values)
        assert elements is not None
        at = slice(None) if places is None else places
        return [
            Operand(
                x[:, at].astype(np.float64), a[:, at], b[:, at], n[:, at], self.norm, self.partner
            )
            for x, a, b, n in zip(elements, own, beside, nothing, strict=True)
        ]

    def _operand(self, values: Arrays) -> FloatArray:
        """What meets the other operand, ``[samples, heads, places, kept]``."""
        found = self.terms.operands(values)[self.which]
        return found[:, self.heads][..., self.kept].astype(np.float64)

    def _odd(self, values: Arrays, pattern: FloatArray) -> FloatArray:
        """What a pattern makes of it, less what its opposite does."""
        one, other = (self._operand(self._filled(values, each)) for each in (pattern, -pattern))
        return one - other

    def _filled(self, values: Arrays, pattern: FloatArray) -> Arrays:
        """The same where the layer gives a pattern in every head, everywhere."""
        scale, shift = self.after.scale[0], self.after.shift[0]
        places = self.rows[:, self.kept]
        filled = np.moveaxis(values[self.name].copy(), self.axis, -1)
        filled[..., places] = (pattern - shift[places]) / scale[places]
        return {**values, self.name: np.moveaxis(filled, -1, self.axis)}

    def _elements(self, values: Arrays) -> Array | None:
        """What is normalized, ``[samples, heads, places, size]``; ``None``: it stands otherwise."""
        flat = np.moveaxis(values[self.name], self.axis, -1)
        flat = flat.reshape(-1, flat.shape[-1]) * self.after.scale[0] + self.after.shift[0]
        samples, _, places, _ = self.terms.operands(values)[self.which].shape
        if len(flat) != samples * places:
            return None
        by_place: Array = flat[:, self.rows].reshape(samples, places, *self.rows.shape)
        return by_place.swapaxes(1, 2)


def mixed(
    found: Sequence[Narrowed], layers: Mapping[str, Reader], selection: AxisSelection
) -> dict[str, Turn]:
    """By the name of a linear layer how its elements that stay are mixtures of all.

    Args:
        found: what changes ahead of products.
        layers: the network's linear layers.
        selection: which elements stay.
    """
    made: dict[str, Turn] = {}
    for name, part in (pair for each in found for pair in each.mixtures):
        turn = made.setdefault(name, Turn(outputs_that_stay(layers[name], selection), []))
        turn.parts.append(part)
    return made


def write_scales(
    model: ir.Model, found: Sequence[Narrowed], selection: AxisSelection | None = None
) -> None:
    """Multiply the numbers behind norms of a network in place.

    Args:
        model: the network, in its own size, or resized.
        found: what changes ahead of products.
        selection: what stays, where the network is resized.
    """
    named = Named(model)
    for each in found:
        scale, factors = each.product.scale, each.factors
        assert scale is not None
        if scale.node not in named.nodes:
            continue
        if selection is None:
            held = named.holder(scale.value)
        else:
            value = named.nodes[scale.node].inputs[scale.port]
            held = named.holder((value and value.name) or "")
            factors = take(factors, selection.cuts(scale.value))
        held.write(held.array() * factors)
