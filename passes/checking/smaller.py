"""Smaller inputs on which a comparison proves the same.

What a resize may get wrong is which positions of an axis stay. Inputs of fewer pixels show it as
well as the full ones, and cost a fraction, if

- every axis that holds channels keeps its size, so that all the same positions are compared;
- every number of every kernel still meets a number of the map that it slides over. In the middle of
  a large map each does, on a map of one pixel a 3x3 kernel is its middle alone;
- every statistic that leaves its terms in place (softmax, a norm) still has several of them: over
  one alone it is a constant;
- everything else still fits together: there is no table, target of a Reshape or position embedding
  that holds a height or width.

Where any of these fails, there are no smaller inputs; ``shorter`` may find some yet, if it is the
last.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.messages import Written
from morphgraph.ops import OpNode, facts_of
from morphgraph.ops.linear import Window
from morphgraph.passes.coupling.roles import roles

_SPACE = 2
"""The axis from which on a map has heights and widths: ``[batch, channels, *S]``."""

_MOST_TRIED = 2
"""Sizes for which everything is worked out."""

_WORTH_WHILE = 0.6
"""Share of the pixels above which the full inputs are taken."""


def smaller_inputs(graph: ChannelGraph) -> dict[str, Shape] | None:
    """Shapes of inputs on which a comparison proves the same, by name; ``None``: there are none."""
    windows = windows_of(graph)
    for share in shares(windows):
        shapes = inputs_of(graph, share)
        if shapes is None:
            return None
        if proves_the_same(graph, windows, inferred(written(graph).message(shapes))):
            return shapes
    return None


@analysis
def written(graph: ChannelGraph) -> Written:
    """The parts of messages of the original at several sizes."""
    return Written(graph.model)


def inputs_of(graph: ChannelGraph, share: float) -> dict[str, Shape] | None:
    """Inputs with this share of heights and widths; ``None``: it is not worth while."""
    inputs = [v for v in graph.model.graph.inputs if not v.is_initializer()]
    full = {value.name or "": static_shape(value) for value in inputs}
    shapes = {
        name: (*shape[:_SPACE], *(math.ceil(size * share - 1e-9) for size in shape[_SPACE:]))
        for name, shape in full.items()
    }
    pixels = sum(math.prod(shape) for shape in full.values())
    return shapes if sum(map(math.prod, shapes.values())) <= _WORTH_WHILE * pixels else None


class Sliding(NamedTuple):
    """A node whose kernel slides, and sizes of the axes on which it does, before and after."""

    node: ir.Node
    window: Window
    given: Shape
    made: Shape


@analysis
def windows_of(graph: ChannelGraph) -> list[Sliding]:
    """The nodes whose kernels slide over maps, in the model's order."""
    weights = graph.couplings.input_independent
    return [s for node in graph.model.graph if (s := _sliding(graph, node, weights))]


def _sliding(graph: ChannelGraph, node: ir.Node, weights: frozenset[str]) -> Sliding | None:
    linear = facts_of(node).linear
    window = facts_of(node).call(linear, node, OpNode(node, weights)) if linear else None
    if not isinstance(window, Window):
        return None
    given, made = _operand_and_result(node, window, graph.shapes)
    return Sliding(node, window, given, made)


def _operand_and_result(
    node: ir.Node, window: Window, shapes: Mapping[str, Shape]
) -> tuple[Shape, Shape]:
    values = node.inputs[window.operand], node.outputs[0]
    given, made = (shapes[value.name or ""][_SPACE:] for value in values if value is not None)
    return given, made


def shares(windows: Sequence[Sliding]) -> Iterator[float]:
    """Shares of heights and widths to try, the least first.

    The smallest map that a kernel slides over gets 1, 2, ... pixels, until there are enough for all
    kernels; and one more, if those should not do.
    """
    sizes = [size for sliding in windows for size in sliding.given if size > 1]
    least = min(sizes, default=1)
    tried = 0
    kinds = {sliding[1:] for sliding in windows}  # a few, of hundreds of nodes
    for count in range(1, least):
        share = count / least
        if tried or all(
            _meets_as_much(window, full, [[math.ceil(n * share) for n in sizes] for sizes in full])
            for window, *full in kinds
        ):
            yield share
            tried += 1
        if tried == _MOST_TRIED:
            return


def _meets_as_much(
    window: Window, full: Sequence[Sequence[int]], small: Sequence[Sequence[int]]
) -> bool:
    """Whether all numbers of a kernel that meet the map at full size do so at these sizes.

    Sizes are those of operand and result.
    """
    pairs = zip(zip(*full, strict=True), zip(*small, strict=True), strict=True)
    return all(
        np.all(window.met(axis, *after) | ~window.met(axis, *before))
        for axis, (before, after) in enumerate(pairs)
    )


