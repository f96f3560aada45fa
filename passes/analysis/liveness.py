"""Which operators and values are eliminated, or become constant, when whole groups of channels go.

With the groups that keep no channel, every axis has a new size, and factor notation alone decides:

- a value with an axis of size 0 is *empty*, and a node all of whose results are empty is gone;
- where an operand is empty and the result is not, its empty factor is summed over: the result is
  *constant*, what the operator gives for zeros (a bias);
- or it is a segment of the result's axis (a concatenation): the operand goes, the others stay;
- or the operator averages, normalizes or competes over it, and a mean over nothing is *undefined*.

A node that computes with constants alone is constant too. What nobody reads any more goes. A
removal is refused where an output of the graph would be constant, undefined or empty.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from morphgraph.errors import PlanError
from morphgraph.graph import ChannelGraph, Edge, GraphOp, analysis
from morphgraph.onnx_io import escape

_REMEMBERED = 256  # results per graph; a removal path asks for the same sets again and again


@dataclass(frozen=True)
class Liveness:
    """What stays and what goes when some groups keep no channel.

    Attributes:
        graph: the network.
        dead: indices of the groups that keep no channel.
        empty: values with an axis of size 0.
        constant: values that depend on no graph input any more, weights and empty ones apart.
        live: places of the nodes that stay, in ``graph.ops``.
        bias_only: places of the nodes that sum over nothing: what they give for zeros is constant.
        folded: places of the nodes that compute with constants alone.
        dropped: per node the operands that go while it stays.
        refusal: why no network would be left; ``None``: this removal is possible.
    """

    graph: ChannelGraph
    dead: frozenset[int]
    empty: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    live: frozenset[int] = frozenset()
    bias_only: frozenset[int] = frozenset()
    folded: frozenset[int] = frozenset()
    dropped: dict[int, tuple[int, ...]] = field(default_factory=dict)
    refusal: str | None = None

    @cached_property
    def vanished_values(self) -> frozenset[str]:
        """Results and initializers that are no longer there (inputs and outputs stay)."""
        there: set[str] = set()
        for op_index in self.live:
            there.update(operand_names(self.graph.ops[op_index], self.dropped.get(op_index, ())))
            there.update(result_names(self.graph.ops[op_index]))
        there -= self.passed_through
        had_readers = {n for op in self.graph.ops for n in operand_names(op)}
        results = {name for op in self.graph.ops for name in result_names(op)}
        outputs = {value.name for value in self.graph.model.graph.outputs}
        unread = results | (had_readers - {v.name for v in self.graph.model.graph.inputs})
        return frozenset(unread - (there - self.constant - self.empty) - outputs)

    @cached_property
    def passed_through(self) -> frozenset[str]:
        """Results that equal an operand, now that one part is left: of a concatenation, a split."""
        return frozenset(
            name
            for op_index in self.live
            for name in result_names(self.graph.ops[op_index])
            if name not in self.empty and self.passes(op_index)
        )

    def passes(self, op_index: int) -> bool:
        """Whether a node has one segment left, so that it does nothing."""
        op = self.graph.ops[op_index]
        results = result_names(op)
        left = [name for name in results if name not in self.empty]
        if len(left) < len(results):
            return len(left) == 1 and _all_segments(self.graph, op_index, results=True)
        gone = self.dropped.get(op_index, ())
        return bool(gone) and len(operand_names(op, gone)) == 1

    @cached_property
    def removed_layers(self) -> tuple[str, ...]:
        """Names of the layers all of whose nodes are gone, in the model's order."""
        layers: dict[str, bool] = {}
        for op_index, op in enumerate(self.graph.ops):
            layers[op.layer] = layers.get(op.layer, True) and op_index not in self.live
        return tuple(layer for layer, gone in layers.items() if gone)

    @cached_property
    def orphaned_groups(self) -> frozenset[int]:
        """Other groups that stand on nothing that is left: constant there, or unread."""
        graph = self.graph
        used = np.zeros(len(graph.fixed_size), dtype=bool)
        gone = self.vanished_values | self.constant | self.empty
        for name, first in graph.couplings.first_dim.items():
            if name not in gone:
                used[graph.vertex_class[first : first + len(graph.shapes[name])]] = True
        needed = (used.astype(np.float64) @ graph.per_channel) > 0
        return frozenset(
            group.index
            for group in graph.groups
            if group.index not in self.dead and group.can_change and not needed[group.index]
        )


