"""``explain``: the life of a group of channels, operator by operator, and why it can shrink or not.

The structs are the JSON that is printed; ``docs/schema/explanation.schema.json`` is made from them.
"""

import fnmatch
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph, Dim, Edge, GraphNode, Group
from morphgraph.onnx_io import escape
from morphgraph.ops import IndexMap
from morphgraph.passes.cost import Convention, cost
from morphgraph.passes.group import makes, ties
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    amount,
    number,
    plain,
    render,
    share,
    size,
)
from morphgraph.version import __version__

SCHEMA_VERSION = 1

_SHOWN_STEPS = 12  # of a path, in text; JSON has all
_SHOWN_WEIGHTS = 2  # of an operator
_SHOWN_COMPETITORS = 3
_TINY = 1e-4

Role = Literal["makes", "sums over", "competes over", "ties", "carries on"]


class Price(msgspec.Struct, frozen=True):
    """What removing one channel frees, at the present widths; ``share`` is of the whole model."""

    unit: str
    per_channel: float
    share: float


class Place(msgspec.Struct, frozen=True):
    """An axis on which an operator has the channels.

    ``side`` and ``index`` say which operand or result it is. ``map`` says which positions belong to
    a channel: ``identity``, or ``blocks`` of ``inner`` positions, ``strides`` over ``outer`` rounds
    (both may hold: then it is ``blocks``), a ``segment`` that begins at ``offset``, or an irregular
    ``table``.
    """

    side: Literal["operand", "result"]
    index: int
    tensor: str
    axis: int
    weight: bool
    map: Literal["identity", "blocks", "strides", "segment", "table"]
    outer: int
    inner: int
    offset: int
    size: int


class Use(msgspec.Struct, frozen=True):
    """What one operator does to the channels: its ``factor`` of the notation, and where it stands.

    ``role``: it ``makes`` them, ``sums over`` them, ``competes over`` them (a removal changes what
    the others become), ``ties`` those of several operands, or ``carries on``. ``tied`` names the
    layers whose channels it ties, or where they are one layer its tensors.
    """

    operator: str
    op_type: str
    layer: str
    factor: str
    role: Role
    tied: list[str]
    places: list[Place]


class Step(msgspec.Struct, frozen=True):
    """One step of a reason's way: an axis, or an operator that carries it on.

    For an operator ``map`` says how the axes of the two sides go together, where not one to one.
    """

    kind: Literal["axis", "operator"]
    name: str
    op_type: str | None = None
    axis: int | None = None
    map: str | None = None


class Life(msgspec.Struct, frozen=True):
    """A group: who makes it, what ties it, who reads it, what it costs, why it can shrink or not.

    ``path`` leads from where the reason arose to the group. ``competitors`` are the operators that
    normalize, average or compete over it, which make it ``statistical``.
    """

    id: str
    name: str
    width: int
    resizable: bool
    reason: str | None
    path: list[Step]
    statistical: bool
    competitors: list[str]
    producers: list[str]
    readers: list[str]
    macs: Price
    flops: Price
    params: Price
    activation_bytes: Price
    operators: list[Use]


class Axis(msgspec.Struct, frozen=True):
    """An axis of a value: the groups that stand on it, or why it keeps its size."""

    tensor: str
    axis: int
    size: int
    groups: list[str]
    reason: str | None
    path: list[Step]


class Operator(msgspec.Struct, frozen=True):
    """An operator by name; ``opaque`` says why nothing is known of it."""

    name: str
    op_type: str
    layer: str
    opaque: str | None


class Explanation(msgspec.Struct, frozen=True):
    """All that is known under a name: groups, or else operators, and axes of values."""

    name: str
    groups: list[Life]
    operators: list[Operator]
    axes: list[Axis]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    def __str__(self) -> str:
        """The text that the command line prints."""
        return render(explanation_report(self), "table")


