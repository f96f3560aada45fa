"""Which positions of every axis stay under a plan: for ``resize`` and ``mask``."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, Flags, IntArray, Shape
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.mapped import take


class AxisSelection:
    """Which positions of every axis stay, given the channels that stay and those that are added."""

    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        added: Mapping[int, int] | None = None,
    ) -> None:
        self.graph = graph
        self.dead = frozenset(index for index, kept in keep.items() if not len(kept))
        alive = graph.alive(keep)
        atom_alive = alive[graph.atom_channel]
        dead = np.flatnonzero(~atom_alive)
        owners = np.searchsorted(graph.class_start, dead, side="right") - 1
        starts = graph.class_start
        self._classes: list[int] = graph.vertex_class.tolist()
        self._changed = {
            axis_class: np.flatnonzero(
                np.logical_and.reduce(
                    [atom_alive[starts[k] : starts[k + 1]] for k in graph.views(axis_class)]
                )
            )
            for axis_class in np.unique(graph.base[owners]).tolist()
        }
        self._fresh: dict[int, IntArray] = {}
        for view, template, count in self._growths(keep, added or {}):
            self._grow(view, template, count)

    def _growths(
        self, keep: Mapping[int, IntArray], added: Mapping[int, int]
    ) -> list[tuple[int, int, int]]:
        """Classes and views that grow, the channel that is copied there, and how often.

        Of several views of one class the one with the longest runs comes first: a new head has as
        many elements as the others, and a new element then comes in each of them.
        """
        graph, columns = self.graph, self.graph.per_channel.tocsc()
        found: list[tuple[int, int, int, int]] = []
        for index, count in added.items():
            template = int(graph.groups[index].channels[keep[index][-1] if index in keep else -1])
            for view in columns[:, [index]].indices.tolist():
                start, stop = graph.class_start[view : view + 2]
                here = np.flatnonzero(graph.atom_channel[start:stop] == template)
                run = int(np.diff(np.flatnonzero(np.diff(here, prepend=-2, append=-2) != 1)).max())
                found.append((-run, view, template, count))
        found.sort(key=lambda growth: growth[0])
        return [(view, template, count) for _, view, template, count in found]

    def _grow(self, view: int, template: int, count: int) -> None:
        """Put copies of a channel behind every run of positions that it has in a class."""
        start, stop = self.graph.class_start[view : view + 2]
        channels, axis_class = self.graph.atom_channel[start:stop], int(self.graph.base[view])
        positions = self._changed.get(axis_class, np.arange(stop - start))
        fresh = self._fresh.get(axis_class, np.zeros(len(positions), dtype=np.int64))
        mine = np.flatnonzero(channels[positions] == template)
        # Neighbours are one run if they were so before; copies of another view begin anew.
        run_of = np.cumsum(np.diff(channels, prepend=channels[:1]) != 0)[positions[mine]]
        together = np.diff(mine) == 1
        together &= (np.diff(run_of) == 0) & (np.diff(positions[mine]) > 0)
        ends = np.flatnonzero(np.append(~together, True)) if len(mine) else mine
        order = np.arange(len(positions))
        pieces, flags, before, first = [], [], 0, 0
        for end in ends:
            run = mine[first : end + 1]
            pieces += [order[before : run[-1] + 1], np.tile(run, count)]
            flags += [fresh[before : run[-1] + 1], np.ones(len(run) * count, dtype=np.int64)]
            before, first = int(run[-1]) + 1, int(end) + 1
        taken = np.concatenate([*pieces, order[before:]])
        self._changed[axis_class] = positions[taken]
        self._fresh[axis_class] = np.concatenate([*flags, fresh[before:]])

    def ungrowable(self, groups: Collection[int]) -> set[int]:
        """Those of these groups whose added channels some operator would take for others.

        The positions of a product axis must be what its factors' elements make, in order, and those
        of a segment must lie side by side. Behind every run of a channel's positions its copies
        keep that, unless the channel spans several rounds of a product (4 groups that feed 6).
        """
        if not groups:
            return set()
        misread: set[int] = set()
        for dim, edges in self._grown_axes():
            if not self._fits(dim, edges):
                for vertex in (dim, *(edge.factor for edge in edges)):
                    misread |= self.graph.groups_on(vertex)
        return misread & set(groups)

    def _grown_axes(self) -> Iterable[tuple[int, Sequence[Edge]]]:
        """Axes with the factors that stand on them, per operator, where either grows."""
        shared: dict[tuple[int, int, int], list[Edge]] = defaultdict(list)
        for edge in self.graph.couplings.edges:
            if not edge.whole and edge.map.table is None:
                shared[edge.op_index, edge.port, edge.dim].append(edge)
        for (_, _, dim), edges in shared.items():
            vertices = (dim, *(edge.factor for edge in edges))
            if any(int(self.graph.vertex_class[vertex]) in self._fresh for vertex in vertices):
                yield dim, edges

    def _fits(self, dim: int, edges: Sequence[Edge]) -> bool:
        sizes = self.graph.couplings.sizes
        positions = self._elements(dim)
        if any(edge.map.outer * edge.map.inner > 1 for edge in edges):
            composed = np.zeros(1, dtype=np.int64)
            for edge in sorted(edges, key=lambda edge: -edge.map.inner):
                composed = np.add.outer(
                    composed, self._elements(edge.factor) * edge.map.inner
                ).ravel()
            complete = prod(int(sizes[edge.factor]) for edge in edges) == sizes[dim]
            return complete and np.array_equal(composed, positions)
        for edge in edges:
            first = edge.map.offset
            inside = np.flatnonzero((first <= positions) & (positions < first + sizes[edge.factor]))
            beside = not len(inside) or inside[-1] - inside[0] + 1 == len(inside)
            if not beside or not np.array_equal(
                positions[inside] - first, self._elements(edge.factor)
            ):
                return False
        return True

    def _elements(self, vertex: int) -> IntArray:
        kept = self.vertex(vertex)
        return np.arange(self.graph.couplings.sizes[vertex]) if kept is None else kept

    def fresh(self, value: str, axis: int) -> IntArray:
        """New positions of an axis that belong to added channels, ascending."""
        axis_class = int(self.graph.vertex_class[self.graph.dim(value, axis)])
        return np.flatnonzero(self._fresh.get(axis_class, ()))

    @cached_property
    def changes(self) -> Flags:
        """Which dims and factors do not stay whole, ``[vertices]``."""
        return np.isin(self.graph.vertex_class, list(self._changed))

    def vertex(self, vertex: int) -> IntArray | None:
        """Kept positions of a dim or elements of a factor; ``None``: all."""
        return self._changed.get(self._classes[vertex])

    def axis(self, value: str, axis: int) -> IntArray | None:
        """Kept positions of an axis of a value; ``None``: all."""
        first = self.graph.couplings.first_dim.get(value)
        return None if first is None else self.vertex(first + axis)

    def cuts(self, value: str) -> list[tuple[int, IntArray]]:
        """The axes of a value that do not stay whole, with the positions that stay."""
        first = self.graph.couplings.first_dim.get(value)
        if first is None:
            return []
        changed, classes = self._changed, self._classes
        return [
            (axis, changed[classes[first + axis]])
            for axis in range(len(self.graph.shapes[value]))
            if classes[first + axis] in changed
        ]

    def positions(self, arrays: Mapping[str, Array]) -> Arrays:
        """What values hold, by name, at the positions that stay; sequences stay as they are."""
        cuts = {name: self.cuts(name) for name in arrays}
        return {n: take(array, cuts[n]) if cuts[n] else array for n, array in arrays.items()}

    def shape(self, value: ir.Value) -> Shape:
        """The new static shape of a value."""
        sizes = static_shape(value)
        cuts = self.cuts(value.name or "")
        if not cuts:
            return sizes
        new = list(sizes)
        for axis, positions in cuts:
            new[axis] = len(positions)
        return tuple(new)
