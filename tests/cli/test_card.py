"""Model cards: what a YAML reader makes of the header, and figures held against files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

import morphgraph as mg
from morphgraph.onnx_io import save
from morphgraph.testing import model_from_text
from tests.folders.test_folders import make_folder
from tests.test_origin import CHAIN, CONCAT, sha256


def parts(text: str) -> tuple[dict[str, Any], str]:
    """The header as the hub reads it, and what stands below."""
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert isinstance(found, dict)
    return found, body


@pytest.mark.parametrize("text", [CHAIN, CONCAT], ids=["chain", "concat"])
def test_a_card_of_a_resized_file(text: str, tmp_path: Path, run: Any) -> None:
    base, plan, slim = (tmp_path / name for name in ("base.onnx", "plan.json", "slim.onnx"))
    save(model_from_text(text), base)
    mg.plan(mg.lift(base), {"flops": "60%"}, round_to=1).save(plan)
    assert run("apply", base, plan, "-o", slim).code == 0
    ran = run("card", slim, "--base-model", "me/base")
    assert ran.code == 0, ran.err
    header, body = parts(ran.out)
    assert header["base_model"] == "me/base"
    assert header["library_name"] == "onnx"
    assert "pruning" in header["tags"]
    facts = header["morphgraph"]
    assert facts["budget"] == {"flops": "60%"}
    assert facts["plan_sha256"] == sha256(plan)
    assert facts["base_file_sha256"] == sha256(base)
    assert facts["check"] == "ok"
    for kind, change in facts["cost"].items():
        assert change["before"] == mg.cost(mg.lift(base), kind).total
        assert change["after"] == mg.cost(mg.lift(slim), kind).total
    assert "| cost | before | after | left |" in body
    assert 'InferenceSession("slim.onnx")' in body
    assert "morphgraph plan BASE.onnx --budget flops=60%" in body
    assert "model-index" not in header  # nobody knows an accuracy
    assert run("card", slim, "-o", tmp_path / "README.md").code == 0
    assert "base_model" not in parts((tmp_path / "README.md").read_text())[0]
    assert run("card", slim, "-o", tmp_path / "README.md").code == 4


def test_a_card_of_a_shrunk_file_says_what_to_expect(tmp_path: Path, run: Any) -> None:
    base, data, slim = tmp_path / "base.onnx", tmp_path / "x.npz", tmp_path / "slim.onnx"
    save(model_from_text(CHAIN), base)
    np.savez(data, x=np.random.default_rng(0).standard_normal((30, 3, 8, 8)).astype(np.float32))
    ran = run("shrink", base, "--data", data, "--budget", "flops=60%", "-o", slim)
    assert ran.code == 0, ran.err
    header, body = parts(run("card", slim).out)
    assert "without training" in header["morphgraph"]["method"]
    assert "error on inputs held out: y " in body
    assert "morphgraph shrink BASE.onnx --data DATA --budget flops=60% -o slim.onnx" in body


def test_a_file_that_was_resized_twice_tells_both(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the card, run on the base, give the file's widths again."""
    monkeypatch.chdir(tmp_path)
    save(model_from_text(CHAIN), Path("BASE.onnx"))
    rng = np.random.default_rng(0)
    np.savez("DATA", x=rng.standard_normal((30, 3, 8, 8)).astype(np.float32))
    Path("DATA.npz").rename("DATA")
    rounds = [("shrink", "80%"), ("plan", "60%"), ("plan", "70%")]
    base, changes = "BASE.onnx", []
    for number, (how, share) in enumerate(rounds):
        slim = f"slim{number}.onnx"
        words = ("--budget", f"flops={share}", "--round-to", "1")
        if how == "shrink":
            Path("x.npz").write_bytes(Path("DATA").read_bytes())
            assert run("shrink", base, "--data", "x.npz", *words, "-o", slim).code == 0
        else:
            assert run("plan", base, *words, "-o", f"p{number}.json").code == 0
            assert run("apply", base, f"p{number}.json", "-o", slim).code == 0
        costs = [mg.cost(mg.lift(name), "flops").total for name in (base, slim)]
        changes.append(dict(zip(("before", "after"), costs, strict=True)))
        base = slim
    ran = run("card", base)
    header, body = parts(ran.out)
    facts = header["morphgraph"]
    assert facts["cost"]["flops"] == changes[2]
    assert [each["cost"]["flops"] for each in facts["earlier"]] == changes[:2]
    assert [each["budget"] for each in facts["earlier"]] == [{"flops": "80%"}, {"flops": "60%"}]
    assert body.count("| cost | before | after | left |") == 3
    lines = body.partition("```console\n")[2].partition("```")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["shrink", "plan", "apply", "plan", "apply"]
    assert [line.split()[2] for line in lines] == [
        *("BASE.onnx", "step-1.onnx", "step-1.onnx", "step-2.onnx", "step-2.onnx")
    ]
    assert lines[-1].endswith("-o slim2.onnx")
    told = run("analyze", base).out
    assert told.count("before that") == 2
    mg.save(mg.apply(mg.lift(base), mg.uniform(mg.lift(base), 0.8)), "again.onnx")
    assert len(parts(run("card", "again.onnx").out)[0]["morphgraph"]["earlier"]) == 3


