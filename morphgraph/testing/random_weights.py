"""Random weights in whose results a wrong slice shows, for PyTorch networks and ONNX models.

A freshly built network has every BatchNorm at (1, 0, 0, 1), biases and heads at zero, layer scales
at 1e-6: a wrong slice can go unnoticed, and outputs may be 1e-14. :func:`randomize_weights` and
:func:`randomize_model_weights` give every such tensor random values and calibrate the rest layer by
layer, so that activations and outputs are of order 1 and depend on the input.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import Editor
from morphgraph.ops import facts_of

if TYPE_CHECKING:
    import torch
    from torch import nn


_SAMPLES = 4  # that calibration runs on
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FREE_INITIALIZERS = 4  # the first IR version in which an initializer need not be an input
_DEAD = 1e-6  # with a smaller standard deviation a layer counts as dead: it is not rescaled


def randomize_weights(
    net: "nn.Module", example: "torch.Tensor | Sequence[Any]", seed: int = 0
) -> "nn.Module":
    """Randomize and calibrate a network's parameters and statistics in place; returns it.

    Args:
        net: any module; left in eval mode.
        example: its positional arguments, or the only one; lists and the like of tensors, too.
            Calibration runs on four samples: noise where the example has real numbers, a shuffle of
            the example where it has integers (so that tokens stay in range and masks stay masks).
        seed: of all random numbers.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = randomize_weights(torch.nn.Linear(8, 2), torch.zeros(1, 8))
    >>> bool(0.3 < net(torch.randn(64, 8)).std() < 3)
    True
    """
    import torch
    from torch.utils import _pytree as pytree

    generator = torch.Generator().manual_seed(seed)
    arguments = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    noise = pytree.tree_map(lambda argument: _noise(argument, generator), arguments)
    net.eval()
    with torch.no_grad():
        norms = _norms(net)
        for name, parameter in net.named_parameters():
            if parameter.is_floating_point():
                _randomize(name, parameter, name.rpartition(".")[0] in norms, generator)
        for norm in _frozen(net):
            norm.weight.copy_(_uniform(norm.weight, 0.5, 1.5, generator))
            norm.bias.copy_(_uniform(norm.bias, -0.3, 0.3, generator))
        with _taking_statistics(net), _standardizing(net):
            net(*noise)
        for norm in norms.values():
            mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
            if mean is not None and var is not None:
                mean += _uniform(mean, -0.2, 0.2, generator) * var.sqrt()
                # Smaller than measured variances would make every layer amplify rounding errors.
                var *= _uniform(var, 0.9, 1.6, generator)
    return net


def _noise(argument: Any, generator: "torch.Generator") -> Any:
    """Four samples like an argument; what is no tensor stays."""
    import torch

    if not isinstance(argument, torch.Tensor) or argument.dim() == 0:
        return argument
    if argument.is_floating_point():
        noise = torch.randn((_SAMPLES, *argument.shape[1:]), generator=generator)
        return noise.to(argument.dtype)
    flat = argument.reshape(-1)
    count = _SAMPLES * argument[0].numel()
    picked = torch.randint(len(flat), (count,), generator=generator)
    return flat[picked].reshape(_SAMPLES, *argument.shape[1:])


def _uniform(
    like: "torch.Tensor", low: float, high: float, generator: "torch.Generator"
) -> "torch.Tensor":
    import torch

    return torch.rand(like.shape, generator=generator) * (high - low) + low


def _norms(net: "nn.Module") -> dict[str, "nn.Module"]:
    return {name: module for name, module in net.named_modules() if "Norm" in type(module).__name__}


def _frozen(net: "nn.Module") -> list[Any]:
    """BatchNorms all of whose numbers are buffers, as detectors have them."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [m for m in net.modules() if all(name in dict(m.named_buffers()) for name in names)]


def _randomize(
    name: str, parameter: "nn.Parameter", of_norm: bool, generator: "torch.Generator"
) -> None:
    """New values for biases, scales, and whatever its initializer left constant."""
    import torch

    leaf = name.rpartition(".")[2]
    long_axes = sum(size > 1 for size in parameter.shape)
    constant = parameter.numel() > 0 and bool(parameter.min() == parameter.max())
    if parameter.dim() == 1 and "bias" in leaf:
        parameter.copy_(_uniform(parameter, -0.3, 0.3, generator))
    elif parameter.dim() == 1 or of_norm or _is_scale(leaf):
        parameter.copy_(_uniform(parameter, 0.5, 1.5, generator))
    elif constant and long_axes <= 1:
        # A token, an offset or a gate: serves as addend and as factor.
        parameter.copy_(_uniform(parameter, 0.2, 0.8, generator))
    elif constant:
        is_kernel = leaf.endswith("weight")
        spread = parameter[0].numel() ** -0.5 if is_kernel else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def _is_scale(leaf: str) -> bool:
    """Parameters that scale a layer's output: ``gamma``, ``layer_scale``, ..."""
    return leaf.startswith(("gamma", "layer_scale", "scale", "ls"))


