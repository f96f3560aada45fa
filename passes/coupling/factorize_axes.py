"""Classes and shared axes: products of factors, in the finest terms that all operators agree on.

Dims and factors joined by identity maps form a *class*, and share their positions. A *shared axis*
is an axis of one operator on which several factors stand, as a product (``(g c)``) or side by side
as segments (a concatenation).

Operators cut the same axis in different ways: a grouped convolution sees 384 channels as (24 16),
the attention behind it as (8 48). Where the cuts nest, both are products of the same finer factors,
(8 3 16), and these are what may shrink. So the products on a class are refined against each other:
equal intervals become one class, and a factor that spans several intervals becomes a product of
them. A segment that is cut along the blocks of its axis inherits that axis's inner factors. What
does not nest (4 groups that feed 6) stays as it is; there the solving ties the positions.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from morphgraph.arrays import IntArray
from morphgraph.graph import Couplings, Edge
from morphgraph.ops import IndexMap
from morphgraph.ops.description import product_maps


@dataclass(frozen=True, slots=True)
class AxisFactor:
    """A factor on an axis that it shares: its class, its map, and its rank as a carrier (0: best).

    ``vertex`` is the factor's id; ``None`` for a finer factor that no operator names.
    """

    axis_class: int
    size: int
    map: IndexMap
    rank: int = 0
    vertex: int | None = None

    def pairs(self) -> tuple[IntArray, IntArray]:
        """Its (element, position) pairs on the axis."""
        return self.map.pairs(self.size)


@dataclass(frozen=True, slots=True)
class SharedAxis:
    """An axis that several factors share, or one factor covers in part.

    ``dim`` is the axis's id and ``through`` the operator's index; ``None`` for what refining found.
    """

    axis_class: int
    factors: tuple[AxisFactor, ...]
    product: bool
    dim: int | None = None
    through: int | None = None


@dataclass(frozen=True)
class FactorizedAxes:
    """All shared axes, the class of every dim and factor, and the size of every class.

    Classes beyond those of dims and factors are finer factors that no operator names.
    """

    classes: IntArray
    sizes: IntArray
    shared_axes: Sequence[SharedAxis]

    @cached_property
    def factors_of_products(self) -> Mapping[int, Sequence[int]]:
        """By the class of a product axis the classes of its factors."""
        factors: dict[int, list[int]] = defaultdict(list)
        for axis in self.shared_axes:
            if axis.product:
                factors[axis.axis_class] += (factor.axis_class for factor in axis.factors)
        return factors


def factorize_axes(couplings: Couplings) -> FactorizedAxes:
    """Classes and shared axes of what ``couple`` found, refined against each other."""
    classes = _classes(couplings)
    sizes = np.zeros(int(classes.max(initial=-1)) + 1, dtype=np.int64)
    sizes[classes] = couplings.sizes
    return _Refinement(classes, sizes.tolist(), _shared_axes(couplings, classes)).run()


def _classes(couplings: Couplings) -> IntArray:
    """Class of every vertex, numbered in the order of their first vertices."""
    edges = couplings.columns
    ties = np.array(couplings.ties, dtype=np.int64).reshape(-1, 2)
    left = np.append(edges.factor[edges.whole], ties[:, 0])
    right = np.append(edges.dim[edges.whole], ties[:, 1])
    return components(len(couplings.sizes), left, right)


def components(count: int, left: IntArray, right: IntArray) -> IntArray:
    """Connected component of every vertex, numbered in the order of their first vertices.

    The same as ``networkx.connected_components`` on ``ChannelGraph.networkx``, whose building alone
    would take a third of the time of lifting.
    """
    ties = sparse.coo_array((np.ones(len(left), dtype=np.int8), (left, right)), (count, count))
    _, labels = connected_components(ties, directed=False)
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbered: IntArray = rank[labels]
    return numbered


def _shared_axes(couplings: Couplings, classes: IntArray) -> list[SharedAxis]:
    """The axes on which an operator has several factors, or one that covers a part of it."""
    edges_of: dict[tuple[int, int, int], list[Edge]] = defaultdict(list)
    for edge in couplings.edges:
        if not edge.whole:
            edges_of[edge.op_index, edge.port, edge.dim].append(edge)
    shared = []
    class_of, sizes = classes.tolist(), couplings.sizes.tolist()
    for (op_index, _, dim), edges in edges_of.items():
        preferred = couplings.preferences.get(op_index, ())
        rank = {couplings.ops[op_index].factors[name]: k for k, name in enumerate(preferred)}
        factors = tuple(
            AxisFactor(
                axis_class=class_of[edge.factor],
                size=sizes[edge.factor],
                map=edge.map,
                rank=rank.get(edge.factor, len(rank)),
                vertex=edge.factor,
            )
            for edge in edges
        )
        product = any(edge.map.outer * edge.map.inner > 1 for edge in edges)
        shared.append(SharedAxis(class_of[dim], factors, product, dim, op_index))
    return shared


@dataclass(slots=True)
class _Class:
    """What is known of one class: the products on it, and the segments that lie in it."""

    size: int
    products: list[tuple[AxisFactor, ...]] = field(default_factory=list)
    segments: list[AxisFactor] = field(default_factory=list)


class _Refinement:
    """Refines products until all that nest are products of the same factors.

    Classes are merged as they turn out to be equal: a forest of disjoint sets (``_find``,
    ``_unite``). A product is a chain of *intervals* (low, high, class), innermost first: ``low``
    positions lie inside one element of the factor, ``high`` inside one round of it. Of (24 16) and
    (8 48) on 384 channels the intervals are (1, 16), (16, 384) and (1, 48), (48, 384); together
    they cut at 1, 16, 48, 384, which is (8 3 16). A class waits in ``pending`` until nothing new
    is known of it.
    """

    def __init__(
        self, classes: IntArray, sizes: Sequence[int], shared_axes: Sequence[SharedAxis]
    ) -> None:
        self.classes = classes
        self.parent = list(range(len(sizes)))
        self.known = [_Class(size) for size in sizes]
        self.shared_axes = list(shared_axes)
        self.outer: dict[tuple[tuple[int, int, int], ...], int] = {}
        for axis in shared_axes:
            here = self.known[axis.axis_class]
            if axis.product:
                here.products.append(axis.factors)
            else:
                here.segments += [part for part in axis.factors if part.map.table is None]
        with_products = [k for k, here in enumerate(self.known) if here.products]
        self.pending = with_products[::-1]

    def run(self) -> FactorizedAxes:
        while self.pending:
            self._refine(self._find(self.pending.pop()))
        roots = np.array([self._find(k) for k in range(len(self.parent))], dtype=np.int64)
        used, inverse = np.unique(roots, return_inverse=True)
        sizes = np.array([self.known[root].size for root in used], dtype=np.int64)
        shared_axes: dict[Any, SharedAxis] = {}
        number = inverse.tolist()
        for axis in self.shared_axes:
            parts = tuple(
                AxisFactor(number[p.axis_class], p.size, p.map, p.rank, p.vertex)
                for p in axis.factors
            )
            # Two operators may say the same of an axis; a table is the same if it is one object.
            same = [(p.axis_class, p.map if p.map.table is None else id(p.map)) for p in parts]
            here = number[axis.axis_class]
            final = SharedAxis(here, parts, axis.product, axis.dim, axis.through)
            shared_axes.setdefault((final.axis_class, *same), final)
        return FactorizedAxes(inverse[self.classes], sizes, list(shared_axes.values()))

    def _find(self, axis_class: int) -> int:
        while self.parent[axis_class] != axis_class:
            self.parent[axis_class] = axis_class = self.parent[self.parent[axis_class]]
        return axis_class

    def _unite(self, one: int, other: int) -> None:
        one, other = sorted((self._find(one), self._find(other)))
        if one == other:
            return
        self.parent[other] = one
        self.known[one].products += self.known[other].products
        self.known[one].segments += self.known[other].segments
        self.pending.append(one)

    def _new(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.known.append(_Class(size))
        return len(self.parent) - 1

    def _refine(self, axis_class: int) -> None:
        """Refine the products on one class, and hand its factors on to the segments in it."""
        chain = self._chain(axis_class)
        if not chain:
            return
        # A factor that spans several of the finest intervals is a product of them itself.
        for low, high, factor in self._intervals(axis_class):
            inside = [cut for cut in chain if low <= cut[0] and cut[1] <= high]
            if len(inside) > 1 and (inside[0][0], inside[-1][1]) == (low, high):
                self._add_product(factor, [(a // low, b // low, k) for a, b, k in inside])
        for part in list(self.known[axis_class].segments):
            self._cut_segment(part, chain)

    def _intervals(self, axis_class: int) -> Iterable[tuple[int, int, int]]:
        """Every factor on a class, as (positions inside one element, of one round, class)."""
        return [
            (part.map.inner, part.map.inner * part.size, self._find(part.axis_class))
            for parts in self.known[axis_class].products
            for part in parts
        ]

    def _chain(self, axis_class: int) -> list[tuple[int, int, int]]:
        """The finest intervals of a class, innermost first; classes on equal ones are united.

        A product that does not nest with those before it is left out.
        """
        bounds: set[int] = set()
        owner: dict[tuple[int, int], int] = {}
        for parts in self.known[axis_class].products:
            cuts = [(p.map.inner, p.map.inner * p.size, self._find(p.axis_class)) for p in parts]
            wider = sorted(bounds.union(*((low, high) for low, high, _ in cuts)))
            # 4 groups that feed 6 cut 24 channels at 6 and at 4: neither divides the other.
            if any(high % low for low, high in pairwise(wider)):
                continue
            bounds = set(wider)
            for low, high, factor in cuts:
                self._unite(owner.setdefault((low, high), factor), factor)
        spans = list(pairwise(sorted(bounds)))
        chain = [
            (low, high, owner[low, high] if (low, high) in owner else self._new(high // low))
            for low, high in spans
        ]
        if any(span not in owner for span in spans):
            self._add_product(axis_class, chain)
        return chain

    def _add_product(self, axis_class: int, cuts: Sequence[tuple[int, int, int]]) -> None:
        """Say that a class is a product of intervals, innermost first; what is known is no news."""
        axis_class = self._find(axis_class)
        if len(cuts) == 1:
            self._unite(axis_class, cuts[0][2])
            return
        here = self.known[axis_class]
        sizes = [high // low for low, high, _ in reversed(cuts)]
        parts = tuple(
            AxisFactor(self._find(factor), size, index_map)
            for (_, _, factor), size, index_map in zip(
                reversed(cuts), sizes, product_maps(sizes), strict=True
            )
        )
        if any(self._resolved(known) == self._resolved(parts) for known in here.products):
            return
        here.products.append(parts)
        self.shared_axes.append(SharedAxis(axis_class, parts, True))
        self.pending.append(axis_class)

    def _resolved(self, parts: tuple[AxisFactor, ...]) -> list[tuple[int, int]]:
        return [(self._find(part.axis_class), part.map.inner) for part in parts]

    def _cut_segment(self, part: AxisFactor, chain: Sequence[tuple[int, int, int]]) -> None:
        """A segment along whole blocks of its axis is a product: blocks, and what is in each."""
        start, length = part.map.offset, part.size
        # The innermost intervals whose blocks the segment's ends do not cut through.
        inner = [cut for cut in chain if start % cut[1] == 0 and length % cut[1] == 0]
        if not inner or len(inner) == len(chain):
            return
        block = inner[-1][1]
        if length > block:
            blocks = self._segment(
                self._outer(chain[len(inner) :]), start // block, length // block
            )
            inner.append((block, length, blocks))
        self._add_product(part.axis_class, inner)

    def _outer(self, above: Sequence[tuple[int, int, int]]) -> int:
        """The class of what stands outside of the innermost of these intervals."""
        if len(above) == 1:
            return self._find(above[0][2])
        block = above[0][0]
        cuts = tuple((low // block, high // block, self._find(k)) for low, high, k in above)
        if cuts not in self.outer:
            self.outer[cuts] = self._new(cuts[-1][1])
            self._add_product(self.outer[cuts], cuts)
        return self._find(self.outer[cuts])

    def _segment(self, axis_class: int, start: int, length: int) -> int:
        """The class of a segment of a class."""
        for part in self.known[axis_class].segments:
            if (part.map.offset, part.size) == (start, length):
                return part.axis_class
        part = AxisFactor(self._new(length), length, IndexMap(offset=start))
        self.known[axis_class].segments.append(part)
        self.shared_axes.append(SharedAxis(axis_class, (part,), False))
        self.pending.append(axis_class)
        return part.axis_class