def test_a_card_of_a_folder_names_folders(tmp_path: Path, run: Any) -> None:
    folder, plan, slim = make_folder(tmp_path / "base"), tmp_path / "p.json", tmp_path / "-small"
    assert run("plan", folder, "--budget", "flops=70%", "-o", plan).code == 0
    assert run("apply", folder, plan, "-o", slim).code == 0
    ran = run("card", slim)
    assert ran.code == 0, ran.err
    body = parts(ran.out)[1]
    assert "\nmorphgraph plan BASE --budget flops=70% -o plan.json\n" in body
    assert "\nmorphgraph apply BASE plan.json -o ./-small\n" in body
    file = next(slim.rglob("*.onnx")).relative_to(slim).as_posix()
    assert f'InferenceSession("{file}")' in body


def test_a_command_of_a_hostile_file_is_one_word_to_a_shell(tmp_path: Path, run: Any) -> None:
    model = model_from_text(CHAIN)
    mg.save(mg.apply(mg.lift(model), mg.uniform(mg.lift(model), 0.5)), tmp_path / "s.onnx")
    proto = onnx.load(tmp_path / "s.onnx")
    proto.metadata_props.add(key="morphgraph.budget", value=json.dumps({"flops": "1; rm x"}))
    onnx.save(proto, tmp_path / "s.onnx")
    assert "--budget 'flops=1; rm x' -o" in run("card", tmp_path / "s.onnx").out


def test_a_card_of_a_run_has_its_accuracies(tmp_path: Path, run: Any, model: Path) -> None:
    rng = np.random.default_rng(0)
    data, folder = tmp_path / "images.npz", tmp_path / "my run"
    images, labels = rng.integers(0, 255, (60, 10, 10, 3), dtype=np.uint8), np.arange(60) % 5
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    line = ("--budget", "flops=60%", "--iterations", "1", "--shrink-epochs", "1", "--epochs", "1")
    ran = run("morph", model, "--data", data, *line, "-o", folder)
    assert ran.code == 0, ran.err
    header, body = parts(run("card", folder, "--made-by", "make run").out)
    result = json.loads((folder / "result.json").read_text())
    ((metric,),) = [each["metrics"] for each in header["model-index"][0]["results"]]
    assert metric["value"] == pytest.approx(result["arms"]["slim"]["accuracy"], abs=1e-4)
    assert header["model-index"][0]["name"] == "my run"
    assert header["morphgraph"]["budget"] == {"flops": "60%"}
    macs = header["morphgraph"]["cost"]["macs"]
    assert macs == {
        k: result["arms"][n]["macs"] for k, n in (("before", "base"), ("after", "slim"))
    }
    assert "make run" in body
    assert "| morphgraph |" in body


def test_a_file_that_says_nothing_is_refused(model: Path, run: Any) -> None:
    ran = run("card", model)
    assert ran.code == 3
    assert "does not say where it comes from" in ran.err
    assert ran.err.count("\n") == 1


def test_names_cannot_leave_their_places(tmp_path: Path, run: Any) -> None:
    evil = 'x"\n---\nlicense: evil `| <script>\x85'
    model = model_from_text(CHAIN)
    model.graph.inputs[0].name = evil
    mg.save(mg.apply(mg.lift(model), mg.uniform(mg.lift(model), 0.5)), tmp_path / "s.onnx")
    proto = onnx.load(tmp_path / "s.onnx")
    for entry in proto.metadata_props:
        if entry.key == "morphgraph.budget":
            entry.value = json.dumps({evil: evil})
    proto.metadata_props.add(key="morphgraph.budget", value=json.dumps({evil: evil}))
    onnx.save(proto, tmp_path / "s.onnx")
    ran = run("card", tmp_path / "s.onnx", "--name", evil, "--base-model", evil)
    assert ran.code == 0, ran.err
    header, body = parts(ran.out)
    assert "license" not in header
    assert "\nlicense" not in body
    assert body.count("```") == 4
    assert "<script>" not in body.replace("\\<script\\>", "").partition("### Use")[0]
