"""``explain``: all that is known of a group, operator by operator, and why it can shrink or not."""

import fnmatch
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph, Edge, GraphOp, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.coupling.roles import roles
from morphgraph.report.explanation import (
    AxisExplanation,
    Explanation,
    GroupExplanation,
    MapName,
    OperatorExplanation,
    Price,
    Role,
    Step,
    TensorAxis,
    Use,
)
from morphgraph.words import did_you_mean

_Thing = TypeVar("_Thing")
_Names = Callable[[_Thing], Iterable[str]]


def explain(graph: ChannelGraph, name: str, *, convention: Convention = "default") -> Explanation:
    """Say what is known of a group, a layer, an operator or a value.

    Args:
        graph: the lifted model.
        name: a group's id or name, a layer that makes or reads channels, a tensor, an operator, or
            a glob over these. The most specific match counts: a group before a layer, a layer
            before a tensor.
        convention: of the costs.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> group = mg.explain(graph, "stem").groups[0]
    >>> [(use.op_type, use.role) for use in group.operators][:3]
    [('Conv', 'makes'), ('BatchNormalization', 'carries on'), ('Relu', 'carries on')]
    >>> mg.explain(graph, "fc").groups[0].reason
    "graph output 'linear'"

    Raises:
        ArgumentError: nothing has this name.
    """
    explainer = Explainer(graph, convention)
    groups = _named(
        name,
        graph.groups,
        lambda group: (group.id, group.name, *group.producers),
        lambda group: group.readers,
        lambda group: (member.value for member in group.members),
        exact=lambda group: (group.id, group.name),
    )
    if groups:
        return Explanation(name, [explainer.group(group) for group in groups], [], [])
    ops = _named(name, graph.ops, lambda op: (op.name, op.layer))
    values: Iterable[str] = dict.fromkeys(v for op in ops for v in _values(op) if v in graph.shapes)
    if not ops:
        values = _named(name, list(graph.shapes), lambda value: (value,))
    if not ops and not values:
        groups_first = (text for group in graph.groups for text in (group.name, *group.producers))
        others = (text for op in graph.ops for text in (op.name, op.layer))
        known = dict.fromkeys([*groups_first, *others, *graph.shapes])
        raise ArgumentError(
            f"'{escape(name)}' is no group, layer, operator or tensor of the model"
            f"{did_you_mean(name, known)}; `analyze` lists them"
        )
    return Explanation(
        name,
        [],
        [OperatorExplanation(op.name, op.ir.op_type, op.layer, op.opaque) for op in ops],
        [explainer.axis(v, axis) for v in values for axis in range(len(graph.shapes[v]))],
    )


def _named(
    name: str,
    things: Sequence[_Thing],
    *names: _Names[_Thing],
    exact: _Names[_Thing] | None = None,
) -> list[_Thing]:
    """The things that a name means, by the most specific match.

    The very name comes before a glob, and a glob before a module that contains them; within each,
    ``names`` are tried in their order, and for the very name ``exact`` before them.
    """
    for matches in (_is, fnmatch.fnmatchcase, _contains):
        for names_of in ([exact] if exact and matches is _is else []) + [*names]:
            named = [t for t in things if any(matches(text, name) for text in names_of(t))]
            if named:
                return named
    return []


def _is(text: str, name: str) -> bool:
    return text == name


def _contains(text: str, name: str) -> bool:
    """Whether ``name`` is a module around what ``text`` names, or a group is named after it."""
    return text.startswith((f"{name}.", f"{name} ("))


def _values(op: GraphOp) -> Iterator[str]:
    for value in (*op.ir.inputs, *op.ir.outputs):
        if value is not None:
            yield value.name or ""


