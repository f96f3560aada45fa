"""Pass ``narrowed``: norms of queries in a narrower network, and the layers ahead of them.

Where a norm's result is multiplied with numbers, these are fitted to the logits of the whole
network (:mod:`morphgraph.passes.calibration.normed`). Where the layer that makes what is normalized
is known, too, each of a head's elements that stay becomes a mixture of all
(:mod:`morphgraph.passes.calibration.mixing`), and then the numbers are fitted once more.

What the norm computes is tried, not read: the layer's outputs are replaced by two patterns of
different size, which tells what is added to the mean of squares; the norm of each head by itself,
or of all together, with a mean taken off before or without, must then give what the network gives.
Where none does, the elements that stay are slices.
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
from morphgraph.passes.calibration.logits import Logits
from morphgraph.passes.calibration.mixing import Norm, Queries, best_mixtures
from morphgraph.passes.calibration.normed import (
    ROUNDING,
    Named,
    Sampled,
    Terms,
    best_scales,
    moments_by_query,
)
from morphgraph.passes.calibration.readers import Reader, following

#: Bytes of the second moments of the queries of heads that are normalized together.
QUERIES_BYTES = 2**28
#: Sizes of the patterns by which a norm is tried, relative to what it normalizes.
SMALL, LARGE = 0.1, 1000.0


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What changes ahead of a product and behind the norm of its queries.

    Attributes:
        product: the product.
        factors: of the numbers that its queries are multiplied with, in their shape.
        outputs: of the layer ahead of the norm, by head and element, ``[heads, size]``.
        places: where mixtures of them stand, ``[heads, kept]``.
        mixtures: ``[heads, size, kept]``; of no heads where they are slices.
    """

    product: Logits
    factors: FloatArray
    outputs: IntArray
    places: IntArray
    mixtures: FloatArray


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
    assert product.scale is not None
    positions = selection.vertex(product.summed)
    kept = np.arange(terms.size) if positions is None else product.elements(positions)
    moments = [terms.moments(each, kept, selection) for each in both]
    start = np.ones(len(kept))
    factors = np.stack([best_scales(*each, start) for each in zip(*moments, strict=True)])
    rows, layer = product.scale.rows, layers.get(product.scale.layer)
    no_heads = np.zeros((0, terms.size), dtype=np.int64)
    outputs, mixtures = no_heads, np.zeros((0, terms.size, len(kept)))
    if rows is not None and layer is not None and len(kept) < terms.size:
        alive = np.flatnonzero(
            np.isin(rows[:, kept], outputs_that_stay(layer, selection)).all(axis=1)
        )
        found = _Mixing(terms, layer, rows, kept, alive).fitted(both, factors)
        if found is not None:
            outputs, (factors, mixtures) = rows[alive], found
    numbers = np.ones(terms.numbers.size)
    for own, each in zip(terms.rows, factors, strict=True):
        numbers[own[kept]] = each
    shaped = numbers.reshape(terms.numbers.shape)
    return Narrowed(product, shaped, outputs, outputs[:, kept], mixtures)


def _touched(graph: ChannelGraph, product: Logits, selection: AxisSelection) -> bool:
    """Whether queries or keys lose something, and not all."""
    sides = product.queries, product.keys
    axes = [(side.value, axis) for side in sides for axis in range(len(graph.shapes[side.value]))]
    left = [selection.axis(*each) for each in axes]
    return any(each is not None for each in left) and all(
        each is None or len(each) for each in left
    )


@dataclass(frozen=True, eq=False)
class _Looked:
    """What is looked at of a batch, of heads that stay.

    Attributes:
        elements: what the layer makes, ``[samples, heads, places, size]``.
        own, beside: what a number adds to its own element and to the other one, per unit of the
            norm's result, ``[samples, heads, places, kept]``.
        rest: what the terms are to add up to, ``[samples, heads, places, places of keys]``.
        keys: at the elements that stay, and at those beside them, of all heads of keys,
            ``[samples, heads, places of keys, kept]``.
        weights: how much a query takes of a key.
    """

    elements: Array
    own: Array
    beside: Array
    rest: Array
    keys: tuple[Array, Array]
    weights: Array


