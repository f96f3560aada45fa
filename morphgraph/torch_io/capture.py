"""A network's forward as the operators that PyTorch's exporter translates, from a single run.

``torch.export`` runs a network three times, to find what it changes, to record it, and to decompose
what it has recorded. Most networks change nothing: their operators are the same whoever looks on.
Here they are recorded and decomposed while the network runs once on tensors without memory. What a
single run does not tell (memory that is written to while somebody else reads it, numbers that are
read from tensors, tensors from elsewhere) is refused, and left to ``torch.export``.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils import _pytree as pytree

from morphgraph.torch_io.arguments import Call

Decomposition = Callable[..., Any]


class CaptureError(Exception):
    """A single run does not tell what the network computes."""


@dataclass(frozen=True)
class Captured:
    """What the exporter reads of an ``ExportedProgram``."""

    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor]
    range_constraints: Mapping[Any, Any]

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that the graph reads."""
        return ((name, self.tensors[name]) for name in self.graph_signature.parameters)

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers that the graph reads."""
        return ((name, self.tensors[name]) for name in self.graph_signature.buffers)


def capture(
    net: nn.Module,
    call: Call,
    is_translated: Callable[[OpOverload], bool],
    decompositions: Mapping[Any, Decomposition],
) -> Captured:
    """Record what a network computes.

    Args:
        net: in inference mode.
        call: the arguments of its forward.
        is_translated: whether an operator is recorded as it is.
        decompositions: of those that are not.

    Raises:
        CaptureError: a single run does not tell.
    """
    fake_mode = FakeTensorMode()
    state = _state_of(net)
    fakes: dict[str, torch.Tensor] = {
        name: fake_mode.from_tensor(tensor) for name, tensor in state.items()
    }
    recorder = _Recorder(net, is_translated, decompositions)
    for k, (name, fake) in enumerate(fakes.items()):
        recorder.add_input(f"state_{k}", fake, name)
    leaves, spec = pytree.tree_flatten(tuple(call))
    inputs = [
        fake_mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    ]
    for k, leaf in enumerate(inputs):
        if isinstance(leaf, torch.Tensor):
            recorder.add_input(f"input_{k}", leaf)
    arguments, keywords = pytree.tree_unflatten(inputs, spec)
    with _as_exported(net), enable_python_dispatcher(), fake_mode, recorder.running():
        results = torch.func.functional_call(
            net, fakes, arguments, keywords, tie_weights=True, strict=False
        )
    return recorder.finished(pytree.tree_leaves(results), state)


def _state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones by their first names."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@contextmanager
def _as_exported(net: nn.Module) -> Iterator[None]:
    """As ``torch.export`` runs a network: it may ask for that, and keeps nothing of the run.

    Raises:
        CaptureError: it has kept something.
    """
    kept = [_Kept(container) for module in net.modules() for container in _containers(module)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _compiling_state_context():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        changed = [container.restore() for container in kept]
    if any(changed):
        raise CaptureError("the network keeps what it has computed")


def _containers(module: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """The attributes of a module, and what is a dict or list among them."""
    yield vars(module)
    yield from (value for value in vars(module).values() if type(value) in (dict, list))


class _Kept:
    """What a dict or a list holds, to be restored."""

    def __init__(self, container: dict[Any, Any] | list[Any]) -> None:
        self._container, self._before = container, copy(container)

    def restore(self) -> bool:
        """Put back what was there; whether it was not."""
        now, before = self._items(self._container), self._items(self._before)
        same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
        if not same:
            self._container.clear()
            if isinstance(self._container, dict):
                self._container.update(self._before)
            else:
                self._container.extend(self._before)
        return not same

    @staticmethod
    def _items(container: dict[Any, Any] | list[Any]) -> list[Any]:
        if isinstance(container, dict):
            return [part for pair in container.items() for part in pair]
        return container


class _Recorder(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes operators into a graph, where they are called, before autograd takes them apart."""

    def __init__(
        self,
        net: nn.Module,
        is_translated: Callable[[OpOverload], bool],
        decompositions: Mapping[Any, Decomposition],
    ) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)
        self.graph = fx.Graph()
        self.inputs: dict[fx.Node, str | None] = {}
        self._is_translated, self._decompositions = is_translated, decompositions
        # The tensors are held, so that nothing else gets their ids.
        self._nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self._sharing: dict[int, set[int]] = defaultdict(set)
        self._written: set[int] = set()
        self._paths = {id(module): path for path, module in net.named_modules()}
        self._calls: dict[str, int] = defaultdict(int)
        self._stack: dict[str, tuple[str, str]] = {}

    def add_input(self, name: str, tensor: torch.Tensor, state: str | None = None) -> None:
        """A tensor that the forward is given, or has, by the name that it has there."""
        node = self.graph.placeholder(name)
        self.inputs[node] = state
        self._note(tensor, node)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record everything, and which module it is in."""
        hooks = nn.modules.module
        with ExitStack() as stack:
            enter = hooks.register_module_forward_pre_hook(self._enter)
            stack.callback(enter.remove)
            leave = hooks.register_module_forward_hook(self._leave, always_call=True)
            stack.callback(leave.remove)
            stack.enter_context(self)
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            calls = self._calls[path]
            key = f"{path}@{calls}" if calls else path
            self._calls[path] += 1
            cls = type(module)
            self._stack = {**self._stack, key: (path, f"{cls.__module__}.{cls.__qualname__}")}

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in self._paths:
            self._stack = dict(list(self._stack.items())[:-1])

    def _note(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta["val"] = tensor
        self._nodes[id(tensor)] = tensor, node
        self._sharing[_memory(tensor)].add(id(tensor))

    def _node(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._nodes:
            raise CaptureError(
                f"a tensor {tuple(value.shape)} is neither given nor part of the state"
            )
        return self._nodes[id(value)][1]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every operator."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # noqa: SLF001
            return self._write(func, args, kwargs)
        if not self._is_translated(func):
            decompose = self._decompositions.get(func)
            if decompose is not None or func._can_decompose():  # noqa: SLF001
                with self:
                    return (decompose or func.decompose)(*args, **kwargs)
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _write(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``relu_(x)`` is ``relu(x)``, if nobody else reads the memory of ``x``."""
        name = func.overloadpacket.__name__
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None)
        twin = getattr(packet, func._overloadname, None)  # noqa: SLF001
        target = args[0] if args else None
        if not name.endswith("_") or twin is None or not isinstance(target, torch.Tensor):
            raise CaptureError(f"{func} writes into a tensor")
        is_alone = self._sharing[_memory(target)] == {id(target)}
        if not is_alone or self._node(target).op == "placeholder":
            raise CaptureError(f"{func} writes into memory that others read")
        with self:
            result = twin(*args, **kwargs)
        if (result.shape, result.dtype) != (target.shape, target.dtype):
            raise CaptureError(f"{func} changes the form of a tensor")
        self._nodes[id(target)] = target, self._node(result)
        self._written.add(_memory(target))
        return target

    def _record(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        arguments, keywords = pytree.tree_map(self._node, (args, kwargs))
        parts = result if isinstance(result, tuple | list) else [result]
        if any(isinstance(part, FakeTensor) and _memory(part) in self._written for part in parts):
            # torch.export does this twice, of the tensor before and after: names would differ.
            raise CaptureError(f"{func} gives a view of memory that was written to")
        name = func.overloadpacket.__name__
        node = self._create(func, arguments, keywords, name)
        if isinstance(result, FakeTensor):
            self._note(result, node)
            return
        if not isinstance(result, tuple | list):
            raise CaptureError(f"{func} reads a number from a tensor")
        node.meta["val"] = result
        for k, part in enumerate(result):
            item = self._create(operator.getitem, (node, k), {}, "getitem")
            if isinstance(part, FakeTensor):
                self._note(part, item)

    def _create(self, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["nn_module_stack"] = self._stack
        return node

    def finished(self, results: Sequence[Any], state: Mapping[str, torch.Tensor]) -> Captured:
        """The graph that gives the tensors among the results."""
        outputs = [self._node(leaf) for leaf in results if isinstance(leaf, torch.Tensor)]
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        for node, name in list(self.inputs.items()):
            if name is not None and not node.users:
                self.graph.erase_node(node)
                del self.inputs[node]
        return Captured(
            fx.GraphModule(nn.Module(), self.graph),
            ExportGraphSignature(
                [_input(node, name, state) for node, name in self.inputs.items()],
                [
                    OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
                    for node in outputs
                ],
            ),
            state,
            {},
            {},
        )


def _memory(tensor: torch.Tensor) -> int:
    """Of tensors that are alive, those with the same number share their memory."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _input(node: fx.Node, name: str | None, state: Mapping[str, torch.Tensor]) -> InputSpec:
    argument = TensorArgument(node.name)
    if name is None:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    if isinstance(state[name], nn.Parameter):
        return InputSpec(InputKind.PARAMETER, argument, name)
    return InputSpec(InputKind.BUFFER, argument, name, persistent=True)
