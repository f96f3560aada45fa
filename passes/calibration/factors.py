"""Queries that are turned by their places: factors that make up for elements that go.

Where positions rotate pairs of elements, no other basis passes the rotation, but a complex number
per pair does, ``a + ib``, and a real one where an element passes by itself. With it a pair
``(e, f)`` of queries ``q`` and keys ``k``, as they meet, adds to the logit::

    a (q_e k_e + q_f k_f) + b (q_e k_f - q_f k_e)

which is linear in as many numbers as a head has elements: its *terms*, that of ``a`` at the first
element of a pair and that of ``b`` at the second. Their second moments over all pairs of places say
all: of the whole head ``a = 1``, ``b = 0``, of what goes both are 0. A softmax does not see what is
added to all keys of a query, so that terms count from their means over the keys; and it sees those
alone that it may take, the more the more it takes of them. Half of the weight of a query's keys is
the same for all that it may take, half is what it takes.
"""

from collections.abc import Callable

import numpy as np

from morphgraph.arrays import Array, Flags, FloatArray, IntArray
from morphgraph.passes.calibration.moments import STRENGTHS
from morphgraph.passes.calibration.removal import DAMPING, Seen

#: Rows of a sample whose moments over the keys are in memory together.
TOGETHER = 64


def moments_of_terms(
    queries: Array, keys: Array, weights: Array, key_of: IntArray, partner: IntArray
) -> FloatArray:
    """Second moments of the terms of every head, summed over queries, ``[heads, size, size]``.

    Args:
        queries: as they meet the keys, ``[samples, heads, places, size]``.
        keys: the same of the heads of keys.
        weights: how much a query takes of a key, ``[samples, heads, places, places of keys]``.
        key_of: of every head of queries its head of keys.
        partner: of every element the one that is turned with it, or itself.

    >>> q, k = np.array([[[[1.0, 2.0]]]]), np.array([[[[3.0, 4.0], [1.0, 0.0]]]])
    >>> even = np.full((1, 1, 1, 2), 0.5)
    >>> moments_of_terms(q, k, even, np.array([0]), np.array([1, 0]))  # 11 and -2, 1 and -2
    array([[[25.,  0.],
            [ 0.,  0.]]])
    """
    heads, size = queries.shape[1], queries.shape[3]
    total = np.zeros((heads, size, size))
    for q, k, w in zip(queries, keys, weights, strict=True):
        k = k - k.mean(axis=1, keepdims=True)  # so that little cancels below
        for head in np.argsort(key_of, kind="stable"):
            own = k[key_of[head]]
            products = (own[:, :, None] * own[:, None, :]).reshape(len(own), -1)
            for start in range(0, q.shape[1], TOGETHER):
                rows = slice(start, start + TOGETHER)
                shares = shares_of(w[head, rows])
                mean = shares @ own
                spread = (shares @ products).reshape(-1, size, size)
                spread -= mean[:, :, None] * mean[:, None, :]
                total[head] += _of_terms(q[head, rows], spread, partner)
    return total


def shares_of(weights: Array) -> Array:
    """How much every key counts for a query, ``[places, places of keys]``; of each query 1."""
    taken = np.nan_to_num(weights)
    allowed = (taken > 0).astype(taken.dtype)
    parts = [each / np.maximum(each.sum(axis=1, keepdims=True), 1e-30) for each in (taken, allowed)]
    found: Array = (parts[0] + parts[1]) / 2
    return found


def _of_terms(queries: Array, spread: Array, partner: IntArray) -> FloatArray:
    """Second moments of terms from those of the keys, for every query, ``[size, size]``."""
    elements = np.arange(len(partner))
    sign = np.sign(partner - elements)  # 0: by itself
    own = queries[:, np.minimum(elements, partner)]
    other = queries[:, np.maximum(elements, partner)] * sign.astype(queries.dtype)
    left = own[:, :, None] * spread + other[:, :, None] * spread[:, partner]
    both = left * own[:, None, :] + left[:, :, partner] * other[:, None, :]
    found: FloatArray = both.sum(axis=0, dtype=np.float64)
    return found


