"""The border to ONNX: files, what is wrong with them, weights left in them, running them."""

from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.files import ModelLike, as_model, load, save, write_atomically
from morphgraph.onnx_io.keys import (
    ABSORBED_KEY,
    CANONICAL_KEY,
    DYNAMIC_AXES_KEY,
    PARAMETERS_KEY,
    STATIC_SHAPE_KEY,
)
from morphgraph.onnx_io.model import (
    add_constant_names,
    bind_inputs,
    checker_refusal,
    constant_names,
    not_finite,
    static_shape,
    stored_names,
)

__all__ = [
    "ABSORBED_KEY",
    "CANONICAL_KEY",
    "DYNAMIC_AXES_KEY",
    "PARAMETERS_KEY",
    "STATIC_SHAPE_KEY",
    "ModelLike",
    "add_constant_names",
    "as_model",
    "bind_inputs",
    "checker_refusal",
    "constant_names",
    "escape",
    "load",
    "not_finite",
    "save",
    "static_shape",
    "stored_names",
    "write_atomically",
]
