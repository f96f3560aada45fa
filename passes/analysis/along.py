"""Costs along a path of widths: what changes with a few widths is computed anew, and nothing else.

A search over widths asks for costs and slopes again and again, and every step changes the width of
one group or of a few. The terms with a factor that a group stands on are a handful then, whatever
the size of the network, and so are the slopes that change with them: a step costs what the group
touches. Sums of many parts are kept in two levels, so that one part more or less does not ask for
all of them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.polynomial import Cost


class CostAlong(Protocol):
    """A cost at widths that change step by step."""

    def move(self, groups: IntArray, widths: FloatArray) -> IntArray:
        """Give these groups other widths.

        Returns:
            Indices of the groups whose slopes may be others than before.
        """
        ...

    def holds(self, limit: float) -> bool:
        """Whether the cost is at most this much: what ``cost.at(widths) <= limit`` says."""
        ...

    def without(self, groups: IntArray, gone: IntArray) -> float:
        """What the cost falls by if these groups die, ``gone`` being the terms that go with them.

        Where the largest of several pieces counts, with those pieces that do now.
        """
        ...

    @property
    def at(self) -> float:
        """The cost."""
        ...

    @property
    def gradient(self) -> FloatArray:
        """What one more channel of every group costs, ``[groups]``."""
        ...


FEW = 512
"""Terms that are computed sooner than those of them are found that change."""


def along(cost: Cost, widths: FloatArray | IntArray, few: int | None = None) -> CostAlong:
    """A cost at widths that are going to change step by step.

    Args:
        cost: to be followed.
        widths: to begin with, ``[groups]``.
        few: a cost of no more terms is computed as a whole at every step; :data:`FEW` by default.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> flops = mg.cost(graph, "flops")
    >>> state, widths = along(flops, graph.widths, few=0), graph.widths.copy()
    >>> widths[1] -= 2
    >>> changed = state.move(np.array([1]), widths[[1]])
    >>> state.at == flops.at(widths), bool((state.gradient == flops.gradient(widths)).all())
    (True, True)
    """
    few = FEW if few is None else few
    return _Polynomial(cost, widths) if len(cost.terms) > few else _Whole(cost, widths)


class WidthsAlong:
    """Widths that change step by step, and several costs at them.

    Attributes:
        widths: of the groups, ``[groups]``; changed by :meth:`move` alone.
    """

    def __init__(
        self, costs: Sequence[Cost], widths: FloatArray | IntArray, few: int | None = None
    ) -> None:
        self.widths = np.array(widths, dtype=np.float64)
        self._costs = {cost: along(cost, widths, few) for cost in costs}

    def move(
        self, groups: Sequence[int] | IntArray, widths: Sequence[float] | FloatArray | IntArray
    ) -> IntArray:
        """Give these groups other widths.

        Returns:
            Indices of the groups whose slopes may be others than before.
        """
        places, wanted = np.asarray(groups, dtype=np.int64), np.asarray(widths, dtype=np.float64)
        self.widths[places] = wanted
        changed = [cost.move(places, wanted) for cost in self._costs.values()]
        return changed[0] if len(changed) == 1 else np.unique(np.concatenate([*changed, places]))

    def __getitem__(self, cost: Cost) -> CostAlong:
        return self._costs[cost]


class _Whole:
    """A cost that is computed as a whole whenever it is asked for."""

    def __init__(self, cost: Cost, widths: FloatArray | IntArray) -> None:
        self.cost = cost
        self.widths = np.array(widths, dtype=np.float64)

    def move(self, groups: IntArray, widths: FloatArray) -> IntArray:
        self.widths[groups] = widths
        return np.arange(len(self.widths))

    def holds(self, limit: float) -> bool:
        return self.at <= limit

    def without(self, groups: IntArray, gone: IntArray) -> float:  # noqa: ARG002
        widths = self.widths.copy()
        widths[groups] = 0
        return self.at - self.cost.at(widths)

    @property
    def at(self) -> float:
        return self.cost.at(self.widths)

    @property
    def gradient(self) -> FloatArray:
        return self.cost.gradient(self.widths)


#: Below this share of a sum its value may be rounded otherwise than by ``Cost.at``.
_ROUNDING = 1e-9
#: Steps after which a sum that was carried along is computed anew.
_FRESH = 1 << 18


class _Polynomial:
    """Sums of products of sizes.

    Of every term is known what it counts (nothing where its piece is not the largest of its block,
    or where it has vanished), and its slopes by each of its factors. A class's slope is the sum of
    those of the terms that it stands in, and a group's that of the classes that it stands on.
    """

    def __init__(self, cost: Cost, widths: FloatArray | IntArray) -> None:
        graph: ChannelGraph = cost.graph
        self.cost, self.graph = cost, graph
        self.widths = np.array(widths, dtype=np.float64)
        classes = len(graph.fixed_size)
        self._every = np.arange(len(cost.terms))
        terms, places = np.nonzero(cost.factors < classes)
        self._terms_of = _Lists(cost.factors[terms, places], terms, classes)
        self._entry = np.full(cost.factors.shape, -1)
        self._entry[terms, places] = np.arange(len(terms))
        self._slopes = Sums(cost.factors[terms, places], classes)
        members, self._scale = graph.per_group.tocoo(), graph.per_group.data
        self._of_class = _Lists(members.col, np.arange(len(members.col)), classes)
        self._class_of = members.col
        self._gradient = Sums(members.row, len(graph.groups))
        self._contest = _Contest(cost)
        self._sizes = cost.sizes(self.widths)
        self._counted = cost.counted(self.widths)
        self._counts = np.zeros(len(self._every))
        self._total, self._moves = 0.0, 0
        self._update(self._every)
        self._total = self._largest = cost.at(self.widths)

    @property
    def at(self) -> float:
        return self._total

    @property
    def gradient(self) -> FloatArray:
        return self._gradient.totals

    def holds(self, limit: float) -> bool:
        # Sums that are carried along are rounded otherwise: where it matters, the other counts.
        if not abs(self._total - limit) > _ROUNDING * (abs(limit) + self._largest):
            self._total = self.cost.at(self.widths)
        return self._total <= limit

    def without(self, groups: IntArray, gone: IntArray) -> float:
        classes, less = self._share(groups, self.widths[groups])
        rows = np.unique(np.append(self._terms_of.of(classes), gone))
        sizes = self._sizes
        before = sizes[classes]
        np.add.at(sizes, classes, -less)
        amounts = self.cost.coefficients[rows] * sizes[self.cost.factors[rows]].prod(axis=1)
        sizes[classes] = before
        stays = (self._counts[rows] != 0) & ~np.isin(rows, gone)
        return float(self._counts[rows].sum() - amounts[stays].sum())

    def _share(self, groups: IntArray, widths: FloatArray) -> tuple[IntArray, FloatArray]:
        """The classes that groups stand on, and by how much channels of these make them larger."""
        scales = self.graph.per_group
        spans = _spans(scales.indptr, groups)
        counts = scales.indptr[groups + 1] - scales.indptr[groups]
        return scales.indices[spans], scales.data[spans] * np.repeat(widths, counts)

    def move(self, groups: IntArray, widths: FloatArray) -> IntArray:
        before = self.widths[groups]
        self.widths[groups] = widths
        vanished = self._every[:0]
        if ((before == 0) != (widths == 0)).any():
            counted = self.cost.counted(self.widths)
            vanished = np.flatnonzero(counted != self._counted)
            self._counted = counted
        self._moves += 1
        if self._moves % _FRESH == 0:
            self._total = self.cost.at(self.widths)
        classes, more = self._share(groups, widths - before)
        np.add.at(self._sizes, classes, more)
        rows = np.append(self._terms_of.of(classes), vanished)
        changed = self._update(np.unique(rows) if len(rows) > 1 else rows)
        if len(vanished):
            self._total = float(self._counts.sum())  # nothing is left over from rounding
        return changed

    def _update(self, rows: IntArray) -> IntArray:
        """Compute these terms anew, and what depends on them; the groups with other slopes."""
        cost = self.cost
        values = self._sizes[cost.factors[rows]]
        amounts = cost.coefficients[rows] * values.prod(axis=1) * self._counted[rows]
        more = self._contest.put(rows, amounts)
        if len(more):
            rows = np.union1d(rows, more)
            values = self._sizes[cost.factors[rows]]
            amounts = cost.coefficients[rows] * values.prod(axis=1) * self._counted[rows]
        counts = self._contest.wins(rows) & self._counted[rows]
        amounts = np.where(counts, amounts, 0.0)
        self._total += float((amounts - self._counts[rows]).sum())
        self._counts[rows] = amounts
        coefficients = np.where(counts, cost.coefficients[rows], 0.0)
        slopes = np.repeat(coefficients[:, None], values.shape[1], axis=1)
        for k in range(values.shape[1]):
            for other in range(values.shape[1]):
                if other != k:
                    slopes[:, k] *= values[:, other]
        entries = self._entry[rows]
        there = entries >= 0
        classes = self._slopes.put(entries[there], slopes[there])
        members = self._of_class.of(classes)
        prices = self._scale[members] * self._slopes.totals[self._class_of[members]]
        return self._gradient.put(members, prices)


class _Contest:
    """Which pieces are the largest of their blocks; those of blocks with one piece always are."""

    def __init__(self, cost: Cost) -> None:
        blocks = np.asarray(cost.block_of_piece)
        self._piece_of, self._block_of = cost.pieces, blocks
        self._wins = np.ones(len(blocks), dtype=bool)
        several = np.bincount(blocks)[blocks] > 1
        self._any = bool(several.any())
        self._contested = several
        if not self._any:
            return
        self._pieces = _Lists(blocks, np.arange(len(blocks)), int(blocks.max()) + 1)
        self._terms = _Lists(self._piece_of, np.arange(len(self._piece_of)), len(blocks))
        self._amounts = Sums(self._piece_of, len(blocks))
        self._winner = np.full(int(blocks.max()) + 1, -1)
        self._wins[several] = False
        for block in np.unique(blocks[several]).tolist():
            self._crown(block)

    def wins(self, terms: IntArray) -> np.ndarray:
        """Which of these terms are of a largest piece."""
        return self._wins[self._piece_of[terms]]

    def put(self, terms: IntArray, amounts: FloatArray) -> IntArray:
        """Take note of terms' amounts; all terms of the pieces that won or lost by that."""
        if not self._any:
            return terms[:0]
        contested = self._contested[self._piece_of[terms]]
        changed = self._amounts.put(terms[contested], amounts[contested])
        turned = [self._crown(block) for block in np.unique(self._block_of[changed]).tolist()]
        pieces = [piece for pair in turned for piece in pair]
        return self._terms.of(np.array(pieces, dtype=np.int64))

    def _crown(self, block: int) -> tuple[int, ...]:
        """Find the block's winner; the old and the new one where they differ."""
        pieces = self._pieces.of(np.array([block]))
        # Of equal pieces the first: gradients are stable.
        first = int(pieces[np.argmax(self._amounts.totals[pieces])])
        before = int(self._winner[block])
        if first == before:
            return ()
        self._winner[block] = first
        self._wins[first] = True
        if before < 0:
            return (first,)
        self._wins[before] = False
        return before, first


