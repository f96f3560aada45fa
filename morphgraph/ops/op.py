"""What an operator is: its factors, where they stand, what it costs, how it is resized and lowered.

One entry per operator, in one file of this package, holds everything that the program knows of it::

    @op("Gemm")
    class Gemm(Op):
        @staticmethod
        def describe(n, *, transA=0, ...) -> Description: ...      # notation and cost
        @staticmethod
        def resize(n, new, *, ...) -> None: ...                    # attributes that hold sizes
        @staticmethod
        def lower(b, n, *, ...) -> Lowered: ...                    # the torch module it becomes

The keyword-only parameters of these functions are the ONNX attributes with their ONNX defaults, so
that attributes are parsed in one place: :meth:`Op.call`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.notation import Binding, NotationError, bind
from morphgraph.onnx_io import static_shape
from morphgraph.ops.plugins import load_plugins
from morphgraph.ops.resizing import Resizing


@dataclass(frozen=True, slots=True)
class IndexMap:
    """Which positions of an axis belong to which element of a factor.

    Regular maps: element ``e`` of a factor of size ``n`` stands at the positions
    ``offset + (r * n + e) * inner + q`` for all ``r < outer`` and ``q < inner``. The identity is
    ``IndexMap()``; a product axis that carries its outer factor has ``inner > 1`` (blocks), one
    that carries its inner factor ``outer > 1`` (strides); a segment of a concatenation has an
    offset. Irregular maps hold a table of (element, position) pairs.
    """

    outer: int = 1
    inner: int = 1
    offset: int = 0
    table: tuple[IntArray, IntArray] | None = None

    @property
    def starts(self) -> bool:
        """Whether the elements stand side by side, in order, from the first position on."""
        return self is IDENTITY or (
            self.table is None and self.outer == 1 and self.inner == 1 and self.offset == 0
        )

    def pairs(self, size: int) -> tuple[IntArray, IntArray]:
        """All (element, position) pairs of a factor of this size, as two arrays of equal length.

        >>> IndexMap(outer=2, inner=1).pairs(3)
        (array([0, 1, 2, 0, 1, 2]), array([0, 1, 2, 3, 4, 5]))
        """
        if self.table is not None:
            return self.table
        count = self.outer * size * self.inner
        elements = np.arange(count) // self.inner % size
        return elements, self.offset + np.arange(count)


IDENTITY = IndexMap()


class Place(NamedTuple):
    """Where a factor stands: ``port`` is an operand's index, or ``~k`` for result ``k``."""

    port: int
    axis: int
    map: IndexMap = IDENTITY


@dataclass(slots=True)
class Factor:
    """One factor of one node. ``pinned`` says why it keeps its size; ``None``: it may change."""

    name: str
    size: int
    pinned: str | None = None
    places: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Description:
    """What an operator does to its axes.

    Attributes:
        factors: by name; an axis on which no factor stands keeps its size.
        macs: cost terms; each is a tuple of factor names whose sizes multiply (the batch included).
        contracted: factors summed over so that a zero there contributes nothing.
        statistical: factors over which the op normalizes, averages or competes: removing a channel
            changes what the others become.
        prefer: factor names, best first, to carry a product axis.
        eager, reluctant: factors that carry a product axis before all others, or only if nobody
            else does (attention's heads and head size).
        gate: the operands multiply, so that one dead operand silences the channel.
        silent: operands in which not 0 but another operand (its zero point) adds nothing to a sum.
        broadcast: factors over which an operand of size 1 is repeated, as ONNX broadcasts.
        opaque: why nothing is known of the op, for one without an entry.
    """

    factors: dict[str, Factor] = field(default_factory=dict)
    macs: tuple[tuple[str, ...], ...] = ()
    contracted: frozenset[str] = frozenset()
    statistical: frozenset[str] = frozenset()
    prefer: tuple[str, ...] = ()
    eager: frozenset[str] = frozenset()
    reluctant: frozenset[str] = frozenset()
    gate: bool = False
    silent: Mapping[int, int] = field(default_factory=dict)
    broadcast: frozenset[str] = frozenset()
    opaque: str | None = None

    def add(
        self, name: str, size: int, places: Iterable[Place], pinned: str | None = None
    ) -> Factor:
        """Put a factor with a name of its own into the description."""
        assert name not in self.factors, name
        factor = self.factors[name] = Factor(name, size, pinned, list(places))
        return factor

    def pin(self, port: int, axis: int, size: int, reason: str) -> None:
        """Say that an axis keeps its size."""
        self.add(f"_{port}_{axis}", size, [Place(port, axis)], reason)


