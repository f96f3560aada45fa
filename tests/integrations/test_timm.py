"""timm's own parts around the adapter: optimizers, scaler, average, saver and loader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.integrations.timm import shrink

pytest.importorskip("timm")
from timm.models import resume_checkpoint
from timm.optim import Lookahead, create_optimizer_v2
from timm.utils import CheckpointSaver, NativeScaler

pytestmark = pytest.mark.long
Make = Callable[[int], Any]
Data = tuple[Tensor, Tensor]


def train(net: Any, optimizer: torch.optim.Optimizer, data: Data, epochs: int) -> None:
    scaler = NativeScaler(device="cpu")
    for _ in range(epochs):
        for step in range(8):
            rows = torch.arange(16) + 16 * step
            loss = F.cross_entropy(net(data[0][rows]), data[1][rows])
            scaler(loss, optimizer, clip_grad=1.0, parameters=net.parameters())
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion"])
def test_a_run_that_was_killed_finds_the_same_structure(
    name: str, make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    def begun(seed: int) -> tuple[Any, torch.optim.Optimizer, mg.Budget]:
        net = make_net(seed)
        optimizer = create_optimizer_v2(net, opt=name, lr=3e-3)
        phase = shrink(graph, {"flops": "50%"}, net, optimizer, steps=160)
        assert phase.budget is not None
        return net, optimizer, phase.budget

    net, optimizer, budget = begun(0)
    train(net, optimizer, data, 20)
    assert budget.met
    killed, its_optimizer, _ = begun(0)
    train(killed, its_optimizer, data, 7)
    saver = CheckpointSaver(killed, its_optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(6, 0.0)
    train(killed, its_optimizer, data, 1)
    resumed, new_optimizer, its_budget = begun(1)
    path = str(tmp_path / "last.pth.tar")
    assert resume_checkpoint(resumed, path, optimizer=new_optimizer) == 7
    train(resumed, new_optimizer, data, 13)
    assert its_budget.trajectory == budget.trajectory
    plans = [each.regularizer.plan({"flops": "50%"}) for each in (budget, its_budget)]
    assert plans[0].groups == plans[1].groups
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_lookahead_is_refused_and_its_inner_optimizer_is_not(
    make_net: Make, graph: ChannelGraph
) -> None:
    net = make_net(0)
    inner = torch.optim.AdamW(net.parameters(), weight_decay=0)
    with pytest.raises(ArgumentError, match="Lookahead wraps another optimizer"):
        shrink(graph, {"flops": "50%"}, net, Lookahead(inner), steps=10)
    assert shrink(graph, {"flops": "50%"}, net, inner, steps=10).budget is not None