class Sums:
    """Sums of entries by their owners, kept up to date while entries change.

    Entries stand in rows of a few, and an owner's sum is that of its rows': a change costs a row
    and a sum over rows, however many entries there are.

    >>> sums = Sums(np.array([0, 1, 0]), 2)
    >>> sums.put(np.array([0, 1, 2]), np.array([1.0, 2.0, 3.0])).tolist(), sums.totals.tolist()
    ([0, 1], [4.0, 2.0])
    >>> sums.put(np.array([0, 1]), np.array([5.0, 2.0])).tolist(), sums.totals.tolist()
    ([0], [8.0, 2.0])
    """

    ROW = 16

    def __init__(self, owners: IntArray, size: int) -> None:
        counts = np.bincount(owners, minlength=size)
        rows = -(-counts // self.ROW)
        self._first = np.append(0, np.cumsum(rows))
        self._several = rows > 1
        self._owner = np.repeat(np.arange(size), rows)
        order = np.argsort(owners, kind="stable")
        start = np.append(0, np.cumsum(counts))[:-1]
        within = np.arange(len(owners)) - np.repeat(start, counts)
        self._slot = np.empty(len(owners), dtype=np.int64)
        self._slot[order] = self._first[owners[order]] * self.ROW + within
        self._table = np.zeros((int(self._first[-1]), self.ROW))
        self._flat = self._table.reshape(-1)
        self._rows = np.zeros(len(self._table))
        self.totals = np.zeros(size)

    def put(self, entries: IntArray, values: FloatArray) -> IntArray:
        """Set some entries; the owners of those that are others than before."""
        slots = self._slot[entries]
        changed = self._flat[slots] != values
        slots = slots[changed]
        self._flat[slots] = values[changed]
        rows = np.unique(slots // self.ROW)
        self._rows[rows] = self._table[rows].sum(axis=1)
        owners: IntArray = self._owner[rows]
        self.totals[owners] = self._rows[rows]
        if self._several[owners].any():
            owners = np.unique(owners)
            for owner in owners[self._several[owners]].tolist():
                self.totals[owner] = self._rows[self._first[owner] : self._first[owner + 1]].sum()
        return owners


class _Lists:
    """Lists of numbers by owner."""

    def __init__(self, owners: IntArray, numbers: IntArray, size: int) -> None:
        self._start = np.append(0, np.cumsum(np.bincount(owners, minlength=size)))
        self._numbers = numbers[np.argsort(owners, kind="stable")]

    def of(self, owners: IntArray) -> IntArray:
        """The numbers of all of these, one list behind the other."""
        return self._numbers[_spans(self._start, owners)]


def _spans(starts: IntArray, rows: IntArray) -> IntArray:
    """All places of some rows, where row ``k`` is at ``starts[k]`` to ``starts[k + 1]``."""
    first, counts = starts[rows], starts[rows + 1] - starts[rows]
    ends = np.cumsum(counts)
    offsets = np.repeat(first - (ends - counts), counts)
    spans: IntArray = offsets + np.arange(len(offsets))
    return spans