def whole(partner: IntArray) -> FloatArray:
    """The factors of a head from which nothing is gone, ``[size]``."""
    return np.where(partner >= np.arange(len(partner)), 1.0, 0.0)


def seen_in_terms(moments: FloatArray, factors: FloatArray, blocks: IntArray) -> Seen:
    """What elements are to a product, whose terms are to it what inputs are to a kernel.

    Args:
        moments: of the terms, ``[heads, size, size]``.
        factors: those of the whole head, ``[size]``.
        blocks: elements of every channel, ``[channels, elements per channel]``.
    """
    energy = max(float(np.einsum("i,hij,j->", factors, moments, factors)), 1e-30)
    diagonal = np.diagonal(moments, axis1=1, axis2=2).mean(axis=1)
    damping = DAMPING * np.maximum(diagonal, 1e-30)[:, None, None] * np.eye(len(factors))
    matrix = np.tile(factors, (len(moments), 1, 1))
    return Seen(np.linalg.inv(moments + damping), matrix, blocks, energy)


def factors_error(factors: FloatArray, moments: FloatArray, partner: IntArray) -> float:
    """Mean squared change of what a softmax sees of a head's logits.

    Args:
        factors: 0 for what is gone, ``[size]``.
        moments: of the head's terms, ``[size, size]``.
        partner: of every element.
    """
    missing = whole(partner) - factors
    return float(missing @ moments @ missing)


def best_factors(
    fitted: FloatArray, aside: FloatArray, partner: IntArray, kept: IntArray
) -> FloatArray:
    """Factors of a head of which some elements stay, ``[size]``; 0 for those that go.

    Least squares from the elements as they are, with the ridge that is best on inputs kept aside;
    as they are where none is better there.

    Args:
        fitted: moments of the head's terms, ``[size, size]``.
        aside: the same on inputs kept aside.
        partner: of every element.
        kept: the elements that stay.
    """
    start = np.zeros(len(partner))
    start[kept] = whole(partner)[kept]
    missing = fitted @ (whole(partner) - start)
    found = start.copy()
    found[kept] = ridge_from(
        start[kept],
        fitted[np.ix_(kept, kept)],
        missing[kept],
        lambda factors: factors_error(_spread(factors, kept, len(partner)), aside, partner),
    )
    return found


def _spread(factors: FloatArray, kept: IntArray, size: int) -> FloatArray:
    found = np.zeros(size)
    found[kept] = factors
    return found


def ridge_from(
    start: FloatArray, moments: FloatArray, left: FloatArray, error: Callable[[FloatArray], float]
) -> FloatArray:
    """Least squares from a start, with the ridge whose error is least; the start if its own is.

    Args:
        start: factors.
        moments: of what they are multiplied with, ``[factors, factors]``.
        left: products of these with what is missing at the start, ``[factors]``.
        error: of factors, on inputs kept aside.
    """
    best, least = start, error(start)
    size = max(float(np.trace(moments)) / max(len(start), 1), 1e-30)
    for strength in STRENGTHS:
        found = start + np.linalg.solve(moments + strength * size * np.eye(len(start)), left)
        now = error(found)
        if now < least:
            best, least = found, now
    return best


def factor_basis(factors: FloatArray, partner: IntArray, kept: IntArray) -> FloatArray:
    """What to multiply a head's queries with, ``[size, kept]``.

    >>> factor_basis(np.array([2.0, 3.0]), np.array([1, 0]), np.array([0, 1]))  # 2 + 3i
    array([[ 2.,  3.],
           [-3.,  2.]])
    """
    found = np.zeros((len(partner), len(kept)))
    columns = np.arange(len(kept))
    first, second = np.minimum(kept, partner[kept]), np.maximum(kept, partner[kept])
    alone: Flags = first == second
    found[partner[kept], columns] = np.where(alone, 0.0, factors[second])
    found[second[first == kept], columns[first == kept]] *= -1.0
    found[kept, columns] = factors[first]
    return found
