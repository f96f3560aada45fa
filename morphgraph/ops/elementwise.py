"""Operators that treat every element alone, with ONNX broadcasting."""

import math
import operator
from collections.abc import Mapping
from functools import reduce
from typing import ClassVar

import numpy as np

from morphgraph.ops.initial import Initial, of_affine_addend, of_affine_factor
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Factor, Op, OpNode, Resizing, from_line, op

# fmt: off
_TORCH_NAMES = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Erf", "Floor",
    "Identity", "IsNaN", "Log", "Not", "Round", "Sign", "Sin", "Sinh",
    "Tan",
)
# fmt: on


class Elementwise(Op):
    """What all share: a ``line`` in which every axis passes, and whether the operands multiply."""

    line: ClassVar[str] = "*a -> *a"
    gate: ClassVar[bool] = False

    @classmethod
    def describe(cls, n: OpNode) -> Description:
        return from_line(n, cls.line, gate=cls.gate)


@op(*_TORCH_NAMES)
class Unary(Elementwise):
    """Functions that torch has under the same name."""

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        if n.op_type == "Identity":
            return b.tensor(n, 0)
        other_names = {"BitwiseNot": "bitwise_not", "Not": "logical_not"}
        function = other_names.get(n.op_type, n.op_type.lower())
        return b.call(getattr(torch, function), b.tensor(n, 0))


@op("Cos", "Cosh", "Exp")
class OpenUnary(Unary):
    """Those of them that are not zero at zero."""

    open_at_zero = True


@op("Reciprocal", "Sqrt")
class Power(Unary):
    """Powers of the operand."""

    @staticmethod
    def powers(n: OpNode) -> Mapping[int, float]:
        return {0: 0.5 if n.op_type == "Sqrt" else -1.0}


@op("Neg")
class Neg(Unary):
    negates = True


@op("IsInf")
class IsInf(Unary):
    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, detect_negative: int = 1, detect_positive: int = 1
    ) -> "fx.Node":
        import torch

        wanted = "isinf" if detect_negative else "isposinf"
        return b.call(getattr(torch, wanted if detect_positive else "isneginf"), b.tensor(n, 0))


@op("Cast")
class Cast(Elementwise):
    converts = True

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, to: int) -> "fx.Node":
        return b.method("to", b.tensor(n, 0), b.dtype(to))


@op("Clip")
class Clip(Elementwise):
    line = "*a, _, _ -> *a"

    @staticmethod
    def clamp(n: OpNode, **attributes: float) -> tuple[float, float] | None:
        ends = [attributes.get("min", -math.inf), attributes.get("max", math.inf)]
        for port in (1, 2):
            if n.has(port):
                constant = n.const(port)
                if constant is None:
                    return None
                ends[port - 1] = float(constant.reshape(-1)[0])
        return ends[0], ends[1]

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch
        from torch import nn

        low = b.operand(n, 1) if n.has(1) else None
        high = b.operand(n, 2) if n.has(2) else None
        if (low, high) == (0, 6):
            return b.module(n, nn.ReLU6(), b.tensor(n, 0))
        if low is None and high is None:
            return b.tensor(n, 0)
        return b.call(torch.clamp, b.tensor(n, 0), low, high)


@op("CastLike")
class CastLike(Elementwise):
    line = "*a, _ -> *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        return b.method("type_as", b.tensor(n, 0), b.tensor(n, 1))


@op("Dropout")
class Dropout(Elementwise):
    inert = True
    foldable = False  # meant as it stands: it acts in training
    line = "*a, _, _ -> *a, *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, ratio: float = 0.5) -> "fx.Node":
        from torch import nn

        share = b.operand(n, 1) if n.has(1) else b.decimal(ratio)
        if not isinstance(share, float):
            b.fail(n, "its ratio is computed at run time")
        return b.module(n, nn.Dropout(share), b.tensor(n, 0))


# ONNX's names -> those of Python's operators, so that the generated code reads ``x + y``.
_BINARY = {
    "Add": "add",
    "And": "and_",
    "BitwiseAnd": "and_",
    "BitwiseOr": "or_",
    "BitwiseXor": "xor",
    "Equal": "eq",
    "Greater": "gt",
    "GreaterOrEqual": "ge",
    "Less": "lt",
    "LessOrEqual": "le",
    "Mul": "mul",
    "Or": "or_",
    "Pow": "pow",
    "Sub": "sub",
    "Xor": "xor",
}


class Binary(Elementwise):
    line = "*a, *a -> *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        function = getattr(operator, _BINARY[n.op_type])
        return b.call(function, b.operand(n, 0), b.operand(n, 1))


