"""Small networks for examples, tests and the demo."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., CVPR 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A stem, one block per width (stride 2 from the second on), pooling, a linear layer.

    The stem shrinks the image by ``stem_stride``: a stride of 2 first, the rest by max pooling.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 64),
        in_channels: int = 1,
        classes: int = 10,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        stride = min(stem_stride, 2)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        previous = (widths[0], *widths[:-1])
        self.blocks = nn.Sequential(
            *(
                BasicBlock(before, width, stride=1 if k == 0 else 2)
                for k, (before, width) in enumerate(zip(previous, widths, strict=True))
            )
        )
        self.pool: nn.Module = nn.Identity()
        if stem_stride > stride:
            self.pool = nn.MaxPool2d(stem_stride // stride)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to scores ``[N, classes]``."""
        x = self.blocks(self.pool(F.relu(self.bn(self.stem(x)))))
        scores: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return scores


def residual_cnn(
    widths: tuple[int, ...] = (16, 32, 64),
    in_channels: int = 1,
    classes: int = 10,
    stem_stride: int = 1,
) -> nn.Module:
    """A residual CNN for small images, ``[N, in_channels, H, W] -> [N, classes]``.

    >>> residual_cnn()(image(2, 8, 8)).shape
    torch.Size([2, 10])
    """
    return ResidualCNN(widths, in_channels, classes, stem_stride)


def image(batch: int = 1, height: int = 8, width: int = 8, channels: int = 1) -> Tensor:
    """Noise in the shape of images, ``[batch, channels, height, width]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, channels, height, width), generator=generator)
