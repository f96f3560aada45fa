"""Ridge regression by rows is ridge regression by the covariance."""

import numpy as np

from morphgraph.passes.calibration.moments import Moments, Ridge, solve_by_rows


def test_both_forms_are_one() -> None:
    """More inputs than rows, two maps."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 2, 50)) + 3
    wanted = generator.normal(size=(30, 2, 4)) - 1
    start = generator.normal(size=(2, 4, 50))
    moments = Moments()
    moments.add(rows, wanted)
    statistics = moments.statistics()
    strengths = (1e-2, 1.0)
    for strength, (matrix, bias) in zip(
        strengths, solve_by_rows([rows], [wanted], [0], 1, start, strengths), strict=True
    ):
        expected = Ridge(statistics.covariance, strength).solve(statistics.left_by(start), start)
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-8)
        np.testing.assert_allclose(bias[0], statistics.bias(expected), rtol=0, atol=1e-7)
