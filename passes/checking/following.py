"""Which sizes follow when a network takes smaller inputs, where the model itself holds sizes.

Three kinds of values hold the size of an axis: numbers that state it (the target of a Reshape, the
places of a Slice), tables that stand beside activations (positions, masks of windows), and values
of the same kind that are computed of weights alone (a bias for each two positions of a window).
Rounds of shape inference find sizes that follow from those before, and give them to these.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import IntArray, Shape
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.ops import facts_of
from morphgraph.ops.reshape import blocks
from morphgraph.passes.checking.smaller import inferred, keeps_channels, written
from morphgraph.passes.coupling.roles import roles

POSITIONS = 2
"""How many there are at least where there were several."""

Sizes = dict[int, int]
"""By size of an axis without channels the smaller one."""

Axes = Mapping[str, Mapping[int, int]]
"""By name of a value axes without channels, with their sizes."""

_MOST_ROUNDS = 16
"""Sizes that follow from each other: of a map, of its patches, of these and a token more."""


class Stated(NamedTuple):
    """Numbers in a constant operand that speak of axes: sizes of the result, or places on them.

    Attributes:
        port: the operand.
        numbers: what it holds, one for each of ``axes``.
        axes: those of ``value``.
        value: the result, or the operand that is sliced.
    """

    port: int
    numbers: IntArray
    axes: Sequence[int]
    value: ir.Value

    def at(self, axes: Iterable[int]) -> dict[int, int]:
        """The numbers that speak of these axes."""
        wanted = set(axes)
        pairs = zip(self.axes, self.numbers.tolist(), strict=True)
        return {axis: number for axis, number in pairs if axis in wanted}

    def moved(self, axes: Mapping[int, int], sizes: Mapping[int, int]) -> IntArray:
        """The numbers where these axes have become smaller: as far from the nearer end."""
        moved = self.numbers.copy()
        for k, axis in enumerate(self.axes):
            full = axes.get(axis, 0)
            if full in sizes and full / 2 < moved[k] <= full:
                moved[k] -= full - sizes[full]
        return moved


class Following(NamedTuple):
    """What becomes smaller with the inputs.

    Attributes:
        stated: by name of a node's first result the axes that its operands' numbers speak of.
        tables: by name of an initializer the axes that lose their last positions.
        computed: the same of values that are computed of weights alone.
        sizes: the smaller ones.
    """

    stated: Axes
    tables: Axes
    computed: Axes
    sizes: Mapping[int, int]

    def shape(self, full: Shape, axes: Mapping[int, int]) -> Shape:
        """The smaller shape of a table."""
        return tuple(self.sizes[size] if k in axes else size for k, size in enumerate(full))


def stated(node: ir.Node) -> list[Stated]:
    """The constant numbers that speak of a node's axes."""
    facts = facts_of(node)
    if facts.target is not None:
        numbers, result = _numbers(node, facts.target), node.outputs[0]
        if numbers is not None and result.shape is not None and len(result.shape) == len(numbers):
            return [Stated(facts.target, numbers, range(len(numbers)), result)]
    data = node.inputs[0] if facts.places else None
    if data is None or data.shape is None:
        return []
    found = [(port, _numbers(node, port)) for port in facts.places]
    named = None if facts.axes is None else _numbers(node, facts.axes)
    return [
        Stated(
            port,
            numbers,
            range(len(numbers)) if named is None else (named % len(data.shape)).tolist(),
            data,
        )
        for port, numbers in found
        if numbers is not None and (named is None or len(named) == len(numbers))
    ]


def _numbers(node: ir.Node, port: int) -> IntArray | None:
    """The numbers of a constant operand."""
    operand = node.inputs[port] if port < len(node.inputs) else None
    if operand is None or operand.const_value is None:
        return None
    return operand.const_value.numpy()


def following(
    graph: ChannelGraph, inputs: Mapping[str, Shape]
) -> tuple[Following, dict[str, Shape]] | None:
    """What must change for these inputs, and the shapes that all values have then.

    Each round finds sizes that follow from those before. ``None``: they do not fit together.
    """
    holders = _holders(graph)
    message = _Message(graph, inputs, holders)
    regrouping = [node for node in graph.model.graph if facts_of(node).target is not None]
    sizes: Sizes = {}
    for _ in range(_MOST_ROUNDS):
        found = message.shapes()
        new = None if found is None else _new_sizes(graph, regrouping, found, sizes)
        if new is None:
            return None
        if not new:
            break
        sizes |= new
        message.restate(_becoming_smaller(holders, sizes), new)
    found = message.shapes()
    # Of a node whose operands do not fit together no result is known.
    if not sizes or found is None or not message.results <= found.keys():
        return None
    smaller = _becoming_smaller(holders, sizes)
    cut = {**smaller.tables, **smaller.computed}
    after = {name: smaller.shape(graph.shapes[name], axes) for name, axes in cut.items()}
    return smaller, {**found, **after}


