"""Groups that die one after the other: what changes in the network with each death.

A search over widths lets groups go step by step, and a death is felt near by: in the operators
that read the group's channels, and in those behind them up to the next sum with something that is
still there. So the state of the network is carried along, and a death costs what it touches,
whatever the size of the network.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph, Edge, GraphOp, analysis
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.past import pasts


def operand_names(op: GraphOp, without: Sequence[int] = ()) -> list[str]:
    """Names of what a node reads: its operands, those of some ports left out, and captures."""
    inputs = enumerate(op.ir.inputs)
    read = [v.name or "" for port, v in inputs if v is not None and port not in without]
    return [*read, *op.captured]


def result_names(op: GraphOp) -> list[str]:
    """Names of what a node makes."""
    return [value.name for value in op.ir.outputs if value.name]


@dataclass(frozen=True)
class _Structure:
    """What does not change: who reads what, and which values stand on which class."""

    graph: ChannelGraph
    readers: Mapping[str, Sequence[int]]
    outputs: frozenset[str]
    counted: frozenset[str]  # values that vanish once nobody reads them
    dims: IntArray  # dims of the first class, of the second, ...
    first: IntArray  # place of every class among them

    def values_on(self, axis_class: int) -> Iterator[str]:
        """The values with an axis of a class."""
        base = self.graph.base[axis_class]
        for dim in self.dims[self.first[base] : self.first[base + 1]].tolist():
            yield self.graph.couplings.dims[dim].value

    def classes_of(self, value: str) -> list[int]:
        """The classes of a value's axes; none for one without dims."""
        first = self.graph.couplings.first_dim.get(value)
        if first is None:
            return []
        found: list[int] = self.graph.vertex_class[
            first : first + len(self.graph.shapes[value])
        ].tolist()
        return found


@analysis
def _structure(graph: ChannelGraph) -> _Structure:
    readers: dict[str, list[int]] = defaultdict(list)
    results: set[str] = set()
    for op_index, op in enumerate(graph.ops):
        for name in dict.fromkeys(operand_names(op)):
            readers[name].append(op_index)
        results.update(result_names(op))
    outputs = frozenset(value.name or "" for value in graph.model.graph.outputs)
    inputs = {value.name or "" for value in graph.model.graph.inputs}
    classes = graph.vertex_class[: len(graph.couplings.dims)]
    counts = np.bincount(classes, minlength=len(graph.fixed_size))
    return _Structure(
        graph,
        dict(readers),
        outputs,
        frozenset(results | (readers.keys() - inputs)) - outputs,
        np.argsort(classes, kind="stable"),
        np.append(0, np.cumsum(counts)),
    )


