"""Bring any ONNX model into the one form that all other passes work on.

Local functions are inlined, constants folded (but never what is computed from a parameter),
operators that do nothing dropped, weights made initializers, nodes named, and the size of every
value known. Nothing is tied, merged or fused: batch normalizations and parameter names survive, so
that the model can still be trained.

A model with a dynamic batch is analysed at batch 2. Running the same recipe at batch 3 shows which
sizes, and which numbers in shape tensors, depend on the batch: those stay dynamic. Where more sizes
are open, the pass ``open_sizes`` does the same for each of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_check import check_opset
from morphgraph.onnx_io import bind_inputs, escape, static_shape
from morphgraph.ops import entry_of
from morphgraph.passes.fold import fold_constants
from morphgraph.passes.open_sizes import STATIC_SHAPE_KEY, open_symbols, settle_open_sizes
from morphgraph.passes.unpack import unpack_sequences

CANONICAL_KEY = "morphgraph.canonical"

_BATCHES = (2, 3)  # the first is what the model is analysed with
_MAX_INLINED_NODES = 1_000_000


def canonicalize(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> ir.Model:
    """The canonical form of a model: a new model that shares its weights with the old one.

    Symbolic sizes of inputs stay dynamic; a leading one is the batch. Values that depend on them
    keep a symbolic size in ``value.shape``, and ``value.meta["static_shape"]`` says what they are
    analysed with. A model that is canonical already is returned as it is.

    Args:
        model: any model of opset 11 or later; it is not changed.
        input_shapes: sizes for inputs; an input named here becomes static.

    Raises:
        ModelError: operands do not fit together, or a size cannot be known; where ``input_shapes``
            would help, the message says so.
        UnsupportedError: an input is not a tensor.
    """
    if model.meta.get(CANONICAL_KEY) and not input_shapes:
        return model
    check_opset(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))
    bound = bind_inputs(model, input_shapes or {})
    common.RemoveInitializersFromInputsPass()(bound)
    dynamic = _dynamic_inputs(bound)
    symbols = open_symbols(bound)
    if not symbols:
        return _finish(_fold(bound))
    if any(axis > 0 for symbol in symbols for _, axis in symbol.axes):
        return _finish(settle_open_sizes(bound, symbols, _fold_keeping))
    first, second = (
        _fold(bind_inputs(bound, _with_batch(bound, dynamic, size))) for size in _BATCHES
    )
    declared = {value.name or "": ir.Shape(value.shape or ()) for value in bound.graph.inputs}
    try:
        _restore_batch(first, second, declared)
    except ModelError:
        # What cannot be written for any batch is left computed, as for other open sizes.
        return _finish(settle_open_sizes(bound, symbols, _fold_keeping))
    return _finish(first)


def _dynamic_inputs(model: ir.Model) -> list[str]:
    """Names of the inputs whose first size is open; images with open channels are refused."""
    names = []
    for value in model.graph.inputs:
        where = f"input '{escape(value.name or '')}'"
        remedy = f"give --input-shape {escape(value.name or '')}=..."
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise UnsupportedError(f"{where}: is not a tensor; export the model with tensor inputs")
        if value.shape is None:
            raise ModelError(f"{where}: its shape is not known; {remedy}")
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and size > 0:
                continue
            is_channel = axis == 1 and len(value.shape) > 3
            if isinstance(size, int) or is_channel:
                raise ModelError(f"{where}: size {axis} of {value.shape} is not known; {remedy}")
            if axis == 0:
                names.append(value.name or "")
    return names


def _with_batch(model: ir.Model, names: Sequence[str], batch: int) -> dict[str, list[int]]:
    shapes = {value.name: value.shape for value in model.graph.inputs}
    return {
        name: [size if isinstance(size, int) else batch for size in shapes[name] or ()]
        for name in names
    }


def _fold(model: ir.Model) -> ir.Model:
    """The recipe itself, in place, for a model whose inputs are static."""
    _fold_keeping(model, frozenset())
    return model


def _fold_keeping(model: ir.Model, varying: frozenset[str]) -> dict[str, object]:
    """The recipe, keeping the nodes of some values; returns what the folded values were."""
    _inline(model)
    try:
        model.graph.sort()
    except ValueError as error:
        raise ModelError("the graph has a cycle; export the model again") from error
    _name_nodes(model.graph)
    folded = fold_constants(model, varying)
    unpack_sequences(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _name_nodes(model.graph)
    _check_shapes(model.graph)
    return folded


def _finish(model: ir.Model) -> ir.Model:
    model.meta[CANONICAL_KEY] = True
    return model


def _inline(model: ir.Model) -> None:
    if not model.functions:
        return
    _check_calls(model)
    try:
        common.InlinePass()(model)
    except ValueError as error:
        raise ModelError(f"local functions cannot be inlined: {escape(str(error))}") from error


def _check_calls(model: ir.Model) -> None:
    """Refuse functions that call themselves, or grow beyond all bounds once inlined."""
    calls = {
        identifier: Counter(node.op_identifier() for node in function.all_nodes())
        for identifier, function in model.functions.items()
    }
    sizes: dict[ir.OperatorIdentifier, int] = {}
    waiting = {
        identifier: sum(callee in calls for callee in callees)
        for identifier, callees in calls.items()
    }
    callers: dict[ir.OperatorIdentifier, list[ir.OperatorIdentifier]] = {name: [] for name in calls}
    for identifier, callees in calls.items():
        for callee in callees:
            if callee in callers:
                callers[callee].append(identifier)
    ready = [identifier for identifier, number in waiting.items() if number == 0]
    while ready:
        identifier = ready.pop()
        sizes[identifier] = _inlined_size(calls[identifier], sizes)
        for caller in callers[identifier]:
            waiting[caller] -= 1
            if waiting[caller] == 0:
                ready.append(caller)
    stuck = [identifier for identifier in calls if identifier not in sizes]
    if stuck:
        raise ModelError(
            f"function '{escape(stuck[0][1])}': calls itself; ONNX does not allow recursion"
        )
    main = Counter(node.op_identifier() for node in model.graph.all_nodes())
    if _inlined_size(main, sizes) > _MAX_INLINED_NODES:
        raise ModelError(
            f"local functions expand to more than {_MAX_INLINED_NODES} nodes; export without them"
        )


def _inlined_size(
    calls: Mapping[ir.OperatorIdentifier, int], sizes: Mapping[ir.OperatorIdentifier, int]
) -> int:
    return sum(number * sizes.get(callee, 1) for callee, number in calls.items())


def _name_nodes(graph: ir.Graph) -> None:
    """Name unnamed nodes after their first result, and tell nodes of the same name apart."""
    taken: set[str] = set()
    for node in graph:
        base = node.name or "_".join([node.op_type, *(v.name or "" for v in node.outputs[:1])])
        name = base
        suffixes = count(1)
        while name in taken:
            name = f"{base}_{next(suffixes)}"
        taken.add(name)
        node.name = name


def _check_shapes(graph: ir.Graph) -> None:
    for node in graph:
        for value in node.outputs:
            known = value.shape is not None and all(isinstance(size, int) for size in value.shape)
            if value.name and not (known and value.dtype is not None):
                raise ModelError(
                    f"node '{escape(node.name or '')}' ({escape(node.op_type)}): the size of its "
                    f"result '{escape(value.name)}' cannot be known; {_make_known(node)}"
                )


def _make_known(node: ir.Node) -> str:
    """How the size of a node's results can become known, as it stands in a message."""
    if onnx.defs.has(node.op_type, node.domain):
        return "declare it in the model's value_info, or export with fixed shapes"
    entry = entry_of(node.op_type, node.domain)
    if entry is None:
        return "teach the operator (mg.register, --ops), or declare it in the model's value_info"
    where = f" ({entry.origin})" if entry.origin else ""
    return f"give its `register`{where} a shape function, or declare it in the model's value_info"


