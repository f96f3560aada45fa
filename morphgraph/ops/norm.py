"""Normalizations."""

from collections.abc import Mapping, Sequence

import numpy as np

from morphgraph.arrays import Shape
from morphgraph.ops.initial import ONE, ZERO, Initial
from morphgraph.ops.linear import Channelwise, Linear
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, from_line, op
from morphgraph.ops.window import ranked


@op("BatchNormalization")
class BatchNormalization(Op):
    """In inference a scale and a shift per channel.

    The other axes pass: standardized weights come here as (1, out, in x kernel).
    """

    scale = 1
    offset = 2
    shift = 2
    statistics = (3, 4)

    @staticmethod
    def describe(n: OpNode, *, training_mode: int = 0) -> Description:
        if training_mode:
            raise UnsupportedFormError(
                "BatchNormalization in training mode; export the model in eval mode"
            )
        return from_line(n, "n c *s, c, c, c, c -> n c *s")

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {1: ONE, 2: ZERO, 3: ZERO, 4: ONE}

    @staticmethod
    def linear(n: OpNode, *, epsilon: float = 1e-5, training_mode: int = 0) -> Linear | None:
        mean, variance = n.const(3), n.const(4)
        if mean is None or variance is None or n.is_weight(0) or training_mode:
            return None
        unit = 1 / np.sqrt(variance.astype(np.float64) + epsilon)
        return Channelwise(operand=0, weight=1, axis=1, mean=mean, unit=unit)

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
    ) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        if training_mode:
            b.fail(n, "it stands in training mode", "export the model in eval mode")
        rank, channels = len(n.shape(0)), n.shape(0)[1]
        eps, x = b.decimal(epsilon), b.tensor(n, 0)
        if 2 <= rank <= 5:
            make = ranked(nn, "BatchNorm", max(rank - 2, 1))
            ones, zeros = b.constant(n, 1), b.constant(n, 2)
            affine = ones is None or zeros is None or bool((ones != 1).any() or zeros.any())
            # 1 is what PyTorch exports for None, the mean of all batches, and for 0: ``STILL_KEY``.
            rate = None if momentum == 1 else b.decimal(round(1 - momentum, 7))
            module = make(channels, eps, rate, affine, device="meta")
            roles = {"weight": 1, "bias": 2} if affine else {}
            owned = b.owner(n, module, x, {**roles, "running_mean": 3, "running_var": 4})
            if owned is not None:
                return owned
        weight, bias, mean, var = (b.tensor(n, i) for i in (1, 2, 3, 4))
        if b.constant(n, 3) is not None and b.constant(n, 4) is not None:
            return b.call(F.batch_norm, x, mean, var, weight, bias, False, 0.0, eps)
        # Statistics that are computed, as those of standardized weights, pass gradients on.
        column = (-1, *[1] * (rank - 2))
        scale = b.call(torch.mul, weight, b.call(torch.rsqrt, b.call(torch.add, var, eps)))
        centered = b.call(torch.sub, x, b.method("reshape", mean, column))
        scaled = b.call(torch.mul, centered, b.method("reshape", scale, column))
        return b.call(torch.add, scaled, b.method("reshape", bias, column))


class Affine(Op):
    """Norms with a scale, and some with a shift."""

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return {1: ONE, 2: ZERO}


@op("InstanceNormalization")
class InstanceNormalization(Affine):
    """Statistics run over the axes behind the channels, where a GroupNorm may have put others."""

    mean_power = -0.5
    epsilon = 1e-5
    centers = True
    scale = 1
    offset = 2

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "n c *s, c, c -> n c *s", statistical="*s")

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, epsilon: float = 1e-5) -> "fx.Node":
        from torch import nn
        from torch.nn import functional as F

        rank, eps, x = len(n.shape(0)), b.decimal(epsilon), b.tensor(n, 0)
        if 3 <= rank <= 5:
            make = ranked(nn, "InstanceNorm", rank - 2)
            module = make(n.shape(0)[1], eps, affine=True, device="meta")
            owned = b.owner(n, module, x, {"weight": 1, "bias": 2})
            if owned is not None:
                return owned
        weight, bias = b.tensor(n, 1), b.tensor(n, 2)
        return b.call(F.instance_norm, x, weight=weight, bias=bias, eps=eps)


