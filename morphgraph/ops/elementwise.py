"""Operators that treat every element alone, with ONNX broadcasting."""

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

from morphgraph.ops.initial import Initial, of_affine_addend, of_affine_factor
from morphgraph.ops.op import Description, Op, OpNode, from_line, op

if TYPE_CHECKING:
    from torch import fx

    from morphgraph.torch_io.builder import Number, TorchBuilder


# fmt: off
_TORCH_NAMES = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Erf", "Floor",
    "Identity", "IsNaN", "Log", "Neg", "Not", "Reciprocal", "Round", "Sign", "Sin", "Sinh", "Sqrt",
    "Tan",
)
# fmt: on


@op(*_TORCH_NAMES)
class Unary(Op):
    """Functions that torch has under the same name."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a -> *a")

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
class Cast(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a -> *a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, to: int) -> "fx.Node":
        from morphgraph.torch_io.tensors import torch_type

        return b.method("to", b.tensor(n, 0), torch_type(to))


@op("Clip")
class Clip(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, _, _ -> *a")

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
class CastLike(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, _ -> *a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        return b.method("type_as", b.tensor(n, 0), b.tensor(n, 1))


@op("Dropout")
class Dropout(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, _, _ -> *a, *a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, ratio: float = 0.5) -> "fx.Node":
        from torch import nn

        share = b.operand(n, 1) if n.has(1) else b.decimal(ratio)
        if not isinstance(share, float):
            b.fail(n, "its ratio is computed at run time")
        return b.module(n, nn.Dropout(share), b.tensor(n, 0))


# fmt: off
_BINARY = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Or", "Pow", "Sub", "Xor",
)
# fmt: on


@op(*_BINARY)
class Binary(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, *a -> *a")

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return of_affine_addend(n) if n.op_type == "Add" else {}

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, direction: str = "LEFT", fmod: int = 0) -> "fx.Node":
        linear = b.biased_linear(n) if n.op_type == "Add" else None
        if linear is not None:
            return linear
        left, right = b.operand(n, 0), b.operand(n, 1)
        return _binary(b, n, n.op_type, left, right, direction, bool(fmod))


@op("PRelu")
class PRelu(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, *a -> *a")

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {1: Initial("constant", 0.25)}

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        x, slope = b.tensor(n, 0), b.operand(n, 1)
        return b.call(torch.where, b.call(torch.lt, x, 0), b.call(torch.mul, x, slope), x)


@op("Mul")
class Mul(Op):
    """A product is silent where one operand is: squeeze-and-excite gates, layer scales."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, *a -> *a", gate=True)

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return of_affine_factor(n)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        return _binary(b, n, "Mul", b.operand(n, 0), b.operand(n, 1))


@op("Sum", "Mean", "Max", "Min")
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


@op("Where")
class Where(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*a, *a, *a -> *a")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        chosen = b.operand(n, 1), b.operand(n, 2)
        if all(isinstance(x, float | int) for x in chosen):  # torch would choose the type itself
            chosen = b.tensor(n, 1), b.tensor(n, 2)
        return b.call(torch.where, b.tensor(n, 0), *chosen)


_OPERATORS = {
    "Add": "add",
    "And": "and_",
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
    "BitwiseAnd": "and_",
    "BitwiseOr": "or_",
    "BitwiseXor": "xor",
}


def _binary(
    b: "TorchBuilder",
    n: OpNode,
    kind: str,
    left: "fx.Node | Number",
    right: "fx.Node | Number",
    direction: str = "LEFT",
    fmod: bool = False,
) -> "fx.Node":
    """Two operands: Python's operators, so that the generated code reads ``x + y``."""
    import operator

    import torch

    if kind == "Div":
        if _is_integer(n):
            return b.call(torch.div, left, right, rounding_mode="trunc")
        return b.call(operator.truediv, left, right)
    if kind == "Mod":
        return b.call(torch.fmod if fmod else torch.remainder, left, right)
    if kind == "BitShift":
        return b.call(operator.lshift if direction == "LEFT" else operator.rshift, left, right)
    return b.call(getattr(operator, _OPERATORS[kind]), left, right)


def _is_integer(n: OpNode) -> bool:
    dtype = n.ir.outputs[0].dtype
    return dtype is not None and dtype.is_integer()
