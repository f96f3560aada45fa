"""The statistics against simulated runs whose true ratio is known."""

from itertools import islice
from math import comb

import numpy as np
import pytest

from morphgraph.benchmark.sessions import round_orders
from morphgraph.benchmark.statistics import (
    MAX_NOISE,
    PairedRatio,
    judge,
    median_ranks,
    paired_ratio,
    summarize,
)


def _runs(
    generator: np.random.Generator, rounds: int, ratio: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two models' durations on a machine that drifts by half and stalls now and then."""
    drift = 1 + 0.5 * np.sin(np.linspace(0, 3, rounds))  # what both runs of a round share
    noise = generator.lognormal(0, jitter, (2, rounds))
    stalls = 1 + 4 * (generator.random((2, rounds)) < 0.05)
    base, other = drift * noise * stalls
    return base * ratio, other


@pytest.mark.parametrize("rounds", [10, 37, 200])
def test_the_interval_covers_the_true_ratio(rounds: int) -> None:
    generator = np.random.default_rng(7)
    intervals = [paired_ratio(*_runs(generator, rounds, 1.7, 0.1)) for _ in range(1000)]
    covered = np.mean([one.low <= 1.7 <= one.high for one in intervals])
    # What the ranks promise, which is 95 % or a little more since ranks are whole numbers.
    low, _ = median_ranks(rounds)
    promised = 1 - 2 * sum(comb(rounds, k) for k in range(low + 1)) / 2**rounds
    assert 0.95 <= promised < 0.99
    assert covered == pytest.approx(promised, abs=0.02)
    assert np.median([one.ratio for one in intervals]) == pytest.approx(1.7, rel=0.01)


def test_pairing_is_what_makes_it_steady() -> None:
    """The same runs, paired with those of other rounds, say much less."""
    base, other = _runs(np.random.default_rng(0), 200, 1.7, 0.02)
    paired = paired_ratio(base, other)
    unpaired = paired_ratio(base, np.random.default_rng(1).permutation(other))
    assert paired.noise < 0.01 < unpaired.noise / 3


@pytest.mark.parametrize("count", range(6, 200, 7))
def test_the_ranks_are_the_innermost_that_cover(count: int) -> None:
    def missed(rank: int) -> float:
        return 2 * sum(comb(count, below) for below in range(rank + 1)) / 2**count

    low, high = median_ranks(count)
    assert low + high == count - 1
    assert missed(low) <= 0.05 < missed(low + 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rounds_give_their_range(count: int) -> None:
    assert median_ranks(count) == (0, count - 1)


def test_summary_is_in_milliseconds() -> None:
    seconds = np.random.default_rng(0).lognormal(-6, 0.3, 999)
    found = summarize(seconds)
    ordered = np.sort(seconds) * 1000
    assert found.min_ms == ordered[0]
    assert found.p50_ms == ordered[499]
    assert found.p90_ms == pytest.approx(ordered[898:900].mean(), rel=0.02)
    assert found.p99_ms == pytest.approx(ordered[988], rel=0.02)
    assert found.runs == 999
    assert found.cv == pytest.approx(np.sqrt(np.expm1(0.09)), rel=0.1)  # of a lognormal


def test_a_bias_of_the_machine_is_not_taken_for_an_effect() -> None:
    steady, biased = PairedRatio(1.0, 0.995, 1.005), PairedRatio(1.04, 1.035, 1.045)
    gain = PairedRatio(1.03, 1.02, 1.04)
    assert judge(gain, steady) == "faster"
    assert judge(gain, biased) == "same"
    loss = PairedRatio(0.9, 0.89, 0.91)
    assert judge(loss, steady) == judge(loss, biased) == "slower"
    wide = PairedRatio(2.0, 2.0 * (1 - 1.1 * MAX_NOISE), 2.0 * (1 + 1.1 * MAX_NOISE))
    assert judge(wide, steady) == judge(gain, wide) == "unstable"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_second_round_runs_backwards(count: int) -> None:
    orders = list(islice(round_orders(count, 3), 200))
    assert all(there == back[::-1] for there, back in zip(orders[::2], orders[1::2], strict=True))
    assert all(sorted(order) == list(range(count)) for order in orders)
    # In a pair of rounds everybody runs as late as everybody else, so linear drift cancels.
    late = sum(np.argsort(order) for order in orders)
    assert len(set(late.tolist())) == 1
    assert len({tuple(order) for order in orders[::2]}) > 1 or count == 1
