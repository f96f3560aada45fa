"""Operators: one entry each, by family. Importing this package fills the registry."""

from importlib import import_module
from pkgutil import iter_modules

from morphgraph.ops.custom import register
from morphgraph.ops.op import (
    Description,
    Factor,
    IndexMap,
    Linear,
    Op,
    OpNode,
    Place,
    Resizing,
    describe,
    described_ops,
    entry_of,
    facts_of,
    mismatch_hint,
    op,
)
from morphgraph.ops.parameters import (
    coded_operands,
    coded_weights,
    is_layers_weight,
    listed_parameters,
    parameter_names,
    running_statistics,
    weights_of,
)

# An entry registers itself when its file is imported.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = [
    "Description",
    "Factor",
    "IndexMap",
    "Linear",
    "Op",
    "OpNode",
    "Place",
    "Resizing",
    "coded_operands",
    "coded_weights",
    "describe",
    "described_ops",
    "entry_of",
    "facts_of",
    "is_layers_weight",
    "listed_parameters",
    "mismatch_hint",
    "op",
    "parameter_names",
    "register",
    "running_statistics",
    "weights_of",
]
