"""Runs of ``morph``: what a folder holds, and what is refused before anything is trained."""

import json
from pathlib import Path

import numpy as np
import pytest

from morphgraph.cli import main
from morphgraph.examples import image, residual_cnn
from morphgraph.onnx_io import load, save
from morphgraph.passes.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.torch_io.export import export

QUICK = ("--shrink-epochs", "1", "--epochs", "1", "--batch-size", "16", "--budget", "flops=50%")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and ``data.npz``, 64 random images of ten classes."""
    folder = tmp_path_factory.mktemp("task")
    save(export(residual_cnn((4, 8)), (image(2),), dynamic_batch=True), folder / "model.onnx")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8), dtype=np.uint8)
    labels = np.arange(64) % 10
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return folder


def morph(task: Path, folder: Path, *arguments: str) -> int:
    model, data = str(task / "model.onnx"), str(task / "data.npz")
    return main(["morph", model, "--data", data, "-o", str(folder), *QUICK, *arguments])


def test_a_run_meets_its_budget_and_leaves_no_file_of_an_earlier_one(
    task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert morph(task, folder, "--baselines") == 0
    arms = json.loads((folder / "result.json").read_text())["arms"]
    assert {arm["file"] for arm in arms.values()} == {"base.onnx", "slim.onnx", "uniform.onnx"}
    whole = cost(lift(load(task / "model.onnx")), "macs").total
    for name in ("slim", "uniform"):
        macs = cost(lift(load(folder / f"{name}.onnx")), "macs").total
        assert macs == arms[name]["macs"] <= 0.5 * whole
    before = (folder / "result.json").read_bytes()
    assert morph(task, folder) == 4
    assert (folder / "result.json").read_bytes() == before
    assert morph(task, folder, "--overwrite") == 0
    assert not (folder / "uniform.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("--round-to", "64"), 1, "cannot be met"),
        (("--budget", "flops=0.1%"), 1, "cannot be met"),
        (("--budget", "flops=lots"), 2, "lots"),
        (("--crop", "-1"), 2, "--crop"),
    ],
)
def test_what_cannot_be_is_refused_before_the_training(
    task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
) -> None:
    folder = tmp_path / "run"
    assert morph(task, folder, *arguments) == code
    said = capsys.readouterr().err
    assert (said.count("\n"), folder.exists()) == (1, False)
    assert fragment in said


def test_a_training_that_diverges_says_so(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert morph(task, tmp_path / "run", "--lr", "1e9") == 3
    assert "diverged" in capsys.readouterr().err


def test_the_model_is_never_replaced(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    model = folder / "base.onnx"
    model.write_bytes((task / "model.onnx").read_bytes())
    before = model.read_bytes()
    data = str(task / "data.npz")
    code = main(["morph", str(model), "--data", data, "-o", str(folder), *QUICK, "--overwrite"])
    assert (code, model.read_bytes()) == (4, before)
