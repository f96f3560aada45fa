"""Integers that follow the batch: shape arithmetic of models whose sizes are not all fixed.

``Shape -> Gather -> Concat -> Reshape`` becomes Python arithmetic on ``x.size(0)`` while the network
is built, so that no tensor is made of it: the network stays exportable and compilable.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from morphgraph.ops import OpNode
from morphgraph.torch_io.builder import Integers, TorchBuilder

Element = int | fx.Node


def lower_integers(b: TorchBuilder, n: OpNode) -> Integers | None:
    """The result of a node that computes with sizes only; ``None`` for every other node."""
    if n.op_type in ("Shape", "Size"):
        return _shape(b, n)
    function = _FUNCTIONS.get(n.op_type)
    operands = [b.integers(value) for value in n.ir.inputs]
    present = [value for value in n.ir.inputs if value is not None]
    if function is None or not _computed(b, present):
        return None
    if any(o is None and v is not None for o, v in zip(operands, n.ir.inputs, strict=True)):
        return None
    return function(b, n, [o for o in operands if o is not None])


def lower_filled(b: TorchBuilder, n: OpNode) -> fx.Node | None:
    """Tensors made from sizes: ConstantOfShape and Range."""
    if n.op_type == "ConstantOfShape":
        sizes = b.sizes(n, 0)
        attribute = n.ir.attributes.get("value")
        fill = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
        like = torch.from_numpy(np.array(fill))
        return None if sizes is None else b.call(torch.full, tuple(sizes), like.item(), dtype=like.dtype)
    if n.op_type == "Range":
        bounds = [b.sizes(n, i) for i in range(3)]
        known = [bound[0] for bound in bounds if bound is not None]
        return b.call(torch.arange, *known) if len(known) == 3 else None
    return None


def _computed(b: TorchBuilder, values: Sequence[ir.Value]) -> bool:
    return any(isinstance(b.bound(value), np.ndarray) for value in values)


def _shape(b: TorchBuilder, n: OpNode) -> Integers:
    value = n.ir.inputs[0]
    assert value is not None and value.shape is not None
    sizes: list[Element] = [
        size if isinstance(size, int) else b.method("size", b.tensor(n, 0), axis)
        for axis, size in enumerate(value.shape)
    ]
    if n.op_type == "Size":
        total: Element = 1
        for size in sizes:
            total = _apply(b, operator.mul, total, size)
        return _objects([total]).reshape(())
    first = n.ir.attributes.get("start")
    last = n.ir.attributes.get("end")
    bounds = slice(first and first.as_int(), last and last.as_int())
    return _objects(sizes[bounds])


def _objects(elements: Sequence[Element]) -> Integers:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def _apply(
    b: TorchBuilder, function: Callable[[Any, Any], Any], left: Element, right: Element
) -> Element:
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        result: fx.Node = b.call(function, left, right)
        return result
    return int(function(left, right))


def _arithmetic(
    function: Callable[[Any, Any], Any],
) -> Callable[[TorchBuilder, OpNode, list[Integers]], Integers]:
    def lower(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
        left, right = np.broadcast_arrays(*operands)
        flat = [_apply(b, function, x, y) for x, y in zip(left.flat, right.flat, strict=True)]
        return _objects(flat).reshape(left.shape)

    return lower


def _same(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
    return operands[0]


def _gather(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
    indices = operands[1].astype(np.int64)
    chosen = np.empty(indices.shape, dtype=object)
    chosen[...] = operands[0][indices]
    return chosen


def _concat(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
    return np.concatenate([operand.reshape(-1) for operand in operands])


def _slice(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
    start, end = int(operands[1].item()), int(operands[2].item())
    step = int(operands[4].item()) if len(operands) > 4 else 1
    return operands[0][start : None if step < 0 and end < -(2**31) else end : step]


def _scalar(b: TorchBuilder, n: OpNode, operands: list[Integers]) -> Integers:
    return operands[0].reshape(n.out())


_FUNCTIONS: dict[str, Callable[[TorchBuilder, OpNode, list[Integers]], Integers]] = {
    "Add": _arithmetic(operator.add),
    "Cast": _same,
    "Concat": _concat,
    "Div": _arithmetic(operator.floordiv),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _arithmetic(operator.mul),
    "Reshape": _scalar,
    "Slice": _slice,
    "Squeeze": _scalar,
    "Sub": _arithmetic(operator.sub),
    "Unsqueeze": _scalar,
}
