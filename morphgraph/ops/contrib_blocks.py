"""Kernels and tables in 2, 4 or 8 bits (`com.microsoft`): rows are quantized in blocks of columns.

Every block has a scale, and may have a zero point; those of 2 or 4 bits share bytes with those of
the blocks beside them. Of the columns whole blocks go, as many as share a byte.
"""

from collections.abc import Mapping
from math import prod

import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Coded,
    Description,
    Op,
    OpNode,
    Resizing,
    UnsupportedFormError,
    from_line,
    op,
)

_DOMAIN = "com.microsoft"


@op("MatMulNBits", domain=_DOMAIN)
class MatMulNBits(Op):
    """A kernel in few bits, whose rows are quantized in blocks; of its columns whole blocks go."""

    foldable = False  # meant as it stands

    @staticmethod
    def shape(x: Shape, *_others: Shape | None, N: int) -> Shape:
        return (*x[:-1], N)

    @staticmethod
    def describe(n: OpNode, *, K: int, N: int, bits: int = 4, block_size: int) -> Description:
        blocks = -(-K // block_size)
        shared = 8 // bits if n.has(3) and _is_packed(n, bits) else 1  # zero points in a byte
        held = _why_held(n, K, block_size, blocks, shared)
        k = "K" if held else "k P" if shared > 1 else "k"
        zeros = k if shared == 1 else "Z" if held else "k"  # where those of a row stand
        columns = "C" if held else f"{k} W"
        sizes = {"K": blocks} if held else {"k": blocks // shared, "W": block_size}
        line = (
            f"*b {_axes(columns)}, o {_axes(k)} B, {_rows(n, 2, k)}, {_rows(n, 3, zeros)}, C, o "
            "-> *b o"
        )
        return from_line(
            n,
            line,
            sizes | ({"P": shared} if "P" in k else {}),
            macs=f"*b o {columns}",
            contracted=columns,
            prefer=f"{k[0]} o",
            reason=held or "whole blocks of a quantized axis go",
        )

    @staticmethod
    def coded(n: OpNode, *, K: int, N: int) -> Mapping[int, Coded]:
        return {1: Coded(K * N / prod(n.shape(1)), (2, 3, 4))}

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        new.set_attribute("K", new.shape(0)[-1])
        new.set_attribute("N", new.shape(~0)[-1])

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, K: int, N: int, bits: int = 4, block_size: int
    ) -> "fx.Node":
        import torch

        blocks = -(-K // block_size)
        stored = b.method("flatten", unpacked(b, b.tensor(n, 1), bits, block_size), 1)
        steps = b.item(stored, (slice(None), slice(K)))
        order = b.method("long", b.tensor(n, 4)) if n.has(4) else None

        def by_column(values: "fx.Node") -> "fx.Node":  # [N, blocks] -> [N, K]
            if order is not None:
                return b.call(torch.index_select, values, 1, order)
            return _each_column(b, values, K, block_size)

        scale = by_column(b.method("reshape", b.tensor(n, 2), (N, blocks)))
        zero: fx.Node | float = float(2 ** (bits - 1))
        if n.has(3):
            points = b.method("reshape", b.tensor(n, 3), (N, -1))
            packed = _is_packed(n, bits)
            points = unpacked(b, points, bits, blocks) if packed else b.method("float", points)
            zero = by_column(points)
        kernel = b.call(torch.mul, b.call(torch.sub, steps, zero), scale)
        y = b.call(torch.matmul, b.tensor(n, 0), b.method("t", kernel))
        return b.call(torch.add, y, b.tensor(n, 5)) if n.has(5) else y


@op("GatherBlockQuantized", domain=_DOMAIN)
class GatherBlockQuantized(Op):
    """Rows of a table in few bits, by number; of its columns whole blocks go."""

    foldable = False  # meant as it stands
    typed_by = 2
    tables = (0,)

    @staticmethod
    def shape(
        table: Shape,
        numbers: Shape,
        scales: Shape,
        *_others: Shape | None,
        bits: int = 4,
        block_size: int = 128,
    ) -> Shape:
        return (*numbers, min(table[-1] * 8 // bits, scales[-1] * block_size))

    @staticmethod
    def coded(n: OpNode) -> Mapping[int, Coded]:
        return {0: Coded(n.out()[-1] / n.shape(0)[-1], (2, 3))}

    @staticmethod
    def describe(
        n: OpNode,
        *,
        bits: int = 4,
        block_size: int = 128,
        gather_axis: int = 0,
        quantize_axis: int = 1,
    ) -> Description:
        if len(n.shape(0)) != 2 or n.shape(0)[1] * 8 != n.out()[-1] * bits:
            raise UnsupportedFormError("GatherBlockQuantized of a table that is no matrix of bytes")
        if gather_axis % 2 != 0 or quantize_axis % 2 != 1:
            raise UnsupportedFormError("GatherBlockQuantized of columns, or quantized along them")
        columns, blocks = n.out()[-1], n.shape(2)[1]
        shared = 8 // bits if n.has(3) else 1  # zero points in a byte
        held = _why_held(n, columns, block_size, blocks, shared)
        k = "K" if held else "k P" if shared > 1 else "k"
        zeros = k if shared == 1 else "Z" if held else "k"
        data, result = ("B", "C") if held else (f"{k} B", f"{k} W")
        sizes = {"K": blocks} if held else {"k": blocks // shared, "W": block_size}
        return from_line(
            n,
            f"V {_axes(data)}, *i, V {_axes(k)}, V {_axes(zeros)} -> *i {_axes(result)}",
            sizes | ({"P": shared} if "P" in k else {}),
            reason=held or "rows of a table in few bits stay, and of its columns whole blocks go",
        )

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, bits: int = 4, block_size: int = 128) -> "fx.Node":
        import torch

        numbers, blocks, columns = b.tensor(n, 1), n.shape(2)[1], n.shape(~0)[-1]
        steps = unpacked(b, b.item(b.tensor(n, 0), numbers), bits, columns)
        scale = _each_column(b, b.item(b.tensor(n, 2), numbers), columns, block_size)
        zero: fx.Node | float = float(2 ** (bits - 1))
        if n.has(3):
            points = unpacked(b, b.item(b.tensor(n, 3), numbers), bits, blocks)
            zero = _each_column(b, points, columns, block_size)
        return b.call(torch.mul, b.call(torch.sub, steps, zero), scale)


def _each_column(b: "TorchBuilder", x: "fx.Node", columns: int, block_size: int) -> "fx.Node":
    """What blocks have as what each of their columns has."""
    import torch

    wide = b.call(torch.repeat_interleave, x, block_size, -1)
    return b.item(wide, (..., slice(columns)))


def _axes(names: str) -> str:
    """The notation of one axis that several numbers share."""
    return f"({names})" if " " in names else names


def _rows(n: OpNode, i: int, names: str) -> str:
    """The axes of an operand that has numbers for each row: a matrix, or all in one row."""
    flat = n.has(i) and len(n.shape(i)) == 1
    return f"(o {names})" if flat else f"o {_axes(names)}"


def _why_held(n: OpNode, columns: int, block_size: int, blocks: int, shared: int) -> str:
    """Why no columns can go; empty where whole blocks can."""
    if n.has(4):
        return "its columns stand in another order (g_idx)"
    if blocks * block_size != columns:
        return f"the last block of {block_size} columns is not full"
    if blocks % shared:
        return f"{shared} blocks share a byte of zero points, and there are {blocks}"
    return ""


def _is_packed(n: OpNode, bits: int) -> bool:
    """Whether zero points of several blocks share a byte."""
    value = n.ir.inputs[3]
    return bits < 8 and value is not None and value.dtype == ir.DataType.UINT8


def unpacked(b: "TorchBuilder", packed: "fx.Node", bits: int, count: int) -> "fx.Node":
    """Numbers of 2, 4 or 8 bits, the lowest bits first; ``count`` of them on the last axis."""
    import torch

    parts = [
        b.call(torch.bitwise_and, b.call(torch.bitwise_right_shift, packed, shift), 2**bits - 1)
        for shift in range(0, 8, bits)
    ]
    flat = b.method("flatten", b.call(torch.stack, parts, -1), -2)
    return b.method("float", b.item(flat, (..., slice(count))))
