"""Numbers that change a few at a time, and which of them is the least."""

import numpy as np

from morphgraph.arrays import FloatArray, IntArray


class Lowest:
    """Numbers, at first all infinite, and the least of them.

    They stand in rows whose least is known: a change costs a row, not all of them.

    >>> numbers = Lowest(3)
    >>> numbers.put(np.array([1, 2]), np.array([5.0, 5.0]))
    >>> numbers.least
    (1, 5.0)
    """

    ROW = 1024

    def __init__(self, count: int) -> None:
        rows = -(-max(count, 1) // self.ROW)
        self._table = np.full((rows, min(self.ROW, max(count, 1))), np.inf)
        self._flat = self._table.reshape(-1)
        self._lows = np.full(rows, np.inf)

    def put(self, places: IntArray, numbers: FloatArray) -> None:
        """Set the numbers at some places."""
        self._flat[places] = numbers
        if len(self._lows) > 1:
            rows = np.unique(places // self.ROW)
            self._lows[rows] = self._table[rows].min(axis=1)

    @property
    def least(self) -> tuple[int, float]:
        """The least number, and its place; of equal ones the first."""
        row = int(np.argmin(self._lows))
        column = int(np.argmin(self._table[row]))
        return row * self.ROW + column, float(self._table[row, column])
