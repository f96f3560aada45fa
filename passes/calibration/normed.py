"""Queries with a norm of their own: numbers of its scales that make up for elements that go.

A norm divides a query by its size, which is another one, place by place, where elements are gone.
The logits of what stays are no part of the whole logits then; but they still are linear in the
numbers ``g`` that the norm's result is multiplied with. With the queries and keys of the narrower
network, their norms over what stays, every number has a *term*: what the logit is where it alone is
as it was, the others 0. To the logits ``l`` of the whole network the terms ``t`` come nearest by
least squares, from their second moments over all pairs of places::

    E[ (l - sum_e f_e t_e)^2 ],      g_e becomes f_e g_e

as a softmax sees them (:mod:`morphgraph.passes.calibration.factors`). An element that is added to
another one on the way, as rotary embeddings do, meets two elements of the keys. Where heads share
the numbers, they have one set of factors together. What is asked of them, and of the layer ahead of
the norm, is in :mod:`morphgraph.passes.calibration.narrowed`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import Processes
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.factors import ridge_from, shares_of
from morphgraph.passes.calibration.logits import Logits, turned_by
from morphgraph.passes.calibration.scales import Holder, holder
from morphgraph.passes.calibration.segments import Piece

#: Numbers of terms that are in memory together.
TOGETHER = 2**21
#: Bytes of a product's samples that are held in memory.
IN_MEMORY = 2**20
#: A difference from what factors should give, as a share of it, that is rounding.
ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Sampled:
    """Places of the calibration inputs at which a product is looked at.

    Attributes:
        given: names of the values from which its queries and keys are computed.
        values: batch by batch these, and what else its operator reads.
        seen: batch by batch which places of queries are looked at (``"places"``), how much they
            take of the keys (``"weights"``, ``[samples, heads, places, places of keys]``), and
            their logits in the whole network (``"logits"``).
    """

    given: Sequence[str]
    values: Batches
    seen: Batches

    def shared(self, processes: Processes) -> "Sampled":
        """What all processes have seen, the same on all, in the order in which one sees it."""
        parts = [Batches(IN_MEMORY), Batches(IN_MEMORY)]
        for own, every in zip((self.values, self.seen), parts, strict=True):
            for turn in zip_longest(*processes.gather([*own])):
                for arrays in (each for each in turn if each is not None):
                    every.append(arrays)
        return Sampled(self.given, *parts)


class Named:
    """A network's nodes and values by name.

    Args:
        model: the network.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = {node.name or "": node for node in model.graph}
        self.values = {v.name or "": v for node in model.graph for v in node.outputs}
        self.values |= model.graph.initializers

    def holder(self, name: str) -> Holder:
        """Where the numbers of a norm are stored, which have been found in the original."""
        found = holder(self.values[name], self.model)
        assert found is not None  # no more read them than there
        return found


def sources(
    graph: ChannelGraph, places: Mapping[str | None, int], product: Logits, live: Collection[str]
) -> list[str]:
    """From what a product's queries and keys are computed, norms included: results of kernels.

    Args:
        graph: the lifted network.
        places: of the nodes, by name.
        product: the product.
        live: names of values that are known.
    """
    known, found = set(live), dict[str, None]()
    operands = {product.queries.value, product.keys.value}
    node = graph.ops[places[product.name]].ir
    waiting = [value for value in node.inputs if value is not None and value.name in operands]
    while waiting:
        value = waiting.pop()
        name, maker = value.name or "", value.producer()
        if name in found or name in graph.couplings.input_independent:
            continue
        if name in known or (maker is not None and _has_kernel(graph, places[maker.name])):
            found[name] = None
        elif maker is not None:
            waiting += [each for each in maker.inputs if each is not None and each.name]
    return list(found)


def _has_kernel(graph: ChannelGraph, op_index: int) -> bool:
    """Whether an operator sums products with weights."""
    op = graph.ops[op_index]
    summed = {op.factors[name] for name in op.contracted}
    return any(
        edge.factor in summed and edge.port >= 0 and not graph.couplings.on_activation(edge)
        for edge in graph.edges_of(op_index)
    )