class OpNode:
    """An ONNX node as the entry of its operator sees it.

    ``in_shapes`` and ``out_shapes`` are static shapes (``None`` for an absent operand or result),
    ``weights`` the values that depend on no graph input.
    """

    __slots__ = ("domain", "in_shapes", "ir", "name", "op_type", "out_shapes", "weights")

    def __init__(
        self,
        node: ir.Node,
        weights: frozenset[str] = frozenset(),
        shape_of: Callable[[ir.Value], Shape] = static_shape,
    ) -> None:
        self.ir = node
        self.name = node.name or ""
        self.op_type = node.op_type
        self.domain = node.domain
        self.in_shapes = [None if v is None else shape_of(v) for v in node.inputs]
        self.out_shapes = [shape_of(v) if v.name else None for v in node.outputs]
        self.weights = weights

    @property
    def opset(self) -> int:
        """The version of the operator's domain that the model declares."""
        graph = self.ir.graph
        versions = graph.opset_imports if isinstance(graph, ir.Graph) else {}
        return versions.get(self.domain, 20)

    def has(self, i: int) -> bool:
        """Whether operand ``i`` is present."""
        return i < len(self.in_shapes) and self.in_shapes[i] is not None

    def shape(self, i: int = 0) -> Shape:
        """The static shape of operand ``i``."""
        shape = self.in_shapes[i]
        assert shape is not None
        return shape

    def out(self, k: int = 0) -> Shape:
        """The static shape of result ``k``."""
        shape = self.out_shapes[k]
        assert shape is not None
        return shape

    def is_weight(self, i: int) -> bool:
        """Whether operand ``i`` depends on parameters and constants alone."""
        value = self.ir.inputs[i]
        return value is not None and (value.name or "") in self.weights

    def const(self, i: int) -> Array | None:
        """The value of operand ``i`` where it is a constant, else ``None``."""
        if not self.has(i):
            return None
        value = self.ir.inputs[i]
        assert value is not None
        return None if value.const_value is None else value.const_value.numpy()

    def ints(self, i: int, attribute: Sequence[int] | None = None) -> tuple[int, ...] | None:
        """Integers that newer opsets take as operand ``i`` and older ones as an attribute."""
        if attribute is not None:
            return tuple(attribute)
        value = self.const(i)
        return None if value is None else tuple(int(x) for x in value.reshape(-1))