def states_sizes(graph: ChannelGraph) -> bool:
    """Whether the target of some node states the size of an axis without channels.

    Nearly always that size depends on the inputs', and the network takes no smaller ones as it is.
    """
    for name, statements in statements_of(graph).items():
        sizes = dict(_without_channels(graph, name))
        for each in statements:
            if each.value.name == name and each.at(sizes).items() & sizes.items():
                return True
    return False


def _becoming_smaller(holders: Following, sizes: Sizes) -> Following:
    """Of all that holds sizes what holds one of these."""

    def smaller(all_axes: Axes) -> Axes:
        return {
            name: found
            for name, axes in all_axes.items()
            if (found := {axis: size for axis, size in axes.items() if size in sizes})
        }

    held, tables, computed, _ = holders
    return Following(smaller(held), smaller(tables), smaller(computed), sizes)


@analysis
def statements_of(graph: ChannelGraph) -> Mapping[str, Sequence[Stated]]:
    """What states sizes in the original, by name of a node's first result.

    Where weights alone are computed with, sizes stay.
    """
    found = {node.outputs[0].name or "": stated(node) for node in graph.model.graph}
    weights = graph.couplings.input_independent
    return {name: each for name, each in found.items() if each and name not in weights}


@analysis
def _holders(graph: ChannelGraph) -> Following:
    """All that holds sizes of axes without channels."""
    found: dict[str, dict[int, int]] = {}
    for name, statements in statements_of(graph).items():
        for each in statements:
            open_axes = dict(_without_channels(graph, each.value.name or ""))
            sizes = {axis: open_axes[axis] for axis in each.axes if axis in open_axes}
            if each.value.name == name:  # of a target
                states = each.at(sizes)
                sizes = {axis: size for axis, size in sizes.items() if states[axis] == size}
            found.setdefault(name, {}).update(sizes)
    tables = _tables(graph)
    initializers = graph.model.graph.initializers
    return Following(
        found,
        {name: axes for name, axes in tables.items() if name in initializers},
        {name: axes for name, axes in tables.items() if name not in initializers},
        {},
    )


def _tables(graph: ChannelGraph) -> dict[str, dict[int, int]]:
    """What comes of weights alone, with axes that stand beside an activation's, as they are.

    Such an axis stands in the result as well.
    """
    couplings, role = graph.couplings, roles(graph.couplings)
    beside: dict[int, bool] = {}
    for edge in couplings.edges:
        if edge.port >= 0 and couplings.on_weight(edge):
            passes = bool(
                edge.whole and role.on_activations[edge.factor] and role.on_results[edge.factor]
            )
            beside[edge.dim] = passes and beside.get(edge.dim, True)
    names = dict.fromkeys(couplings.dims[dim].value for dim, passes in beside.items() if passes)
    return {
        name: axes
        for name in names
        if (
            axes := {
                axis: size
                for axis, size in _without_channels(graph, name)
                if beside.get(graph.dim(name, axis))
            }
        )
    }


def _without_channels(graph: ChannelGraph, name: str) -> Iterator[tuple[int, int]]:
    for axis, size in enumerate(graph.shapes.get(name, ())):
        if size > 1 and not graph.groups_on(graph.dim(name, axis)):
            yield axis, size


def _new_sizes(
    graph: ChannelGraph, regrouping: Sequence[ir.Node], found: Mapping[str, Shape], known: Sizes
) -> Sizes | None:
    """Smaller sizes that follow from the shapes; ``None``: one is no good, or would be two.

    Nodes that are ``regrouping`` have a target.
    """
    new: Sizes = {}
    for name, small in found.items():
        full = graph.shapes.get(name)
        if full is None or full == small:
            continue
        if not keeps_channels(graph, name, full, small):
            return None
        new |= {a: b for a, b in zip(full, small, strict=True) if a != b}
    for node in regrouping:
        new |= _regrouped(graph, node, found, known)
    if any(known.get(size, smaller) != smaller for size, smaller in new.items()):
        return None
    if any(smaller < min(size, POSITIONS) for size, smaller in new.items()):
        return None
    return {size: smaller for size, smaller in new.items() if size not in known}