def explain(graph: ChannelGraph, name: str, *, convention: Convention = "default") -> Explanation:
    """Tell what is known of a group, a layer, an operator or a value.

    Args:
        graph: the lifted model.
        name: a group's id or name, a layer that makes or reads channels, a tensor, an operator, or
            a glob over these. What is named in the most particular way counts: a group before a
            layer, a layer before a tensor.
        convention: of the costs.

    >>> import morphgraph as mg
    >>> from morphgraph.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> life = mg.explain(graph, "stem").groups[0]
    >>> [(use.op_type, use.role) for use in life.operators][:3]
    [('Conv', 'makes'), ('BatchNormalization', 'carries on'), ('Relu', 'carries on')]
    >>> mg.explain(graph, "fc").groups[0].reason
    "graph output 'linear'"

    Raises:
        ArgumentError: nothing has this name.
    """
    teller = _Teller(graph, convention)
    groups = _groups_named(graph, name)
    if groups:
        return Explanation(name, [teller.life(group) for group in groups], [], [])
    nodes = _choose(name, graph.nodes, lambda node: (node.name, node.layer))
    values = list(dict.fromkeys(_values_of(graph, nodes)))
    if not nodes:
        values = _choose(name, list(graph.shapes), lambda value: (value,))
    if not nodes and not values:
        raise ArgumentError(
            f"'{escape(name)}' is no group, layer, operator or tensor of the model; "
            "`analyze` lists them"
        )
    return Explanation(
        name,
        [],
        [Operator(node.name, node.ir.op_type, node.layer, node.opaque) for node in nodes],
        [teller.axis(dim) for value in values for dim in _dims(graph, value)],
    )


def _groups_named(graph: ChannelGraph, name: str) -> list[Group]:
    """The groups that a name speaks of, by the most particular way in which it does."""
    kinds: tuple[Callable[[Group], Iterable[str]], ...] = (
        lambda group: (group.id, group.name),
        lambda group: (group.id, group.name, *group.producers),
        lambda group: group.readers,
        lambda group: (member.value for member in group.members),
    )
    for way in _WAYS:
        for names_of in kinds if way is _is else kinds[1:]:
            found = [g for g in graph.groups if any(way(text, name) for text in names_of(g))]
            if found:
                return found
    return []


def _is(text: str, name: str) -> bool:
    return text == name


def _within(text: str, name: str) -> bool:
    """Whether a name is of a module that stands in another, or of a group named after one."""
    return text.startswith((f"{name}.", f"{name} ("))


_WAYS = (_is, fnmatch.fnmatchcase, _within)


def _choose(name: str, things: Sequence[Any], names_of: Callable[[Any], tuple[str, ...]]) -> Any:
    """The things of this very name, or else those that it fits as a glob."""
    for way in _WAYS:
        found = [thing for thing in things if any(way(text, name) for text in names_of(thing))]
        if found:
            return found
    return []


def _values_of(graph: ChannelGraph, nodes: Iterable[GraphNode]) -> Iterable[str]:
    for node in nodes:
        for value in (*node.ir.inputs, *node.ir.outputs):
            if value is not None and (name := value.name or "") in graph.shapes:
                yield name


def _dims(graph: ChannelGraph, value: str) -> list[Dim]:
    return [Dim(value, axis) for axis in range(len(graph.shapes[value]))]


