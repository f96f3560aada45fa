"""Second moments of what a linear map sees and is to give, streamed; least squares from them.

With rows ``x`` and wanted results ``y`` over all places, both counted from their means::

    covariance = E[x x'],  cross = E[y x'],  energy = E[y^2]

the affine map ``W x + b`` that is nearest to ``y`` has ``W = cross covariance^-1`` and
``b = E[y] - W E[x]``, and its error is ``energy - sum of W * cross``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import linalg

from morphgraph.arrays import Array, Flags, FloatArray
from morphgraph.calibration.processes import Processes

#: Bytes that the covariances of one reader's inputs may take: one map of 5,000 inputs.
MOST_BYTES = 8 * 5000**2
#: Inputs of a map from which products are taken in single precision, with those of what is wanted
#: and without; sums are always in double.
SINGLE_FROM = 512
UNCROSSED_SINGLE_FROM = 64
#: Strengths of the ridge that are tried, relative to the mean variance of the inputs.
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
#: Bytes of places that are summed together.
TOGETHER_BYTES = 32 * 2**20


def finite(rows: Array, wanted: Array) -> Flags:
    """At which places all that is seen and wanted is a finite number, ``[places]``."""
    # A sum that is a number is one of numbers.
    with np.errstate(all="ignore"):
        if np.isfinite(rows.sum()) and np.isfinite(wanted.sum()):
            return np.ones(len(rows), dtype=np.bool_)
    seen, given = (
        np.logical_and.reduce(np.isfinite(array), axis=(1, 2)) for array in (rows, wanted)
    )
    both: Flags = seen & given
    return both


class Moments:
    """Sums over places, in double precision.

    Rows are ``[places, groups, inputs]``, what is wanted ``[places, groups, outputs]``. Both are
    counted from the mean of the first batch, so that sums of squares do not cancel.

    >>> moments = Moments()
    >>> x = np.array([[[0.0]], [[1.0]], [[2.0]]])
    >>> moments.add(x, 3 * x + 1)
    >>> found = moments.statistics()
    >>> float(found.covariance[0, 0, 0]), float(found.cross[0, 0, 0]), float(found.mean_out[0, 0])
    (0.6666666666666666, 2.0, 4.0)

    Args:
        crossed: whether products of what is wanted with the rows are needed; without them
            ``cross`` is 0.
        among: how many there are that count at the same time, and share what memory may wait.
    """

    def __init__(self, crossed: bool = True, among: int = 1) -> None:
        self.crossed = crossed
        self._most_bytes = TOGETHER_BYTES // among
        self.count = 0
        self._started = False
        self._waiting: list[tuple[Array, Array]] = []
        self._bytes = 0

    def _start(self, x: Array, y: Array, kind: type[np.floating[Any]]) -> None:
        # Numbers that both precisions hold: what is subtracted is what is added again.
        self.first_in, self.first_out = (
            array.mean(axis=0, dtype=np.float64).astype(kind).astype(np.float64) for array in (x, y)
        )
        (groups, inputs), outputs = self.first_in.shape, self.first_out.shape[1]
        self.sum_in, self.sum_out = np.zeros((groups, inputs)), np.zeros((groups, outputs))
        self.squares = np.zeros((groups, inputs, inputs))
        self.energies = np.zeros((groups, outputs))
        self.products = np.zeros((groups, outputs, inputs if self.crossed else 0))

    def add(self, rows: Array, wanted: Array) -> None:
        """Count some places; what is no finite number is left out with its place."""
        good = finite(rows, wanted)
        if not good.all():
            rows, wanted = rows[good], wanted[good]
        if not len(rows):
            return
        self.count += len(rows)
        self._waiting.append((rows, wanted))
        self._bytes += rows.nbytes + wanted.nbytes
        if self._bytes >= self._most_bytes:
            self._sum()

    def _sum(self) -> None:
        """Sum over what waits: of a few places the sums would cost more than the products."""
        if not self._waiting:
            return
        rows, wanted = (np.concatenate(each) for each in zip(*self._waiting, strict=True))
        self._waiting, self._bytes = [], 0
        least = SINGLE_FROM if self.crossed else UNCROSSED_SINGLE_FROM
        kind = np.float32 if rows.shape[2] >= least else np.float64
        if not self._started:
            self._started = True
            self._start(rows, wanted, kind)
        x, y = (
            (array.astype(kind, copy=False) - first.astype(kind)).transpose(1, 0, 2)
            for array, first in ((rows, self.first_in), (wanted, self.first_out))
        )
        self.sum_in += x.sum(axis=1, dtype=np.float64)
        self.sum_out += y.sum(axis=1, dtype=np.float64)
        if x.shape[2] == 1:
            self.squares[:, 0, 0] += np.einsum("gni,gni->g", x, x)
        else:
            self.squares += x.swapaxes(1, 2) @ x
        self.energies += np.einsum("gno,gno->go", y, y, dtype=np.float64)
        if self.crossed:
            self.products += y.swapaxes(1, 2) @ x

    def statistics(self, like: tuple[int, int, int] | None = None) -> "Statistics":
        """What was counted, from the means; the sums are used up.

        Args:
            like: maps, inputs and outputs, where nothing may have been counted.
        """
        self._sum()
        if not self._started and like is not None:
            maps, inputs, outputs = like
            nothing = np.zeros((1, maps, inputs)), np.zeros((1, maps, outputs))
            self._start(*nothing, np.float64)
        count = max(self.count, 1)
        off_in, off_out = self.sum_in / count, self.sum_out / count
        self.squares /= count
        self.squares -= off_in[:, :, None] * off_in[:, None, :]
        self.products /= count
        if self.crossed:
            self.products -= off_out[:, :, None] * off_in[:, None, :]
        return Statistics(
            self.count,
            self.first_in + off_in,
            self.first_out + off_out,
            self.squares,
            self.products,
            np.maximum(self.energies / count - off_out**2, 0.0),
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means and second moments about them, over ``count`` places.

    Attributes:
        mean_in, mean_out: ``[groups, inputs]``, ``[groups, outputs]``.
        covariance: of what the map sees, ``[groups, inputs, inputs]``.
        cross: of what is wanted with it, ``[groups, outputs, inputs]``.
        energy: variance of what is wanted, ``[groups, outputs]``.
    """

    count: int
    mean_in: FloatArray
    mean_out: FloatArray
    covariance: FloatArray
    cross: FloatArray
    energy: FloatArray

    def shared(self, processes: Processes) -> "Statistics":
        """Those over the places that all processes have seen."""
        if processes.count == 1:
            return self
        own, total = float(self.count), processes.total
        count = float(total(np.array([own]))[0])
        weight = 1 / max(count, 1.0)
        mean_in, mean_out = (weight * total(own * m) for m in (self.mean_in, self.mean_out))
        off_in, off_out = self.mean_in - mean_in, self.mean_out - mean_out
        around = off_in[:, :, None] * off_in[:, None, :]
        crossed = off_out[:, :, None] * off_in[:, None, :]
        cross = self.cross
        if cross.shape == crossed.shape:
            cross = weight * total(own * (cross + crossed))
        return Statistics(
            int(count),
            mean_in,
            mean_out,
            weight * total(own * (self.covariance + around)),
            cross,
            weight * total(own * (self.energy + off_out**2)),
        )

    @staticmethod
    def pooled(
        parts: Sequence["Statistics"], weights: Sequence[float], centered: bool = True
    ) -> "Statistics":
        """Those over the places of several.

        Args:
            parts: none of them empty.
            weights: how much a place of each counts, relative to that of others.
            centered: whether moments are those about the mean of all; else each part's stay about
                its own mean, and the means are those of all.

        >>> one, other = Moments(), Moments()
        >>> one.add(np.ones((2, 1, 1)), np.ones((2, 1, 1)))
        >>> other.add(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
        >>> both = one.statistics(), other.statistics()
        >>> [Statistics.pooled(both, (1, 1), c).covariance.item() for c in (True, False)]
        [0.25, 0.0]
        """
        first, *_ = parts
        shares = [w * part.count for part, w in zip(parts, weights, strict=True)]
        total = max(sum(shares), 1e-300)

        def mean(arrays: Iterable[FloatArray]) -> FloatArray:
            found: FloatArray = np.zeros(())
            for share, array in zip(shares, arrays, strict=True):
                found = found + (share / total) * array
            return found

        mean_in, mean_out = mean(p.mean_in for p in parts), mean(p.mean_out for p in parts)
        covariance, cross = mean(p.covariance for p in parts), mean(p.cross for p in parts)
        energy = mean(p.energy for p in parts)
        for share, part in zip(shares, parts, strict=True) if centered else ():
            off_in, off_out = part.mean_in - mean_in, part.mean_out - mean_out
            if covariance.shape[1]:
                covariance += (share / total) * off_in[:, :, None] * off_in[:, None, :]
            if cross.shape[2]:
                cross += (share / total) * off_out[:, :, None] * off_in[:, None, :]
            energy += (share / total) * off_out**2
        count = sum(part.count for part in parts)
        return replace(
            first,
            count=count,
            mean_in=mean_in,
            mean_out=mean_out,
            covariance=covariance,
            cross=cross,
            energy=energy,
        )

    def copied(self) -> "Statistics":
        """The same, with a covariance of its own."""
        return replace(self, covariance=self.covariance.copy())

    def about_zero(self) -> "Statistics":
        """Moments about zero instead of the means: for maps that have no bias."""
        cross = self.cross
        if cross.shape[2]:  # it was counted
            cross = cross + self.mean_out[:, :, None] * self.mean_in[:, None, :]
        return Statistics(
            self.count,
            np.zeros_like(self.mean_in),
            np.zeros_like(self.mean_out),
            self.covariance + self.mean_in[:, :, None] * self.mean_in[:, None, :],
            cross,
            self.energy + self.mean_out**2,
        )

    def left_by(self, matrix: FloatArray) -> FloatArray:
        """What a map leaves to be explained, ``cross - matrix @ covariance``."""
        left: FloatArray = self.cross - matrix @ self.covariance
        return left

    def error(self, matrix: FloatArray) -> FloatArray:
        """Mean squared error of a map with the best bias, ``[groups, outputs]``."""
        product = matrix @ self.covariance - 2 * self.cross
        left: FloatArray = np.einsum("goi,goi->go", product, matrix) + self.energy
        return np.maximum(left, 0.0)

    def bias(self, matrix: FloatArray) -> FloatArray:
        """The best bias of a map, ``[groups, outputs]``."""
        best: FloatArray = self.mean_out - np.einsum("goi,gi->go", matrix, self.mean_in)
        return best


