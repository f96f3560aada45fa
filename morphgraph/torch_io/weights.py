"""Trained weights back into an ONNX model, by name."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import nn

from morphgraph.errors import ModelError, MorphError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import ModelLike, as_model, escape
from morphgraph.ops import parameter_names, running_statistics
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.torch_io.names import recorded_names
from morphgraph.torch_io.tensors import to_onnx
from morphgraph.torch_io.to_torch import torch_names

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, AveragedModel, torch.compile


def with_weights(model: ModelLike, net: nn.Module | Mapping[str, torch.Tensor]) -> ir.Model:
    """A copy of the model that has the weights and running statistics of a network.

    Args:
        model: the model that ``net`` was made from, or was exported to. It is not changed.
        net: what ``to_torch`` returned, the exported module itself, or a ``state_dict`` of either;
            wrapped by DistributedDataParallel or ``torch.compile`` or not. Its tensors go by ONNX
            names or, where some are missing, by those that ``to_torch`` gives them. Tensors that
            the model does not have, such as ``num_batches_tracked``, are left out.

    Raises:
        ModelError: a parameter or running statistic is missing, or has another shape; names it.
    """
    source = as_model(model)
    state = named_tensors(net)
    source = _with_copies(source, state.keys() - source.graph.initializers.keys())
    result = source.clone()
    needed = set(parameter_names(source)) | set(running_statistics(source))
    if not needed <= state.keys():
        state = _by_onnx_names(source, state)
    for name, value in result.graph.initializers.items():
        old = value.const_value
        tensor = state.get(name)
        if old is None or (tensor is None and name not in needed):
            continue
        if tensor is None:
            raise ModelError(
                f"tensor '{escape(name)}': the network has no weight of that name; "
                "pass the network that this model was exported from or loaded into"
            )
        wanted, given = tuple(old.shape.numpy()), tuple(tensor.shape)
        if wanted != given:
            raise ModelError(
                f"tensor '{escape(name)}': {_format(given)} in the network, {_format(wanted)} in "
                "the model; pass the model that has the network's size"
            )
        value.const_value = to_onnx(tensor, old.dtype, name)
    return result


def graph_with_weights(
    graph: ChannelGraph, weights: nn.Module | Mapping[str, torch.Tensor]
) -> ChannelGraph:
    """The same graph over a model with other weights.

    Raises:
        ModelError: a tensor is missing, or has another shape.
    """
    model = with_weights(graph.model, weights)
    model.meta.update(graph.model.meta)
    # What reads weights at an operator's operands must find the new ones there.
    ops = [replace(op, ir=node) for op, node in zip(graph.ops, model.graph, strict=True)]
    return replace(graph, couplings=replace(graph.couplings, model=model, ops=ops), cache={})


def _with_copies(source: ir.Model, others: Set[str]) -> ir.Model:
    """The model, or its canonical form where that has more of the tensors.

    A constant that a file stores once, or in a node, may be several weights of a network.
    """
    if not others:
        return source
    try:
        canonical = canonicalize(source)
    except MorphError:  # its sizes are not known; it has no copies then
        return source
    return canonical if canonical.graph.initializers.keys() & others else source


def _by_onnx_names(source: ir.Model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a network that ``to_torch`` made of the model, which calls some otherwise."""
    try:
        names = torch_names(source)
    except UnsupportedError:  # then the tensors are of no such network
        return state
    return {names.get(name, name): tensor for name, tensor in state.items()}


def named_tensors(net: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's parameters and buffers (or a ``state_dict``'s tensors) by their ONNX names.

    In wrappers by those of the network inside, and by those of the whole: nobody knows which of
    the two was exported.
    """
    if not isinstance(net, nn.Module):
        return {_unwrapped(name): tensor for name, tensor in net.items()} | dict(net)
    inner = inner_module(net)
    return _named(inner) if inner is net else _named(inner) | _named(net)


def _named(net: nn.Module) -> dict[str, torch.Tensor]:
    names = recorded_names(net)
    tensors = dict(net.named_buffers(remove_duplicate=False))
    tensors.update(net.named_parameters(remove_duplicate=False))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def exported_module(net: nn.Module, names: Iterable[str]) -> nn.Module:
    """The network whose tensors have these names: the given one, or the one inside wrappers."""
    return net if _named(net).keys() & set(names) else inner_module(net)


def inner_module(net: nn.Module) -> nn.Module:
    """The network inside wrappers, whose only child it is."""
    children = dict(net.named_children())
    wrapped = [children.get(prefix[:-1]) for prefix in _WRAPPERS]
    inside = next((module for module in wrapped if module is not None), None)
    return net if inside is None or len(children) > 1 else inner_module(inside)


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _format(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
