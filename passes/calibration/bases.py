"""Products of queries and keys that sum over fewer elements: what makes up for those that go.

An attention sums products of *queries* and *keys* over the size of a head, ``q k'`` for all pairs
of places. With ``A`` and ``B``, each ``[size, kept]``, it gives ``q A B' k'``, and over all pairs
of places the mean squared difference is::

    trace((A B' - 1)' Q (A B' - 1) K),    Q = E[q' q],  K = E[k' k]

so that two small matrices of second moments say all. Linear layers make queries and keys, and take
``A`` and ``B`` into their kernels. Where both do, the least difference is the rest of a singular
value decomposition, whichever elements are kept (Eckart and Young 1936). Where others see the
keys as they are, as a cache does, ``B`` is what is kept and ``A`` is the regression of all keys on
those. Where queries are turned on the way, ``A`` holds a factor for every pair
(:mod:`morphgraph.passes.calibration.factors`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from morphgraph.arrays import Array, FloatArray, IntArray
from morphgraph.onnx_io import static_shape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.compared import Compared
from morphgraph.passes.calibration.factors import (
    best_factors,
    factor_basis,
    seen_in_terms,
    whole,
)
from morphgraph.passes.calibration.logits import Logits
from morphgraph.passes.calibration.readers import Following, Reader
from morphgraph.passes.calibration.removal import DAMPING, Seen

#: Directions of a head with a smaller share of its largest second moment are no directions.
NOTHING = 1e-10


def shared_queries(product: Logits, queries: FloatArray, keys: int) -> FloatArray:
    """Second moments of all queries that meet a head of keys, ``[keys, size, size]``."""
    total = np.zeros((keys, *queries.shape[1:]))
    np.add.at(total, product.key_of, queries)
    return total


def seen_in_product(
    product: Logits, moments: tuple[FloatArray, FloatArray], blocks: IntArray
) -> Seen:
    """What elements are to a product, whose queries are to the keys what a kernel is to inputs.

    Args:
        product: of which elements may go.
        moments: of its queries and of its keys, or of its terms.
        blocks: elements of every channel, ``[channels, elements per channel]``.
    """
    if product.partner is not None:
        every = np.ones(len(product.partner))
        factors = whole(product.partner) if product.scale is None else every
        return seen_in_terms(moments[0], factors, blocks)
    queries, keys = moments
    total = shared_queries(product, queries, len(keys))
    inputs, kernel = (keys, total) if product.queries.reader else (total, keys)
    values, vectors = np.linalg.eigh(kernel)
    roots = np.sqrt(np.maximum(values, 0.0))[:, :, None] * vectors.swapaxes(1, 2)
    energy = max(float(np.einsum("hij,hji->", total, keys)), 1e-30)
    diagonal = np.diagonal(inputs, axis1=1, axis2=2).mean(axis=1)
    damping = DAMPING * np.maximum(diagonal, 1e-30)[:, None, None] * np.eye(inputs.shape[1])
    return Seen(np.linalg.inv(inputs + damping), roots, blocks, energy)


def remaining(
    product: Logits, moments: tuple[FloatArray, FloatArray], blocks: IntArray
) -> FloatArray | None:
    """What a product loses after each element that goes, a share of its energy, ``[elements]``.

    ``None`` where that depends on which ones go: where one operand alone is free, or several
    elements go together.
    """
    turned = product.partner is not None
    if turned or not (product.queries.reader and product.keys.reader) or blocks.shape[1] > 1:
        return None
    queries, keys = moments
    total = shared_queries(product, queries, len(keys))
    values, vectors = np.linalg.eigh(keys)
    half = np.sqrt(np.maximum(values, 0.0))[:, :, None] * vectors.swapaxes(1, 2)
    powers = np.maximum(np.linalg.eigvalsh(half @ total @ half.swapaxes(1, 2)), 0.0)
    energy = max(float(powers.sum()), 1e-30)
    lost: FloatArray = np.cumsum(powers.sum(axis=0)) / energy  # those of each head ascend
    return lost


def bases(
    product: Logits, moments: tuple[FloatArray, FloatArray], kept: IntArray
) -> tuple[FloatArray | None, FloatArray | None]:
    """What to multiply queries and keys with, ``[heads, size, kept]``; ``None``: as they are kept.

    Args:
        product: of which elements go.
        moments: of its queries and of its keys, or of its terms.
        kept: the elements that stay.
    """
    if product.partner is not None:
        turned = [
            factor_basis(best_factors(fitted, aside, product.partner, kept), product.partner, kept)
            for fitted, aside in zip(*moments, strict=True)
        ]
        return np.stack(turned), None
    queries, keys = moments
    together = shared_queries(product, queries, len(keys))
    chosen = np.eye(queries.shape[1])[:, kept]
    for_queries, for_keys = [], []
    for q, k in zip(together, keys, strict=True):
        pair = chosen, chosen
        if product.queries.reader and product.keys.reader:
            found = nearest(q, k, len(kept))
        elif product.queries.reader:
            found = _regression(k, kept), chosen
        else:
            found = chosen, _regression(q, kept)
        if logits_error(*found, q, k) < logits_error(*pair, q, k):
            pair = found
        for_queries.append(pair[0])
        for_keys.append(pair[1])
    return (
        np.stack(for_queries)[product.key_of] if product.queries.reader else None,
        np.stack(for_keys) if product.keys.reader else None,
    )


def logits_error(a: FloatArray, b: FloatArray, queries: FloatArray, keys: FloatArray) -> float:
    """Mean squared change of a head's products, by second moments.

    >>> one = np.eye(2)
    >>> logits_error(one[:, :1], one[:, :1], np.diag([1.0, 2.0]), np.diag([1.0, 3.0]))
    6.0
    """
    left = a @ b.T - np.eye(len(a))
    return float(np.einsum("ij,ik,kl,jl->", left, queries, left, keys, optimize=True))


def _regression(moments: FloatArray, kept: IntArray) -> FloatArray:
    """All elements by those that are kept, ``[size, kept]``."""
    own = moments[np.ix_(kept, kept)]
    return np.asarray(moments[:, kept] @ np.linalg.pinv(own, rcond=NOTHING, hermitian=True))


def nearest(queries: FloatArray, keys: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """The pair of this rank that changes the products least, both sides equally large.

    Args:
        queries, keys: second moments of a head's, ``[size, size]``.
        count: of elements that stay.
    """
    values, vectors = np.linalg.eigh(keys)
    roots = np.sqrt(np.maximum(values, NOTHING * max(float(values[-1]), 1e-30)))
    half, inverse = vectors * roots, vectors / roots
    powers, turned = np.linalg.eigh(half.T @ queries @ half)
    best = turned[:, ::-1][:, :count]
    sizes = np.maximum(powers[::-1][:count], NOTHING * max(float(powers[-1]), 1e-30)) ** 0.25
    return (half @ best) / sizes, (inverse @ best) * sizes


@dataclass
class Turn:
    """A layer's results in other bases, where they are operands of products.

    Attributes:
        kept: outputs of the layer that stay, ascending.
        parts: per operand outputs by head ``[heads, size]``, where the new ones stand
            ``[heads, kept]``, and the bases ``[heads, size, kept]``.
    """

    kept: IntArray
    parts: list[tuple[IntArray, IntArray, FloatArray]]

    def __call__(self, results: FloatArray) -> FloatArray:
        """``[..., outputs]`` becomes ``[..., kept]``."""
        found: FloatArray = results[..., self.kept]
        for outputs, places, basis in self.parts:
            turned = np.einsum("...hd,hdr->...hr", results[..., outputs], basis, optimize=True)
            found[..., np.searchsorted(self.kept, places)] = turned
        return found

    def results(self, before: Following, after: Following, results: Array) -> FloatArray:
        """Results as they are to be in the resized network, ``[places, 1, kept]``.

        Args:
            before: what comes behind them in the original.
            after: the same in the resized network, of outputs that stay.
            results: ``[places, 1, outputs]``.
        """
        turned = self(results[:, 0] * before.scale[0] + before.shift[0])
        found: FloatArray = (turned - after.shift[0]) / after.scale[0]
        return found[:, None]

    def kernel(self, reader: Reader, after: Following) -> tuple[FloatArray, FloatArray]:
        """The layer's matrix with new rows where old ones stay, and what is added to its result.

        ``[1, outputs, inputs, taps]`` and ``[1, outputs]``; rows of outputs that go are as before.
        """
        scale, bias = after.scale[0], reader.bias()
        matrix = reader.matrix()
        rows = matrix.reshape(len(scale), -1).copy()
        rows[self.kept] = self((rows * scale[:, None]).T).T / scale[self.kept, None]
        added = np.zeros_like(bias)
        sliced = Following(after.scale[:, self.kept], after.shift[:, self.kept])
        added[0, self.kept] = self.results(after, sliced, bias[:, None])[0, 0] - bias[0, self.kept]
        return rows.reshape(matrix.shape), added


def turns(seen: Compared, found: Mapping[str, Reader], selection: AxisSelection) -> dict[str, Turn]:
    """By the name of a linear layer how its results are turned.

    Args:
        seen: products, with second moments.
        found: the network's linear layers.
        selection: which elements stay.
    """
    made: dict[str, Turn] = {}
    for each in seen.products:
        elements = selection.vertex(each.summed)
        if elements is None or not len(elements) or each.scale is not None:
            continue
        elements = each.elements(elements)
        pair = bases(each, seen.moments[each.name], elements)
        for side, basis in zip((each.queries, each.keys), pair, strict=True):
            if basis is None or side.outputs is None:
                continue
            turn = made.setdefault(
                side.reader, Turn(outputs_that_stay(found[side.reader], selection), [])
            )
            places = side.outputs[:, elements]
            alive = np.isin(places, turn.kept).all(axis=1)
            turn.parts.append((side.outputs[alive], places[alive], basis[alive]))
    return made


def outputs_that_stay(reader: Reader, selection: AxisSelection) -> IntArray:
    """The outputs of a reader that stay."""
    axis = reader.linear.output_axis(len(static_shape(reader.result)))
    kept = selection.axis(reader.result.name or "", axis)
    return np.arange(prod(reader.matrix_shape[:2])) if kept is None else kept
