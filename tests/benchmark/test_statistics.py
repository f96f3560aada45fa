"""The statistics against simulated runs whose true ratio is known."""

from itertools import islice, product

import numpy as np
import pytest
from scipy.stats import wilcoxon

from morphgraph.benchmark.sessions import round_orders
from morphgraph.benchmark.statistics import (
    MAX_NOISE,
    PairedRatio,
    judge,
    paired_ratio,
    signed_rank,
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


@pytest.mark.parametrize("rounds", [10, 37, 100])
def test_the_interval_covers_the_true_ratio(rounds: int) -> None:
    generator = np.random.default_rng(7)
    intervals = [paired_ratio(*_runs(generator, rounds, 1.7, 0.1)) for _ in range(300)]
    covered = np.mean([one.low <= 1.7 <= one.high for one in intervals])
    # What the ranks promise, which is 95 % or a little more since ranks are whole numbers.
    assert covered == pytest.approx(0.953, abs=0.025)
    assert np.median([one.ratio for one in intervals]) == pytest.approx(1.7, rel=0.01)


@pytest.mark.parametrize("epochs", [6, 12, 40])
def test_luck_of_sessions_is_no_effect(epochs: int) -> None:
    """A session keeps its luck: an interval that takes its rounds for independent says too much."""
    generator = np.random.default_rng(3)
    held = {"epochs": 0, "rounds": 0}
    for _ in range(100):
        luck = np.repeat(generator.lognormal(0, 0.05, (2, epochs)), 10, axis=1)
        base, other = luck * generator.lognormal(0, 0.02, luck.shape)
        by_epochs = paired_ratio(base, other, np.repeat(np.arange(epochs), 10))
        by_rounds = paired_ratio(base, other)
        held["epochs"] += by_epochs.low <= 1 <= by_epochs.high
        held["rounds"] += by_rounds.low <= 1 <= by_rounds.high
    assert held["epochs"] / 100 == pytest.approx(0.96, abs=0.04)
    assert held["rounds"] < held["epochs"] - 10


def test_an_effect_beyond_the_luck_is_found() -> None:
    generator = np.random.default_rng(5)
    epochs = np.repeat(np.arange(40), 4)
    found = 0
    for _ in range(100):
        luck = generator.lognormal(0, 0.02, (2, 40))[:, epochs]
        base, other = luck * generator.lognormal(0, 0.02, luck.shape)
        found += paired_ratio(base, other * 1.03, epochs).high < 1
    assert found >= 95


def test_pairing_is_what_makes_it_steady() -> None:
    """The same runs, paired with those of other rounds, say much less."""
    base, other = _runs(np.random.default_rng(0), 100, 1.7, 0.02)
    paired = paired_ratio(base, other)
    unpaired = paired_ratio(base, np.random.default_rng(1).permutation(other))
    assert paired.noise < 0.01 < unpaired.noise / 3


@pytest.mark.parametrize("count", range(6, 13))
def test_the_rank_is_the_innermost_that_covers(count: int) -> None:
    ranks = np.arange(1, count + 1)
    sums = np.array([ranks @ flips for flips in product((0, 1), repeat=count)])
    rank = signed_rank(count)
    assert np.mean(sums <= rank) <= 0.025 < np.mean(sums <= rank + 1)


@pytest.mark.parametrize("count", [7, 16, 33])
def test_the_interval_is_that_of_wilcoxon(count: int) -> None:
    """It holds the shifts that SciPy's exact test does not reject."""
    logs = np.random.default_rng(count).standard_normal(count) / 10
    found = paired_ratio(np.exp(logs), np.ones(count))
    for end, inwards in ((np.log(found.low), 1e-9), (np.log(found.high), -1e-9)):
        assert wilcoxon(logs - end - inwards, method="exact").pvalue > 0.05
        assert wilcoxon(logs - end + inwards, method="exact").pvalue <= 0.05
    assert found.low < found.ratio < found.high


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rounds_give_their_range(count: int) -> None:
    ratios = np.linspace(1.0, 2.0, count)
    found = paired_ratio(ratios, np.ones(count))
    assert (found.low, found.high) == pytest.approx((ratios[0], ratios[-1]))


def test_many_rounds_stand_in_blocks() -> None:
    base, other = _runs(np.random.default_rng(2), 3000, 1.7, 0.05)
    found = paired_ratio(base, other)
    assert found.low < 1.7 < found.high
    assert found.noise < 0.01


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
