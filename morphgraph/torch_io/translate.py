"""PyTorch's exporters: a single run first, torch.export where that refuses, then TorchScript."""

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from morphgraph.arrays import Array
from morphgraph.errors import MorphError, UnsupportedError, warn
from morphgraph.onnx_io import escape, load
from morphgraph.onnx_io.runtime import run
from morphgraph.torch_io.arguments import BATCH, Call
from morphgraph.torch_io.embedding_bags import PlainBags
from morphgraph.torch_io.logs import unlogged
from morphgraph.torch_io.names import is_spelled_plainly

logger = logging.getLogger(__name__)

_TORCHSCRIPT_OPSET = 20  # the last one that the older exporter knows
_FAR = 1e-2  # of an output's largest number: no rounding goes so far


def translate(
    net: nn.Module,
    call: Call,
    names: list[str],
    dynamic_batch: bool,
    dynamic_shapes: Any,
    opset: int,
) -> ir.Model:
    """The network in ONNX, as PyTorch's exporter writes it.

    Args:
        net: in inference mode.
        call: the arguments of its forward.
        names: of the inputs, one per tensor.
        dynamic_batch: whether the first size of every input is open.
        dynamic_shapes: the open sizes as ``torch.export`` wants them; TorchScript knows the batch
            alone.
        opset: the version of ONNX's operators.

    Raises:
        UnsupportedError: both exporters refuse the network (carries the first one's words), or the
            second one's model computes something else.
    """
    if dynamic_shapes is None:
        model = _translate_quickly(net, call, names, opset)
        if model is not None:
            return model
    try:
        with _quiet(), PlainBags():
            return _translate_by_dynamo(net, call, names, dynamic_shapes, opset)
    except Exception as error:
        reason = first_line(error)
        if dynamic_shapes is not None and not dynamic_batch:
            raise UnsupportedError(
                f"network {type(net).__name__}: PyTorch cannot export it with these sizes open: "
                f"{reason}; leave fewer open (dynamic_shapes=), or change what its forward "
                "computes from sizes"
            ) from error
    _refuse_parametrizations(net, opset)
    try:
        with _quiet(), PlainBags():
            model = _translate_by_torchscript(net, call, names, dynamic_batch, opset)
    except Exception as error:
        advice = _advice(net, reason)
        raise UnsupportedError(
            f"network {type(net).__name__}: PyTorch cannot export it: {reason}{advice}"
        ) from error
    with PlainBags():
        _require_same(net, call, model)
    warn(
        f"network {type(net).__name__}: torch.export refused it ({reason}); "
        "exported by way of TorchScript",
    )
    return model


def _refuse_parametrizations(net: nn.Module, opset: int) -> None:
    """Refuse a network that no exporter takes for the way in which one of its weights is computed.

    Raises:
        UnsupportedError: names the weight, and what makes it an ordinary one.
    """
    for path, module in net.named_modules():
        computed = module.parametrizations if is_parametrized(module) else {}
        for name, steps in computed.items():
            try:
                with _quiet():
                    _translate_by_dynamo(steps, Call((), {}), [], None, opset)
            except Exception as error:
                kinds = " and ".join(type(step).__name__ for step in steps)
                where = f"module '{escape(path)}'" if path else "the module"
                raise UnsupportedError(
                    f"network {type(net).__name__}: {where} computes its {escape(name)} by "
                    f"{kinds}, which has no ONNX form ({first_line(error)}), and a part of such a "
                    "tensor is not what is computed of a part of its parameter; make it an "
                    "ordinary parameter: torch.nn.utils.parametrize.remove_parametrizations("
                    f"module, '{escape(name)}')"
                ) from error


def _translate_quickly(net: nn.Module, call: Call, names: list[str], opset: int) -> ir.Model | None:
    """What :func:`_translate_by_dynamo` gives, in a fraction of its time; else ``None``."""
    try:
        with _quiet():
            # It reads what has no public name in PyTorch, and so may be absent.
            from morphgraph.torch_io.capture import HasBagsError
            from morphgraph.torch_io.quick import translate_quickly

            try:
                return translate_quickly(net, call, names, opset)
            except HasBagsError:  # all other networks need not wait for every call to be looked at
                with PlainBags():
                    return translate_quickly(net, call, names, opset)
    except Exception as error:  # noqa: BLE001, the slow way meets it again or does without
        kind = type(net).__name__
        logger.info(
            "network %s: exported by torch.export; a single run is quicker and did not do: %s: %s",
            *(kind, type(error).__name__, first_line(error)),
        )
        return None


def _translate_by_dynamo(
    net: nn.Module,
    call: Call,
    names: list[str],
    dynamic_shapes: Any,
    opset: int,
) -> ir.Model:
    source: nn.Module | torch.export.ExportedProgram = net
    state: dict[str, str] = {}
    if not all(is_spelled_plainly(name) for name in _state_names(net)):
        source, state = _plainly_named(net, call, dynamic_shapes)
        dynamic_shapes = None
    program = torch.onnx.export(
        source,
        _unlike_keywords(call),
        kwargs=call.keywords,
        input_names=names,
        opset_version=opset,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        optimize=False,  # its optimizations fuse and tie what is to be trained
        verbose=False,
    )
    assert program is not None
    for value in list(program.model.graph.initializers.values()):
        value.name = state.get(value.name or "", value.name)
    return program.model