@contextmanager
def _taking_statistics(net: "nn.Module") -> Iterator[None]:
    """Every BatchNorm uses and stores the statistics of its batch; all else is in eval mode."""
    import torch

    batch_norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    moving = [m for m in net.modules() if isinstance(m, batch_norms)]
    momenta = [module.momentum for module in moving]
    for module in moving:
        module.reset_running_stats()
        module.momentum = None
        module.train()

    def take(norm: Any, args: tuple[Any, ...]) -> None:
        rows = args[0].movedim(1, -1).reshape(-1, args[0].shape[1])
        norm.running_mean.copy_(rows.mean(0))
        norm.running_var.copy_(rows.var(0))

    hooks = [norm.register_forward_pre_hook(take) for norm in _frozen(net)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, momentum in zip(moving, momenta, strict=True):
            module.momentum = momentum
            module.eval()


@contextmanager
def _standardizing(net: "nn.Module") -> Iterator[None]:
    """The first time a layer runs, its kernel is scaled for results of standard deviation 1.

    The bias is not counted: a random bias on a tiny kernel would drown the input. (Removing means
    as well would amplify rounding errors with depth.) A kernel that several modules share stays as
    it is: scaling it for one would spoil it for the others.
    """
    import torch

    layer_types = (
        torch.nn.Linear,
        torch.nn.Embedding,
        torch.nn.modules.conv._ConvNd,  # noqa: SLF001 - the base class of all convolutions
    )
    layers = [module for module in net.modules() if isinstance(module, layer_types)]
    owners = Counter(id(layer.weight) for layer in layers)
    done: set[int] = set()

    def standardize(
        layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: "torch.Tensor"
    ) -> "torch.Tensor | None":
        bias: torch.Tensor | None = getattr(layer, "bias", None)
        axis = -1 if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)) else 1
        rows = out.movedim(axis, -1).reshape(-1, out.shape[axis])
        rows = rows if bias is None else rows - bias
        spread = float(rows.std()) if rows.numel() > 1 else 0.0
        if id(layer) in done or owners[id(layer.weight)] > 1 or not _DEAD < spread < np.inf:
            return None
        done.add(id(layer))
        layer.weight /= spread
        again: torch.Tensor = layer.forward(*args, **kwargs)
        return again

    hooks = [layer.register_forward_hook(standardize, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def random_weight(shape: Sequence[int], generator: np.random.Generator) -> Array:
    """Random numbers for a weight: vectors uniform in 0.5 to 1.5, others normal, 1 / fan-in."""
    if len(shape) <= 1:
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    spread = 1 / np.sqrt(np.prod(shape[1:]))
    scaled: Array = np.asarray(generator.standard_normal(shape) * spread, dtype=np.float32)
    return scaled


def randomize_model_weights(model: ir.Model, feeds: Mapping[str, Array], seed: int = 0) -> ir.Model:
    """A copy of an ONNX model with random, calibrated weights.

    Weights are the float initializers, and what ConstantOfShape fills in their place (onnx's light
    models spell their weights so). Statistics of BatchNormalization are measured in one run of ONNX
    Runtime in which each of them normalizes its own samples; at last the kernel of the last layer
    is divided by its results' standard deviation.

    Args:
        model: any model; only operators of its main graph are looked at.
        feeds: one run's inputs by name.
        seed: of all random numbers.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    generator = np.random.default_rng(seed)
    randomized = model.clone()
    randomized.ir_version = max(randomized.ir_version, _FREE_INITIALIZERS)
    _fill_in(randomized)
    for value in list(randomized.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and value.uses():
            _set(value, _draw(value, generator))
    _measure_statistics(randomized, feeds, generator)
    _standardize_last(randomized, feeds)
    return randomized


def _set(value: ir.Value, array: Array) -> None:
    value.const_value = ir.Tensor(np.ascontiguousarray(array, dtype=np.float32), name=value.name)


def _fill_in(model: ir.Model) -> None:
    """Turn floats from ConstantOfShape over an initializer into initializers."""
    graph, editor = model.graph, Editor(model)
    for node in list(graph):
        shape = node.inputs[0].const_value if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "ConstantOfShape" or shape is None:
            continue
        out = node.outputs[0]
        weight = editor.constant_for(out, np.zeros(shape.numpy(), dtype=np.float32))
        out.replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def _draw(value: ir.Value, generator: np.random.Generator) -> Array:
    """Values that suit the first reader."""
    node, place = next(iter(value.uses()))
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    if facts_of(node).statistics:
        spans = {1: (0.5, 1.5), 2: (-0.3, 0.3), 3: (0.0, 0.0), 4: (1.0, 1.0)}
        return generator.uniform(*spans[place], shape)
    if node.op_type in _LAYERS and len(shape) > 1:
        spread = np.sqrt(2 / _fan_in(shape, node))
        return np.asarray(generator.standard_normal(shape) * spread)
    if node.op_type in _LAYERS and place == 2:
        return generator.uniform(-0.3, 0.3, shape)
    return random_weight(shape, generator)


def _fan_in(shape: Sequence[int], node: ir.Node) -> float:
    """Products that one result sums over."""
    if node.op_type == "Conv":
        return float(np.prod(shape[1:]))
    if node.op_type == "ConvTranspose":
        return float(np.prod(shape) / shape[1])
    return shape[1] if node.attributes.get_int("transB", 0) else shape[-2]


def _measure_statistics(
    model: ir.Model, feeds: Mapping[str, Array], generator: np.random.Generator
) -> None:
    """Give every BatchNormalization the mean and variance of what reaches it."""
    from morphgraph.onnx_io.runtime import run

    probe = model.clone()
    editor = Editor(probe)
    # GlobalAveragePool and InstanceNormalization are spelled alike in every opset.
    probed = [node for node in probe.graph if facts_of(node).statistics]
    norms = [_probe(editor, node) for node in probed]
    if not norms:
        return
    results = run(probe, feeds)
    originals = [node for node in model.graph if facts_of(node).statistics]
    for node, (first, second) in zip(originals, norms, strict=True):
        mean = results[first].astype(np.float64)
        axes = (0, *range(2, mean.ndim))
        mean, square = mean.mean(axis=axes), results[second].astype(np.float64).mean(axis=axes)
        var = square - mean**2
        var = np.where(var > 1e-4 * np.maximum(square, _DEAD), var, np.maximum(square, 1.0))
        for place, numbers in (
            (3, mean + generator.uniform(-0.2, 0.2, mean.shape) * np.sqrt(var)),
            (4, var * generator.uniform(0.9, 1.6, mean.shape)),
        ):
            value = node.inputs[place]
            assert value is not None
            _set(value, numbers)


def _probe(editor: Editor, node: ir.Node) -> tuple[str, str]:
    """Replace one BatchNormalization; names of the mean and of the mean square of its operand."""
    x, scale, bias = node.inputs[:3]
    square = ir.node("Mul", [x, x])
    mean = ir.node("GlobalAveragePool", [x])
    mean_square = ir.node("GlobalAveragePool", [square.outputs[0]])
    square.outputs[0].name = editor.value_name(f"probe_square_{node.name}")
    for measured, name in ((mean, "probe_mean"), (mean_square, "probe_mean_square")):
        measured.outputs[0].name = editor.value_name(f"{name}_{node.name}")
        measured.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        editor.graph.outputs.append(measured.outputs[0])
    editor.graph.insert_before(node, [square, mean, mean_square])
    epsilon = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    editor.replace(
        node, "InstanceNormalization", [x, scale, bias], epsilon, results=node.outputs[:1]
    )
    return mean.outputs[0].name or "", mean_square.outputs[0].name or ""


def _standardize_last(model: ir.Model, feeds: Mapping[str, Array]) -> None:
    """Divide the last layer's kernel by the standard deviation of its results."""
    from morphgraph.onnx_io.runtime import run

    layers = [
        node
        for node in model.graph
        if node.op_type in _LAYERS
        and len(node.inputs) > 1
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    ]
    if not layers:
        return
    name, kernel = layers[-1].outputs[0].name or "", layers[-1].inputs[1]
    probe = model.clone()
    for node in probe.graph:
        out = node.outputs[0]
        if out.name == name and out not in probe.graph.outputs:
            out.type = ir.TensorType(ir.DataType.FLOAT)
            probe.graph.outputs.append(out)
    spread = float(run(probe, feeds)[name].std())
    assert kernel is not None
    assert kernel.const_value is not None
    if _DEAD < spread < np.inf:
        _set(kernel, kernel.const_value.numpy() / spread)
