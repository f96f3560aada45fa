"""A network's forward as the operators that PyTorch's exporter translates, from a single run.

``torch.export`` runs a network three times, to find what it changes, to record it, and to decompose
what it has recorded. Most networks change nothing: their operators are the same whoever looks on.
Here they are recorded and decomposed while the network runs once on tensors without memory. What a
single run does not tell (memory that is written to while somebody else reads it, numbers that are
read from tensors) is refused, and left to ``torch.export``.

What follows from no input and no weight (positions, masks, states of zeros) is computed,
writes and views included, and becomes a constant where an operator reads it.
"""

import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
from torch.utils._python_dispatch import _disable_current_modes

from morphgraph.torch_io.arguments import Call

Decomposition = Callable[..., Any]

_SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}

_LARGEST = 16 * 2**20  # bytes of a constant; what is larger should stay a computation

_BY_FORM = (
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
)
"""Operators that read an operand's form, and not its numbers."""


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
    recorder = _Recorder(net, fake_mode, is_translated, decompositions)
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
    with (
        _as_exported(net, fakes.values()),
        enable_python_dispatcher(),
        fake_mode,
        recorder.running(),
    ):
        results = torch.func.functional_call(
            net, fakes, arguments, keywords, tie_weights=True, strict=False
        )
    return recorder.finished(pytree.tree_leaves(results), state)


