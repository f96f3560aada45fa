"""What a file declares that the canonical form does not need, kept for what is written.

Callers may override an initializer that is an input as well (IR 4 and later). Such a *default* must
not be folded, nor change its size: it becomes an ordinary input here, and gets its default back in
the resized model. Files of old exporters list all weights among the inputs; those stay weights.

Names of open sizes, and what sizes stand for (their denotations), are noted for the same purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.onnx_io import DECLARED_KEY, DEFAULT_KEY, STATIC_SHAPE_KEY, known_shape, values_of
from morphgraph.ops import facts_of

_MIN_IR_VERSION = 4  # before it, initializers had to stand among the inputs


@dataclass(frozen=True)
class Declared:
    """What a file declares.

    Attributes:
        inputs: in order, initializers included.
        shapes: by value.
        meanings: by value the denotation of its type.
    """

    inputs: tuple[str, ...]
    shapes: dict[str, ir.Shape]
    meanings: dict[str, str]


def note_declared(model: ir.Model, source: ir.Model, open_defaults: bool) -> None:
    """Note what the file declares, and take initializers out of the inputs, in place.

    Args:
        model: is changed; it knows from now on what it declared.
        source: the model as it was before inputs were given sizes.
        open_defaults: whether initializers that callers may override become ordinary inputs.
    """
    graph = model.graph
    before = source.meta.get(DECLARED_KEY)
    declared = _shapes(model)
    meant = declared if source is model else _shapes(source)
    meant = meant | ({} if before is None else before.shapes)
    shapes = {name: _with_denotations(s, meant.get(name)) for name, s in declared.items()}
    listed = [value for value in graph.inputs if value.is_initializer()]
    names = () if model.ir_version < _MIN_IR_VERSION else [value.name for value in graph.inputs]
    meanings = {
        value.name or "": value.type.denotation
        for value in (*values_of(source.graph), *source.graph.outputs)
        if value.type is not None and value.type.denotation
    } | ({} if before is None else before.meanings)
    model.meta[DECLARED_KEY] = Declared(tuple(name or "" for name in names), shapes, meanings)
    deliberate = names and not _by_habit(model, listed)
    for value in listed:
        if open_defaults and deliberate and value.uses():
            tensor = value.const_value
            assert tensor is not None
            del graph.initializers[value.name or ""]
            value.const_value = None
            value.meta[DEFAULT_KEY] = tensor
            value.type = ir.TensorType(tensor.dtype)
            value.shape = ir.Shape(tensor.shape.numpy())
        else:
            graph.inputs.remove(value)
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)


def _shapes(model: ir.Model) -> dict[str, ir.Shape]:
    """The shapes that values of the main graph have, by name."""
    graph = model.graph
    values = [*values_of(graph), *graph.outputs]
    return {value.name or "": value.shape for value in values if value.shape is not None}


def _with_denotations(shape: ir.Shape, meant: ir.Shape | None) -> ir.Shape:
    """A shape whose sizes stand for what those of another do."""
    if meant is None or meant is shape or len(meant) != len(shape):
        return shape
    return ir.Shape(shape.dims, [meant.get_denotation(axis) for axis in range(len(shape))])


def _by_habit(model: ir.Model, listed: list[ir.Value]) -> bool:
    """Whether the inputs list weights, as exporters did until 2020: nobody overrides them.

    One kernel or statistic of a layer is enough: a quantizer takes what it replaces off the list.
    """
    weights = [v for v in model.graph.initializers.values() if len(v.shape or ()) > 1]
    if weights and all(value in listed for value in weights):
        return True
    return any(_is_of_a_layer(use.node, use.idx) for value in listed for use in value.uses())


def _is_of_a_layer(node: ir.Node, index: int) -> bool:
    facts = facts_of(node)
    pointwise = facts.adds or facts.multiplies
    return index > 0 and facts.initial is not None and not pointwise


def restore_declared(model: ir.Model, is_whole: Callable[[str, int], bool]) -> None:
    """Give a resized model what its file declared, in place, apart from sizes that changed.

    Args:
        model: its metadata in memory says what was declared.
        is_whole: whether an axis of a value has the size that it had.
    """
    declared = model.meta.get(DECLARED_KEY)
    graph = model.graph
    symbols = {
        dim.value for v in graph.inputs for dim in v.shape or () if isinstance(dim, ir.SymbolicDim)
    }
    outputs = set(graph.outputs)
    results = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *results, *graph.initializers.values()):
        if value.shape is None:
            continue
        given = None if declared is None else declared.shapes.get(value.name or "")
        if given is None or len(given) != len(value.shape):
            given = ir.Shape([None] * len(value.shape))
        _restore_shape(value, given, symbols, value in outputs, is_whole)
        meaning = None if declared is None else declared.meanings.get(value.name or "")
        if meaning is not None and value.dtype is not None:
            value.type = ir.TensorType(value.dtype, denotation=meaning)
    if declared is not None:
        _restore_inputs(graph, declared.inputs)


def _restore_shape(
    value: ir.Value,
    declared: ir.Shape,
    symbols: set[str | None],
    is_output: bool,
    is_whole: Callable[[str, int], bool],
) -> None:
    assert value.shape is not None
    rank = len(value.shape)
    means_something = any(map(declared.get_denotation, range(rank)))
    if known_shape(value) is not None and not is_output and not means_something:
        return  # as nearly all
    dims: list[int | ir.SymbolicDim] = []
    for axis, dim in enumerate(value.shape):
        name = declared[axis]
        if is_output and _is_named(name) and is_whole(value.name or "", axis):
            dims.append(name)
        elif isinstance(dim, ir.SymbolicDim) and dim.value not in symbols:
            # An expression that was fitted to a few sizes: ONNX Runtime plans its memory by equal
            # texts, so that one that is wrong does harm, and none does not.
            dims.append(ir.SymbolicDim(None))
        else:
            dims.append(dim)
    denotations = [declared.get_denotation(axis) for axis in range(rank)]
    if dims == list(value.shape) and not any(denotations):
        return
    # What was restored from the file as it was has no sizes to be analysed with.
    analysed = known_shape(value)
    if not value.is_initializer() and STATIC_SHAPE_KEY not in value.meta and analysed is not None:
        value.meta[STATIC_SHAPE_KEY] = analysed
    value.shape = ir.Shape(dims, denotations=denotations)


def _is_named(dim: object) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None


def _restore_inputs(graph: ir.Graph, names: tuple[str, ...]) -> None:
    """The inputs in their order, with their defaults; weights that were listed are so again."""
    inputs = {value.name: value for value in graph.inputs}
    for value in inputs.values():
        if DEFAULT_KEY in value.meta:
            value.const_value = value.meta[DEFAULT_KEY]
            graph.register_initializer(value)
    if not names:
        return
    known = dict(graph.initializers) | {name or "": value for name, value in inputs.items()}
    graph.inputs.clear()
    graph.inputs.extend(known[name] for name in names if name in known)
