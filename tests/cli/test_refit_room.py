"""``plan --for-refit`` and ``apply --refit``: budgets that hold with the biases of the fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text
from tests.test_room import MLP, OPSET, noise


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    mg.save(model_from_text(OPSET + MLP, ("x",), 0), "model.onnx")
    np.savez("calib.npz", x=noise(60, 4, 6))
    return tmp_path


def test_on_the_command_line(files: Path, run: Any) -> None:
    budget = ("--budget", "params=50%", "--round-to", "1")
    planned = ("plan", "model.onnx", "--score", "data", "--data", "calib.npz", *budget)
    ran = run(*planned, "--for-refit", "-o", "roomy.json")
    assert ran.code == 0
    assert "left after refit" in ran.out
    following = "morphgraph apply model.onnx roomy.json --refit calib.npz -o slim.onnx"
    assert following in ran.err
    ran = run(*following.split()[1:])
    assert ran.code == 0
    assert "budget" not in ran.err
    total = mg.cost(lift("model.onnx"), "params").total
    assert 0.485 * total <= mg.cost(lift("slim.onnx"), "params").total <= 0.5 * total

    assert run(*planned, "-o", "plain.json").code == 0
    ran = run("apply", "model.onnx", "plain.json", "--refit", "calib.npz", "-o", "more.onnx")
    assert ran.code == 0
    assert "keeps no room" in ran.err
    ran = run("apply", "model.onnx", "plain.json", "--refit", "calib.npz", "--dry-run",
              "-o", "none.onnx", "--format", "json")  # fmt: skip
    assert json.loads(ran.out)["cost"]["params"]["after"] > 0.5 * total
    assert "keeps no room" in ran.err
    assert not Path("none.onnx").exists()
    ran = run("plan", "model.onnx", "--uniform", "0.5", "--for-refit")
    assert (ran.code, "--budget" in ran.err) == (2, True)


def test_a_plan_for_a_device_that_nobody_here_has_measured(files: Path, run: Any) -> None:
    """Its latency is told as the plan has it, and counted no more."""
    words = ("--budget", "latency@P100=60%", "--round-to", "1", "-o", "plan.json")
    assert run("plan", "model.onnx", *words).code == 0
    plan = Path("plan.json")
    plan.write_text(plan.read_text().replace("latency@P100", "latency@elsewhere"))
    cost = json.loads(plan.read_text())["cost"]["latency@elsewhere"]
    for refit in ((), ("--refit", "calib.npz")):
        applying = ("apply", "model.onnx", "plan.json", *refit, "-o", "slim.onnx", "--overwrite")
        told = run(*applying, "--dry-run", "--format", "json")
        assert told.code == 0, told.err
        assert json.loads(told.out)["cost"]["latency@elsewhere"] == cost
        assert run(*applying).code == 0
        card = run("card", "slim.onnx").out
        assert "--budget latency=60% --device elsewhere.json" in card
    more = ("--budget", "flops=100%", "-o", "wide.json", "--dry-run")
    assert run("expand", "model.onnx", "plan.json", *more).code == 0


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("request", {"budget": {"flops": None}}),
        ("request", {"budget": {"beauty": "5%"}}),
        ("request", {"budget": [1]}),
        ("request", {"convention": [], "refit": []}),
        ("request", {"convention": {}, "refit": {"flops": "x"}}),
        ("request", {"convention": 5, "refit": 5}),
        ("cost", {"beauty": {"before": 1, "after": 1}}),
        ("cost", {"latency@../secret.json": {"before": 1, "after": 1}}),
        ("cost", {"flops": {"before": 0, "after": 5}}),
    ],
)
def test_what_a_plan_says_of_itself_may_be_anything(
    field: str, content: Any, files: Path, run: Any
) -> None:
    assert run("plan", "model.onnx", "--budget", "params=60%", "-o", "plan.json").code == 0
    plan = json.loads(Path("plan.json").read_text())
    plan[field] = content
    Path("plan.json").write_text(json.dumps(plan))
    for rest in (("--dry-run",), ("--refit", "calib.npz"), ("--refit", "calib.npz", "--dry-run")):
        ran = run("apply", "model.onnx", "plan.json", "-o", "s.onnx", "--overwrite", *rest)
        assert ran.code == 0, ran.err
