"""Ahead of norms of queries and keys: mixtures of elements that make up for those that go.

A layer makes a head's elements ``x``, a norm divides what stays of them by its size, numbers scale
the result, and positions may turn it. Whatever the layer makes instead passes the norm, so each
element that stays may be a mixture of all that were there, ``B' x`` with a matrix ``B`` of a
column for each, which the layer takes into the rows of its kernel. With the norm ``N`` over what
stays, and ``R`` what scales and turns its result at a place, which is linear, logits are ::

    q . k,      q = R N(B' x),      N(v) = v / sqrt(mean(v^2) + epsilon)

and likewise for keys, where nobody else sees them. With the factors ``f`` of the numbers behind the
queries' norm, what is minimized is the squared change of what a softmax sees of the logits of the
whole network (:mod:`morphgraph.passes.calibration.factors`)::

    sum over queries, keys of  share * (q . k - logit, from its mean over the keys)^2

No closed form is known, since the size of what is mixed divides it. But it is a smooth function of
a few small matrices, and all its derivatives together cost twice what it costs itself: limited
memory BFGS (Liu and Nocedal 1989) goes down from a start, some dozens of steps. Mixtures and
factors have no unit, since a norm does not see the size of what it normalizes. Of all on the way
that stays which is best on inputs kept aside. (Units in which the second moments of ``x`` are 1
ended in a worse minimum where they were tried.)

A rotation behind the norm forbids nothing: it is in ``R``, and what passes it is the norm's result,
whatever was mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from morphgraph.arrays import Array, FloatArray, IntArray

#: Steps of the descent, and those of which it remembers what they changed.
STEPS, MEMORY = 40, 10
#: The operands, as samples and mixtures name them.
SIDES = "queries", "keys"


@dataclass(frozen=True)
class Norm:
    """A norm of heads, as a function of what it normalizes.

    Attributes:
        epsilon: added to the mean of squares.
        centered: the mean is taken off before.
        together: all heads are normalized at once; else each by itself.

    >>> Norm(0.0)(np.array([[[3.0, 4.0]]]))[0].round(3)  # one head, one place
    array([[[0.849, 1.131]]])
    """

    epsilon: float
    centered: bool = False
    together: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """Of ``[heads, places, size]`` those over which it takes means."""
        return (0, 2) if self.together else (2,)

    def __call__(self, elements: Array) -> tuple[Array, Array]:
        """``[heads, places, size]`` over its size, and this size, of one head or of every."""
        if self.centered:
            elements = elements - elements.mean(axis=self.axes, keepdims=True)
        square = np.square(elements).mean(axis=self.axes, keepdims=True)
        size = np.sqrt(np.maximum(square + self.epsilon, 1e-30))
        return elements / size, size

    def backwards(self, gradient: Array, unit: Array, size: Array) -> Array:
        """The gradient by what is normalized.

        Args:
            gradient: by the result, ``[heads, places, size]``.
            unit, size: the result, and by what it was divided.
        """
        found: Array = gradient - unit * (gradient * unit).mean(axis=self.axes, keepdims=True)
        if self.centered:
            found = found - found.mean(axis=self.axes, keepdims=True)
        return found / size


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries or keys of a sample: what their layer makes, and what comes behind their norm.

    Attributes:
        elements: what the layer makes, ``[heads, places, size]``.
        own, beside: what an element adds, behind the norm, to itself and to the other one of its
            pair, per unit of the norm's result, ``[heads, places, kept]``.
        nothing: what is there without them, ``[heads, places, kept]``.
        norm: the norm.
        partner: of every element that stays the other one of its pair, or itself, ``[kept]``.
    """

    elements: Array
    own: Array
    beside: Array
    nothing: Array
    norm: Norm
    partner: IntArray

    def __call__(self, mixtures: FloatArray, factors: FloatArray) -> tuple[Array, Array, Array]:
        """What meets the other operand, ``[heads, places, kept]``; the norm's result and size.

        Args:
            mixtures: ``[heads, size, kept]``.
            factors: of the numbers behind the norm, ``[heads, kept]``.
        """
        unit, size = self.norm(self.elements @ mixtures)
        scaled = unit * factors[:, None]
        met = self.nothing + self.own * scaled + (self.beside * scaled)[..., self.partner]
        return met, unit, size

    def backwards(
        self, gradient: Array, unit: Array, size: Array, factors: FloatArray
    ) -> tuple[Array, Array]:
        """The gradients by what is normalized, and by the factors at every place.

        Args:
            gradient: by what meets the other operand, ``[heads, places, kept]``.
            unit, size: of the norm.
            factors: of the numbers behind it.
        """
        by_scaled = self.own * gradient + self.beside * gradient[..., self.partner]
        by_mixed = self.norm.backwards(by_scaled * factors[:, None], unit, size)
        return by_mixed, by_scaled * unit


@dataclass(frozen=True, eq=False)
class Sample:
    """Queries and keys that meet.

    Attributes:
        queries, keys: the operands; of keys that stay as they are alone ``nothing`` counts.
        key_of: of every head of queries its head of keys.
        shares: how much a key counts for a query, of each query 1, ``[heads, places, keys]``.
        logits: in the whole network.
    """

    queries: Operand
    keys: Operand
    key_of: IntArray
    shares: Array
    logits: Array


