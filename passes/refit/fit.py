"""The least squares of one reader: kernel and bias, chosen on inputs that were kept aside."""

from collections.abc import Iterator, Sequence
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
        place: of those where the kernel is read, 0-based.
    """

    wanted: Array
    base: Array | float = 0.0
    place: int = 0


def _finite(rows: Array, target: Target) -> tuple[Array, Target]:
    """The places at which all is a finite number."""
    good = finite(rows, target.wanted + target.base)
    if good.all():
        return rows, target
    base = target.base[good] if isinstance(target.base, np.ndarray) else target.base
    return rows[good], Target(target.wanted[good], base, target.place)


Map = tuple[FloatArray, FloatArray]
"""Matrices ``[groups, outputs, inputs]`` and biases ``[biases, groups, outputs]``."""


class Fit:
    """Rows and targets of a reader in the resized network, and the map that fits them.

    A kernel may be read at several places: they count together, by how often they are looked at.
    Where they have one bias, that gets the mean of all; where they have several, each gets its own.

    Args:
        start: the sliced kernel's matrices, ``[groups, outputs, inputs]``.
        bias: of the operator as it is, ``[groups, outputs]``; the same at all places.
        after: what comes behind it; at each place.
        processes: that share the places to fit to; all have those on which is chosen.
        biased: whether it may get a bias.
        among: how many are fitted at the same time, and share the memory.
        bias_of: by place which of the biases it has, 0-based.
    """

    def __init__(
        self,
        start: FloatArray,
        bias: FloatArray,
        after: Following | Sequence[Following],
        processes: Processes = ALONE,
        *,
        biased: bool = True,
        among: int = 1,
        bias_of: Sequence[int] = (0,),
    ) -> None:
        self.processes = processes
        self.after = [after] if isinstance(after, Following) else [*after]
        self.bias_of = [*bias_of]
        biases = max(self.bias_of) + 1
        self.start, self.old_bias = start, np.repeat(bias[None], biases, axis=0)
        self.biased = biased
        self.clamps = any(each.clamps for each in self.after)
        #: What was counted for each bias; known when it is solved.
        self.parts: list[Statistics] = []
        self.moments = [Moments(among=among * biases) for _ in range(biases)]
        #: Places that it was fitted at, on all processes; known when it is solved.
        self.places = 0
        #: Of the first map's inputs, about zero where it has no bias; likewise, if it is known.
        self.covariance: FloatArray | None = None
        self.kept: list[tuple[Array, Target]] = []
        self.aside: list[tuple[Array, Target]] = []
        places = len(self.after)
        self.room = [KEPT_BYTES // processes.count // among // places] * places
        maps, outputs, inputs = start.shape
        per_row = max(maps * outputs, 1)
        most = int(np.clip(RESULTS_ASIDE // per_row, FEWEST_ASIDE, MOST_ASIDE))
        self.room_aside = [most // among // places] * places
        #: From where the rows that are kept are counted.
        self.centre = np.zeros((maps, inputs))
        #: Whether the covariance of the inputs would be too large: then some rows stand for it.
        self.wide = among * maps * inputs**2 * 8 > MOST_BYTES

    def add(self, rows: Array, target: Target) -> None:
        """Count some places to be fitted."""
        rows, target = _finite(rows, target)
        moments = self.moments[self.bias_of[target.place]]
        moments.add(rows[:, :, :0] if self.wide else rows, target.wanted)
        size = rows.size * 4
        if (self.clamps or self.wide) and size <= self.room[target.place]:
            self.room[target.place] -= size
            self.kept.append((rows.astype(np.float32), target))

    def add_aside(self, rows: Array, target: Target) -> None:
        """Count some places on which is chosen."""
        rows, target = _finite(rows, target)
        if self.room_aside[target.place] > 0:
            self.room_aside[target.place] -= len(rows)
            self.aside.append((rows.astype(np.float32), target))

    def solve(self) -> "Fitted":
        """The best map that was found, by the error on what was kept aside."""
        maps, outputs, inputs = self.start.shape
        shape = maps, 0 if self.wide else inputs, outputs
        parts = [each.statistics(shape).shared(self.processes) for each in self.moments]
        if not self.biased:
            parts = [each.about_zero() for each in parts]
        statistics = parts[0]
        if len(parts) > 1:
            statistics = Statistics.pooled(parts, [1.0] * len(parts), centered=False)
        self.parts = parts
        self.places = statistics.count
        if not statistics.count:
            return Fitted(self.start, self.old_bias, 0.0, 0.0)
        if self.clamps or self.wide:
            self.kept = [each for part in self.processes.gather(self.kept) for each in part]
        if self.wide:
            return self._solve_wide()
        self.covariance = statistics.covariance[0]
        self._count_from(statistics.mean_in)
        as_it_is = self.start, self.old_bias
        shifted = self.start, self._biases(self.start)
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

    def _biases(self, matrix: FloatArray) -> FloatArray:
        """The best biases of a map, ``[biases, groups, outputs]``."""
        return np.stack([each.bias(matrix) for each in self.parts])

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
                candidate = matrix, self._biases(matrix)
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
            seen = [rows for rows, _ in self.kept]
            wanted = [target.wanted for _, target in self.kept]
            of_bias = [self.bias_of[target.place] for _, target in self.kept]
            for candidate in solve_by_rows(
                seen, wanted, of_bias, len(self.old_bias), self.start, STRENGTHS[1::2], self.biased
            ):
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
        of_bias = np.zeros(len(self.parts))
        for rows, target in self.kept:
            of_bias[self.bias_of[target.place]] += len(rows)
        of_bias = np.maximum(of_bias, 1.0)[:, None, None]
        for _ in range(ROUNDS):
            products, sums = np.zeros_like(left), np.zeros_like(self.old_bias)
            seen = np.zeros((len(sums), *statistics.mean_in.shape))
            for rows, target in self.kept:
                bias = self.bias_of[target.place]
                moved = self._seen_target(rows, target, *now) - target.wanted
                products += moved.transpose(1, 2, 0).astype(rows.dtype) @ rows.transpose(1, 0, 2)
                sums[bias] += moved.sum(axis=0)
                seen[bias] += rows.sum(axis=0, dtype=np.float64)
            # By what the target has moved on the places that are kept, it has moved on all.
            products -= np.einsum("bgo,bgi->goi", sums, seen / of_bias)
            matrix = ridge.solve(left + products / places, self.start)
            now = matrix, self._biases(matrix) + sums / of_bias
            found, former = self._error(*now), error
            if found < error:
                best, error = now, found
            if found > GAIN * former:
                break
        return best, error

    def _seen_target(
        self, rows: Array, target: Target, matrix: FloatArray, bias: FloatArray
    ) -> Array:
        after = self.after[target.place]
        given = self._apply(matrix, bias[self.bias_of[target.place]], rows)
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
        total = 0.0
        seen: dict[int, list[Array]] = {}
        for rows, target in self.aside or self.kept[:4]:
            after, own = self.after[target.place], bias[self.bias_of[target.place]]
            given = self._apply(matrix, own, rows) * after.scale + after.shift + target.base
            wanted = target.wanted * after.scale + after.shift + target.base
            if after.clamps:
                given, wanted = (np.clip(each, after.low, after.high) for each in (given, wanted))
            total += float(np.square(given - wanted, dtype=np.float64).sum())
            seen.setdefault(target.place, []).append(wanted)
        # About the mean of all: a batch may hold one.
        energy = 0.0
        for arrays in seen.values():
            every = np.concatenate(arrays)
            energy += float(np.square(every - every.mean(axis=0), dtype=np.float64).sum())
        return total / max(energy, 1e-30)


@dataclass(frozen=True)
class Fitted:
    """A fitted map: its matrices, its biases, and the errors before and after."""

    matrix: FloatArray
    bias: FloatArray
    before: float
    after: float
