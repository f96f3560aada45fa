"""Bring any ONNX model into the one form that all other passes work on.

Local functions are inlined, constants folded (but never what is computed from a parameter),
operators that do nothing dropped, weights made initializers, nodes named, and the size of every
value known. Nothing is tied, merged or fused: batch normalizations and parameter names survive, so
that the model can still be trained.

Dynamic sizes stay dynamic: ``dynamic_sizes`` runs the recipe at several sizes and compares.
"""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.edit import name_nodes
from morphgraph.errors import ModelError, UnsupportedError, warn
from morphgraph.onnx_io import (
    CANONICAL_KEY,
    CHOICE_KEY,
    DECLARED_KEY,
    ORIGINAL_KEY,
    PARAMETERS_KEY,
    bind_inputs,
    bind_own_inputs,
    escape,
    is_unsized,
    keep_known_names,
    known_shape,
    mark_unsized,
    node_label,
)
from morphgraph.onnx_io.check import check_opset
from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.maps import is_map
from morphgraph.ops import entry_of, listed_parameters
from morphgraph.passes.canonical.choices import note_choices
from morphgraph.passes.canonical.declared import note_declared
from morphgraph.passes.canonical.dynamic_sizes import keep_sizes_dynamic
from morphgraph.passes.canonical.expected import note_expected
from morphgraph.passes.canonical.fold import fold_constants
from morphgraph.passes.canonical.inline import inline_functions, sort_nodes
from morphgraph.passes.canonical.keep_rows_apart import keep_rows_apart
from morphgraph.passes.canonical.lengths import note_lengths
from morphgraph.passes.canonical.relate_sizes import relate_sizes
from morphgraph.passes.canonical.separate_packed import separate_packed
from morphgraph.passes.canonical.size_runs import Digests
from morphgraph.passes.canonical.split_sequences import split_sequences
from morphgraph.passes.canonical.symbols import input_symbols
from morphgraph.passes.canonical.untie import untie_constants

_MAX_NAMED = 3  # operators in one warning


def canonicalize(
    model: ir.Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    open_defaults: bool = False,
    is_own: bool = False,
    keep_original: bool = True,
) -> ir.Model:
    """The canonical form of a model: a new model that shares its weights with the old one.

    Symbolic sizes of inputs stay dynamic; a leading one is the batch. Values that depend on them
    keep a symbolic size in ``value.shape``, and ``value.meta["static_shape"]`` says what they are
    analysed with. Results whose size nobody knows are marked (``is_unsized``), and a warning names
    the operators that make them. A model that is canonical already is returned as it is.

    Args:
        model: any model of opset 11 or later; it is not changed.
        input_shapes: sizes for inputs; an input named here becomes static.
        open_defaults: initializers that are inputs as well, and may be overridden by callers,
            become ordinary inputs; else they are constants.
        is_own: nobody else has the model, which then may be changed: to copy it takes long.
        keep_original: note what the model was, for what is written (``restore``).

    Raises:
        ModelError: operands do not fit together, or the size of an input is not known; where
            ``input_shapes`` would help, the message says so.
        UnsupportedError: an input is not a tensor.
    """
    has_defaults = open_defaults and any(v.is_initializer() for v in model.graph.inputs)
    if model.meta.get(CANONICAL_KEY) and not input_shapes and not has_defaults:
        return model
    check_opset(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))
    changes = is_own and not input_shapes
    bound = bind_own_inputs(model, {}) if changes else bind_inputs(model, input_shapes or {})
    note_declared(bound, model, open_defaults)
    declared = bound.meta[DECLARED_KEY]
    _check_inputs(bound)
    inline_functions(bound)
    _drop_outdated_metadata(bound)
    sort_nodes(bound.graph)
    name_nodes(bound.graph)
    original = bound
    related = relate_sizes(original, _fold)
    symbols = input_symbols(related)
    if symbols:
        bound = keep_sizes_dynamic(related, symbols, _fold)
    else:
        bound = copied(original) if keep_original else original
        _fold(bound, frozenset())
    untie_constants(bound)
    note_lengths(bound)
    note_expected(bound)
    note_choices(bound)
    _warn_of_unsized(bound.graph)
    bound.meta.update({CANONICAL_KEY: True, DECLARED_KEY: declared})
    if keep_original:
        bound.meta[ORIGINAL_KEY] = original
    return bound


def _check_inputs(model: ir.Model) -> None:
    """Refuse inputs that are no tensors, or of a size that is neither known nor open."""
    for value in model.graph.inputs:
        where = f"input '{escape(value.name or '')}'"
        remedy = f"give --input-shape {escape(value.name or '')}=..."
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise UnsupportedError(f"{where}: is not a tensor; export the model with tensor inputs")
        if value.shape is None:
            raise ModelError(f"{where}: its shape is not known; {remedy}")
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and size <= 0:
                raise ModelError(f"{where}: axis {axis} of {value.shape} has size {size}; {remedy}")


def _fold(model: ir.Model, varying: frozenset[str]) -> Digests:
    """The recipe, in place, for a model whose inputs are static; digests of what was folded.

    Nodes that compute ``varying`` values stay.
    """
    digests = fold_constants(model, varying)
    split_sequences(model)
    separate_packed(model)
    keep_rows_apart(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    name_nodes(model.graph)
    _mark_unsized(model.graph)
    return digests


def _drop_outdated_metadata(model: ir.Model) -> None:
    """Forget what the metadata says of initializers that other tools have replaced since."""
    if PARAMETERS_KEY in model.metadata_props and listed_parameters(model) is None:
        del model.metadata_props[PARAMETERS_KEY]
        warn(
            f"metadata '{PARAMETERS_KEY}' does not fit the weights any more, since another tool "
            "has renamed or replaced some: it is ignored, and all floating-point weights count as "
            "parameters",
        )
    keep_known_names(model)


def _mark_unsized(graph: ir.Graph) -> None:
    """Note which results have a size, or a type, that nobody knows."""
    for node in graph:
        for value in node.outputs:
            if value.name and (known_shape(value) is None or value.dtype is None):
                mark_unsized(value)


def _warn_of_unsized(graph: ir.Graph) -> None:
    """Name the operators at which sizes get lost, in one warning."""
    first = [
        (node, value)
        for node in graph
        for value in node.outputs
        if is_unsized(value) and not is_map(value) and not any(map(is_unsized, node.inputs))
        if CHOICE_KEY not in node.meta  # which has been said
    ]
    if not first:
        return
    node, value = first[0]
    others = [node_label(other) for other in dict.fromkeys(n for n, _ in first) if other != node]
    more = f", and so of {', '.join(others[:_MAX_NAMED])}" if others else ""
    more += f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
    warn(
        f"{node_label(node)}: the size of its result '{escape(value.name or '')}' cannot be "
        f"known{more}; all that depends on it keeps its channels, and costs nothing in what is "
        f"counted; {_make_known(node)}",
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
