"""Running a user's own network beside its ONNX model: arguments, results, and where it fails."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.torch_io.structure import arguments_of
from morphgraph.torch_io.tensors import take, to_tensor

_TORCH = str(Path(torch.__file__).parent) + os.sep
_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a forward."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in the order of the model's inputs."""
        leaves = pytree.tree_leaves((self.arguments, dict(self.keywords)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def feeds(self, model: ir.Model) -> Arrays:
        """The tensors as inputs of a model in single precision.

        Raises:
            UnsupportedError: there are more or fewer than inputs.
        """
        return {
            name: _in_single(tensor.detach()).cpu().numpy()
            for name, tensor in zip(self._inputs(model), self.tensors, strict=True)
        }

    def after(self, selection: AxisSelection) -> "Call":
        """The same call of the resized network: a cache has the heads that stay.

        Raises:
            UnsupportedError: there are more or fewer tensors than inputs of the graph.
        """
        cuts = [dict(selection.cuts(name)) for name in self._inputs(selection.graph.model)]
        following = iter(cuts)
        arguments, keywords = pytree.tree_map_only(
            torch.Tensor,
            lambda tensor: take(tensor, next(following)),
            (self.arguments, dict(self.keywords)),
        )
        return Call(arguments, keywords)

    def _inputs(self, model: ir.Model) -> list[str]:
        """What the model's inputs are called, one per tensor."""
        names = [v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers]
        if len(names) != len(self.tensors):
            raise UnsupportedError(
                f"the example holds {len(self.tensors)} tensors, and the graph has "
                f"{len(names)} inputs; pass the example that it was exported with"
            )
        return names


def _in_single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def call_of(net: nn.Module, example: Any) -> Call:
    """A call with the arguments of an example, as ``export`` takes it.

    Floating-point arguments that hold one number only are replaced by noise: with such the results
    tell little.

    Raises:
        UnsupportedError: the forward does not take these arguments.
    """
    given = example if isinstance(example, Mapping) else {}
    positional = () if given else (example,) if isinstance(example, torch.Tensor) else example
    try:
        bound = inspect.signature(net.forward).bind(*positional, **given)
    except TypeError as error:
        raise UnsupportedError(
            f"network {type(net).__name__}: its forward does not take the example: {error}"
        ) from error
    generator = torch.Generator().manual_seed(0)
    arguments, keywords = pytree.tree_map_only(
        torch.Tensor, lambda tensor: _lively(tensor, generator), (bound.args, bound.kwargs)
    )
    return Call(arguments, keywords)


def _lively(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point() or not tensor.numel() or bool(tensor.min() < tensor.max()):
        return tensor
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def random_call(net: nn.Module, model: ir.Model, seed: int = 0) -> Call:
    """A call with random tensors of the sizes of a model's inputs, put together as it was noted."""
    from morphgraph.onnx_io.runtime import random_inputs

    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    tensors: dict[str, Any] = {}
    for name, array in random_inputs(model, seed).items():
        tensor = to_tensor(ir.tensor(array))
        tensors[name] = tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)
    noted = arguments_of(model, tensors)
    arguments = tensors if noted is None else noted
    parameters = inspect.signature(net.forward).parameters
    others = noted is not None and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if others or set(arguments) <= set(parameters):
        return call_of(net, arguments)
    return call_of(net, tuple(arguments.values()))


@dataclass(frozen=True)
class Failure:
    """Where a network's own code failed, and how far it had come.

    Attributes:
        words: what the error says.
        modules: the modules in whose forward it happened, the innermost last.
        where: file and line of the innermost call that is not torch's own.
        progress: modules that had given a result, and the place in that code.
    """

    words: str
    modules: tuple[nn.Module, ...]
    where: str
    progress: tuple[int, int]


class Runner:
    """Runs one network on one call, without a trace: buffers and random numbers stay."""

    def __init__(self, net: nn.Module, call: Call) -> None:
        self.net = net
        self.call = call

    def __call__(self) -> list[torch.Tensor] | Failure:
        """The tensors of the results in single precision, or where it failed."""
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1

        hook = register_module_forward_hook(count)
        try:
            with _without_trace(self.net), _without_compiler(), torch.no_grad():
                arguments, keywords = pytree.tree_map_only(
                    torch.Tensor, _raised, (self.call.arguments, dict(self.call.keywords))
                )
                results = self.net(*arguments, **keywords)
                leaves = pytree.tree_leaves(results)
                found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                return [_in_single(leaf.detach()).cpu().clone() for leaf in found]
        except Exception as error:  # noqa: BLE001  anything may happen in a user's forward
            return self._failure(error, done)
        finally:
            hook.remove()

    def after(self, selection: AxisSelection) -> "Runner":
        """The runner of the same network once it is resized."""
        return Runner(self.net, self.call.after(selection))

    def _failure(self, error: Exception, done: int) -> Failure:
        own = {id(module) for module in self.net.modules()}
        frames = list(walk_tb(error.__traceback__))
        inside = [f.f_locals["self"] for f, _ in frames if id(f.f_locals.get("self")) in own]
        users = [(f, line) for f, line in frames if not _is_torchs(f)]
        words = str(error).strip().splitlines() or [""]
        frame, line = users[-1] if users else frames[-1]
        return Failure(
            f"{type(error).__name__}: {escape(words[0])}",
            tuple(dict.fromkeys(inside)),
            f"{frame.f_code.co_filename}:{line}",
            (done, frame.f_lasti),
        )


def _is_torchs(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH)


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _LOW else tensor


def _buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    table: dict[str, torch.Tensor | None] = vars(module)["_buffers"]
    return table


@contextmanager
def _without_trace(net: nn.Module) -> Iterator[None]:
    """Half precision raised to single for a while; afterwards all tensors are as they were.

    In half precision rounding would hide what is wrong, and not every kernel exists on the CPU.
    """
    tensors = list(dict.fromkeys((*net.parameters(), *net.buffers())))
    data = [tensor.data for tensor in tensors]
    buffers = [(table, dict(table)) for table in map(_buffers_of, net.modules())]
    contents = [(tensor, tensor.detach().clone()) for tensor in net.buffers()]
    try:
        for tensor in tensors:
            if tensor.dtype in _LOW:
                tensor.data = tensor.data.float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for tensor, old in zip(tensors, data, strict=True):
            tensor.data = old
        for table, own in buffers:
            table.update(own)
        for buffer, content in contents:
            if not torch.equal(buffer, content):
                buffer.data.copy_(content)


def _without_compiler() -> AbstractContextManager[Any]:
    """Eager execution of what ``torch.compile`` compiles.

    Every run has a hook of its own, for which it would compile anew, until it gave up for good.
    """
    if "torch._dynamo" not in sys.modules:  # to load it takes seconds
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[Array]) -> float:
    """The largest difference, as a share of the largest magnitude of an expected result.

    Infinite where the number or the shapes of the results differ.
    """
    if len(found) != len(expected):
        return float("inf")
    return max((_error(a.numpy(), b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _error(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not found.size:
        return 0.0
    wanted = expected.astype(np.float64)
    blank = np.isnan(wanted)
    if (blank != np.isnan(found)).any():
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.where(blank | (wanted == found), 0.0, np.abs(wanted - found))
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return float(difference.max()) / (scale or 1.0)
