"""Lightning's Trainer: the callback counts real steps, and its state is in the checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import morphgraph as mg
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.graph import ChannelGraph
from tests.killed import killed, wait_for_the_kill

pytest.importorskip("lightning")
import lightning.pytorch as pl

from morphgraph.integrations.lightning import BudgetCallback

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")]
Make = Callable[[int], Any]
Data = tuple[Tensor, Tensor]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.net(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0)


class KilledError(Exception):
    pass


class Kill(pl.Callback):
    """Stops the training before a step: by an error, or until the whole process is killed."""

    def __init__(self, step: int, marker: Path | None = None) -> None:
        self.step, self.marker = step, marker

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.marker is not None:
                wait_for_the_kill(self.marker)
            raise KilledError


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    saver = pl.callbacks.ModelCheckpoint(folder, filename="last", every_n_epochs=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = {"max_epochs": 10, "accelerator": "cpu", **quiet, **options}
    return pl.Trainer(callbacks=[saver, *callbacks], **chosen)


def loader(data: Data) -> Any:
    return DataLoader(TensorDataset(*data), batch_size=16)


@pytest.mark.parametrize("stop", [13, 45, 75])
def test_a_run_that_was_killed_finds_the_same_structure(
    stop: int, make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    whole, callback = Module(make_net(0)), BudgetCallback(graph, {"flops": "50%"})
    trainer(tmp_path / "whole", callback).fit(whole, loader(data))
    assert callback.budget.met
    assert callback.budget.steps == callback.budget.step_number == 80

    first = BudgetCallback(graph, {"flops": "50%"})
    with pytest.raises(KilledError):
        trainer(tmp_path / "killed", Kill(stop), first).fit(Module(make_net(0)), loader(data))
    assert first.budget.step_number == stop
    resumed, again = Module(make_net(1)), BudgetCallback(graph, {"flops": "50%"})
    checkpoint = tmp_path / "killed" / "last.ckpt"
    trainer(tmp_path / "killed", again).fit(resumed, loader(data), ckpt_path=checkpoint)
    assert again.budget.trajectory == callback.budget.trajectory
    assert again.plan().groups == callback.plan().groups
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def train_until_the_kill(stop: int, net: Any, data: Data, folder: Path) -> None:
    graph = mg.lift(mg.export(net, (data[0][:1],)))
    callback, kill = BudgetCallback(graph, {"flops": "50%"}), Kill(stop, folder / "reached")
    trainer(folder, callback, kill).fit(Module(net), loader(data))


def test_a_process_that_was_killed_goes_on(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    """By SIGKILL in the middle of an epoch, which no callback is told of."""
    stop = 45
    whole, callback = Module(make_net(0)), BudgetCallback(graph, {"flops": "50%"})
    trainer(tmp_path / "whole", callback).fit(whole, loader(data))
    (folder := tmp_path / "killed").mkdir()
    arguments = (stop, make_net(0), data, folder)
    assert killed(train_until_the_kill, arguments, (folder / "reached").exists)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 40
    resumed, again = Module(make_net(1)), BudgetCallback(graph, {"flops": "50%"})
    trainer(folder, again).fit(resumed, loader(data), ckpt_path=folder / "last.ckpt")
    assert again.plan().groups == callback.plan().groups
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_run_that_is_resumed_at_its_end_has_its_plan(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    callback, again = (BudgetCallback(graph, {"flops": "50%"}) for _ in range(2))
    trainer(tmp_path, callback).fit(Module(make_net(0)), loader(data))
    checkpoint = tmp_path / "last.ckpt"
    trainer(tmp_path, again).fit(Module(make_net(1)), loader(data), ckpt_path=checkpoint)
    assert again.plan().groups == callback.plan().groups


def test_accumulated_batches_are_one_step(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    callback = BudgetCallback(graph, {"flops": "50%"})
    trainer(tmp_path, callback, accumulate_grad_batches=4).fit(Module(make_net(0)), loader(data))
    assert callback.budget.steps == callback.budget.step_number == 20


def test_steps_that_a_scaler_skips_are_none(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    class Bursting(Module):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.total_batch_idx in (3, 4):
                self.net.last.weight.grad.fill_(torch.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = scaler
    callback = BudgetCallback(graph, {"flops": "50%"}, steps=80)
    fitting = trainer(tmp_path, callback, plugins=[precision], max_epochs=2)
    with pytest.warns(MorphWarning, match="after 14 of 80 steps"):
        fitting.fit(Bursting(make_net(0)), loader(data))
    assert callback.budget.step_number == 14


def test_a_training_of_no_known_length_is_refused(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    callback = BudgetCallback(graph, {"flops": "50%"})
    endless = trainer(tmp_path, callback, max_epochs=-1, max_time={"seconds": 30})
    with pytest.raises(ArgumentError, match="give max_epochs or max_steps"):
        endless.fit(Module(make_net(0)), loader(data))
