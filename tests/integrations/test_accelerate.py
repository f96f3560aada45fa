"""accelerate: real steps are counted, and the state is saved with the accelerator's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from morphgraph.graph import ChannelGraph

accelerate = pytest.importorskip("accelerate")
from morphgraph.integrations.accelerate import shrink  # noqa: E402

pytestmark = pytest.mark.long
Make = Callable[[int], Any]
Data = tuple[Tensor, Tensor]


class Run:
    def __init__(
        self,
        net: Any,
        graph: ChannelGraph,
        data: Data,
        steps: int = 80,
        scaler: Any = None,
        **options: Any,
    ) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.accelerator.scaler = scaler  # as with fp16, which needs a GPU
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
        batches = DataLoader(TensorDataset(*data), batch_size=16)
        self.net, self.optimizer, self.batches = self.accelerator.prepare(net, optimizer, batches)
        self.phase = shrink(
            self.accelerator, graph, {"flops": "50%"}, self.net, self.optimizer, steps=steps
        )

    def train(self, epochs: int, burst_at: int | None = None) -> None:
        for _ in range(epochs):
            for index, (x, labels) in enumerate(self.batches):
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(F.cross_entropy(self.net(x), labels))
                    if index == burst_at:
                        self.net.last.weight.grad.fill_(torch.inf)
                    self.optimizer.step()
                    self.optimizer.zero_grad()


@pytest.mark.parametrize("epochs", [1, 5, 9])
def test_a_run_that_was_killed_finds_the_same_structure(
    epochs: int, make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    whole = Run(make_net(0), graph, data)
    whole.train(10)
    assert whole.phase.budget.met
    assert whole.phase.budget.step_number == 80

    killed = Run(make_net(0), graph, data)
    killed.train(epochs)
    killed.accelerator.save_state(str(tmp_path / "last"))
    killed.train(1)
    resumed = Run(make_net(1), graph, data)
    resumed.accelerator.load_state(str(tmp_path / "last"))
    resumed.train(10 - epochs)
    assert resumed.phase.budget.trajectory == whole.phase.budget.trajectory
    assert resumed.phase.plan().groups == whole.phase.plan().groups
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(tensor, resumed.net.state_dict()[name]), name


def test_accumulated_batches_are_one_step(make_net: Make, graph: ChannelGraph, data: Data) -> None:
    run = Run(make_net(0), graph, data, steps=20, gradient_accumulation_steps=4)
    run.train(10)
    assert run.phase.budget.step_number == 20


def test_steps_that_a_scaler_skips_are_none(
    make_net: Make, graph: ChannelGraph, data: Data
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = Run(make_net(0), graph, data, scaler=scaler)
    run.train(2, burst_at=3)
    assert run.phase.budget.step_number == 14
