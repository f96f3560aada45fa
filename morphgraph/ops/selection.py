"""Operators that choose, rank, accumulate or mark positions along one axis; the other axes pass."""

import numpy as np

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    Op,
    OpNode,
    Resizing,
    UnsupportedFormError,
    from_line,
    op,
)


def _names(n: OpNode, *pinned: int) -> list[str]:
    """A factor for every axis of the first operand; upper-case where it keeps its size."""
    rank = len(n.shape(0))
    kept = {axis % rank for axis in pinned}
    return [f"{'A' if axis in kept else 'a'}{axis}" for axis in range(rank)]


def _constant_axis(n: OpNode, i: int) -> int:
    """An axis that is given as operand ``i``."""
    axis = n.ints(i)
    if axis is None:
        raise UnsupportedFormError(f"{n.op_type} along an axis that is computed at run time")
    return axis[0] % len(n.shape(0))


@op("TopK")
class TopK(Op):
    """Ranks positions; they may go if whoever reads their numbers reads an axis that follows."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = -1) -> Description:
        names = _names(n, axis)
        ranked, out = names[axis], list(names)
        out[axis] = "K"
        line = f"{' '.join(names)}, _ -> {' '.join(out)}, {' '.join(out)}"
        description = from_line(n, line, statistical=ranked, reason="ranked by TopK")
        description.numbers = {1: ranked}
        description.least = {ranked: n.out(0)[axis]}
        return description

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, axis: int = -1, largest: int = 1
    ) -> "tuple[fx.Node, ...]":
        import torch

        count = b.sizes(n, 1)
        if count is None:
            b.fail(n, "its number is computed at run time")
        x, indices = b.tensor(n, 0), n.ir.outputs[1]
        if indices.uses() or indices.is_graph_output():
            # Of equal elements the first come first, which torch.topk does not say.
            options = {"dim": axis, "descending": bool(largest), "stable": True}
            ranked = b.call(torch.sort, x, **options)
            first, second = (b.item(ranked, k) for k in range(2))
            return tuple(b.method("narrow", part, axis, 0, count[0]) for part in (first, second))
        found = b.call(torch.topk, x, count[0], axis, bool(largest))
        return b.item(found, 0), b.item(found, 1)


@op("ArgMax", "ArgMin")
class ArgMax(Op):
    """Numbers positions; they may go if whoever reads the numbers reads an axis that follows."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = 0, keepdims: int = 1) -> Description:
        names = _names(n, axis)
        ranked, out = names[axis], list(names)
        out[axis : axis + 1 or None] = ["1"] if keepdims else []
        line = f"{' '.join(names)} -> {' '.join(out)}"
        description = from_line(n, line, statistical=ranked, reason=f"numbered by {n.op_type}")
        description.numbers = {0: ranked}
        description.least = {ranked: 1}
        return description

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        axis: int = 0,
        keepdims: int = 1,
        select_last_index: int = 0,
    ) -> "fx.Node":
        import torch

        function = torch.argmax if n.op_type == "ArgMax" else torch.argmin
        x, last = b.tensor(n, 0), n.shape(0)[axis] - 1
        if not select_last_index:
            return b.call(function, x, axis, keepdim=bool(keepdims))
        found = b.call(function, b.method("flip", x, axis), axis, keepdim=bool(keepdims))
        return b.call(torch.rsub, found, last)


@op("CumSum")
class CumSum(Op):
    """Later positions sum over the earlier ones, to which a zero adds nothing."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        line = " ".join(_names(n))
        return from_line(n, f"{line}, _ -> {line}", contracted=f"a{_constant_axis(n, 1)}")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, exclusive: int = 0, reverse: int = 0) -> "fx.Node":
        import torch

        axis, x = _constant_axis(n, 1), b.tensor(n, 0)
        turned = b.method("flip", x, axis) if reverse else x
        y = b.call(torch.cumsum, turned, axis)
        if exclusive:
            y = b.call(torch.sub, y, turned)
        return b.method("flip", y, axis) if reverse else y


@op("CumProd")
class CumProd(Op):
    """Later positions are products of the earlier ones, in which each counts."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        line = " ".join(_names(n))
        return from_line(n, f"{line}, _ -> {line}", statistical=f"a{_constant_axis(n, 1)}")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, exclusive: int = 0, reverse: int = 0) -> "fx.Node":
        import torch

        axis, x = _constant_axis(n, 1), b.tensor(n, 0)
        turned = b.method("flip", x, axis) if reverse else x
        if exclusive:
            first = b.call(torch.ones_like, b.method("narrow", turned, axis, 0, 1))
            rest = b.method("narrow", turned, axis, 0, n.shape(0)[axis] - 1)
            turned = b.call(torch.cat, (first, rest), axis)
        y = b.call(torch.cumprod, turned, axis)
        return b.method("flip", y, axis) if reverse else y


