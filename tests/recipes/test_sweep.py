"""Sweeps: the same rows wherever they are computed, each of them once."""

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphgraph.cli import main
from morphgraph.onnx_io import load, save
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.recipes.settings import Settings
from morphgraph.recipes.sweep import grid
from morphgraph.recipes.trainer import Recipe
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.train.config import SearchConfig

ROOT = Path(__file__).parents[2]
QUICK = ("--shrink-epochs", "1", "--epochs", "1", "--batch-size", "128", "--bf16", "off")
GRID = ("--budget", "flops=50%,80%", "--method", "morph,uniform,l2,base", "--seeds", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("task") / "model.onnx"
    save(export(residual_cnn((6, 8)), (image(2),), dynamic_batch=True), path)
    return path


def line(model: Path, folder: Path, *arguments: str) -> list[str]:
    return ["sweep", str(model), "--data", "digits", *QUICK, "-o", str(folder), *arguments]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by two local processes."""
    folder = tmp_path_factory.mktemp("local") / "sweep"
    assert main(line(model, folder, *GRID, "--jobs", "2")) == 0
    assert not multiprocessing.active_children()
    return folder


@pytest.mark.long
def test_rows_are_what_runs_of_morph_come_to(model: Path, local: Path, tmp_path: Path) -> None:
    found = {(row["method"], *row["budget"].items()): row for row in rows_of(local)}
    assert len(found) == 2 * 3 + 1
    budget = ("flops", "50%")
    names = {"morph": "slim", "uniform": "uniform", "l2": "l2", "base": "base"}
    arguments = ["--budget", "flops=50%", "--baseline", "uniform", "--baseline", "l2"]
    run = ["morph", str(model), "--data", "digits", *QUICK, "-o", str(tmp_path), *arguments]
    assert main(run) == 0
    arms = json.loads((tmp_path / "result.json").read_text())["arms"]
    whole = lift(load(model))
    for method, name in names.items():
        row = found[method, ("flops", "100%") if method == "base" else budget]
        own = lift(load(tmp_path / f"{name}.onnx"))
        assert row["accuracy"] == arms[name]["accuracy"]
        assert row["epochs"] == arms[name]["epochs"] == 2
        for kind in ("flops", "params"):
            assert row["costs"][kind] == cost(own, kind).total
            assert row["shares"][kind] == cost(own, kind).total / cost(whole, kind).total


@pytest.mark.long
def test_a_ray_instance_gives_the_same_rows(
    model: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install morphgraph[ray]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers import this very package
    assert main(line(model, tmp_path, *GRID, "--jobs", "2", "--ray", "local")) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == (local / "rows.jsonl").read_bytes()
    assert (tmp_path / "curves.svg").read_bytes() == (local / "curves.svg").read_bytes()


@pytest.mark.long
def test_a_sweep_that_was_killed_goes_on_to_the_same_rows(
    model: Path, local: Path, tmp_path: Path
) -> None:
    own = line(model, tmp_path, *GRID, "--jobs", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "morphgraph", *own], cwd=ROOT, stderr=subprocess.PIPE
    )
    rows = tmp_path / "rows.jsonl"
    while process.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.02)
    process.kill()
    process.communicate()  # its processes, which hold stderr, end with it
    before = len(rows_of(tmp_path))
    assert 0 < before < 7
    with rows.open("a") as file:
        file.write('{"key": "abc", "meth')  # a line that a kill has left half written
    assert main(own) == 0
    assert rows.read_bytes() == (local / "rows.jsonl").read_bytes()


@pytest.mark.long
def test_rows_that_exist_are_not_computed_again(
    model: Path, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = rows_of(local)
    more = ("--budget", "flops=80%", "--method", "uniform", "--seeds", "2")
    assert main(line(model, local, *more, "--format", "json")) == 0
    said = capsys.readouterr()
    assert [text[:4] for text in said.err.splitlines()] == ["2/2:"]
    assert [(row["method"], row["seed"]) for row in json.loads(said.out)] == [
        ("uniform", 0),
        ("uniform", 1),
    ]
    assert all(row in rows_of(local) for row in known)
    assert len(rows_of(local)) == len(known) + 1
    assert main(line(model, local, *more, "--lr", "0.05", "--seeds", "1")) == 0  # other settings
    assert len(rows_of(local)) == len(known) + 2


@pytest.mark.long
def test_a_run_that_fails_does_not_end_the_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At a budget of the whole, the original is trained; ten steps diverge at such a rate.
    own = line(model, tmp_path, "--budget", "flops=50%", "--method", "uniform", "--seeds", "2")
    assert main([*own, "--lr", "1e9"]) == 3
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("uniform-flops-50-seed")) == (1, 1)
    assert "diverged" in said
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert main(own) == 0
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("--budget", "flops=50%,"), 2, "empty place"),
        (("--budget", "flops=50%", "--method", "magic"), 2, "magic"),
        (("--budget", "flops=50%", "--budget", "flops=25%"), 2, "given twice"),
        (("--budget", "flops=50%,lots"), 2, "lots"),
        (("--budget", "flops=50%,0.1%"), 1, "cannot be met"),
        (("--budget", "flops=50%", "--cost", "beauty"), 2, "beauty"),
        (("--budget", "flops=50%", "--seeds", "0"), 2, "--seeds"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
) -> None:
    assert main(line(model, tmp_path / "sweep", *arguments)) == code
    said = capsys.readouterr().err
    assert (said.count("\n"), fragment in said) == (1, True), said
    assert not (tmp_path / "sweep").exists()


def test_where_it_may_run(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = line(model, tmp_path, "--budget", "flops=50%", "--seeds", "1")
    if importlib.util.find_spec("ray"):
        assert main([*own, "--ray", "127.0.0.1:1"]) == 3  # nobody listens there
        assert "no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert main([*own, "--ray", "local"]) == 3
    assert "morphgraph[ray]" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(own) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_a_file_that_is_none_of_ours_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert main(line(model, tmp_path, "--budget", "flops=50%")) == 4
    assert "line 1 is no row" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'


def test_the_grid_repeats_only_what_differs() -> None:
    common = Settings(SearchConfig({"flops": "100%"}), Recipe(1), Recipe(1))
    budgets = {"flops": ("25%", "50%"), "params": ("50%",)}
    found = grid(common, budgets, ("morph", "uniform", "base"), (0, 1), ("flops", "params"))
    asked = [(s.method, *s.aim.budget.items(), s.aim.regularized, s.seed) for s in found]
    assert len(set(asked)) == len(asked) == 2 * (3 * 2 + 3 + 1)
    assert ("morph", ("params", "50%"), "flops", 1) in asked
    assert {entry[2] for entry in asked if entry[0] == "uniform"} == {"flops", "params"}
    assert not any(np.diff([s.seed for s in found if s.method == "base"]) != 1)