# -- dynamic batch -----------------------------------------------------------------------------


def _restore_batch(model: ir.Model, other: ir.Model, symbols: Mapping[str, ir.Shape]) -> None:
    """Make dynamic again what differs between the model at one batch size and at another."""
    structure, other_structure = (
        [(node.name, node.op_identifier()) for node in graph]
        for graph in (model.graph, other.graph)
    )
    if (
        structure != other_structure
        or model.graph.initializers.keys() != other.graph.initializers.keys()
    ):
        raise ModelError(
            "the network's structure depends on the batch size; give --input-shape for a fixed one"
        )
    twins = {value.name: value for node in other.graph for value in node.outputs}
    twins |= {value.name: value for value in other.graph.inputs}
    for value in list(model.graph.initializers.values()):
        if not _same_tensor(value, other.graph.initializers[value.name or ""]):
            for use in list(value.uses()):
                _restore_operand(model, use.node, use.idx, twins)
    common.RemoveUnusedNodesPass()(model)
    symbol = next(dim.value for dim in map(_first_dim, symbols.values()) if dim) or "batch"
    made = (value for node in model.graph for value in node.outputs if value.name)
    for value in (*model.graph.inputs, *made, *model.graph.initializers.values()):
        sizes = static_shape(value)
        twin = twins.get(value.name)
        if value.name and value.name in symbols:
            value.shape = symbols[value.name]
        elif twin is not None:
            value.shape = ir.Shape(
                _symbolic(a, b, symbol) for a, b in zip(sizes, static_shape(twin), strict=True)
            )
        value.meta[STATIC_SHAPE_KEY] = sizes


def _first_dim(shape: ir.Shape) -> ir.SymbolicDim | None:
    first = shape[0] if len(shape) else None
    return first if isinstance(first, ir.SymbolicDim) else None


