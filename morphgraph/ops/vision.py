"""Sampling and pooling at computed places; deformable convolution; folding patches back."""

from collections.abc import Mapping, Sequence
from math import prod
from types import ModuleType

import numpy as np

from morphgraph.ops.contraction import Convolutional, grouped_preference
from morphgraph.ops.initial import Initial, by_kernel
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, from_line, op
from morphgraph.ops.window import ranked, torch_padding


@op("GridSample")
class GridSample(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        line = "N c *S, N *T R -> N c *T"
        return from_line(n, line, reason="space, sampled by GridSample")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        align_corners: int = 0,
        mode: str = "linear",
        padding_mode: str = "zeros",
    ) -> "fx.Node":
        from torch.nn import functional as F

        kinds = {"linear": "bilinear", "cubic": "bicubic"}
        options = kinds.get(mode, mode), padding_mode, bool(align_corners)
        return b.call(F.grid_sample, b.tensor(n, 0), b.tensor(n, 1), *options)


@op("AffineGrid")
class AffineGrid(Op):
    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N P Q, _ -> N *T R", reason="coordinates, made by AffineGrid")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, align_corners: int = 0) -> "fx.Node":
        from torch.nn import functional as F

        size = b.numbers(n, 1)
        if size is None:
            b.fail(n, "its size is computed at run time")
        return b.call(F.affine_grid, b.tensor(n, 0), size, bool(align_corners))


def _torchvision(b: "TorchBuilder", n: OpNode) -> ModuleType:
    """``torchvision.ops``, which not every installation of torch has."""
    try:
        from torchvision import ops
    except ImportError:
        b.fail(n, "torch alone has no such function", "install torchvision")
    found: ModuleType = ops
    return found


@op("RoiAlign")
class RoiAlign(Op):
    """Every region of interest becomes a sample."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c *S, R Q, R -> R c *T", reason="space or regions of RoiAlign")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        coordinate_transformation_mode: str = "",
        mode: str = "avg",
        output_height: int = 1,
        output_width: int = 1,
        sampling_ratio: int = 0,
        spatial_scale: float = 1.0,
    ) -> "fx.Node":
        import torch

        if mode != "avg":
            b.fail(n, f"torchvision averages over samples, mode {mode} does not")
        x, boxes = b.tensor(n, 0), b.tensor(n, 1)  # [N, c, H, W], [R, 4]
        sample = b.method("type_as", b.method("unsqueeze", b.tensor(n, 2), 1), boxes)
        default = "half_pixel" if n.opset >= 16 else "output_half_pixel"
        aligned = (coordinate_transformation_mode or default) == "half_pixel"
        size, scale = (output_height, output_width), b.decimal(spatial_scale)
        rows = b.call(torch.cat, (sample, boxes), 1)
        function = _torchvision(b, n).roi_align
        return b.call(function, x, rows, size, scale, sampling_ratio, aligned)


@op("MaxRoiPool")
class MaxRoiPool(Op):
    """Regions come as (sample, left, top, right, bottom)."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c *S, R Q -> R c *T", reason="space or regions of MaxRoiPool")

    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
    ) -> "fx.Node":
        function, scale = _torchvision(b, n).roi_pool, b.decimal(spatial_scale)
        return b.call(function, b.tensor(n, 0), b.tensor(n, 1), tuple(pooled_shape), scale)


@op("DeformConv")
class DeformConv(Op):
    """A convolution whose taps move by offsets, each for one block of input channels."""

    convolves = True
    foldable = False  # slow

    @staticmethod
    def describe(n: OpNode, *, group: int = 1, offset_group: int = 1) -> Description:
        if group == 1:
            line = "N (G i) *S, o (G i) *K, N O *T, o, N M *T -> N o *T"
            sizes = {"G": offset_group}
            return from_line(n, line, sizes, macs="N G i o *K *T", contracted="i")
        if offset_group > 1:
            raise UnsupportedFormError(
                f"DeformConv with {group} groups and {offset_group} of offsets"
            )
        if group == n.shape(0)[1]:
            line = "N c *S, (c m) 1 *K, N O *T, (c m), N M *T -> N (c m) *T"
            return from_line(n, line, {"c": group}, macs="N c m *K *T", prefer="c m")
        return from_line(
            n,
            "N (g i) *S, (g o) i *K, N O *T, (g o), N M *T -> N (g o) *T",
            {"g": group},
            macs="N g i o *K *T",
            contracted="i",
            prefer=grouped_preference(n.shape(1)[1], n.shape(1)[0] // group),
        )

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return dict.fromkeys((1, 3), by_kernel(n.shape(1)))

    resize = Convolutional.resize

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch.nn import functional as F

        rank = len(n.shape(1)) - 2
        if rank != 2:
            b.fail(n, f"{rank} spatial axes, torchvision has 2")
        stride, dilation = tuple(strides or (1, 1)), tuple(dilations or (1, 1))
        given = tuple(pads or (0,) * 4)
        before, after = given[:2], given[2:]
        x, offset, kernel = b.tensor(n, 0), b.tensor(n, 2), b.tensor(n, 1)
        if before != after:
            x, before = b.call(F.pad, x, torch_padding(before, after)), (0, 0)
        bias, mask = b.optional(n, 3), b.optional(n, 4)
        function = _torchvision(b, n).deform_conv2d
        return b.call(function, x, offset, kernel, bias, stride, before, dilation, mask)


@op("Col2Im")
class Col2Im(Op):
    """Patches of every channel are added up where they overlap (torch: fold)."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        block = n.ints(2)
        if block is None:
            raise UnsupportedFormError("Col2Im with patches whose size is computed at run time")
        return from_line(n, "N (c K) L, _, _ -> N c *T", {"K": prod(block)}, reason="patches")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch.nn import functional as F

        size, block = b.sizes(n, 1), b.sizes(n, 2)
        rank = len(n.out()) - 2
        padding = tuple(pads or (0,) * (2 * rank))
        if size is None or block is None or rank != 2 or padding[:rank] != padding[rank:]:
            b.fail(n, "torch folds two spatial axes, padded evenly")
        each = tuple(dilations or (1,) * rank), padding[:rank], tuple(strides or (1,) * rank)
        return b.call(F.fold, b.tensor(n, 0), tuple(size), tuple(block), *each)


@op("MaxUnpool")
class MaxUnpool(Op):
    """Puts pooled values back; positions are counted over all channels, as MaxPool counts them."""

    foldable = False  # slow

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c *S, N c *S, _ -> N c *T")

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        if n.const(2) is not None:
            new.set_constant(2, np.array(new.shape(~0), dtype=np.int64))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        kernel_shape: Sequence[int],
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> "fx.Node":
        import torch
        from torch.nn import functional as F

        rank, space = len(kernel_shape), n.out()[2:]
        in_channel = b.call(torch.remainder, b.tensor(n, 1), prod(space))
        padding = tuple(pads or (0,) * (2 * rank))[:rank]
        options = tuple(kernel_shape), tuple(strides or (1,) * rank), padding, space
        return b.call(ranked(F, "max_unpool", rank), b.tensor(n, 0), in_channel, *options)
