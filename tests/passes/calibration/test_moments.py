"""Second moments and what is fitted from them, held against the raw rows."""

import numpy as np
import pytest

from morphgraph.passes.calibration.moments import SINGLE_FROM, Moments, Ridge, Statistics


def drawn(
    places: int, groups: int, inputs: int, outputs: int, offset: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Correlated rows, and results that depend on them with some noise; single precision."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(groups, inputs, inputs))
    rows = np.einsum("ngi,gij->ngj", generator.normal(size=(places, groups, inputs)), mixed)
    kernel = generator.normal(size=(groups, outputs, inputs))
    wanted = np.einsum("ngi,goi->ngo", rows, kernel) + 3.0
    wanted += 0.5 * generator.normal(size=wanted.shape)
    return (rows + offset).astype(np.float32), (wanted + offset).astype(np.float32)


def of(rows: np.ndarray, wanted: np.ndarray, pieces: int = 1) -> Statistics:
    moments = Moments()
    for x, y in zip(np.array_split(rows, pieces), np.array_split(wanted, pieces), strict=True):
        moments.add(x, y)
    return moments.statistics()


def direct(rows: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of every group on the rows themselves: matrix, bias, mean squared error."""
    matrices, biases, errors = [], [], []
    for x, y in zip(
        rows.astype(np.float64).swapaxes(0, 1),
        wanted.astype(np.float64).swapaxes(0, 1),
        strict=True,
    ):
        centred, target = x - x.mean(axis=0), y - y.mean(axis=0)
        found = np.linalg.lstsq(centred, target, rcond=None)[0].T
        matrices.append(found)
        biases.append(y.mean(axis=0) - found @ x.mean(axis=0))
        errors.append(np.square(centred @ found.T - target).mean(axis=0))
    return np.array(matrices), np.array(biases), np.array(errors)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_best_map_is_that_of_least_squares_on_the_rows(groups: int, offset: float) -> None:
    rows, wanted = drawn(400, groups, 7, 3, offset)
    statistics = of(rows, wanted, pieces=5)
    start = np.zeros((groups, 3, 7))
    matrix = Ridge(statistics.covariance, 1e-12).solve(statistics.left_by(start), start)
    expected, bias, error = direct(rows, wanted)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics.bias(matrix), bias, rtol=1e-6, atol=1e-6 * (1 + offset))
    np.testing.assert_allclose(statistics.error(matrix), error, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_a_ridge_is_least_squares_with_rows_that_hold_the_map_where_it_was(strength: float) -> None:
    rows, wanted = drawn(50, 2, 6, 4)
    statistics = of(rows, wanted)
    start = np.random.default_rng(1).normal(size=(2, 4, 6))
    found = Ridge(statistics.covariance, strength).solve(statistics.left_by(start), start)
    for group in range(2):
        x, y = rows[:, group].astype(np.float64), wanted[:, group].astype(np.float64)
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        hold = np.sqrt(strength * np.square(x).mean() * len(x))
        more, given = np.vstack([x, hold * np.eye(6)]), np.vstack([y, hold * start[group].T])
        expected = np.linalg.lstsq(more, given, rcond=None)[0].T
        np.testing.assert_allclose(found[group], expected, rtol=1e-6, atol=1e-8)


def test_where_data_say_nothing_the_map_stays() -> None:
    """Rows of rank 2 in 5 inputs: what is orthogonal to them keeps its weights."""
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    rows = (generator.normal(size=(100, 2)) @ basis[:, :2].T)[:, None, :]
    wanted = rows @ generator.normal(size=(5, 3))
    start = generator.normal(size=(1, 3, 5))
    statistics = of(rows, wanted)
    found = Ridge(statistics.covariance, 1e-9).solve(statistics.left_by(start), start)
    np.testing.assert_allclose(found[0] @ basis[:, 2:], start[0] @ basis[:, 2:], atol=1e-6)
    np.testing.assert_allclose(rows @ found[0].T, wanted, atol=1e-4)


@pytest.mark.parametrize("inputs", [5, SINGLE_FROM])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_pieces_give_what_all_at_once_gives(inputs: int, offset: float) -> None:
    rows, wanted = drawn(700, 1, inputs, 2, offset)
    one, other = of(rows, wanted), of(rows, wanted, pieces=9)
    exact = 1e-4 if inputs >= SINGLE_FROM else 1e-9
    for name in ("mean_in", "mean_out", "covariance", "cross", "energy"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(a, b, rtol=0, atol=exact * np.abs(a).max())
    assert one.count == other.count == 700


def test_single_precision_of_many_inputs_is_near_enough() -> None:
    """Against the covariance in double precision, of rows far from zero."""
    rows, wanted = drawn(2000, 1, SINGLE_FROM, 3, offset=300.0)
    found = of(rows, wanted, pieces=4)
    x, y = rows[:, 0].astype(np.float64), wanted[:, 0].astype(np.float64)
    covariance = np.cov(x.T, bias=True)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs((found.covariance[0] - covariance) / scale).max() < 1e-5
    cross = (y - y.mean(axis=0)).T @ (x - x.mean(axis=0)) / len(x)
    size = np.sqrt(np.outer(y.var(axis=0), x.var(axis=0)))
    assert np.abs((found.cross[0] - cross) / size).max() < 1e-5
    np.testing.assert_allclose(found.energy[0], y.var(axis=0), rtol=1e-5)


def test_a_first_piece_far_from_the_rest_does_no_harm() -> None:
    """All are counted from the first piece's mean, here 1e4 deviations away."""
    rows, wanted = drawn(600, 1, 4, 2)
    rows[:20] += 1e4
    wanted[:20] -= 1e4
    found = of(rows, wanted, pieces=30)
    np.testing.assert_allclose(
        found.covariance[0], np.cov(rows[:, 0].astype(np.float64).T, bias=True), rtol=1e-9
    )


def test_places_that_are_no_numbers_are_left_out() -> None:
    rows, wanted = drawn(60, 2, 4, 2)
    clean = of(rows[6:], wanted[6:])
    rows[0, 0, 0], rows[3, 1, 2], wanted[5, 0, 1] = np.nan, np.inf, -np.inf
    for place in (1, 2, 4):
        rows[place, 0, 0] = np.nan
    found = of(rows, wanted)
    assert found.count == 54
    np.testing.assert_allclose(found.covariance, clean.covariance, atol=1e-9)


def test_one_place_and_constant_inputs_are_no_trouble() -> None:
    rows, wanted = drawn(1, 1, 3, 2)
    alone = of(rows, wanted)
    assert not alone.covariance.any()
    start = np.ones((1, 2, 3))
    matrix = Ridge(alone.covariance, 1e-3).solve(alone.left_by(start), start)
    np.testing.assert_array_equal(matrix, start)
    np.testing.assert_allclose(rows[0] @ matrix[0].T + alone.bias(matrix), wanted[0], rtol=1e-6)