def _unlike_keywords(call: Call) -> tuple[Any, ...]:
    """Arguments by position; the exporter takes a dict at their end for those by name."""
    ends_in_dict = bool(call.arguments) and isinstance(call.arguments[-1], dict)
    return (*call.arguments, {}) if ends_in_dict and not call.keywords else call.arguments


def _state_names(net: nn.Module) -> list[str]:
    """The paths of all parameters and buffers."""
    return [
        *dict(net.named_parameters(remove_duplicate=False)),
        *dict(net.named_buffers(remove_duplicate=False)),
    ]


def _plainly_named(
    net: nn.Module, call: Call, dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The traced network with weights called ``state_0``, ..., and what they are called in it.

    The exporter writes Python that reads ``self.heads.class``, and fails to compile it.
    """
    program = torch.export.export(
        net,
        call.arguments,
        call.keywords,
        dynamic_shapes=dynamic_shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    names: dict[str, str] = {}
    for k, spec in enumerate(program.graph_signature.input_specs):
        if spec.target is None:
            continue
        plain = f"state_{k}"
        names[plain] = spec.target
        for tensors in (program.state_dict, program.constants):
            if spec.target in tensors:
                tensors[plain] = tensors.pop(spec.target)
        spec.target = plain
    return program, names


def _translate_by_torchscript(
    net: nn.Module,
    call: Call,
    names: list[str],
    dynamic_batch: bool,
    opset: int,
) -> ir.Model:
    # TorchScript renames the weight, not the input, where both have one name.
    placeholders = [f"morphgraph_input_{k}" for k in range(len(names))]
    with tempfile.TemporaryDirectory() as folder, _without_prints():
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(
            net,
            call.arguments,
            path,
            kwargs=call.keywords,
            input_names=placeholders,
            opset_version=min(opset, _TORCHSCRIPT_OPSET),
            dynamic_axes={name: {0: BATCH} for name in placeholders} if dynamic_batch else None,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
        model = load(path)
    wanted = dict(zip(placeholders, names, strict=True))
    for value in model.graph.inputs:
        value.name = wanted.get(value.name or "", value.name)
    return model


def _require_same(net: nn.Module, call: Call, model: ir.Model) -> None:
    """Refuse a model that does not compute what the network does for the example.

    TorchScript loses writes into some views without a word (torch 2.14.1: ``diagonal``). Networks
    that draw random numbers, and models that ONNX Runtime does not run, cannot be compared.

    Raises:
        UnsupportedError: the results differ.
    """
    with torch.no_grad(), _quiet():
        expected, again = (_results(net, call) for _ in range(2))
    inputs = [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, torch.Tensor)]
    names = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    if len(names) != len(inputs):
        return
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    try:
        found = list(run(model, feeds).values())
    except MorphError:
        return
    if len(found) != len(expected):
        return
    for result, one, other in zip(found, expected, again, strict=True):
        if not np.array_equal(one, other, equal_nan=True):
            return
        if result.shape != one.shape or not np.allclose(
            result, one, rtol=_FAR, atol=_FAR * float(np.abs(one).max(initial=0.0)), equal_nan=True
        ):
            raise UnsupportedError(
                f"network {type(net).__name__}: torch.export refuses it, and what TorchScript "
                "makes of it computes something else for the example; write into tensors by "
                "`torch.where` or `torch.cat` instead of in place"
            )


def _results(net: nn.Module, call: Call) -> list[Array]:
    """What a network gives for copies of the arguments; it may write into these."""
    arguments, keywords = pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tuple(call)
    )
    leaves = pytree.tree_leaves(net(*arguments, **keywords))
    return [leaf.detach().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters chat on both streams, in warnings and in logs."""
    with (
        unlogged(),
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_prints() -> Iterator[None]:
    """TorchScript's exporter prints the whole network where it fails (torch 2.14.1, findings).

    It is meant to where a log is wanted; whether it is, is asked of a function and not of what that
    returns, and what prints is not written in Python.
    """
    log = getattr(torch._C, "_jit_onnx_log", None)  # noqa: SLF001, there is no public name
    if log is None:
        yield
        return
    torch._C._jit_onnx_log = lambda *_: None  # noqa: SLF001
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log  # noqa: SLF001


def _advice(net: nn.Module, reason: str) -> str:
    """What helps where the experts of a mixture are computed as ONNX cannot say it."""
    can_choose = any(hasattr(each, "set_experts_implementation") for each in net.modules())
    if not can_choose or "grouped_mm" not in reason:
        return ""
    return (
        "; call its set_experts_implementation('batched_mm') first: such experts have an ONNX form"
    )


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause, and those that it announces by a colon."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = list(takewhile(lambda line: line.endswith(":"), lines))
    return escape(" ".join(lines[: len(announced) + 1]) or type(error).__name__)
