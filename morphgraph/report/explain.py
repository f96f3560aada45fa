"""``explain``: the life of a group of channels, operator by operator, and why it can shrink."""

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph, Dim, Edge, GraphOp, Group
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.coupling.roles import roles
from morphgraph.report.explanation import Axis, Explanation, Life, Operator, Price, Role, Use
from morphgraph.report.ways import Ways, classes_of, place_of


def explain(graph: ChannelGraph, name: str, *, convention: Convention = "default") -> Explanation:
    """Tell what is known of a group, a layer, an operator or a value.

    Args:
        graph: the lifted model.
        name: a group's id or name, a layer that makes or reads channels, a tensor, an operator, or
            a glob over these. What is named in the most particular way counts: a group before a
            layer, a layer before a tensor.
        convention: of the costs.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
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
    nodes = _choose(name, graph.ops, lambda node: (node.name, node.layer))
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


def _values_of(graph: ChannelGraph, nodes: Iterable[GraphOp]) -> Iterable[str]:
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
        self.ways = Ways(graph)
        self.edges_of: dict[tuple[int, int], list[Edge]] = defaultdict(list)  # node, factor
        for edge in self.couplings.edges:
            self.edges_of[edge.op_index, edge.factor].append(edge)
        self.roles = roles(graph.couplings)
        self.layer_of = {
            value.name or "": node.layer for node in graph.ops for value in node.ir.outputs
        }
        self.costs = {
            kind: cost(graph, kind, convention=convention)
            for kind in ("macs", "flops", "params", "memory")
        }
        self.gradients = {kind: c.gradient(graph.widths) for kind, c in self.costs.items()}

    def life(self, group: Group) -> Life:
        """What is known of a group."""
        uses = self._uses(group)
        makers = {use.operator for use in uses if use.role == "makes"}
        return Life(
            id=group.id,
            name=group.name,
            width=group.width,
            resizable=group.resizable,
            reason=group.reason,
            path=self.ways.to_group(group, makers),
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

    def _uses(self, group: Group) -> list[Use]:
        touched = classes_of(self.graph, group)
        classes = self.graph.vertex_class
        uses = []
        for index, node in enumerate(self.graph.ops):
            for name, factor in node.factors.items():
                if int(classes[factor]) not in touched:
                    continue
                edges = [e for e in self.edges_of[index, factor] if int(classes[e.dim]) in touched]
                if edges:
                    uses.append(self._use(node, name, factor, edges))
        return uses

    def _use(self, node: GraphOp, name: str, factor: int, edges: Sequence[Edge]) -> Use:
        # Where the group stands on a part of the factor's axes only, the role is that of the part.
        activations = sum(self.couplings.on_activation(edge) for edge in edges)
        role: Role = "carries on"
        if self.roles.normalizes[factor]:
            role = "competes over"
        elif self.roles.sums[factor]:
            role = "sums over"
        elif self.roles.counted[factor] and not activations and any(e.port < 0 for e in edges):
            role = "makes"
        elif activations > 1:
            role = "ties"
        dims = [self.couplings.dims[edge.dim] for edge in edges]
        operands = [
            dim.value
            for dim, edge in zip(dims, edges, strict=True)
            if edge.port >= 0 and dim.value not in self.couplings.input_independent
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
            places=[place_of(self.couplings, edge) for edge in edges],
        )

    def axis(self, dim: Dim) -> Axis:
        """What is known of an axis."""
        number_column = self.graph.dim(dim.value, dim.axis)
        channels = self.graph.channels_of(number_column)
        groups = np.unique(self.graph.channel_group[channels])
        names = [self.graph.groups[index].id for index in groups if index >= 0]
        kind = int(self.graph.vertex_class[number_column])
        pinned = kind in self.graph.pins
        return Axis(
            tensor=dim.value,
            axis=dim.axis,
            size=self.graph.shapes[dim.value][dim.axis],
            groups=names,
            reason=self.graph.pins[kind].reason if pinned else None,
            path=self.ways.to_class(kind, {number_column}) if pinned else [],
        )
