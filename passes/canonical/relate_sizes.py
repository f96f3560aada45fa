"""Open sizes of inputs that follow from others, or from the weights.

A model for generation takes a cache. Its files leave open what is not free: the keys that a mask
marks are those of the cache and the new ones, and the size of a head stands in the weights. But
their outputs tell. A name that inputs and outputs share is one size, so what the network gives
there, that the input must have:

    attention_mask [batch, total], past [batch, 4, past, size] -> present [batch, 4, total, size]
                                                    is really  -> present [2, 4, past + length, 16]

Then ``total`` is ``past + length``, and ``size`` is 16. Each such relation is tried: only if the
outputs agree with it is it kept.

Inputs may share a name and not the size: a file of two networks in the branches of an If names the
mask of both after the first, which has no cache. Where nothing else fits, one of them is a sum.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.onnx_io import bind_inputs, is_float, known_shape
from morphgraph.passes.canonical.caches import capacities, continued
from morphgraph.passes.canonical.size_runs import Fold
from morphgraph.passes.canonical.symbols import (
    Symbol,
    addends,
    input_shapes,
    input_symbols,
    plain_names,
    size_name,
)

Relations = Mapping[str, int | str]
"""By the name of an open size what it is: a number, or a sum of others."""

_MAX_SUMS = 40  # that are tried where the operands do not fit


def relate_sizes(model: ir.Model, fold: Fold) -> ir.Model:
    """The model, whose inputs say of open sizes what they follow from, where the outputs tell.

    Args:
        model: is not changed.
        fold: the recipe.
    """
    model = _with(model, _of_caches(model))
    names = _told(model)
    open_sizes = [symbol for symbol in input_symbols(model) if not symbol.is_batch]
    if len(open_sizes) < 2:
        return model
    if not names:
        return _with_own_sizes(model, fold)
    for assumed in [{}, *_sums(model)]:
        related = _with(model, assumed)
        given, fits = _given(related, fold)
        found = _found(related, given)
        if not found:
            if fits:
                return related
            continue
        related = _with(model, {**assumed, **found})
        given, fits = _given(related, fold)
        if fits and not _found(related, given) and _agree(related, given, found):
            return related
    return _with_own_sizes(model, fold)


def _with_own_sizes(model: ir.Model, fold: Fold) -> ir.Model:
    """The model, of whose inputs one that shares an open size has another, where nothing else fits.

    Those that share none are not looked into.
    """
    others = _apart(model)
    if not others or _given(model, fold)[1]:
        return model
    for place, axis, size in others:
        related = model.clone()
        value = related.graph.inputs[place]
        sizes: list[int | ir.SymbolicDim] = list(value.shape or ())
        sizes[axis] = size
        value.shape = ir.Shape(sizes)
        given, fits = _given(related, fold)
        if fits and not _found(related, given):
            return related
    return model


def _of_caches(model: ir.Model) -> dict[str, str]:
    """One name for the length of all caches, which exporters name apart: one for every layer.

    A cache that is a ring has its own.
    """
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    rings = capacities(model)
    for past, _ in continued(model):
        for axis in range(1, len(past.shape or ())):
            if past.shape is not None and isinstance(past.shape[axis], ir.SymbolicDim):
                name = size_name(past, axis)
                kind = (axis, len(past.shape), rings.get(past.name or ""))
                if first.setdefault(kind, name) != name:
                    found[name] = first[kind]
    return found


def _told(model: ir.Model) -> set[str]:
    """Names of open sizes that inputs share with outputs, behind the batch."""
    outputs = {
        size.value
        for value in model.graph.outputs
        for size in list(value.shape or ())[1:]
        if isinstance(size, ir.SymbolicDim) and size.value
    }
    return outputs & plain_names(model)


def _spread(symbols: Sequence[Symbol]) -> list[Symbol]:
    """The symbols at sizes of which none is another, nor hardly any the sum of two."""
    return [
        symbol if symbol.is_batch else replace(symbol, size=symbol.size + 8 * (2**k - 1))
        for k, symbol in enumerate(symbols)
    ]


def _given(model: ir.Model, fold: Fold) -> tuple[dict[str, int], bool]:
    """By the name that an output declares for an axis the size it has; and whether all fits.

    Where something does not, what was found until then is told.
    """
    shapes = input_shapes(model, _spread(input_symbols(model)))
    bound = bind_inputs(model, shapes)
    for node in bound.graph:
        for result in node.outputs:
            result.shape = None  # what the file says of it is what is in question
    fits = True
    try:
        fold(bound, frozenset())
    except ModelError:
        fits = False
    found: dict[str, int] = {}
    for declared, value in zip(model.graph.outputs, bound.graph.outputs, strict=True):
        sizes, names = known_shape(value), list(declared.shape or ())
        if sizes is None or len(sizes) != len(names):
            continue
        for name, size in list(zip(names, sizes, strict=True))[1:]:
            if isinstance(name, ir.SymbolicDim) and name.value:
                found.setdefault(name.value, size)
    return found, fits


def _found(model: ir.Model, given: Mapping[str, int]) -> dict[str, int | str]:
    """What the outputs tell of sizes that are open, and are others there than at the inputs."""
    symbols = [symbol for symbol in _spread(input_symbols(model)) if not symbol.is_batch]
    shapes = input_shapes(model, _spread(input_symbols(model)))
    told = _told(model)
    wrong = {
        name: given[name]
        for value in model.graph.inputs
        for axis in range(1, len(value.shape or ()))
        for name in [size_name(value, axis)]
        if name in told and name in given and given[name] != shapes[value.name or ""][axis]
    }
    free = [symbol for symbol in symbols if symbol.name not in wrong]
    found: dict[str, int | str] = {}
    for name, size in wrong.items():
        sums = [pair for pair in combinations(free, 2) if pair[0].size + pair[1].size == size]
        found[name] = " + ".join(s.name for s in sums[0]) if len(sums) == 1 else size
    return found


def _agree(model: ir.Model, given: Mapping[str, int], found: Relations) -> bool:
    """Whether outputs have the sizes that were found, at other sizes of what is still open."""
    sizes = {symbol.name: symbol.size for symbol in _spread(input_symbols(model))}
    return all(
        given.get(name)
        == (
            size if isinstance(size, int) else sum(sizes.get(part, 0) for part in size.split(" + "))
        )
        for name, size in found.items()
    )


def _sums(model: ir.Model) -> Iterator[dict[str, str]]:
    """Sums that an open size may be of two others; what holds no real numbers goes first."""
    kinds = {
        size_name(value, axis): value.dtype is None or value.dtype.is_floating_point()
        for value in model.graph.inputs
        for axis in range(1, len(value.shape or ()))
    }
    names = sorted(plain_names(model), key=lambda name: kinds[name])
    pairs = [
        (whole, pair)
        for whole in names
        for pair in combinations([name for name in names if name != whole], 2)
    ]
    for whole, pair in pairs[:_MAX_SUMS]:
        yield {whole: " + ".join(pair)}


def _apart(model: ir.Model) -> list[tuple[int, int, ir.SymbolicDim]]:
    """Of inputs that share an open size, by place and axis, sums of it and another."""
    names = plain_names(model)
    axes = [
        (place, axis, size_name(value, axis))
        for place, value in enumerate(model.graph.inputs)
        for axis in range(1, len(value.shape or ()))
        if isinstance((value.shape or ())[axis], ir.SymbolicDim) and not is_float(value)
    ]
    shared = Counter(
        size_name(value, axis)
        for value in model.graph.inputs
        for axis in range(1, len(value.shape or ()))
    )
    found = [
        (place, axis, ir.SymbolicDim(f"{other} + {name}"))
        for place, axis, name in axes
        for other in sorted(names)
        if other != name and shared[name] > 1
    ]
    return found[:_MAX_SUMS]


def _with(model: ir.Model, relations: Relations) -> ir.Model:
    """A copy whose inputs have these sizes."""
    if not relations:
        return model
    copy = model.clone()
    known = plain_names(model)
    for value in copy.graph.inputs:
        sizes = list(value.shape or ())
        for axis in range(1, len(sizes)):
            size = sizes[axis]
            if isinstance(size, ir.SymbolicDim) and not addends(size, known)[0]:
                related = relations.get(size_name(value, axis), size)
                sizes[axis] = ir.SymbolicDim(related) if isinstance(related, str) else related
        if value.shape is not None:
            value.shape = ir.Shape(sizes)
    return copy
