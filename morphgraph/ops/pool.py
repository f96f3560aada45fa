"""Pooling: channels pass, space shrinks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, from_line, op
from morphgraph.ops.window import ranked, torch_padding, window_pads


class Pool(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(
            n, "N c *S -> N c *T, N c *T" if len(n.out_shapes) == 2 else "N c *S -> N c *T"
        )


@op("MaxPool")
class MaxPool(Pool):
    foldable = False  # slow

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int],
        pads: Sequence[int] | None = None,
        storage_order: int = 0,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node | tuple[fx.Node, fx.Node]":
        from torch import nn
        from torch.nn import functional as F

        w = _Windows(b, n, kernel_shape, strides, dilations, pads, auto_pad)
        make = ranked(nn, "MaxPool", w.rank)
        x, fits = b.tensor(n, 0), w.fits_torch(ceil_mode)
        kernel, stride, before, dilation = map(_short, (w.kernel, w.strides, w.before, w.dilations))
        options: dict[str, Any] = {"dilation": dilation}
        if fits:
            options |= {"padding": before, "ceil_mode": bool(ceil_mode)}
        else:
            x = b.call(F.pad, x, w.padding(), value=float("-inf"))
        if len(n.out_shapes) == 1 or n.out_shapes[1] is None:
            return b.module(n, make(kernel, stride, **options), x)
        if storage_order:
            b.fail(n, "its positions are counted by columns")
        found = b.module(n, make(kernel, stride, return_indices=True, **options), x)
        shift = (0,) * w.rank if fits else w.before
        return b.item(found, 0), w.counted_from_the_start(x, b.item(found, 1), shift)


@op("AveragePool")
class AveragePool(Pool):
    foldable = False  # slow

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        pooled: fx.Node = Op.call(AveragePool.pooled, n.ir, b, n, b.tensor(n, 0))
        return pooled

    @staticmethod
    def pooled(
        b: "TorchBuilder",
        n: OpNode,
        x: "fx.Node",
        *,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int],
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        """Averages over windows of ``x``, which has the shape of the node's first operand."""
        import torch
        from torch import nn

        w = _Windows(b, n, kernel_shape, strides, dilations, pads, auto_pad)
        if w.fits_torch(ceil_mode) and set(w.dilations) == {1}:
            make = ranked(nn, "AvgPool", w.rank)
            options = map(_short, (w.kernel, w.strides, w.before))
            module = make(*options, bool(ceil_mode), bool(count_include_pad))
            return b.module(n, module, x)
        divisor = b.buffer(n, "divisor", torch.from_numpy(w.counts(bool(count_include_pad))))
        return b.call(torch.div, w.sums(x), divisor)


@op("LpPool")
class LpPool(Pool):
    foldable = False  # slow

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int],
        p: int = 2,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        w = _Windows(b, n, kernel_shape, strides, dilations, pads, auto_pad)
        powers = b.method("pow", b.method("abs", b.tensor(n, 0)), p)
        return b.method("pow", w.sums(powers), 1 / p)


@op("GlobalAveragePool", "GlobalMaxPool")
class GlobalPool(Pool):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        import torch
        from torch import nn

        rank, x = len(n.shape(0)) - 2, b.tensor(n, 0)
        average = n.op_type == "GlobalAveragePool"
        if rank not in (1, 2, 3):
            axes = tuple(range(2, rank + 2))
            return b.call(torch.mean if average else torch.amax, x, axes, keepdim=True)
        class_name = "AdaptiveAvgPool" if average else "AdaptiveMaxPool"
        return b.module(n, ranked(nn, class_name, rank)(1), x)


@op("GlobalLpPool")
class GlobalLpPool(Pool):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, p: int = 2) -> "fx.Node":
        import torch

        axes = tuple(range(2, len(n.shape(0))))
        return b.call(torch.linalg.vector_norm, b.tensor(n, 0), p, axes, keepdim=True)


class _Windows:
    """The windows of one pooling node, on static spatial sizes."""

    def __init__(
        self,
        b: "TorchBuilder",
        n: OpNode,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
    ) -> None:
        self.builder, self.node = b, n
        self.rank = len(kernel)
        if self.rank not in (1, 2, 3):
            b.fail(n, f"{self.rank} spatial axes, torch has 1 to 3")
        self.kernel = tuple(kernel)
        self.strides = tuple(strides or (1,) * self.rank)
        self.dilations = tuple(dilations or (1,) * self.rank)
        self.size, self.out = n.shape(0)[2:], n.out()[2:]
        spans = zip(self.kernel, self.dilations, strict=True)
        self.spans = tuple((k - 1) * d + 1 for k, d in spans)
        self.before, self.after = window_pads(
            n, self.kernel, self.strides, self.dilations, pads, auto_pad
        )

    def fits_torch(self, ceil_mode: int) -> bool:
        """Whether torch's own pools have these pads and count as many windows."""
        if self.before != self.after or any(
            2 * pad > k for pad, k in zip(self.before, self.kernel, strict=True)
        ):
            return False
        for size, pad, span, stride, out in zip(
            self.size, self.before, self.spans, self.strides, self.out, strict=True
        ):
            room = size + 2 * pad - span
            windows = (-(-room // stride) if ceil_mode else room // stride) + 1
            if ceil_mode and (windows - 1) * stride >= size + pad:
                windows -= 1
            if windows != out:
                return False
        return True

    def padding(self) -> list[int]:
        """Pads, in torch's order, by which exactly the windows of the output fit."""
        ends = [
            (out - 1) * stride + span - size - before
            for out, stride, span, size, before in zip(
                self.out, self.strides, self.spans, self.size, self.before, strict=True
            )
        ]
        return torch_padding(self.before, ends)

    def counted_from_the_start(
        self, x: "fx.Node", positions: "fx.Node", shift: Sequence[int]
    ) -> "fx.Node":
        """Positions in planes of ``x``, which pads may have shifted, as ONNX counts them."""
        b, n = self.builder, self.node
        space = tuple(b.size(n, 0, axis) for axis in range(2, self.rank + 2))
        return b.call(b.functions.over_the_tensor, positions, x, space, tuple(shift))

    def sums(self, x: "fx.Node") -> "fx.Node":
        """The sum over each window: a convolution with ones, channel by channel."""
        import torch
        from torch.nn import functional as F

        b, n = self.builder, self.node
        function = ranked(F, "conv", self.rank)
        channels = n.shape(0)[1]
        ones = b.buffer(n, "ones", torch.ones(channels, 1, *self.kernel))
        padded = b.call(F.pad, x, self.padding())
        return b.call(function, padded, ones, None, self.strides, 0, self.dilations, channels)

    def counts(self, include_pads: bool) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        """How many positions each window averages over; pads past the declared ones never count."""
        total = np.ones((), dtype=np.float32)
        for axis in range(self.rank):
            start = np.arange(self.out[axis]) * self.strides[axis] - self.before[axis]
            taps = np.arange(self.kernel[axis]) * self.dilations[axis]
            at = start[:, None] + taps[None, :]  # [windows, taps]
            low = -self.before[axis] if include_pads else 0
            high = self.size[axis] + (self.after[axis] if include_pads else 0)
            total = np.multiply.outer(total, ((at >= low) & (at < high)).sum(1, dtype=np.float32))
        return total


def _short(sizes: Sequence[int]) -> int | tuple[int, ...]:
    """One number where all axes agree, as people write it."""
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