@dataclass(frozen=True, eq=False)
class Mixtures:
    """What may change.

    Attributes:
        queries: by head mixtures of its elements, ``[heads, size, kept]``.
        keys: the same of heads of keys; ``None`` where they stay as they are.
        factors: of the numbers behind the queries' norm, ``[sets, kept]``.
        set_of: of every head of queries which of these it has.
    """

    queries: FloatArray
    keys: FloatArray | None
    factors: FloatArray
    set_of: IntArray

    def vector(self) -> FloatArray:
        """All numbers behind each other."""
        parts = [self.queries, self.factors] + ([] if self.keys is None else [self.keys])
        return np.concatenate([part.ravel() for part in parts])

    def like(self, vector: FloatArray) -> "Mixtures":
        """The same with other numbers."""
        ends = np.cumsum([self.queries.size, self.factors.size])
        queries, factors, keys = np.split(vector, ends)
        return replace(
            self,
            queries=queries.reshape(self.queries.shape),
            factors=factors.reshape(self.factors.shape),
            keys=None if self.keys is None else keys.reshape(self.keys.shape),
        )


def mixing_error(mixtures: Mixtures, samples: Sequence[Sample]) -> float:
    """Squared change of what a softmax sees of the logits, summed over queries and heads."""
    return sum(_met(mixtures, sample).error for sample in samples)


def mixing_gradient(mixtures: Mixtures, samples: Sequence[Sample]) -> tuple[float, Mixtures]:
    """The same with its gradient by all that may change."""
    total, error = mixtures.like(np.zeros(mixtures.vector().size)), 0.0
    for sample in samples:
        met = _met(mixtures, sample)
        error += met.error
        for side, (by_mixed, by_factors) in zip(SIDES, met.backwards(met.wrong), strict=False):
            by_elements = getattr(sample, side).elements.swapaxes(1, 2) @ by_mixed
            getattr(total, side)[...] += by_elements
            if side == "queries":
                np.add.at(total.factors, mixtures.set_of, by_factors.sum(axis=1))
    return error, total


@dataclass(frozen=True, eq=False)
class _Met:
    """A sample in which something has changed."""

    mixtures: Mixtures
    sample: Sample
    queries: tuple[Array, Array, Array]
    keys: tuple[Array, Array, Array] | None
    #: Logits less those of the whole network, as a softmax sees them, times twice their shares.
    wrong: Array
    error: float

    def backwards(self, wrong: Array) -> list[tuple[Array, Array]]:
        """For queries, and keys where they may change, gradients at every place.

        By what is normalized and by factors, of some gradient by the logits.
        """
        sample, mixtures = self.sample, self.mixtures
        keys = sample.keys.nothing if self.keys is None else self.keys[0]
        by_queries = wrong @ keys[sample.key_of].astype(np.float32)
        factors = mixtures.factors[mixtures.set_of]
        _, unit, size = self.queries
        found = [sample.queries.backwards(by_queries, unit, size, factors)]
        if self.keys is not None and mixtures.keys is not None:
            by_head = wrong.swapaxes(1, 2) @ self.queries[0].astype(np.float32)
            by_keys = np.zeros(self.keys[0].shape)
            for head, key in enumerate(sample.key_of):
                by_keys[key] += by_head[head]
            ones = np.ones((len(mixtures.keys), mixtures.keys.shape[2]))
            _, unit, size = self.keys
            found.append(sample.keys.backwards(by_keys, unit, size, ones))
        return found


def _met(mixtures: Mixtures, sample: Sample) -> _Met:
    queries = sample.queries(mixtures.queries, mixtures.factors[mixtures.set_of])
    keys = None
    if mixtures.keys is not None:
        ones = np.ones((len(mixtures.keys), mixtures.keys.shape[2]))
        keys = sample.keys(mixtures.keys, ones)
    there = sample.keys.nothing if keys is None else keys[0]
    single = there[sample.key_of].astype(np.float32)
    wrong = queries[0].astype(np.float32) @ single.swapaxes(1, 2) - sample.logits
    wrong -= (sample.shares * wrong).sum(axis=2, keepdims=True)
    weighted = sample.shares * wrong
    error = float(np.einsum("hpk,hpk->", weighted, wrong, dtype=np.float64))
    return _Met(mixtures, sample, queries, keys, 2 * weighted, error)


def best_mixtures(start: Mixtures, fitted: Sequence[Sample], aside: Sequence[Sample]) -> Mixtures:
    """Where a descent on the first samples is best on the others, the start among it.

    Args:
        start: what is there before.
        fitted: samples to fit to.
        aside: others, to choose by.
    """
    from scipy import optimize  # slow to import

    first = mixing_error(start, fitted)
    if not first > 0:
        return start
    best, least = start, mixing_error(start, aside)

    def error(vector: FloatArray) -> tuple[float, FloatArray]:
        found, gradient = mixing_gradient(start.like(vector), fitted)
        return found / first, gradient.vector() / first

    def look(vector: FloatArray) -> None:
        nonlocal best, least
        here = start.like(vector)
        if (now := mixing_error(here, aside)) < least:
            best, least = here, now

    options = {"maxiter": STEPS, "maxcor": MEMORY}
    vector = start.vector()
    optimize.minimize(error, vector, jac=True, method="L-BFGS-B", callback=look, options=options)
    return best
