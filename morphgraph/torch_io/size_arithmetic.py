"""Numbers that a network computes from the sizes of its tensors, as Python computes them.

ONNX computes shapes with tensors. In torch they are Python integers: ``x.size(1)`` and arithmetic
on it, which tracing, exporting and compiling follow where they would not follow a tensor. An array
of such numbers holds each as an integer, or as a proxy that writes what is done to it into the
graph.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from morphgraph.onnx_io import static_shape
from morphgraph.ops.op import OpNode

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.object_]]
Size: TypeAlias = int | fx.Node

_MOST = 64  # numbers that may be meant as sizes: more than any shape has


class _UnknownError(Exception):
    """A number depends on the values of a tensor, or on an operator that has no place here."""


class SizeArithmetic:
    """Reads integers off the operators that compute them; every number is written once."""

    def __init__(self, graph: fx.Graph, tensor: Callable[[ir.Value], fx.Node]) -> None:
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._tensor = tensor
        self._known: dict[str, Numbers] = {}

    def size(self, value: ir.Value, axis: int) -> Size:
        """The size of an axis: an integer, or a node where the model leaves it open."""
        assert value.shape is not None
        size = value.shape[axis]
        return size if isinstance(size, int) else _plain(self._open_size(value, axis))

    def list_of(self, value: ir.Value) -> list[Size] | None:
        """A tensor of integers, flat, one by one; ``None`` where they are no numbers of sizes."""
        try:
            return [_plain(number) for number in self._numbers(value).reshape(-1)]
        except _UnknownError:
            return None

    def _open_size(self, value: ir.Value, axis: int) -> Any:
        key = f"{value.name}\n{axis}"
        if key not in self._known:
            self._known[key] = _array([fx.Proxy(self._tensor(value), self._tracer).size(axis)])
        return self._known[key][0]

    def _numbers(self, value: ir.Value) -> Numbers:
        name = value.name or ""
        if name not in self._known:
            self._known[name] = self._computed(value)
        return self._known[name]

    def _computed(self, value: ir.Value) -> Numbers:
        shape = static_shape(value)
        if math.prod(shape) > _MOST:
            raise _UnknownError
        if value.const_value is not None:
            return _array(value.const_value.numpy().reshape(-1).tolist()).reshape(shape)
        node = value.producer()
        if node is None or node.domain:
            raise _UnknownError
        if node.op_type == "Shape":
            return self._shape(OpNode(node))
        if node.op_type == "Size":
            return _array([math.prod(self._shape(OpNode(node)))]).reshape(shape)
        if node.op_type == "Split":
            return self._part(node, value)
        if node.op_type not in _RULES:
            raise _UnknownError
        operands = [self._numbers(v) for v in node.inputs if v is not None]
        return _array(_RULES[node.op_type](OpNode(node), *operands).reshape(-1)).reshape(shape)

    def _part(self, node: ir.Node, value: ir.Value) -> Numbers:
        source = node.inputs[0]
        assert source is not None
        whole = self._numbers(source)
        if whole.ndim != 1:
            raise _UnknownError
        place = next(k for k, output in enumerate(node.outputs) if output is value)
        sizes = [math.prod(static_shape(output)) for output in node.outputs]
        start = sum(sizes[:place])
        return whole[start : start + sizes[place]]

    def _shape(self, n: OpNode) -> Numbers:
        value = n.ir.inputs[0]
        assert value is not None
        assert value.shape is not None
        bounds = [n.ir.attributes.get(name) for name in ("start", "end")]
        part = slice(*(None if bound is None else bound.as_int() for bound in bounds))
        return _array(
            [
                size if isinstance(size, int) else self._open_size(value, axis)
                for axis, size in list(enumerate(value.shape))[part]
            ]
        )


def _array(numbers: Any) -> Numbers:
    """One axis of numbers; numpy must not look into proxies."""
    found = np.empty(len(numbers), dtype=object)
    for k, number in enumerate(numbers):
        found[k] = number
    return found


def _plain(number: Any) -> Size:
    if isinstance(number, fx.Proxy):
        return number.node
    return int(number)


def _each(function: Callable[..., Any]) -> Callable[..., Numbers]:
    """A rule that treats numbers one by one, with broadcasting; it gives them flat."""

    def rule(_node: OpNode, *operands: Numbers) -> Numbers:
        together = np.broadcast_arrays(*operands)
        columns = zip(*(operand.reshape(-1) for operand in together), strict=True)
        return _array([function(*numbers) for numbers in columns])

    return rule


def _cast(n: OpNode, x: Numbers) -> Numbers:
    to = ir.DataType(n.ir.attributes["to"].as_int())
    return _each(torch.sym_int if to.is_integer() else torch.sym_float)(n, x)


def _slice(_node: OpNode, x: Numbers, *bounds: Numbers) -> Numbers:
    if x.ndim != 1 or any(isinstance(k, fx.Proxy) for bound in bounds for k in bound):
        raise _UnknownError
    start, end = bounds[0][0], bounds[1][0]
    return x[start : None if end < -(2**31) else end : bounds[3][0] if len(bounds) > 3 else 1]


def _gather(_node: OpNode, x: Numbers, indices: Numbers) -> Numbers:
    if x.ndim != 1 or any(isinstance(k, fx.Proxy) for k in indices.reshape(-1)):
        raise _UnknownError
    # Flat: numpy hands out the number itself at an index without axes.
    return x[indices.reshape(-1).astype(np.int64)]


def _product(n: OpNode, x: Numbers, *_axes: Numbers) -> Numbers:
    if math.prod(n.out()) != 1:
        raise _UnknownError
    return _array([math.prod(x.reshape(-1))])


def _divided(n: OpNode, x: Numbers, y: Numbers) -> Numbers:
    dtype = n.ir.outputs[0].dtype
    is_integer = dtype is not None and dtype.is_integer()  # sizes are not negative
    return _each(operator.floordiv if is_integer else operator.truediv)(n, x, y)


def _expand(n: OpNode, x: Numbers, *_shape: Numbers) -> Numbers:
    return np.broadcast_to(x, n.out())


def _filled(n: OpNode, *_shape: Numbers) -> Numbers:
    value = n.ir.attributes.get("value")
    number = 0.0 if value is None else value.as_tensor().numpy().reshape(-1)[0].item()
    return _array([number] * math.prod(n.out()))


def _summed(n: OpNode, x: Numbers, *_axes: Numbers) -> Numbers:
    if math.prod(n.out()) != 1:
        raise _UnknownError
    return _array([sum(x.reshape(-1))])


def _concat(_node: OpNode, *parts: Numbers) -> Numbers:
    return np.concatenate(parts)


def _same(_node: OpNode, x: Numbers, *_shape: Numbers) -> Numbers:
    return x


_RULES: dict[str, Callable[..., Numbers]] = {
    "Add": _each(operator.add),
    "Cast": _cast,
    "Ceil": _each(lambda x: _called(math.ceil, x)),
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": _divided,
    "Equal": _each(operator.eq),
    "Expand": _expand,
    "Floor": _each(lambda x: _called(math.floor, x)),
    "Gather": _gather,
    "Greater": _each(operator.gt),
    "GreaterOrEqual": _each(operator.ge),
    "Identity": _same,
    "Less": _each(operator.lt),
    "LessOrEqual": _each(operator.le),
    "Max": _each(torch.sym_max),
    "Min": _each(torch.sym_min),
    "Mod": _each(operator.mod),
    "Mul": _each(operator.mul),
    "Neg": _each(operator.neg),
    "Not": _each(torch.sym_not),
    "ReduceProd": _product,
    "ReduceSum": _summed,
    "Reshape": _same,
    "Slice": _slice,
    "Squeeze": _same,
    "Sub": _each(operator.sub),
    "Unsqueeze": _same,
    "Where": _each(torch.sym_ite),
}


def _called(function: Callable[[Any], Any], x: Any) -> Any:
    """A function of Python's own, which does not know proxies."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", function, (x,), {})
    return function(x)
