"""``morph --from-trained --elastic`` and ``slice``: one set of weights, networks for any budget."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.onnx_io import load, save
from morphgraph.passes.planning.nested import Ranking
from morphgraph.plans import Plan
from morphgraph.testing.examples import image, residual_cnn

SHARES = (0.7, 0.4)


def pixels() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of ten classes, and the classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 10
    images = rng.integers(0, 128, (160, 8, 8), dtype=np.uint8)
    images[np.arange(160), labels % 8, labels // 2] += 127
    return images, labels


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network and its data, and the run."""
    folder = tmp_path_factory.mktemp("elastic")
    save(mg.export(residual_cnn((12,)), (image(2),), dynamic_batch=True), folder / "model.onnx")
    images, labels = pixels()
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    scaled = images.astype(np.float32) / 255
    np.save(folder / "inputs.npy", ((scaled - scaled.mean()) / scaled.std())[:, None])
    assert main(line(folder, folder / "run", "--budgets", "40%,70%,100%")) == 0
    return folder


def line(task: Path, folder: Path, *more: str) -> list[str]:
    data = str(task / "data.npz")
    common = ["--from-trained", "--elastic", "--bf16", "off", "--round-to", "1", "--lr", "0.02"]
    sizes = ["--batch-size", "16", "--epochs", "3", "--refit", "64"]
    model = str(task / "model.onnx")
    return ["morph", model, "--data", data, "-o", str(folder), *common, *sizes, *more]


def cut(task: Path, output: Path, *more: str) -> list[str]:
    folder = task / "run"
    files = [str(folder / "elastic.onnx"), str(folder / "ranking.json")]
    return ["slice", *files, "-o", str(output), "--round-to", "1", *more]


def weights(path: Path) -> dict[str, NDArray[Any]]:
    tensors = load(path).graph.initializers
    return {n: v.const_value.numpy() for n, v in tensors.items() if v.const_value is not None}


def answers(path: Path, inputs: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs})
    return np.asarray(found)


def test_the_run_writes_the_whole_network_and_a_slice_for_every_budget(task: Path) -> None:
    folder, inputs = task / "run", np.load(task / "inputs.npy")
    result = json.loads((folder / "result.json").read_text())
    assert list(result["arms"]) == ["base", "elastic", "slim-70", "slim-40"]
    graph = mg.lift(folder / "elastic.onnx")
    whole, trained = mg.cost(graph, "flops").total, weights(folder / "elastic.onnx")
    assert any(
        not np.array_equal(value, trained[name])
        for name, value in weights(task / "model.onnx").items()
    )
    for member, share in zip(result["family"], SHARES, strict=True):
        file = folder / member["model"]
        assert mg.cost(mg.lift(file), "flops").total <= share * whole
        cut_out = mg.apply(graph, Plan.load(folder / member["plan"]), verify=False)
        sliced = weights(file)
        for name, value in cut_out.graph.initializers.items():
            if "running" not in name and value.const_value is not None:
                np.testing.assert_array_equal(sliced[name], value.const_value.numpy())
        statistics = [name for name in sliced if "running" in name]
        assert statistics
        assert not any(np.allclose(sliced[n], trained[n][: len(sliced[n])]) for n in statistics)
        right = float((answers(file, inputs).argmax(1) == pixels()[1]).mean())
        assert right == pytest.approx(member["accuracy"], abs=0.01)
        assert member["error"] < 1e-4 < member["sensitivity"]
        assert result["arms"][member["name"]]["epochs"] == 3


@pytest.mark.parametrize(
    ("kind", "amount", "share"),
    [("flops", "55%", 0.55), ("params", "50%", 0.5), ("latency@P100", "70%", 0.7)],
)
def test_a_slice_for_any_budget_between(
    task: Path, tmp_path: Path, kind: str, amount: str, share: float
) -> None:
    """Without training: its kernels are the whole network's, its statistics those of the data."""
    output, data = tmp_path / "slim.onnx", str(task / "inputs.npy")
    assert main(cut(task, output, "--budget", f"{kind}={amount}", "--data", data)) == 0
    graph = mg.lift(task / "run" / "elastic.onnx")
    found, whole = (mg.cost(each, kind).total for each in (mg.lift(output), graph))
    assert (share - 0.15) * whole < found <= share * whole
    ranking = Ranking.load(task / "run" / "ranking.json")
    plan = ranking.plan(graph, {kind: amount}, round_to=1)
    expected = mg.refresh_statistics(mg.apply(graph, plan, verify=False), [np.load(data)])
    again = tmp_path / "again.onnx"
    save(expected, again)
    inputs = np.load(data)
    np.testing.assert_allclose(answers(output, inputs), answers(again, inputs), 1e-4, 1e-4)


def test_a_killed_run_goes_on(task: Path, tmp_path: Path) -> None:
    """Trained already, it is resumed for what follows, and nothing else is said of it."""
    folder = tmp_path / "run"
    arguments = line(task, folder, "--budget", "flops=40%", "--epochs", "1", "--resume")
    assert main(arguments) == 0
    before = weights(folder / "elastic.onnx")
    (folder / "result.json").unlink()
    assert main(arguments) == 0
    after = weights(folder / "elastic.onnx")
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert (folder / "slim.onnx").exists()


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (("--budget", "flops=50%", "--shrink-epochs", "1"), "leave out --shrink-epochs"),
        (("--budget", "flops=50%", "--distill-inside", "1"), "and --distill-inside"),
        (("--budget", "flops=100%"), "the whole network meets every budget"),
    ],
)
def test_what_makes_no_sense_is_refused(
    task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    fragment: str,
) -> None:
    assert main(line(task, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert fragment in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_elastic_is_for_trained_networks(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = line(task, tmp_path / "run", "--budget", "flops=50%")
    given.remove("--from-trained")
    assert main(given) == 2
    assert "--elastic begins with a trained network; add --from-trained" in capsys.readouterr().err


def test_slices_that_cannot_be(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "slim.onnx"
    assert main(cut(task, output, "--budget", "flops=20%")) == 1
    assert "the smallest rung of the ranking is above it" in capsys.readouterr().err
    plan = str(task / "run" / "plan-40.json")
    given = ["slice", str(task / "model.onnx"), plan, "-o", str(output), "--budget", "flops=50%"]
    assert main(given) == 3
    assert "is no ranking" in capsys.readouterr().err
    assert not output.exists()
    assert main(cut(task, output, "--budget", "flops=50%")) == 0
    assert "give inputs" in capsys.readouterr().err
