"""Factor notation: what an operator does to the axes of its tensors, in one line.

A line names the factors of every axis of every input and output, as einsum names indices::

    "N (g i) *S, (g o) i *K, (g o) -> N (g o) *T"      # grouped convolution

- operands are separated by commas; ``->`` stands before the results; trailing operands may be
absent;
- a lower-case factor may be resized, an upper-case factor never is (batch, space, kernel);
- ``(a b)`` is a product axis, outermost factor first; ``1`` is an axis of size one;
- ``*a`` is any number of axes, aligned at the right as ONNX broadcasts; there an axis of size one
  against a larger one stands for no factor;
- ``_`` is an operand that takes no part (a scalar bound, a shape tensor).

:func:`parse` reads a line, :func:`bind` fits it to shapes and finds the size of every factor.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

from morphgraph.arrays import Shape

_TOKEN = re.compile(r"\s*(->|[(),_]|\*?[A-Za-z][A-Za-z0-9]*|1)")


class NotationError(ValueError):
    """A line cannot be read, or does not fit the shapes it was given."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the factors whose product it is, outermost first; none for an axis of size 1."""

    factors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Star:
    """Any number of axes that share a name."""

    name: str


Operand = tuple[Axis | Star, ...] | None
_Placed = tuple[tuple[str, ...], ...]
_Fail = Callable[[str], NotationError]


@dataclass(frozen=True, slots=True)
class Notation:
    """A parsed line. ``None`` among the operands is one that takes no part."""

    text: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def broadcast(self) -> str:
        """The stars over which operands are repeated as ONNX broadcasts: the lower-case ones.

        >>> parse("*b m k, *b k n -> *b m n").broadcast
        '*b'
        """
        return _broadcast(self.text)


@dataclass(frozen=True, slots=True)
class Binding:
    """A line fitted to shapes.

    ``sizes`` maps every factor to its size. ``inputs`` and ``outputs`` give per operand and axis
    the factors that stand there, outermost first: an empty tuple where an axis of size 1 stands for
    none. ``None`` is an operand that is absent or takes no part.
    """

    notation: Notation
    sizes: Mapping[str, int]
    inputs: tuple[tuple[tuple[str, ...], ...] | None, ...]
    outputs: tuple[tuple[tuple[str, ...], ...] | None, ...]

    def expand(self, names: str) -> tuple[str, ...]:
        """The factors that a list of names stands for, stars written out.

        >>> bind("N c *S -> N c *T", [(1, 8, 5, 5)], [(1, 8, 2, 2)]).expand("c *T")
        ('c', 'T0', 'T1')
        """
        found: list[str] = []
        for name in names.split() if names else ():
            if name.startswith("*"):
                found += [f for f in self.sizes if f.rstrip("0123456789") == name[1:]]
            elif name in self.sizes:
                found.append(name)
            else:
                raise NotationError(f"{self.notation.text!r} has no factor {name!r}")
        return tuple(found)


@cache
def parse(text: str) -> Notation:
    """Read a line of factor notation.

    >>> parse("N c *S, c -> N c *S").inputs[1]
    (Axis(factors=('c',)),)

    Raises:
        NotationError: the line cannot be read; the message echoes it.
    """
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise NotationError(f"{text!r}: cannot read {stripped[position:].strip()[:10]!r}")
        tokens.append(match.group(1))
        position = match.end()
    if tokens.count("->") != 1:
        raise NotationError(f"{text!r}: needs exactly one '->' between operands and results")
    arrow = tokens.index("->")
    return Notation(text, _operands(text, tokens[:arrow]), _operands(text, tokens[arrow + 1 :]))


@cache
def _broadcast(text: str) -> str:
    axes = {axis for operand in parse(text).inputs for axis in operand or ()}
    return " ".join(
        sorted(f"*{a.name}" for a in axes if isinstance(a, Star) and a.name[0].islower())
    )


def _operands(text: str, tokens: Sequence[str]) -> tuple[Operand, ...]:
    commas = [k for k, token in enumerate(tokens) if token == ","]
    spans = pairwise([-1, *commas, len(tokens)])
    return tuple(_operand(text, tokens[before + 1 : after]) for before, after in spans)