def operand_names(op: GraphOp, without: Sequence[int] = ()) -> list[str]:
    """Names of what a node reads: its operands, those of some ports left out, and captures."""
    inputs = enumerate(op.ir.inputs)
    read = [v.name or "" for port, v in inputs if v is not None and port not in without]
    return [*read, *op.captured]


def result_names(op: GraphOp) -> list[str]:
    """Names of what a node makes."""
    return [value.name for value in op.ir.outputs if value.name]


def liveness(graph: ChannelGraph, dead: Iterable[int]) -> Liveness:
    """What becomes of every node and value when these groups keep no channel.

    Args:
        graph: the lifted network.
        dead: indices of groups.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> inside = next(group for group in graph.groups if len(group.producers) == 1)
    >>> liveness(graph, [inside.index]).refusal is None
    True
    """
    key = frozenset(dead)
    known = _remembered(graph)
    if key not in known:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[key] = _Walk(graph, key).run()
    return known[key]


@analysis
def _remembered(_graph: ChannelGraph) -> dict[frozenset[int], Liveness]:
    return {}


def with_orphans(
    graph: ChannelGraph, dead: Iterable[int], allowed: Iterable[int]
) -> frozenset[int]:
    """Dead groups, and those of ``allowed`` that become useless with them."""
    removed, may = frozenset(dead), frozenset(allowed)
    while True:
        more = liveness(graph, removed).orphaned_groups & may
        grown = removed | more
        if not more or liveness(graph, grown).refusal is not None:
            return removed
        removed = grown


def is_viable(graph: ChannelGraph, dead: Iterable[int]) -> bool:
    """Whether a network is left when these groups keep no channel."""
    return liveness(graph, dead).refusal is None


def require_viable(graph: ChannelGraph, dead: Sequence[int]) -> None:
    """Do nothing if a network is left when these groups keep no channel.

    Raises:
        PlanError: names the group, and what would go with it.
    """
    refusal = liveness(graph, dead).refusal
    if refusal is None:
        return
    alone = [index for index in dead if not is_viable(graph, [index])]
    culprits = [graph.groups[index] for index in (alone or dead)[:3]]
    names = ", ".join(f"{group.id} '{escape(group.name)}'" for group in culprits)
    raise PlanError(f"width 0 of {names}: {escape(refusal)}; keep at least one channel")


