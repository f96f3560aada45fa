"""The statistics of a timing: what a model's runs say, and what a pair of models' runs say.

Two models are compared by *paired ratios*: in every round each model has a turn, and what slows a
round down slows all of its runs. The rounds of an epoch have the luck of its sessions in common, so
that it counts as one observation: the median of its log ratios. Of the epochs the Hodges-Lehmann
estimate is taken (the median of all means of two), with the interval that belongs to
Wilcoxon's signed-rank test (Hollander, Wolfe and Chicken, *Nonparametric Statistical Methods*, 3.2
and 3.3). It holds exactly for any symmetric distribution, and a model against itself has one. Nor
does a stalled epoch matter more than another. Intervals that take rounds for independent
observations held 1.00 in 11 to 16 of 20 comparisons of a model with itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from morphgraph.arrays import FloatArray, IntArray

CONFIDENCE = 0.95
MIN_OBSERVATIONS = 6
_MAX_OBSERVATIONS = 100

# An answer that is off by more than this share, or could be, is no answer.
MAX_NOISE = 0.05

Judgement = Literal["faster", "slower", "same", "unstable"]


@dataclass(frozen=True, slots=True)
class Summary:
    """One model's runs, in milliseconds; ``cv`` is the standard deviation over the mean."""

    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    cv: float


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """The typical ratio of paired runs and its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """How far the ratio may be off, as a share: half the interval's width over the ratio."""
        return (self.high - self.low) / (2 * self.ratio)


def summarize(seconds: Sequence[float] | FloatArray) -> Summary:
    """Summarize the durations of runs, in seconds.

    >>> summarize([0.001, 0.002, 0.003])
    Summary(min_ms=1.0, p50_ms=2.0, p90_ms=2.8, p99_ms=2.98, runs=3, cv=0.4082...)
    """
    times_ms = np.asarray(seconds, dtype=np.float64) * 1e3  # [runs]
    p50, p90, p99 = (float(p) for p in np.percentile(times_ms, (50, 90, 99)))
    cv = float(times_ms.std() / times_ms.mean())
    return Summary(float(times_ms.min()), p50, p90, p99, len(times_ms), cv)


def paired_ratio(
    base: Sequence[float] | FloatArray,
    other: Sequence[float] | FloatArray,
    epochs: Sequence[int] | IntArray | None = None,
) -> PairedRatio:
    """How many times as fast ``other`` is as ``base``, from runs of the same rounds.

    Args:
        base: durations, ``[rounds]``.
        other: durations of the other model in the same rounds, ``[rounds]``.
        epochs: which rounds shared their sessions, ``[rounds]``. Below 6 epochs, as without them,
            rounds stand for themselves (neighbours together where there are more than 100).

    Below 6 observations no interval covers with 95 %; it is their range then, which covers less.

    >>> paired_ratio([2.0] * 10, [1.0] * 10)
    PairedRatio(ratio=2.0, low=2.0, high=2.0)
    """
    logs = np.log(np.asarray(base, dtype=np.float64) / np.asarray(other, dtype=np.float64))
    observations = _medians(logs, epochs)
    first, second = np.triu_indices(len(observations))
    means = np.sort((observations[first] + observations[second]) / 2)
    rank = signed_rank(len(observations))
    center, low, high = np.median(means), means[rank], means[-1 - rank]
    return PairedRatio(*(float(np.exp(value)) for value in (center, low, high)))


def _medians(logs: FloatArray, epochs: Sequence[int] | IntArray | None) -> FloatArray:
    """The observations: medians of epochs, or of neighbouring rounds."""
    groups = np.arange(len(logs)) if epochs is None else np.asarray(epochs)
    if len(np.unique(groups)) < MIN_OBSERVATIONS:
        groups = np.arange(len(logs))
    parts = [logs[groups == group] for group in np.unique(groups)]
    medians = np.array([np.median(part) for part in parts])
    if len(medians) <= _MAX_OBSERVATIONS:
        return medians
    return np.array([np.median(part) for part in np.array_split(medians, _MAX_OBSERVATIONS)])


@cache
def signed_rank(count: int) -> int:
    """The position in the sorted means of two of the 95 % interval's lower end.

    It is the largest ``k`` that the sum of those of the ranks 1, ..., ``count`` that a fair coin
    picks is at most with 2.5 %; there are ``count`` (``count`` + 1) / 2 means.

    >>> signed_rank(6), signed_rank(10), signed_rank(5)
    (0, 8, 0)
    """
    ways = np.ones(1)  # [sum]: share of the subsets of the ranks so far that have it
    for rank in range(1, count + 1):
        wider = np.zeros(len(ways) + rank)
        wider[: len(ways)] += ways / 2
        wider[rank:] += ways / 2
        ways = wider
    below = int(np.searchsorted(np.cumsum(ways), (1 - CONFIDENCE) / 2, side="right"))
    return max(below - 1, 0)


def judge(speedup: PairedRatio, self_ratio: PairedRatio) -> Judgement:
    """What may be said about a speed-up.

    Args:
        speedup: the model against the base.
        self_ratio: a second session of the base against the base. It should be 1. Where its
            interval does not hold 1, what it is off was not the model's doing, and an effect must
            be larger than that to be told.

    >>> judge(PairedRatio(1.50, 1.48, 1.52), PairedRatio(1.0, 0.99, 1.01))
    'faster'
    >>> judge(PairedRatio(1.02, 1.01, 1.03), PairedRatio(0.98, 0.97, 0.99))
    'same'
    >>> judge(PairedRatio(1.50, 1.48, 1.52), PairedRatio(1.1, 1.05, 1.15))
    'unstable'
    """
    bias = 0.0 if self_ratio.low <= 1 <= self_ratio.high else abs(self_ratio.ratio - 1)
    if max(bias, self_ratio.noise, speedup.noise) > MAX_NOISE:
        return "unstable"
    if speedup.low > 1 + bias:
        return "faster"
    if speedup.high < 1 - bias:
        return "slower"
    return "same"
