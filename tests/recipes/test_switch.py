"""Runs of a file with an If that an input decides: trained is the branch that it is fixed to.

ONNX Runtime runs the file as it is.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.cli import main
from morphgraph.errors import VerificationError
from morphgraph.recipes.data import load_data
from morphgraph.recipes.run import run
from morphgraph.recipes.settings import Settings
from morphgraph.recipes.sweep import grid, sweep
from morphgraph.recipes.trainer import Recipe
from morphgraph.train.config import SearchConfig

SHAPES = {"w0": (8, 1, 3, 3), "w1": (12, 8, 3, 3), "w2": (12, 8, 1, 1), "w3": (10, 12)}
QUICK = ("--shrink-epochs", "1", "--epochs", "1", "--batch-size", "16")
FIX = ("--fix", "fine=true")


def switched() -> onnx.ModelProto:
    """A classifier with a convolution of 3x3, or one of 1x1, as ``fine`` says."""
    weights = ", ".join(f"float[{','.join(map(str, s))}] {name}" for name, s in SHAPES.items())
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 20]>
        net (float[B,1,8,8] image, bool fine) => (float[B,10] y) <{weights}> {{
            a = Conv<pads=[1,1,1,1]>(image, w0)  r = Relu(a)
            c = If (fine) <
                then_branch = t () => (float[B,12,8,8] p) {{ p = Conv<pads=[1,1,1,1]>(r, w1) }},
                else_branch = e () => (float[B,12,8,8] q) {{ q = Conv(r, w2) }}>
            d = Relu(c)  m = GlobalAveragePool(d)  f = Flatten(m)  y = Gemm<transB=1>(f, w3) }}""")
    generator = np.random.default_rng(0)
    del model.graph.value_info[:]
    for name, shape in SHAPES.items():
        array = generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype("f4"), name))
    return model


@pytest.fixture
def task(tmp_path: Path) -> tuple[Path, Path]:
    """``switched.onnx``, and 64 random images of ten classes."""
    onnx.save(switched(), tmp_path / "switched.onnx")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    labels = np.arange(64) % 10
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return tmp_path / "switched.onnx", tmp_path / "d.npz"


def command(*words: object, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code


def given(path: Path, **feeds: Array) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    return np.asarray(found)


def test_without_a_value_it_is_told(
    task: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = task
    command("morph", model, "--data", data, "--budget", "flops=60%", "-o", tmp_path / "r", code=3)
    assert "--fix fine=true or --fix fine=false" in capsys.readouterr().err


def test_the_branch_is_trained(
    task: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = task
    line = ("morph", model, "--data", data, "--budget", "flops=60%", *QUICK)
    command(*line, *FIX, "-o", tmp_path / "r")
    for name in ("base", "slim"):
        made = mg.load(tmp_path / "r" / f"{name}.onnx")
        assert [value.name for value in made.graph.inputs] == ["image"]
        assert json.loads(made.metadata_props["morphgraph.fixed"]) == {"fine": True}
    images = np.random.default_rng(1).normal(size=(4, 1, 8, 8)).astype(np.float32)
    wanted = given(model, image=images, fine=np.array(True))
    np.testing.assert_allclose(given(tmp_path / "r" / "base.onnx", image=images), wanted, atol=1e-5)
    base, slim = (mg.lift(tmp_path / "r" / f"{name}.onnx") for name in ("base", "slim"))
    assert mg.cost(slim, "flops").total <= 0.6 * mg.cost(base, "flops").total
    plan = mg.Plan.load(tmp_path / "r" / "plan.json")
    assert plan.model.lift.fixed == {"fine": True}
    mg.apply(model, plan)  # of the file as it is
    capsys.readouterr()
    command(*line, "--fix", "fine=false", "-o", tmp_path / "r", "--resume", code=2)
    assert "is another run: model.fixed.fine was true, is false" in capsys.readouterr().err
    command("report", tmp_path / "r", "--seconds", 0, "-o", tmp_path / "r.html")
    assert "the original: holds for" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", "flops=60%"),
        ("--from-trained", "--budget", "flops=60%"),
        ("--from-trained", "--budgets", "75%,50%", "--cost", "params"),
        ("--from-trained", "--elastic", "--budgets", "75%,50%"),
    ],
    ids=["new", "trained", "family", "elastic"],
)
def test_the_command_of_a_card_makes_the_network_again(
    words: tuple[str, ...],
    task: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = task
    quick = (*QUICK[4:], "--epochs", "1") if "--from-trained" in words else QUICK
    command("morph", model, "--data", data, *FIX, *words, *quick, "-o", tmp_path / "r")
    capsys.readouterr()
    command("card", tmp_path / "r")
    block = capsys.readouterr().out.partition("```console\n")[2].partition("```")[0]
    line = shlex.split(block.replace("MODEL", str(model)).replace("RUN", str(tmp_path / "again")))
    assert line[0] == "morphgraph"
    command(*[str(data) if word == "d" else word for word in line[1:]], *quick)
    found: list[Any] = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("r", "again")
    ]
    for result in found:
        del result["seconds"]
    assert found[0] == found[1]


def test_commands_of_a_file_fix_the_first_of_several_resizes(
    task: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = mg.lift(task[0], fixed={"fine": True})
    once = mg.apply(graph, mg.plan(graph, {"flops": "80%"}))
    again = mg.lift(once)
    mg.save(mg.apply(again, mg.plan(again, {"flops": "80%"})), tmp_path / "twice.onnx")
    command("card", tmp_path / "twice.onnx")
    block = capsys.readouterr().out.partition("```console\n")[2].partition("```")[0]
    plans = [line for line in block.splitlines() if line.startswith("morphgraph plan")]
    assert ["--fix fine=true" in line for line in plans] == [True, False]


def test_another_network_than_the_files_is_not_trained(
    task: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = task
    graph = mg.lift(model, fixed={"fine": True})
    weight = graph.model.graph.initializers["w3"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(2 * weight.const_value.numpy(), name="w3")
    settings = Settings(SearchConfig({"flops": "60%"}), Recipe(1), Recipe(1))
    images = load_data(str(data), size=(8, 8), channels=1)
    for start in (
        lambda: run(graph, images, settings, tmp_path / "r"),
        lambda: sweep(graph, images, grid(settings, {"flops": ["60%"]}), tmp_path / "s"),
    ):
        with pytest.raises(VerificationError, match="of the network for fine=true is off"):
            start()
    assert not (tmp_path / "r").exists()


@pytest.mark.long
def test_a_sweep_of_the_branch(task: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = task
    line = ("sweep", model, "--data", data, "--budget", "flops=60%", "--seeds", 1, *QUICK)
    command(*line, *FIX, "--method", "morph,uniform", "-o", tmp_path / "s")
    rows = [json.loads(row) for row in (tmp_path / "s" / "rows.jsonl").read_text().splitlines()]
    whole = mg.cost(mg.lift(model, fixed={"fine": True}), "flops").total
    assert len(rows) == 2
    for row in rows:
        name = "slim" if row["method"] == "morph" else row["method"]
        slim = onnx.load(tmp_path / "s" / row["folder"] / f"{name}.onnx")
        assert [value.name for value in slim.graph.input] == ["image"]
        assert row["costs"]["flops"] <= 0.6 * whole
    # The other branch is another network, whose runs are none of these.
    command(*line, "--fix", "fine=false", "--method", "uniform", "-o", tmp_path / "s")
    assert len((tmp_path / "s" / "rows.jsonl").read_text().splitlines()) == 3
