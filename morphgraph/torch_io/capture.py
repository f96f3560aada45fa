"""A network's forward as the operators that PyTorch's exporter translates, from a single run.

``torch.export`` runs a network three times, to find what it changes, to record it, and to decompose
what it has recorded. Most networks change nothing: their operators are the same whoever looks on.
Here they are recorded and decomposed while the network runs once on tensors without memory. What a
single run does not tell (arguments that are written to, numbers that are read from tensors, tensors
from elsewhere) is refused, and left to ``torch.export``.
"""

import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest
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
from morphgraph.torch_io.forms import form_of
from morphgraph.torch_io.memory import CaptureError, PerTensor, Views

Decomposition = Callable[..., Any]


class HasBagsError(CaptureError):
    """The network sums embeddings of bags of words by an operator of its own."""


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

    def constants_by_node(self) -> dict[fx.Node, torch.Tensor]:
        """The tensors that stand in the forward, by what stands for them in the graph."""
        names = self.graph_signature.inputs_to_lifted_tensor_constants
        return {
            node: self.constants[names[node.name]]
            for node in self.graph_module.graph.nodes
            if node.op == "placeholder" and node.name in names
        }


def capture(
    net: nn.Module,
    call: Call,
    is_translated: Callable[[OpOverload], bool],
    decomposition_of: Callable[[OpOverload], Decomposition | None],
) -> Captured:
    """Record what a network computes.

    Args:
        net: in inference mode.
        call: the arguments of its forward.
        is_translated: whether an operator is recorded as it is.
        decomposition_of: what one consists of that is not.

    Raises:
        HasBagsError: there is an ``embedding_bag``.
        CaptureError: a single run does not tell.
    """
    fake_mode = FakeTensorMode()
    state = _state_of(net)
    fakes: dict[str, torch.Tensor] = {
        name: fake_mode.from_tensor(tensor) for name, tensor in state.items()
    }
    recorder = _Recorder(net, is_translated, decomposition_of)
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
    with _as_exported(net, fakes), enable_python_dispatcher(), fake_mode, recorder.running():
        results = torch.func.functional_call(
            net, fakes, arguments, keywords, tie_weights=True, strict=False
        )
    return recorder.finished(pytree.tree_leaves(results), state)