class Explainer:
    """Explains groups and axes of one graph."""

    def __init__(self, graph: ChannelGraph, convention: Convention) -> None:
        self.graph = graph
        self.couplings = graph.couplings
        self.trace = PinTrace(graph)
        self.roles = roles(graph.couplings)
        self.layer_of = {value.name or "": op.layer for op in graph.ops for value in op.ir.outputs}
        costs = {
            unit: cost(graph, unit, convention=convention)
            for unit in ("macs", "flops", "params", "memory")
        }
        self.costs = {unit: (c, c.gradient(graph.widths)) for unit, c in costs.items()}

    def group(self, group: Group) -> GroupExplanation:
        """What is known of a group."""
        uses = list(self._uses(group))
        makers = {use.operator for use in uses if use.role == "makes"}
        return GroupExplanation(
            id=group.id,
            name=group.name,
            width=group.width,
            resizable=group.resizable,
            reason=group.reason,
            path=self.trace.to_group(group, makers),
            statistical=group.statistical,
            competitors=[use.operator for use in uses if use.role == "competes over"],
            producers=list(group.producers),
            readers=list(group.readers),
            macs=self._price(group, "macs"),
            flops=self._price(group, "flops"),
            params=self._price(group, "params"),
            activation_bytes=self._price(group, "memory"),
            operators=uses,
        )

    def axis(self, value: str, axis: int) -> AxisExplanation:
        """What is known of an axis."""
        vertex = self.graph.dim(value, axis)
        groups = np.unique(self.graph.channel_group[self.graph.channels_of(vertex)])
        axis_class = int(self.graph.vertex_class[vertex])
        pin = self.graph.pins.get(axis_class)
        return AxisExplanation(
            tensor=value,
            axis=axis,
            size=self.graph.shapes[value][axis],
            groups=[self.graph.groups[index].id for index in groups if index >= 0],
            reason=pin.reason if pin else None,
            path=self.trace.to_class(axis_class, {vertex}) if pin else [],
        )

    def _price(self, group: Group, unit: str) -> Price:
        of_model, gradient = self.costs[unit]
        saved = float(gradient[group.index])
        return Price(of_model.unit, saved, saved / of_model.total if of_model.total else 0.0)

    def _uses(self, group: Group) -> Iterator[Use]:
        """What every operator does with the group, factor by factor."""
        touched = _classes(self.graph, group)
        vertex_class = self.graph.vertex_class
        for op in self.graph.ops:
            for name, factor in op.factors.items():
                if int(vertex_class[factor]) in touched:
                    edges = self.trace.edges_at[factor]
                    edges = [edge for edge in edges if int(vertex_class[edge.dim]) in touched]
                    if edges:
                        yield self._use(op, name, factor, edges)

    def _use(self, op: GraphOp, name: str, factor: int, edges: Sequence[Edge]) -> Use:
        # Where the group stands on a part of the factor's axes only, the role is that of the part.
        couplings = self.couplings
        activations = [couplings.dims[e.dim].value for e in edges if couplings.on_activation(e)]
        role: Role = "carries on"
        tied: list[str] = []
        if self.roles.normalizes[factor]:
            role = "competes over"
        elif self.roles.sums[factor]:
            role = "sums over"
        elif self.roles.counted[factor] and not activations and any(e.port < 0 for e in edges):
            role = "makes"
        elif len(activations) > 1:
            role = "ties"
            tied = activations
            layers = [self.layer_of.get(value, value) for value in tied]
            # Within one layer, as for the queries and keys of an attention, tensors differ.
            tied = layers if len(set(layers)) > 1 else tied
        return Use(
            operator=op.name,
            op_type=op.ir.op_type,
            layer=op.layer,
            factor=name,
            role=role,
            tied=tied,
            places=[_tensor_axis(self.graph, edge) for edge in edges],
        )


