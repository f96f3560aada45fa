"""The sizes that configs of language models name, read from a network before and after a resize.

What inputs, outputs and attributes of nodes state is taken from there: caches, logits, the table of
tokens, numbers of heads. Other entries are told by their value: the groups of that width, and what
a plan makes of them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape, is_float
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.join_files import layouts
from morphgraph.passes.planning.grids import tensor_channels
from morphgraph.passes.planning.same import repeated

HEADS, KV_HEADS, HEAD_SIZE = "query heads", "key/value heads", "head size"
HIDDEN, INNER, EXPERTS = "hidden width", "inner width", "experts"
LAYERS, VOCABULARY = "layers", "vocabulary"

_CACHE = re.compile(r"((?:past|present)[^0-9]*)([0-9]+)(.*(?:key|value).*)", re.IGNORECASE)
_QUERY_ATTRIBUTES = ("num_heads", "q_num_heads")
_KV_ATTRIBUTES = ("kv_num_heads",)
_SIDES = ("encoder", "decoder")
_SHOWN = 6  # inputs in a message


def _static(value: ir.Value, axis: int) -> list[int]:
    """The size of an axis, if it is a number."""
    shape = value.shape
    size = shape[axis] if shape is not None and len(shape) > abs(axis + 0.5) else None
    return [size] if isinstance(size, int) else []


class Caches:
    """The cache inputs of a decoder, by layer.

    Attributes:
        layers: the numbers in their names, in order.
    """

    def __init__(self, model: ir.Model, patterns: Sequence[str] = ()) -> None:
        self._values: dict[int, list[ir.Value]] = {}
        for value in model.graph.inputs:
            parts = cache_parts(value.name or "", patterns)
            if parts is not None and is_float(value):
                self._values.setdefault(parts[1], []).append(value)
        self.layers = sorted(self._values)
        for value in (value for values in self._values.values() for value in values):
            if value.shape is None or len(value.shape) != 4:
                axes = "unknown axes" if value.shape is None else f"{len(value.shape)} axes"
                raise ModelError(
                    f"input '{escape(value.name or '')}': is a cache with {axes}; known is "
                    "[batch, heads, past, head size]; resize the ONNX file outside of its folder, "
                    "and write the config by hand"
                )

    def sizes(self, axis: int) -> dict[int, list[int]]:
        """By layer the sizes of an axis."""
        return {
            layer: sorted({size for value in values for size in _static(value, axis)})
            for layer, values in self._values.items()
        }


def require_named(model: ir.Model, patterns: Sequence[str], config: str) -> None:
    """Refuse a config that names cache inputs which the model does not have.

    Raises:
        ModelError: no input has a name of one of its patterns.
    """
    named = [value.name or "" for value in model.graph.inputs]
    for pattern in patterns:
        if not any(cache_parts(name, [pattern]) for name in named):
            names = ", ".join(f"'{escape(name)}'" for name in named[:_SHOWN])
            raise ModelError(
                f"{config}: names the cache inputs '{escape(pattern)}', and the model has none of "
                f"that name ({names}); correct the config, or resize the ONNX file elsewhere"
            )


def cache_parts(name: str, patterns: Sequence[str]) -> tuple[str, int, str] | None:
    """What stands before the number of a layer in the name of its cache, the number, the rest."""
    for pattern in patterns:
        before, _, after = pattern.partition("%d")
        number = name[len(before) : len(name) - len(after)]
        if name == f"{before}{number}{after}" and number.isdecimal():
            return before, int(number), after
    match = None if patterns else _CACHE.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def stated_sizes(model: ir.Model, caches: Caches) -> dict[str, list[int]]:
    """By what it is the sizes that a model states, one per layer where layers have their own."""
    attributes: dict[str, list[int]] = {HEADS: [], KV_HEADS: []}
    for node in model.graph:
        for kind, names in ((HEADS, _QUERY_ATTRIBUTES), (KV_HEADS, _KV_ATTRIBUTES)):
            number = next((node.attributes[n].as_int() for n in names if n in node.attributes), 0)
            attributes[kind] += [number] if number else []
    cached = {
        kind: [size for sizes in caches.sizes(axis).values() for size in sizes]
        for kind, axis in ((KV_HEADS, 1), (HEAD_SIZE, 3))
    }
    return {
        HEADS: attributes[HEADS],
        KV_HEADS: cached[KV_HEADS] or attributes[KV_HEADS],
        HEAD_SIZE: cached[HEAD_SIZE],
        LAYERS: [len(caches.layers)] if caches.layers else [],
        VOCABULARY: _vocabulary(model, bool(caches.layers)),
        HIDDEN: [
            size
            for _, embedded in _tables(model)
            if is_float(embedded)
            for size in _static(embedded, -1)
        ][:1],
    }


def _vocabulary(model: ir.Model, decodes: bool) -> list[int]:
    """The number of tokens: those of logits, or rows of the table where logits are of classes."""
    logits = [
        size
        for value in model.graph.outputs
        if value.name == "logits" and is_float(value)
        for size in _static(value, -1)
    ]
    rows = [size for table, _ in _tables(model) for size in _static(table, 0)]
    return logits if decodes or not rows or set(logits) & set(rows) else rows[:1]


def _tables(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The tables whose rows token ids number, each with what is read of it."""
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if any(value.name == "input_ids" for value in operands):
            for table in [value for value in operands if value.is_initializer()][:1]:
                yield table, node.outputs[0]


