"""Pass ``uncompensated``: what channels cost where nothing can take over for them.

Two kinds of operators see a group's channels, and no fit makes up for those that go. To a linear
operator whose kernel others share (a head tied to the embedding) a channel adds ``w_e x_e``, and
that is missing. A norm divides by the root of a sum of squares: where channels go it divides by
another number, place by place, so that all that reads what is left gets another scale. With the
*share* ``s_e`` that a channel has in the sum of squares at a place, the scale is off by about the
sum of ``s_e / 2`` over the channels that are gone, of which the mean over the places can be made up
for. The error of either is a quadratic form of who goes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.ops import Op, facts_of
from morphgraph.passes.calibration.moments import Statistics
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.calibration.visits import Choose, Chooser, Look

#: Outputs of a kernel whose products are taken together.
TOGETHER = 4096


@dataclass(frozen=True)
class TiedLook(Look):
    """An operator whose kernel others share."""

    @property
    def reader(self) -> Reader:
        """The operator."""
        return self.readers[0]


@dataclass(frozen=True, eq=False)
class NormLook:
    """A norm that is looked at.

    Attributes:
        node: its operator, or that which takes the mean of the squares.
        axis: over which it is.
        size: of this axis.
    """

    node: ir.Node
    axis: int
    size: int

    @property
    def name(self) -> str:
        """Of the operator."""
        return self.node.name or ""

    @property
    def stop(self) -> str:
        """The node in front of which it is looked at."""
        return self.name

    @property
    def asked(self) -> list[str]:
        """What it normalizes."""
        value = self.node.inputs[0]
        return [(value and value.name) or ""]

    def enough(self, chooser: Chooser, batches: int) -> int:
        """How many places of each of so many batches are looked at."""
        return chooser.enough(self.size, batches)

    def rows(self, found: Arrays, choose: Choose) -> Array:
        """The shares at some places of a batch, ``[places, 1, size]``; of none: it is no norm."""
        (name,) = self.asked
        rows = np.moveaxis(found[name], self.axis, -1).reshape(-1, self.size)
        rows = rows[choose(self.name, len(rows))].astype(np.float32, copy=False)
        return shares_of_squares(rows, facts_of(self.node))[:, None]


def shares_of_squares(rows: Array, facts: type[Op]) -> Array:
    """What every number is to the sum of squares of its row, ``[rows, size]``.

    Args:
        rows: what is normalized; of an operator that takes a mean the squares.
        facts: of the operator.
    """
    if facts.mean_power > 0:
        if (rows < 0).any():  # a mean of no squares
            return rows[:0]
        squares = rows
    else:
        centre = rows.mean(axis=1, keepdims=True) if facts.centers else 0.0
        squares = np.square(rows - centre)
    whole = squares.sum(axis=1, keepdims=True)
    good = np.isfinite(whole[:, 0]) & (whole[:, 0] > 0)
    found: Array = squares[good] / whole[good]
    return found


def norm_looks(graph: ChannelGraph) -> Iterator[tuple[NormLook, int, int]]:
    """The norms over one axis of their first operand, with its vertex and that of the factor."""
    for op_index, op in enumerate(graph.ops):
        if not facts_of(op.ir).mean_power or len(op.statistical) != 1:
            continue
        vertex = op.factors[next(iter(op.statistical))]
        edges = [e for e in graph.edges_of(op_index) if e.factor == vertex and e.port == 0]
        if len(edges) != 1 or not graph.couplings.on_activation(edges[0]):
            continue
        dim = graph.couplings.dims[edges[0].dim]
        size = graph.shapes[dim.value][dim.axis]
        yield NormLook(op.ir, dim.axis, size), edges[0].dim, vertex


class Uncompensated:
    """What a group's channels cost where nothing takes over for them.

    Args:
        places: of its channels along the axis of every norm, and inputs in every operator whose
            kernel others share, ``[channels, places]``.
        behind: how many readers follow each norm.
    """

    def __init__(self, places: Mapping[str, IntArray], behind: Mapping[str, int]) -> None:
        self.places, self.behind = places, behind
        #: How many of these have not been looked at.
        self.left = len(places)
        #: What gives from channels that go, 1 for each, what that costs, ``[channels, channels]``.
        self.spread: FloatArray | None = None

    def add_norm(self, name: str, statistics: Statistics) -> None:
        """Count a norm.

        Args:
            name: of the norm.
            statistics: of the shares along its axis; of no places where it is no norm.
        """
        self.left -= 1
        if statistics.count:
            self._add(name, self.behind[name] * statistics.covariance[0] / 4)

    def add_reader(self, name: str, cost: FloatArray) -> None:
        """Count an operator by what its inputs cost (:func:`cost_of_inputs`)."""
        self.left -= 1
        self._add(name, cost)

    def _add(self, name: str, cost: FloatArray) -> None:
        at = self.places[name]
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


def readers_behind(
    norms: Sequence[str], readers: Sequence[str], place: Mapping[str | None, int]
) -> dict[str, int]:
    """How many of a group's readers stand between each of its norms and the next one; at least one.

    >>> place = {"n": 0, "q": 1, "k": 2, "m": 3, "g": 4}
    >>> readers_behind(["n", "m"], ["q", "k", "g"], place)
    {'n': 2, 'm': 1}
    """
    starts = sorted(place[name] for name in norms)
    behind = np.searchsorted(starts, [place[each] for each in readers]) - 1
    return {name: max(int((behind == starts.index(place[name])).sum()), 1) for name in norms}
