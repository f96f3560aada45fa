"""When bfloat16 is chosen, and that it and torch.compile reach the training."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.recipes.data import Dataset, Preprocessing
from morphgraph.recipes.precision import bf16_helps
from morphgraph.recipes.trainer import Recipe, train
from morphgraph.testing.examples import image, residual_cnn

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "groups", "helps"),
    [
        ({"avx512_bf16": True}, 1, True),
        ({"amx_bf16": True, "avx512_bf16": False}, 1, True),
        ({"avx512_bf16": False}, 1, False),
        ({}, 1, False),
        ({"avx512_bf16": True}, 4, False),
    ],
)
def test_bf16_where_the_processor_has_it_and_no_convolution_is_grouped(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], groups: int, helps: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=groups), nn.Flatten(), nn.Linear(64, 10)
    )
    assert bf16_helps(mg.lift(mg.export(net, (image(2),))), CPU) is helps


def test_bf16_and_compile_reach_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def compiled(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = net(x)
            seen.append(result.dtype)
            return result

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    images, labels = np.zeros((32, 8, 8, 1), dtype=np.uint8), np.arange(32) % 10
    names = tuple(map(str, range(10)))
    data = Dataset(
        "zeros", names, images, labels, images, labels, Preprocessing((8, 8), (0.5,), (0.5,))
    )
    for bf16 in (False, True):
        train(residual_cnn((4,)), data, Recipe(1, 16, bf16=bf16, compiled=True))
    train(residual_cnn((4,)), data, Recipe(1, 16))
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
