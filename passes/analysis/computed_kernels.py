"""The numbers of kernels that are computed: they are run, and stored numbers are made real."""

import numpy as np

from morphgraph.arrays import Array, FloatArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.channel_sources import ComputedKernel
from morphgraph.passes.analysis.evaluate import evaluate


def numbers(graph: ChannelGraph, kernel: ComputedKernel) -> FloatArray | None:
    """A kernel's numbers as the network uses them, in double precision, in its shape.

    ``None`` where ONNX Runtime cannot compute them.
    """
    wanted = [kernel.value, *kernel.scales]
    if kernel.zero_point is not None:
        wanted.append(kernel.zero_point)
    stored, computed = {}, []
    for name in dict.fromkeys(wanted):
        initializer = graph.model.graph.initializers.get(name)
        if initializer is not None and initializer.const_value is not None:
            stored[name] = initializer.const_value.numpy()
        else:
            computed.append(name)
    try:
        found = stored | evaluate(computed, {}, graph.model)
    except UnsupportedError:
        return None
    result = found[kernel.value].astype(np.float64)
    if kernel.zero_point is not None:
        result -= _along(kernel, found[kernel.zero_point], result.ndim)
    for scale in kernel.scales:
        result = result * _along(kernel, found[scale], result.ndim)
    return result


def _along(kernel: ComputedKernel, array: Array, rank: int) -> FloatArray:
    """One number for all, or one for every position, shaped to broadcast over the kernel."""
    numbers = array.astype(np.float64)
    if numbers.size == 1:
        return numbers.reshape(())
    if numbers.size == len(kernel.channels):
        return numbers.reshape([-1 if axis == kernel.axis else 1 for axis in range(rank)])
    return numbers  # of a stack of matrices: one for every column