class _Walk:
    """One pass over the nodes in topological order, and one back from the outputs."""

    def __init__(self, graph: ChannelGraph, dead: frozenset[int]) -> None:
        self.graph = graph
        self.dead = dead
        self.weights = graph.couplings.input_independent
        widths = graph.widths.copy()
        widths[list(dead)] = 0
        before, after = graph.class_sizes(graph.widths), graph.class_sizes(widths)
        self.empty_class = (after == 0) & (before > 0)
        self.empty = frozenset(
            graph.couplings.dims[op_index].value
            for op_index in np.flatnonzero(
                self.empty_class[graph.vertex_class[: len(graph.couplings.dims)]]
            ).tolist()
        )
        self.constant: set[str] = set()
        self.undefined: dict[str, str] = {}
        self.bias_only: set[int] = set()
        self.folded: set[int] = set()
        self.dropped: dict[int, tuple[int, ...]] = {}

    def run(self) -> Liveness:
        for op_index, op in enumerate(self.graph.ops):
            self._decide(op_index, op)
        return Liveness(
            self.graph,
            self.dead,
            self.empty,
            frozenset(self.constant),
            self._live(),
            frozenset(self.bias_only),
            frozenset(self.folded),
            self.dropped,
            self._refusal(),
        )

    def _decide(self, op_index: int, op: GraphOp) -> None:
        results = [name for name in result_names(op) if name not in self.empty]
        if not results:
            return
        operands = operand_names(op)
        lost = next((self.undefined[name] for name in operands if name in self.undefined), None)
        if lost is None and any(name in self.empty for name in operands):
            lost = self._without_operands(op_index, op)
        if lost is not None:
            self.undefined.update(dict.fromkeys(results, lost))
        elif op_index in self.bias_only or self._is_folded(op_index, op, results):
            self.constant.update(results)

    def _is_folded(self, op_index: int, op: GraphOp, results: Sequence[str]) -> bool:
        """Whether a node that depended on an input computes with constants alone."""
        weights = self.weights
        if op.opaque is not None or weights.issuperset(results):
            return False
        left = operand_names(op, self.dropped.get(op_index, ()))
        depended = any(name not in weights for name in operand_names(op))
        if depended and all(name in weights or name in self.constant for name in left):
            self.folded.add(op_index)
            return True
        return False

    def _without_operands(self, op_index: int, op: GraphOp) -> str | None:
        """Settle a node with empty operands and a result that is not; why that cannot be."""
        ports = tuple(
            port
            for port, value in enumerate(op.ir.inputs)
            if value is not None and value.name in self.empty
        )
        where = f"{op.ir.op_type} '{op.name}'"
        summed = True
        for edge in self.graph.edges_of(op_index):
            if edge.port not in ports or not self.empty_class[self.graph.vertex_class[edge.dim]]:
                continue
            name = self.graph.couplings.factor(edge.factor).name
            if name in op.statistical:
                return f"{where} averages, normalizes or competes over its channels"
            summed &= name in op.contracted
        if not summed and _all_segments(self.graph, op_index, results=False):
            self.dropped[op_index] = ports
            return None
        others = [name for name in operand_names(op, ports) if name not in self.weights]
        if others:
            return f"{where} reads '{others[0]}' beside what it would have nothing of"
        self.bias_only.add(op_index)
        return None

    def _live(self) -> frozenset[int]:
        """Nodes that an output of the graph depends on."""
        makers = self.graph.makers
        live: set[int] = set()
        pending = [value.name or "" for value in self.graph.model.graph.outputs]
        while pending:
            name = pending.pop()
            op_index = makers.get(name)
            if op_index is None or op_index in live or name in self.empty or name in self.constant:
                continue
            live.add(op_index)
            op = self.graph.ops[op_index]
            pending += operand_names(op, self.dropped.get(op_index, ()))
        return frozenset(live)

    def _refusal(self) -> str | None:
        for value in self.graph.model.graph.outputs:
            name = value.name or ""
            if name in self.undefined:
                return f"output '{name}' needs them: {self.undefined[name]}"
            if name in self.empty:
                return f"output '{name}' would have no channel"
            if name in self.constant and name not in self.weights:
                return f"output '{name}' would no longer depend on any input"
        return None


def _all_segments(graph: ChannelGraph, op_index: int, *, results: bool) -> bool:
    """Whether all operands (results) are segments of one axis of the one result (operand).

    So it is for a concatenation (a split): without one of them it is the same operator.
    """
    of_factor: dict[int, set[int]] = defaultdict(set)  # the parts that each factor stands on
    on_axis: dict[int, list[Edge]] = defaultdict(list)  # per axis of the whole
    for edge in graph.edges_of(op_index):
        if (edge.port < 0) == results:
            of_factor[edge.factor].add(edge.port)
        else:
            on_axis[edge.dim].append(edge)
    parts = frozenset().union(*of_factor.values())
    return any(
        len(edges) == len(parts) > 1
        and all(edge.map.outer == edge.map.inner == 1 for edge in edges)
        and sorted(map(sorted, (of_factor[edge.factor] for edge in edges)))
        == [[part] for part in sorted(parts)]
        for edges in on_axis.values()
    )
