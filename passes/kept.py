"""Which positions of every axis stay under a plan: for ``resize`` and ``mask``."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from morphgraph.graph import ChannelGraph, IntArray
from morphgraph.notation import Shape
from morphgraph.onnx_io import static_shape


class Kept:
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
        self._changed = {
            int(kind): np.flatnonzero(
                atom_alive[graph.class_start[kind] : graph.class_start[kind + 1]]
            )
            for kind in np.unique(owners)
        }
        self._fresh: dict[int, IntArray] = {}
        for index, count in (added or {}).items():
            group = graph.groups[index]
            template = group.channels[keep[index][-1] if index in keep else -1]
            column = graph.per_channel.tocsc()[:, [index]].indices
            for kind in column:
                self._grow(int(kind), int(template), count)

    def _grow(self, kind: int, template: int, count: int) -> None:
        """Put copies of a channel behind every run of positions that it has in a class."""
        start, stop = self.graph.class_start[kind : kind + 2]
        positions = self._changed.get(kind, np.arange(stop - start))
        fresh = self._fresh.get(kind, np.zeros(len(positions), dtype=np.int64))
        mine = np.flatnonzero((self.graph.atom_channel[start:stop] == template)[positions])
        ends = np.flatnonzero(np.diff(positions[mine], append=-2) != 1)
        order = np.arange(len(positions))
        marks = np.zeros(len(positions), dtype=np.int64)
        pieces, flags, before, first = [], [], 0, 0
        for end in ends:
            run = mine[first : end + 1]
            pieces += [order[before : run[-1] + 1], np.tile(run, count)]
            flags += [marks[before : run[-1] + 1], np.ones(len(run) * count, dtype=np.int64)]
            before, first = int(run[-1]) + 1, int(end) + 1
        taken = np.concatenate([*pieces, order[before:]])
        is_new = np.concatenate([*flags, marks[before:]])
        self._changed[kind] = positions[taken]
        self._fresh[kind] = np.maximum(fresh[taken], is_new)

    def fresh(self, value: str, axis: int) -> IntArray:
        """New positions of an axis that belong to added channels, ascending."""
        kind = int(self.graph.node_class[self.graph.dim(value, axis)])
        return np.flatnonzero(self._fresh.get(kind, ()))

    def node(self, node: int) -> IntArray | None:
        """Kept positions of a dim or elements of a factor; ``None``: all."""
        return self._changed.get(int(self.graph.node_class[node]))

    def axis(self, value: str, axis: int) -> IntArray | None:
        """Kept positions of an axis of a value; ``None``: all."""
        first = self.graph.couplings.first_dim.get(value)
        return None if first is None else self.node(first + axis)

    def shape(self, value: ir.Value) -> Shape:
        """The new static shape of a value."""
        return tuple(
            size if (kept := self.axis(value.name or "", axis)) is None else len(kept)
            for axis, size in enumerate(static_shape(value))
        )