class TooWeakError(ArithmeticError):
    """A ridge is too weak for rows that are fewer than their inputs."""


class Ridge:
    """Ridge regression from the same rows onto several targets, towards a map that is there.

    ``W = W0 + (cross - W0 covariance) (covariance + strength * mean variance)^-1``: where data say
    nothing, the map stays what it is.

    Args:
        covariance: of the rows, ``[groups, inputs, inputs]``.
        strength: relative to the mean variance of the inputs.

    Raises:
        TooWeakError: the damped covariance is not positive definite.
    """

    def __init__(self, covariance: FloatArray, strength: float) -> None:
        size = covariance.shape[1]
        self.factors = []
        for each in covariance:
            damped = each.copy()
            damped[np.diag_indices(size)] += strength * max(np.trace(each) / max(size, 1), 1e-30)
            # Few places and a weak ridge leave a matrix that rounding makes indefinite.
            try:
                factor = linalg.cho_factor(damped, overwrite_a=True, check_finite=False)
            except linalg.LinAlgError:
                raise TooWeakError from None
            self.factors.append(factor)

    def solve(self, left: FloatArray, start: FloatArray) -> FloatArray:
        """The map, ``[groups, outputs, inputs]``.

        Args:
            left: what the start leaves to be explained (:meth:`Statistics.left_by`).
            start: towards which the ridge draws.
        """
        found = start.copy()
        for group, factor in enumerate(self.factors):
            found[group] += linalg.cho_solve(factor, left[group].T, check_finite=False).T
        return found