def proves_the_same(
    graph: ChannelGraph,
    windows: Sequence[Sliding],
    found: Mapping[str, Shape] | None,
    cut: Container[str] = (),
) -> bool:
    """Whether the conditions hold where values have these shapes, all others being as they were.

    Values of ``cut`` are made in full, and only their readers find them smaller.
    """
    if found is None:
        return False
    small = {**graph.shapes, **found}
    results = {value.name for node in graph.model.graph for value in node.outputs if value.name}
    if not results <= found.keys():
        return False
    slides = {sliding.node for sliding in windows}
    kinds = {
        (sliding[1:], _operand_and_result(sliding.node, sliding.window, small))
        for sliding in windows
    }
    return (
        all(keeps_channels(graph, name, full, small[name]) for name, full in graph.shapes.items())
        and _has_terms(graph, small)
        and all(_meets_as_much(window, full, sizes) for (window, *full), sizes in kinds)
        and all(
            _is_even(graph, k, small)
            and (node.outputs[0].name in cut or _moves_all(node, graph.shapes, small))
            for k, node in enumerate(graph.model.graph)
            if node not in slides
        )
    )


def keeps_channels(graph: ChannelGraph, name: str, full: Shape, small: Shape) -> bool:
    """Whether only axes without channels have become smaller, and none is empty now."""
    return full == small or (
        len(small) == len(full)
        and all(
            after == before or (0 < after < before and not graph.groups_on(graph.dim(name, axis)))
            for axis, (before, after) in enumerate(zip(full, small, strict=True))
        )
    )


def _has_terms(graph: ChannelGraph, small: Mapping[str, Shape]) -> bool:
    """Whether no statistic that leaves its terms in place has but one where it had more."""
    couplings, columns = graph.couplings, graph.couplings.columns
    sizes = couplings.sizes
    enters = roles(couplings).keeps[columns.factor] & (sizes[columns.factor] > 1)
    several = np.unique(columns.dim[enters & (sizes[columns.dim] > 1)])
    dims = map(couplings.dims.__getitem__, several.tolist())
    return all(small[dim.value][dim.axis] > 1 for dim in dims)


def _is_even(graph: ChannelGraph, op_index: int, small: Mapping[str, Shape]) -> bool:
    """Whether no kernel slides here unknown to the program: a computed, or a deformed one.

    An axis that stands in the result as it is slides over nothing.
    """
    names = [value.name or "" for value in graph.ops[op_index].ir.inputs if value is not None]
    kept = {name for name in names if small.get(name) == graph.shapes.get(name)}
    if len(kept) == len(names):
        return True
    alone = {
        (name, axis)
        for name in kept
        for axis, size in enumerate(graph.shapes.get(name, ()))
        if size > 1 and axis >= _SPACE
    }
    if alone:
        edges, dims = graph.edges_of(op_index), graph.couplings.dims
        made = {edge.factor for edge in edges if edge.port < 0}
        for edge in edges:  # one that has become smaller beside it would be repeated now
            dim = dims[edge.dim]
            size = graph.shapes[dim.value][dim.axis]
            if not edge.whole or small[dim.value][dim.axis] != size:
                made.discard(edge.factor)
        standing = [dims[edge.dim] for edge in edges if edge.factor in made]
        alone -= {(dim.value, dim.axis) for dim in standing}
    return not alone


def _moves_all(node: ir.Node, full: Mapping[str, Shape], small: Mapping[str, Shape]) -> bool:
    """Whether what moves each number does so at these sizes as well: inference does not count."""
    if not facts_of(node).moves:
        return True
    names = [value.name or "" for value in (*node.inputs[:1], *node.outputs[:1]) if value]
    return not all(name in full and name in small for name in names) or (
        len({math.prod(full[name]) for name in names}) > 1
        or len({math.prod(small[name]) for name in names}) == 1
    )


def inferred(message: bytes | onnx.ModelProto, strict: bool = True) -> dict[str, Shape] | None:
    """The shapes of all values whose sizes ONNX can tell; ``None``: something does not fit."""
    try:
        proto = onnx.shape_inference.infer_shapes(message, strict_mode=strict, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
        return None
    shapes: dict[str, Shape] = {}
    for value in (*proto.graph.value_info, *proto.graph.output, *proto.graph.input):
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            continue
        dims = tensor.shape.dim
        shapes[value.name] = sizes = tuple([dim.dim_value for dim in dims])
        if 0 in sizes and not all(dim.HasField("dim_value") for dim in dims):  # some are open
            del shapes[value.name]
    return shapes
