"""``morph --from-trained``: what a folder holds, and nested networks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from morphgraph.cli import main
from morphgraph.onnx_io import load, save
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.nested import Ranking
from morphgraph.plans import Plan
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and ``data.npz``, 160 images of ten classes."""
    folder = tmp_path_factory.mktemp("task")
    save(export(residual_cnn((8,)), (image(2),), dynamic_batch=True), folder / "model.onnx")
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 10
    images = rng.integers(0, 128, (160, 8, 8), dtype=np.uint8)
    images[np.arange(160), labels % 8, labels // 2] += 127
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return folder


def line(task: Path, folder: Path, *more: str) -> list[str]:
    model, data = str(task / "model.onnx"), str(task / "data.npz")
    common = ["--from-trained", "--batch-size", "16", "--bf16", "off", "--round-to", "1"]
    return ["morph", model, "--data", data, "-o", str(folder), *common, *more]


def test_a_family_is_written_measured_and_nested(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(line(task, folder, "--budgets", "50%,75%", "--epochs", "1", "--refit", "64")) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert [member["name"] for member in result["family"]] == ["slim-75", "slim-50"]
    graph = lift(load(task / "model.onnx"))
    whole, kept = cost(graph, "flops").total, []
    data = np.load(task / "data.npz")
    pixels = data["x_train"].astype(np.float32) / 255
    inputs = ((pixels - pixels.mean()) / pixels.std())[:, None]
    for member, share in zip(result["family"], (0.75, 0.5), strict=True):
        model = lift(load(folder / member["model"]))
        flops = cost(model, "flops").total
        assert flops == member["cost"]["flops"]["after"] <= share * whole
        assert result["arms"][member["name"]]["epochs"] == 1
        assert member["error"] < 1e-4 < member["sensitivity"]
        session = onnxruntime.InferenceSession(folder / member["model"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: inputs})
        right = float((scores.argmax(1) == data["y_train"]).mean())
        assert right == pytest.approx(member["accuracy"], abs=0.01)
        kept.append(Plan.load(folder / member["plan"]).keep_channels(graph))
    for index, positions in kept[0].items():
        assert set(kept[1][index].tolist()) <= set(positions.tolist())
    between = Ranking.load(folder / "ranking.json").plan(graph, {"flops": "60%"})
    assert 0.4 * whole < between.cost["flops"].after <= 0.6 * whole
    assert (folder / "curves.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--budgets", "75%,,50%"), "empty place"),
        (("--budgets", "75%", "--budget", "flops=50%"), "one network, or --budgets"),
        (("--budgets", "50%,50%"), "none is below the other"),
        (("--budget", "flops=50%", "--baselines"), "for new networks"),
        (("--budget", "flops=50%", "--epochs", "2", "--shrink-epochs", "2"), "more epochs in all"),
        ((), "Missing option '--budget'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    fragment: str,
) -> None:
    assert main(line(task, tmp_path / "run", *arguments)) == 2
    said = capsys.readouterr().err
    assert fragment in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_several_budgets_are_for_trained_networks(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = line(task, tmp_path / "run", "--budgets", "50%")
    given.remove("--from-trained")
    assert main(given) == 2
    assert "add --from-trained" in capsys.readouterr().err
