"""The seed networks: small versions of what MorphNet's paper used, for images of 16 to 32 pixels.

Widths are arguments, so that a hand-made pyramid and a constant width are the same network.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(
        self, into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, **last: bool
    ) -> None:
        self_conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers: list[nn.Module] = [self_conv, nn.BatchNorm2d(out)]
        super().__init__(*layers, *([] if last.get("linear") else [nn.ReLU()]))


class Head(nn.Sequential):
    """Global average, then one linear layer."""

    def __init__(self, into: int, classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))


class Vgg(nn.Sequential):
    """3x3 convolutions, halved after the second and the fourth; with or without BatchNorm."""

    def __init__(
        self, channels: int, classes: int, widths: Sequence[int], norm: bool = True
    ) -> None:
        layers: list[nn.Module] = []
        before = channels
        for number, width in enumerate(widths):
            if norm:
                layers.append(ConvNorm(before, width))
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            if number in (1, 3):
                layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__(*layers, Head(before, classes))


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3, 1x1."""

    def __init__(self, into: int, out: int, stride: int, inner: int | None) -> None:
        super().__init__()
        if inner is None:
            self.body = nn.Sequential(
                ConvNorm(into, out, 3, stride), ConvNorm(out, out, linear=True)
            )
        else:
            self.body = nn.Sequential(
                ConvNorm(into, inner, 1),
                ConvNorm(inner, inner, 3, stride),
                ConvNorm(inner, out, 1, linear=True),
            )
        same = stride == 1 and into == out
        self.short = nn.Identity() if same else ConvNorm(into, out, 1, stride, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


class ResNet(nn.Sequential):
    """Three stages of residual blocks, ``depth`` in each, the image halved between them."""

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: Sequence[int],
        inner: Sequence[int | None] = (None, None, None),
        depth: int = 2,
    ) -> None:
        layers: list[nn.Module] = [ConvNorm(channels, widths[0])]
        before = widths[0]
        for stage, (width, between) in enumerate(zip(widths, inner, strict=True)):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                layers.append(Block(before, width, stride, between))
                before = width
        super().__init__(*layers, Head(before, classes))


class Towers(nn.Module):
    """An Inception block: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; average, 1x1; concatenated."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.one = ConvNorm(into, width, 1)
        self.three = nn.Sequential(ConvNorm(into, width, 1), ConvNorm(width, width))
        self.five = nn.Sequential(
            ConvNorm(into, width, 1), ConvNorm(width, width), ConvNorm(width, width)
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvNorm(into, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class Inception(nn.Sequential):
    """Five blocks of four towers, the image halved after the second and the fourth."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        blocks = [Towers(2 * width if k == 0 else 4 * width, width) for k in range(5)]
        super().__init__(
            ConvNorm(channels, width),
            ConvNorm(width, 2 * width),
            *blocks[:2],
            nn.MaxPool2d(2),
            *blocks[2:4],
            nn.MaxPool2d(2),
            blocks[4],
            Head(4 * width, classes),
        )


class MobileNet(nn.Sequential):
    """MobileNet-V1's plan of depthwise and pointwise convolutions, with eight pairs."""

    WIDTHS = (16, 32, 32, 64, 64, 64, 64, 128, 128)
    HALVED = (2, 5)  # the pairs whose depthwise convolution has stride 2

    def __init__(self, channels: int, classes: int, multiplier: float = 1.0) -> None:
        widths = [int(multiplier * width) for width in self.WIDTHS]
        layers: list[nn.Module] = [ConvNorm(channels, widths[0])]
        for number, (into, out) in enumerate(itertools.pairwise(widths)):
            stride = 2 if number in self.HALVED else 1
            layers += [ConvNorm(into, into, 3, stride, groups=into), ConvNorm(into, out, 1)]
        super().__init__(*layers, Head(widths[-1], classes))


class Attention(nn.Module):
    """Self-attention whose heads and head widths can be told apart."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, self.heads, -1)
        q, k, v = (
            each(x).reshape(split).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A small vision transformer: patches of 4x4 pixels, the mean of all tokens classified."""

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int,
        width: int = 48,
        heads: int = 4,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(tokens)).mean(dim=1))


@dataclass(frozen=True)
class Network:
    """A seed network: how it is made, ``make(channels, classes, size)``, and how it trains.

    ``bf16`` where bfloat16 is faster on a CPU that has it: not with depthwise convolutions.
    """

    make: Callable[[int, int, int], nn.Module]
    bf16: bool = True
    lr: float = 0.1


def _sizeless(make: Callable[..., nn.Module], **options: object) -> Callable[..., nn.Module]:
    return lambda channels, classes, _size: make(channels, classes, **options)


NETWORKS = {
    "VGG [24]*7": Network(_sizeless(Vgg, widths=[24] * 7)),
    "VGG, by hand": Network(_sizeless(Vgg, widths=[16, 16, 32, 32, 64, 64, 64])),
    # With seven layers, from PyTorch's initialization, many seeds never begin to learn.
    "VGG without BN": Network(_sizeless(Vgg, widths=[24] * 5, norm=False)),
    "ResNet-14": Network(_sizeless(ResNet, widths=[16, 16, 16])),
    "ResNet-20": Network(_sizeless(ResNet, widths=[16, 32, 64], depth=3)),
    "ResNet, bottlenecks": Network(_sizeless(ResNet, widths=[48, 48, 48], inner=[16, 16, 16])),
    "Inception": Network(_sizeless(Inception, width=12)),
    "MobileNet": Network(_sizeless(MobileNet), bf16=False),
    "MobileNet x0.5": Network(_sizeless(MobileNet, multiplier=0.5), bf16=False),
    "ViT": Network(partial(Vit), bf16=False, lr=0.02),
}
