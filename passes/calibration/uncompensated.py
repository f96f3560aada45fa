"""Pass ``uncompensated``: what channels cost where nothing can take over for them.

To a linear operator whose kernel others share (a head that is tied to the embedding) a channel adds
``w_e x_e``. No fit changes that kernel, so that all of it is missing where the channel is gone, its
mean too. The error is a quadratic form of who goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Array, FloatArray, IntArray
from morphgraph.passes.calibration.moments import Statistics
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.calibration.visits import Look

#: Outputs of a kernel whose products are taken together.
TOGETHER = 4096


@dataclass(frozen=True)
class TiedLook(Look):
    """An operator whose kernel others share."""

    @property
    def reader(self) -> Reader:
        """The operator."""
        return self.readers[0]


class Uncompensated:
    """What a group's channels cost where nothing takes over for them.

    Args:
        inputs: of its channels in every operator whose kernel others share, ``[channels, inputs]``.
    """

    def __init__(self, inputs: Mapping[str, IntArray]) -> None:
        self.inputs = inputs
        #: How many operators have not been looked at.
        self.left = len(inputs)
        #: What gives from channels that go, 1 for each, what that costs, ``[channels, channels]``.
        self.spread: FloatArray | None = None

    def add(self, name: str, cost: FloatArray) -> None:
        """Count an operator by what its inputs cost (:func:`cost_of_inputs`)."""
        self.left -= 1
        at = self.inputs[name]
        here = cost[at[:, None, :, None], at[None, :, None, :]].sum(axis=(2, 3))
        self.spread = here if self.spread is None else self.spread + here


def cost_of_inputs(statistics: Statistics, matrix: Array) -> FloatArray:
    """What inputs that go cost an operator that stays as it is, a share of what it gives.

    The sum of its numbers over all pairs of those that go, ``[inputs, inputs]``.

    Args:
        statistics: of what it sees.
        matrix: of the operator, ``[maps, outputs, inputs]``.

    >>> seen = Statistics(2, np.ones((1, 1)), np.zeros((1, 0)), np.ones((1, 1, 1)),
    ...                   np.zeros((1, 0, 1)), np.zeros((1, 0)))
    >>> cost_of_inputs(seen, np.full((1, 5, 1), 3.0))  # the mean is missing, too
    array([[2.]])
    """
    cost, energy = np.zeros(statistics.covariance.shape[1:]), 0.0
    means = statistics.mean_in[:, :, None] * statistics.mean_in[:, None, :]
    for kernel, covariance, mean in zip(matrix, statistics.covariance, means, strict=True):
        gram = np.zeros_like(cost)
        for start in range(0, len(kernel), TOGETHER):
            rows = kernel[start : start + TOGETHER].astype(np.float64)
            gram += rows.T @ rows
        cost += gram * (covariance + mean)
        energy += float((gram * covariance).sum())
    return cost / max(energy, 1e-30)
