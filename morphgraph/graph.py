"""The channel-dependency graph: dims and factors, and the groups of channels that they tie.

A *dim* is one axis of one value, a *factor* one letter of one operator's notation. An edge says
that the factor stands on that axis, and its index map which positions belong to which element.
Both are the graph's *vertices*; those of the same size joined by identity maps form a *class* and
share their positions. A *channel*
is what the remaining maps tie together across classes, and channels with the same members form a
*group*: they can be removed one by one, and each costs the same.

Everything here is data; the passes ``couple`` and ``group`` fill it in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import msgspec
import numpy as np
import onnx_ir as ir
from scipy import sparse

from morphgraph.arrays import Flags, FloatArray, IntArray, Shape
from morphgraph.options import Attention as Attention

if TYPE_CHECKING:
    import networkx as nx

_Cached = TypeVar("_Cached", "Couplings", "ChannelGraph")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def analysis(
    function: "Callable[Concatenate[_Cached, _Arguments], _Result]",
) -> "Callable[Concatenate[_Cached, _Arguments], _Result]":
    """Decorator of a function of a graph: the result stays on the graph, by the other arguments."""

    @wraps(function)
    def remembered(
        graph: _Cached, /, *arguments: _Arguments.args, **options: _Arguments.kwargs
    ) -> _Result:
        key = (function, *arguments, *sorted(options.items()))
        if key not in graph.cache:
            graph.cache[key] = function(graph, *arguments, **options)
        result: _Result = graph.cache[key]
        return result

    return remembered


class LiftOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a model was lifted: which groups it has, and of what width, depends on it.

    ``attention`` says whether attentions shrink by whole heads, by query heads within the groups
    that share keys and values, by every head's size, or by all of these,
    ``pin_outputs`` whether graph outputs keep their size, ``pin_rows`` whether tables keep the rows
    that are named by number at run time (the tokens of an embedding), ``input_shapes`` the sizes of
    inputs that the file leaves open, and ``fixed`` the values that inputs are fixed to.
    """

    attention: Attention = "heads"
    pin_outputs: bool = True
    pin_rows: bool = True
    input_shapes: dict[str, tuple[int, ...]] = {}
    fixed: dict[str, bool | int | float | list[Any]] = {}

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of ``lift``.

        >>> LiftOptions(attention="head-dim").arguments()["attention"]
        'head-dim'
        """
        return msgspec.structs.asdict(self)


@dataclass(frozen=True, slots=True, order=True)
class Dim:
    """One axis of one value."""

    value: str
    axis: int


@dataclass(frozen=True, slots=True, order=True)
class OpFactor:
    """One factor of one operator, which has this name in the model."""

    op: str
    name: str


@dataclass(frozen=True, slots=True)
class Member:
    """An axis on which a group stands, with the positions that one channel takes there."""

    value: str
    axis: int
    per_channel: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Why a class keeps its size, and how the reason came to it.

    Classes are numbers in ``ChannelGraph.vertex_class``. Finer factors that no operator names have
    a class, but no dim or factor.

    Attributes:
        reason: where it arose, as a person would say it.
        vertex: the dim or factor of the class at which it came in; ``None`` where it has none.
        source: the class that it came from; ``None`` where it arose here.
        source_vertex: the dim or factor of that class; ``None`` where it has none.
        through: index of the operator between them; where the reason arose within an operator's
            axis, of that operator.
    """

    reason: str
    vertex: int | None
    source: int | None = None
    source_vertex: int | None = None
    through: int | None = None