class PinTrace:
    """Traces a reason from the pin where it arose, axis by axis, to what keeps its size."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.dim_count = len(graph.couplings.dims)
        self.edges_at: dict[int, list[Edge]] = defaultdict(list)  # of both vertices
        for edge in graph.couplings.edges:
            self.edges_at[edge.factor].append(edge)
            self.edges_at[edge.dim].append(edge)

    def to_group(self, group: Group, makers: Container[str]) -> list[Step]:
        """From where the reason arose to one of the operators that make the channels."""
        if group.pinned_by < 0:
            return []

        def pinned(vertices: Iterable[int]) -> set[int]:
            return {v for v in vertices if self.graph.vertex_class[v] == group.pinned_by}

        ends = pinned(f for op in self.graph.ops if op.name in makers for f in op.factors.values())
        ends = ends or pinned(self.graph.dim(m.value, m.axis) for m in group.members)
        if ends:
            return self.to_class(group.pinned_by, ends)
        # A pinned factor covers a part of an axis that the group stands on.
        touched, vertex_class = _classes(self.graph, group), self.graph.vertex_class
        for edge in self.graph.couplings.edges:
            if pinned([edge.factor]) and int(vertex_class[edge.dim]) in touched:
                steps = self.to_class(group.pinned_by, {edge.factor})
                return _without_repeats([*steps, *self._across(edge, edge.dim)])
        return self.to_class(group.pinned_by, set())

    def to_class(self, axis_class: int, ends: set[int]) -> list[Step]:
        """The shortest path on which a reason came to one of these vertices of a class."""
        pins = [self.graph.pins[axis_class]]
        while (source := pins[0].source) is not None and source in self.graph.pins:
            pins.insert(0, self.graph.pins[source])
        steps: list[Step] = []
        for pin, following in zip(pins, [*pins[1:], None], strict=True):
            if pin.vertex is None:
                continue
            if pin.source_vertex is not None:  # it came from another class
                dim, factor = sorted((pin.source_vertex, pin.vertex))  # dims are numbered first
                edge = next(e for e in self.edges_at[factor] if e.dim == dim)
                steps += self._across(edge, pin.vertex)
            elif pin.vertex < self.dim_count:
                steps.append(self._axis_step(pin.vertex))
            else:  # it arose within an operator
                steps += map(self._operator_step, self.edges_at[pin.vertex][:1])
            leaves_at = following.source_vertex if following else None
            steps += self._within(pin.vertex, ends if leaves_at is None else {leaves_at})
        return _without_repeats(steps)

    def _within(self, start: int, ends: set[int]) -> list[Step]:
        """The shortest path within a class, breadth first; empty if it reaches no end."""
        came_by: dict[int, Edge | None] = {start: None}
        queue = deque([start])
        while queue and queue[0] not in ends:
            vertex = queue.popleft()
            for edge in self.edges_at[vertex]:
                other = edge.dim + edge.factor - vertex
                if edge.whole and other not in came_by:
                    came_by[other] = edge
                    queue.append(other)
        steps: list[Step] = []
        vertex = queue[0] if queue else start
        while (last := came_by[vertex]) is not None:
            on_axis = vertex == last.dim
            steps.append(self._axis_step(vertex) if on_axis else self._operator_step(last))
            vertex = last.dim + last.factor - vertex
        return steps[::-1]

    def _across(self, edge: Edge, reached: int) -> list[Step]:
        """An operator between two classes, and the axis behind it if it leads to one."""
        steps = [self._operator_step(edge)]
        return [*steps, self._axis_step(reached)] if reached == edge.dim else steps

    def _axis_step(self, vertex: int) -> Step:
        dim = self.graph.couplings.dims[vertex]
        return Step("axis", dim.value, axis=dim.axis)

    def _operator_step(self, edge: Edge) -> Step:
        op = self.graph.ops[edge.op_index]
        words = None if edge.whole else _tensor_axis(self.graph, edge).map_words()
        return Step("operator", op.name, op_type=op.ir.op_type, map=words)


def _without_repeats(steps: Iterable[Step]) -> list[Step]:
    """The steps; an operator that is in two of them in a row stands there once."""
    return [next(same) for _, same in groupby(steps, lambda step: (step.kind, step.name))]


def _classes(graph: ChannelGraph, group: Group) -> frozenset[int]:
    """The classes that the group stands on."""
    column = graph.per_channel[:, [group.index]].tocoo()
    return frozenset(graph.base[column.coords[0]].tolist())


def _tensor_axis(graph: ChannelGraph, edge: Edge) -> TensorAxis:
    dim = graph.couplings.dims[edge.dim]
    return TensorAxis(
        side="operand" if edge.port >= 0 else "result",
        index=edge.port if edge.port >= 0 else ~edge.port,
        tensor=dim.value,
        axis=dim.axis,
        weight=dim.value in graph.couplings.input_independent,
        map=_map_name(edge),
        outer=edge.map.outer,
        inner=edge.map.inner,
        offset=edge.map.offset,
        size=int(graph.couplings.sizes[edge.factor]),
    )


def _map_name(edge: Edge) -> MapName:
    if edge.whole:
        return "identity"
    if edge.map.table is not None:
        return "table"
    if edge.map.inner > 1:
        return "blocks"
    return "strides" if edge.map.outer > 1 else "segment"
