"""The border to ONNX: files, what is wrong with them, weights left in them, running them."""

from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.files import ModelLike, as_model, load, save, write_atomically
from morphgraph.onnx_io.keys import (
    ABSORBED_KEY,
    ALIASES_KEY,
    CANONICAL_KEY,
    COPIES_KEY,
    DYNAMIC_AXES_KEY,
    ORIGINAL_KEY,
    PARAMETERS_KEY,
    STATIC_SHAPE_KEY,
)
from morphgraph.onnx_io.model import (
    add_constant_names,
    bind_inputs,
    checker_refusal,
    constant_names,
    keep_known_names,
    not_finite,
    stored_names,
)
from morphgraph.onnx_io.values import (
    captured_values,
    dtype_of,
    is_float,
    known_shape,
    node_label,
    static_shape,
    subgraphs,
    values_of,
)

__all__ = [
    "ABSORBED_KEY",
    "ALIASES_KEY",
    "CANONICAL_KEY",
    "COPIES_KEY",
    "DYNAMIC_AXES_KEY",
    "ORIGINAL_KEY",
    "PARAMETERS_KEY",
    "STATIC_SHAPE_KEY",
    "ModelLike",
    "add_constant_names",
    "as_model",
    "bind_inputs",
    "captured_values",
    "checker_refusal",
    "constant_names",
    "dtype_of",
    "escape",
    "is_float",
    "keep_known_names",
    "known_shape",
    "load",
    "node_label",
    "not_finite",
    "save",
    "static_shape",
    "stored_names",
    "subgraphs",
    "values_of",
    "write_atomically",
]
