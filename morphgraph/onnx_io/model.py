"""What is known of a whole model: the sizes of its inputs, its parameters, whether it is valid."""

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.fixed import fixed_values, fixed_words
from morphgraph.onnx_io.keys import (
    BUFFERS_KEY,
    CONSTANTS_KEY,
    DYNAMIC_AXES_KEY,
    FROZEN_KEY,
    PARAMETERS_KEY,
    STATIC_SHAPE_KEY,
    STILL_KEY,
    TIED_KEY,
    UNSIZED_KEY,
)
from morphgraph.onnx_io.mapped import blocks
from morphgraph.onnx_io.messages import structure
from morphgraph.onnx_io.values import is_float, values_of
from morphgraph.words import did_you_mean


def bind_inputs(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """A copy of the model whose graph inputs have these shapes; weights are shared.

    Symbolic sizes of other values follow where an input gives the symbol a size.

    Raises:
        ModelError: there is no such input, or its rank or a fixed size is another.
    """
    return bind_own_inputs(model.clone(), shapes)


def bind_own_inputs(bound: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """The same of a model that is nobody else's: it is changed, and returned."""
    inputs = {value.name: value for value in bound.graph.inputs if not value.is_initializer()}
    sizes: dict[str, int | None] = {}
    for name, shape in shapes.items():
        value = inputs.get(name)
        if value is None:
            raise _no_such(name, bound, inputs)
        declared = [None] * len(shape) if value.shape is None else list(value.shape)
        if len(declared) != len(shape) or not all(map(_may_be, declared, shape)):
            raise ModelError(
                f"input '{escape(name)}': shape {_format(shape)} does not fit the model, "
                f"which declares {_format(declared)}"
            )
        for old, size in zip(declared, shape, strict=True):
            if isinstance(old, ir.SymbolicDim) and old.value is not None:
                # A name of several sizes, such as "?", says nothing of other values.
                sizes[old.value] = size if sizes.get(old.value, size) == size else None
        value.shape = ir.Shape(shape)
    for value in (*bound.graph.inputs, *(v for node in bound.graph for v in node.outputs)):
        notes = value.meta.data  # of a UserDict, which few values have something in
        for key in (STATIC_SHAPE_KEY, UNSIZED_KEY, DYNAMIC_AXES_KEY) if notes else ():
            notes.pop(key, None)
        if value.shape is not None and sizes:
            value.shape = ir.Shape(
                (sizes.get(dim.value or "") or dim) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in value.shape
            )
    return bound


def _no_such(name: str, model: ir.Model, inputs: Iterable[str | None]) -> ModelError:
    """The error for the name of no input; one that is fixed to a value is none any more."""
    for text in fixed_words({k: v for k, v in fixed_values(model).items() if k == name}):
        return ModelError(
            f"input '{escape(name)}': it is fixed ({escape(text)}), and the model takes it no "
            "more; leave its shape out"
        )
    known = ", ".join(escape(str(n)) for n in inputs)
    return ModelError(
        f"input '{escape(name)}': the model has no such input; its inputs are {known}"
        f"{did_you_mean(name, [str(n) for n in inputs])}"
    )


def _may_be(declared: int | ir.SymbolicDim | None, size: int) -> bool:
    # Old exporters write 0 where they do not know a size.
    return size > 0 and (not isinstance(declared, int) or declared in (0, size))


def checker_refusal(model: ir.Model) -> str | None:
    """Why ``onnx.checker`` refuses a model, in its words; ``None``: it takes the model.

    It gets the structure: weights are left out, so that large models cost no more than small ones.
    """
    try:
        onnx.checker.check_model(structure(model))
    except (onnx.checker.ValidationError, ir.serde.SerdeError, ValueError, TypeError) as error:
        return escape(root_cause(error).strip().splitlines()[0])
    return None


def stored_names(model: ir.Model) -> list[str]:
    """The parameter names that the export has stored in the model's metadata; else none.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return _listed(model, PARAMETERS_KEY)


def buffer_names(model: ir.Model) -> frozenset[str]:
    """Names of the initializers that are persistent buffers of the exported network.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return frozenset(_listed(model, BUFFERS_KEY))


def frozen_names(model: ir.Model) -> frozenset[str]:
    """Names of the parameters that the exported network had frozen.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return frozenset(_listed(model, FROZEN_KEY))


def still_names(model: ir.Model) -> frozenset[str]:
    """Names of the running means that no batch moves: of norms with a momentum of 0.

    ONNX has the same number for the mean of all batches, as PyTorch writes it.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return frozenset(_listed(model, STILL_KEY))


def tied_names(model: ir.Model) -> dict[str, str]:
    """By every further name of a tied parameter the one that it stands under in the model."""
    try:
        names = json.loads(model.metadata_props.get(TIED_KEY, "{}"))
    except ValueError:
        return {}
    if not isinstance(names, dict):
        return {}
    return {further: str(name) for further, name in names.items()}


def constant_names(model: ir.Model) -> frozenset[str]:
    """Names of the initializers that vanished layers have left in their place.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return frozenset(_listed(model, CONSTANTS_KEY))


def add_constant_names(model: ir.Model, names: Sequence[str]) -> None:
    """Note that initializers stand for vanished layers; they are trained like parameters."""
    for key in (CONSTANTS_KEY, PARAMETERS_KEY):
        if key == CONSTANTS_KEY or key in model.metadata_props:
            listed = dict.fromkeys([*_listed(model, key), *names])
            known = [name for name in listed if name in model.graph.initializers]
            model.metadata_props[key] = json.dumps(known)


def keep_known_names(model: ir.Model) -> None:
    """Take names out of the model's lists that none of its values has any more."""
    known = {value.name for value in values_of(model.graph)}
    for key in (BUFFERS_KEY, CONSTANTS_KEY, FROZEN_KEY, PARAMETERS_KEY, STILL_KEY):
        if key in model.metadata_props:
            names = _listed(model, key)
            if not known.issuperset(names):
                model.metadata_props[key] = json.dumps([n for n in names if n in known])


def _listed(model: ir.Model, key: str) -> list[str]:
    """Names that stand in the model's metadata."""
    try:
        names = json.loads(model.metadata_props.get(key, "[]"))
    except ValueError as error:
        raise ModelError(f"metadata '{key}' is not JSON; export the model anew") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"metadata '{key}' is not a list of names; export the model anew")
    return names


def not_finite(model: ir.Model) -> Sequence[str]:
    """Names of the parameters that hold NaN or infinite numbers.

    Minus infinity beside nothing but zeros is a mask in front of a softmax, and no parameter.
    """
    return [
        name
        for name, value in model.graph.initializers.items()
        if is_float(value)
        and value.const_value is not None
        and not all(np.isfinite(block).all() for _, block in blocks(value.const_value))
        and any((block[block != -np.inf] != 0).any() for _, block in blocks(value.const_value))
    ]


def root_cause(error: BaseException) -> str:
    """The words of the error behind all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _format(shape: Sequence[object]) -> str:
    return "x".join(escape(str(size)) for size in shape) or "scalar"
