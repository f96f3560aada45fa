"""Sizes that a model leaves open: what they are tried at, and what follows from the trials.

Both ways to keep sizes open (``open_batch`` and ``open_sizes``) run the recipe at several sizes and
compare what they get.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

BATCH = (2, 3)  # analysis size, enlarged size
_IMAGE = (224, 256)  # height or width, a multiple of what networks divide it by
_LENGTH = (64, 80)


@dataclass(frozen=True, slots=True)
class Symbol:
    """An open size: its name, the input axes that have it, and the two sizes it is tried at."""

    name: str
    axes: tuple[tuple[str, int], ...]
    size: int
    larger: int


def open_symbols(model: ir.Model) -> list[Symbol]:
    """The open sizes of a model's inputs; all leading ones together are the batch."""
    found: dict[str, list[tuple[str, int]]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    batch = next((d.value for v in model.graph.inputs if (d := _dim(v, 0)) and d.value), "batch")
    for value in model.graph.inputs:
        rank = len(value.shape or ())
        for axis in range(rank):
            dim = _dim(value, axis)
            if dim is None:
                continue
            name = batch if axis == 0 else dim.value or f"{value.name}_{axis}"
            found.setdefault(name, []).append((value.name or "", axis))
            spatial = rank >= 4 and axis >= 2
            ranges.setdefault(name, BATCH if axis == 0 else _IMAGE if spatial else _LENGTH)
    return [Symbol(name, tuple(axes), *ranges[name]) for name, axes in found.items()]


def _dim(value: ir.Value, axis: int) -> ir.SymbolicDim | None:
    dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return dim if isinstance(dim, ir.SymbolicDim) else None


def input_shapes(
    model: ir.Model, symbols: Iterable[Symbol], larger: Symbol | None
) -> dict[str, list[int]]:
    """Static shapes of a model's inputs: at the analysis sizes, one of them enlarged."""
    sizes = {
        place: symbol.larger if symbol is larger else symbol.size
        for symbol in symbols
        for place in symbol.axes
    }
    return {
        value.name or "": [
            size if isinstance(size, int) else sizes[value.name or "", axis]
            for axis, size in enumerate(value.shape or ())
        ]
        for value in model.graph.inputs
    }


def larger_shapes(model: ir.Model, symbols: Sequence[Symbol]) -> dict[str, list[int]]:
    """The shapes of a model's inputs with all of its open sizes enlarged."""
    enlarged = [Symbol(s.name, s.axes, s.larger, s.larger) for s in symbols]
    return input_shapes(model, enlarged, None)


def expression(symbols: Sequence[Symbol], sizes: Sequence[int]) -> int | ir.SymbolicDim:
    """A size as a sum of multiples of the open ones; nameless where it is none.

    Args:
        symbols: the open sizes.
        sizes: at the analysis sizes, and with each of the open sizes enlarged.

    >>> symbol = Symbol("N", (("x", 0),), 2, 3)
    >>> str(expression([symbol], [5, 7])), expression([symbol], [5, 5])
    ('2*N+1', 5)
    """
    terms, rest = [], sizes[0]
    for symbol, size in zip(symbols, sizes[1:], strict=False):
        times, remainder = divmod(size - sizes[0], symbol.larger - symbol.size)
        if remainder:
            return ir.SymbolicDim(None)
        if times:
            terms.append(symbol.name if times == 1 else f"{times}*{symbol.name}")
            rest -= times * symbol.size
    if not terms:
        return sizes[0]
    return ir.SymbolicDim("+".join(terms) + (f"{rest:+d}" if rest else ""))


def same_structure(runs: Sequence[ir.Model]) -> bool:
    """Whether models have the same nodes, and initializers of the same names."""
    structures = [[(n.name, n.op_identifier()) for n in run.graph] for run in runs]
    names = [run.graph.initializers.keys() for run in runs]
    return all(s == structures[0] for s in structures) and all(n == names[0] for n in names)


def same_numbers(value: ir.Value, twin: ir.Value) -> bool:
    """Whether two initializers hold the same."""
    a, b = value.const_value, twin.const_value
    assert a is not None
    assert b is not None
    # Weights are shared by all runs; only what was folded needs a look inside.
    return a is b or (a.shape == b.shape and np.array_equal(a.numpy(), b.numpy(), equal_nan=True))