class Op:
    """Base of all entries; ``describe`` is what every entry must have.

    Passes compare no operator names: they ask for these facts. The defaults are those of an
    operator without any, which is what :func:`facts_of` returns where there is no entry.

    Attributes:
        moves: the results hold the operands' numbers as they are, elsewhere.
        adds: the result is the sum of all operands.
        subtracts: the result is the first operand less the second.
        open_at_zero: a function of one operand that is not zero at zero.
        foldable: a node with constant operands may be replaced by what it computes. Not so for
            random numbers, for what is meant to stay as it is written (quantization, dropout), and
            for what ONNX's reference implementation computes too slowly.
        bounded: the results' sizes depend on the data, but no result has more numbers than the rank
            times the size of an operand.
        scale: the operand that alone scales every channel.
        shift: the operand that is added to every channel, one number for each position of
            ``shift_axis`` of the result, times the attribute named ``shift_factor`` if it is there.
        statistics: operands that hold running statistics of a norm, which training updates without
            a gradient.
        zeros: operands that mean zero where they are absent (biases, initial states).
        shape: the results' shapes for an operator of which ONNX infers none. It takes the operands'
            shapes (``None`` for an absent one) and returns one shape, or a list of them.
        initial: per operand that is a layer's weight how PyTorch draws it
            (:class:`~morphgraph.ops.initial.Initial`), for training from scratch.
        origin: file and line where a user taught the operator; empty for the program's own.
    """

    moves: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    subtracts: ClassVar[bool] = False
    open_at_zero: ClassVar[bool] = False
    foldable: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    scale: ClassVar[int | None] = None
    shift: ClassVar[int | None] = None
    shift_axis: ClassVar[int] = 1
    shift_factor: ClassVar[str] = ""
    statistics: ClassVar[tuple[int, ...]] = ()
    zeros: ClassVar[tuple[int, ...]] = ()
    describe: ClassVar[Callable[..., Description]]
    shape: ClassVar[Callable[..., Shape | Sequence[Shape | None]] | None] = None
    resize: ClassVar[Callable[..., None] | None] = None
    initial: ClassVar[Callable[..., Mapping[int, Any]] | None] = None
    lower: ClassVar[Callable[..., Any] | None] = None
    origin: ClassVar[str] = ""

    @classmethod
    def call(cls, function: Callable[..., Any], node: ir.Node, *args: Any) -> Any:
        """Call one of the entry's functions with the node's attributes as keyword arguments.

        It gets those that it names, or all where it takes ``**attributes``.
        """
        wanted = _keywords(function)
        given = {
            name: attribute_value(attribute)
            for name, attribute in node.attributes.items()
            if wanted is None or name in wanted
        }
        return function(*args, **given)


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def attribute_value(attribute: ir.Attr) -> Any:
    """The Python value of an ONNX attribute: int, float, str, tuple, or what onnx_ir holds."""
    value = attribute.value
    return tuple(value) if isinstance(value, list) else value


_REGISTRY: dict[tuple[str, str], type[Op]] = {}


def op(*op_types: str, domain: str = "") -> Callable[[type[Op]], type[Op]]:
    """Class decorator: this entry describes these operators of a domain."""

    def enter(entry: type[Op]) -> type[Op]:
        for op_type in op_types:
            if (domain, op_type) in _REGISTRY:
                raise ValueError(f"{domain or 'ai.onnx'}::{op_type} has an entry already")
            _REGISTRY[domain, op_type] = entry
        return entry

    return enter


def entry_of(op_type: str, domain: str = "") -> type[Op] | None:
    """The entry of an operator, or ``None`` if nobody has described it.

    Plugins are looked for when the first operator turns up that nobody here knows.
    """
    found = lookup(op_type, domain)
    if found is None:
        load_plugins()
        found = lookup(op_type, domain)
    return found


def lookup(op_type: str, domain: str = "") -> type[Op] | None:
    """The entry of an operator so far; no plugin is asked."""
    return _REGISTRY.get(("" if domain == "ai.onnx" else domain, op_type))


def facts_of(node: ir.Node | OpNode) -> type[Op]:
    """The entry of a node's operator, for its facts; :class:`Op`, which has none, for an unknown.

    >>> facts_of(ir.node("BatchNormalization", [])).statistics
    (3, 4)
    >>> facts_of(ir.node("Unheard", [], domain="com.acme")).statistics
    ()
    """
    return entry_of(node.op_type, node.domain) or Op


def mismatch_hint(entry: type[Op] | None) -> str:
    """What to do where an entry and a node do not fit together, as it stands in a message."""
    if entry is None or not entry.origin:
        return "the model's weights and inputs do not belong together"
    return f"correct what {entry.origin} registers, or the model"


def unregister(op_type: str, domain: str = "") -> None:
    """Take an operator's entry back, so that it can be described anew."""
    _REGISTRY.pop((domain, op_type), None)


def described_ops() -> list[str]:
    """All operators that have an entry, as ``Type`` or ``domain::Type``, sorted."""
    return sorted(f"{domain}::{kind}" if domain else kind for domain, kind in _REGISTRY)


_UPPER = {"N": "batch", "S": "space", "T": "space", "K": "kernel"}


