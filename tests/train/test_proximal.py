"""The proximal operator of tied strengths against a general-purpose minimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import Tensor

from morphgraph.train.proximal import Tied, TiedStrengths

NUMBERS = st.floats(0.0, 2.0, width=32)
WEIGHTS = st.floats(0.125, 4.0, width=32)


def step(values: list[float], weights: list[float], amount: float, tied: Tied) -> np.ndarray:
    """One channel with these producers after a step."""
    index = [torch.tensor([0]) for _ in values]
    ties = TiedStrengths(index, [torch.tensor([weight]) for weight in weights], channels=1)
    parts = [torch.tensor([value]) for value in values]
    factors = ties.factors(parts, torch.tensor([amount]), tied)
    return np.array([float(part * f) for part, f in zip(parts, factors, strict=True)])


def minimum(values: np.ndarray, weights: np.ndarray, amount: float, tied: Tied) -> np.ndarray:
    """The same by scipy: the norm as a bound that is minimized beside the distance."""

    def goal(z: np.ndarray) -> float:
        return float(amount * z[-1] + 0.5 * (weights * (z[:-1] - values) ** 2).sum())

    if tied == "max":
        bound = {"type": "ineq", "fun": lambda z: z[-1] - z[:-1]}
    else:
        bound = {"type": "ineq", "fun": lambda z: z[-1] ** 2 - (z[:-1] ** 2).sum()}
    start = np.append(values, np.linalg.norm(values) + 0.1)
    found = minimize(
        goal,
        start,
        method="SLSQP",
        bounds=[(0, None)] * len(start),
        constraints=[bound],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return found.x[:-1]


@pytest.mark.parametrize("tied", ["max", "l2"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, WEIGHTS), min_size=1, max_size=4), st.floats(0.01, 3.0))
def test_a_step_goes_to_the_minimum(
    tied: Tied, producers: list[tuple[float, float]], amount: float
) -> None:
    values, weights = (list(part) for part in zip(*producers, strict=True))
    got = step(values, weights, amount, tied)

    def goal(s: np.ndarray) -> float:
        size = s.max() if tied == "max" else np.linalg.norm(s)
        return float(amount * size + 0.5 * (np.array(weights) * (s - values) ** 2).sum())

    best = goal(minimum(np.array(values), np.array(weights), amount, tied))
    assert goal(got) <= best + 1e-5


@pytest.mark.parametrize("tied", ["max", "l2"])
def test_one_producer_is_a_soft_threshold_to_exact_zero(tied: Tied) -> None:
    assert step([1.0], [2.0], 0.5, tied) == pytest.approx([0.75])
    assert step([0.25], [2.0], 0.5, tied) == [0.0]
    assert step([0.7], [2.0], 0.0, tied) == pytest.approx([0.7])
    assert step([0.0], [2.0], 0.0, tied) == [0.0]


def test_ties_share_the_amount_under_the_maximum() -> None:
    assert step([1.0, 1.0, 1.0, 0.2], [1.0] * 4, 0.6, "max") == pytest.approx([0.8, 0.8, 0.8, 0.2])
    assert step([1.0, 0.9], [1.0, 1.0], 2.0, "max").tolist() == [0.0, 0.0]


def test_an_l2_norm_is_shortened() -> None:
    assert step([3.0, 4.0], [1.0, 1.0], 1.0, "l2") == pytest.approx([2.4, 3.2], rel=1e-5)
    assert step([0.3, 0.4], [1.0, 1.0], 0.5, "l2").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tied", ["max", "l2"])
def test_channels_do_not_touch_each_other(tied: Tied) -> None:
    """A source may have a channel twice, and channels may have no source at all."""
    torch.manual_seed(0)
    index = [torch.tensor([0, 2, 2, 4]), torch.tensor([4, 2])]
    values: list[Tensor] = [torch.rand(4), torch.rand(2)]
    ties = TiedStrengths(index, [torch.ones(4), torch.full((2,), 2.0)], channels=5)
    amounts = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    first, second = ties.factors(values, amounts, tied)
    (alone,) = step([float(values[0][0])], [1.0], 0.1, tied)
    assert float(first[0] * values[0][0]) == pytest.approx(alone)
    three = [float(values[0][1]), float(values[0][2]), float(values[1][1])]
    together = [first[1] * values[0][1], first[2] * values[0][2], second[1] * values[1][1]]
    assert [float(x) for x in together] == pytest.approx(step(three, [1.0, 1.0, 2.0], 0.3, tied))
    assert ties.rate.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]