def _state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones by their first names."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@contextmanager
def _as_exported(net: nn.Module, state: Iterable[torch.Tensor]) -> Iterator[None]:
    """As ``torch.export`` runs a network: it may ask for that, and keeps nothing of the run.

    What stands for its ``state`` in the run may be kept: some modules list their weights.

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
        given = {id(tensor) for tensor in state}
        changed = [container.restore(given) for container in kept]
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

    def restore(self, given: Container[int]) -> bool:
        """Put back what was there; whether there was anything else, and of other ids than these."""
        now, before = self._items(self._container), self._items(self._before)
        alike = len(now) == len(before)
        same = alike and all(a is b for a, b in zip(now, before, strict=True))
        known = alike and all(a is b or _lists(a, given) for a, b in zip(now, before, strict=True))
        if not same:
            self._container.clear()
            if isinstance(self._container, dict):
                self._container.update(self._before)
            else:
                self._container.extend(self._before)
        return not known

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
        fake_mode: FakeTensorMode,
        is_translated: Callable[[OpOverload], bool],
        decompositions: Mapping[Any, Decomposition],
    ) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)
        self.graph = fx.Graph()
        self.inputs: dict[fx.Node, str | None] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self._fake_mode = fake_mode
        # What follows from no input: by the id of a tensor itself, and its numbers. Views share
        # memory as they do anywhere, so that a write shows in all of them.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self._read: dict[tuple[int, int], fx.Node] = {}
        self._is_translated, self._decompositions = is_translated, decompositions
        # The tensors are held, so that nothing else gets their ids.
        self._nodes: dict[int, tuple[torch.Tensor, fx.Node | None]] = {}
        # By the id of a slice: what it is a slice of, and how it is put back there.
        self._slices: dict[int, tuple[torch.Tensor, OpOverload, tuple[Any, ...]]] = {}
        self._given: set[int] = set()
        self._sharing: dict[int, set[int]] = defaultdict(set)
        self._paths = {id(module): path for path, module in net.named_modules()}
        self._calls: dict[str, int] = defaultdict(int)
        self._stack: dict[str, tuple[str, str]] = {}

    def add_input(self, name: str, tensor: torch.Tensor, state: str | None = None) -> None:
        """A tensor that the forward is given, or has, by the name that it has there."""
        node = self.graph.placeholder(name)
        self.inputs[node] = state
        self._note(tensor, node)
        self._given.add(_memory(tensor))

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
            return self._constant(value)
        node = self._nodes[id(value)][1]
        if node is None:
            raise CaptureError("a tensor is read whose memory was written to by another name")
        return node

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """What stands for a tensor that follows from no input, as it is now."""
        numbers = self._numbers(value)
        if numbers is None:
            raise CaptureError(f"nobody knows where a tensor {tuple(value.shape)} comes from")
        key = id(numbers), numbers._version  # noqa: SLF001
        if key not in self._read:
            if numbers.nbytes > _LARGEST:
                raise CaptureError(f"a constant of {numbers.nbytes} bytes")
            name = f"constant_{len(self.constants)}"
            last = next(node for node in reversed(self.graph.nodes) if node.op == "placeholder")
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(name)
            node.meta["val"] = self._fake_mode.from_tensor(numbers)
            # A later write is not to show here.
            with _disable_current_modes():
                self.constants[name] = numbers.detach().clone()
            self.inputs[node] = name
            self._read[key] = node
        return self._read[key]

    def _numbers(self, value: torch.Tensor) -> torch.Tensor | None:
        """The numbers of a tensor that follows from no input; ``None`` of any other."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        if isinstance(value, FakeTensor):
            # What PyTorch's functions that make tensors return is a copy of what they were given.
            numbers = None if id(value) in self._nodes else self._made.get(_place(value))
            if numbers is not None:
                self._known[id(value)] = value, numbers
            return numbers
        self._known[id(value)] = value, value  # from elsewhere: a module's attribute, a global
        return value

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
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        if all(self._numbers(operand) is not None for operand in operands):
            return self._compute(func, args, kwargs)
        if func.overloadpacket.__name__ in _BY_FORM:
            form = self._empty_like(args[0], func)
            return self._compute(func, (form, *args[1:]), kwargs)
        if func._schema.is_mutable:  # noqa: SLF001
            return self._write(func, args, kwargs)
        if not self._is_translated(func):
            decompose = self._decompositions.get(func)
            if decompose is not None or func._can_decompose():  # noqa: SLF001
                with self:
                    return (decompose or func.decompose)(*args, **kwargs)
        # What runs on tensors without memory takes no others.
        result = func(*pytree.tree_map(self._without_memory, args), **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _without_memory(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self._fake_mode.from_tensor(value)
        return value

    def _empty_like(self, operand: torch.Tensor, func: OpOverload) -> torch.Tensor:
        """A tensor of an operand's form, of which no number is read."""
        takes_shape = func.overloadpacket.__name__.endswith("_like")
        with _disable_current_modes():
            one = torch.empty((), dtype=operand.dtype, device=operand.device)
            return one.expand(operand.shape) if takes_shape else one

    def _compute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator whose operands, if any, follow from no input.

        Raises:
            CaptureError: it draws random numbers, or writes into a tensor that is not this run's.
        """
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(f"{func} draws random numbers")
        target = args[0] if args else None
        if func._schema.is_mutable and (  # noqa: SLF001
            not isinstance(target, torch.Tensor)
            or not func.overloadpacket.__name__.endswith("_")
            or self._known[id(target)][1] is target
        ):
            raise CaptureError(f"{func} writes into a tensor")
        given = pytree.tree_map(self._numbers_of_leaf, (args, kwargs))
        with _disable_current_modes(), torch.no_grad():
            result = func(*given[0], **given[1])
        if func._schema.is_mutable:  # noqa: SLF001
            return target
        return pytree.tree_map(self._as_known, result)

    def _numbers_of_leaf(self, leaf: Any) -> Any:
        return self._numbers(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _as_known(self, numbers: Any) -> Any:
        """The tensor without memory that stands for these numbers from now on."""
        if not isinstance(numbers, torch.Tensor):
            return numbers
        fake = self._fake_mode.from_tensor(numbers)
        self._known[id(fake)] = fake, numbers
        self._made[_place(fake)] = numbers
        return fake

    def _write(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``relu_(x)`` is ``relu(x)``, if nobody else reads the memory of ``x``."""
        name = func.overloadpacket.__name__
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None)
        twin = getattr(packet, func._overloadname, None)  # noqa: SLF001
        target = args[0] if args else None
        if not name.endswith("_") or twin is None or not isinstance(target, torch.Tensor):
            raise CaptureError(f"{func} writes into a tensor")
        with self:
            result = twin(*args, **kwargs)
        if (result.shape, result.dtype) != (target.shape, target.dtype):
            raise CaptureError(f"{func} changes the form of a tensor")
        self._replace(target, result)
        return target

    def _replace(self, target: torch.Tensor, result: torch.Tensor) -> None:
        """Let a tensor be what was written into it, and what it is a part of with it.

        Others that share its memory are not to be read any more: nobody knows what of them has
        changed.

        Raises:
            CaptureError: the memory is an argument's or a weight's.
        """
        if _memory(target) in self._given:
            raise CaptureError("a write into an argument or a weight")
        current = {id(target): (target, self._node(result))}
        part, new = target, result
        while id(part) in self._slices:
            whole, scatter, arguments = self._slices[id(part)]
            with self:
                new = scatter(whole, new, *arguments)
            current[id(whole)] = whole, self._node(new)
            part = whole
        for stale in self._sharing[_memory(target)] - current.keys():
            self._nodes[stale] = self._nodes[stale][0], None
        self._nodes |= current

    def _record(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        arguments, keywords = pytree.tree_map(self._node, (args, kwargs))
        name = func.overloadpacket.__name__
        node = self._create(func, arguments, keywords, name)
        if isinstance(result, FakeTensor):
            self._note(result, node)
            scatter = _SCATTERS.get(func)
            if scatter is not None and not kwargs:
                self._slices[id(result)] = args[0], scatter, args[1:]
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
                [
                    _input(node, self.inputs[node], state)
                    for node in self.graph.nodes
                    if node.op == "placeholder"
                ],
                [
                    OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
                    for node in outputs
                ],
            ),
            state,
            self.constants,
            {},
        )


def _lists(value: Any, given: Container[int]) -> bool:
    """Whether a value is one of these tensors, or a list of them, as recurrent layers keep."""
    if isinstance(value, list | tuple):
        return all(_lists(each, given) for each in value)
    return id(value() if isinstance(value, weakref.ref) else value) in given


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _memory(tensor: torch.Tensor) -> int:
    """Of tensors that are alive, those with the same number share their memory."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where in memory a tensor lies, and how."""
    form = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return _memory(tensor), *form


def _input(node: fx.Node, name: str | None, state: Mapping[str, torch.Tensor]) -> InputSpec:
    argument = TensorArgument(node.name)
    if name is None:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    if name not in state:
        return InputSpec(InputKind.CONSTANT_TENSOR, argument, name)
    if isinstance(state[name], nn.Parameter):
        return InputSpec(InputKind.PARAMETER, argument, name)
    return InputSpec(InputKind.BUFFER, argument, name, persistent=True)