def _same_tensor(value: ir.Value, twin: ir.Value) -> bool:
    a, b = value.const_value, twin.const_value
    assert a is not None
    assert b is not None
    # Weights are shared by both models; only what was folded needs a look inside.
    return a is b or (a.shape == b.shape and np.array_equal(a.numpy(), b.numpy(), equal_nan=True))


def _restore_operand(
    model: ir.Model, node: ir.Node, index: int, twins: Mapping[str | None, ir.Value]
) -> None:
    """Write a shape operand that depends on the batch so that the batch stays open."""
    if index == 1 and not node.domain and node.op_type in ("Reshape", "Expand"):
        sizes = list(static_shape(node.outputs[0]))
        others = static_shape(twins[node.outputs[0].name])
        varying = [axis for axis, size in enumerate(sizes) if size != others[axis]]
        if node.op_type == "Reshape" and len(varying) == 1:
            sizes[varying[0]] = -1
            _replace_initializer(node, index, sizes)
            return
        if node.op_type == "Expand" and _restore_expand(model, node, sizes, varying):
            return
    operand = node.inputs[index]
    raise ModelError(
        f"node '{escape(node.name or '')}' ({escape(node.op_type)}): its operand "
        f"'{escape(operand.name or '') if operand else index}' depends on the batch size; "
        "give --input-shape for a fixed one"
    )


def _restore_expand(
    model: ir.Model, node: ir.Node, sizes: Sequence[int], varying: Sequence[int]
) -> bool:
    source = node.inputs[0]
    assert source is not None
    padded = (1,) * (len(sizes) - len(static_shape(source))) + static_shape(source)
    # A 1 in Expand's operand leaves that size as it is.
    target = [1 if old == new else new for old, new in zip(padded, sizes, strict=True)]
    if all(target[axis] == 1 for axis in varying):
        _replace_initializer(node, 1, target)
        return True
    if list(varying) != [0] or sizes[0] != _BATCHES[0] or model.opset_imports.get("", 0) < 15:
        return False
    # Something without a batch is repeated for every sample, as the class token of a
    # transformer: the one case that must look at the input.
    batched = next(v for v in model.graph.inputs if static_shape(v)[:1] == (_BATCHES[0],))
    node.replace_input_with(1, _sizes_with_batch(node, node.outputs[0].name or "", batched, target))
    return True


def _sizes_with_batch(
    node: ir.Node, name: str, batched: ir.Value, sizes: Sequence[int]
) -> ir.Value:
    """A shape whose first size is that of an input, as new nodes before a node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    batch = ir.node("Shape", [batched], {"start": 0, "end": 1}, name=f"{name}_batch")
    batch.outputs[0].name = f"{name}_batch"
    _describe_vector(batch.outputs[0], 1)
    graph.insert_before(node, [batch])
    if len(sizes) == 1:
        return batch.outputs[0]
    rest = _register(graph, f"{name}_rest", sizes[1:])
    shape = ir.node("Concat", [batch.outputs[0], rest], {"axis": 0}, name=f"{name}_shape")
    shape.outputs[0].name = f"{name}_shape"
    _describe_vector(shape.outputs[0], len(sizes))
    graph.insert_before(node, [shape])
    return shape.outputs[0]


def batched_sizes(graph: ir.Graph, node: ir.Node, name: str, shape: ir.Shape) -> ir.Value | None:
    """What expands a value without a batch to one per sample, computed before a node.

    Args:
        graph: a canonical model's.
        node: the reader.
        name: what the new values' names begin with.
        shape: the expanded sizes; ``None`` is returned unless the first, and it alone, is open, and
            that of an input.
    """
    if graph.opset_imports.get("", 0) < 15 or not all(isinstance(n, int) for n in shape[1:]):
        return None
    batched = next((v for v in graph.inputs if v.shape and v.shape[0] == shape[0]), None)
    # A 1 in Expand's operand leaves that size as it is.
    return None if batched is None else _sizes_with_batch(node, name, batched, [1] * len(shape))


def _describe_vector(value: ir.Value, size: int) -> None:
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([size])


def _replace_initializer(node: ir.Node, index: int, numbers: Sequence[int]) -> None:
    """Give a node an operand of its own; the old one may have other readers."""
    old = node.inputs[index]
    assert old is not None
    assert old.graph is not None
    if len(old.uses()) == 1:
        old.const_value = ir.tensor(np.array(numbers, np.int64))
        _describe_vector(old, len(numbers))
        return
    new = _register(old.graph, f"{old.name}_{node.name}", numbers)
    node.replace_input_with(index, new)


def _register(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64)))
    _describe_vector(value, len(numbers))
    graph.register_initializer(value)
    return value


def _symbolic(size: int, other: int, symbol: str) -> int | str:
    """A size that grows with the batch, as an expression in it."""
    if size == other:
        return size
    times = other - size  # the two batches differ by one
    constant = size - times * _BATCHES[0]
    scaled = symbol if times == 1 else f"{times}*{symbol}"
    return f"{scaled}{constant:+d}" if constant else scaled
