"""Grows a torch.fx graph of ordinary modules, one ONNX node at a time.

A lowering (``Op.lower``) is called as ``lower(builder, node, **attributes)`` and returns the fx
node of its result, a tuple of them where the operator has several. It asks the builder for
operands,

=================  ===================================================================
``tensor``         as an fx node, whatever it is
``operand``        the same, but a constant of one element becomes a Python number
``constant``       as an array, where training leaves it alone
``sizes``          as a list of integers: a shape, axes, repeats
``numbers``        the same, with an fx node for a number that is computed from sizes
``size``           the size of one of its axes, an fx node where the model leaves it open
=================  ===================================================================

and for what computes with them: ``call`` a function, a ``method``, a module without weights
(``module``), a module that owns weights (``owner``). ``functions`` has what torch itself lacks, and
``dtype`` is the torch type of an ONNX one: operators import nothing of this package.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from morphgraph.arrays import Array
from morphgraph.errors import UnsupportedError
from morphgraph.ops import Op, OpNode, facts_of
from morphgraph.torch_io import functions
from morphgraph.torch_io.homes import RUNNING, Homes, name_of
from morphgraph.torch_io.names import as_argument, clean, scope_of, shared_path
from morphgraph.torch_io.origins import Origins
from morphgraph.torch_io.size_arithmetic import Size, SizeArithmetic
from morphgraph.torch_io.tensors import torch_type

Number: TypeAlias = float | int | bool


class TorchBuilder(Homes):
    """The graph so far, the modules it calls, and where every ONNX value is found.

    Attributes:
        graph: the fx graph.
        tree: the modules, by dotted path.
        parameters: torch name -> ONNX name, of every parameter and running statistic.
        functions: :mod:`morphgraph.torch_io.functions`, for ``call``.
        dtype: the torch dtype of an ONNX element type, see
            :func:`~morphgraph.torch_io.tensors.torch_type`.
    """

    functions = functions
    dtype = staticmethod(torch_type)

    def __init__(
        self,
        parameters: Sequence[str],
        exported: bool,
        buffers: Collection[str] = (),
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__(parameters, exported, buffers, frozen)
        self._values: dict[str, fx.Node] = {}
        self._calls: Counter[str] = Counter()
        self._arithmetic = SizeArithmetic(self.graph, self.value)

    # -- values -------------------------------------------------------------------------------

    def placeholder(self, value: ir.Value) -> None:
        """Make a graph input an argument, under its name where Python and torch.fx take that."""
        others = [node for node in self.graph.nodes if node.op == "placeholder"]
        taken = {name for node in others for name in (node.name, str(node.target))}
        node = self.graph.placeholder(as_argument(name_of(value)))
        if node.target in taken:
            node.target = node.name
        self.bind(value, node)

    def bind(self, value: ir.Value, result: fx.Node) -> None:
        """Say what an ONNX value is in the graph."""
        self._values[name_of(value)] = result

    def is_parameter(self, n: OpNode, i: int) -> bool:
        """Whether operand ``i`` is itself a trainable parameter."""
        value = n.ir.inputs[i] if n.has(i) else None
        return value is not None and self._is_parameter(value)

    def constant(self, n: OpNode, i: int) -> Array | None:
        """The value of operand ``i`` where it is a constant that training leaves alone."""
        return None if self.is_parameter(n, i) else n.const(i)

    def tensor(self, n: OpNode, i: int) -> fx.Node:
        """Operand ``i`` as an fx node."""
        value = n.ir.inputs[i] if n.has(i) else None
        if value is None:
            self.fail(n, f"operand {i} is missing")
        return self.value(value)

    def value(self, value: ir.Value) -> fx.Node:
        """An ONNX value as an fx node."""
        if name_of(value) in self._values:
            return self._values[name_of(value)]
        if value.const_value is None:
            raise UnsupportedError(
                f"value '{name_of(value)}' is read before it is computed; canonicalize the model"
            )
        if self._is_parameter(value):
            return self._read(self._home_of(value))
        return self._read(self._buffer(value))

    def optional(self, n: OpNode, i: int) -> fx.Node | None:
        """Operand ``i`` as an fx node, ``None`` where it is absent."""
        return self.tensor(n, i) if n.has(i) else None

    def operand(self, n: OpNode, i: int) -> fx.Node | Number:
        """Operand ``i``; a constant of one element that broadcasts away becomes a number."""
        constant = self.constant(n, i)
        if constant is not None and constant.size == 1 and constant.ndim <= _other_rank(n, i):
            number: Number = constant.astype(_PLAIN.get(constant.dtype.kind, "f8")).item()
            return decimal(number) if isinstance(number, float) else number
        return self.tensor(n, i)

    def sizes(self, n: OpNode, i: int) -> list[int] | None:
        """Operand ``i`` as a list of integers; ``None`` where it is absent or computed."""
        sizes = n.ints(i)
        return None if sizes is None else list(sizes)

    def numbers(self, n: OpNode, i: int) -> list[Size] | None:
        """Operand ``i`` as numbers that may depend on open sizes, but on no other values.

        ``None`` where it is absent, or depends on others.
        """
        value = n.ir.inputs[i] if n.has(i) else None
        return None if value is None else self._arithmetic.list_of(value)

    def size(self, n: OpNode, i: int, axis: int) -> Size:
        """The size of an axis of operand ``i``, negative axes counted from the end."""
        value = n.ir.inputs[i]
        assert value is not None
        return self._arithmetic.size(value, axis)

    def open_axes(self, n: OpNode, port: int) -> set[int]:
        """Axes of an operand or (``~k``) a result whose size the model leaves open."""
        value = n.ir.inputs[port] if port >= 0 else n.ir.outputs[~port]
        shape = None if value is None else value.shape
        return {axis for axis, size in enumerate(shape or ()) if not isinstance(size, int)}

    def device(self) -> fx.Node:
        """The device of the network's first input, for tensors that are made of sizes."""
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        return self.call(getattr, first, "device")

    @property
    def values(self) -> Mapping[str, fx.Node]:
        """By ONNX value the fx node that it is, in the order in which they were computed."""
        return self._values

    # -- computing ----------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function of torch or :mod:`operator`."""
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """Call a method of a tensor."""
        return self.graph.call_method(name, (x, *args), kwargs)

    def item(self, x: fx.Node, index: Any) -> fx.Node:
        """``x[index]``."""
        return self.graph.call_function(operator.getitem, (x, index))

    def squeeze(self, x: fx.Node, axes: Sequence[int]) -> fx.Node:
        """Drop axes of size 1; where a slice has just cut one out, select there instead."""
        if len(axes) == 1 and x.target is operator.getitem:
            # x[:, :, 3:4] without axis 2 is x.select(2, 3).
            source, index = x.args
            before, cut = (index[:-1], index[-1]) if isinstance(index, tuple) else ((), None)
            whole = len(before) == axes[0] and all(part == slice(None) for part in before)
            if whole and isinstance(cut, slice) and cut.stop == (cut.start or 0) + 1:
                assert isinstance(source, fx.Node)
                return self.method("select", source, axes[0], cut.start or 0)
        return self.method("squeeze", x, tuple(axes))

    def module(self, n: OpNode, module: nn.Module, *args: Any) -> fx.Node:
        """Call a module without weights, placed where the exported model had it."""
        path = self.tree.place(scope_of(n, type(module).__name__), module)
        return self.graph.call_module(path, args)

    def owner(
        self, n: OpNode, module: nn.Module, x: fx.Node, operands: Mapping[str, int]
    ) -> fx.Node | None:
        """Call a module that owns operands of the node: ``{"weight": 1, "bias": 2}``.

        The module lives at the path that the operands' names share, so that its ``state_dict`` keys
        are their ONNX names. ``None`` where it cannot own them: they are computed, constant, read
        by another node already, or named otherwise; then the lowering reads them as tensors.
        """
        values = {role: n.ir.inputs[i] for role, i in operands.items()}
        return self.own(n, module, x, {r: v for r, v in values.items() if v is not None})

    def own(
        self, n: OpNode, module: nn.Module, x: fx.Node, values: Mapping[str, ir.Value]
    ) -> fx.Node | None:
        """The same, the weights given as ONNX values of the shape that the module wants."""
        names = {role: name_of(value) for role, value in values.items()}
        # Where the module lives: at the path that the names share; else where a weight of it has a
        # home already; else, in a model from elsewhere, at a path of the node's name.
        path = shared_path(names, self._exported)
        homes = [self._homes[name] for name in names.values() if name in self._homes]
        if path is None and homes:
            path = homes[0].rpartition(".")[0]
        elif path is None and not self._exported:
            path = self._new_path(clean(n.name or n.op_type), names)
        if not path:
            return None
        at_home = {
            role for role, name in names.items() if self._homes.get(name) == f"{path}.{role}"
        }
        # All weights are there: the same module is called once more, as in weight sharing.
        if len(at_home) == len(names) and self.tree.same_form(path, module):
            return self._call_owner(path, x)
        # A weight that lives elsewhere has one home only; the lowering reads it from there.
        if len(at_home) < len(homes) or not self.tree.takes(path, module):
            return None
        if not all(
            value.const_value is not None and (role in RUNNING or self._is_parameter(value))
            for role, value in values.items()
        ) or self._would_take(n, module, path):
            return None
        for role, value in values.items():
            if role not in at_home:
                self._give(module, role, value)
                self._set_home(value, f"{path}.{role}")
        if isinstance(module, _BatchNorm):
            module.num_batches_tracked = torch.tensor(0)
        self.tree.put(path, module)
        return self._call_owner(path, x)

    def _new_path(self, stem: str, names: Mapping[str, str]) -> str:
        """A vacant path at which no weight would get the ONNX name of another one.

        So a ``state_dict`` whose keys are all ONNX names is one by ONNX names.
        """
        path = self.tree.unique(stem)
        while any(
            own != name and own in self._trainable
            for role, name in names.items()
            for own in (f"{path}.{role}",)
        ):
            stem += "_"
            path = self.tree.unique(stem)
        return path

    def _would_take(self, n: OpNode, module: nn.Module, path: str) -> bool:
        """Whether a module would use a parameter at its path that the node does not.

        Swin V2 adds a bias of which it has set a part to zero. Only a bias that is added right
        behind comes to the module, by :meth:`biased_linear`.
        """
        empty = [role for role in ("weight", "bias") if getattr(module, role, path) is None]
        return any(
            f"{path}.{role}" in self._trainable and not _is_added_behind(n, f"{path}.{role}")
            for role in empty
        )

    def transposed_parameter(self, n: OpNode, i: int) -> ir.Value | None:
        """The matrix parameter that operand ``i`` is the transpose of, if it is one."""
        value = n.ir.inputs[i]
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != "Transpose":
            return None
        source = producer.inputs[0]
        if source is None or not self._is_parameter(source) or source.shape is None:
            return None
        return source if len(source.shape) == 2 else None

    def origins(self, n: OpNode, i: int) -> Origins | None:
        """Where the numbers of operand ``i`` stand in parameters, if it only moves them."""
        pending = [n.ir.inputs[i]]
        while pending:
            value = pending.pop()
            if value is None or value.const_value is not None:
                continue
            node = value.producer()
            if node is None or not facts_of(node).moves:
                return None
            pending += node.inputs
        return Origins(self.tensor(n, i), self.tree.tensor)

    def parameter(self, path: str) -> fx.Node:
        """The parameter at a path."""
        return self._read(path)

    def is_exported(self, path: str) -> bool:
        """Whether the model has a parameter of this name, wherever it is read."""
        return path in self._trainable

    def adopt(self, path: str, module: nn.Module, *args: Any) -> fx.Node | None:
        """Call a module that owns the parameters in the folder at this path, under their names.

        ``None`` where something else stands there, or the folder lacks one of them.
        """
        if not self.tree.same_form(path, module):
            names = [name for name, _ in module.named_parameters()]
            tensors = {name: self.tree.get(f"{path}.{name}") for name in names}
            if not self.tree.takes(path, module):
                return None
            for name, tensor in tensors.items():
                if not isinstance(tensor, nn.Parameter):
                    return None
                setattr(module, name, tensor)
            self.tree.put(path, module)
        self._calls[path] += 1
        return self.graph.call_module(path, args)

    def biased_linear(self, n: OpNode) -> fx.Node | None:
        """An addition behind a Linear made without bias: let the Linear add the other operand."""
        for i in (0, 1):
            product, bias = n.ir.inputs[1 - i], n.ir.inputs[i]
            linear = None if product is None else self._values.get(name_of(product))
            if bias is None or linear is None:
                continue
            # A Linear whose weight is computed is a call, one that owns it is a module.
            is_bare = linear.target is F.linear and len(linear.args) == 2
            if is_bare and self._is_parameter(bias) and n.shape(i) == n.out()[-1:]:
                return self.call(F.linear, *linear.args, self.value(bias))
            if linear.op != "call_module":
                continue
            path = str(linear.target)
            module = self.tree.get(path)
            # Only the bias that the exported module had: its name says so, and nobody else has read
            # the module's result, called the module, or read the bias.
            if (
                isinstance(module, nn.Linear)
                and self.tree.get(f"{path}.bias") is None
                and not linear.users
                and self._calls[path] == 1
                and name_of(bias) == f"{path}.bias"
                and name_of(bias) not in self._homes
                and self._is_parameter(bias)
                and n.shape(i) == (module.out_features,)
            ):
                self._give(module, "bias", bias)
                self._set_home(bias, f"{path}.bias")
                return linear
        return None

    def buffer(self, n: OpNode, name: str, tensor: torch.Tensor) -> fx.Node:
        """A constant that the lowering made; it moves with the module, but is not in its state.

        A floating-point one takes the type of the node's first operand.
        """
        first = n.ir.inputs[0] if n.has(0) else None
        dtype = None if first is None else first.dtype
        if tensor.is_floating_point() and dtype is not None and dtype.is_floating_point():
            tensor = tensor.to(torch_type(dtype))
        path = self.tree.unique(f"{clean(n.name or n.op_type)}_{name}")
        self.tree.put_buffer(path, tensor, persistent=False)
        return self._read(path)

    def positions(self, n: OpNode, axis: int, positions: Array) -> fx.Node:
        """Constant positions along an axis, as an index tensor."""
        return self.buffer(n, f"positions_{axis}", torch.from_numpy(positions.astype(np.int64)))

    @staticmethod
    def decimal(x: float) -> float:
        """The shortest decimal of a float32 attribute: 1e-05 for 9.99999974e-06."""
        return decimal(x)

    def fail(self, n: OpNode, why: str, advice: str = "") -> NoReturn:
        """Refuse a node by name.

        Raises:
            UnsupportedError: always.
        """
        full = f"{n.domain}::{n.op_type}" if n.domain else n.op_type
        known = facts_of(n) is not Op
        hint = advice or (
            "plan, apply, shrink and bench take it as it is; to have it in PyTorch, export the "
            "network without it, or extend its entry's 'lower' (docs/adding-an-op.md)"
            if known
            else f'teach it: register("{full}", line, lower=your_function)'
        )
        raise UnsupportedError(f"node '{n.name}': {n.op_type} to PyTorch: {why}; {hint}")

    def _call_owner(self, path: str, x: fx.Node) -> fx.Node:
        self._calls[path] += 1
        return self.graph.call_module(path, (x,))


_PLAIN = {"b": "?", "i": "i8", "u": "i8"}


def _other_rank(n: OpNode, i: int) -> int:
    """The largest rank among the other operands."""
    return max((len(s) for k, s in enumerate(n.in_shapes) if s is not None and k != i), default=0)


def _is_added_behind(n: OpNode, name: str) -> bool:
    """Whether a parameter has no other reader than the addition to the node's result."""
    uses = list(n.ir.outputs[0].uses())
    if len(uses) != 1 or not facts_of(uses[0].node).adds or len(uses[0].node.inputs) != 2:
        return False
    value = uses[0].node.inputs[1 - uses[0].idx]
    return value is not None and value.name == name and len(value.uses()) == 1


def decimal(x: float) -> float:
    """The shortest decimal that is the same float32: ONNX stores 1e-5 as 9.99999974e-06.

    >>> decimal(9.999999747378752e-06)
    1e-05
    """
    limits = np.finfo(np.float32)
    if float(np.float32(x)) != x or np.isinf(x):
        return x
    # The largest float32, as masks hold it, is rounded up by its shortest decimal: out of range.
    return min(max(float(str(np.float32(x))), float(limits.min)), float(limits.max))
