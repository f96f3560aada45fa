"""What an operator does to its axes: factors, and the positions at which they stand.

An entry writes a :class:`Description` of a node by a line of factor notation (:func:`from_line`),
or factor by factor where a line cannot say it: movements, whose index maps depend on numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np

from morphgraph.arrays import IntArray, Shape
from morphgraph.notation import Binding, bind
from morphgraph.ops.node import OpNode


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
        if self.outer == 1 == self.inner:
            elements = np.arange(size)
            return elements, elements + self.offset
        count = self.outer * size * self.inner
        elements = np.arange(count) // self.inner % size
        return elements, self.offset + np.arange(count)


IDENTITY = IndexMap()


def product_maps(sizes: Sequence[int]) -> list[IndexMap]:
    """The maps of factors of these sizes, outermost first, that an axis is the product of.

    >>> [(m.outer, m.inner) for m in product_maps([2, 3, 4])]
    [(1, 12), (2, 4), (6, 1)]
    """
    if len(sizes) == 1:
        return [IDENTITY]
    return list(_product_maps(tuple(sizes)))


@cache
def _product_maps(sizes: tuple[int, ...]) -> tuple[IndexMap, ...]:
    return tuple(IndexMap(prod(sizes[:k]), prod(sizes[k + 1 :])) for k in range(len(sizes)))


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
        sharing: of the eager factors those whose elements share an element of another: the query
            heads that read one head of keys.
        gate: the operands multiply, so that one dead operand silences the channel.
        silent: operands in which not 0 but another operand (its zero point) adds nothing to a sum.
        broadcast: factors over which an operand of size 1 is repeated, as ONNX broadcasts.
        rows: factors whose elements an operand names by number at run time (the rows of an
            embedding): pinned, unless whoever makes the numbers follows.
        numbers: results that hold positions on an axis, with the factor that stands there: pinned,
            unless all who read these numbers follow.
        indexed: factors at whose elements an operand's numbers point, with that operand's port.
        least: how many elements of a factor there must be.
        multiples: what the number of a factor's elements must be a multiple of, for runtimes.
        opaque: why nothing is known of the op, for one without an entry.
    """

    factors: dict[str, Factor] = field(default_factory=dict)
    macs: tuple[tuple[str, ...], ...] = ()
    contracted: frozenset[str] = frozenset()
    statistical: frozenset[str] = frozenset()
    prefer: tuple[str, ...] = ()
    eager: frozenset[str] = frozenset()
    reluctant: frozenset[str] = frozenset()
    sharing: frozenset[str] = frozenset()
    gate: bool = False
    silent: Mapping[int, int] = field(default_factory=dict)
    broadcast: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    numbers: Mapping[int, str] = field(default_factory=dict)
    indexed: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    opaque: str | None = None

    def add(
        self, name: str, size: int, places: Iterable[Place], pinned: str | None = None
    ) -> Factor:
        """Put a factor with a name of its own into the description."""
        assert name not in self.factors, name
        factor = self.factors[name] = Factor(name, size, pinned, list(places))
        return factor

    def lay(self, port: int, axis: int, names: Sequence[str]) -> None:
        """Let an axis be the product of factors, outermost first."""
        if len(names) == 1:
            self.factors[names[0]].places.append(Place(port, axis))
            return
        factors = [self.factors[name] for name in names]
        for factor, index_map in zip(factors, product_maps([f.size for f in factors]), strict=True):
            factor.places.append(Place(port, axis, index_map))

    def pin(self, port: int, axis: int, size: int, reason: str) -> None:
        """Say that an axis keeps its size."""
        self.add(f"_{port}_{axis}", size, [Place(port, axis)], reason)


_NO_FACTORS: frozenset[str] = frozenset()

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
    sharing: str = "",
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

    def named(names: str) -> frozenset[str]:
        return frozenset(bound.expand(names)) if names else _NO_FACTORS

    description = Description(
        macs=tuple(bound.expand(term) for term in macs.split("+")) if macs else (),
        contracted=named(contracted),
        statistical=named(statistical),
        prefer=tuple(prefer.split()),
        eager=named(eager),
        reluctant=named(reluctant),
        sharing=named(sharing),
        gate=gate,
        broadcast=named(bound.notation.broadcast),
    )
    factors = description.factors
    for name, size in bound.sizes.items():
        if name[0].isupper():
            letter = name.rstrip("0123456789")
            known = reason or _UPPER.get(letter, f"factor {letter} of {n.op_type}")
            factors[name] = Factor(name, size, known)
        else:
            factors[name] = Factor(name, size)
    for port, axes in _operands(bound):
        for axis, names in enumerate(axes):
            if len(names) == 1:  # as nearly all
                factors[names[0]].places.append(Place(port, axis))
            else:
                _lay(description, port, axis, names)
    return description


def _operands(bound: Binding) -> Iterable[tuple[int, tuple[tuple[str, ...], ...]]]:
    for i, axes in enumerate(bound.inputs):
        if axes is not None:
            yield i, axes
    for k, axes in enumerate(bound.outputs):
        if axes is not None:
            yield ~k, axes


def _lay(description: Description, port: int, axis: int, names: Sequence[str]) -> None:
    """Lay the factors of one axis on it; in a product those of size 1 are left out and stay 1."""
    factors = description.factors
    if not names:
        description.pin(port, axis, 1, "axis of size 1, broadcast")
        return
    large = [name for name in names if factors[name].size > 1]
    for name in set(names).difference(large):
        factors[name].pinned = factors[name].pinned or "factor of size 1 in a product"
    if large:
        description.lay(port, axis, large)
    else:
        description.pin(port, axis, 1, "product of factors of size 1")


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


def factors_at(description: Description, port: int) -> list[str]:
    """The factor that alone stands on each axis of an operand or result; empty: none does.

    Args:
        description: of an operator.
        port: of the operand; ``~k``: the k-th result. Axes behind the last factor are left out.
    """
    standing: dict[int, list[str]] = {}
    for name, factor in description.factors.items():
        for place in factor.places:
            if place.port == port:
                standing.setdefault(place.axis, []).append(name if place.map.starts else "")
    size = max(standing, default=-1) + 1
    return [names[0] if len(names := standing.get(k, [""])) == 1 else "" for k in range(size)]
