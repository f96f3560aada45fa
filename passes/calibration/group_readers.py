"""The readers of groups: which inputs of which linear layers a channel is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import static_shape
from morphgraph.passes.calibration.chosen import Chosen
from morphgraph.passes.calibration.dense import Dense
from morphgraph.passes.calibration.fused import Fused
from morphgraph.passes.calibration.logits import Logits
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.coupling.roles import roles


@dataclass(frozen=True, eq=False)
class GroupReaders:
    """The readers of a group.

    Attributes:
        group: the group.
        blocks: by the name of each reader the inputs of every channel, taps apart,
            ``[channels, inputs per channel]``.
        complete: whether all that sums over the group's channels are among them, and nothing
            normalizes over them: then other kernels in the readers are the same as other widths.
        products: by the name of each product of activations that can be made up for the elements
            of every channel, ``[channels, elements per channel]``.
        stacks: by the name of each product with a stack of kernels, and of the kernels of each
            mixture in one node, the inputs of every channel, ``[channels, inputs per channel]``.
        tied: by the name of each linear operator whose kernel others share the inputs of every
            channel, as of ``blocks``.
    """

    group: Group
    blocks: Mapping[str, IntArray]
    complete: bool
    products: Mapping[str, IntArray] = field(default_factory=dict)
    stacks: Mapping[str, IntArray] = field(default_factory=dict)
    tied: Mapping[str, IntArray] = field(default_factory=dict)


def group_readers(
    graph: ChannelGraph,
    found: Mapping[str, Reader],
    compared: Sequence[Logits] = (),
    of_experts: Mapping[str, Chosen | Fused | Dense] = MappingProxyType({}),
    tied: Mapping[str, Reader] = MappingProxyType({}),
) -> dict[int, GroupReaders]:
    """The readers of every group that a plan may change, by group index.

    Args:
        graph: the lifted network.
        found: linear layers by name.
        compared: products of queries and keys.
        of_experts: products with stacks of kernels, and mixtures in one node, by name.
        tied: linear operators whose kernels others share.
    """
    products = _of_products(graph, compared)
    chosen = {k: each for k, each in of_experts.items() if not isinstance(each, Fused)}
    fused = {k: each for k, each in of_experts.items() if isinstance(each, Fused)}
    in_one = {each.taker[0] for each in fused.values()}
    role, couplings = roles(graph.couplings), graph.couplings
    blocks: dict[int, dict[str, IntArray]] = {}
    stacks: dict[int, dict[str, IntArray]] = {}
    shared: dict[int, dict[str, IntArray]] = {}
    other: set[int] = set()
    for edge in couplings.edges:
        # The axis may hold more: heads, each of which an attention sums over by itself.
        on_them = graph.groups_on(edge.factor)
        name = graph.ops[edge.op_index].name
        inside = role.sums_state[edge.factor] and edge.port >= 0 and name not in in_one
        if role.normalizes[edge.factor] or inside:
            other |= on_them
        if not role.sums[edge.factor] or not couplings.on_activation(edge) or name in in_one:
            continue
        reader, stack = found.get(name), chosen.get(name)
        if stack is not None and edge.port != stack.port:
            continue  # its kernels, each of which takes over for its own
        dim = couplings.dims[edge.dim]
        for index in on_them:
            inputs, group = None, graph.groups[index]
            if reader is not None and edge.port == reader.linear.operand:
                inputs = _inputs(graph, reader, group, edge.dim, dim.axis)
            elif stack is not None and dim.axis == stack.reduced:
                inputs = _inputs_of(graph, group, edge.dim, (1, stack.inputs))
            elif name in tied and edge.port == tied[name].linear.operand:
                own = _inputs(graph, tied[name], group, edge.dim, dim.axis)
                if own is not None:
                    shared.setdefault(index, {})[name] = own
            if inputs is None:
                other.add(index)
            else:
                (blocks if stack is None else stacks).setdefault(index, {})[name] = inputs
    for index, mine in blocks.items():
        for name in [name for name, at in mine.items() if not _read_alike(found[name], mine, at)]:
            del mine[name]
            other.add(index)
    for name, mixture in fused.items():
        columns = graph.dim(mixture.stack, 2)
        for index in graph.groups_on(columns):
            inputs = _inputs_of(graph, graph.groups[index], columns, (1, mixture.inputs))
            if inputs is None:
                other.add(index)
            else:
                stacks.setdefault(index, {})[name] = inputs
    return {
        index: GroupReaders(
            graph.groups[index],
            blocks.get(index, {}),
            index not in other,
            products.get(index, {}),
            stacks.get(index, {}),
            shared.get(index, {}),
        )
        for index in sorted({*blocks, *products, *stacks})
        if graph.groups[index].can_change
    }


def _read_alike(reader: Reader, own: Mapping[str, IntArray], inputs: IntArray) -> bool:
    """Whether a group's channels are the same inputs to all that share a reader's kernel."""
    return all(name in own and np.array_equal(own[name], inputs) for name in reader.peers)


def _of_products(graph: ChannelGraph, compared: Sequence[Logits]) -> dict[int, dict[str, IntArray]]:
    """By group index, by product the elements of every channel."""
    found: dict[int, dict[str, IntArray]] = {}
    for each in compared:
        standing = graph.channels_of(each.summed)
        for index in graph.groups_on(each.summed):
            elements = _standing(standing, graph.groups[index])
            if elements is not None:
                found.setdefault(index, {})[each.name] = each.elements(elements)
    return found


def _inputs(
    graph: ChannelGraph, reader: Reader, group: Group, vertex: int, axis: int
) -> IntArray | None:
    """The inputs of every channel of a group in each of a reader's maps; ``None``: they differ."""
    rank = len(static_shape(reader.operand))
    if axis != reader.linear.input_axis(rank):
        return None
    maps, _, inputs, _ = reader.matrix_shape
    return _inputs_of(graph, group, vertex, (maps, inputs))


def _inputs_of(
    graph: ChannelGraph, group: Group, vertex: int, shape: tuple[int, int]
) -> IntArray | None:
    """The same where the axis holds the inputs of all maps, ``(maps, inputs)``.

    Or bytes, each of which holds several.
    """
    maps, inputs = shape
    views = [v for v in graph.channels_by_view(vertex) if np.isin(group.channels, v).any()]
    if len(views) != 1:
        return None
    in_byte = max(maps * inputs // len(views[0]), 1)
    standing = np.repeat(views[0], in_byte).reshape(-1, inputs)
    if len(standing) != maps or (standing != standing[:1]).any():
        return None
    return _standing(standing[0], group)


def _standing(channels: IntArray, group: Group) -> IntArray | None:
    """Where every channel of a group stands, ``[channels, places]``; ``None``: they differ."""
    places = np.argsort(channels, kind="stable")
    sorted_channels = channels[places]
    first = np.searchsorted(sorted_channels, group.channels)
    count = np.searchsorted(sorted_channels, group.channels, side="right") - first
    if len(count) == 0 or (count != count[0]).any() or not count[0]:
        return None
    return places[first[:, None] + np.arange(count[0])]
