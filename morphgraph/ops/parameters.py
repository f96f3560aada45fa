"""Which initializers training changes: parameters by gradients, running statistics beside them."""

import onnx_ir as ir

from morphgraph.onnx_io import PARAMETERS_KEY, stored_names
from morphgraph.ops.op import facts_of


def parameter_names(model: ir.Model) -> list[str]:
    """Names of the initializers that gradients change, in the model's order.

    A model exported by morphgraph lists them. In any other, ONNX cannot tell parameters from
    buffers: there, all floating-point initializers with at least one axis count, apart from those
    that are read as running statistics alone.

    Raises:
        ModelError: the model's list is broken.
    """
    initializers = model.graph.initializers
    if PARAMETERS_KEY in model.metadata_props:
        return [name for name in stored_names(model) if name in initializers]
    return [
        name
        for name, value in initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.shape.rank() > 0
        and not (value.uses() and all(_statistical_reads(value)))
    ]


def running_statistics(model: ir.Model) -> list[str]:
    """Names of the initializers that norms read as running statistics."""
    return [
        name for name, value in model.graph.initializers.items() if any(_statistical_reads(value))
    ]


def _statistical_reads(value: ir.Value) -> list[bool]:
    """For each use of a value whether it is as a running statistic."""
    return [use.idx in facts_of(use.node).statistics for use in value.uses()]
