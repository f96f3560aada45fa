"""An ONNX model as a torch.fx network of ordinary modules that trains."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from morphgraph.collector import without_collector
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import (
    ModelLike,
    as_model,
    buffer_names,
    frozen_names,
    static_shape,
    still_names,
    tied_names,
)
from morphgraph.ops import OpNode, facts_of, listed_parameters, parameter_names
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.canonical.symbols import Symbol, input_shapes, input_symbols
from morphgraph.tolerances import REBUILT
from morphgraph.torch_io.batch import FREE, free_batch
from morphgraph.torch_io.builder import TorchBuilder
from morphgraph.torch_io.names import clean, record_names, recorded_names
from morphgraph.torch_io.paths import spell_paths
from morphgraph.torch_io.structure import restore_arguments, restore_structure
from morphgraph.torch_io.tensors import torch_type

_BATCH = "morphgraph.batch"
_VALUES = "morphgraph.values"


@without_collector()
def to_torch(
    model: ModelLike, *, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> fx.GraphModule:
    """Build a trainable network that computes what the ONNX model computes.

    Weights become parameters of ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear``, ... whose
    ``state_dict`` keys are the ONNX names. ``net.meta["morphgraph.parameters"]`` maps torch names
    to ONNX names; they differ where an ONNX name cannot be a torch name, and in models that were
    not exported from torch.
    The network is in ``eval`` mode, as the ONNX model is; call ``net.train()`` to train it: then
    BatchNorm updates its running statistics and Dropout drops. Of a model that ``export`` made it
    takes its arguments as the exported network did, as dicts and lists of tensors too, and gives
    its results so, as a dict, a list, nested or as an object with named fields; parameters that
    were frozen are frozen, tied ones are one parameter at all paths.

    A batch size that the export fixed is freed where the network treats samples alike:
    ``net.meta["morphgraph.batch"]`` is ``"free"`` or says why it is not.

    Args:
        model: an ONNX model or a path; it is canonicalized first and never changed.
        input_shapes: sizes for inputs, by name. Without them, sizes that the model leaves open (the
            batch, a length, height and width) stay open, and the network is held against one that
            is built for larger sizes.

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
            the network can be built for fixed sizes only, and the model leaves one open.
        ModelError: the model is broken.
    """
    source = as_model(model)
    canonical = canonicalize(source, input_shapes)
    net = _flat(source, canonical)
    restore_arguments(net, canonical)
    restore_structure(net, canonical)
    return net


def flat_network(model: ModelLike) -> fx.GraphModule:
    """What :func:`to_torch` builds, with its results side by side, as the model has them."""
    source = as_model(model)
    return _flat(source, canonicalize(source))


def torch_names(model: ModelLike) -> Mapping[str, str]:
    """What :func:`to_torch` calls the tensors of a model: torch name -> ONNX name.

    Raises:
        UnsupportedError: an operator has no torch counterpart.
    """
    return recorded_names(canonical_network(canonicalize(as_model(model))))


def _flat(source: ir.Model, canonical: ir.Model) -> fx.GraphModule:
    """The network, checked, with its batch freed."""
    net = canonical_network(canonical)
    symbols = input_symbols(canonical)
    if any(axis > 0 for symbol in symbols for _, axis in symbol.axes):
        _check_larger(source, net, symbols, canonical)
        free = any(axis == 0 for symbol in symbols for _, axis in symbol.axes)
        net.meta[_BATCH] = FREE if free else "the model leaves other sizes open, but not this one"
    else:
        net.meta[_BATCH] = free_batch(net, _examples(canonical), bool(symbols))
    return net


def to_function(canonical: ir.Model, inputs: Sequence[str], result: str) -> fx.GraphModule:
    """One value of a canonical model as a function of other values of it, initializers or results.

    Args:
        canonical: as ``lift`` holds it; it is not changed.
        inputs: names of the values that are given, in the order of the arguments.
        result: name of the value that is computed.

    Raises:
        UnsupportedError: an operator on the way has no torch counterpart; names the node.
    """
    graph = ir.convenience.extract(canonical.graph, list(inputs), [result])
    for value in graph.inputs:
        graph.initializers.pop(value.name or "", None)
        value.const_value = None
    return canonical_network(ir.Model(graph, ir_version=canonical.ir_version))


def canonical_network(canonical: ir.Model) -> fx.GraphModule:
    """A canonical model node by node, in ``eval`` mode: for the sizes that it is of."""
    exported = listed_parameters(canonical) is not None
    builder = TorchBuilder(
        parameter_names(canonical), exported, buffer_names(canonical), frozen_names(canonical)
    )
    graph = canonical.graph
    for value in _inputs(canonical):
        builder.placeholder(value)
    for node in graph:
        _lower(builder, node)
    results = tuple(builder.value(value) for value in graph.outputs)
    builder.graph.output(results[0] if len(results) == 1 else results)
    spell_paths(builder.graph)
    net = fx.GraphModule(builder.tree.root, builder.graph, clean(graph.name or "Network"))
    net.graph.eliminate_dead_code()
    for further, name in tied_names(canonical).items():
        builder.tie(net, further, name)
    still = still_names(canonical)
    for name, onnx_name in builder.parameters.items() if still else ():
        norm = net.get_submodule(name.rpartition(".")[0])
        if onnx_name in still and isinstance(norm, _BatchNorm):
            norm.momentum = 0.0
    net.graph.lint()
    net.recompile()
    record_names(net, builder.parameters)
    net.meta[_VALUES] = {node.name: name for name, node in builder.values.items()}
    net.eval()
    return net


def value_nodes(net: fx.GraphModule) -> dict[str, fx.Node]:
    """By ONNX value the fx node that computes it, in a network that was just built.

    Where lowering has merged operators (the bias that is added behind a matrix product), the last
    of their results alone is there.
    """
    recorded: Mapping[str, str] = net.meta[_VALUES]
    return {recorded[node.name]: node for node in net.graph.nodes if node.name in recorded}


def batch_of(net: fx.GraphModule) -> str:
    """:data:`FREE` where a network of :func:`to_torch` takes any batch, else why it does not."""
    return str(net.meta[_BATCH])


def _inputs(canonical: ir.Model) -> list[ir.Value]:
    return [value for value in canonical.graph.inputs if value.const_value is None]


def _examples(canonical: ir.Model) -> list[torch.Tensor]:
    return [_example(value) for value in _inputs(canonical)]


def _check_larger(
    source: ir.Model, net: fx.GraphModule, symbols: Sequence[Symbol], canonical: ir.Model
) -> None:
    """Hold a network of open sizes against the one that is built for larger ones.

    Raises:
        UnsupportedError: they differ: an operator takes the analysis size for the only one.
    """
    larger = input_shapes(canonical, symbols, enlarged=symbols)
    fixed_model = canonicalize(source, larger)
    fixed = canonical_network(fixed_model)
    generator = torch.Generator().manual_seed(0)
    feeds = [_noise(example, generator) for example in _examples(fixed_model)]
    example = ", ".join(
        f"{v.name}={'x'.join(map(str, static_shape(v)))}" for v in _inputs(canonical)
    )
    advice = f"it cannot be built for open sizes; pass input_shapes, such as {example}"
    with torch.no_grad():
        expected = _tuple(fixed(*feeds))
        try:
            found = _tuple(net(*feeds))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UnsupportedError(f"the network fits one size only: {why}; {advice}") from error
    for value, one, other in zip(canonical.graph.outputs, found, expected, strict=True):
        if one.shape != other.shape or not torch.allclose(
            one.double(), other.double(), rtol=REBUILT, atol=REBUILT, equal_nan=True
        ):
            raise UnsupportedError(
                f"output '{value.name}' is not what the model gives at {larger}; {advice}"
            )


def _noise(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator).to(example.dtype)
    return torch.randint(0, 2, example.shape, generator=generator).to(example.dtype)


def _tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _example(value: ir.Value) -> torch.Tensor:
    """A tensor of the shape and type of a graph input, without memory."""
    dtype = torch.float32 if value.dtype is None else torch_type(value.dtype)
    return torch.empty(static_shape(value), dtype=dtype, device="meta")


def _lower(b: TorchBuilder, node: ir.Node) -> None:
    """Lower one node and bind its results."""
    n = OpNode(node)
    entry = facts_of(node)
    if entry.lower is None:
        b.fail(n, "it has no lowering")
    result = entry.call(entry.lower, node, b, n)
    results = result if isinstance(result, tuple) else (result,)
    for k, value in enumerate(node.outputs):
        if k < len(results) and results[k] is not None:
            b.bind(value, results[k])
        elif value.uses() or value.is_graph_output():
            b.fail(n, f"result {k} ('{value.name}') is used")