op(*sorted(_BINARY.keys() - {"Add", "Equal", "Mul", "Pow", "Sub"}))(Binary)


@op("Pow")
class Pow(Binary):
    @staticmethod
    def powers(n: OpNode) -> Mapping[int, float]:
        exponent = n.const(1)
        return {} if exponent is None or exponent.size != 1 else {0: float(exponent.reshape(-1)[0])}


@op("Equal")
class Equal(Binary):
    """Numbers beside all of 0, 1, 2, ... along an axis of their own: a one-hot mask."""

    @classmethod
    def describe(cls, n: OpNode) -> Description:
        description = from_line(n, cls.line)
        if (counted := _counted(n)) is not None:
            port, axis = counted
            on_it = (name for name, f in description.factors.items() if (port, axis) in _at(f))
            description.indexed = dict.fromkeys(on_it, 1 - port)
        return description

    @classmethod
    def resize(cls, n: OpNode, new: Resizing) -> None:
        if (counted := _counted(n)) is not None:
            port, axis = counted
            (name,) = cls.describe(n).indexed
            if new.follows(name):
                shape = [-1 if k == axis else 1 for k in range(len(n.shape(port)))]
                new.set_constant(port, np.arange(new.size(name)).reshape(shape))


def _counted(n: OpNode) -> tuple[int, int] | None:
    """The operand that holds 0, 1, 2, ... along an axis that the other has not, and that axis."""
    for port in (0, 1):
        held = n.const(port)
        if held is None or held.size < 2 or held.dtype.kind not in "iu":
            continue
        axis, other = int(np.argmax(held.shape)), n.shape(1 - port)
        behind = held.ndim - axis
        alone = behind > len(other) or other[-behind] == 1
        if alone and np.array_equal(held.ravel(), np.arange(held.shape[axis])):
            return port, axis
    return None


def _at(factor: Factor) -> list[tuple[int, int]]:
    return [(place.port, place.axis) for place in factor.places]


@op("Add")
class Add(Binary):
    adds = True

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return of_affine_addend(n)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        return b.biased_linear(n) or Binary.lower(b, n)


@op("Sub")
class Sub(Binary):
    subtracts = True


@op("Mul")
class Mul(Binary):
    """A product is silent where one operand is: squeeze-and-excite gates, layer scales."""

    gate = True
    multiplies = True

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return of_affine_factor(n)


@op("Div")
class Div(Binary):
    @staticmethod
    def powers(_n: OpNode) -> Mapping[int, float]:
        return {0: 1.0, 1: -1.0}

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        left, right = b.operand(n, 0), b.operand(n, 1)
        dtype = n.ir.outputs[0].dtype
        if dtype is not None and dtype.is_integer():
            return b.call(torch.div, left, right, rounding_mode="trunc")
        return b.call(operator.truediv, left, right)


@op("Mod")
class Mod(Binary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, fmod: int = 0) -> "fx.Node":
        import torch

        function = torch.fmod if fmod else torch.remainder
        return b.call(function, b.operand(n, 0), b.operand(n, 1))


@op("BitShift")
class BitShift(Binary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, direction: str = "LEFT") -> "fx.Node":
        function = operator.lshift if direction == "LEFT" else operator.rshift
        return b.call(function, b.operand(n, 0), b.operand(n, 1))


@op("PRelu")
class PRelu(Elementwise):
    line = "*a, *a -> *a"

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {1: Initial("constant", 0.25)}

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        x, slope = b.tensor(n, 0), b.operand(n, 1)
        return b.call(torch.where, b.call(torch.lt, x, 0), b.call(torch.mul, x, slope), x)


@op("Mean", "Max", "Min")
class Variadic(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, f"{', '.join('*a' for _ in n.in_shapes)} -> *a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        function = {"Max": torch.maximum, "Min": torch.minimum}.get(n.op_type, torch.add)
        operands = [b.tensor(n, i) for i in range(len(n.in_shapes))]
        total = reduce(lambda left, right: b.call(function, left, right), operands)
        return b.call(torch.div, total, len(operands)) if n.op_type == "Mean" else total


@op("Sum")
class Sum(Variadic):
    adds = True

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        linear = b.biased_linear(n) if len(n.in_shapes) == 2 else None
        return linear or Variadic.lower(b, n)


@op("Where")
class Where(Elementwise):
    line = "*a, *a, *a -> *a"

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        chosen = b.operand(n, 1), b.operand(n, 2)
        if all(isinstance(x, float | int) for x in chosen):  # torch would choose the type itself
            chosen = b.tensor(n, 1), b.tensor(n, 2)
        return b.call(torch.where, b.tensor(n, 0), *chosen)
