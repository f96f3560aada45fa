"""What a resized file says of where it comes from, held against the files themselves."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.onnx_io import save
from morphgraph.origin import KEYS, Origin
from morphgraph.testing import model_from_text
from tests.conftest import ATTENTION

CHAIN = """
net (float[1,3,8,8] x, float[16,3,3,3] w1, float[8,16,1,1] w2, float[8,10] fc) => (float[1,10] y) {
    a = Conv <pads = [1,1,1,1]> (x, w1)  b = Relu(a)  c = Conv(b, w2)  d = Relu(c)
    e = GlobalAveragePool(d)  f = Flatten(e)  y = MatMul(f, fc)
}"""
CONCAT = """
net (float[1,4,6,6] x, float[8,4,1,1] w1, float[8,4,3,3] w2, float[6,16,1,1] w3)
    => (float[1,6,6,6] y) {
    a = Conv(x, w1)  b = Conv <pads = [1,1,1,1]> (x, w2)  c = Concat <axis = 1> (a, b)
    d = Relu(c)  y = Conv(d, w3)
}"""


def notes(path: Path) -> dict[str, str]:
    """What ONNX itself reads; no key stands there twice."""
    entries = onnx.load(path).metadata_props
    found = {entry.key: entry.value for entry in entries}
    assert len(found) == len(entries)
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("text", [CHAIN, CONCAT, ATTENTION], ids=["chain", "concat", "attention"])
def test_a_file_says_what_it_was_made_of(text: str, tmp_path: Path) -> None:
    base, file, slim = (tmp_path / name for name in ("base.onnx", "plan.json", "slim.onnx"))
    save(model_from_text(text), base)
    graph = mg.lift(base)
    mg.plan(graph, {"flops": "70%"}, round_to=1).save(file)
    mg.save(mg.apply(base, mg.Plan.load(file)), slim)
    said, planned = notes(slim), json.loads(file.read_text())
    assert said["morphgraph.version"] == mg.__version__
    assert said["morphgraph.plan"] == sha256(file)
    assert said["morphgraph.base"] == planned["model"]["structure"]
    assert json.loads(said["morphgraph.budget"]) == {"flops": "70%"}
    costs = json.loads(said["morphgraph.cost"])
    assert costs["params"]["after"] == mg.cost(mg.lift(slim), "params").total
    check = json.loads(said["morphgraph.check"])
    assert check["ok"]
    report = mg.verify(graph, mg.Plan.load(file), mg.load(slim))
    assert check["error"] == pytest.approx(report.worst.relative, rel=0.05)
    onnx.checker.check_model(onnx.load(slim), full_check=True)


def test_a_model_that_is_resized_again_says_so(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.onnx" for k in range(3)]
    save(model_from_text(CHAIN), paths[0])
    plans = []
    for before, after in pairwise(paths):
        plans.append(mg.uniform(mg.lift(before), 0.5))
        mg.save(mg.apply(before, plans[-1], verify=False), after)
    first, second = map(notes, paths[1:])
    assert second.keys() == {*first, "morphgraph.earlier"}
    (earlier,) = json.loads(second["morphgraph.earlier"])
    assert earlier["plan"] == first["morphgraph.plan"]
    assert earlier["base"] == first["morphgraph.base"]
    assert second["morphgraph.plan"] == hashlib.sha256(plans[1].to_json()).hexdigest()
    assert second["morphgraph.base"] != first["morphgraph.base"]
    assert second["morphgraph.check"] == "not made"


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    save(model_from_text(CHAIN), base := tmp_path / "base.onnx")
    made = []
    for name in ("a.onnx", "b.onnx"):
        graph = mg.lift(base)
        mg.save(mg.apply(graph, mg.plan(graph, {"flops": "60%"})), tmp_path / name)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_a_refit_says_what_to_expect(tmp_path: Path) -> None:
    model = model_from_text(CHAIN)
    samples = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    result = mg.shrink(model, samples, {"flops": "60%"}, round_to=1)
    said = Origin.read(result.model)
    assert said is not None
    assert said.error["y"] == pytest.approx(result.error[0].error, rel=0.05)
    assert said.check is not None
    assert said.plan == hashlib.sha256(result.plan.to_json()).hexdigest()
    sliced = mg.shrink(model, samples, {"flops": "60%"}, round_to=1, refit=False)
    assert "morphgraph.error" not in sliced.model.metadata_props


@pytest.mark.parametrize("text", [CHAIN, CONCAT, ATTENTION], ids=["chain", "concat", "attention"])
def test_biases_that_a_refit_makes_are_counted(text: str, tmp_path: Path, capsys: Any) -> None:
    """ONNX itself counts the numbers of the file: there were no biases before."""
    from morphgraph.cli import main

    base, slim = tmp_path / "base.onnx", tmp_path / "slim.onnx"
    save(model_from_text(text), base)
    shape = [d.dim_value for d in onnx.load(base).graph.input[0].type.tensor_type.shape.dim]
    samples = np.random.default_rng(0).standard_normal((40, *shape[1:])).astype(np.float32)
    np.save(tmp_path / "x.npy", samples)
    words = ["--data", str(tmp_path / "x.npy"), "--budget", "flops=70%", "--round-to", "1"]
    assert main(["shrink", str(base), *words, "-o", str(slim), "--format", "json"]) == 0
    arrays = map(onnx.numpy_helper.to_array, onnx.load(slim).graph.initializer)
    counted = sum(a.size for a in arrays if a.dtype == np.float32 and a.ndim)
    told = json.loads(capsys.readouterr().out)["cost"]["params"]["after"]
    noted = json.loads(notes(slim)["morphgraph.cost"])["params"]["after"]
    assert told == noted == counted


def test_the_command_line_names_the_file(tmp_path: Path, capsys: Any) -> None:
    from morphgraph.cli import main

    base, plan, slim = (tmp_path / name for name in ("base.onnx", "plan.json", "slim.onnx"))
    save(model_from_text(CHAIN), base)
    mg.uniform(mg.lift(base), 0.5).save(plan)
    assert main(["apply", str(base), str(plan), "-o", str(slim), "--fold"]) == 0
    assert notes(slim)["morphgraph.base_file"] == sha256(base)
    capsys.readouterr()
    assert main(["analyze", str(slim)]) == 0
    assert f"plan {sha256(plan)[:12]}" in capsys.readouterr().out
    assert main(["analyze", str(slim), "--format", "json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis["origin"]["plan"] == sha256(plan)
    assert main(["analyze", str(base), "--format", "json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis["origin"] is None
    assert analysis["model"]["structure"] == json.loads(plan.read_text())["model"]["structure"]


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        "null",
        '{"flops": 1}',
        "[" * 10_000,
        '{"flops": {"before": 0, "after": 1}}',
        "x\x1b",
    ],
)
def test_notes_from_strangers_are_words(note: str, tmp_path: Path, capsys: Any) -> None:
    from morphgraph.cli import main

    model = model_from_text(CHAIN)
    model.metadata_props.update(dict.fromkeys(KEYS, note))
    mg.save(model, path := tmp_path / "strange.onnx")
    assert main(["analyze", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_model_of_somebody_else_says_nothing() -> None:
    assert Origin.read(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)) is None
