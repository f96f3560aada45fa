"""The dynamic sizes of a model's inputs: a symbol each, and two static sizes in its place.

A model is canonicalized at static sizes: once with every symbol at its analysis size, and once
more per symbol with that one enlarged (:mod:`morphgraph.passes.canonical.size_runs`).

A size may be a sum of others, ``past_length + length``: exporters write so for what a cache and new
tokens are together.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

BATCH = (2, 3)  # analysis size, enlarged size
_IMAGE = (224, 256)  # height or width, a multiple of what networks divide it by
_VOLUME = (64, 96)  # the same of three dimensions
_LENGTH = (64, 80)
_NAMELESS = {None, "", "?", "-1", "None", "unknown"}  # of what exporters do not name


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic size.

    Attributes:
        name: as the model has it.
        axes: ``(input, axis)`` of all axes that have this size, or a sum with it in it.
        size: its analysis size.
        larger: the enlarged one.
    """

    name: str
    axes: tuple[tuple[str, int], ...]
    size: int
    larger: int

    @property
    def is_batch(self) -> bool:
        """Whether it is the leading size of inputs."""
        return self.axes[0][1] == 0


def input_symbols(model: ir.Model) -> list[Symbol]:
    """The dynamic sizes of a model's inputs; all leading ones together are the batch."""
    axes: dict[str, list[tuple[str, int]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    batch = next((d.value for v in model.graph.inputs if (d := _dim(v, 0)) and d.value), "batch")
    known = plain_names(model)
    for value in model.graph.inputs:
        for axis in range(len(value.shape or ())):
            dim = _dim(value, axis)
            if dim is None:
                continue
            place = (value.name or "", axis)
            terms, _ = addends(dim, known) if axis else ({}, 0)
            if terms:
                for name, times in terms.items():
                    axes.setdefault(name, []).extend([place] * times)
                    sizes[name] = _LENGTH  # what is added up are lengths
                continue
            name = batch if axis == 0 else size_name(value, axis)
            axes.setdefault(name, []).append(place)
            sizes.setdefault(name, BATCH if axis == 0 else _sizes_of(value, axis))
    return [Symbol(name, tuple(axes[name]), *sizes[name]) for name in axes]


def size_name(value: ir.Value, axis: int) -> str:
    """What an open size of an input is called; a name of its own where the file has none."""
    dim = _dim(value, axis)
    name = None if dim is None else dim.value
    return f"{value.name}_{axis}" if name is None or name in _NAMELESS else name


def plain_names(model: ir.Model) -> frozenset[str]:
    """The names that open sizes of inputs have, behind the batch; sums of others among them."""
    return frozenset(
        size_name(value, axis)
        for value in model.graph.inputs
        for axis in range(1, len(value.shape or ()))
        if _dim(value, axis) is not None
    )


def addends(dim: ir.SymbolicDim, known: Collection[str]) -> tuple[dict[str, int], int]:
    """A size that is a sum of known ones: how often each is added, and a number.

    Nothing is added where it is no sum, or of sizes that are not known.

    >>> addends(ir.SymbolicDim("past + 2*length + 1"), {"past", "length"})
    ({'past': 1, 'length': 2}, 1)
    >>> addends(ir.SymbolicDim("past + length"), {"length"})
    ({}, 0)
    """
    parts = (dim.value or "").replace(" ", "").split("+")
    terms: dict[str, int] = {}
    number = 0
    for part in parts:
        times, _, name = part.rpartition("*")
        if part.isdecimal():
            number += int(part)
        elif name in known and (times.isdecimal() or not times):
            terms[name] = terms.get(name, 0) + int(times or 1)
        else:
            return {}, 0
    return (terms, number) if len(parts) > 1 or dim.value not in known else ({}, 0)


def _sizes_of(value: ir.Value, axis: int) -> tuple[int, int]:
    """The sizes for an open axis behind the first: one of an image's or volume's, or a length."""
    rank = len(value.shape or ())
    # Channels stand behind the batch, or last; which ones they are only the network knows.
    channels_last = _dim(value, 1) is not None and _dim(value, rank - 1) is None
    space = range(1, rank - 1) if channels_last else range(2, rank)
    if rank < 4 or axis not in space or _dim(value, space[0]) is None is _dim(value, space[-1]):
        return _LENGTH
    return _VOLUME if sum(_dim(value, k) is not None for k in space) > 2 else _IMAGE


def other_sizes(symbols: Sequence[Symbol]) -> list[list[Symbol]]:
    """What else to analyse a model with whose operands do not fit: all lengths, or all images."""
    choices = []
    for size, larger in (_LENGTH, _IMAGE):
        changed = [
            symbol if symbol.is_batch else replace(symbol, size=size, larger=larger)
            for symbol in symbols
        ]
        if changed != list(symbols):
            choices.append(changed)
    return choices


def _dim(value: ir.Value, axis: int) -> ir.SymbolicDim | None:
    dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return dim if isinstance(dim, ir.SymbolicDim) else None


def input_shapes(
    model: ir.Model, symbols: Iterable[Symbol], enlarged: Iterable[Symbol] = ()
) -> dict[str, list[int]]:
    """Static shapes of a model's inputs: at the analysis sizes, some symbols enlarged."""
    larger = set(enlarged)
    sizes: Counter[tuple[str, int]] = Counter()
    for symbol in symbols:
        for place in symbol.axes:
            sizes[place] += symbol.larger if symbol in larger else symbol.size
    known = plain_names(model)
    return {
        value.name or "": [
            size
            if isinstance(size, int)
            else sizes[value.name or "", axis] + (addends(size, known)[1] if axis else 0)
            for axis, size in enumerate(value.shape or ())
        ]
        for value in model.graph.inputs
    }


def expression(symbols: Sequence[Symbol], sizes: Sequence[int]) -> int | ir.SymbolicDim:
    """A size as a linear expression in the symbols; a nameless dim where it is none.

    Two sizes of each symbol do not tell a line from a curve, nor a sum from a product: a product of
    two symbols gives a line in each, less a constant. So only such lines are written as no product
    gives.

    Args:
        symbols: the dynamic sizes.
        sizes: the size in every run: at the analysis sizes, then with each symbol enlarged.

    >>> symbol = Symbol("N", (("x", 0),), 2, 3)
    >>> str(expression([symbol], [5, 7])), expression([symbol], [5, 5])
    ('2*N+1', 5)
    >>> expression([symbol, Symbol("T", (("x", 1),), 4, 8)], [8, 12, 16])  # N * T
    SymbolicDim(None)
    """
    terms, rest, factor = [], sizes[0], 1
    for symbol, size in zip(symbols, sizes[1:], strict=False):
        times, remainder = divmod(size - sizes[0], symbol.larger - symbol.size)
        if remainder:
            return ir.SymbolicDim(None)
        if times:
            terms.append(symbol.name if times == 1 else f"{times}*{symbol.name}")
            rest -= times * symbol.size
            factor = times
    if not terms:
        return sizes[0]
    is_line = factor == 1 or 0 <= rest < factor
    if rest if len(terms) > 1 else not is_line:
        return ir.SymbolicDim(None)
    return ir.SymbolicDim("+".join(terms) + (f"{rest:+d}" if rest else ""))