@op("LayerNormalization")
class LayerNormalization(Affine):
    """Mean and variance run over all axes from ``axis`` on."""

    mean_power = -0.5
    epsilon = 1e-5
    centers = True
    scale = 1
    offset = 2

    @staticmethod
    def describe(n: OpNode, *, axis: int = -1) -> Description:
        rank = len(n.shape(0))
        kept, normed = _split_axes(rank, axis)
        ones = " ".join("1" for _ in normed.split())
        scale, offset = (_spread(n, port, f"{kept} {normed}") for port in (1, 2))
        statistics = f"{kept} {ones}"
        return from_line(
            n,
            f"{kept} {normed}, {scale}, {offset} -> {kept} {normed}, {statistics}, {statistics}",
            statistical=normed,
        )

    @staticmethod
    def linear(n: OpNode, *, axis: int = -1, epsilon: float = 1e-5) -> Linear | None:
        last = axis in (-1, len(n.shape(0)) - 1) and n.shape(1) == n.shape(0)[-1:]
        if not last or n.is_weight(0) or not n.is_weight(1):
            return None
        return Channelwise(operand=0, weight=1, axis=-1, epsilon=epsilon)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -1, epsilon: float = 1e-5) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        normed, eps, x = n.shape(0)[axis:], b.decimal(epsilon), b.tensor(n, 0)
        zero_bias = b.constant(n, 2)
        biased = n.has(2) and (zero_bias is None or bool(zero_bias.any()))
        if n.shape(1) == normed and (not biased or n.shape(2) == normed):
            module = nn.LayerNorm(normed, eps, bias=biased, device="meta")
            owned = b.owner(n, module, x, {"weight": 1, "bias": 2} if biased else {"weight": 1})
            if owned is not None:
                return owned
            bias = b.tensor(n, 2) if biased else None
            return b.call(F.layer_norm, x, normed, b.tensor(n, 1), bias, eps)
        y = b.call(torch.mul, b.call(F.layer_norm, x, normed, eps=eps), b.tensor(n, 1))
        return b.call(torch.add, y, b.tensor(n, 2)) if biased else y


@op("RMSNormalization")
class RMSNormalization(Affine):
    """The mean square runs over all axes from ``axis`` on."""

    mean_power = -0.5
    epsilon = 1e-5
    scale = 1

    @staticmethod
    def describe(n: OpNode, *, axis: int = -1) -> Description:
        kept, normed = _split_axes(len(n.shape(0)), axis)
        scale = _spread(n, 1, f"{kept} {normed}")
        return from_line(n, f"{kept} {normed}, {scale} -> {kept} {normed}", statistical=normed)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -1, epsilon: float = 1e-5) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        normed, eps, x = n.shape(0)[axis:], b.decimal(epsilon), b.tensor(n, 0)
        if n.shape(1) == normed:
            module = nn.RMSNorm(normed, eps, device="meta")
            owned = b.owner(n, module, x, {"weight": 1})
            return owned or b.call(F.rms_norm, x, normed, b.tensor(n, 1), eps)
        return b.call(torch.mul, b.call(F.rms_norm, x, normed, eps=eps), b.tensor(n, 1))


@op("LpNormalization")
class LpNormalization(Op):
    """Divides by a norm, to which a channel at zero contributes nothing."""

    @staticmethod
    def describe(n: OpNode, *, axis: int = -1) -> Description:
        axes = [f"a{k}" for k in range(len(n.shape(0)))]
        line = " ".join(axes)
        return from_line(n, f"{line} -> {line}", contracted=axes[axis])

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int = -1, p: int = 2) -> "fx.Node":
        from torch.nn import functional as F

        return b.call(F.normalize, b.tensor(n, 0), float(p), axis, 0.0)


@op("MeanVarianceNormalization")
class MeanVarianceNormalization(Op):
    """Mean and variance over some axes, by default all but the channels."""

    mean_power = -0.5
    centers = True

    @staticmethod
    def shape(x: Shape) -> Shape:
        return x

    @staticmethod
    def describe(n: OpNode, *, axes: Sequence[int] = (0, 2, 3)) -> Description:
        names = [f"a{k}" for k in range(len(n.shape(0)))]
        line = " ".join(names)
        return from_line(n, f"{line} -> {line}", statistical=" ".join(names[a] for a in axes))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axes: Sequence[int] = (0, 2, 3)) -> "fx.Node":
        import torch

        x = b.tensor(n, 0)
        centred = b.call(torch.sub, x, b.method("mean", x, tuple(axes), keepdim=True))
        variance = b.method("mean", b.method("square", centred), tuple(axes), keepdim=True)
        deviation = b.call(torch.add, b.method("sqrt", variance), 1e-9)  # ONNX: its function body
        return b.call(torch.div, centred, deviation)


def _split_axes(rank: int, axis: int) -> tuple[str, str]:
    """Names for the axes before ``axis`` and for those from it on."""
    first = axis % rank
    names = [f"{'a' if k < first else 'c'}{k}" for k in range(rank)]
    return " ".join(names[:first]), " ".join(names[first:])