class Terms:
    """The terms of a product in a network, the original or one in which elements are masked.

    Args:
        product: the product.
        original: its operator in the original.
        named: the network in its own size.
        given: names of the values that are known (:func:`sources`).
        threads: of ONNX Runtime.
    """

    def __init__(
        self,
        product: Logits,
        original: ir.Node,
        named: Named,
        given: Sequence[str],
        threads: int,
    ) -> None:
        assert product.scale is not None
        assert product.partner is not None
        assert product.queries.outputs is not None
        self.product, self.partner = product, product.partner
        self.outputs, self.scale = product.queries.outputs, product.scale.value
        #: The numbers of heads that have the same ones, ``[sets, size]``, and each head's set.
        self.rows, sets = np.unique(self.outputs, axis=0, return_inverse=True)
        self.set_of = sets.reshape(-1)
        there = [value and value.name for value in original.inputs]
        ports = [there.index(side.value) for side in (product.queries, product.keys)]
        operands = [named.nodes[product.name].inputs[port] for port in ports]
        self.original, self.size = original, len(self.partner)
        self.names = [(value and value.name) or "" for value in operands]
        self.numbers = named.holder(self.scale).array()
        first = self.partner >= np.arange(len(self.partner))
        self.first = np.zeros(self.numbers.size, dtype=bool)
        self.first[self.outputs[:, first]] = True
        self.second = np.zeros(self.numbers.size, dtype=bool)
        self.second[self.outputs[:, ~first]] = True
        self.piece = Piece(named.model, [*given, self.scale], self.names, threads, self._feed)

    def _feed(self, part: ir.Model) -> None:
        """Let the numbers be an input of a part of the model."""
        stored = part.graph.initializers.pop(self.scale, None)
        if stored is not None and stored not in part.graph.inputs:
            part.graph.inputs.append(stored)

    def __call__(self, values: Arrays) -> tuple[Array, Array, Array, Array]:
        """What every number adds to its own element of the queries, and to the other one.

        Then what there is without them, and the keys: all ``[samples, heads, places, size]``.
        """
        nothing, keys = self.both(self.run(values, np.zeros(self.numbers.size)), values)
        one, other = (
            self.both(self.run(values, 1.0 * at), values)[0] - nothing
            for at in (self.first, self.second)
        )
        elements = np.arange(len(self.partner))
        own = np.where(self.partner >= elements, one, other)
        beside = np.where(
            self.partner >= elements, one[..., self.partner], other[..., self.partner]
        )
        beside[..., self.partner == elements] = 0.0
        return own, beside, nothing, keys

    def run(self, values: Arrays, factors: FloatArray) -> Arrays:
        """The operands of the product, where the numbers have factors."""
        numbers = (self.numbers * factors.reshape(self.numbers.shape)).astype(np.float32)
        return self.piece.run({**values, self.scale: numbers})

    def close(self) -> None:
        """Give back the memory of weights that were read from files."""
        self.piece.close()

    def both(self, found: Arrays, values: Arrays) -> tuple[Array, Array]:
        """Queries and keys as they meet, ``[samples, heads, places, size]``."""
        product = self.product
        queries = product.queries.by_heads(found[self.names[0]], product.keys)
        keys = product.keys.by_heads(found[self.names[1]], product.queries)
        if product.queries.pair is None:
            return queries, keys
        return turned_by(self.original, values, queries), turned_by(self.original, values, keys)

    def agree(self, values: Arrays) -> bool:
        """Whether queries are what numbers and terms say, for numbers that are drawn."""
        apart = len(np.unique(self.rows)) == self.rows.size
        if not apart or (self.first & self.second).any():
            return False
        drawn = np.random.default_rng(0).normal(size=self.numbers.size)
        own, beside, nothing, _ = self(values)
        factors = drawn[self.outputs][None, :, None]
        expected = nothing + own * factors + (beside * factors)[..., self.partner]
        found, _ = self.both(self.run(values, drawn), values)
        wrong, size = np.abs(found - expected).max(), np.abs(found - nothing).max()
        return bool(wrong <= ROUNDING * size)

    def operands(self, values: Arrays) -> tuple[Array, Array]:
        """Queries and keys as they meet, the numbers as they are."""
        return self.both(self.run(values, np.ones(self.numbers.size)), values)

    def logits(self, values: Arrays, places: IntArray) -> Array:
        """Of some queries with all keys, ``[samples, heads, places, places of keys]``."""
        queries, keys = self.operands(values)
        found: Array = queries[:, :, places] @ keys[:, self.product.key_of].swapaxes(2, 3)
        return found

    def moments(
        self, sampled: Sampled, kept: IntArray, selection: AxisSelection | None = None
    ) -> FloatArray:
        """Second moments of the terms of some elements and, last, of what they are to add up to.

        ``[sets, kept + 1, kept + 1]``, summed over all that is looked at and over heads that have
        the same numbers.

        Args:
            sampled: what is looked at.
            kept: the elements.
            selection: heads that are gone count nothing.
        """
        total = np.zeros((len(self.rows), len(kept) + 1, len(kept) + 1))
        for values, seen in zip(sampled.values, sampled.seen, strict=True):
            own, beside, nothing, keys = self(values)
            places, weights = seen["places"], seen["weights"]
            if selection is not None:
                weights = weights * self._alive(selection, values)[:, :, places, None]
            for n, head in np.ndindex(*own.shape[:2]):
                k = keys[n, self.product.key_of[head]]
                total[self.set_of[head]] += moments_to_fit(
                    (own[n, head][places][:, kept], beside[n, head][places][:, kept]),
                    (k[:, kept], k[:, self.partner[kept]]),
                    seen["logits"][n, head] - nothing[n, head][places] @ k.T,
                    weights[n, head],
                )
        return total

    def _alive(self, selection: AxisSelection, values: Arrays) -> Array:
        """Whether a query stays, ``[samples, heads, places]``."""
        queries = self.product.queries
        found = self.piece.run({**values, self.scale: self.numbers.astype(np.float32)})
        alive = np.ones(found[self.names[0]].shape, dtype=np.float32)
        for axis in range(alive.ndim):
            stays = selection.axis(queries.value, axis)
            if stays is not None:
                gone = np.delete(np.arange(alive.shape[axis]), stays)
                np.moveaxis(alive, axis, 0)[gone] = 0.0
        whole: Array = queries.by_heads(alive, self.product.keys).max(axis=-1)
        return whole


