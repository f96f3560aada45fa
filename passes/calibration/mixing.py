"""Ahead of a norm of queries: mixtures of a head's elements that make up for those that go.

A layer makes a head's elements ``x``, a norm divides what stays of them by its size, numbers scale
the result, and positions may turn it. Whatever the layer makes instead passes the norm, so each
element that stays may be a mixture of all that were there, ``B' x`` with a matrix ``B`` of a
column for each, which the layer takes into the rows of its kernel. With the norm ``N`` over what
stays, and ``t`` what a number adds to the logits per unit of the norm's result, these are::

    sum_e t_e N(B' x)_e,      N(v) = v / sqrt(mean(v^2) + epsilon)

The keys and the numbers as they are, every query has one matrix ``G`` of second moments of its
``t`` and, last, of the logit in the whole network, over its keys as a softmax sees them. What is
minimized is the sum over queries of ::

    (N(B' x), -1) G (N(B' x), -1)'

No closed form is known, since the size of what is mixed divides it. But it is a smooth function of
a small matrix, and the gradient costs what it costs itself: limited memory BFGS (Liu and Nocedal
1989) goes down from the slices. In units in which the second moments of ``x`` are 1, and those of
the gradients, it curves alike in all directions, so that some dozens of steps do. Of the matrices
on the way the one stays that is best on inputs kept aside.

A rotation behind the norm forbids nothing: it is in ``t``, and what passes it is the norm's result,
whatever was mixed.
"""

from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Array, FloatArray

#: Steps of the descent, and those of which it remembers what they changed.
STEPS, MEMORY = 40, 10
#: Directions of a head with a smaller share of its largest second moment are left alone.
NOTHING = 1e-6


@dataclass(frozen=True)
class Norm:
    """A norm of heads, as a function of what it normalizes.

    Attributes:
        epsilon: added to the mean of squares.
        centered: the mean is taken off before.

    >>> Norm(0.0)(np.array([[[3.0, 4.0]]]))[0].round(3)  # of one head
    array([[[0.849, 1.131]]])
    """

    epsilon: float
    centered: bool

    def __call__(self, elements: Array) -> tuple[Array, Array]:
        """``[heads, places, size]`` over its size, and this size, ``[1, places, 1]``."""
        if self.centered:
            elements = elements - elements.mean(axis=(0, 2), keepdims=True)
        square = np.square(elements).mean(axis=(0, 2), keepdims=True)
        size = np.sqrt(np.maximum(square + self.epsilon, 1e-30))
        return elements / size, size

    def backwards(self, gradient: Array, unit: Array, size: Array) -> Array:
        """The gradient by what is normalized, from that by the result.

        Args:
            gradient: by the result, ``[heads, places, size]``.
            unit: the result.
            size: by what it was divided.
        """
        inner = gradient - unit * (gradient * unit).mean(axis=(0, 2), keepdims=True)
        if self.centered:
            inner = inner - inner.mean(axis=(0, 2), keepdims=True)
        found: Array = inner / size
        return found


@dataclass(frozen=True, eq=False)
class Queries:
    """Heads that are normalized together, at some places.

    Attributes:
        elements: what their layer makes, ``[heads, places, size]``.
        moments: over the keys of every query, of what each number behind the norm adds to the
            logit per unit of the norm's result, and of the logit in the whole network,
            ``[heads, places, kept + 1, kept + 1]``.
    """

    elements: Array
    moments: Array

    def scaled(self, factors: FloatArray) -> "Queries":
        """The same where the numbers have factors, ``[heads, kept]``."""
        every = np.append(factors, np.ones((len(factors), 1)), axis=1).astype(self.moments.dtype)
        return Queries(self.elements, self.moments * every[:, None, :, None] * every[:, None, None])

    def terms(self, mixtures: FloatArray, norm: Norm) -> FloatArray:
        """Second moments of the numbers' terms, summed over queries, last the logits'.

        ``[heads, kept + 1, kept + 1]``.
        """
        unit, _ = norm(self.elements @ mixtures)
        whole = np.append(unit, np.ones((*unit.shape[:2], 1)), axis=2)
        found: FloatArray = np.einsum("hpi,hpij,hpj->hij", whole, self.moments, whole)
        return found


def mixing_error(
    mixtures: FloatArray, queries: Queries, norm: Norm
) -> tuple[float, FloatArray, Array]:
    """Squared change of what a softmax sees of heads' logits, summed over queries.

    Args:
        mixtures: of a head's elements, one for each that stays, ``[heads, size, kept]``.
        queries: that are looked at.
        norm: of these heads together.

    Returns:
        The error; its gradient by the mixtures; and that by what is normalized.

    >>> one = Queries(np.array([[[3.0, 4.0]]]), np.array([[[[1.0, 2.0], [2.0, 4.0]]]]))
    >>> error, gradient, _ = mixing_error(np.array([[[1.0], [0.0]]]), one, Norm(0.0, False))
    >>> error, gradient.any()  # alone it is 1, whatever its size; it should be 2
    (1.0, np.False_)
    """
    unit, size = norm(queries.elements @ mixtures)
    whole = np.append(unit, np.full((*unit.shape[:2], 1), -1.0), axis=2)
    products = (queries.moments @ whole[..., None])[..., 0]
    by_mixed = norm.backwards(2 * products[..., :-1], unit, size)
    error = float((products * whole).sum())
    return error, queries.elements.swapaxes(1, 2) @ by_mixed, by_mixed


def best_mixtures(start: FloatArray, fitted: Queries, aside: Queries, norm: Norm) -> FloatArray:
    """Mixtures of which a descent on the first queries is best on the others, the start among them.

    Args:
        start: ``[heads, size, kept]``.
        fitted: queries to fit to.
        aside: others, to choose by.
        norm: of these heads together.
    """
    from scipy import optimize  # slow to import

    first, _, by_mixed = mixing_error(start, fitted, norm)
    if not first > 0 or not len(start):
        return start
    inward, outward = _units(fitted.elements), _units(by_mixed)
    best, least = start, mixing_error(start, aside, norm)[0]

    def mixtures(change: FloatArray) -> FloatArray:
        found: FloatArray = start + inward @ change.reshape(start.shape) @ outward
        return found

    def error(change: FloatArray) -> tuple[float, FloatArray]:
        found, gradient, _ = mixing_error(mixtures(change), fitted, norm)
        return found / first, (inward @ gradient @ outward).ravel() / first

    def look(change: FloatArray) -> None:
        nonlocal best, least
        here = mixtures(change)
        if (now := mixing_error(here, aside, norm)[0]) < least:
            best, least = here, now

    options = {"maxiter": STEPS, "maxcor": MEMORY}
    optimize.minimize(
        error, np.zeros(start.size), jac=True, method="L-BFGS-B", callback=look, options=options
    )
    return best


def _units(rows: Array) -> FloatArray:
    """Symmetric matrices after which second moments are 1, ``[heads, size, size]``."""
    values, vectors = np.linalg.eigh(rows.swapaxes(1, 2) @ rows / rows.shape[1])
    most = np.maximum(values[:, -1:], 1e-30)
    roots = np.where(values > NOTHING * most, np.maximum(values, NOTHING * most) ** -0.5, 0.0)
    found: FloatArray = (vectors * roots[:, None]) @ vectors.swapaxes(1, 2)
    return found
