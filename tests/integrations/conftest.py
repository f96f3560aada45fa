"""A network and a task that every framework trains in the same way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph


class Small(nn.Module):
    """Channels measured by the scales of a norm, and others by their kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.hidden, self.last = nn.Linear(12 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        scores: Tensor = self.last(self.hidden(y.flatten(1)).relu())
        return scores


@pytest.fixture
def make_net() -> Callable[[int], Any]:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Small()

    return made


@pytest.fixture(scope="session")
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    return mg.lift(mg.export(Small(), (torch.zeros(1, 1, 6, 6),)))


@pytest.fixture(scope="session")
def data() -> tuple[Tensor, Tensor]:
    """Images 128x1x6x6 and their classes, by a linear map."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(128, 1, 6, 6, generator=generator)
    return x, (x.flatten(1) @ torch.randn(36, 4, generator=generator)).argmax(1)
