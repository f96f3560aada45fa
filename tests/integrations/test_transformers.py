"""Hugging Face's Trainer: the callback counts real steps, and its state is in the checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.errors import MorphWarning
from morphgraph.graph import ChannelGraph

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers

from morphgraph.integrations.transformers import BudgetCallback

pytestmark = pytest.mark.long
Make = Callable[[int], Any]
Data = tuple[Tensor, Tensor]


class Model(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.net(x)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


class KilledError(Exception):
    pass


class Kill(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


def trainer(net: Any, data: Data, folder: Path, *callbacks: Any, **options: Any) -> Any:
    chosen = {"max_steps": 80, "save_steps": 11, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        save_total_limit=1,
        **chosen,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(*data, strict=True)]
    return transformers.Trainer(
        model=Model(net), args=arguments, train_dataset=rows, callbacks=list(callbacks)
    )


@pytest.mark.parametrize("stop", [14, 45, 75])
def test_a_run_that_was_killed_finds_the_same_structure(
    stop: int, make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    whole, callback = make_net(0), BudgetCallback(graph, {"flops": "50%"})
    trainer(whole, data, tmp_path / "whole", callback).train()
    assert callback.budget.met
    assert callback.budget.steps == callback.budget.step_number == 80

    first = BudgetCallback(graph, {"flops": "50%"})
    with pytest.raises(KilledError):
        trainer(make_net(0), data, tmp_path / "killed", first, Kill(stop)).train()
    assert first.budget.step_number == stop
    # The checkpoint may be read anywhere, whatever becomes of the states of other callbacks.
    (tmp_path / "killed").rename(tmp_path / "moved")
    (checkpoint,) = (tmp_path / "moved").iterdir()
    resumed, again = make_net(1), BudgetCallback(graph, {"flops": "50%"})
    options = {"restore_callback_states_from_checkpoint": stop == 45}
    going_on = trainer(resumed, data, tmp_path / "again", again, **options)
    going_on.train(resume_from_checkpoint=str(checkpoint))
    assert again.budget.trajectory == callback.budget.trajectory
    assert again.plan().groups == callback.plan().groups
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_accumulated_batches_are_one_step(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    callback = BudgetCallback(graph, {"flops": "50%"})
    options = {"gradient_accumulation_steps": 4, "max_steps": 20, "save_strategy": "no"}
    trainer(make_net(0), data, tmp_path, callback, **options).train()
    assert callback.budget.steps == callback.budget.step_number == 20


def test_steps_that_a_scaler_skips_are_none(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    net, batches = make_net(0), iter(range(16))
    net.last.weight.register_hook(lambda g: g * torch.inf if next(batches) in (3, 4) else g)
    callback = BudgetCallback(graph, {"flops": "50%"}, steps=80)
    options = {"max_steps": 16, "save_strategy": "no"}
    training = trainer(net, data, tmp_path, callback, **options)
    training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.warns(MorphWarning, match="after 14 of 80 steps"):
        training.train()
    assert callback.budget.step_number == 14


def test_a_checkpoint_without_a_budget_begins_a_phase(
    make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    trainer(make_net(0), data, tmp_path, max_steps=20, save_steps=20).train()
    checkpoint = tmp_path / "checkpoint-20"
    assert "morphgraph" not in json.loads((checkpoint / "trainer_state.json").read_text())
    callback = BudgetCallback(graph, {"flops": "50%"})
    with pytest.warns(MorphWarning, match="of step 20 has no state of a budget"):
        trainer(make_net(0), data, tmp_path, callback).train(str(checkpoint))
    assert callback.budget.steps == callback.budget.step_number == 60
    assert callback.budget.met
