"""Einsum: its equation is its notation.

Letters that the result lacks are summed over. ``...`` stands for any number of axes, as a star
does.
"""

import re
from collections.abc import Sequence

from morphgraph.arrays import Shape
from morphgraph.ops.linear import Linear, Product
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, UnsupportedFormError, from_line, op

_DOTS = "..."


def _terms(equation: str) -> tuple[list[list[str]], list[str]]:
    """The axes of every operand and of the result, as letters and ``...``.

    >>> _terms("...ij, jk")
    ([['...', 'i', 'j'], ['j', 'k']], ['...', 'i', 'k'])
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = [_axes(term) for term in left.split(",")]
    if arrow:
        return operands, _axes(right)
    letters = [axis for operand in operands for axis in operand]
    dots = [_DOTS] if _DOTS in letters else []
    once = sorted(axis for axis in letters if letters.count(axis) == 1 and axis != _DOTS)
    return operands, dots + once


def _axes(term: str) -> list[str]:
    return re.findall(r"\.\.\.|[A-Za-z]", term)


def _products(operands: Sequence[Sequence[str]], out: Sequence[str]) -> list[list[str]]:
    """The axes of every product of two operands, from the left, as torch computes them.

    An axis that one operand of a pair has alone and nobody else wants is summed beforehand. A pair
    that shares no axis to be summed is multiplied element by element, which counts as nothing.
    """
    found: list[list[str]] = []
    first = list(operands[0])
    for k, second in enumerate(operands[1:], 1):
        later = {axis for operand in operands[k + 1 :] for axis in operand} | set(out)
        joined = [*first, *(axis for axis in second if axis not in first)]
        shared = {axis for axis in first if axis in second}
        wanted = [axis for axis in joined if axis in shared or axis in later]
        if shared - later:
            found.append(wanted)
        first = [axis for axis in wanted if axis in later]
    return found


def _names(operands: Sequence[Sequence[str]]) -> dict[str, str]:
    """Factor names: all lower-case, so that every axis may be resized."""
    letters = dict.fromkeys(axis for operand in operands for axis in operand if axis != _DOTS)
    names = {x: x if x.islower() else f"{x.lower()}up" for x in letters}
    return {**names, _DOTS: "*dots"}


def _placed(axes: Sequence[str], shape: Shape, sizes: dict[str, int], names: dict[str, str]) -> str:
    """One operand in factor notation; an axis of size 1 against a larger one stands for none."""
    if _DOTS in axes:
        at = axes.index(_DOTS)
        behind = len(axes) - at - 1
        lengths = [*shape[:at], 0, *shape[len(shape) - behind :]]
    else:
        lengths = list(shape)
    return " ".join(
        "1" if size == 1 < sizes.get(axis, 0) else names[axis]
        for axis, size in zip(axes, lengths, strict=True)
    )


def _from_behind(axes: Sequence[str], axis: str, dots: int) -> int:
    """Where an axis stands, counted from behind; the dots are so many axes."""
    behind = axes[axes.index(axis) + 1 :]
    return -1 - sum(dots if other == _DOTS else 1 for other in behind)


def _largest(operands: Sequence[Sequence[str]], shapes: Sequence[Shape]) -> dict[str, int]:
    """The size of every letter."""
    sizes: dict[str, int] = {}
    for axes, shape in zip(operands, shapes, strict=True):
        behind = axes[::-1].index(_DOTS) if _DOTS in axes else 0
        front = axes[: len(axes) - behind - 1] if _DOTS in axes else axes
        pairs = [*zip(front, shape, strict=False)]
        if behind:
            pairs += zip(axes[-behind:], shape[-behind:], strict=True)
        for axis, size in pairs:
            sizes[axis] = max(size, sizes.get(axis, 1))
    return sizes


@op("Einsum")
class Einsum(Op):
    """A product of two activations is an attention, as for MatMul: what they share goes first."""

    foldable = False  # slow
    added_behind = ()

    @staticmethod
    def describe(n: OpNode, *, equation: str) -> Description:
        operands, out = _terms(equation)
        if any(len(set(axes)) < len(axes) for axes in (*operands, out)):
            raise UnsupportedFormError(f"Einsum '{equation}' takes a diagonal")
        shapes = [n.shape(i) for i in range(len(n.in_shapes))]
        names, sizes = _names(operands), _largest(operands, shapes)
        left = ", ".join(
            _placed(axes, shape, sizes, names) for axes, shape in zip(operands, shapes, strict=True)
        )
        summed = [axis for axis in names if axis != _DOTS and axis not in out]
        if _DOTS in {axis for axes in operands for axis in axes} - set(out):
            summed.append(_DOTS)
        products = _products(operands, out)
        activations = [i for i in range(len(operands)) if not n.is_weight(i)]
        is_attention = bool(products) and len(activations) > 1
        kept = [axis for axis in out if all(axis in axes for axes in operands)]
        return from_line(
            n,
            f"{left} -> {' '.join(names[axis] for axis in out)}",
            macs=" + ".join(" ".join(names[axis] for axis in axes) for axes in products),
            contracted=" ".join(names[axis] for axis in summed),
            eager=" ".join(names[axis] for axis in kept) if is_attention else "",
            reluctant=" ".join(names[axis] for axis in summed) if is_attention else "",
            gate=len(operands) > 1 and not summed,
        )

    @staticmethod
    def linear(n: OpNode, *, equation: str) -> Linear | None:
        operands, out = _terms(equation)
        if len(operands) != 2 or n.is_weight(0) == n.is_weight(1):
            return None
        weight = 0 if n.is_weight(0) else 1
        kernel, rows = operands[weight], operands[1 - weight]
        summed = [axis for axis in rows if axis not in out]
        made = [axis for axis in out if axis not in rows]
        # One axis is summed over, one is made, and all others pass in their order.
        passing = [axis for axis in rows if axis not in summed]
        plain = len(summed) == len(made) == 1 and sorted(kernel) == sorted(summed + made)
        if not plain or _DOTS in summed + made or [x for x in out if x not in made] != passing:
            return None
        dots = len(n.shape(1 - weight)) - len([axis for axis in rows if axis != _DOTS])
        return Product(
            operand=1 - weight,
            weight=weight,
            reduced=_from_behind(rows, summed[0], dots),
            made=_from_behind(out, made[0], dots),
            transposed=kernel.index(made[0]) == 1,
        )

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, equation: str) -> "fx.Node":
        import torch

        operands = [b.tensor(n, i) for i in range(len(n.in_shapes))]
        return b.call(torch.einsum, equation.replace(" ", ""), *operands)
