"""The statistics of a timing: what a model's runs say, and what a pair of models' runs say.

Two models are compared by the *median of paired ratios*: in every round each model runs once, and
what slows a round down slows all of its runs. The 95 % interval of that median comes from order
statistics (David and Nagaraja, *Order Statistics*, 7.1): of n ratios, the number that lie below the
true median is binomial(n, 1/2) however the ratios are distributed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binom

from morphgraph.arrays import FloatArray

CONFIDENCE = 0.95

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
    """The median of paired ratios and its 95 % interval."""

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
    base: Sequence[float] | FloatArray, other: Sequence[float] | FloatArray
) -> PairedRatio:
    """How many times as fast ``other`` is as ``base``, from runs of the same rounds.

    Args:
        base: durations, ``[rounds]``.
        other: durations of the other model in the same rounds, ``[rounds]``.

    Below 6 rounds no pair of order statistics covers the median with 95 %; the interval is then the
    range of the ratios, which covers it with less.

    >>> paired_ratio([2.0] * 10, [1.0] * 10)
    PairedRatio(ratio=2.0, low=2.0, high=2.0)
    """
    ratios = np.sort(np.asarray(base, dtype=np.float64) / np.asarray(other, dtype=np.float64))
    low, high = median_ranks(len(ratios))
    return PairedRatio(float(np.median(ratios)), float(ratios[low]), float(ratios[high]))


def median_ranks(count: int) -> tuple[int, int]:
    """The innermost symmetric positions in a sorted sample that enclose the median with 95 %.

    With positions ``k`` and ``count - 1 - k`` the median is missed on one side when at most ``k``
    values lie below it: P(binomial(count, 1/2) <= k) must not exceed 2.5 %.

    >>> median_ranks(10)  # 2 * P(binomial(10, 1/2) <= 1) = 0.021
    (1, 8)
    """
    tail = (1 - CONFIDENCE) / 2
    quantile = int(binom.ppf(tail, count, 0.5))
    rank = quantile if binom.cdf(quantile, count, 0.5) <= tail else quantile - 1
    rank = max(rank, 0)
    return rank, count - 1 - rank


def judge(speedup: PairedRatio, self_ratio: PairedRatio) -> Judgement:
    """What may be said about a speed-up.

    Args:
        speedup: the model against the base.
        self_ratio: a second session of the base against the base. It should be 1; what it is off
            was not the model's doing, and an effect must be larger than that to be told.

    >>> judge(PairedRatio(1.50, 1.48, 1.52), PairedRatio(1.0, 0.99, 1.01))
    'faster'
    >>> judge(PairedRatio(1.02, 1.01, 1.03), PairedRatio(0.98, 0.97, 0.99))
    'same'
    >>> judge(PairedRatio(1.50, 1.48, 1.52), PairedRatio(1.1, 1.05, 1.15))
    'unstable'
    """
    bias = abs(self_ratio.ratio - 1)
    if max(bias, self_ratio.noise, speedup.noise) > MAX_NOISE:
        return "unstable"
    if speedup.low > 1 + bias:
        return "faster"
    if speedup.high < 1 - bias:
        return "slower"
    return "same"