def _operand(text: str, tokens: Sequence[str]) -> Operand:
    """One operand's axes: factors, products of them in brackets, ``1``, at most one star."""
    axes: list[Axis | Star] = []
    rest = iter(token for token in tokens if token != "_")
    for token in rest:
        if token == "(":
            axes.append(_product(text, rest))
        elif token == ")":
            raise NotationError(f"{text!r}: ')' without factors before it")
        elif token.startswith("*"):
            axes.append(Star(token[1:]))
        else:
            axes.append(Axis(() if token == "1" else (token,)))
    if "_" in tokens and axes:
        raise NotationError(f"{text!r}: '_' stands alone in its operand")
    if sum(isinstance(axis, Star) for axis in axes) > 1:
        raise NotationError(f"{text!r}: an operand has two stars; their ranks are ambiguous")
    return None if "_" in tokens else tuple(axes)


def _product(text: str, rest: Iterator[str]) -> Axis:
    """The factors up to the closing bracket, which is taken, too."""
    factors: list[str] = []
    for token in rest:
        if token == "(":
            raise NotationError(f"{text!r}: products do not nest; write (a b c)")
        if token == ")" and not factors:
            raise NotationError(f"{text!r}: ')' without factors before it")
        if token == ")":
            return Axis(tuple(factors))
        if token == "1" or token.startswith("*"):
            raise NotationError(f"{text!r}: only factors stand in a product, not {token!r}")
        factors.append(token)
    raise NotationError(f"{text!r}: a '(' is not closed")


def bind(
    text: str,
    inputs: Sequence[Shape | None],
    outputs: Sequence[Shape | None],
    sizes: Mapping[str, int] | None = None,
) -> Binding:
    """Fit a line to the shapes of an operator's operands and results.

    Args:
        text: a line of factor notation.
        inputs: shape per operand, ``None`` where an optional operand is absent.
        outputs: shape per result, ``None`` where an optional result is absent.
        sizes: factor sizes that shapes alone do not tell, such as ``{"g": 4}``.

    >>> bound = bind("N (g i), (g o) i -> N (g o)", [(1, 6), (9, 2)], [(1, 9)], {"g": 3})
    >>> dict(bound.sizes)
    {'g': 3, 'N': 1, 'i': 2, 'o': 3}

    Raises:
        NotationError: rank or sizes do not fit; the message echoes the line and the shapes.
    """
    return _bind(text, tuple(inputs), tuple(outputs), tuple(sorted((sizes or {}).items())))


def result_shapes(
    text: str, inputs: Sequence[Shape | None], sizes: Mapping[str, int] | None = None
) -> list[Shape | None]:
    """The shapes of an operator's results, as far as a line and the operands' shapes tell them.

    ``None`` stands for a result with a factor that no operand has, or that takes no part.

    >>> result_shapes("N (g i) *S, (g o) i *K -> N (g o) *T, N g", [(1, 6, 9), (9, 2, 3)], {"g": 3})
    [None, (1, 3)]

    Raises:
        NotationError: rank or sizes do not fit; the message echoes the line and the shapes.
    """
    bound = bind(text, inputs, (), sizes)
    stars = {
        axis.name
        for operand, shape in zip(bound.notation.inputs, inputs, strict=False)
        for axis in operand or ()
        if isinstance(axis, Star) and shape is not None
    }
    return [
        None if operand is None else _shape_of(operand, bound, stars)
        for operand in bound.notation.outputs
    ]


def _shape_of(
    operand: tuple[Axis | Star, ...], bound: Binding, stars: Collection[str]
) -> Shape | None:
    shape: list[int] = []
    for axis in operand:
        if isinstance(axis, Star):
            if axis.name not in stars:
                return None
            shape += [bound.sizes[name] for name in bound.expand(f"*{axis.name}")]
        elif all(name in bound.sizes for name in axis.factors):
            shape.append(prod(bound.sizes[name] for name in axis.factors))
        else:
            return None
    return tuple(shape)


