"""The order of removal and the compensated kernels, held against least squares by brute force."""

from itertools import combinations

import numpy as np
import pytest

from morphgraph.passes.calibration import removal
from morphgraph.passes.calibration.moments import Moments
from morphgraph.passes.calibration.removal import Seen, remove_in_order, seen_alone, seen_by


@pytest.fixture(autouse=True)
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed is least squares itself, not ridge regression."""
    monkeypatch.setattr(removal, "DAMPING", 1e-12)
    monkeypatch.setattr(removal, "FEW_DAMPING", 0.0)


class Reader:
    """Rows, a kernel and the channels' blocks: ``[groups, outputs, channels * taps]``."""

    def __init__(
        self, channels: int, taps: int, outputs: int, seed: int, groups: int = 1, places: int = 300
    ) -> None:
        generator = np.random.default_rng(seed)
        inputs = channels * taps
        mixed = generator.normal(size=(groups, inputs, inputs)) + np.eye(inputs)
        noise = generator.normal(size=(places, groups, inputs))
        self.rows = np.einsum("ngi,gij->ngj", noise, mixed) + 2.0
        self.matrix = generator.normal(size=(groups, outputs, inputs))
        # Channels stand in the operand in any order.
        self.blocks = generator.permutation(inputs).reshape(channels, taps)
        self.units = generator.uniform(0.5, 2.0, size=(groups, outputs))
        self.results = np.einsum("ngi,goi->ngo", self.rows, self.matrix)

    def seen(self) -> Seen:
        moments = Moments()
        moments.add(self.rows, self.results)
        return seen_by(moments.statistics(), self.matrix, self.units, self.blocks)

    def best(self, kept: list[int]) -> tuple[np.ndarray, float]:
        """Least squares of the original results on the kept channels: matrix, share of energy."""
        places = np.sort(self.blocks[kept].ravel()).astype(int)
        matrix, lost = np.zeros_like(self.matrix), 0.0
        for group in range(len(self.matrix)):
            x, y = self.rows[:, group], self.results[:, group]
            x, y = x - x.mean(axis=0), (y - y.mean(axis=0)) * self.units[group]
            if len(places):
                found = np.linalg.lstsq(x[:, places], y, rcond=None)[0]
                matrix[group][:, places] = found.T
                y = y - x[:, places] @ found
            lost += float(np.square(y).mean(axis=0).sum())
        return matrix, lost / self.energy

    @property
    def energy(self) -> float:
        return float((self.results.var(axis=0) * self.units**2).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("taps", "groups"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_the_first_removal_is_the_cheapest_and_costs_what_least_squares_says(
    taps: int, groups: int, seed: int
) -> None:
    reader = Reader(6, taps, 4, seed, groups)
    found = remove_in_order([reader.seen()])
    costs = [reader.best([k for k in range(6) if k != gone])[1] for gone in range(6)]
    assert found.order[0] == int(np.argmin(costs))
    np.testing.assert_allclose(found.losses[0], min(costs), rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("taps", "groups"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("outputs", [3, 70], ids=["few outputs", "many"])
def test_after_several_removals_kernels_and_losses_are_those_of_least_squares(
    outputs: int, taps: int, groups: int, seed: int
) -> None:
    reader = Reader(8, taps, outputs, seed, groups)
    assert (reader.seen().gram is None) == (outputs == 3)
    found = remove_in_order([reader.seen()], stops=range(9))
    for width in range(9):
        kept = [k for k in range(8) if k not in found.order[: 8 - width]]
        expected, lost = reader.best(kept)
        np.testing.assert_allclose(found.matrices[width][0], expected, atol=1e-5)
        if width < 8:
            np.testing.assert_allclose(found.losses[7 - width], lost, rtol=1e-4)
    assert found.losses[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_readers_of_a_group_decide_together(seed: int) -> None:
    one, other = Reader(6, 2, 3, seed), Reader(6, 1, 5, seed + 100)
    found = remove_in_order([one.seen(), other.seen()], stops=[3])
    alive = list(range(6))
    for step in range(3):
        rest = {gone: [k for k in alive if k != gone] for gone in alive}
        costs = {gone: one.best(kept)[1] + other.best(kept)[1] for gone, kept in rest.items()}
        best = min(costs, key=costs.__getitem__)
        assert found.order[step] == best
        np.testing.assert_allclose(found.losses[step], costs[best], rtol=1e-4)
        alive.remove(best)
    for place, reader in enumerate((one, other)):
        np.testing.assert_allclose(found.matrices[3][place], reader.best(alive)[0], atol=1e-5)


def test_what_others_can_give_goes_first_and_costs_nothing() -> None:
    """Channels 1 and 4 are sums of others."""
    reader = Reader(6, 1, 3, seed=0)
    at = reader.blocks[:, 0]
    reader.rows[:, 0, at[1]] = reader.rows[:, 0, at[0]] - 2 * reader.rows[:, 0, at[2]]
    reader.rows[:, 0, at[4]] = reader.rows[:, 0, at[3]]
    reader.results = np.einsum("ngi,goi->ngo", reader.rows, reader.matrix)
    found = remove_in_order([reader.seen()], stops=[4])
    assert found.losses[1] < 1e-6
    assert found.losses[2] > 1e-3
    first = {*found.order[:2].tolist()}
    assert len(first & {0, 1, 2}) == 1
    assert len(first & {3, 4}) == 1
    given = np.einsum("ngi,goi->ngo", reader.rows, found.matrices[4][0] / reader.units[..., None])
    off = given - reader.results
    assert np.ptp(off, axis=0).max() < 1e-3  # the rest is a bias


def test_greedy_is_near_the_best_subset() -> None:
    for seed in range(5):
        reader = Reader(7, 1, 4, seed)
        found = remove_in_order([reader.seen()])
        subsets = combinations(range(7), 4)
        best = min(reader.best(list(kept))[1] for kept in subsets)
        assert best - 1e-9 <= found.losses[2] <= 2.5 * best


def test_many_channels_leave_several_at_a_time_and_stops_are_met() -> None:
    reader = Reader(200, 1, 6, seed=0, places=800)
    found = remove_in_order([reader.seen()], stops=[150, 77, 1, 0])
    assert sorted(found.order.tolist()) == list(range(200))
    assert (np.diff(found.losses) >= -1e-12).all()
    for width in (150, 77, 1, 0):
        kept = [k for k in range(200) if k not in found.order[: 200 - width]]
        expected, _ = reader.best(kept)
        np.testing.assert_allclose(found.matrices[width][0], expected, atol=1e-4)
    assert found.losses[-1] >= 0.95


def test_without_compensation_a_channel_costs_the_variance_that_it_contributes() -> None:
    reader = Reader(5, 2, 3, seed=0, groups=2)
    own, whole = Moments(), Moments()
    whole.add(reader.rows[:, :, :0], reader.results)
    rows = reader.rows[:, :, reader.blocks].reshape(300, 10, 2)
    own.add(rows, np.zeros((300, 10, 0)))
    seen = seen_alone(
        own.statistics(), whole.statistics(), reader.matrix, reader.units, reader.blocks
    )
    expected = []
    for block in reader.blocks:
        part = np.einsum("ngi,goi->ngo", reader.rows[:, :, block], reader.matrix[:, :, block])
        expected.append((part.var(axis=0) * reader.units**2).sum() / reader.energy)
    assert seen.alone is not None
    np.testing.assert_allclose(seen.alone, expected, rtol=1e-6)
    found = remove_in_order([seen], stops=[2])
    assert found.order.tolist() == np.argsort(expected).tolist()
    assert found.matrices[2][0].shape[1] == 0  # nothing takes over
