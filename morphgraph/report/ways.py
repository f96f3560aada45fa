"""The ways on which reasons came: from where a pin arose, axis by axis, to what keeps its size."""

from collections import defaultdict, deque
from collections.abc import Container, Sequence
from typing import Literal

from morphgraph.graph import ChannelGraph, Couplings, Edge, Group
from morphgraph.report.explanation import Place, Step, map_words


class Ways:
    """The shortest ways on which the reasons in a graph came."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.couplings = graph.couplings
        self.beside: dict[int, list[tuple[int, Edge]]] = defaultdict(list)  # within a class
        for edge in self.couplings.edges:
            if edge.whole:
                self.beside[edge.factor].append((edge.dim, edge))
                self.beside[edge.dim].append((edge.factor, edge))

    def to_group(self, group: Group, makers: Container[str]) -> list[Step]:
        """From where the reason arose to one of the operators that make the channels."""
        if group.pinned_by < 0:
            return []
        inside = [
            (factor, node.name in makers)
            for node in self.graph.ops
            for factor in node.factors.values()
            if int(self.graph.vertex_class[factor]) == group.pinned_by
        ]
        targets = {factor for factor, is_maker in inside if is_maker}
        members = {
            self.graph.dim(member.value, member.axis)
            for member in group.members
            if int(self.graph.vertex_class[self.graph.dim(member.value, member.axis)])
            == group.pinned_by
        }
        if targets or members:
            return self.to_class(group.pinned_by, targets or members)
        return self._over_segment(group)

    def _over_segment(self, group: Group) -> list[Step]:
        """The way where a pinned factor covers a part of an axis that the group stands on."""
        touched, classes = classes_of(self.graph, group), self.graph.vertex_class
        for edge in self.couplings.edges:
            if int(classes[edge.factor]) == group.pinned_by and int(classes[edge.dim]) in touched:
                steps = self.to_class(group.pinned_by, {edge.factor})
                return _told_once([*steps, *self._through(edge, edge.dim)])
        return self.to_class(group.pinned_by, set())

    def to_class(self, kind: int, targets: set[int]) -> list[Step]:
        """The shortest way on which a reason came to one of these dims and factors of a class."""
        pins = [self.graph.pins[kind]]
        while (source := pins[0].source) is not None and source in self.graph.pins:
            pins.insert(0, self.graph.pins[source])
        steps: list[Step] = []
        for pin, following in zip(pins, [*pins[1:], None], strict=True):
            if pin.vertex is None:
                continue
            if pin.source_vertex is not None:
                steps += self._through(self._edge(pin.source_vertex, pin.vertex), pin.vertex)
            elif pin.vertex < len(self.couplings.dims):
                steps.append(self._axis_step(pin.vertex))
            else:
                steps += self._from_factor(pin.vertex)
            ends = targets
            if following is not None and following.source_vertex is not None:
                ends = {following.source_vertex}
            for edge, reached in self._walk(pin.vertex, ends):
                if reached < len(self.couplings.dims):
                    steps.append(self._axis_step(reached))
                else:
                    steps.append(self._operator_step(edge))
        return _told_once(steps)

    def _from_factor(self, factor: int) -> list[Step]:
        """The step where a reason arose: within an operator."""
        name = self.couplings.factors[factor - len(self.couplings.dims)].op
        index = next(k for k, node in enumerate(self.graph.ops) if node.name == name)
        here = (e for e in self.couplings.edges if (e.op_index, e.factor) == (index, factor))
        edge = next(here, None)
        return [] if edge is None else [self._operator_step(edge)]

    def _walk(self, start: int, ends: set[int]) -> list[tuple[Edge, int]]:
        """The edges of the shortest way within a class, each with the node that it leads to."""
        came: dict[int, tuple[int, Edge] | None] = {start: None}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            if node in ends:
                break
            for other, edge in self.beside[node]:
                if other not in came:
                    came[other] = node, edge
                    queue.append(other)
        else:
            return []
        way: list[tuple[Edge, int]] = []
        while (before := came[node]) is not None:
            way.append((before[1], node))
            node = before[0]
        return way[::-1]

    def _edge(self, one: int, other: int) -> Edge:
        """The edge between a dim and a factor of different classes."""
        factor, dim = max(one, other), min(one, other)
        return next(e for e in self.couplings.edges if (e.factor, e.dim) == (factor, dim))

    def _through(self, edge: Edge, reached: int) -> list[Step]:
        """An operator between two classes, and the axis behind it if it leads to one."""
        steps = [self._operator_step(edge)]
        return [*steps, self._axis_step(reached)] if reached == edge.dim else steps

    def _axis_step(self, dim: int) -> Step:
        where = self.couplings.dims[dim]
        return Step("axis", where.value, axis=where.axis)

    def _operator_step(self, edge: Edge) -> Step:
        node = self.graph.ops[edge.op_index]
        words = None if edge.whole else map_words(place_of(self.couplings, edge))
        return Step("operator", node.name, op_type=node.ir.op_type, map=words)


def classes_of(graph: ChannelGraph, group: Group) -> frozenset[int]:
    """The classes that the group stands on."""
    column = graph.per_channel[:, [group.index]].tocoo()
    return frozenset(int(kind) for kind in column.coords[0])


def place_of(couplings: Couplings, edge: Edge) -> Place:
    """Where an edge stands, as it is told."""
    dim = couplings.dims[edge.dim]
    return Place(
        side="operand" if edge.port >= 0 else "result",
        index=edge.port if edge.port >= 0 else ~edge.port,
        tensor=dim.value,
        axis=dim.axis,
        weight=dim.value in couplings.input_independent,
        map=_map_kind(edge),
        outer=edge.map.outer,
        inner=edge.map.inner,
        offset=edge.map.offset,
        size=int(couplings.sizes[edge.factor]),
    )


def _told_once(steps: Sequence[Step]) -> list[Step]:
    """The steps; an operator that carries a reason on in two of them stands there once."""
    return [
        step
        for step, before in zip(steps, [None, *steps], strict=False)
        if before is None or (step.kind, step.name) != (before.kind, before.name)
    ]


def _map_kind(edge: Edge) -> Literal["identity", "blocks", "strides", "segment", "table"]:
    if edge.whole:
        return "identity"
    if edge.map.table is not None:
        return "table"
    if edge.map.inner > 1:
        return "blocks"
    return "strides" if edge.map.outer > 1 else "segment"
