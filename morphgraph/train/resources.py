"""What a penalty counts: costs, and widths of single groups that have a ceiling."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import Group


class Resource(Protocol):
    """A function of the group widths with a gradient, such as a :class:`~morphgraph.cost`."""

    @property
    def kind(self) -> str:
        """Its name."""

    @property
    def unit(self) -> str:
        """Of its amounts."""

    @property
    def total(self) -> float:
        """At the present widths."""

    def at(self, widths: FloatArray | IntArray) -> float:
        """At these group widths, ``[groups]``."""

    def polynomial(self, widths: FloatArray | IntArray) -> float:
        """The same, as if nothing vanished where a width is 0."""

    def marginals(self, widths: FloatArray | IntArray) -> FloatArray:
        """What one more channel of every group costs, ``[groups]``."""


class GroupWidth:
    """The width of one group."""

    unit = "channels"

    def __init__(self, group: Group) -> None:
        self.kind = f"width of {group.id}"
        self.total = float(group.width)
        self._index = group.index

    def at(self, widths: FloatArray | IntArray) -> float:
        """At these group widths, ``[groups]``."""
        return float(widths[self._index])

    def polynomial(self, widths: FloatArray | IntArray) -> float:
        """The same."""
        return float(widths[self._index])

    def marginals(self, widths: FloatArray | IntArray) -> FloatArray:
        """1 for the group, 0 for the others, ``[groups]``."""
        one = np.zeros(len(widths))
        one[self._index] = 1.0
        return one


@dataclass
class Counted:
    """A resource with the weight of its penalty; ``weight`` is in units of 1/initial."""

    resource: Resource
    initial: float
    weight: float = 1.0