def _state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones by their first names."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@contextmanager
def _as_exported(net: nn.Module, fakes: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """As ``torch.export`` runs a network: it may ask for that, and keeps nothing of the run.

    Recurrent layers make lists of their weights, which are of no harm: these stand in the graph.

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
        changed = [part for container in kept for part in container.restore()]
    weights = set(map(id, fakes.values()))
    if not all(_is_one_of(weights, part) for part in changed):
        raise CaptureError("the network keeps what it has computed")


def _containers(module: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """The attributes of a module, and what is a dict or list among them."""
    yield vars(module)
    yield from (value for value in vars(module).values() if type(value) in (dict, list))


class _Kept:
    """What a dict or a list holds, to be restored."""

    def __init__(self, container: dict[Any, Any] | list[Any]) -> None:
        self._container, self._before = container, copy(container)

    def restore(self) -> list[Any]:
        """Put back what was there; what stood in its place."""
        now, before = self._items(self._container), self._items(self._before)
        changed = [a for a, b in zip_longest(now, before, fillvalue=_NOTHING) if a is not b]
        if changed:
            self._container.clear()
            if isinstance(self._container, dict):
                self._container.update(self._before)
            else:
                self._container.extend(self._before)
        return changed

    @staticmethod
    def _items(container: dict[Any, Any] | list[Any]) -> list[Any]:
        if isinstance(container, dict):
            return [part for pair in container.items() for part in pair]
        return container


_NOTHING = object()


def _is_one_of(tensors: set[int], part: Any) -> bool:
    """Whether something is one of some tensors, a reference to one, or a list of such."""
    if type(part) is list:
        return all(_is_one_of(tensors, each) for each in part)
    return id(part() if isinstance(part, weakref.ref) else part) in tensors


class _Recorder(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes operators into a graph, where they are called, before autograd takes them apart."""

    def __init__(
        self,
        net: nn.Module,
        is_translated: Callable[[OpOverload], bool],
        decomposition_of: Callable[[OpOverload], Decomposition | None],
    ) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)
        self.graph = fx.Graph()
        self.inputs: dict[fx.Node, str | None] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self._is_translated, self._decomposition_of = is_translated, decomposition_of
        self._nodes: PerTensor[fx.Node] = PerTensor()
        self._views = Views(self._emit)
        self._is_inside = False
        self._paths = {id(module): path for path, module in net.named_modules()}
        self._calls: dict[str, int] = defaultdict(int)
        self._stack: dict[str, tuple[str, str]] = {}

    def add_input(self, name: str, tensor: torch.Tensor, state: str | None = None) -> None:
        """A tensor that the forward is given, or has, by the name that it has there."""
        node = self.graph.placeholder(name)
        self.inputs[node] = state
        self._note(tensor, node)
        self._views.add(tensor, is_given=True)

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
        self._nodes[tensor] = node

    def _node(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if not isinstance(value, torch.Tensor):
            return value
        node = self._nodes.get(value)
        if node is None:
            raise CaptureError(
                f"a tensor {tuple(value.shape)} is neither given nor part of the state"
            )
        return node

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
        if func in _BAGS:
            raise HasBagsError
        if self._is_inside:
            return self._compute(func, args, kwargs)
        if func in _LIFTING:
            return self._constant(func, *args)
        if func is torch.ops.aten.detach_.default:
            return args[0]
        if func._schema.is_mutable:  # noqa: SLF001
            return self._write(func, args, kwargs)
        if func._can_decompose() and not self._is_translated(func):  # noqa: SLF001
            with self:
                return (self._decomposition_of(func) or func.decompose)(*args, **kwargs)
        if func.is_view:
            return self._views.look(func, args, kwargs)
        result = self._emit(func, *self._values(args, kwargs))
        for part in pytree.tree_leaves(result):
            if isinstance(part, FakeTensor):
                self._views.add(part)
        return result

    def _values(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Operands as what they hold now."""
        values: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            torch.Tensor, self._views.value, (args, kwargs)
        )
        return values

    def _emit(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operator, or what it is decomposed into; its results."""
        before, self._is_inside = self._is_inside, True
        try:
            return self._compute(func, args, kwargs)
        finally:
            self._is_inside = before

    def _compute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same within a decomposition, which knows no memory."""
        if func._schema.is_mutable:  # noqa: SLF001
            raise CaptureError(f"a decomposition writes into a tensor: {func}")
        if not self._is_translated(func):
            decompose = self._decomposition_of(func)
            if decompose is not None or func._can_decompose():  # noqa: SLF001
                with self:
                    return (decompose or func.decompose)(*args, **kwargs)
        compute: Callable[..., Any] = _RESULTS.get(func, func)
        result = form_of(func, args, kwargs)
        if result is None:
            result = compute(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _constant(self, func: OpOverload, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of numbers that stand in the forward: ``torch.tensor(0.5)``."""
        if isinstance(tensor, FakeTensor):
            raise CaptureError("a tensor is made of one that is computed")
        fake: torch.Tensor = func(tensor)
        name = f"lifted_tensor_{len(self.constants)}"
        self.constants[name] = tensor
        last = [node for node, state in self.inputs.items() if state is not None][-1:]
        with self.graph.inserting_after(*last) if last else self.graph.inserting_before():
            node = self.graph.placeholder(f"c_{name}")
        self.inputs[node] = name
        node.meta["val"] = fake
        copied = self._create(torch.ops.aten.clone.default, (node,), {}, "clone")
        self._note(fake, copied)
        self._views.add(fake)
        return fake

    def _write(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``relu_(x)`` is ``relu(x)``, and what ``x`` holds from now on."""
        name = func.overloadpacket.__name__
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None)
        twin = getattr(packet, func._overloadname, None)  # noqa: SLF001
        target = args[0] if args else None
        if not name.endswith("_") or twin is None or not isinstance(target, torch.Tensor):
            raise CaptureError(f"{func} writes into a tensor")
        if twin.is_view and not kwargs:
            self._turn(func, twin, args)
            return target
        result = self._emit(twin, *self._values(args, kwargs))
        if (result.shape, result.dtype) != (target.shape, target.dtype):
            raise CaptureError(f"{func} changes the form of a tensor")
        self._views.write(target, result)
        return target

    def _turn(self, func: OpOverload, twin: OpOverload, args: tuple[Any, ...]) -> None:
        """``x.squeeze_()``, which changes the tensor, not what its memory holds."""
        aside = torch.ops.aten.alias.default(args[0])
        node = self._nodes.get(args[0])
        if node is not None:
            self._note(aside, node)
        self._views.turn(func, twin, args, aside)

    def _record(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        arguments, keywords = pytree.tree_map(self._node, (args, kwargs))
        node = self._create(func, arguments, keywords, func.overloadpacket.__name__)
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
        outputs = [
            self._node(self._views.value(leaf))
            for leaf in results
            if isinstance(leaf, torch.Tensor)
        ]
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
            self.constants,
            {},
        )


def _normalized(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a batch normalization gives in inference; to run PyTorch's own form takes long."""
    unused = x.new_empty(0)
    return torch.empty_like(x), unused, unused


_RESULTS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten._native_batch_norm_legit_no_training.default: _normalized  # noqa: SLF001
}

_BAGS = (torch.ops.aten.embedding_bag.default, torch.ops.aten.embedding_bag.padding_idx)

_LIFTING = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
"""What becomes of a tensor that is made of numbers."""


def _input(node: fx.Node, name: str | None, state: Mapping[str, torch.Tensor]) -> InputSpec:
    argument = TensorArgument(node.name)
    if name is None:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    if name not in state:
        return InputSpec(InputKind.CONSTANT_TENSOR, argument, name)
    if isinstance(state[name], nn.Parameter):
        return InputSpec(InputKind.PARAMETER, argument, name)
    return InputSpec(InputKind.BUFFER, argument, name, persistent=True)
