"""Which widths a rounding grid allows: it counts channels of tensors, a group counts its own units.

A channel of a group may be more than one channel of the tensors that kernels make and read: a head
is its size, a normalization group all its channels, a position within the 32 parts of a grouped
convolution 32 channels. With ``u`` channels of the tensor per channel of the group, a width ``w``
is on the grid of ``N`` where ``w * u`` is a multiple of ``N``: every ``N / gcd(N, u)`` channels.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.passes.coupling.roles import roles


@analysis
def tensor_channels(graph: ChannelGraph) -> IntArray:
    """Per group how many channels of a tensor one of its channels is, ``[groups]``.

    The tensors are those that layers with kernels make and read. Where they differ (a kernel makes
    queries, keys and values of a head at once, another reads the head's result), what divides all:
    a width on the grid there is on the grid everywhere.
    """
    units, others = np.zeros((2, len(graph.groups)), dtype=np.int64)
    edges, counted = graph.couplings.columns, roles(graph.couplings).counted
    of_kernels = np.zeros(len(counted), dtype=bool)
    of_kernels[edges.factor[edges.on_weight]] = True
    of_kernels &= counted
    classes = graph.vertex_class[edges.dim]
    for found, is_wanted in ((units, of_kernels), (others, ~of_kernels)):
        standing = np.unique(classes[is_wanted[edges.factor] & ~edges.on_weight])
        for axis_class in standing.tolist():
            for index, per in graph.members_in(axis_class):
                found[index] = gcd(int(found[index]), int(per))
    return np.maximum(np.where(units > 0, units, others), 1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The widths of one group that are on a grid: multiples of a pitch, to whole channels.

    >>> heads_of_64, norm_groups_of_12 = Grid.of(16, 64, 12), Grid.of(16, 12, 8)
    >>> heads_of_64.at_most(11), norm_groups_of_12.at_most(7)
    (11, 4)
    """

    pitch: Fraction

    @classmethod
    def of(cls, round_to: int, unit: int, width: int) -> "Grid":
        """The grid of a group.

        Where no smaller width is on the grid though the tensor has more than ``round_to``
        channels, the widths nearest to its multiples count as on it. A group that has fewer keeps
        its width.

        Args:
            round_to: channels of the tensor.
            unit: channels of the tensor per channel of the group.
            width: of the group.

        >>> grid = Grid.of(64, 12, 8)  # 96 channels; 64 and 192 are no multiples of both
        >>> [grid.at_most(width) for width in range(1, 9)]  # nearest to 64: 5 * 12
        [0, 0, 0, 0, 5, 5, 5, 5]
        """
        exact = Fraction(round_to // gcd(round_to, unit))
        if exact < width or width == 1 or round_to >= width * unit:
            return cls(exact)
        nearest = cls(Fraction(round_to, unit))
        return nearest if nearest.at_most(width - 1) else cls(Fraction(width - 1))

    def also(self, multiple: int, width: int) -> "Grid":
        """The widths on the grid that are multiples of a number, too.

        Where none below the group's own width is on both, the multiples alone.

        >>> heads_of_64 = Grid.of(16, 2, 32)
        >>> heads_of_64.also(12, 36).at_most(31), heads_of_64.also(1, 32).at_most(31)
        (24, 24)
        """
        if multiple == 1:
            return self
        both = lcm(self.pitch.numerator, multiple) if self.pitch.denominator == 1 else width
        return Grid(Fraction(both if both < width else multiple))

    def at_most(self, width: int) -> int:
        """The largest width on the grid that is not above this one; may be 0."""
        return self._step(self._steps(width))

    def above(self, width: int) -> int:
        """The smallest width on the grid that is above this one."""
        return self._step(self._steps(width) + 1)

    def at_least(self, width: int) -> int:
        """The smallest width on the grid that is not below this one."""
        return self.above(width - 1) if width > 0 else 0

    def nearest(self, width: float) -> int:
        """The width on the grid that is nearest to a wanted one; of two the larger."""
        low = self.at_most(int(width))
        high = self.above(low)
        return high if high - width <= width - low else low

    def between(self, low: int, high: int) -> IntArray:
        """All widths on the grid from one width to another, ascending."""
        counts = range(self._steps(low - 1) + 1 if low > 0 else 0, self._steps(high) + 1)
        return np.unique(np.array([self._step(count) for count in counts], dtype=np.int64))

    def _step(self, count: int) -> int:
        """The width after so many pitches: the whole number that is nearest, halves upwards."""
        return (2 * count * self.pitch.numerator + self.pitch.denominator) // (
            2 * self.pitch.denominator
        )

    def _steps(self, width: int) -> int:
        """The most pitches that give no more than this width."""
        return -(-(2 * width + 1) * self.pitch.denominator // (2 * self.pitch.numerator)) - 1
