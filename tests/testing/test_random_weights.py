"""Weights that can be felt: outputs of order 1 that depend on every channel."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torchvision
from torch import nn

from morphgraph.onnx_io.runtime import run
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove, randomize_model_weights, randomize_weights


class Tokens(nn.Module):
    """Embeddings under a mask, a class token, a layer scale, and a head that starts at zero."""

    def __init__(self, vocabulary: int = 10, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.hidden = nn.Linear(width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-6))
        self.head = nn.Linear(width, 5)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        assert (mask == 1).all()
        x = self.embedding(ids) * mask[..., None] + self.cls_token
        x = x + self.layer_scale * self.hidden(x).tanh()
        return {"logits": self.head(x)}


IDS = torch.tensor([[3, 9, 4, 4, 7, 0]])


def test_tokens_stay_in_range_and_masks_stay_masks() -> None:
    net = randomize_weights(Tokens(), (IDS, torch.ones_like(IDS)))
    out = net(IDS, torch.ones_like(IDS))["logits"]
    assert 0.3 < out.std() < 3
    other = net((IDS + 1) % 10, torch.ones_like(IDS))["logits"]
    assert (out - other).abs().max() > 0.1


def test_what_starts_constant_becomes_random() -> None:
    net: Any = randomize_weights(Tokens(), (IDS, torch.ones_like(IDS)))
    for name, parameter in net.named_parameters():
        assert parameter.std() > 0.01, name
    assert net.layer_scale.min() >= 0.5
    assert net.cls_token.min() >= 0.2


def test_the_same_seed_gives_the_same_network() -> None:
    def parameters(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        net = randomize_weights(Tokens(), (IDS, torch.ones_like(IDS)), seed=seed)
        return nn.utils.parameters_to_vector(net.parameters())

    assert torch.equal(parameters(1), parameters(1))
    assert not torch.equal(parameters(1), parameters(2))


def test_a_tied_kernel_is_not_evened_out() -> None:
    net: Any = nn.Sequential(nn.Embedding(10, 10), nn.Linear(10, 10))
    net[1].weight = net[0].weight
    before = net[0].weight.detach().clone()
    randomize_weights(net, (IDS,))
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_depth_neither_fades_nor_explodes(scale: float) -> None:
    layers = [m for _ in range(20) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    randomize_weights(net, torch.zeros(1, 8, 6, 6))
    assert 0.3 < net(torch.randn(4, 8, 6, 6)).std() < 3


def test_batch_norms_have_statistics_of_what_passes() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    randomize_weights(net, torch.zeros(1, 3, 12, 12))
    norm = net[1]
    normal = (
        norm(net[0](torch.randn(8, 3, 12, 12))) - norm.bias.view(-1, 1, 1)
    ) / norm.weight.view(-1, 1, 1)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 0.35
    assert ((normal.std(dim=(0, 2, 3)) - 0.9).abs() < 0.25).all()
    assert norm.momentum == 0.1
    assert not norm.training


LIGHT = """
<ir_version: 3, opset_import: ["": 13]>
light (float[1, 3, 12, 12] x) => (float[1, 4, 1, 1] y)
<int64[4] k = {8, 3, 3, 3}, int64[1] c = {8}, int64[4] l = {4, 8, 1, 1}> {
    kernel = ConstantOfShape <value: tensor = float[1] {0.0}> (k)
    scale = ConstantOfShape <value: tensor = float[1] {1.0}> (c)
    bias = ConstantOfShape <value: tensor = float[1] {0.0}> (c)
    mean = ConstantOfShape <value: tensor = float[1] {0.0}> (c)
    var = ConstantOfShape <value: tensor = float[1] {1.0}> (c)
    last = ConstantOfShape <value: tensor = float[1] {0.0}> (l)
    a = Conv (x, kernel)
    b = BatchNormalization (a, scale, bias, mean, var)
    d = Relu (b)
    e = GlobalAveragePool (d)
    y = Conv (e, last)
}
"""


def light() -> tuple[ir.Model, dict[str, np.ndarray]]:
    noise = np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    return model_from_text(LIGHT), {"x": noise}


def test_constant_fills_become_weights() -> None:
    model, feeds = light()
    felt = randomize_model_weights(model, feeds)
    assert set(felt.graph.initializers) >= {"kernel", "scale", "bias", "mean", "var", "last"}
    assert [node.op_type for node in model.graph].count("ConstantOfShape") == 6
    assert "ConstantOfShape" not in {node.op_type for node in felt.graph}
    assert run(felt, feeds)["y"].std() == pytest.approx(1, rel=1e-5)


def test_statistics_of_a_model_are_measured() -> None:
    model, feeds = light()
    felt = randomize_model_weights(model, feeds)
    values = {name: v.const_value.numpy() for name, v in felt.graph.initializers.items()}
    weights = torch.from_numpy(values["kernel"].copy())
    passed = nn.functional.conv2d(torch.from_numpy(feeds["x"]), weights).numpy()
    spread = passed.std(axis=(0, 2, 3))
    assert (np.abs(values["mean"] - passed.mean(axis=(0, 2, 3))) <= 0.2 * spread + 1e-5).all()
    assert (values["var"] / spread**2 >= 0.9 - 1e-3).all()
    assert (values["var"] / spread**2 <= 1.6 + 1e-3).all()


def test_a_felt_model_proves() -> None:
    model, feeds = light()
    prove(lift(randomize_model_weights(model, feeds)))


def test_frozen_batch_norms_are_felt_as_well() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    randomize_weights(nn.Sequential(nn.Conv2d(3, 4, 3), frozen), torch.zeros(1, 3, 9, 9))
    assert len(torch.unique(frozen.weight)) == len(torch.unique(frozen.bias)) == 4
    assert bool((frozen.running_mean != 0).all())
    assert bool((frozen.running_var != 1).all())
