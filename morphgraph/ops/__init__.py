"""Operators: one entry each, by family. Importing this package fills the registry."""

from morphgraph.ops import activation, contraction, elementwise, movement, norm, pool, reduce, reshape
from morphgraph.ops.op import (
    Description,
    Factor,
    IndexMap,
    Op,
    OpNode,
    Place,
    Resizing,
    describe,
    described_ops,
    entry_of,
    op,
    register,
)

__all__ = [
    "Description",
    "Factor",
    "IndexMap",
    "Op",
    "OpNode",
    "Place",
    "Resizing",
    "activation",
    "contraction",
    "describe",
    "described_ops",
    "elementwise",
    "entry_of",
    "movement",
    "norm",
    "op",
    "pool",
    "reduce",
    "register",
    "reshape",
]