class _Mixing:
    """The mixtures of one product's queries.

    Args:
        terms: of the narrower network.
        layer: the layer ahead of the norm.
        rows: its outputs, by head and element.
        kept: the elements that stay.
        alive: the heads that stay.
    """

    def __init__(
        self, terms: Terms, layer: Reader, rows: IntArray, kept: IntArray, alive: IntArray
    ) -> None:
        self.terms, self.layer, self.rows = terms, layer, rows
        self.kept, self.alive = kept, alive
        self.axis = layer.linear.output_axis(len(static_shape(layer.result)))
        self.name = layer.result.name or ""
        self.after = following(layer)
        #: A pattern of the layer's outputs, of which no mean is large.
        self.signs = np.ones(self.after.scale.size)
        self.signs[rows[:, kept]] = 1.0 - 2.0 * (np.arange(len(kept)) % 2)

    def fitted(
        self, both: tuple[Sampled, Sampled], factors: FloatArray
    ) -> tuple[FloatArray, FloatArray] | None:
        """Factors of the numbers, ``[sets, kept]``, and mixtures; ``None`` where all is as it was.

        Args:
            both: what is fitted to, and what was kept aside.
            factors: of the numbers, for slices.
        """
        found = self._norm(both[0]) if self._able(both) else None
        if found is None:
            return None
        norm, together = found
        looked = [list(self._looked(each, norm, together)) for each in both]
        heads, set_of = np.arange(len(self.alive)), self.terms.set_of[self.alive]
        start = np.tile(np.eye(self.terms.size)[:, self.kept], (len(heads), 1, 1))
        mixtures, count = start.copy(), len(self.kept) + 1
        moments = np.zeros((2, len(factors), count, count))
        for those in self._sets(together):
            queries = [self._queries(each, those) for each in looked]
            scaled = [each.scaled(factors[set_of[those]]) for each in queries]
            mixtures[those] = best_mixtures(start[those], *scaled, norm)
            for total, each in zip(moments, queries, strict=True):
                np.add.at(total, set_of[those], each.terms(mixtures[those], norm))
        if (mixtures == start).all():
            return None
        again = [best_scales(*each) for each in zip(*moments, factors, strict=True)]
        return np.stack(again), mixtures

    def _able(self, both: tuple[Sampled, Sampled]) -> bool:
        """Whether the layer's results are at hand, and may be any numbers."""
        after = self.after
        known = all(self.name in each.given for each in both)
        free = not (after.added or after.clamps) and len(after.scale) == 1 and after.scale.all()
        return known and bool(free) and len(self.kept) > 1 and len(self.alive) > 0

    def _sets(self, together: bool) -> list[IntArray]:
        """Heads that are normalized together, as places among those that stay."""
        every = np.arange(len(self.alive))
        return [every] if together else [*every[:, None]]

    # -- what the norm computes ----------------------------------------------------------------

    def _norm(self, sampled: Sampled) -> tuple[Norm, bool] | None:
        """The norm ahead of the product, and whether of all heads together."""
        values = next(iter(sampled.values), None)
        elements = None if values is None else self._elements(values)
        if values is None or elements is None:
            return None
        size = float(np.sqrt(np.square(elements, dtype=np.float64).mean()))
        small, large = SMALL * size, LARGE * size
        found = [self._own(self._filled(values, each)) for each in (small, large)]
        energy = float(np.square(found[1]).sum())
        share = float((found[0] * found[1]).sum()) / max(energy, 1e-30)
        expected = self._own(values)
        kept = elements[:, self.alive][..., self.kept]
        for centered in (False, True):
            spread = float(Norm(0.0, centered)(self._pattern())[1].item()) ** 2
            left = (share * large) ** 2 - small**2
            if spread <= 0 or left <= 0 or share <= 0:
                continue
            epsilon = max((small * large) ** 2 * spread * (1 - share**2) / left, 0.0)
            norm = Norm(epsilon, centered)
            for together in (False, True):
                given = (
                    found[1]
                    / norm(large * self._pattern())[0]
                    * self._by_sets(kept, norm, together)
                )
                if np.abs(given - expected).max() <= ROUNDING * np.abs(expected).max():
                    return norm, together
        return None

    def _pattern(self) -> FloatArray:
        """That of a head, ``[1, 1, kept]``."""
        found: FloatArray = self.signs[self.rows[0, self.kept]][None, None]
        return found

    def _by_sets(self, elements: Array, norm: Norm, together: bool) -> Array:
        """What a norm gives for ``[samples, heads, places, kept]``."""
        flat = elements.swapaxes(0, 1).reshape(elements.shape[1], -1, elements.shape[3])
        found = np.concatenate([norm(flat[those])[0] for those in self._sets(together)])
        back = elements.shape[1], elements.shape[0], *elements.shape[2:]
        whole: Array = found.reshape(back).swapaxes(0, 1)
        return whole

    def _own(self, values: Arrays) -> Array:
        """What numbers add to their own elements, of heads and elements that stay."""
        found: Array = self.terms(values)[0][:, self.alive][..., self.kept].astype(np.float64)
        return found

    def _filled(self, values: Arrays, size: float) -> Arrays:
        """The same where the layer gives the pattern in this size, everywhere."""
        plain = (self.signs * size - self.after.shift[0]) / self.after.scale[0]
        filled = np.moveaxis(values[self.name].copy(), self.axis, -1)
        filled[..., self.rows] = plain[self.rows]
        return {**values, self.name: np.moveaxis(filled, -1, self.axis)}

    def _elements(self, values: Arrays) -> Array | None:
        """What is normalized, ``[samples, heads, places, size]``; ``None``: it stands otherwise."""
        flat = np.moveaxis(values[self.name], self.axis, -1)
        flat = flat.reshape(-1, flat.shape[-1]) * self.after.scale[0] + self.after.shift[0]
        samples, _, places, _ = self.terms(values)[0].shape
        if len(flat) != samples * places:
            return None
        by_place: Array = flat[:, self.rows].reshape(samples, places, *self.rows.shape)
        return by_place.swapaxes(1, 2)

    # -- what is fitted to ---------------------------------------------------------------------

    def _looked(self, sampled: Sampled, norm: Norm, together: bool) -> Iterator[_Looked]:
        """What is looked at, batch by batch."""
        unit = norm(LARGE * self._pattern())[0]
        heads = len(self.alive) if together else 1
        enough = max(FEWEST_QUERIES, QUERIES_PER_ELEMENT * self.terms.size)
        room = QUERIES_BYTES // (4 * heads * (len(self.kept) + 1) ** 2)
        there = sum(seen["weights"].shape[0] * len(seen["places"]) for seen in sampled.seen)
        step = max(1, -(-there // max(1, min(enough, room))))
        for values, seen in zip(sampled.values, sampled.seen, strict=True):
            every = np.arange(len(seen["places"]))[::step]
            places, key_of = seen["places"][every], self.terms.product.key_of[self.alive]
            own, beside, nothing, keys = self.terms(self._filled(values, LARGE))
            met = keys[:, key_of]
            rest = seen["logits"][:, self.alive][:, :, every]
            rest = rest - nothing[:, self.alive][:, :, places] @ met.swapaxes(2, 3)
            elements = self._elements(values)
            assert elements is not None
            chosen = np.ix_(np.arange(len(own)), self.alive, places, self.kept)
            yield _Looked(
                elements[:, self.alive][:, :, places],
                own[chosen] / unit,
                beside[chosen] / unit,
                rest,
                (met[..., self.kept], met[..., self.terms.partner[self.kept]]),
                seen["weights"][:, self.alive][:, :, every],
            )

    def _queries(self, looked: Sequence[_Looked], heads: IntArray) -> Queries:
        """Heads that are normalized together, at all places that are looked at."""
        elements, moments = [], []
        for head in heads:
            parts = [
                moments_by_query(
                    (each.own[n, head], each.beside[n, head]),
                    (each.keys[0][n, head], each.keys[1][n, head]),
                    each.rest[n, head],
                    each.weights[n, head],
                )
                for each in looked
                for n in range(len(each.own))
            ]
            moments.append(np.concatenate(parts))
            own = [each.elements[:, head].reshape(-1, self.terms.size) for each in looked]
            elements.append(np.concatenate(own))
        return Queries(np.stack(elements).astype(np.float64), np.stack(moments))


def mixed(
    found: Sequence[Narrowed], layers: Mapping[str, Reader], selection: AxisSelection
) -> dict[str, Turn]:
    """By the name of a linear layer how the elements that stay are mixtures of all.

    Args:
        found: what changes ahead of products.
        layers: the network's linear layers.
        selection: which elements stay.
    """
    made: dict[str, Turn] = {}
    for each in found:
        if len(each.outputs) and each.product.scale is not None:
            layer = layers[each.product.scale.layer]
            parts = [(each.outputs, each.places, each.mixtures)]
            made[layer.name] = Turn(outputs_that_stay(layer, selection), parts)
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