def _spread(n: OpNode, port: int, names: str) -> str:
    """The axes of a scale or shift, by the names of those that broadcasting lays them on."""
    if not n.has(port) or not 0 < len(n.shape(port)) <= len(n.shape(0)):
        return "*r"
    sizes = n.shape(port)
    laid_on = zip(sizes, names.split()[-len(sizes) :], n.shape(0)[-len(sizes) :], strict=True)
    return " ".join("1" if size == 1 < whole else name for size, name, whole in laid_on)


@op("LRN")
class LRN(Op):
    """Each channel is divided by a sum over its neighbours, so that neighbours compete."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c *S -> N c *S", statistical="c")

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        alpha: float = 1e-4,
        beta: float = 0.75,
        bias: float = 1.0,
        size: int,
    ) -> "fx.Node":
        from torch import nn

        options = (b.decimal(option) for option in (alpha, beta, bias))
        module = nn.LocalResponseNorm(size, *options)
        x = b.tensor(n, 0)
        if size % 2:
            return b.module(n, module, x)
        # An even window reaches one channel further up in ONNX, one further down in torch.
        return b.method("flip", b.module(n, module, b.method("flip", x, 1)), 1)


@op("LogSoftmax")
class LogSoftmax(Op):
    open_at_zero = True

    @staticmethod
    def describe(n: OpNode, *, axis: int | None = None) -> Description:
        rank = len(n.shape(0))
        if n.opset >= 13:
            names = [f"a{k}" for k in range(rank)]
            competing = names[(-1 if axis is None else axis) % rank]
        else:
            kept, competing = _split_axes(rank, 1 if axis is None else axis)
            names = f"{kept} {competing}".split()
        axes = " ".join(names)
        return from_line(n, f"{axes} -> {axes}", statistical=competing)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, axis: int | None = None) -> "fx.Node":
        x, rank = b.tensor(n, 0), len(n.shape(0))
        if n.opset >= 13:
            return _competition(b, n, x, (-1 if axis is None else axis) % rank)
        first = (1 if axis is None else axis) % rank
        if first == rank - 1:
            return _competition(b, n, x, first)
        flat = _competition(b, n, b.method("flatten", x, first), first)
        return b.method("view_as", flat, x)


@op("Softmax", "Hardmax")
class Softmax(LogSoftmax):
    distribution = True


@op("GroupNormalization")
class GroupNormalization(Affine):
    """Statistics run over the channels of a group; before opset 21 one scale per group.

    Whole groups are removed exactly, so they go first.
    """

    mean_power = -0.5
    epsilon = 1e-5
    centers = True
    scale = 1
    offset = 2

    @staticmethod
    def shape(x: Shape, *_others: Shape | None) -> Shape:
        return x

    @staticmethod
    def describe(n: OpNode, *, num_groups: int) -> Description:
        scale = "g" if n.shape(1) == (num_groups,) else "(g c)"
        return from_line(
            n,
            f"N (g c) *S, {scale}, {scale} -> N (g c) *S",
            {"g": num_groups},
            statistical="c",
        )

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, num_groups: int) -> None:
        new.set_attribute("num_groups", new.size("g"))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, epsilon: float = 1e-5, num_groups: int) -> "fx.Node":
        from torch import nn
        from torch.nn import functional as F

        channels, eps, x = n.shape(0)[1], b.decimal(epsilon), b.tensor(n, 0)
        if n.shape(1) == (num_groups,) != (channels,):
            scale, shift = (
                b.method("repeat_interleave", b.tensor(n, i), channels // num_groups)
                for i in (1, 2)
            )
            return b.call(F.group_norm, x, num_groups, scale, shift, eps)
        module = nn.GroupNorm(num_groups, channels, eps, device="meta")
        owned = b.owner(n, module, x, {"weight": 1, "bias": 2})
        if owned is not None:
            return owned
        weight, bias = b.tensor(n, 1), b.tensor(n, 2)
        return b.call(F.group_norm, x, num_groups, weight, bias, eps)


def _competition(b: "TorchBuilder", n: OpNode, x: "fx.Node", axis: int) -> "fx.Node":
    """Softmax, its logarithm, or a one at the largest position, along one axis."""
    import torch

    if n.op_type == "Softmax":
        return b.call(torch.softmax, x, axis)
    if n.op_type == "LogSoftmax":
        return b.call(torch.log_softmax, x, axis)
    largest = b.call(torch.argmax, x, axis, keepdim=True)
    return b.method("scatter", b.call(torch.zeros_like, x), axis, largest, 1.0)
