"""What an operator is: its facts, its factors, how it is resized and lowered; and the registry.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import onnx_ir as ir

from morphgraph.arrays import Array, Shape
from morphgraph.notation import NotationError
from morphgraph.onnx_io import escape, is_unsized
from morphgraph.onnx_io.maps import is_map
from morphgraph.ops.description import (
    IDENTITY,
    Description,
    Factor,
    IndexMap,
    Place,
    from_line,
    opaque,
)
from morphgraph.ops.linear import Linear
from morphgraph.ops.node import OpNode
from morphgraph.ops.plugins import load_plugins
from morphgraph.ops.resizing import Resizing


class UnsupportedFormError(Exception):
    """An entry meets a form of its operator that it cannot describe; the node becomes opaque."""


class AfterSum(NamedTuple):
    """What an operator does to a sum of operands, as an operator by itself.

    Attributes:
        op_type: the operator, in the domain of ONNX.
        operands: ports of the operands that it has beside the sum.
        bias: port of one that is added to the sum.
        total: the result that is the sum.
        attributes: those that it has beside the node's, and those that the node has by default.
    """

    op_type: str
    operands: tuple[int, ...]
    bias: int
    total: int
    attributes: Mapping[str, int | float]


Angles = Callable[[Mapping[int, Array]], tuple[Array, Array]]


@dataclass(frozen=True)
class Coded:
    """An operand of whole numbers that stand for weights.

    Attributes:
        weights: how many one of the numbers stands for (2 in a byte of 4 bits).
        by: operands that say what the numbers mean, and are no weights: scales, zero points, order.
    """

    weights: float
    by: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stacked:
    """Kernels of all experts of a mixture in one node.

    Attributes:
        kernel: the operand that holds them, ``[experts, outputs, inputs]``.
        added: that with what is added behind them, ``[experts, outputs]``.
        bits: of a weight, where they are whole numbers, several in a byte; 0: real numbers.
        scales, zeros: then the operands that say what these mean, by row or by block of columns.
    """

    kernel: int
    added: int
    bits: int = 0
    scales: int = 0
    zeros: int = 0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in one node.

    Attributes:
        tokens: operands with something for each token: the first what it is, the second the numbers
            of which it takes the largest.
        first: the kernels that see the tokens.
        last: those behind the units inside, whose results are added up by the tokens' shares.
    """

    tokens: tuple[int, ...]
    first: Stacked
    last: Stacked