def solve_by_rows(
    rows: Sequence[Array],
    wanted: Sequence[Array],
    bias_of: Sequence[int],
    biases: int,
    start: FloatArray,
    strengths: Sequence[float],
    biased: bool = True,
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Ridge regression for maps with more inputs than there are rows: matrices and biases.

    The same as :class:`Ridge`, with a matrix of the size of the rows instead of the inputs:
    ``(R' R / n + s I)^-1 R' = R' (R R' / n + s I)^-1``.

    Args:
        rows: batches of them, ``[places, groups, inputs]``.
        wanted: likewise, ``[places, groups, outputs]``.
        bias_of: which of the biases each batch has, 0-based.
        biases: how many there are.
        start: towards which the ridge draws, ``[groups, outputs, inputs]``.
        strengths: of the ridge, relative to the mean variance of the inputs.
        biased: whether the maps have biases; else these are 0.
    """
    every, results = np.concatenate(rows), np.concatenate(wanted)
    owner = np.repeat(bias_of, [len(batch) for batch in rows])
    members = [np.flatnonzero(owner == k) for k in range(biases)]
    mean_in, mean_out = (
        np.stack([biased * _mean(array[at]) for at in members]) for array in (every, results)
    )
    count = len(every)
    for strength in strengths:
        matrix = start.copy()
        for group in range(len(start)):
            x = every[:, group] - mean_in[owner, group].astype(every.dtype)
            left = results[:, group] - mean_out[owner, group] - x @ start[group].T
            kernel = (x @ x.T).astype(np.float64) / count
            damping = strength * max(np.trace(kernel) / x.shape[1], 1e-30)
            kernel[np.diag_indices(count)] += damping
            solved = linalg.solve(kernel, left, assume_a="sym") / count
            matrix[group] += solved.T @ x
        yield matrix, mean_out - np.einsum("goi,bgi->bgo", matrix, mean_in)


def _mean(array: Array) -> FloatArray:
    """Over the first axis; of nothing 0."""
    total: FloatArray = array.sum(axis=0, dtype=np.float64)
    return total / max(len(array), 1)