@op("OneHot")
class OneHot(Op):
    """A new axis numbers the classes; they may go if the numbers are those of an axis that can."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = -1) -> Description:
        names = _names(n)
        out = list(names)
        out.insert(axis % len(n.out()), "A")
        line = f"{' '.join(names) or '_'}, _, _ -> {' '.join(out)}"
        description = from_line(n, line, reason="numbered by OneHot")
        description.indexed = {"A": 0} if n.ints(1) is not None else {}
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axis: int = -1) -> None:
        depth = n.const(1)
        if depth is not None:
            new.set_constant(1, np.full_like(depth, new.size("A")))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -1) -> "fx.Node":
        import torch

        place = axis % len(n.out())
        depth = n.out()[place]
        column = [depth if k == place else 1 for k in range(len(n.out()))]
        classes = b.buffer(n, "classes", torch.arange(depth).reshape(column))
        chosen = b.method("unsqueeze", b.tensor(n, 0), place)
        from_start = b.call(
            torch.where, b.call(torch.lt, chosen, 0), b.call(torch.add, chosen, depth), chosen
        )
        values = b.tensor(n, 2)
        marked = b.call(torch.eq, from_start, classes)
        return b.call(torch.where, marked, b.item(values, 1), b.item(values, 0))


@op("Trilu")
class Trilu(Op):
    """Rows and columns of a triangle know each other by number."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*b A B, _ -> *b A B", reason="cut to a triangle")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, upper: int = 1) -> "fx.Node":
        import torch

        diagonal = b.sizes(n, 1) if n.has(1) else [0]
        if diagonal is None:
            b.fail(n, "its diagonal is computed at run time")
        return b.call(torch.triu if upper else torch.tril, b.tensor(n, 0), diagonal[0])


@op("ReverseSequence")
class ReverseSequence(Op):
    """Time runs backwards, for every sample as far as its sequence goes."""

    @staticmethod
    def describe(n: OpNode, *, batch_axis: int = 1, time_axis: int = 0) -> Description:
        names = _names(n, time_axis)
        line = f"{' '.join(names)}, {names[batch_axis]} -> {' '.join(names)}"
        return from_line(n, line, reason="reversed by ReverseSequence")

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, batch_axis: int = 1, time_axis: int = 0
    ) -> "fx.Node":
        import torch

        shape = n.shape(0)
        rank = len(shape)
        column = [-1 if k == batch_axis else 1 for k in range(rank)]
        lengths = b.method("reshape", b.tensor(n, 1), column)
        row = [-1 if k == time_axis else 1 for k in range(rank)]
        time = b.buffer(n, "time", torch.arange(shape[time_axis]).reshape(row))
        mirrored = b.call(torch.sub, b.call(torch.sub, lengths, 1), time)
        source = b.call(torch.where, b.call(torch.lt, time, lengths), mirrored, time)
        x = b.tensor(n, 0)
        return b.call(torch.gather, x, time_axis, b.method("expand_as", source, x))


@op("Det")
class Det(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "*b A B -> *b", reason="mixed by Det")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch

        return b.call(torch.linalg.det, b.tensor(n, 0))


@op("EyeLike")
class EyeLike(Op):
    """Ones where row and column have the same number."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "A B -> A B", reason="numbered by EyeLike")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, dtype: int | None = None, k: int = 0) -> "fx.Node":
        import torch

        like = n.ir.inputs[0]
        assert like is not None
        element = like.dtype if dtype is None else dtype
        rows, columns = n.out()
        ones = torch.ones(rows, columns, dtype=b.dtype(1 if element is None else element))
        return b.buffer(n, "eye", ones.triu(k).tril(k))


@op("DFT")
class DFT(Op):
    """A transform mixes the positions of one axis; the last holds real and imaginary parts."""

    @staticmethod
    def describe(n: OpNode, *, axis: int | None = None) -> Description:
        transformed = _transformed(n, axis)
        names = _names(n, transformed, -1)
        out = list(names)
        out[transformed], out[-1] = "B", "C"
        line = f"{' '.join(names)}, _, _ -> {' '.join(out)}"
        return from_line(n, line, reason="transformed by DFT")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        axis: int | None = None,
        inverse: int = 0,
        onesided: int = 0,
    ) -> "fx.Node":
        import torch

        along, x, given = _transformed(n, axis), b.tensor(n, 0), b.numbers(n, 1)
        if given is None and n.has(1):
            b.fail(n, "its length is computed from values")
        # Without one it is that of the axis; of half a spectrum, 2 (K - 1): torch's own default.
        length = given[0] if given else None
        is_complex = n.shape(0)[-1] == 2
        if is_complex:
            x = b.call(torch.view_as_complex, b.method("contiguous", x))
        else:
            x = b.method("squeeze", x, -1)
        if inverse and onesided:
            if not is_complex:
                b.fail(n, "half a spectrum has imaginary parts, and this one has none")
            return b.method("unsqueeze", b.call(torch.fft.irfft, x, length, along), -1)
        function = torch.fft.ifft if inverse else torch.fft.rfft if onesided else torch.fft.fft
        return b.call(torch.view_as_real, b.call(function, x, length, along))


def _transformed(n: OpNode, axis: int | None) -> int:
    """The axis of a DFT: operand 2 from opset 20 on, an attribute before."""
    if n.has(2):
        return _constant_axis(n, 2)
    default = 1 if n.opset < 20 else -2
    return (default if axis is None else axis) % len(n.shape(0))


@op("STFT")
class STFT(Op):
    """Transforms windows of a signal."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N A B, _, _, _ -> N F C D", reason="transformed by STFT")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, onesided: int = 1) -> "fx.Node":
        import torch

        step, length = b.sizes(n, 1), b.sizes(n, 3)
        if step is None or n.shape(0)[-1] != 1:
            b.fail(n, "its step is computed at run time, or its signal is complex")
        window = b.optional(n, 2)
        size = n.shape(2)[0] if length is None else length[0]
        signal = b.method("squeeze", b.tensor(n, 0), -1)
        options = {"center": False, "onesided": bool(onesided), "return_complex": True}
        spectrum = b.call(torch.stft, signal, size, step[0], size, window, **options)
        return b.call(torch.view_as_real, b.method("transpose", spectrum, 1, 2))