@dataclass
class Deaths:
    """The network after the death of some groups; the names are those of ``Liveness``."""

    graph: ChannelGraph
    dead: frozenset[int] = frozenset()
    empty: set[str] = field(default_factory=set)
    constant: set[str] = field(default_factory=set)
    zero: set[str] = field(default_factory=set)
    undefined: dict[str, str] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    bias_only: set[int] = field(default_factory=set)
    folded: set[int] = field(default_factory=set)
    dropped: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vanished: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    orphaned: set[int] = field(default_factory=set)
    # Of every class how many of its groups live, and on how many axes of what is left it stands; of
    # every group on how many classes that are in use.
    _alive: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _in_use: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _needed: FloatArray = field(default_factory=lambda: np.zeros(0))
    _gone: set[str] = field(default_factory=set)
    # Places of nodes with nothing to sum over, and nothing that they add to it.
    _nothing: set[int] = field(default_factory=set)

    @classmethod
    def none(cls, graph: ChannelGraph) -> "Deaths":
        """The network as it is."""
        state = cls(graph)
        state._alive = np.diff(graph.per_channel.indptr).astype(np.int64)
        state._begin()
        return state

    def after(self, groups: Iterable[int]) -> "Deaths":
        """The network after the death of more groups; this one stays what it is."""
        more = frozenset(groups) - self.dead
        copy = Deaths(
            self.graph,
            self.dead | more,
            set(self.empty),
            set(self.constant),
            set(self.zero),
            dict(self.undefined),
            set(self.live),
            set(self.bias_only),
            set(self.folded),
            dict(self.dropped),
            set(self.vanished),
            set(self.passed),
            set(self.orphaned),
            self._alive.copy(),
            self._in_use.copy(),
            self._needed.copy(),
            set(self._gone),
            set(self._nothing),
        )
        copy._die(sorted(more))
        return copy

    # -- the beginning -------------------------------------------------------------------------

    def _begin(self) -> None:
        graph, structure = self.graph, _structure(self.graph)
        pending = sorted(structure.outputs)
        while pending:
            op_index = graph.makers.get(pending.pop())
            if op_index is not None and op_index not in self.live:
                self.live.add(op_index)
                pending += operand_names(graph.ops[op_index])
        there = set(structure.outputs)
        for op_index in self.live:
            there.update(operand_names(graph.ops[op_index]))
            there.update(result_names(graph.ops[op_index]))
        self.vanished = set(structure.counted - there)
        self._gone = set(self.vanished)
        there_dims = np.ones(len(graph.couplings.dims), dtype=bool)
        for name in self.vanished & graph.couplings.first_dim.keys():
            first = graph.couplings.first_dim[name]
            there_dims[first : first + len(graph.shapes[name])] = False
        classes = graph.vertex_class[: len(there_dims)][there_dims]
        in_use = np.bincount(classes, minlength=len(graph.fixed_size))
        self._in_use = in_use = in_use[graph.base]
        self._needed = graph.per_group.astype(bool).astype(np.float64) @ (in_use > 0)
        self.orphaned = {g.index for g in graph.groups if self._is_orphan(g.index)}

    def _is_orphan(self, index: int) -> bool:
        can_change = self.graph.groups[index].can_change
        return can_change and not self._needed[index] and index not in self.dead

    # -- a death -------------------------------------------------------------------------------

    def _die(self, groups: Sequence[int]) -> None:
        emptied = self._empty(groups)
        self.orphaned -= self.dead
        decided, changed = self._decide_all(emptied)
        left = self._leave(decided, changed | set(emptied))
        touched = set(emptied) | changed
        for op_index in (*decided, *left):
            touched.update(operand_names(self.graph.ops[op_index]))
            touched.update(result_names(self.graph.ops[op_index]))
        self._note(touched)

    def _empty(self, groups: Sequence[int]) -> list[str]:
        """Values that now have an axis of size 0."""
        graph, structure = self.graph, _structure(self.graph)
        found: dict[str, None] = {}
        matrix = graph.per_group
        for index in groups:
            for axis_class in matrix.indices[matrix.indptr[index] : matrix.indptr[index + 1]]:
                self._alive[axis_class] -= 1
                if not self._alive[axis_class] and graph.fixed_size[axis_class] == 0:
                    found.update(dict.fromkeys(structure.values_on(int(axis_class))))
        emptied = [name for name in found if name not in self.empty]
        self.empty.update(emptied)
        self.constant.difference_update(emptied)
        return emptied

    def _decide_all(self, emptied: Sequence[str]) -> tuple[list[int], set[str]]:
        """Decide anew about all nodes that feel it; those nodes, and results that have changed."""
        graph, structure = self.graph, _structure(self.graph)
        pending: set[int] = set()
        for name in emptied:
            pending.update(structure.readers.get(name, ()))
            if name in graph.makers:
                pending.add(graph.makers[name])
        found = pasts(graph)
        if not found.values.keys().isdisjoint(emptied):
            # Who asks how long a cache is that is gone may have asked one that goes now.
            for name, askers in found.askers.items():
                pending.update(askers if name in self.empty else ())
        queue, decided, changed = sorted(pending), list[int](), set[str]()
        while queue:
            op_index = heapq.heappop(queue)
            decided.append(op_index)
            op = graph.ops[op_index]
            before = [self._status(name) for name in result_names(op)]
            self._decide(op_index, op)
            for name, status in zip(result_names(op), before, strict=True):
                if self._status(name) != status:
                    changed.add(name)
                    for reader in structure.readers.get(name, ()):
                        if reader not in pending:
                            pending.add(reader)
                            heapq.heappush(queue, reader)
        return decided, changed

    def _status(self, name: str) -> tuple[bool, bool, str | None]:
        return name in self.constant, name in self.zero, self.undefined.get(name)

    def _decide(self, op_index: int, op: GraphOp) -> None:
        made = result_names(op)
        self.bias_only.discard(op_index)
        self.folded.discard(op_index)
        self._nothing.discard(op_index)
        self.dropped.pop(op_index, None)
        self.constant.difference_update(made)
        self.zero.difference_update(made)
        for name in made:
            self.undefined.pop(name, None)
        results = [name for name in made if name not in self.empty]
        if not results:
            return
        operands = operand_names(op)
        lost = None
        # Of what is multiplied by zeros it does not matter what it would be.
        by_zero = facts_of(op.ir).multiplies and not self.zero.isdisjoint(operands)
        if self._reads_nothing(op_index, op):
            self._nothing.add(op_index)
            by_zero = True
        if not by_zero:
            lost = next((self.undefined[name] for name in operands if name in self.undefined), None)
        if not by_zero and lost is None and any(name in self.empty for name in operands):
            found = pasts(self.graph)
            if op_index in found.askers.get(operands[0], ()):
                if found.stand_in(operands[0], self.empty) is not None:
                    return
                lost = f"{op.ir.op_type} '{op.name}' reads how long the cache '{operands[0]}' is"
            else:
                lost = self._without_operands(op_index, op)
        if lost is not None:
            self.undefined.update(dict.fromkeys(results, lost))
            return
        if self._is_zero(op_index, op, results):
            self.zero.update(results)
            self.folded.add(op_index)
            self.constant.update(results)
        elif op_index in self.bias_only or self._is_folded(op_index, op, results):
            self.constant.update(results)

    def _is_zero(self, op_index: int, op: GraphOp, results: Sequence[str]) -> bool:
        """Whether a node gives zeros: it has nothing to sum over, multiplies by zeros, moves them.

        That is so whatever its other operands are, if these are numbers.
        """
        facts, weights = facts_of(op.ir), self.graph.couplings.input_independent
        if op.opaque is not None or weights.issuperset(results):
            return False
        if op_index in self._nothing:
            return True
        operands = operand_names(op)
        if facts.multiplies:
            return not self.zero.isdisjoint(operands)
        if facts.adds:
            return self.zero.issuperset(operands)
        moves = facts.moves or facts.inert or facts.converts
        return bool(moves) and self.zero.issuperset(n for n in operands if n not in weights)

    def _is_folded(self, op_index: int, op: GraphOp, results: Sequence[str]) -> bool:
        """Whether a node that depended on an input computes with constants and sizes alone."""
        weights, sizes = self.graph.couplings.input_independent, pasts(self.graph).sizes
        if op.opaque is not None or weights.issuperset(results):
            return False
        left = operand_names(op, self.dropped.get(op_index, ()))
        depended = any(name not in weights for name in operand_names(op))
        known = all(name in weights or name in self.constant or name in sizes for name in left)
        # What follows from sizes, and no constant, is no constant of the network: they may be open.
        asks = not weights.issuperset(left) and self.constant.isdisjoint(left)
        if depended and known and not asks:
            self.folded.add(op_index)
            return True
        return False

    def _without_operands(self, op_index: int, op: GraphOp) -> str | None:
        """Settle a node with empty operands and a result that is not; why that cannot be."""
        graph = self.graph
        ports = tuple(
            port
            for port, value in enumerate(op.ir.inputs)
            if value is not None and value.name in self.empty
        )
        where = f"{op.ir.op_type} '{op.name}'"
        empty = [
            graph.couplings.factor(edge.factor).name
            for edge in graph.edges_of(op_index)
            if edge.port in ports and self._is_empty(int(graph.vertex_class[edge.dim]))
        ]
        weights = graph.couplings.input_independent
        others = [name for name in operand_names(op, ports) if name not in weights]
        behind = facts_of(op.ir).added_behind
        read = {port for port, value in enumerate(op.ir.inputs) if value is not None}.difference(
            ports
        )
        # Of one that reads a weight alone constants may be absorbed in what it gives.
        alone = not others and not weights.isdisjoint(operand_names(op))
        sums = not op.contracted.isdisjoint(empty)
        if sums and behind is not None and read.isdisjoint(behind) and not alone:
            self._nothing.add(op_index)
            return None
        if not op.statistical.isdisjoint(empty):
            return f"{where} averages, normalizes or competes over its channels"
        if not op.contracted.issuperset(empty) and all_segments(graph, op_index, results=False):
            self.dropped[op_index] = ports
            return None
        if others:
            return f"{where} reads '{others[0]}' beside what it would have nothing of"
        self.bias_only.add(op_index)
        return None

    def _reads_nothing(self, op_index: int, op: GraphOp) -> bool:
        """Whether a node reads rows by number where none is left: what it gives counts as zeros."""
        couplings = self.graph.couplings
        first = op.ir.inputs[0] if op.ir.inputs else None
        if (
            first is None
            or first.name not in self.empty
            or couplings.indexed.isdisjoint(op.factors.values())
        ):
            return False
        empty = {
            edge.factor
            for edge in self.graph.edges_of(op_index)
            if edge.port == 0 and self._is_empty(int(self.graph.vertex_class[edge.dim]))
        }
        return bool(empty) and empty <= couplings.indexed

    def _is_empty(self, axis_class: int) -> bool:
        indptr, fixed = self.graph.per_channel.indptr, self.graph.fixed_size
        return any(
            indptr[view] < indptr[view + 1] and not self._alive[view] and fixed[view] == 0
            for view in self.graph.views(axis_class)
        )

    # -- who is left ---------------------------------------------------------------------------

    def _leave(self, decided: Iterable[int], changed: Iterable[str]) -> list[int]:
        """Let the nodes go that no output depends on any more; those that went."""
        graph = self.graph
        wanted = {graph.makers[name] for name in changed if name in graph.makers}
        for op_index in decided:
            wanted |= self._makers_of(op_index)
        queue, seen, left = [-op_index for op_index in wanted], set(wanted), list[int]()
        heapq.heapify(queue)
        while queue:
            op_index = -heapq.heappop(queue)  # readers come first
            if op_index not in self.live or self._is_wanted(op_index):
                continue
            self.live.discard(op_index)
            left.append(op_index)
            for maker in self._makers_of(op_index) - seen:
                seen.add(maker)
                heapq.heappush(queue, -maker)
        return left

    def _makers_of(self, op_index: int) -> set[int]:
        makers = self.graph.makers
        return {makers[name] for name in operand_names(self.graph.ops[op_index]) if name in makers}

    def _is_wanted(self, op_index: int) -> bool:
        """Whether an output or a node that stays reads what a node makes."""
        structure = _structure(self.graph)
        return any(
            name in structure.outputs or self._is_read(name)
            for name in result_names(self.graph.ops[op_index])
            if name not in self.empty and name not in self.constant
        )

    def _is_read(self, name: str) -> bool:
        return any(
            reader in self.live
            and (
                reader not in self.dropped
                or name in operand_names(self.graph.ops[reader], self.dropped[reader])
            )
            for reader in _structure(self.graph).readers.get(name, ())
        )

    def _note(self, touched: Iterable[str]) -> None:
        """Keep account of which of these values are still there, and of groups that stand on none.

        A result that equals an operand, now that one part is left, is *passed* through.
        """
        graph, structure = self.graph, _structure(self.graph)
        for name in touched:
            maker = graph.makers.get(name)
            made = maker is not None and maker in self.live
            self.passed.discard(name)
            if made and name not in self.empty and passes(self, maker):
                self.passed.add(name)
            nothing = name in self.constant or name in self.empty
            there = (made or self._is_read(name)) and name not in self.passed and not nothing
            if name in structure.counted and not there:
                self.vanished.add(name)
            if (name in self.vanished or nothing) and name not in self._gone:
                self._gone.add(name)
                self._unuse(structure.classes_of(name))

    def _unuse(self, classes: Iterable[int]) -> None:
        for axis_class in classes:
            self._in_use[axis_class] -= 1
            if not self._in_use[axis_class]:
                for index in self.graph.groups_in(axis_class):
                    self._needed[index] -= 1
                    if self._is_orphan(index):
                        self.orphaned.add(index)


def passes(state: Deaths, op_index: int | None) -> bool:
    """Whether a node has one segment left, so that it does nothing."""
    if op_index is None:
        return False
    op = state.graph.ops[op_index]
    results = result_names(op)
    left = [name for name in results if name not in state.empty]
    if len(left) < len(results):
        return len(left) == 1 and all_segments(state.graph, op_index, results=True)
    gone = state.dropped.get(op_index, ())
    return bool(gone) and len(operand_names(op, gone)) == 1


def all_segments(graph: ChannelGraph, op_index: int, *, results: bool) -> bool:
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