def from_line(
    n: OpNode,
    line: str,
    sizes: Mapping[str, int] | None = None,
    *,
    macs: str | None = None,
    contracted: str = "",
    statistical: str = "",
    prefer: str = "",
    eager: str = "",
    reluctant: str = "",
    gate: bool = False,
    reason: str = "",
) -> Description:
    """A description from a line of notation fitted to the node's shapes.

    ``macs``, ``contracted``, ... name factors of the line, separated by blanks, stars allowed;
    ``macs`` may be a sum of terms, ``"N i h + N h k"``. ``reason`` says why upper-case factors keep
    their size, where that is not plain from their letters.

    Raises:
        NotationError: the line does not fit the node's shapes.
    """
    bound = bind(line, n.in_shapes, n.out_shapes, sizes)
    description = Description(
        macs=tuple(bound.expand(term) for term in macs.split("+")) if macs else (),
        contracted=frozenset(bound.expand(contracted)),
        statistical=frozenset(bound.expand(statistical)),
        prefer=tuple(prefer.split()),
        eager=frozenset(bound.expand(eager)),
        reluctant=frozenset(bound.expand(reluctant)),
        gate=gate,
        broadcast=frozenset(bound.expand(bound.notation.broadcast)),
    )
    factors = description.factors
    for name, size in bound.sizes.items():
        letter = name.rstrip("0123456789")
        known = reason or _UPPER.get(letter, f"factor {letter} of {n.op_type}")
        factors[name] = Factor(name, size, known if name[0].isupper() else None)
    for port, axes in _operands(bound):
        for axis, names in enumerate(axes):
            _stand(description, bound, port, axis, names)
    return description


def _operands(bound: Binding) -> Iterable[tuple[int, tuple[tuple[str, ...], ...]]]:
    for i, axes in enumerate(bound.inputs):
        if axes is not None:
            yield i, axes
    for k, axes in enumerate(bound.outputs):
        if axes is not None:
            yield ~k, axes


def _stand(
    description: Description, bound: Binding, port: int, axis: int, names: tuple[str, ...]
) -> None:
    """Place the factors of one axis; one of size 1 says nothing in a product, and stays 1."""
    factors, sizes = description.factors, bound.sizes
    if not names:
        description.pin(port, axis, 1, "axis of size 1, broadcast")
        return
    telling = [name for name in names if sizes[name] > 1] if len(names) > 1 else names
    for name in set(names).difference(telling):
        factors[name].pinned = factors[name].pinned or "factor of size 1 in a product"
    if len(telling) == 1:
        factors[telling[0]].places.append(Place(port, axis))
        return
    if not telling:
        description.pin(port, axis, 1, "product of factors of size 1")
        return
    total = 1
    for name in telling:
        total *= sizes[name]
    outer = 1
    for name in telling:
        inner = total // (outer * sizes[name])
        factors[name].places.append(Place(port, axis, IndexMap(outer, inner)))
        outer *= sizes[name]


def opaque(n: OpNode, reason: str) -> Description:
    """A description that pins every axis, for a node of which nothing is known."""
    description = Description(opaque=reason)
    for port, shape in n_ports(n):
        for axis, size in enumerate(shape):
            description.pin(port, axis, size, reason)
    return description


def n_ports(n: OpNode) -> Iterable[tuple[int, Shape]]:
    """The operands that are present and the results, as (port, static shape)."""
    for i, shape in enumerate(n.in_shapes):
        if shape is not None:
            yield i, shape
    for k, shape in enumerate(n.out_shapes):
        if shape is not None:
            yield ~k, shape


def describe(n: OpNode) -> Description:
    """What a node does to its axes, by its operator's entry; opaque where there is none.

    Raises:
        NotationError: the entry's notation does not fit the node's shapes.
    """
    entry = entry_of(n.op_type, n.domain)
    if entry is None:
        full = f"{n.domain}::{n.op_type}" if n.domain else n.op_type
        return opaque(n, f"no notation for operator {full}")
    try:
        description: Description = entry.call(entry.describe, n.ir, n)
    except UnsupportedFormError as error:
        return opaque(n, str(error))
    return description


class UnsupportedFormError(Exception):
    """An entry meets a form of its operator that it cannot describe; the node becomes opaque."""


__all__ = [
    "IDENTITY",
    "Description",
    "Factor",
    "IndexMap",
    "IntArray",
    "NotationError",
    "Op",
    "OpNode",
    "Place",
    "Resizing",
    "UnsupportedFormError",
    "describe",
    "described_ops",
    "entry_of",
    "facts_of",
    "from_line",
    "mismatch_hint",
    "op",
    "opaque",
]