def _regrouped(
    graph: ChannelGraph, node: ir.Node, found: Mapping[str, Shape], known: Sizes
) -> Sizes:
    """The sizes of axes that stand for others which have become smaller."""
    operand, result = node.inputs[0], node.outputs[0]
    old = graph.shapes.get(operand.name or "") if operand is not None else None
    small = found.get(operand.name or "") if operand is not None else None
    new = graph.shapes.get(result.name or "")
    if old is None or new is None or small is None or prod(old) != prod(new):
        return {}
    sizes: Sizes = {}
    for before, after in blocks(old, new):
        size = prod(small[axis] for axis in before)
        if size != prod(old[axis] for axis in before):
            sizes |= _shared(size, [new[axis] for axis in after], known)
    return sizes


def _shared(size: int, parts: Sequence[int], known: Sizes) -> Sizes:
    """Which part of an axis that is split becomes smaller, where only one can.

    >>> _shared(24, [8, 7], {}), _shared(16, [8, 4], {}), _shared(12, [4, 7], {7: 3})
    ({7: 3}, {}, {})
    """
    left = [part for part in parts if part not in known]
    rest, whole = size, prod(left)
    for part in parts:
        rest = rest // known[part] if part in known else rest
    if rest == whole:
        return {}
    found = {part: rest * part // whole for part in left if rest * part % whole == 0}
    return found if len(found) == 1 else {}


def window_sizes(graph: ChannelGraph) -> list[int]:
    """Parts of axes without channels that targets split, those of most axes first.

    A window's height and width are a part of every map, at each of its sizes.
    """
    counted: Counter[int] = Counter()
    for node in graph.model.graph:
        operand, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if facts_of(node).target is None or operand is None:
            continue
        old, new = (graph.shapes.get(value.name or "") for value in (operand, result))
        if old is None or new is None or prod(old) != prod(new):
            continue
        open_axes = {axis for axis, _ in _without_channels(graph, operand.name or "")}
        for before, after in blocks(old, new):
            if len(before) == 1 < len(after) and open_axes.issuperset(before):
                counted.update({new[axis] for axis in after})
    return [size for size, _ in counted.most_common()]


class _Message:
    """The message that shapes are inferred of, into which smaller sizes are written.

    Args:
        graph: the lifted original.
        inputs: smaller shapes of its inputs.
        holders: all that holds sizes.
    """

    def __init__(
        self, graph: ChannelGraph, inputs: Mapping[str, Shape], holders: Following
    ) -> None:
        self.proto = onnx.ModelProto.FromString(written(graph).message(inputs))
        self._content = b""
        self._shapes: dict[str, Shape] | None = None
        self._graph = graph
        self._initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._inputs = {value.name: value for value in self.proto.graph.input}
        self._holding = [
            (node, proto)
            for node, proto in zip(graph.model.graph, self.proto.graph.node, strict=True)
            if proto.output[0] in holders.stated
            or not holders.computed.keys().isdisjoint(proto.output)
        ]

    def shapes(self) -> dict[str, Shape] | None:
        """Those that follow from what is written, by name; inferred where that has changed."""
        content = self.proto.SerializeToString()
        if content != self._content:
            self._content, self._shapes = content, inferred(content, strict=False)
        return self._shapes

    @property
    def results(self) -> frozenset[str]:
        """The names of all results of nodes."""
        return frozenset(name for node in self.proto.graph.node for name in node.output if name)

    def restate(self, smaller: Following, new: Sizes) -> None:
        """Write smaller sizes, of which some are new."""
        for name, axes in smaller.tables.items():
            for axis, size in axes.items():
                self._initializers[name].dims[axis] = smaller.sizes[size]
        statements = statements_of(self._graph)
        for node, proto in self._holding:
            for k, value in enumerate(node.outputs):
                name = value.name or ""
                if name in smaller.computed and value.dtype is not None:
                    # Whoever reads it finds an input instead, of the shape that is cut out of it.
                    proto.output[k] = f"{name}/whole"
                    self._give(name, value.dtype, smaller)
            first = node.outputs[0].name or ""
            axes = smaller.stated.get(first, {})
            for each in statements[first] if not new.keys().isdisjoint(axes.values()) else ():
                proto.input[each.port] = self._constant(
                    f"{first}/{each.port}", each.moved(axes, smaller.sizes)
                )

    def _give(self, name: str, dtype: ir.DataType, smaller: Following) -> None:
        """An input of the smaller shape of what is computed."""
        if name not in self._inputs:
            self._inputs[name] = self.proto.graph.input.add()
        shape = smaller.shape(self._graph.shapes[name], smaller.computed[name])
        info = onnx.helper.make_tensor_value_info(name, dtype.value, shape)
        self._inputs[name].CopyFrom(info)

    def _constant(self, name: str, numbers: IntArray) -> str:
        """The name of an initializer that holds these numbers."""
        if name not in self._initializers:
            self._initializers[name] = self.proto.graph.initializer.add()
        self._initializers[name].CopyFrom(onnx.numpy_helper.from_array(np.asarray(numbers), name))
        return name
