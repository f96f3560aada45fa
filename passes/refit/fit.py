"""The least squares of one reader: kernel and bias, chosen on inputs that were kept aside."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Array, FloatArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.passes.calibration.moments import (
    MOST_BYTES,
    STRENGTHS,
    Moments,
    Ridge,
    Statistics,
    TooWeakError,
    finite,
    solve_by_rows,
)
from morphgraph.passes.calibration.readers import Following

#: Inputs of a map from which fewer are tried: each needs a factorization.
MANY = 2000
#: Rounds in which what a clamp hides is taken out of the target, and what one has to gain.
ROUNDS = 4
GAIN = 0.995
#: An error that is rounding, and what has to be left of a larger one, or nothing is changed.
ROUNDING = 1e-10
WORTH = 0.99
#: Bytes of rows that are kept for them.
KEPT_BYTES = 64 * 2**20
#: Rows that are kept of the inputs kept aside: fewer where each says something of many outputs.
FEWEST_ASIDE, MOST_ASIDE = 1024, 4096
RESULTS_ASIDE = 2**19


@dataclass
class Target:
    """What a reader is to give at some places.

    Attributes:
        wanted: ``[places, groups, outputs]``.
        base: what is added behind it in the resized network, in the unit of the clamp; 0: nothing.
    """

    wanted: Array
    base: Array | float = 0.0


def _finite(rows: Array, target: Target) -> tuple[Array, Target]:
    """The places at which all is a finite number."""
    good = finite(rows, target.wanted + target.base)
    if good.all():
        return rows, target
    base = target.base[good] if isinstance(target.base, np.ndarray) else target.base
    return rows[good], Target(target.wanted[good], base)


Map = tuple[FloatArray, FloatArray]
"""Matrices ``[groups, outputs, inputs]`` and biases ``[groups, outputs]``."""


class Fit:
    """Rows and targets of a reader in the resized network, and the map that fits them.

    Args:
        start: the sliced kernel's matrices, ``[groups, outputs, inputs]``.
        bias: of the operator as it is, ``[groups, outputs]``.
        after: what comes behind it.
        processes: that share the places to fit to; all have those on which is chosen.
        biased: whether it may get a bias.
        among: how many are fitted at the same time, and share the memory.
    """

    def __init__(
        self,
        start: FloatArray,
        bias: FloatArray,
        after: Following,
        processes: Processes = ALONE,
        *,
        biased: bool = True,
        among: int = 1,
    ) -> None:
        self.processes = processes
        self.start, self.old_bias, self.after = start, bias, after
        self.biased = biased
        self.moments = Moments(among=among)
        #: Places that it was fitted at, on all processes; known when it is solved.
        self.places = 0
        #: Of the first map's inputs, about zero where it has no bias; likewise, if it is known.
        self.covariance: FloatArray | None = None
        self.kept: list[tuple[Array, Target]] = []
        self.aside: list[tuple[Array, Target]] = []
        self.room = KEPT_BYTES // processes.count // among
        maps, outputs, inputs = start.shape
        per_row = max(maps * outputs, 1)
        self.room_aside = int(np.clip(RESULTS_ASIDE // per_row, FEWEST_ASIDE, MOST_ASIDE)) // among
        #: From where the rows that are kept are counted.
        self.centre = np.zeros((maps, inputs))
        #: Whether the covariance of the inputs would be too large: then some rows stand for it.
        self.wide = among * maps * inputs**2 * 8 > MOST_BYTES

    def add(self, rows: Array, target: Target) -> None:
        """Count some places to be fitted."""
        rows, target = _finite(rows, target)
        self.moments.add(rows[:, :, :0] if self.wide else rows, target.wanted)
        size = rows.size * 4
        if (self.after.clamps or self.wide) and size <= self.room:
            self.room -= size
            self.kept.append((rows.astype(np.float32), target))

    def add_aside(self, rows: Array, target: Target) -> None:
        """Count some places on which is chosen."""
        rows, target = _finite(rows, target)
        if self.room_aside > 0:
            self.room_aside -= len(rows)
            self.aside.append((rows.astype(np.float32), target))

    def solve(self) -> "Fitted":
        """The best map that was found, by the error on what was kept aside."""
        maps, outputs, inputs = self.start.shape
        shape = maps, 0 if self.wide else inputs, outputs
        statistics = self.moments.statistics(shape).shared(self.processes)
        self.places = statistics.count
        if not self.biased:
            statistics = statistics.about_zero()
        if not statistics.count:
            return Fitted(self.start, self.old_bias, 0.0, 0.0)
        if self.after.clamps or self.wide:
            self.kept = [each for part in self.processes.gather(self.kept) for each in part]
        if self.wide:
            return self._solve_wide()
        self.covariance = statistics.covariance[0]
        self._count_from(statistics.mean_in)
        as_it_is = self.start, self.old_bias
        shifted = self.start, statistics.bias(self.start)
        before = self._error(*as_it_is)
        if before <= ROUNDING:
            return Fitted(*as_it_is, before, before)
        best, error = as_it_is, before * WORTH
        if (found := self._error(*shifted)) < error:
            best, error = shifted, found
        left = statistics.left_by(self.start)
        chosen = None
        for ridge, candidate, found in self._ridges(statistics, left):
            if found < error:
                best, error, chosen = candidate, found, ridge
        if chosen is not None and self.kept:
            best, error = self._through_clamp(chosen, statistics, left, best, error)
        return Fitted(*best, before, before if best is as_it_is else error)

    def error(self, matrix: FloatArray) -> float:
        """That of other matrices with the bias as it is, on what was kept aside."""
        return self._error(matrix, self.old_bias)

    def _count_from(self, mean: FloatArray) -> None:
        """Count the rows that are kept from their mean, in place."""
        self.centre = mean.astype(np.float32).astype(np.float64)
        for rows, _ in (*self.kept, *self.aside):
            rows -= self.centre.astype(np.float32)

    def _ridges(
        self, statistics: Statistics, left: FloatArray
    ) -> Iterator[tuple[Ridge, Map, float]]:
        """Ridges, with their maps and errors: from a middle one on as long as the error falls."""
        many = self.start.shape[2] >= MANY
        strengths = STRENGTHS[1::2] if many else STRENGTHS
        middle, least = len(strengths) // 2, np.inf
        for places in ([middle], range(middle - 1, -1, -1), range(middle + 1, len(strengths))):
            better = False
            for place in places:
                try:
                    ridge = Ridge(statistics.covariance, strengths[place])
                except TooWeakError:
                    break
                matrix = ridge.solve(left, self.start)
                candidate = matrix, statistics.bias(matrix)
                found = self._error(*candidate)
                yield ridge, candidate, found
                if found >= least:
                    break
                least, better = found, True
            if better and places[0] != middle:
                return

    def _solve_wide(self) -> "Fitted":
        """The best map from the rows that were kept, which are fewer than the inputs."""
        as_it_is = self.start, self.old_bias
        before = self._error(*as_it_is)
        best, error = as_it_is, before * WORTH
        if before > ROUNDING and self.kept:
            rows = np.concatenate([rows for rows, _ in self.kept])
            wanted = np.concatenate([target.wanted for _, target in self.kept])
            for candidate in solve_by_rows(rows, wanted, self.start, STRENGTHS[1::2], self.biased):
                if (found := self._error(*candidate)) < error:
                    best, error = candidate, found
        return Fitted(*best, before, before if best is as_it_is else error)

    def _through_clamp(
        self,
        ridge: Ridge,
        statistics: Statistics,
        left: FloatArray,
        best: Map,
        error: float,
    ) -> tuple[Map, float]:
        """Let values that a clamp hides be what they are: only the rest is worth fitting.

        Majorization: where the original is beyond an end of the range, any value beyond that end is
        right, so the target there is the present value, or the end if that is nearer. Each round is
        a least squares with the same covariance, and the error behind the clamp never rises on the
        places that it is computed from.
        """
        now = best
        places = sum(len(rows) for rows, _ in self.kept)
        for _ in range(ROUNDS):
            products, sums = np.zeros_like(left), np.zeros_like(statistics.mean_out)
            seen = np.zeros_like(statistics.mean_in)
            for rows, target in self.kept:
                moved = self._seen_target(rows, target, *now) - target.wanted
                products += moved.transpose(1, 2, 0).astype(rows.dtype) @ rows.transpose(1, 0, 2)
                sums += moved.sum(axis=0)
                seen += rows.sum(axis=0, dtype=np.float64)
            # By what the target has moved on the places that are kept, it has moved on all.
            products -= sums[:, :, None] * (seen / places)[:, None, :]
            matrix = ridge.solve(left + products / places, self.start)
            now = matrix, statistics.bias(matrix) + sums / places
            found, former = self._error(*now), error
            if found < error:
                best, error = now, found
            if found > GAIN * former:
                break
        return best, error

    def _seen_target(
        self, rows: Array, target: Target, matrix: FloatArray, bias: FloatArray
    ) -> Array:
        after = self.after
        given = self._apply(matrix, bias, rows)
        scale = np.where(after.scale == 0, 1.0, after.scale)
        wanted = target.wanted * after.scale + after.shift + target.base
        present = given * after.scale + after.shift + target.base
        seen = np.where(wanted <= after.low, np.minimum(present, after.low), wanted)
        seen = np.where(wanted >= after.high, np.maximum(present, after.high), seen)
        unseen: Array = np.where(
            after.scale == 0, target.wanted, (seen - after.shift - target.base) / scale
        )
        return unseen

    def _apply(self, matrix: FloatArray, bias: FloatArray, rows: Array) -> Array:
        """What a map gives for rows that are kept, ``[places, groups, outputs]``."""
        product = rows.transpose(1, 0, 2) @ matrix.astype(rows.dtype).swapaxes(1, 2)
        from_centre = bias + np.einsum("goi,gi->go", matrix, self.centre)
        given: Array = product.transpose(1, 0, 2) + from_centre
        return given

    def _error(self, matrix: FloatArray, bias: FloatArray) -> float:
        """Squared error behind what follows, on what was kept aside: a share of the variance."""
        after, total = self.after, 0.0
        seen: list[Array] = []
        for rows, target in self.aside or self.kept[:4]:
            given = self._apply(matrix, bias, rows) * after.scale + after.shift + target.base
            wanted = target.wanted * after.scale + after.shift + target.base
            if after.clamps:
                given, wanted = (np.clip(each, after.low, after.high) for each in (given, wanted))
            total += float(np.square(given - wanted, dtype=np.float64).sum())
            seen.append(wanted)
        # About the mean of all: a batch may be one place.
        every = np.concatenate(seen) if seen else np.zeros(0)
        energy = float(np.square(every - every.mean(axis=0), dtype=np.float64).sum()) if seen else 0
        return total / max(energy, 1e-30)


@dataclass(frozen=True)
class Fitted:
    """A fitted map: its matrices, its bias, and the errors before and after."""

    matrix: FloatArray
    bias: FloatArray
    before: float
    after: float
