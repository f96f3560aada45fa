"""Networks for images and videos: torchvision, timm, segmentation_models_pytorch."""

import itertools
from typing import Any

import torch
from entry import Network
from torch import nn


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Tuple(nn.Module):
    """A network that returns its results as a plain tuple instead of a dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.net(x).values())


def torchvision_classifier(name: str, size: int = 224, **options: Any) -> Network:
    import torchvision

    net = torchvision.models.get_model(name, weights=None, **options)
    if hasattr(net, "AuxLogits"):  # used in training only
        net.aux_logits, net.AuxLogits = False, None
    return Network(net, (image(1, 3, size, size),))


def torchvision_segmentation(name: str) -> Network:
    import torchvision

    net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return Network(Tuple(net), (image(1, 3, 224, 224),))


def torchvision_video(name: str, frames: int, size: int) -> Network:
    import torchvision

    net = torchvision.models.get_model(name, weights=None)
    return Network(net, (image(1, 3, frames, size, size),))


def torchvision_backbone(name: str, size: int) -> Network:
    """A detector's backbone with its pyramid; returns every feature map."""
    import torchvision

    net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return Network(Tuple(net.backbone), (image(1, 3, size, size),))


def timm_classifier(name: str) -> Network:
    import timm

    net: Any = timm.create_model(name)
    return Network(net, (image(1, *net.pretrained_cfg["input_size"]),))


def smp_unet() -> Network:
    import segmentation_models_pytorch as smp

    return Network(smp.Unet("resnet18", encoder_weights=None), (image(1, 3, 128, 128),))


class SuperResolution(nn.Module):
    """An EDSR-like net: residual blocks and two steps of PixelShuffle."""

    def __init__(self, channels: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.up = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Conv2d(channels, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = first = self.head(x)
        for block in self.blocks:
            x = x + block(x)
        return self.tail(self.up(x + first))


def super_resolution() -> Network:
    return Network(SuperResolution(), (image(1, 3, 32, 32),))


def autoencoder() -> Network:
    """Down by strided convolutions, up by ConvTranspose."""
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for wide, wider in itertools.pairwise(widths):
        layers += [nn.Conv2d(wide, wider, 3, 2, 1), nn.BatchNorm2d(wider), nn.ReLU()]
    for wider, wide in zip(widths[:1:-1], widths[-2:0:-1], strict=False):
        layers += [nn.ConvTranspose2d(wider, wide, 4, 2, 1), nn.BatchNorm2d(wide), nn.ReLU()]
    layers.append(nn.ConvTranspose2d(widths[1], 3, 4, 2, 1))
    return Network(nn.Sequential(*layers), (image(1, 3, 64, 64),))
