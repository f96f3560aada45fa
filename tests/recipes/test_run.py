"""Runs of ``morph``: what a folder holds, and what is refused before anything is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphgraph.cli import main
from morphgraph.onnx_io import load, save, static_shape
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.plans import Plan
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.workflow import apply

QUICK = ("--shrink-epochs", "1", "--epochs", "1", "--batch-size", "16", "--budget", "flops=50%")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and ``data.npz``, 64 random images of ten classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("task")
    save(export(residual_cnn((8, 12)), (image(2),), dynamic_batch=True), folder / "model.onnx")
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
    whole = cost(lift(load(task / "model.onnx")), "macs").total
    for name in ("slim", "uniform", "l2", "bn", "random"):
        macs = cost(lift(load(folder / f"{name}.onnx")), "macs").total
        assert 0.46 * whole < macs <= 0.5 * whole  # one channel of the widest group is 4 %
        assert macs == arms[name]["macs"]
    assert {arm["epochs"] for arm in arms.values()} == {2}
    before = (folder / "result.json").read_bytes()
    assert morph(task, folder) == 4
    assert (folder / "result.json").read_bytes() == before
    assert morph(task, folder, "--overwrite") == 0
    assert not (folder / "uniform.onnx").exists()


def test_early_words_stand_in_the_log_and_are_told(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four small steps are too few to find a structure."""
    folder = tmp_path / "run"
    assert morph(task, folder, "--lr", "0.001") == 0
    said = capsys.readouterr().err
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    words = [event["name"] for event in events if event["event"] == "warning"]
    assert any("the phase ends at" in text and "train longer" in text for text in words)
    assert all(said.count(text) == 1 for text in words)
    (found,) = result_of(folder)["iterations"]
    assert not found["met"]
    assert found["live"] > found["target"]


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("--round-to", "64"), 1, "cannot be met"),
        (("--budget", "memory=lots"), 2, "lots"),
        (("--budget", "flops=50%"), 2, "given twice"),
        (("--crop", "-1"), 2, "--crop"),
        (("--budget", "params=0.1%"), 1, "cannot be met"),
        (("--cost", "beauty"), 2, "beauty"),
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


@pytest.mark.parametrize("place", ["base.onnx", "iteration-1/model.onnx"])
def test_the_model_is_never_replaced(task: Path, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "run"
    model = folder / place
    model.parent.mkdir(parents=True)
    model.write_bytes((task / "model.onnx").read_bytes())
    before = model.read_bytes()
    data = str(task / "data.npz")
    code = main(["morph", str(model), "--data", data, "-o", str(folder), *QUICK, "--overwrite"])
    assert (code, model.read_bytes()) == (4, before)


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--iterations", "2"),
        ("--iterations", "2", "--min-width", "0", "--shrink-to", "0.2"),
        ("--budget", "params=40%", "--cost", "params"),
        ("--cost", "params", "--weights", "fresh"),
        ("--budget", "latency=90%", "--cost", "latency", "--round-to", "2"),
        ("--absorb", "--strength", "lasso"),
        ("--update", "subgradient"),
        ("--relative",),
    ],
)
def test_the_plan_is_of_the_original_and_gives_the_network_that_was_trained(
    task: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    assert morph(task, folder, *arguments) == 0
    graph, plan = lift(load(task / "model.onnx")), Plan.load(folder / "plan.json")
    told, result = lift(apply(graph, plan)), result_of(folder)
    trained = lift(load(folder / "slim.onnx"))
    names = [set(g.model.graph.initializers) for g in (told, trained)]
    shapes = [
        {n: static_shape(g.model.graph.initializers[n]) for n in names[0] & names[1]}
        for g in (told, trained)
    ]
    assert shapes[0] == shapes[1]
    assert names[0] <= names[1]  # what was absorbed has constants of its own
    for kind in ("flops", "params", "latency"):
        if kind in result["budget"]:
            share = float(result["budget"][kind].rstrip("%")) / 100
            assert cost(trained, kind).total <= share * cost(graph, kind).total
            assert cost(told, kind).total == pytest.approx(plan.cost[kind].after)
    assert result["iterations"][-1]["cost"] == result["cost"]
    for found in result["iterations"]:
        own = Plan.load(folder / found["plan"])
        widths = {graph.groups[k].id: int(w) for k, w in enumerate(own.widths(graph))}
        assert {key: told["grown"] for key, told in found["widths"].items()} == {
            key: width for key, width in widths.items() if key in found["widths"]
        }
        assert cost(lift(load(folder / found["model"])), "flops").total == pytest.approx(
            own.cost["flops"].after
        )


def test_a_whole_budget_gives_another_network_of_the_same_cost(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("--shrink-epochs", "30", "--baselines", "--round-to", "1")
    data, model = str(task / "data.npz"), str(task / "model.onnx")
    line = ["morph", model, "--data", data, "-o", str(folder), *QUICK[2:-2], "--budget"]
    assert main([*line, "flops=100%", *arguments]) == 0
    result = result_of(folder)
    change = result["cost"]["flops"]
    assert 0.96 * change["before"] < change["after"] <= change["before"]
    assert set(result["arms"]) == {"base", "slim"}  # nothing is to be pruned
    (found,) = result["iterations"]
    assert any(w["shrunk"] < w["before"] < w["grown"] for w in found["widths"].values())


def test_smoke_says_pass_or_fail(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = str(task / "model.onnx"), str(task / "data.npz")
    line = ["morph", model, "--data", data, *QUICK, "--smoke"]
    assert main(line) == 0
    assert "passed" in capsys.readouterr().out
    # A network that cannot shrink: the penalty has nothing to act on.
    pinned = task / "pinned.onnx"
    save(
        export(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), (image(2),)),
        pinned,
    )
    assert main(["morph", str(pinned), *line[2:]]) == 1
    assert "FAIL: nothing can shrink" in capsys.readouterr().out
