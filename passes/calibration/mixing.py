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
memory BFGS (Liu and Nocedal 1989) goes down from a start. It does so in units in which the
second moments of ``x`` are 1, and those of what a random change of the logits asks of the norms'
operands: in these the curvature is about the same in all directions (as Kronecker factors:
Martens and Grosse 2015), so that some dozens of steps do. Of all on the way that stays which is
best on inputs kept aside.

A rotation behind the norm forbids nothing: it is in ``R``, and what passes it is the norm's result,
whatever was mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from morphgraph.arrays import Array, FloatArray, IntArray

#: Steps of the descent, and those of which it remembers what they changed.
STEPS, MEMORY = 40, 10
#: Directions with a smaller share of the largest second moment are left alone.
NOTHING = 1e-6
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
    units = _Units(start, fitted)
    best, least = start, mixing_error(start, aside)

    def error(change: FloatArray) -> tuple[float, FloatArray]:
        found, gradient = mixing_gradient(units.changed(change), fitted)
        return found / first, units.back(gradient) / first

    def look(change: FloatArray) -> None:
        nonlocal best, least
        here = units.changed(change)
        if (now := mixing_error(here, aside)) < least:
            best, least = here, now

    options = {"maxiter": STEPS, "maxcor": MEMORY}
    nothing = np.zeros(start.vector().size)
    optimize.minimize(error, nothing, jac=True, method="L-BFGS-B", callback=look, options=options)
    return best


class _Units:
    """Units in which the error curves about alike in all directions.

    Args:
        start: where that is asked.
        samples: on which.
    """

    def __init__(self, start: Mixtures, samples: Sequence[Sample]) -> None:
        self.start = start
        inward: dict[str, FloatArray] = {}
        outward: dict[str, FloatArray] = {}
        factors = np.zeros_like(start.factors)
        for sample in samples:
            met = _met(start, sample)
            shares = sample.shares  # the same change of each sample, however they are ordered
            signs = np.random.default_rng(0).choice([-1.0, 1.0], shares.shape).astype(np.float32)
            signs *= np.sqrt(2 * shares)
            signs -= shares * signs.sum(axis=2, keepdims=True)
            for side, (by_mixed, by_factors) in zip(SIDES, met.backwards(signs), strict=False):
                rows = getattr(sample, side).elements
                inward[side] = inward.get(side, 0.0) + rows.swapaxes(1, 2) @ rows
                outward[side] = outward.get(side, 0.0) + by_mixed.swapaxes(1, 2) @ by_mixed
                if side == "queries":
                    np.add.at(factors, start.set_of, np.square(by_factors).sum(axis=1))
        self.inward, self.outward = (
            {side: _roots(moments) for side, moments in each.items()} for each in (inward, outward)
        )
        self.factors = np.maximum(factors, NOTHING * max(float(factors.max()), 1e-30)) ** -0.5

    def changed(self, change: FloatArray) -> Mixtures:
        """The start with a change in these units."""
        return self.start.like(self.start.vector() + self._scaled(self.start.like(change)).vector())

    def back(self, gradient: Mixtures) -> FloatArray:
        """A gradient by the change in these units."""
        return self._scaled(gradient).vector()

    def _scaled(self, by: Mixtures) -> Mixtures:
        both = {
            side: inward @ getattr(by, side) @ self.outward[side]
            for side, inward in self.inward.items()
        }
        return replace(by, **both, factors=by.factors * self.factors)


def _roots(moments: FloatArray) -> FloatArray:
    """Symmetric matrices after which second moments are 1, ``[heads, size, size]``."""
    values, vectors = np.linalg.eigh(moments)
    least = NOTHING * np.maximum(values[:, -1:], 1e-30)
    roots = np.where(values > least, np.maximum(values, least) ** -0.5, 0.0)
    found: FloatArray = (vectors * roots[:, None]) @ vectors.swapaxes(1, 2)
    return found
