"""Smaller inputs on which a comparison proves the same.

What a resize may get wrong is which positions of an axis stay. Inputs of fewer pixels show it as
well as the full ones, and cost a fraction, if

- every axis that holds channels keeps its size, so that all the same positions are compared;
- every number of every kernel still meets a number of the map that it slides over. In the middle of
  a large map each does, on a map of one pixel a 3x3 kernel is its middle alone;
- everything else still fits together: there is no table, target of a Reshape or position embedding
  that holds a height or width.

Where any of these fails, there are no smaller inputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.runtime import message_without_weights
from morphgraph.ops import OpNode, facts_of
from morphgraph.ops.linear import Window
from morphgraph.passes.coupling.couple import input_independent_values

_SPACE = 2
"""The axis from which on a map has heights and widths: ``[batch, channels, *S]``."""

_MOST_TRIED = 2
"""Sizes for which everything is worked out."""

_WORTH_WHILE = 0.6
"""Share of the pixels above which the full inputs are taken."""


def smaller_inputs(graph: ChannelGraph) -> dict[str, Shape] | None:
    """Shapes of inputs on which a comparison proves the same, by name; ``None``: there are none."""
    inputs = [v for v in graph.model.graph.inputs if not v.is_initializer()]
    full = {value.name or "": static_shape(value) for value in inputs}
    pixels = sum(math.prod(shape) for shape in full.values())
    weights = input_independent_values(graph.model)
    windows = [s for node in graph.model.graph if (s := _sliding(graph, node, weights))]
    for share in _shares(windows):
        shapes = {
            name: (*shape[:_SPACE], *(math.ceil(size * share - 1e-9) for size in shape[_SPACE:]))
            for name, shape in full.items()
        }
        if sum(map(math.prod, shapes.values())) > _WORTH_WHILE * pixels:
            return None
        if _proves_the_same(graph, windows, shapes):
            return shapes
    return None


class _Sliding(NamedTuple):
    """A node whose kernel slides, and sizes of the axes on which it does, before and after."""

    node: ir.Node
    window: Window
    given: Shape
    made: Shape


def _sliding(graph: ChannelGraph, node: ir.Node, weights: frozenset[str]) -> _Sliding | None:
    linear = facts_of(node).linear
    window = facts_of(node).call(linear, node, OpNode(node, weights)) if linear else None
    if not isinstance(window, Window):
        return None
    given, made = _operand_and_result(node, window, graph.shapes)
    return _Sliding(node, window, given, made)


def _operand_and_result(
    node: ir.Node, window: Window, shapes: Mapping[str, Shape]
) -> tuple[Shape, Shape]:
    values = node.inputs[window.operand], node.outputs[0]
    given, made = (shapes[value.name or ""][_SPACE:] for value in values if value is not None)
    return given, made


def _shares(windows: Sequence[_Sliding]) -> Iterator[float]:
    """Shares of heights and widths to try, the least first.

    The smallest map that a kernel slides over gets 1, 2, ... pixels, until there are enough for all
    kernels; and one more, if those should not do.
    """
    sizes = [size for sliding in windows for size in sliding.given if size > 1]
    least = min(sizes, default=1)
    tried = 0
    for count in range(1, least):
        share = count / least
        if tried or all(
            _meets_as_much(
                sliding, *(tuple(math.ceil(n * share) for n in sizes) for sizes in sliding[2:])
            )
            for sliding in windows
        ):
            yield share
            tried += 1
        if tried == _MOST_TRIED:
            return


def _meets_as_much(sliding: _Sliding, given: Shape, made: Shape) -> bool:
    """Whether all numbers of a kernel that meet the map at full size do so at these sizes."""
    met = sliding.window.met
    return all(
        np.all(met(axis, *small) | ~met(axis, *full))
        for axis, (small, full) in enumerate(
            zip(
                zip(given, made, strict=True),
                zip(sliding.given, sliding.made, strict=True),
                strict=True,
            )
        )
    )


def _proves_the_same(
    graph: ChannelGraph, windows: Sequence[_Sliding], inputs: Mapping[str, Shape]
) -> bool:
    """Whether the three conditions hold on inputs of these shapes."""
    inferred = _inferred(graph.model, inputs)
    if inferred is None:
        return False
    small = {**graph.shapes, **inferred, **inputs}
    results = {value.name for node in graph.model.graph for value in node.outputs if value.name}
    if not results <= inferred.keys():
        return False
    slides = {sliding.node: sliding for sliding in windows}
    return all(
        _keeps_channels(graph, name, full, small[name]) for name, full in graph.shapes.items()
    ) and all(
        _meets_as_much(slides[node], *_operand_and_result(node, slides[node].window, small))
        if node in slides
        else _is_even(node, graph.shapes, small) and _moves_all(node, graph.shapes, small)
        for node in graph.model.graph
    )


def _keeps_channels(graph: ChannelGraph, name: str, full: Shape, small: Shape) -> bool:
    """Whether only axes without channels have become smaller, and none is empty now."""
    return len(small) == len(full) and all(
        after == before or (0 < after < before and not graph.groups_on(graph.dim(name, axis)))
        for axis, (before, after) in enumerate(zip(full, small, strict=True))
    )


def _is_even(node: ir.Node, full: Mapping[str, Shape], small: Mapping[str, Shape]) -> bool:
    """Whether no kernel slides here unknown to the program: a computed, or a deformed one."""
    names = [value.name or "" for value in node.inputs if value is not None]
    kept = {name for name in names if small.get(name) == full.get(name)}
    return len(kept) == len(names) or not any(
        size > 1 for name in kept for size in full.get(name, ())[_SPACE:]
    )


def _moves_all(node: ir.Node, full: Mapping[str, Shape], small: Mapping[str, Shape]) -> bool:
    """Whether what moves each number does so at these sizes as well: inference does not count."""
    if not facts_of(node).moves:
        return True
    names = [value.name or "" for value in (*node.inputs[:1], *node.outputs[:1]) if value]
    return not all(name in full and name in small for name in names) or (
        len({math.prod(full[name]) for name in names}) > 1
        or len({math.prod(small[name]) for name in names}) == 1
    )


def _inferred(model: ir.Model, inputs: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """The shapes of all values whose sizes ONNX can tell; ``None``: something does not fit."""
    try:
        proto = onnx.shape_inference.infer_shapes(
            message_without_weights(model, inputs), strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
        return None
    shapes = {
        value.name: value.type.tensor_type.shape.dim
        for value in (*proto.graph.value_info, *proto.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    return {
        name: tuple(dim.dim_value for dim in dims)
        for name, dims in shapes.items()
        if all(dim.HasField("dim_value") for dim in dims)
    }
