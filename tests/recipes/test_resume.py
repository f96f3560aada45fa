"""A run that is killed goes on to the same result, to the last digit."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morphgraph.cli import main
from morphgraph.onnx_io import save
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from tests.killed import killed

SETTINGS = (
    *("--shrink-epochs", "3", "--epochs", "2", "--batch-size", "16", "--iterations", "2"),
    *("--budget", "flops=60%", "--crop", "1", "--flip", "--baseline", "l2", "--bf16", "off"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and ``data.npz``, 160 images of ten classes."""
    folder = tmp_path_factory.mktemp("task")
    save(export(residual_cnn((6, 8)), (image(2),), dynamic_batch=True), folder / "model.onnx")
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 10
    images = rng.integers(0, 128, (160, 8, 8), dtype=np.uint8)
    images[np.arange(160), labels % 8, labels // 2] += 127
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return folder


def arguments(task: Path, folder: Path, *more: str) -> list[str]:
    model, data = str(task / "model.onnx"), str(task / "data.npz")
    return ["morph", model, "--data", data, "-o", str(folder), *SETTINGS, *more]


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def outcome(folder: Path) -> dict[str, object]:
    """What a run came to: files byte by byte, all numbers but times."""
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    names = ["plan.json", "iteration-1/plan.json", "iteration-2/plan.json"]
    names += ["slim.onnx", "base.onnx", "l2.onnx", "iteration-1/model.onnx"]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    told = [
        {k: v for k, v in event.items() if k not in {"at", "left", "seconds"}}
        for event in events(folder)
        if event["event"] != "resumed"
    ]
    return {"result": result, "files": files, "events": told}


@pytest.mark.long
def test_a_run_killed_at_any_moment_goes_on_to_the_same_result(task: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "undisturbed", tmp_path / "killed"
    assert main(arguments(task, folder)) == 0
    chance = random.Random(0)
    line = arguments(task, other, "--resume", "--checkpoint-seconds", "0.05")

    def at(event: str, **fields: object) -> Callable[[], bool]:
        wanted = {"event": event, **fields}
        return lambda: any(wanted.items() <= found.items() for found in events(other))

    moments = [
        lambda: True,
        at("epoch", phase="shrink-1", number=1),
        at("epoch", phase="shrink-1", number=3),
        at("iteration", number=1),
        at("phase", phase="shrink-2"),
        at("epoch", phase="retrain", number=1),
        at("arm", name="slim"),
        at("phase", phase="l2"),
    ]
    alive = [killed(main, (line,), moment, chance.uniform(0.0, 0.1)) for moment in moments]
    assert sum(alive) >= 6  # it really was killed while it ran
    assert not (other / "result.json").exists()
    # A line of the log and a file that a kill has left half written.
    with (other / "events.jsonl").open("a") as log:
        log.write('{"event": "epoch", "pha')
    (other / ".plan.json.abc").write_bytes(b"{")
    assert main(line) == 0
    assert outcome(other) == outcome(folder)
    assert not (other / "checkpoints").exists()
    assert not list(other.rglob(".*"))
    times = [event["at"] for event in events(other)]
    assert times == sorted(times)


@pytest.mark.long
def test_a_family_killed_at_any_moment_goes_on_to_the_same_result(
    task: Path, tmp_path: Path
) -> None:
    """With a learned ranking, whose networks and optimizer states come from its phase."""
    whole, other = tmp_path / "undisturbed", tmp_path / "killed"
    model, data = str(task / "model.onnx"), str(task / "data.npz")
    line = ["morph", model, "--data", data, "--from-trained", "--batch-size", "16", "--bf16", "off"]
    line += ["--budgets", "75%,50%", "--epochs", "5", "--shrink-epochs", "3", "--refit", "64"]
    assert main([*line, "-o", str(whole)]) == 0
    again = [*line, "-o", str(other), "--resume", "--checkpoint-seconds", "0.05"]

    def at(**wanted: object) -> Callable[[], bool]:
        return lambda: any(wanted.items() <= found.items() for found in events(other))

    moments = [
        at(event="epoch", phase="shrink-1", number=2),
        at(event="resized", name="slim-75"),
        at(event="epoch", phase="tune slim-75", number=1),
        at(event="phase", phase="tune slim-50"),
    ]
    assert sum(killed(main, (again,), moment, 0.02) for moment in moments) >= 3
    assert main(again) == 0
    assert outcome(other) == outcome(whole)
    for name in ("slim-75.onnx", "slim-50.onnx", "plan-75.json", "plan-50.json", "ranking.json"):
        assert (other / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_says_so(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*arguments(task, folder), "--resume"]) == 0  # there is none yet: it begins
    before, first = outcome(folder), capsys.readouterr()
    assert main([*arguments(task, folder), "--resume"]) == 0
    again = capsys.readouterr()
    assert (again.out, outcome(folder)) == (first.out, before)
    assert "finished already" in again.err
    assert "epoch" not in again.err


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (("--lr", "0.2"), "settings.shrink.lr was 0.1, is 0.2"),
        (("--budget", "params=50%"), "settings.aim.budget.params was null, is"),
        (("--seed", "1"), "settings.seed was 0, is 1"),
    ],
)
def test_another_run_is_not_gone_on_with(
    task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
    fragment: str,
) -> None:
    folder = tmp_path / "run"
    killed(main, (arguments(task, folder),), (folder / "run.json").exists)
    capsys.readouterr()
    assert main([*arguments(task, folder), *changes, "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert fragment in said


def test_another_model_or_other_data_are_not_gone_on_with(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "task"
    elsewhere.mkdir()
    killed(main, (arguments(task, folder),), (folder / "run.json").exists)
    capsys.readouterr()
    model, data = (task / "model.onnx").read_bytes(), (task / "data.npz").read_bytes()
    (elsewhere / "data.npz").write_bytes(data)
    save(export(residual_cnn((6, 8)), (image(2),), dynamic_batch=True), elsewhere / "model.onnx")
    assert main([*arguments(elsewhere, folder), "--resume"]) == 2
    assert "model.weights was" in capsys.readouterr().err
    (elsewhere / "model.onnx").write_bytes(model)
    arrays = dict(np.load(task / "data.npz"))
    arrays["y_test"] = arrays["y_test"][::-1].copy()
    np.savez(elsewhere / "data.npz", **arrays)
    assert main([*arguments(elsewhere, folder), "--resume"]) == 2
    assert "data.sha256 was" in capsys.readouterr().err
