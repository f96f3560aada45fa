"""What a cost is as a function of the group widths: sums of products of sizes.

Every size is a linear function of the widths, and a term is a coefficient times a product of sizes.
Terms add up to *pieces*, and a cost is the sum over blocks of the largest piece of each block: most
costs have one piece, a roofline's block has two, peak memory one per moment. The gradient is that
of the active pieces.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import numpy as np

from morphgraph.arrays import Flags, FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.liveness import liveness


@dataclass(frozen=True, slots=True)
class Term:
    """``coefficient`` times the sizes of some dims or factors, owned by a layer.

    ``weights`` says how often MorphNet's regularizer sums over each of them. The term counts while
    the operator at ``op_index`` and the value ``value`` are there (-1 and empty: always).
    """

    coefficient: float
    vertices: tuple[int, ...]
    layer: str
    weights: tuple[int, ...] = ()
    piece: int = 0
    op_index: int = -1
    value: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """What of a cost depends on the widths of a few groups, and on no other.

    Attributes:
        piece: that it adds to.
        groups: their indices; none for a constant.
        at: the amounts, ``[n]``, at n widths of these groups, ``[n, groups]``.
    """

    piece: int
    groups: tuple[int, ...]
    at: Callable[[FloatArray], FloatArray]


class Cost:
    """One resource as a function of the group widths.

    Attributes:
        factors: the classes of every term whose sizes vary, ``[terms, most in a term]``; where a
            term has fewer, the number of classes stands for a size of 1.
        coefficients: by which every term's sizes are multiplied, ``[terms]``.
        pieces: that every term belongs to, ``[terms]``.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> macs = mg.cost(graph, "macs")
    >>> macs.at(graph.widths) == macs.total
    True
    >>> macs.gradient(graph.widths).shape == graph.widths.shape
    True
    """

    def __init__(
        self,
        graph: ChannelGraph,
        kind: str,
        unit: str,
        terms: Sequence[Term],
        block_of_piece: Sequence[int] = (0,),
    ) -> None:
        self.graph = graph
        self.kind = kind
        self.unit = unit
        self.terms = tuple(terms)
        self.block_of_piece = tuple(block_of_piece)
        classes = len(graph.fixed_size)
        varies = np.diff(graph.per_channel.indptr) > 0
        rows = [_fold(graph, term, varies) for term in terms]
        order = max((len(axis_classes) for _, axis_classes, _ in rows), default=0)
        self.factors = np.full((len(terms), max(order, 1)), classes, dtype=np.int64)
        self._weights = np.ones(self.factors.shape)
        for row, (_, axis_classes, weights) in enumerate(rows):
            self.factors[row, : len(axis_classes)] = axis_classes
            self._weights[row, : len(weights)] = weights
        self.coefficients = np.array([coefficient for coefficient, _, _ in rows])
        self._layers = list(dict.fromkeys(term.layer for term in terms))
        index = {layer: k for k, layer in enumerate(self._layers)}
        self._owner = np.array([index[term.layer] for term in terms], dtype=np.int64)
        self.pieces = np.array([term.piece for term in terms], dtype=np.int64)
        self._block = np.array(block_of_piece, dtype=np.int64)
        self._alone = len(np.unique(self._block)) == len(self._block)
        self._op_index = np.array([term.op_index for term in terms], dtype=np.int64)
        self._value = [term.value for term in terms]
        self._present: dict[frozenset[int], Flags] = {}
        self._gone: dict[frozenset[int], IntArray] = {}

    @cached_property
    def _terms_of(self) -> Mapping[str, Sequence[int]]:
        """The terms that count while a value is there."""
        found: dict[str, list[int]] = {}
        for row, value in enumerate(self._value):
            if value:
                found.setdefault(value, []).append(row)
        return found

    @cached_property
    def _terms_of_op(self) -> Mapping[int, Sequence[int]]:
        """The terms that count while an operator is there."""
        found: dict[int, list[int]] = {}
        for row, op_index in enumerate(self._op_index.tolist()):
            found.setdefault(op_index, []).append(row)
        return found

    @cached_property
    def total(self) -> float:
        """The cost at the present widths."""
        return self.at(self.graph.widths)

    @cached_property
    def by_layer(self) -> Mapping[str, float]:
        """The cost of every layer at the present widths."""
        return self.by_layer_at(self.graph.widths)

    def at(self, widths: FloatArray | IntArray) -> float:
        """The cost at these group widths, ``[groups]`` in the order of ``graph.groups``.

        Where a width is 0, what vanishes with the group is not counted
        (:mod:`morphgraph.passes.analysis.liveness`).
        """
        terms = self._terms(self.sizes(widths)) * self.counted(widths)
        return float(terms[self._active(terms)].sum())

    def polynomial(self, widths: FloatArray | IntArray) -> float:
        """The same, as if nothing vanished where a width is 0."""
        terms = self._terms(self.sizes(widths))
        return float(terms[self._active(terms)].sum())

    def by_layer_at(self, widths: FloatArray | IntArray) -> Mapping[str, float]:
        """The cost of every layer at these widths; zero for one that no active piece counts."""
        terms = self._terms(self.sizes(widths)) * self.counted(widths)
        active = np.where(self._active(terms), terms, 0.0)
        totals = np.bincount(self._owner, active, minlength=len(self._layers))
        return dict(zip(self._layers, totals.tolist(), strict=True))

    def gradient(self, widths: FloatArray | IntArray) -> FloatArray:
        """What one more channel of every group costs at these widths, ``[groups]``."""
        return self._gradient(widths, np.ones_like(self._weights), self.counted(widths))

    def marginals(self, widths: FloatArray | IntArray) -> FloatArray:
        """The gradient as the regularizer uses it, ``[groups]``.

        In MorphNet's convention a depthwise operator's channel counts once as input and once as
        output.
        """
        return self._gradient(widths, self._weights, np.ones(len(self._value), dtype=bool))

    def parts(self, widths: IntArray, most: int) -> list[Part] | None:
        """The cost as a sum of functions of few widths each, pieces apart.

        Args:
            widths: ``[groups]``; what vanishes where they are 0 is not counted.
            most: products of widths up to which that is done; ``None`` where there are more.
        """
        counted = np.flatnonzero(self.counted(widths)).tolist()
        matrix, fixed = self.graph.per_channel, self.graph.fixed_size
        # A size of the class after the last is 1.
        summands = np.append(np.diff(matrix.indptr) + (fixed != 0), 1)
        if summands[self.factors[counted]].prod(axis=1).sum() > most:
            return None
        found: dict[tuple[int, tuple[int, ...]], dict[tuple[int, ...], float]] = {}
        for row in counted:
            sums = [self._summands(k) for k in self.factors[row].tolist() if k < len(fixed)]
            for chosen in product(*sums):
                groups = tuple(sorted(group for group, _ in chosen if group >= 0))
                amount = self.coefficients[row] * prod(number for _, number in chosen)
                place = found.setdefault((int(self.pieces[row]), tuple(sorted(set(groups)))), {})
                place[groups] = place.get(groups, 0.0) + amount
        return [Part(piece, groups, _sum_of(groups, p)) for (piece, groups), p in found.items()]

    def _summands(self, axis_class: int) -> list[tuple[int, float]]:
        """What adds up to a size: by group its channels' share of it, and by -1 a constant."""
        matrix, constant = self.graph.per_channel, float(self.graph.fixed_size[axis_class])
        start, stop = matrix.indptr[axis_class : axis_class + 2]
        groups, numbers = matrix.indices[start:stop].tolist(), matrix.data[start:stop].tolist()
        return [*zip(groups, numbers, strict=True), *([(-1, constant)] if constant else [])]

    def sizes(self, widths: FloatArray | IntArray) -> FloatArray:
        """The sizes of all classes at these widths, and a last one that is 1, ``[classes + 1]``."""
        return np.append(self.graph.view_sizes(widths), 1.0)

    def _terms(self, sizes: FloatArray) -> FloatArray:
        terms: FloatArray = self.coefficients * sizes[self.factors].prod(axis=1)
        return terms

    def _active(self, terms: FloatArray) -> Flags:
        """Which terms belong to the largest piece of their block."""
        if self._alone:
            return np.ones(len(terms), dtype=bool)
        # A block counts as its largest piece; of equal ones the first: gradients are stable.
        pieces = np.bincount(self.pieces, terms, minlength=len(self._block))
        descending = np.lexsort((np.arange(len(pieces)), -pieces, self._block))
        _, first = np.unique(self._block[descending], return_index=True)
        winners = np.zeros(len(pieces), dtype=bool)
        winners[descending[first]] = True
        return winners[self.pieces]

    def counted(self, widths: FloatArray | IntArray) -> Flags:
        """Which terms belong to what is left at these widths, ``[terms]``."""
        dead = frozenset(np.flatnonzero(np.asarray(widths) == 0).tolist())
        if not dead:
            return np.ones(len(self._value), dtype=bool)
        if dead not in self._present:
            outcome = liveness(self.graph, dead)
            live = np.zeros(len(self.graph.ops) + 1, dtype=bool)
            live[[*outcome.live, -1]] = True  # -1, no operator, comes last
            counted = live[self._op_index]
            for value in outcome.vanished_values & self._terms_of.keys():
                counted[self._terms_of[value]] = False
            self._present = {dead: counted}
        return self._present[dead]

    def gone_with(self, dead: Iterable[int]) -> IntArray:
        """The terms that vanish when some groups die in the network as it is."""
        key = frozenset(dead)
        if key not in self._gone:
            self._gone[key] = self._gone_with(key)
        return self._gone[key]

    def _gone_with(self, dead: frozenset[int]) -> IntArray:
        now, then = liveness(self.graph, ()), liveness(self.graph, dead)
        rows = [row for k in now.live - then.live for row in self._terms_of_op.get(k, ())]
        vanished = then.vanished_values - now.vanished_values
        rows += [row for value in vanished for row in self._terms_of.get(value, ())]
        return np.unique(np.array(rows, dtype=np.int64))

    def _gradient(
        self, widths: FloatArray | IntArray, weights: FloatArray, counted: Flags
    ) -> FloatArray:
        sizes = self.sizes(widths)
        values = sizes[self.factors]
        active = self._active(self.coefficients * values.prod(axis=1) * counted)
        coefficients = np.where(active & counted, self.coefficients, 0.0)
        # The slope of a product by its k-th factor is the product of the others; a class may
        # stand in several places of a term, and its slopes add up.
        slopes = np.zeros(len(sizes))
        for k in range(values.shape[1]):
            slope = coefficients * weights[:, k]
            for other in range(values.shape[1]):
                if other != k:
                    slope = slope * values[:, other]
            slopes += np.bincount(self.factors[:, k], slope, minlength=len(sizes))
        result: FloatArray = self.graph.per_group @ slopes[:-1]
        return result


def _sum_of(
    groups: tuple[int, ...], products: Mapping[tuple[int, ...], float]
) -> Callable[[FloatArray], FloatArray]:
    """A sum of products of widths as a function of those, by the groups of every product."""
    terms = [([groups.index(k) for k in each], number) for each, number in products.items()]

    def at(widths: FloatArray) -> FloatArray:
        return sum(
            (number * widths[:, columns].prod(axis=1) for columns, number in terms),
            np.zeros(len(widths)),
        )

    return at


def _fold(graph: ChannelGraph, term: Term, varies: Flags) -> tuple[float, list[int], list[int]]:
    """A term's coefficient with the constant sizes multiplied in, and the classes that vary."""
    coefficient = term.coefficient
    axis_classes: list[int] = []
    weights: list[int] = []
    for k, vertex in enumerate(term.vertices):
        views = graph.views(int(graph.vertex_class[vertex]))
        for axis_class in views:
            if varies[axis_class]:
                axis_classes.append(axis_class)
                weights.append(term.weights[k] if term.weights else 1)
            else:
                coefficient *= float(graph.fixed_size[axis_class])
        coefficient *= graph.left_out(views[0])
    return coefficient, axis_classes, weights