class _Teller:
    def __init__(self, graph: ChannelGraph, convention: Convention) -> None:
        self.graph = graph
        self.couplings = graph.couplings
        self.edges_of: dict[tuple[int, int], list[Edge]] = defaultdict(list)  # node, factor
        self.beside: dict[int, list[tuple[int, Edge]]] = defaultdict(list)  # within a class
        for edge in self.couplings.edges:
            self.edges_of[edge.node, edge.factor].append(edge)
            if edge.whole:
                self.beside[edge.factor].append((edge.dim, edge))
                self.beside[edge.dim].append((edge.factor, edge))
        self.counted = {f for node in graph.nodes for term in node.macs for f in term}
        self.layer_of = {
            value.name or "": node.layer for node in graph.nodes for value in node.ir.outputs
        }
        self.costs = {
            kind: cost(graph, kind, convention=convention)
            for kind in ("macs", "flops", "params", "memory")
        }
        self.gradients = {kind: c.gradient(graph.widths) for kind, c in self.costs.items()}

    # -- a group -------------------------------------------------------------------------------

    def life(self, group: Group) -> Life:
        uses = self._uses(group)
        return Life(
            id=group.id,
            name=group.name,
            width=group.width,
            resizable=group.resizable,
            reason=group.reason,
            path=self._path_to_group(group, uses),
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

    def _price(self, group: Group, kind: str) -> Price:
        each, total = float(self.gradients[kind][group.index]), self.costs[kind].total
        return Price(self.costs[kind].unit, each, each / total if total else 0.0)

    def _touched(self, group: Group) -> frozenset[int]:
        """The classes that the group stands on."""
        column = self.graph.per_channel[:, [group.index]].tocoo()
        return frozenset(int(kind) for kind in column.coords[0])

    def _uses(self, group: Group) -> list[Use]:
        touched = self._touched(group)
        classes = self.graph.node_class
        uses = []
        for index, node in enumerate(self.graph.nodes):
            for name, factor in node.factors.items():
                if int(classes[factor]) not in touched:
                    continue
                edges = [e for e in self.edges_of[index, factor] if int(classes[e.dim]) in touched]
                if edges:
                    uses.append(self._use(node, name, factor, edges))
        return uses

    def _use(self, node: GraphNode, name: str, factor: int, edges: Sequence[Edge]) -> Use:
        ports = [edge.port for edge in edges]
        tied = ties(self.couplings, node, ports)
        role: Role = "carries on"
        if name in node.statistical:
            role = "competes over"
        elif name in node.contracted:
            role = "sums over"
        elif factor in self.counted and makes(self.couplings, node, ports):
            role = "makes"
        elif tied:
            role = "ties"
        dims = [self.couplings.dims[edge.dim] for edge in edges]
        operands = [
            dim.value
            for dim, edge in zip(dims, edges, strict=True)
            if edge.port >= 0 and dim.value not in self.couplings.weights
        ]
        layers = [self.layer_of.get(value, value) for value in operands]
        # Within one layer, as the queries and keys of an attention, the tensors tell them apart.
        tied_names = layers if len(set(layers)) > 1 else operands
        return Use(
            operator=node.name,
            op_type=node.ir.op_type,
            layer=node.layer,
            factor=name,
            role=role,
            tied=tied_names if role == "ties" else [],
            places=[self._place(edge) for edge in edges],
        )

    def _place(self, edge: Edge) -> Place:
        dim = self.couplings.dims[edge.dim]
        return Place(
            side="operand" if edge.port >= 0 else "result",
            index=edge.port if edge.port >= 0 else ~edge.port,
            tensor=dim.value,
            axis=dim.axis,
            weight=dim.value in self.couplings.weights,
            map=_map_kind(edge),
            outer=edge.map.outer,
            inner=edge.map.inner,
            offset=edge.map.offset,
            size=int(self.couplings.sizes[edge.factor]),
        )

    # -- reasons and their ways ----------------------------------------------------------------

    def axis(self, dim: Dim) -> Axis:
        """What is known of an axis."""
        number_ = self.graph.dim(dim.value, dim.axis)
        channels = self.graph.channels_of(number_)
        groups = np.unique(self.graph.channel_group[channels])
        names = [self.graph.groups[index].id for index in groups if index >= 0]
        kind = int(self.graph.node_class[number_])
        pinned = kind in self.graph.pins
        return Axis(
            tensor=dim.value,
            axis=dim.axis,
            size=self.graph.shapes[dim.value][dim.axis],
            groups=names,
            reason=self.graph.pins[kind].reason if pinned else None,
            path=self._path(kind, {number_}) if pinned else [],
        )

    def _path_to_group(self, group: Group, uses: Sequence[Use]) -> list[Step]:
        """From where the reason arose to the operator that makes the channels, if it is there."""
        if group.pinned_by < 0:
            return []
        makers = {use.operator for use in uses if use.role == "makes"}
        inside = [
            (factor, node.name in makers)
            for node in self.graph.nodes
            for factor in node.factors.values()
            if int(self.graph.node_class[factor]) == group.pinned_by
        ]
        targets = {factor for factor, is_maker in inside if is_maker}
        members = {
            self.graph.dim(member.value, member.axis)
            for member in group.members
            if int(self.graph.node_class[self.graph.dim(member.value, member.axis)])
            == group.pinned_by
        }
        if targets or members:
            return self._path(group.pinned_by, targets or members)
        return self._path_over_segment(group)

    def _path_over_segment(self, group: Group) -> list[Step]:
        """The way where a pinned factor covers a part of an axis that the group stands on."""
        touched, classes = self._touched(group), self.graph.node_class
        for edge in self.couplings.edges:
            if int(classes[edge.factor]) == group.pinned_by and int(classes[edge.dim]) in touched:
                steps = self._path(group.pinned_by, {edge.factor})
                return _told_once([*steps, *self._through(edge, edge.dim)])
        return self._path(group.pinned_by, set())

    def _path(self, kind: int, targets: set[int]) -> list[Step]:
        """The shortest way on which a reason came to one of these dims and factors of a class."""
        pins = [self.graph.pins[kind]]
        while (source := pins[0].source) is not None and source in self.graph.pins:
            pins.insert(0, self.graph.pins[source])
        steps: list[Step] = []
        for pin, following in zip(pins, [*pins[1:], None], strict=True):
            if pin.node is None:
                continue
            if pin.source_node is not None:
                steps += self._through(self._edge(pin.source_node, pin.node), pin.node)
            elif pin.node < len(self.couplings.dims):
                steps.append(self._axis_step(pin.node))
            else:
                steps += self._from_factor(pin.node)
            ends = targets
            if following is not None and following.source_node is not None:
                ends = {following.source_node}
            for edge, reached in self._walk(pin.node, ends):
                if reached < len(self.couplings.dims):
                    steps.append(self._axis_step(reached))
                else:
                    steps.append(self._operator_step(edge))
        return _told_once(steps)

    def _from_factor(self, factor: int) -> list[Step]:
        """The step where a reason arose: within an operator."""
        name = self.couplings.factors[factor - len(self.couplings.dims)].node
        index = next(k for k, node in enumerate(self.graph.nodes) if node.name == name)
        edge = next(iter(self.edges_of[index, factor]), None)
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
        node = self.graph.nodes[edge.node]
        words = None if edge.whole else _map_words(self._place(edge))
        return Step("operator", node.name, op_type=node.ir.op_type, map=words)


def _told_once(steps: Sequence[Step]) -> list[Step]:
    """The steps; an operator that carries a reason on in two of them stands there once."""
    return [
        step
        for step, before in zip(steps, [None, *steps], strict=False)
        if before is None or (step.kind, step.name) != (before.kind, before.name)
    ]


def _map_kind(edge: Edge) -> Literal["identity", "blocks", "strides", "segment", "table"]:
    map_: IndexMap = edge.map
    if edge.whole:
        return "identity"
    if map_.table is not None:
        return "table"
    if map_.inner > 1:
        return "blocks"
    return "strides" if map_.outer > 1 else "segment"


def _map_words(place: Place) -> str:
    """How the positions of an axis belong to channels; empty where one to one."""
    rounds = f", {place.outer} times" if place.outer > 1 else ""
    match place.map:
        case "blocks":
            return f"blocks of {place.inner}{rounds}"
        case "strides":
            return f"every {place.size}th"
        case "segment":
            return f"{place.offset} to {place.offset + place.size - 1}"
        case "table":
            return "chosen positions"
    return ""


# -- as text ------------------------------------------------------------------------------------


def explanation_report(explanation: Explanation) -> Report:
    """An explanation for people; several groups are listed, one is told in full."""
    groups = explanation.groups
    if len(groups) == 1:
        return Report(explanation, [_use_table(groups[0])], _portrait(groups[0]))
    if groups:
        return Report(
            explanation,
            [_group_table(groups)],
            [("matches", f"{len(groups)} groups")],
            [f"name one of them to see its life: --explain {groups[0].id}"],
        )
    head = [("operator", _operator_line(operator)) for operator in explanation.operators]
    return Report(explanation, [_axis_table(explanation.axes)], head)


def _operator_line(operator: Operator) -> str:
    known = f"; not described: {escape(operator.opaque)}" if operator.opaque else ""
    layer = f" of {escape(operator.layer)}" if operator.layer != operator.name else ""
    return f"{escape(operator.op_type)} '{escape(operator.name)}'{layer}{known}"


def _portrait(life: Life) -> list[tuple[str, str]]:
    lines = [
        ("group", f"{life.id}: {escape(life.name)}, {_count(life.width, 'channel')}"),
        ("made by", ", ".join(map(escape, life.producers)) or "no layer"),
        ("read by", ", ".join(map(escape, life.readers)) or "no layer"),
        (
            "a channel",
            f"{amount(life.macs.per_channel)} MACs = {amount(life.flops.per_channel)} FLOPs "
            f"({_part(life.flops)} of the model), "
            f"{amount(life.params.per_channel)} params ({_part(life.params)}), "
            f"{size(life.activation_bytes.per_channel)} of activations "
            f"({_part(life.activation_bytes)})",
        ),
    ]
    if life.reason is None:
        lines.append(("can shrink", "nothing that keeps its size is tied to it"))
    else:
        lines.append(("keeps size", escape(life.reason)))
        if life.path:
            lines.append(("because", _path_words(life.path)))
    if life.statistical:
        number_ = _count(len(life.competitors), "operator")
        more = ", ..." if len(life.competitors) > _SHOWN_COMPETITORS else ""
        names = ", ".join(map(escape, life.competitors[:_SHOWN_COMPETITORS]))
        lines.append(
            (
                "statistical",
                f"{number_} ({names}{more}) normalize, average or compete over the channels: "
                "a removal changes what the others become",
            )
        )
    return lines


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _part(price: Price) -> str:
    return "under 0.01 %" if 0 < price.share < _TINY else share(price.share)


def _path_words(path: Sequence[Step]) -> str:
    words = [_step_words(step) for step in path]
    if len(words) > _SHOWN_STEPS:
        half = _SHOWN_STEPS // 2
        words[half:-half] = [f"... {len(words) - 2 * half} more ..."]
    return " -> ".join(words)


def _step_words(step: Step) -> str:
    if step.kind == "axis":
        return f"{escape(step.name)}[{step.axis}]"
    how = f" ({step.map})" if step.map else ""
    return f"{escape(step.op_type or '')} '{escape(step.name)}'{how}"


def _use_table(life: Life) -> Table:
    return Table(
        [
            Column("operator"),
            Column("type"),
            Column("does"),
            Column("factor"),
            Column("stands on"),
        ],
        [_use_row(use) for use in life.operators],
        "Operator by operator",
    )


def _use_row(use: Use) -> list[Cell]:
    does: str = use.role
    if use.tied:
        does += " " + " and ".join(dict.fromkeys(use.tied))
    return [use.operator, use.op_type, does, use.factor, " -> ".join(_sides(use))]


def _sides(use: Use) -> list[str]:
    """The operands and the results; of more than two weights the number alone."""
    weights = [place for place in use.places if place.weight and place.side == "operand"]
    hidden = len(weights) if len(weights) > _SHOWN_WEIGHTS else 0
    sides = []
    for side in ("operand", "result"):
        shown = [p for p in use.places if p.side == side and not (hidden and p in weights)]
        words = [_place_words(place) for place in shown]
        if hidden and side == "operand":
            words.append(f"{hidden} weights")
        sides.append(", ".join(words))
    return [words for words in sides if words]


def _place_words(place: Place) -> str:
    words = _map_words(place)
    return f"{place.tensor}[{place.axis}{': ' + words if words else ''}]"


def _group_table(groups: Sequence[Life]) -> Table:
    return Table(
        [
            Column("id"),
            Column("group"),
            number("width", plain),
            number("FLOPs per channel"),
            number("params per channel"),
            Column("keeps its size because"),
        ],
        [
            [g.id, g.name, g.width, g.flops.per_channel, g.params.per_channel, g.reason]
            for g in groups
        ],
    )


def _axis_table(axes: Sequence[Axis]) -> Table:
    return Table(
        [
            Column("axis"),
            number("size", plain),
            Column("groups"),
            Column("keeps its size because"),
            Column("path"),
        ],
        [
            [
                f"{axis.tensor}[{axis.axis}]",
                axis.size,
                ", ".join(axis.groups),
                axis.reason,
                _path_words(axis.path),
            ]
            for axis in axes
        ],
        "Axes",
    )
