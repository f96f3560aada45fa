"""From a torch module to a canonical ONNX model that can still be trained.

PyTorch's exporter, left alone, fuses batch normalizations, ties equal tensors and renames weights.
Here it translates only, and ``canonicalize`` cleans up: every parameter that the network uses
comes out as an initializer under its ``state_dict`` name, every batch normalization and dropout as
a node.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from morphgraph.collector import without_collector
from morphgraph.edit import name_values
from morphgraph.errors import UnsupportedError, warn
from morphgraph.onnx_io import (
    BUFFERS_KEY,
    FROZEN_KEY,
    PARAMETERS_KEY,
    STILL_KEY,
    TIED_KEY,
    checker_refusal,
    escape,
)
from morphgraph.ops import running_statistics
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.torch_io.arguments import (
    BATCH,
    Call,
    at_least_two,
    call_of,
    dynamic_batch_of,
    input_names_of,
    key_of,
    named_arguments,
)
from morphgraph.torch_io.structure import note_arguments, note_structure
from morphgraph.torch_io.translate import first_line, translate

_KEPT_METADATA = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")


@without_collector()
def export(
    net: nn.Module,
    example: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    opset: int = 20,
) -> ir.Model:
    """Export a network in trainable form.

    The network is exported as it computes in ``eval`` mode, and left as it was found. Its weights
    are copied, so that later training does not change the model.

    Args:
        net: the network.
        example: its positional arguments, or a dict of arguments by name; the model takes their
            sizes.
        dynamic_batch: leave the first size of every input open.
        dynamic_shapes: which sizes are left open, as ``torch.export`` wants it said; instead of
            ``dynamic_batch``, for sequences, heights and widths. One entry per positional argument:
            ``({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)`` with ``from torch.export import Dim``.
        input_names: names for the model's inputs; by default those of ``forward``'s parameters.
        opset: version of the ONNX operators.

    Returns:
        A canonical model whose initializers carry the names of the ``state_dict``; the metadata
        entry ``morphgraph.parameters`` lists those that are parameters. Tuples, lists and dicts of
        results become results side by side; those of a dict carry its keys as names.

    Raises:
        UnsupportedError: the network cannot be exported, or a parameter would lose its name.

    >>> model = export(nn.Linear(8, 2), torch.zeros(1, 8))
    >>> [node.op_type for node in model.graph], list(model.graph.initializers)
    (['Gemm'], ['weight', 'bias'])
    """
    call = call_of(net, example)
    if dynamic_batch:
        dynamic_shapes = dynamic_shapes or dynamic_batch_of(net, call)
        # From a batch of 1 the exporter concludes that the batch is always 1.
        call = pytree.tree_map_only(torch.Tensor, at_least_two, call)
    named = named_arguments(net, call)
    names = input_names_of(net, named, input_names)
    with _inference_mode(net):
        results = _results(net, call)
        used = _used_parameters(results)
        _refuse_projections(net, used)
        _forget_derived(net)
        with _keeping_dropout(net):
            model = translate(net, call, names, dynamic_batch, dynamic_shapes, opset)
    name_values(model)
    _check_inputs(model, net, input_names)
    _clean(model)
    parameters = dict(net.named_parameters(remove_duplicate=False))
    model.metadata_props[PARAMETERS_KEY] = json.dumps(_own_names(model, parameters))
    model = canonicalize(model, is_own=True, keep_original=False)
    _restore_first_names(model, net)
    _name_results(model, results)
    _check_parameters(model, parameters, used)
    _warn_of_absent(net, model, parameters)
    _note_names(model, PARAMETERS_KEY, parameters)
    _note_names(model, FROZEN_KEY, _frozen(parameters))
    _note_names(model, STILL_KEY, _still(net))
    _note_ties(model, net)
    note_structure(model, results)
    note_arguments(model, named)
    _note_names(model, BUFFERS_KEY, _plain_buffers(net, model))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            copied = np.array(tensor.numpy(), copy=True)
            value.const_value = ir.Tensor(copied, dtype=tensor.dtype, name=name)
    refusal = checker_refusal(model)
    if refusal is not None:
        raise UnsupportedError(
            f"network {type(net).__name__}: onnx.checker refuses what was exported: {refusal}; "
            "replace the module that this is of by one that torch.onnx exports"
        )
    return model


def _note_names(model: ir.Model, key: str, names: Iterable[str]) -> None:
    """Write into the metadata which initializers these are, in this order; nothing for none."""
    kept = [name for name in names if name in model.graph.initializers]
    if kept or key == PARAMETERS_KEY:
        model.metadata_props[key] = json.dumps(kept)


def _warn_of_absent(
    net: nn.Module, model: ir.Model, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Name the parameters that only the training forward reads, or nothing does."""
    there = {id(p) for name, p in parameters.items() if name in model.graph.initializers}
    absent = [name for name, parameter in parameters.items() if id(parameter) not in there]
    if absent:
        shown = ", ".join(escape(name) for name in absent[:5])
        shown += f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        warn(
            f"network {type(net).__name__}: its forward in eval is exported, which does not "
            f"use {shown}; where its forward in training does, resize the module itself by "
            "mg.resize_module(net, plan), and where nothing does, remove them",
        )


def _frozen(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The parameters that nobody trains; none in a network in inference, where all are frozen."""
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    return [] if len(frozen) == len(parameters) else frozen


def _still(net: nn.Module) -> list[str]:
    """The running means that no batch moves."""
    return [
        f"{path}.running_mean" if path else "running_mean"
        for path, module in net.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.momentum == 0
    ]


def _note_ties(model: ir.Model, net: nn.Module) -> None:
    """Write into the metadata which further names tied parameters have."""
    standing: dict[int, str] = {}
    parameters = dict(net.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if name in model.graph.initializers:
            standing.setdefault(id(parameter), name)
    further = {
        name: standing[id(parameter)]
        for name, parameter in parameters.items()
        if id(parameter) in standing and name not in model.graph.initializers
    }
    if further:
        model.metadata_props[TIED_KEY] = json.dumps(further)


def _plain_buffers(net: nn.Module, model: ir.Model) -> list[str]:
    """What the ``state_dict`` has beside parameters and running statistics."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    known = {*parameters, *running_statistics(model)}
    return [name for name in net.state_dict() if name not in known]


def _check_inputs(model: ir.Model, net: nn.Module, given: Sequence[str] | None) -> None:
    """Refuse a given input name that a parameter or buffer has, whose names must stay."""
    for name, value in zip(given or (), model.graph.inputs, strict=False):
        if value.name != name:
            raise UnsupportedError(
                f"network {type(net).__name__}: input '{escape(name)}' has the name of a parameter "
                "or buffer; give it another"
            )


@contextmanager
def _inference_mode(net: nn.Module) -> Iterator[None]:
    """``eval`` for a while; every module gets back the mode that it had."""
    modes = [(module, module.training) for module in net.modules()]
    _forget_derived(net)
    try:
        yield
    finally:
        _forget_derived(net)
        for module, training in modes:
            module.training = training


def _forget_derived(net: nn.Module) -> None:
    """Switch to ``eval`` by way of ``train``, where modules drop what they keep for inference.

    LeViT keeps the position biases that it has gathered from a parameter. The exporter would take
    them for constants, and leave its own placeholders in their place.
    """
    net.train()
    net.eval()


@contextmanager
def _keeping_dropout(net: nn.Module) -> Iterator[None]:
    """Dropout in training form, for else the exporter drops it."""
    dropouts = [
        (module, module.inplace)
        for module in net.modules()
        if type(module) is nn.Dropout and 0 < module.p < 1
    ]
    for module, _ in dropouts:
        module.training, module.inplace = True, False
    try:
        yield
    finally:
        for module, inplace in dropouts:
            module.training, module.inplace = False, inplace


def _results(net: nn.Module, call: Call) -> Any:
    """What the network gives for the example, on autograd's tape."""
    flags = [(p, p.requires_grad) for p in net.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            results = net(*call.arguments, **call.keywords)
    except Exception as error:  # anything may happen in a user's forward
        raise UnsupportedError(
            f"network {type(net).__name__}: does not run on the example: {first_line(error)}"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    for leaf in pytree.tree_leaves(results):
        if isinstance(leaf, bool | int | float | str):
            raise UnsupportedError(
                f"network {type(net).__name__}: returns {escape(repr(leaf))} beside tensors, and "
                "ONNX results are tensors; return tensors only"
            )
    return results


def _refuse_projections(net: nn.Module, used: set[int]) -> None:
    """ONNX has no LSTM with a projection; the exporter leaves it away, or mixes up the weights."""
    for path, module in net.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size and id(module.weight_hr_l0) in used:
            raise UnsupportedError(
                f"network {type(net).__name__}: module '{escape(path)}' is an LSTM with proj_size="
                f"{module.proj_size}, and ONNX has no such operator; write its steps yourself, as "
                "nn.LSTM would do them, or use one without proj_size"
            )


def _used_parameters(results: Any) -> set[int]:
    """``id`` of every parameter that has a part in the results, found on the tape of autograd."""
    tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    used = {id(tensor) for tensor in tensors}
    while stack:
        function = stack.pop()
        if hasattr(function, "variable"):
            used.add(id(function.variable))
        for source, _ in function.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    return used


def _clean(model: ir.Model) -> None:
    """Name the batch, put dropout back into inference, and drop notes about the source code.

    Notes in memory are PyTorch's graph, with a tensor for every value.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([BATCH, *value.shape[1:]])
    for node in graph.all_nodes():
        if node.op_type == "Dropout" and not node.domain:
            node.resize_inputs(2)  # without its third input, Dropout does nothing
        for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
            del node.metadata_props[key]
        node.meta.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            value.meta.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.meta.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _own_names(model: ir.Model, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """One name for every parameter in the model, though a tied one has several.

    Names that stand side by side are those of equal parameters that the exporter has tied, and that
    get back tensors of their own.
    """
    results = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    own: dict[int, str] = {}
    for known in (model.graph.initializers.keys(), results):
        for name, parameter in parameters.items():
            if name in known:
                own.setdefault(id(parameter), name)
    return list(own.values())


def _restore_first_names(model: ir.Model, net: nn.Module) -> None:
    """A tied parameter carries the name that ``named_parameters`` gives it, which is its first."""
    first = {id(parameter): name for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        value = model.graph.initializers.get(name)
        wanted = first[id(parameter)]
        if value is not None and wanted not in model.graph.initializers:
            value.name = wanted


def _name_results(model: ir.Model, results: Any) -> None:
    """Results that come in a dict carry its keys as names, where nothing else has them."""
    if not isinstance(results, Mapping):
        return
    keys = [
        ".".join([str(key), *(str(key_of(place)) for place in path)])
        for key, result in results.items()
        for path, leaf in pytree.tree_flatten_with_path(result)[0]
        if isinstance(leaf, torch.Tensor)
    ]
    taken = {value.name for node in model.graph for value in node.outputs}
    taken |= {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    if len(keys) == len(set(model.graph.outputs)) and taken.isdisjoint(keys):
        for value, key in zip(model.graph.outputs, keys, strict=True):
            value.name = key


def _check_parameters(model: ir.Model, parameters: dict[str, nn.Parameter], used: set[int]) -> None:
    """A tied parameter has several names; one of them must be there."""
    found = {
        id(parameter)
        for name, parameter in parameters.items()
        if (value := model.graph.initializers.get(name)) is not None
        and value.const_value is not None
        and tuple(value.const_value.shape) == tuple(parameter.shape)
    }
    lost = [
        name
        for name, parameter in parameters.items()
        if id(parameter) in used and id(parameter) not in found
    ]
    if lost:
        shown = ", ".join(escape(name) for name in lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise UnsupportedError(
            f"the exporter has lost {len(lost)} of {len(parameters)} parameters ({shown}); "
            "replace the modules that they belong to by ones that torch.onnx exports unchanged"
        )