class SizeChanges:
    """What a plan makes of the sizes that configs name.

    Attributes:
        is_joined: whether the network is several files; then entries may be about one of them.

    Args:
        graph: the network before.
        keep: per index of a group that changes the positions that stay.
        small: the resized network.
        patterns: of cache inputs, as GenAI's config names them.
        config: the file that names them, for errors.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        small: ir.Model,
        patterns: Sequence[str] = (),
        config: str = "",
    ) -> None:
        self._graph = graph
        self._keep = keep
        self._units = tensor_channels(graph)
        require_named(graph.model, patterns, config)
        before, after = Caches(graph.model, patterns), Caches(small, patterns)
        self.is_joined = layouts(graph.model) is not None
        self.layers, self.layers_left = before.layers, after.layers
        self.before = stated_sizes(graph.model, before)
        self._after = stated_sizes(small, after)

    def after(self, kind: str, size: int, entry: str = "") -> list[int]:
        """All sizes that layers have now which had this one; empty: nothing has this size.

        Args:
            kind: what the size is of.
            size: what a config says.
            entry: the config's entry; its words tell experts' layers from others.
        """
        if self.before.get(kind):
            return sorted(set(self._after[kind]))
        if kind == LAYERS:
            gone = self.blocks_gone(size)
            return [size - max(gone)] if gone else []
        if kind in (HEADS, KV_HEADS, HEAD_SIZE):
            return self._of_heads(kind, size, entry)
        if kind in (HIDDEN, INNER, EXPERTS):
            return self._of_groups(kind, size, entry)
        return []

    def blocks_gone(self, count: int) -> set[int]:
        """How many of so many repeated blocks have lost what corresponds in each.

        One number where whole blocks are gone; several where only a part of them is, as an
        attention without its MLP.
        """
        alike = [groups for groups in repeated(self._graph) if len(groups) == count]
        return {sum(not len(self._keep.get(g.index, [0])) for g in groups) for groups in alike}

    def hidden_groups(self, size: int) -> list[str]:
        """Ids of the groups that are the hidden width, if that is this one."""
        groups = [group for group in self._wide(size) if group.resizable]
        return [group.id for group in groups if group.statistical] or [g.id for g in groups]

    def _wide(self, size: int) -> list[Group]:
        """The groups of this width."""
        return [g for g in self._graph.groups if g.width == size and self._units[g.index] == 1]

    @cached_property
    def _tokens(self) -> frozenset[int]:
        """Indices of the groups of what goes in and comes out: tokens and their logits."""
        model, graph = self._graph.model, self._graph
        shapes = [(value.name or "", len(value.shape or ())) for value in model.graph.outputs]
        known = graph.couplings.first_dim
        axes = [(name, axis) for name, rank in shapes if name in known for axis in range(rank)]
        axes += [(table.name or "", 0) for table, _ in _tables(model)]
        return frozenset(
            index for name, axis in axes for index in graph.groups_on(graph.dim(name, axis))
        )

    def _of_groups(self, kind: str, size: int, entry: str) -> list[int]:
        groups = self._wide(size)
        wanted = [group for group in groups if group.statistical == (kind != INNER)] or groups
        if kind == INNER:  # a vocabulary may have as many
            wanted = [group for group in wanted if group.index not in self._tokens] or wanted
        words = [word for word in ("expert", "shared") if word in entry.replace("moe", "expert")]
        for word in words:
            named = [g for g in wanted if any(word in name for name in (g.name, *g.producers))]
            wanted = named or wanted
        if self.is_joined:
            wanted = [g for g in wanted if self._is_meant(entry, (m.value for m in g.members))]
        # What is gone has no size.
        return sorted({len(self._keep.get(g.index, range(g.width))) for g in wanted} - {0})

    def _is_meant(self, entry: str, values: Iterable[str]) -> bool:
        """Whether values stand in a file whose side, if an entry names one, is that side."""
        side = next((word for word in _SIDES if entry.startswith(word)), "")
        return not side or any(side in name.partition("/")[0] for name in values if "/" in name)

    def _of_heads(self, kind: str, size: int, entry: str) -> list[int]:
        graph, found = self._graph, set[int]()
        sizes = np.asarray(graph.couplings.sizes)
        for vertex in np.flatnonzero(sizes == size).tolist():
            there = [index for index in graph.groups_on(vertex) if self._units[index] > 1]
            if any(
                self._is_of_elements(index) == (kind == HEAD_SIZE)
                and self._is_meant(entry, (m.value for m in graph.groups[index].members))
                for index in there
            ):
                kept = self._selection.vertex(vertex)
                found.add(size if kept is None else len(kept))
        return sorted(found - {0})

    def _is_of_elements(self, index: int) -> bool:
        """Whether a channel is an element of all heads, not all elements of a head.

        There may be as many heads as a head has elements. A head's stand side by side.
        """
        graph = self._graph
        channel = graph.groups[index].channels[0]
        for view in graph.per_channel[:, [index]].tocoo().coords[0].tolist():
            start, stop = graph.class_start[view : view + 2]
            places = np.flatnonzero(graph.atom_channel[start:stop] == channel)
            if len(places) > 1:
                return bool((np.diff(places) > 1).all())
        return False

    @cached_property
    def _selection(self) -> AxisSelection:
        return AxisSelection(self._graph, self._keep)