def moments_to_fit(
    queries: tuple[Array, Array], keys: tuple[Array, Array], rest: Array, weights: Array
) -> FloatArray:
    """Second moments of a head's terms and of what they are to add up to, summed over queries.

    Args:
        queries: what every number adds to its own element, and to the other one,
            ``[places, kept]``.
        keys: at these elements, ``[places of keys, kept]``.
        rest: what the terms are to add up to, ``[places, places of keys]``.
        weights: how much a query takes of a key.

    >>> q, k = np.array([[2.0]]), np.array([[1.0], [-1.0]])
    >>> nothing, even = np.zeros((2, 1)), np.full((1, 2), 0.5)
    >>> moments_to_fit((q, 0 * q), (k, nothing), np.array([[3.0, -3.0]]), even).round(3)
    array([[4., 6.],
           [6., 9.]])
    """
    size = queries[0].shape[1] + 1
    total = np.zeros((size, size))
    step = max(1, TOGETHER // (len(keys[0]) * size))
    for start in range(0, len(rest), step):
        at = slice(start, start + step)
        terms = np.empty((*rest[at].shape, size), dtype=np.float32)
        np.multiply(queries[0][at, None], keys[0][None], out=terms[..., :-1])
        terms[..., :-1] += queries[1][at, None] * keys[1][None]
        terms[..., -1] = rest[at]
        shares = shares_of(weights[at])[:, :, None]
        terms -= (shares * terms).sum(axis=1, keepdims=True)
        terms *= np.sqrt(shares)
        flat = terms.reshape(-1, size)
        total += flat.T @ flat
    return total


def best_scales(fitted: FloatArray, aside: FloatArray, start: FloatArray) -> FloatArray:
    """Factors of a head's numbers, ``[kept]``: least squares from a start.

    With the ridge that is best on inputs kept aside; the start where none is better there.

    Args:
        fitted: second moments of the terms and of what they are to add up to,
            ``[kept + 1, kept + 1]``.
        aside: the same on inputs kept aside.
        start: 1 for numbers as they are.
    """
    own = fitted[:-1, :-1]
    return ridge_from(
        start, own, fitted[:-1, -1] - own @ start, lambda factors: scales_error(factors, aside)
    )


def scales_error(factors: FloatArray, moments: FloatArray) -> float:
    """Squared difference from what the terms are to add up to.

    >>> scales_error(np.array([1.0]), np.array([[4.0, 6.0], [6.0, 9.0]]))
    1.0
    """
    missing = np.append(-factors, 1.0)
    return float(missing @ moments @ missing)