@dataclass(frozen=True)
class Group:
    """Channels that live and die one by one, each at the same cost.

    Attributes:
        index: place in ``ChannelGraph.groups`` and in every widths vector.
        id: depends on the model alone; the key in plan files.
        name: the layers that produce it, as a person would say it.
        width: number of channels.
        reason: why it keeps its size; ``None`` where it may be resized.
        held: it could be resized, and is where ``include`` names it.
        statistical: some operator normalizes, averages or competes over it.
        producers: layers whose weights make these channels.
        readers: layers that sum over them.
        channels: ids of its channels, in the order of the first producer's axis.
        stands_on: the classes that it stands on: the dims of each, and the positions per channel.
        pinned_by: the class in ``ChannelGraph.pins`` that the reason is of; -1 where there is none.
    """

    index: int
    id: str
    name: str
    width: int
    reason: str | None
    statistical: bool
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: IntArray = field(repr=False, compare=False)
    stands_on: tuple[tuple[Sequence[Dim], int], ...] = field(repr=False, compare=False)
    pinned_by: int = field(default=-1, repr=False, compare=False)
    held: bool = False

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The axes on which it stands."""
        return tuple(
            Member(dim.value, dim.axis, per_channel)
            for dims, per_channel in self.stands_on
            for dim in dims
        )

    @property
    def resizable(self) -> bool:
        """Whether a plan may change its width, without being asked for it."""
        return self.reason is None

    @property
    def can_change(self) -> bool:
        """Whether a plan may change its width where somebody asks for it."""
        return self.reason is None or self.held


@dataclass(frozen=True, slots=True)
class GraphOp:
    """An operator of the model with the ids of its factors.

    ``macs`` are the cost terms as factor ids. ``silent`` names for an operand the one that holds
    what adds nothing to a sum over it, where that is not 0. ``captured`` names values that its
    subgraphs read.
    """

    ir: ir.Node
    name: str
    layer: str
    factors: Mapping[str, int]
    macs: tuple[tuple[int, ...], ...]
    contracted: frozenset[str]
    statistical: frozenset[str]
    gate: bool
    silent: Mapping[int, int]
    broadcast: frozenset[str]
    captured: tuple[str, ...]
    opaque: str | None


class Edge(NamedTuple):
    """A factor on an axis: both as vertex ids, with the index map (``morphgraph.ops.IndexMap``).

    ``port`` is the operand's index or ``~k`` for result ``k``, ``op_index`` the operator's place in
    ``ChannelGraph.ops``; ``whole`` says that the map is the identity on the whole axis.
    """

    factor: int
    dim: int
    map: Any
    port: int
    op_index: int
    whole: bool


class EdgeColumns(NamedTuple):
    """The edges column by column, ``[edges]`` each, for arithmetic over all of them.

    ``on_weight`` says whether a factor stands there on a value that no graph input reaches.
    """

    factor: IntArray
    dim: IntArray
    port: IntArray
    op_index: IntArray
    whole: Flags
    on_weight: Flags


@dataclass(frozen=True, eq=False)
class Couplings:
    """What the pass ``couple`` found: dims first, then factors, in one numbering (*vertices*).

    ``input_independent`` names the values that no graph input reaches: weights, and what is
    computed from them alone, ``rows`` the factors whose elements are rows of a weight, named by
    number at run time. ``ties`` are pairs of factors with the same elements in the same order: an
    axis whose positions are numbered, and one that is read by these numbers. ``least`` says how
    many elements a factor must have, ``numbered`` by operator which of its results hold positions
    of which factor, ``multiples`` what the number of a factor's elements must be a multiple of.
    """

    model: ir.Model
    first_dim: Mapping[str, int]
    shapes: Mapping[str, Shape]
    dims: Sequence[Dim]
    factors: Sequence[OpFactor]
    sizes: IntArray
    ops: Sequence[GraphOp]
    edges: Sequence[Edge]
    pins: Mapping[int, str]
    input_independent: frozenset[str]
    preferences: Mapping[int, tuple[str, ...]]
    reluctant: frozenset[int]
    eager: frozenset[int]
    sharing: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()
    ties: Sequence[tuple[int, int]] = ()
    least: Mapping[int, int] = field(default_factory=dict)
    numbered: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    indexed: frozenset[int] = frozenset()
    multiples: Mapping[int, int] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def on_weight(self, edge: Edge) -> bool:
        """Whether a factor stands there on a value that no graph input reaches."""
        return self.dims[edge.dim].value in self.input_independent

    def on_activation(self, edge: Edge) -> bool:
        """Whether a factor stands there on an operand that a graph input reaches."""
        return edge.port >= 0 and not self.on_weight(edge)

    @cached_property
    def followers(self) -> frozenset[int]:
        """The indexed factors whose numbers are those of the elements that stay."""
        return self.indexed.intersection(follower for _, follower in self.ties)

    @cached_property
    def columns(self) -> EdgeColumns:
        """The edges as arrays."""
        of_weights = np.zeros(len(self.dims), dtype=bool)
        for name, first in self.first_dim.items():
            if name in self.input_independent:
                of_weights[first : first + len(self.shapes[name])] = True
        columns: Sequence[Any] = list(zip(*self.edges, strict=True)) or [()] * len(Edge._fields)
        factors, dims, _, ports, op_indices, whole = columns
        of_dims = np.array(dims, dtype=np.int64)
        return EdgeColumns(
            factor=np.array(factors, dtype=np.int64),
            dim=of_dims,
            port=np.array(ports, dtype=np.int64),
            op_index=np.array(op_indices, dtype=np.int64),
            whole=np.array(whole, dtype=np.bool_),
            on_weight=of_weights[of_dims],
        )

    def factor(self, vertex: int) -> OpFactor:
        """The factor with this id."""
        return self.factors[vertex - len(self.dims)]

    @cached_property
    def edges_of_ops(self) -> Sequence[Sequence[Edge]]:
        """The edges of every operator, by its place in ``ops``."""
        listed: list[list[Edge]] = [[] for _ in self.ops]
        for edge in self.edges:
            listed[edge.op_index].append(edge)
        return listed


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """A model with its couplings, channels and groups.

    Attributes:
        couplings: dims, factors and edges.
        groups: the channel groups, pinned ones included, in the model's order.
        vertex_class: class of every dim and factor, ``[vertices]``.
        class_start: first atom of every class, ``[classes + 1]``; atoms are (class, position).
        atom_channel: channel of every atom, ``[atoms]``.
        channel_group: group of every channel, -1 where nobody would resize it, ``[channels]``.
        per_channel: positions per channel, ``[classes, groups]`` sparse.
        fixed_size: positions that belong to no listed group, ``[classes]``.
        pins: per class that keeps its size the reason, and how it came there.
        options: how the model was lifted.
        base: of every class the one whose positions it has: itself, or another that it is a further
            view of (:mod:`morphgraph.passes.coupling.views`). Vertices are in no further view.
        units: in how many positions ``per_channel`` and ``fixed_size`` count; 1 but for classes of
            several views, ``[classes]``.
    """

    couplings: Couplings
    groups: tuple[Group, ...]
    vertex_class: IntArray
    class_start: IntArray
    atom_channel: IntArray
    channel_group: IntArray
    per_channel: sparse.csr_array
    fixed_size: FloatArray
    pins: Mapping[int, Pin] = field(default_factory=dict)
    options: LiftOptions = field(default_factory=LiftOptions)
    base: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    units: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model(self) -> ir.Model:
        """The canonical model."""
        return self.couplings.model

    @property
    def ops(self) -> Sequence[GraphOp]:
        """The operators in topological order."""
        return self.couplings.ops

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Static shape of every value that has dims."""
        return self.couplings.shapes

    @cached_property
    def widths(self) -> IntArray:
        """The present width of every group, ``[groups]``."""
        return np.array([group.width for group in self.groups], dtype=np.int64)

    @cached_property
    def batch(self) -> int:
        """Samples that one run computes: the leading axis of the first graph input."""
        first = next(iter(self.model.graph.inputs), None)
        shape = () if first is None else self.shapes.get(first.name or "", ())
        return shape[0] if len(shape) > 1 else 1

    def group(self, name: str) -> Group:
        """The group with this id or name.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if name in (group.id, group.name):
                return group
        raise KeyError(name)

    def dim(self, value: str, axis: int) -> int:
        """The id of an axis of a value."""
        return self.couplings.first_dim[value] + axis

    def edges_of(self, op_index: int) -> Sequence[Edge]:
        """The edges of one operator."""
        return self.couplings.edges_of_ops[op_index]

    @cached_property
    def makers(self) -> Mapping[str, int]:
        """By value the index of the operator that makes it; none for inputs and initializers."""
        return {
            value.name: op_index
            for op_index, op in enumerate(self.ops)
            for value in op.ir.outputs
            if value.name
        }

    def groups_in(self, axis_class: int) -> frozenset[int]:
        """Indices of the groups with channels in a class."""
        known = self._groups_in
        if axis_class not in known:
            known[axis_class] = frozenset([k for k, _ in self.members_in(axis_class)])
        return known[axis_class]

    @cached_property
    def _groups_in(self) -> dict[int, frozenset[int]]:
        return {}

    def members_in(self, axis_class: int) -> list[tuple[int, float]]:
        """The groups with channels in a class, and how many positions one of these takes."""
        further = self._further.get(axis_class)
        if further is None:
            return self._members[axis_class]
        return [member for view in (axis_class, *further) for member in self._members[view]]

    @cached_property
    def _members(self) -> Sequence[list[tuple[int, float]]]:
        """By view the groups with channels there, and how many positions one of these takes."""
        matrix = self.per_channel
        taken = matrix.data * np.repeat(self.units, np.diff(matrix.indptr))
        pairs = list(zip(matrix.indices.tolist(), taken.tolist(), strict=True))
        return [pairs[start:stop] for start, stop in pairwise(matrix.indptr.tolist())]

    def views(self, axis_class: int) -> tuple[int, ...]:
        """A class and its further views."""
        return (axis_class, *self._further.get(axis_class, ()))

    @cached_property
    def _further(self) -> Mapping[int, list[int]]:
        found: dict[int, list[int]] = {}
        for view in np.flatnonzero(self.base != np.arange(len(self.base))).tolist():
            found.setdefault(int(self.base[view]), []).append(view)
        return found

    def groups_on(self, vertex: int) -> frozenset[int]:
        """Indices of the groups with channels on an axis, or among a factor's elements."""
        return self.groups_in(int(self.vertex_class[vertex]))

    def channels_of(self, vertex: int) -> IntArray:
        """The channel at every position of a dim or element of a factor, ``[size]``."""
        axis_class = self.vertex_class[vertex]
        return self.atom_channel[self.class_start[axis_class] : self.class_start[axis_class + 1]]

    def channels_by_view(self, vertex: int) -> list[IntArray]:
        """The channels at every position of a dim in each of its class's views, ``[size]`` each."""
        views = self.views(int(self.vertex_class[vertex]))
        starts = self.class_start
        return [self.atom_channel[starts[view] : starts[view + 1]] for view in views]

    def channels_at(self, value: str, axis: int) -> IntArray:
        """The channel at every position of an axis, ``[size]``."""
        return self.channels_of(self.dim(value, axis))

    def class_sizes(self, widths: FloatArray | IntArray) -> FloatArray:
        """Size of every class at these group widths, ``[classes]``; of a further view its own."""
        sizes = self.view_sizes(widths)
        for axis_class, further in self._further.items():
            sizes[axis_class] *= sizes[further].prod() * self.left_out(axis_class)
        return sizes

    def left_out(self, axis_class: int) -> float:
        """What the product of a class's views has to be multiplied with to be its size.

        So often every pair of their channels stands there, as a head's element in queries, keys and
        values side by side.
        """
        views = self.views(axis_class)
        if len(views) == 1:
            return 1.0
        whole = np.diff(self.class_start)[list(views)]
        return float(whole[0] // (whole // self.units[list(views)]).prod())

    def view_sizes(self, widths: FloatArray | IntArray) -> FloatArray:
        """How many of its units every view leaves at these group widths, ``[classes]``."""
        sizes: FloatArray = self.per_channel @ np.asarray(widths, dtype=np.float64)
        sizes += self.fixed_size
        return sizes

    @cached_property
    def per_group(self) -> sparse.csr_array:
        """The transpose of ``per_channel``, ``[groups, classes]``."""
        return self.per_channel.T.tocsr()

    def alive(self, keep: Mapping[int, IntArray]) -> Flags:
        """Which channels stay, ``[channels]``: per group index the kept channels, 0-based."""
        alive = np.ones(len(self.channel_group), dtype=bool)
        for index, kept in keep.items():
            channels = self.groups[index].channels
            alive[channels] = False
            alive[channels[kept]] = True
        return alive

    @cached_property
    def networkx(self) -> "nx.Graph[Dim | OpFactor]":
        """The bipartite graph of :class:`Dim` and :class:`OpFactor`, edges with ``map``."""
        import networkx as nx  # takes longer than all of morphgraph

        named: list[Dim | OpFactor] = [*self.couplings.dims, *self.couplings.factors]
        graph: nx.Graph[Dim | OpFactor] = nx.Graph()
        graph.add_nodes_from(
            (node, {"size": int(size)})
            for node, size in zip(named, self.couplings.sizes, strict=True)
        )
        graph.add_edges_from(
            (named[edge.factor], named[edge.dim], {"map": edge.map})
            for edge in self.couplings.edges
        )
        return graph
