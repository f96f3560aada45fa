"""The least squares of one reader: kernel and bias, chosen on inputs that were kept aside."""

from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Array, FloatArray
from morphgraph.passes.calibration.moments import (
    MOST_BYTES,
    Moments,
    Ridge,
    Statistics,
    TooWeakError,
    finite,
    solve_by_rows,
)
from morphgraph.passes.calibration.readers import Following

#: Strengths of the ridge that are tried, relative to the mean variance of the inputs.
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
#: Inputs of a map from which fewer are tried: each needs a factorization.
MANY = 2000
#: Rounds in which what a clamp hides is taken out of the target.
ROUNDS = 4
#: An error that is rounding, and what has to be left of a larger one, or nothing is changed.
ROUNDING = 1e-10
WORTH = 0.99
#: Bytes of rows that are kept for them, and rows that are kept of the inputs kept aside.
KEPT_BYTES = 96 * 2**20
KEPT_ASIDE = 4096


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


class Fit:
    """Rows and targets of a reader in the resized network, and the map that fits them.

    Args:
        start: the sliced kernel's matrices, ``[groups, outputs, inputs]``.
        bias: of the operator as it is, ``[groups, outputs]``.
        after: what comes behind it.
    """

    def __init__(self, start: FloatArray, bias: FloatArray, after: Following) -> None:
        self.start, self.old_bias, self.after = start, bias, after
        self.moments = Moments()
        self.kept: list[tuple[Array, Target]] = []
        self.aside: list[tuple[Array, Target]] = []
        self.room = KEPT_BYTES
        self.room_aside = KEPT_ASIDE
        maps, _, inputs = start.shape
        #: Whether the covariance of the inputs would be too large: then some rows stand for it.
        self.wide = maps * inputs**2 * 8 > MOST_BYTES

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
        if not self.moments.count:
            return Fitted(self.start, self.old_bias, 0.0, 0.0)
        if self.wide:
            return self._solve_wide()
        statistics = self.moments.statistics()
        many = self.start.shape[2] >= MANY
        strengths = STRENGTHS[1::2] if many else STRENGTHS
        as_it_is = self.start, self.old_bias
        shifted = self.start, statistics.bias(self.start)
        before = self._error(*as_it_is)
        if before <= ROUNDING:
            return Fitted(*as_it_is, before, before)
        best, error = as_it_is, before * WORTH
        if (found := self._error(*shifted)) < error:
            best, error = shifted, found
        chosen = None
        for strength in strengths:
            try:
                ridge = Ridge(statistics.covariance, strength)
            except TooWeakError:
                continue
            matrix = ridge.solve(statistics.cross, self.start)
            candidate = matrix, statistics.bias(matrix)
            if (found := self._error(*candidate)) < error:
                best, error, chosen = candidate, found, ridge
        if chosen is not None and self.kept:
            best, error = self._through_clamp(chosen, statistics, best, error)
        return Fitted(*best, before, before if best is as_it_is else error)

    def _solve_wide(self) -> "Fitted":
        """The best map from the rows that were kept, which are fewer than the inputs."""
        as_it_is = self.start, self.old_bias
        before = self._error(*as_it_is)
        best, error = as_it_is, before * WORTH
        if before > ROUNDING and self.kept:
            rows = np.concatenate([rows for rows, _ in self.kept])
            wanted = np.concatenate([target.wanted for _, target in self.kept])
            for candidate in solve_by_rows(rows, wanted, self.start, STRENGTHS[1::2]):
                if (found := self._error(*candidate)) < error:
                    best, error = candidate, found
        return Fitted(*best, before, before if best is as_it_is else error)

    def _through_clamp(
        self,
        ridge: Ridge,
        statistics: Statistics,
        best: tuple[FloatArray, FloatArray],
        error: float,
    ) -> tuple[tuple[FloatArray, FloatArray], float]:
        """Let values that a clamp hides be what they are: only the rest is worth fitting.

        Majorization: where the original is beyond an end of the range, any value beyond that end is
        right, so the target there is the present value, or the end if that is nearer. Each round is
        a least squares with the same covariance, and the error behind the clamp never rises on the
        places that it is computed from.
        """
        now = best
        places = sum(len(rows) for rows, _ in self.kept)
        for _ in range(ROUNDS):
            products, sums = np.zeros_like(statistics.cross), np.zeros_like(statistics.mean_out)
            seen = np.zeros_like(statistics.mean_in)
            for rows, target in self.kept:
                moved = self._seen_target(rows, target, *now) - target.wanted
                x = (rows - statistics.mean_in).transpose(1, 0, 2)
                products += moved.transpose(1, 2, 0) @ x
                sums += moved.sum(axis=0)
                seen += x.sum(axis=1)
            # By what the target has moved on the places that are kept, it has moved on all.
            products -= sums[:, :, None] * (seen / places)[:, None, :]
            matrix = ridge.solve(statistics.cross + products / places, self.start)
            now = matrix, statistics.bias(matrix) + sums / places
            found = self._error(*now)
            if found < error:
                best, error = now, found
        return best, error

    def _seen_target(
        self, rows: Array, target: Target, matrix: FloatArray, bias: FloatArray
    ) -> Array:
        after = self.after
        given = _apply(matrix, bias, rows)
        scale = np.where(after.scale == 0, 1.0, after.scale)
        wanted = target.wanted * after.scale + after.shift + target.base
        present = given * after.scale + after.shift + target.base
        seen = np.where(wanted <= after.low, np.minimum(present, after.low), wanted)
        seen = np.where(wanted >= after.high, np.maximum(present, after.high), seen)
        unseen: Array = np.where(
            after.scale == 0, target.wanted, (seen - after.shift - target.base) / scale
        )
        return unseen

    def _error(self, matrix: FloatArray, bias: FloatArray) -> float:
        """Squared error behind what follows, on what was kept aside: a share of the variance."""
        after, total = self.after, 0.0
        seen: list[Array] = []
        for rows, target in self.aside or self.kept[:4]:
            given = _apply(matrix, bias, rows) * after.scale + after.shift + target.base
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


def _apply(matrix: FloatArray, bias: FloatArray, rows: Array) -> Array:
    """What a map gives, ``[places, groups, outputs]``."""
    product = rows.transpose(1, 0, 2) @ matrix.astype(rows.dtype).swapaxes(1, 2)
    given: Array = product.transpose(1, 0, 2) + bias
    return given
