"""Running models in PyTorch, where ONNX Runtime does not know an operator."""

from collections.abc import Mapping

import onnx_ir as ir
import torch

from morphgraph.arrays import Array, Arrays
from morphgraph.torch_io.tensors import to_onnx, to_tensor
from morphgraph.torch_io.to_torch import flat_network


def run(model: ir.Model, feeds: Mapping[str, Array]) -> Arrays:
    """Run a model once; results by name, as :func:`morphgraph.onnx_io.runtime.run` gives them.

    Raises:
        UnsupportedError: an operator has no PyTorch form; names the node.
    """
    net = flat_network(model)
    inputs = [value for value in model.graph.inputs if value.const_value is None]
    with torch.no_grad():
        found = net(*(to_tensor(ir.tensor(feeds[value.name or ""])) for value in inputs))
    results = found if isinstance(found, tuple) else (found,)
    return {
        value.name or "": to_onnx(result, value.dtype or ir.DataType.FLOAT, "").numpy()
        for value, result in zip(model.graph.outputs, results, strict=True)
    }
