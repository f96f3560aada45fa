"""Two processes on this machine come to what one process comes to with the same batches.

In double precision: in single precision rounding moves activations across the kink of a ReLU within
some tens of steps, and from there two trainings differ, as they do when the images of a batch come
in another order.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from morphgraph.cli import main
from morphgraph.onnx_io import save
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_processes.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SETTINGS = (
    *("--epochs", "2", "--batch-size", "33", "--budget", "flops=60%", "--crop", "1", "--flip"),
    *("--bf16", "off", "--baseline", "l2", "--checkpoint-seconds", "0"),
)


def started(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(*arguments: str) -> "list[subprocess.Popen[str]]":
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [started(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``single.onnx``, ``double.onnx`` and ``data.npz``, 165 images of ten classes."""
    folder = tmp_path_factory.mktemp("task")
    torch.manual_seed(0)
    net = residual_cnn((6, 8))
    save(export(net, (image(2),), dynamic_batch=True), folder / "single.onnx")
    save(export(net.double(), (image(2).double(),), dynamic_batch=True), folder / "double.onnx")
    rng = np.random.default_rng(0)
    labels = np.arange(165) % 10
    images = rng.integers(0, 128, (165, 8, 8), dtype=np.uint8)
    images[np.arange(165), labels % 8, labels // 2] += 127
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return folder


@pytest.fixture(scope="module")
def seen(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the checks of ``two_processes.py`` came to in either process."""
    folder = tmp_path_factory.mktemp("seen")
    for process in pair(str(SCRIPT), str(folder), str(task)):
        code, _, err = finished(process)
        assert code == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(monkeymodule: pytest.MonkeyPatch) -> ModuleType:
    """The same checks, to be run in this process."""
    monkeymodule.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def monkeymodule() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_batch_norm_sees_the_whole_batch(seen: list[dict[str, Any]], alone: ModuleType) -> None:
    whole = alone.statistics(alone.norm(), alone.batch().requires_grad_())
    parts = [each["batch_norm"] for each in seen]
    for name in ("y", "x"):
        assert np.allclose(np.concatenate([p[name] for p in parts]), whole[name], 1e-10, 1e-12)
    for name in ("weight", "bias"):  # each has its own part; DistributedDataParallel joins them
        assert np.allclose(sum(np.array(p[name]) for p in parts), whole[name], 1e-10, 1e-12)
    for part in parts:
        for name in ("mean", "var"):
            assert np.allclose(part[name], whole[name], 1e-12, 0)
        assert part["eval"]


@pytest.mark.parametrize(("kind", "value"), [("flops", 1_410_376.4), ("params", 4_569.8)])
def test_the_regularizer_is_the_oracle_on_every_process(
    seen: list[dict[str, Any]], alone: ModuleType, kind: str, value: float
) -> None:
    net, graph = alone.concat_network()
    reg = alone.morphnet(graph, net, kind, threshold=0.45)
    net.zero_grad()
    reg.value().backward()
    expected = {
        name: parameter.grad.tolist()
        for name, parameter in net.named_parameters()
        if name.endswith("bn.weight")
    }
    assert len(expected) == 4
    for each in seen:
        found = each["oracle"][kind]
        assert found["value"] == pytest.approx(value, abs=0.15 if kind == "flops" else 0.05)
        assert found["cost"] == reg.live_cost()
        assert found["gradients"] == expected


def test_the_first_process_decides(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        found = each["decisions"]
        assert found["said"] == "made by 0"
        assert found["error"] == "too little"
        assert "process 1 has other data than process 0" in found["refused"]
        assert found["weights"] == [1.0]


def test_a_users_own_training_in_two_processes(
    seen: list[dict[str, Any]], alone: ModuleType
) -> None:
    one = alone.own_loop()
    for each in seen:
        assert each["own_loop"]["plan"] == one["plan"]
        for name, weights in one["weights"].items():
            assert np.allclose(each["own_loop"]["weights"][name], weights, 1e-6, 1e-8)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_an_attached_budget_gives_the_plan_of_one_process(
    seen: list[dict[str, Any]], optimizer: str
) -> None:
    for each in seen:
        one, two = (each["attached"][f"{optimizer} {way}"] for way in ("alone", "shared"))
        assert one["met"]
        assert min(one["widths"]) < 16
        assert two["plan"] == one["plan"]
        assert two["share"] == one["share"]
        assert np.allclose(two["weights"], one["weights"], 1e-6, 1e-8)


def test_sharded_parameters_give_the_plan_of_one_process(seen: list[dict[str, Any]]) -> None:
    one = seen[0]["sharded"]["alone"]
    assert one["met"]
    assert min(one["widths"][1:-1]) < 8
    for each in seen:
        for way in ("before", "after"):
            assert each["sharded"][way]["met"]
            assert each["sharded"][way]["widths"] == one["widths"]
            assert each["sharded"][way]["share"] == pytest.approx(one["share"])


def test_what_a_met_budget_has_taken_of_sharded_parameters_is_read_by_nobody(
    seen: list[dict[str, Any]],
) -> None:
    """The oracle is ONNX Runtime with the resized network."""
    one = seen[0]["settled"]["alone"]
    for found in (one, *(each["settled"]["shared"] for each in seen)):
        assert found["met"]
        assert found["plan"] == one["plan"]
        assert found["off"] < 1e-6
        assert np.allclose(found["answers"], one["answers"], 1e-6, 1e-8)


def arguments(task: Path, model: str, folder: Path, epochs: int, *more: str) -> list[str]:
    line = ["morph", str(task / f"{model}.onnx"), "--data", str(task / "data.npz")]
    return [*line, "-o", str(folder), *SETTINGS, "--shrink-epochs", str(epochs), *more]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in found if event["event"] == kind]


def arms(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "result.json").read_text())["arms"]
    return found


def test_two_processes_come_to_the_plan_of_one(task: Path, tmp_path: Path) -> None:
    """Also if they are killed on the way. Batches of 33 images: shares are of unequal size."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(task, "double", one, 8)) == 0
    line = arguments(task, "double", two, 8, "--resume")
    both = pair("-m", "morphgraph", *line)
    while both[0].poll() is None and len(events(two, "epoch")) < 3:
        time.sleep(0.02)
    for process in both:
        process.kill()
        process.communicate()
    assert not (two / "plan.json").exists()  # it was killed while it learned the structure
    said = [finished(process) for process in pair("-m", "morphgraph", *line)]
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[1][1:] == ("", "")  # only the first process speaks
    assert len(events(two, "resumed")) == 1
    assert (two / "plan.json").read_bytes() == (one / "plan.json").read_bytes()
    assert arms(two) == arms(one)  # accuracies to the last digit
    losses = [[e["loss"] for e in events(folder, "epoch")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert "written:" in said[0][1]


def test_single_precision_agrees_to_rounding_while_that_is_small(
    task: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(task, "single", one, 1)) == 0
    line = ("-m", "morphgraph", *arguments(task, "single", two, 1))
    code, out, err = finished(started("-m", *TORCHRUN, *line))
    assert code == 0, err
    assert out.count("written:") == 1
    assert (two / "plan.json").read_bytes() == (one / "plan.json").read_bytes()
    losses = [events(folder, "epoch")[0]["loss"] for folder in (one, two)]  # five steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    written = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert sorted(str(path.relative_to(two)) for path in two.rglob("*")) == written


@pytest.mark.parametrize("way", ["--elastic", "--distill=4"])
def test_from_trained_weights_two_processes_come_to_the_network_of_one(
    task: Path, tmp_path: Path, way: str
) -> None:
    """One epoch of five steps, which is as long as rounding stays small in single precision."""
    one, two = tmp_path / "one", tmp_path / "two"
    line = ["morph", str(task / "single.onnx"), "--data", str(task / "data.npz"), "--bf16", "off"]
    line += ["--from-trained", way, "--budgets", "50%,80%", "--epochs", "1", "--lr", "0.02"]
    line += ["--batch-size", "33", "--refit", "64", "--round-to", "1"]
    assert main([*line, "-o", str(one)]) == 0
    command = ("-m", *TORCHRUN, "-m", "morphgraph", *line, "-o", str(two))
    code, _, err = finished(started(*command))
    assert code == 0, err
    names = sorted(path.name for path in one.glob("slim*.onnx"))
    assert len(names) == 2
    for name in names:
        first, second = weights(one / name), weights(two / name)
        assert list(second) == list(first)
        for key, values in first.items():
            np.testing.assert_allclose(second[key], values, 1e-4, 1e-5)
    trained = weights(one / names[0])
    assert any(
        values.shape == trained[key].shape and not np.allclose(values, trained[key], 1e-3)
        for key, values in weights(task / "single.onnx").items()
        if key in trained
    )


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def test_what_cannot_be_is_one_line_per_process(seen: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(seen):
        said = each["refusal"]
        assert (said["code"], said["out"], said["err"].count("\n")) == (1, "", 1)
        assert ("process 1: " in said["err"]) == (rank == 1)
        assert "cannot be met" in said["err"]
