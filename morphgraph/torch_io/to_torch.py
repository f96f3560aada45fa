"""An ONNX model as a torch.fx network of ordinary modules that trains."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx

from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import PARAMETERS_KEY, ModelLike, as_model, parameter_names, static_shape
from morphgraph.ops import OpNode, entry_of
from morphgraph.passes.canonicalize import canonicalize
from morphgraph.torch_io.batch import free_batch
from morphgraph.torch_io.builder import TorchBuilder
from morphgraph.torch_io.names import clean
from morphgraph.torch_io.tensors import torch_type
from morphgraph.torch_io.weights import record_names


def to_torch(
    model: ModelLike, *, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> fx.GraphModule:
    """Build a trainable network that computes what the ONNX model computes.

    Weights become parameters of ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear``, ... whose
    ``state_dict`` keys are the ONNX names. ``net.meta["morphgraph.parameters"]`` maps torch names
    to ONNX names; they differ where an ONNX name cannot be a torch name, and in models that were
    not exported from torch.
    The network is in ``eval`` mode, as the ONNX model is; call ``net.train()`` to train it: then
    BatchNorm updates its running statistics and Dropout drops.

    A batch size that the export fixed is freed where the network treats samples alike:
    ``net.meta["morphgraph.batch"]`` is ``"free"`` or says why it is not.

    Args:
        model: an ONNX model or a path; it is canonicalized first and never changed.
        input_shapes: sizes for inputs; wanted where more than the batch is open in the model.

    >>> net = to_torch(ir.from_onnx_text('''
    ... <ir_version: 10, opset_import: ["" : 20]>
    ... tiny (float[1,2] x) => (float[1,3] y) <float[3,2] w = {1,0, 0,1, 1,1}> {
    ...     y = Gemm<transB=1>(x, w)
    ... }'''))
    >>> net(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 2., 3.],
            [3., 4., 7.]], grad_fn=<MmBackward0>)
    >>> net.meta["morphgraph.parameters"]
    {'Gemm_y.weight': 'w'}

    Raises:
        UnsupportedError: an operator, or a form of it, has no torch counterpart; names the node. Or
            the model leaves a size other than the batch open.
        ModelError: the model is broken.
    """
    canonical = canonicalize(as_model(model), input_shapes)
    builder = TorchBuilder(parameter_names(canonical), PARAMETERS_KEY in canonical.metadata_props)
    graph = canonical.graph
    inputs = [value for value in graph.inputs if value.const_value is None]
    for value in inputs:
        _refuse_open_sizes(value)
        builder.bind(value, builder.graph.placeholder(clean(value.name or "x")))
    for node in graph:
        _lower(builder, node)
    results = tuple(builder.value(value) for value in graph.outputs)
    builder.graph.output(results[0] if len(results) == 1 else results)
    net = fx.GraphModule(builder.tree.root, builder.graph, clean(graph.name or "Network"))
    net.graph.eliminate_dead_code()
    net.graph.lint()
    net.recompile()
    record_names(net, builder.parameters)
    net.eval()
    dynamic = any(not isinstance(size, int) for v in inputs for size in (v.shape or ())[:1])
    net.meta["morphgraph.batch"] = free_batch(net, [_example(v) for v in inputs], dynamic)
    return net


def _refuse_open_sizes(value: ir.Value) -> None:
    if any(not isinstance(size, int) for size in (value.shape or ())[1:]):
        example = "x".join(map(str, static_shape(value)))
        raise UnsupportedError(
            f"input '{value.name}': {value.shape} leaves more than the batch open, and a PyTorch "
            f"network is built for one size; pass input_shapes, such as {example}"
        )


def _example(value: ir.Value) -> torch.Tensor:
    """A tensor of the shape and type of a graph input, without memory."""
    dtype = torch.float32 if value.dtype is None else torch_type(value.dtype)
    return torch.empty(static_shape(value), dtype=dtype, device="meta")


def _lower(b: TorchBuilder, node: ir.Node) -> None:
    """Lower one node and bind its results."""
    n = OpNode(node)
    entry = entry_of(n.op_type, n.domain)
    if entry is None or entry.lower is None:
        b.fail(n, "it has no lowering")
    result = entry.call(entry.lower, node, b, n)
    results = result if isinstance(result, tuple) else (result,)
    for k, value in enumerate(node.outputs):
        if k < len(results):
            b.bind(value, results[k])
        elif value.uses() or value.is_graph_output():
            b.fail(n, f"result {k} ('{value.name}') is used")