class Op:
    """Base of all entries; ``describe`` is what every entry must have.

    Passes compare no operator names: they ask for these facts. The defaults are those of an
    operator without any, which is what :func:`facts_of` returns where there is no entry.

    Attributes:
        moves: the results hold the operands' numbers as they are, elsewhere.
        adds: the result is the sum of all operands.
        summands: operands of which it takes the sum before it does anything else with them.
        after_sum: what it does to that sum (:class:`AfterSum`), where an operator by itself does
            the same; ``None`` where none does in this node's form.
        subtracts: the result is the first operand less the second.
        multiplies: the result is the product of both operands, element by element.
        negates: the result is the operand times -1.
        turns: of an operator that turns pairs of its first operand's numbers by angles the operands
            that hold the cosines and the sines.
        angles: of an attention that turns queries and keys itself, in halves or neighbours, what
            gives from its operands, by port, the cosines and sines of all places, ``[N, T, c]``;
            ``None`` where this node does not.
        mean_power: the result is proportional to this power of a mean over the factors over which
            it is statistical: 1 for a mean, -1/2 for a norm by the root of a mean square; 0: to no
            mean.
        centers: it subtracts a mean over them before.
        epsilon: the default of the attribute of this name, which is added to the mean of squares;
            ``None`` where there is none.
        powers: what gives by operand the power of it that the result is proportional to, where it
            is to any.
        mixes: of an attention the operand whose rows its first result mixes, each row by how much a
            query takes of a key.
        distribution: the numbers along the axis that it competes over sum to one.
        open_at_zero: a function of one operand that is not zero at zero.
        foldable: a node with constant operands may be replaced by what it computes. Not so for
            random numbers, for what is meant to stay as it is written (quantization, dropout), and
            for what ONNX's reference implementation computes too slowly.
        sized_by_data: what the results' sizes are depends on the operands' numbers.
        reads_sizes: the results hold sizes of the operand, not what its numbers give.
        target: the operand that holds the sizes of the result.
        places: operands that hold places on axes of the first operand.
        axes: the operand that names these axes; where it is absent they are the first ones.
        bounded: no result has more numbers than the rank times the size of an operand.
        scale: the operand that alone scales every channel.
        offset: the operand that is added to what the scale has scaled, or before a function that
            is zero at zero.
        shift: the operand that is added to every channel, one number for each position of
            ``shift_axis`` of the result, times the attribute named ``shift_factor`` if it is there.
        statistics: operands that hold running statistics of a norm, which training updates without
            a gradient.
        quantized: per operand of stored numbers the operands that hold their scale and zero point,
            ``real = (stored - zero point) * scale``; ``None`` for a scale that is applied behind.
        coded: operands whose whole numbers stand for weights (:class:`Coded`), where ``quantized``
            does not say all of it.
        zeros: operands that mean zero where they are absent (biases, initial states).
        shape: the results' shapes for an operator of which ONNX infers none. It takes the operands'
            shapes (``None`` for an absent one) and returns one shape, or a list of them.
        typed_by: the operand of whose type the results are that ``shape`` tells the shapes of, or
            one for each.
        lengths: per operand that must fit the sizes of the others the number that it holds where
            nothing is padded.
        extends: by operand that holds a cache of earlier positions, or what is left of them, the
            result that holds the same with the new ones.
        capacity: per operand that holds a cache of the latest positions alone how many it has room
            for at least.
        joins: the result is the operands behind each other.
        added_behind: of an operator that multiplies and sums, whatever its operands are, those that
            are added to the sums: without these and with nothing to sum over it gives zeros;
            ``None`` of other operators.
        experts: of a mixture in one node which operands hold what (:class:`Experts`); ``None``
            where this node's form shows nothing, and of other operators.
        inert: in inference the result is the first operand as it is.
        converts: the result holds the numbers of the first operand in another type.
        clamp: the range in which a function of one operand gives it as it is, and beyond which it
            gives the range's end: from nothing to something, ``(low, high)``.
        permutation: the order in which the result has the operand's axes.
        linear: the operator as a linear map of one operand
            (:class:`~morphgraph.ops.linear.Linear`), where it is one; ``None`` where this node is
            not.
        convolves: it has one kernel for all places, and runtimes compute it in blocks of channels.
        blocked: ONNX Runtime computes it in a layout of such blocks, where its sizes allow that.
        initial: per operand that is a layer's weight how PyTorch draws it
            (:class:`~morphgraph.ops.initial.Initial`), for training from scratch.
        tables: operands whose rows numbers choose that another operand holds (embeddings).
        origin: file and line where a user taught the operator; empty for the program's own.
    """

    moves: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    summands: ClassVar[tuple[int, ...]] = ()
    after_sum: ClassVar[Callable[..., AfterSum | None] | None] = None
    subtracts: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    negates: ClassVar[bool] = False
    turns: ClassVar[tuple[int, ...]] = ()
    angles: ClassVar[Callable[..., Angles | None] | None] = None
    mean_power: ClassVar[float] = 0.0
    centers: ClassVar[bool] = False
    epsilon: ClassVar[float | None] = None
    powers: ClassVar[Callable[..., Mapping[int, float]] | None] = None
    mixes: ClassVar[int | None] = None
    distribution: ClassVar[bool] = False
    open_at_zero: ClassVar[bool] = False
    foldable: ClassVar[bool] = True
    convolves: ClassVar[bool] = False
    blocked: ClassVar[bool] = False
    sized_by_data: ClassVar[bool] = False
    reads_sizes: ClassVar[bool] = False
    target: ClassVar[int | None] = None
    places: ClassVar[tuple[int, ...]] = ()
    axes: ClassVar[int | None] = None
    bounded: ClassVar[bool] = False
    scale: ClassVar[int | None] = None
    offset: ClassVar[int | None] = None
    shift: ClassVar[int | None] = None
    shift_axis: ClassVar[int] = 1
    shift_factor: ClassVar[str] = ""
    statistics: ClassVar[tuple[int, ...]] = ()
    quantized: ClassVar[Mapping[int, tuple[int | None, int]]] = MappingProxyType({})
    coded: ClassVar[Callable[..., Mapping[int, Coded]] | None] = None
    zeros: ClassVar[tuple[int, ...]] = ()
    describe: ClassVar[Callable[..., Description]]
    shape: ClassVar[Callable[..., Shape | Sequence[Shape | None]] | None] = None
    typed_by: ClassVar[int | tuple[int, ...]] = 0
    resize: ClassVar[Callable[..., None] | None] = None
    lengths: ClassVar[Callable[..., Mapping[int, int]] | None] = None
    initial: ClassVar[Callable[..., Mapping[int, Any]] | None] = None
    extends: ClassVar[Mapping[int, int]] = MappingProxyType({})
    capacity: ClassVar[Callable[..., Mapping[int, int]] | None] = None
    joins: ClassVar[bool] = False
    added_behind: ClassVar[tuple[int, ...] | None] = None
    experts: ClassVar[Callable[..., Experts | None] | None] = None
    inert: ClassVar[bool] = False
    converts: ClassVar[bool] = False
    tables: ClassVar[tuple[int, ...]] = ()
    clamp: ClassVar[Callable[..., tuple[float, float] | None] | None] = None
    permutation: ClassVar[Callable[..., tuple[int, ...]] | None] = None
    linear: ClassVar[Callable[..., Linear | None] | None] = None
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
            for name, attribute in node.attributes.data.items()
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
    found = _REGISTRY.get((node.domain, node.op_type))  # at once for nearly all, who are many
    return found or entry_of(node.op_type, node.domain) or Op


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
    return sorted(f"{domain}::{name}" if domain else name for domain, name in _REGISTRY)


def describe(n: OpNode) -> Description:
    """What a node does to its axes, by its operator's entry; opaque where there is none.

    It is opaque, too, where the size of an operand or a result is not known.

    Raises:
        NotationError: the entry's notation does not fit the node's shapes.
    """
    entry = entry_of(n.op_type, n.domain)
    if entry is None:
        full = f"{n.domain}::{n.op_type}" if n.domain else n.op_type
        return opaque(n, f"no notation for operator {full}")
    for value in (*n.ir.inputs, *n.ir.outputs):
        if value is not None and is_unsized(value) and not is_map(value):
            return opaque(
                n, f"the size of '{escape(value.name or '')}' is not known before it runs"
            )
    try:
        description: Description = entry.call(entry.describe, n.ir, n)
    except UnsupportedFormError as error:
        return opaque(n, str(error))
    except ZeroDivisionError:  # by `group`, `num_heads`, `blocksize` and their like
        raise NotationError("a number that its channels are divided by is 0") from None
    return description


__all__ = [
    "IDENTITY",
    "Description",
    "Factor",
    "IndexMap",
    "Linear",
    "Op",
    "OpNode",
    "Place",
    "Resizing",
    "UnsupportedFormError",
    "attribute_value",
    "describe",
    "described_ops",
    "entry_of",
    "facts_of",
    "from_line",
    "lookup",
    "mismatch_hint",
    "op",
    "unregister",
]