@lru_cache(maxsize=65536)
def _bind(
    text: str,
    inputs: tuple[Shape | None, ...],
    outputs: tuple[Shape | None, ...],
    known: tuple[tuple[str, int], ...],
) -> Binding:
    notation = parse(text)
    for kind, named, given in (
        ("operands", notation.inputs, inputs),
        ("results", notation.outputs, outputs),
    ):
        if any(shape is not None for shape in given[len(named) :]):
            raise NotationError(f"{text!r} names {len(named)} {kind}, the node has {len(given)}")
    operands = [*notation.inputs, *notation.outputs]
    shapes: list[Shape | None] = [
        *inputs[: len(notation.inputs)],
        *[None] * (len(notation.inputs) - len(inputs)),
        *outputs[: len(notation.outputs)],
        *[None] * (len(notation.outputs) - len(outputs)),
    ]

    def fail(why: str) -> NotationError:
        shown = ", ".join("-" if s is None else "x".join(map(str, s)) or "scalar" for s in inputs)
        found = ", ".join("-" if s is None else "x".join(map(str, s)) or "scalar" for s in outputs)
        result = found or "?"
        return NotationError(f"{text!r} does not fit shapes {shown} -> {result}: {why}")

    sizes: dict[str, int] = dict(known)
    star_ranks = _star_ranks(operands, shapes, fail)
    placed: list[_Placed | None] = []
    starred: dict[str, int] = {}
    for operand, shape in zip(operands, shapes, strict=True):
        placed.append(
            None
            if operand is None or shape is None
            else _place(operand, shape, star_ranks, sizes, starred, fail)
        )
    sizes.update(starred)
    _solve_products(placed, shapes, sizes, fail)
    axes = tuple(
        None
        if tensor is None or shape is None
        else tuple(
            () if len(factors) == 1 and size == 1 != sizes[factors[0]] else factors
            for factors, size in zip(tensor, shape, strict=True)
        )
        for tensor, shape in zip(placed, shapes, strict=True)
    )
    count = len(notation.inputs)
    return Binding(notation, sizes, axes[:count], axes[count:])


def _star_ranks(
    operands: Sequence[Operand], shapes: Sequence[Shape | None], fail: _Fail
) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for operand, shape in zip(operands, shapes, strict=True):
        if operand is None or shape is None:
            continue
        stars = [axis.name for axis in operand if isinstance(axis, Star)]
        free = len(shape) - (len(operand) - len(stars))
        if free < 0 or (free > 0 and not stars):
            raise fail(f"an operand of rank {len(shape)} where the line has {len(operand)} axes")
        for name in stars:
            ranks[name] = max(ranks.get(name, 0), free)
    return ranks


def _place(
    operand: tuple[Axis | Star, ...],
    shape: Shape,
    star_ranks: Mapping[str, int],
    sizes: dict[str, int],
    starred: dict[str, int],
    fail: _Fail,
) -> _Placed:
    """The factors on each axis of one operand; single and starred factors get their sizes."""
    placed: list[tuple[str, ...]] = []
    free = len(shape) - sum(isinstance(axis, Axis) for axis in operand)
    for axis in operand:
        if isinstance(axis, Star):
            for k in range(star_ranks[axis.name] - free, star_ranks[axis.name]):
                name, size = f"{axis.name}{k}", shape[len(placed)]
                known = starred.get(name, 1)
                if known != 1 and size not in (1, known):
                    raise fail(f"{size} against {known} on an axis of *{axis.name}")
                starred[name] = size if known == 1 else known  # which may be 0
                placed.append((name,))
            continue
        size = shape[len(placed)]
        if not axis.factors and size != 1:
            raise fail(f"{size} where the line has 1")
        if len(axis.factors) == 1:
            (name,) = axis.factors
            if sizes.setdefault(name, size) != size:
                raise fail(f"factor {name} is {sizes[name]} on one axis and {size} on another")
        placed.append(axis.factors)
    return tuple(placed)


def _solve_products(
    placed: Sequence[_Placed | None],
    shapes: Sequence[Shape | None],
    sizes: dict[str, int],
    fail: _Fail,
) -> None:
    """Find the factors that stand in products only, each from an axis where the rest is known."""
    products = [
        (factors, size)
        for tensor, shape in zip(placed, shapes, strict=True)
        if tensor is not None and shape is not None
        for factors, size in zip(tensor, shape, strict=True)
        if len(factors) > 1
    ]
    pending = products
    while pending:
        later = []
        for factors, size in pending:
            unknown = {name for name in factors if name not in sizes}
            if len(unknown) == 1 and sum(name in unknown for name in factors) == 1:
                rest = prod(sizes[name] for name in factors if name not in unknown)
                if rest == 0 or size % rest:
                    raise fail(f"({' '.join(factors)}) = {size} is not a multiple of {rest}")
                sizes[unknown.pop()] = size // rest
            elif unknown:
                later.append((factors, size))
        if len(later) == len(pending):
            missing = sorted({n for factors, _ in later for n in factors if n not in sizes})
            raise fail(f"the size of {', '.join(missing)} does not follow from the shapes")
        pending = later
    for factors, size in products:
        if prod(sizes[name] for name in factors) != size:
            shown = " x ".join(f"{name}={sizes[name]}" for name in factors)
            raise fail(f"({' '.join(factors)}) is {size}, but {shown}")
