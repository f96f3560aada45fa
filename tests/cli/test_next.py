"""Every result ends with a command that can be run as it stands, and what would be done is told."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import morphgraph as mg
from morphgraph.cli import cli, main
from morphgraph.onnx_io import save
from morphgraph.testing import model_from_text

ROOT = Path(__file__).parent.parent.parent


def following(err: str) -> list[str]:
    """The words of the last line, as a shell splits them."""
    last = err.strip().splitlines()[-1]
    assert last.startswith("next: morphgraph "), err
    return shlex.split(last.removeprefix("next: "))[1:]


@pytest.fixture
def odd(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network under a name that a shell would take apart, in a folder of such a name."""
    folder = tmp_path / "my models; 'new'"
    folder.mkdir()
    path = folder / "small net $1.onnx"
    path.write_bytes(model.read_bytes())
    monkeypatch.chdir(folder)
    return path


def test_the_next_commands_lead_from_a_model_to_a_report(odd: Path, run: Any) -> None:
    """As a person would who does nothing but what the last line says."""
    line: list[Any] = ["analyze", odd]
    ran: list[str] = []
    while len(ran) < 5:
        done = run(*line)
        assert done.code == 0, done.err
        ran.append(line[0])
        if line[0] == "report":
            break
        line = following(done.err)
        if line[0] in ("bench", "report"):  # as they stand, but shorter
            line += ["--seconds", "0.05" if line[0] == "bench" else "0"]
        if "--profile" in line:  # as fast as before; the page is drawn all the same
            line = ["report", *line[1:3], "--seconds", "0", "-o", "report.html"]
    assert ran == ["analyze", "plan", "apply", "bench", "report"]
    assert {path.name for path in odd.parent.iterdir()} == {
        *("small net $1.onnx", "plan.json", "slim.onnx", "report.html"),
    }


def test_a_shell_runs_it(odd: Path, run: Any) -> None:
    said = run("analyze", odd).err.strip().splitlines()[-1].removeprefix("next: ")
    script = said.replace("morphgraph", f"{shlex.quote(sys.executable)} -m morphgraph", 1)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert mg.Plan.load(odd.parent / "plan.json").groups


def test_names_that_are_taken_are_not_proposed(odd: Path, run: Any) -> None:
    (odd.parent / "plan.json").write_text("mine")
    first = following(run("analyze", odd).err)
    assert first[-1] == "plan-2.json"
    assert run(*first).code == 0
    assert (odd.parent / "plan.json").read_text() == "mine"


def test_a_plan_that_is_not_written_proposes_to(odd: Path, run: Any) -> None:
    line = following(run("plan", odd, "--uniform", "0.5").err)
    assert line == ["plan", str(odd), "--uniform", "0.5", "-o", "plan.json"]
    assert run(*line).code == 0
    wide = run("expand", odd, "plan.json", "--budget", "flops=100%", "-o", "wide.json")
    applied = following(wide.err)
    assert run(*applied).code == 0
    verify = run("verify", odd, "wide.json", "wide.onnx")
    assert following(verify.err) == ["bench", str(odd), "wide.onnx"]
    assert following(run("diff", odd, "wide.onnx").err)[0] == "report"


TOKENS = """
net (int64[N,T] ids, float[30,16] table, float[16,12] w1, float[12,30] w2) => (float[N,T,30] y) {
    e = Gather <axis = 0> (table, ids)  a = MatMul(e, w1)  b = Relu(a)  y = MatMul(b, w2)
}"""
CACHED = """
net (float[N,T,8] x, float[N,P,12] past, float[8,10] w0, float[10,12] w1, float[12,5] w2)
    => (float[N,S,5] y, float[N,S,12] present) {
    b = MatMul(x, w0)  c = Relu(b)  a = MatMul(c, w1)  present = Concat <axis = 1> (past, a)
    y = MatMul(present, w2)
}"""
IMAGES = """
net (float[N,3,H,W] x, float[16,3,3,3] w1, float[8,16,1,1] w2) => (float[N,8,H,W] y) {
    a = Conv <pads = [1,1,1,1]> (x, w1)  b = Relu(a)  y = Conv(b, w2)
}"""


@pytest.mark.parametrize("text", [TOKENS, CACHED, IMAGES], ids=["tokens", "cache", "images"])
def test_models_that_leave_sizes_open_are_timed_as_they_stand(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save(model_from_text(text, ("x", "ids", "past")), Path("net.onnx"))
    words = ("--uniform", "0.5", "--round-to", "1", "-o", "plan.json")
    assert run("plan", "net.onnx", *words).code == 0
    line = following(run("apply", "net.onnx", "plan.json", "-o", "slim.onnx").err)
    assert line == ["bench", "net.onnx", "slim.onnx"]
    done = run(*line, "--seconds", "0.05")
    assert done.code == 0, done.err
    assert "sizes left open" in done.err


def test_flops_are_counted_at_the_sizes_that_are_timed(tmp_path: Path, run: Any) -> None:
    """The second model is fed what the first is fed, whatever it would be counted at alone."""
    fixed = IMAGES.replace("N,3,H,W", "1,3,20,12").replace("N,8,H,W", "1,8,20,12")
    for name, text in (("open", IMAGES), ("fixed", fixed)):
        save(model_from_text(text), tmp_path / f"{name}.onnx")
    files = [tmp_path / "fixed.onnx", tmp_path / "open.onnx"]
    done = run("bench", *files, "--seconds", "0.02", "--format", "json")
    assert json.loads(done.out)["models"][1]["flops_ratio"] == 1.0
    assert "x=Nx3x20x12" in done.err


def test_sizes_of_inputs_that_the_first_model_lacks(tmp_path: Path, run: Any) -> None:
    save(model_from_text(IMAGES), tmp_path / "one.onnx")
    other = IMAGES.replace(" x,", " z,").replace("(x,", "(z,")
    save(model_from_text(other, ("z",)), tmp_path / "other.onnx")
    done = run("bench", tmp_path / "one.onnx", tmp_path / "other.onnx", "--seconds", "0.02")
    assert done.code == 0, done.err


def test_sizes_that_the_file_leaves_open_are_repeated(odd: Path, run: Any) -> None:
    proto = onnx.load(odd)
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"s{axis}"
    odd.write_bytes(proto.SerializeToString())
    line = following(run("analyze", odd, "--input-shape", "x=1x3x12x12").err)
    assert "x=1x3x12x12" in line
    applied = following(run(*line).err)
    bench = following(run(*applied).err)
    assert bench[:1] == ["bench"]
    assert run(*bench, "--input-shape", "x=1x3x12x12", "--seconds", "0.01").code == 0


def test_what_cannot_shrink_is_explained(tmp_path: Path, run: Any) -> None:
    from morphgraph.onnx_io import save
    from morphgraph.testing import model_from_text

    text = "net (float[1,4] x, float[4,5] w) => (float[1,5] y) { y = MatMul(x, w) }"
    save(model_from_text(text), path := tmp_path / "fixed.onnx")
    line = following(run("analyze", path).err)
    assert line[:1] == ["analyze"]
    assert "--explain" in line
    assert "graph" in run(*line).out


def test_programs_and_the_quiet_hear_nothing(model: Path, run: Any) -> None:
    for flags in (["-q"], ["--format", "json"], ["--format", "csv"]):
        assert run("analyze", model, *flags).err == ""


def test_shrink_and_its_curve(model: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = np.random.default_rng(0).standard_normal((20, 3, 10, 10)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=data)
    line = following(run("shrink", model, "--data", "x.npz", "--curve").err)
    done = run(*line)
    assert done.code == 0, done.err
    assert following(done.err) == ["bench", str(model), "slim.onnx"]


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (["plan", "{model}", "--budget", "flops=50%", "-o", "p.json"], ["p.json"]),
        (["plan", "{model}", "--budget", "flops=50%"], []),
        (["apply", "{model}", "{plan}", "-o", "s.onnx"], ["s.onnx"]),
        (["expand", "{model}", "{plan}", "--budget", "flops=100%", "-o", "w.json"], ["w.json"]),
        (
            ["shrink", "{model}", "--data", "{data}", "--budget", "flops=50%", "-o", "s.onnx"],
            ["s.onnx"],
        ),
        (["calibrate", "-o", "device.json", "--minutes", "60"], ["device.json"]),
        (["analyze", "{model}"], []),
        (
            ["analyze", "{model}", "--report", "a.html", "--annotate", "a.onnx"],
            ["a.onnx", "a.html"],
        ),
        (["diff", "{model}", "{model}", "--report", "d.html"], ["d.html"]),
        (["verify", "{model}", "{plan}", "{model}"], []),
        (["bench", "{model}", "{model}", "--threads", "1,2", "--seconds", "600"], []),
        (
            ["morph", "{model}", "--data", "{images}", "--budget", "flops=50%", "-o", "run"],
            ["run"],
        ),
        (
            ["sweep", "{model}", "--data", "{images}", "--budget", "flops=50%,25%", "-o", "runs"],
            ["runs"],
        ),
    ],
)
def test_what_would_be_done_is_told_and_not_done(
    line: list[str],
    files: list[str],
    model: Path,
    plan: Path,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (20, 10, 10, 3), dtype=np.uint8), np.arange(20) % 5
    np.savez("data.npz", x=rng.standard_normal((20, 3, 10, 10)).astype(np.float32))
    np.savez("images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    names = {"model": model, "plan": plan, "data": "data.npz", "images": "images.npz"}
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(**names) for word in line]
    ran = run(*words, "--dry-run", "--format", "json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (told["command"], told["writes"], told["replaces"]) == (line[0], files, [])
    assert told["steps"]
    assert sorted(tmp_path.rglob("*")) == before
    if line[0] in ("plan", "apply"):
        expected = mg.Plan.load(plan).cost["flops"]
        assert told["cost"]["flops"] == {"before": expected.before, "after": expected.after}
    for kind in ("table", "md", "csv"):
        assert "would" in run(*words, "--dry-run", "--format", kind).out


def test_every_command_that_works_on_something_can_be_tried_dry() -> None:
    import click

    tells = {"completion", "doctor", "schema"}  # print what they know, and touch nothing
    context = click.Context(cli)
    for name in cli.list_commands(context):
        found = cli.get_command(context, name)
        assert found is not None
        options = {word for each in found.params for word in each.opts}
        assert ("--dry-run" in options) == (name not in tells), name


def test_a_card_is_not_written(model: Path, plan: Path, tmp_path: Path, run: Any) -> None:
    assert run("apply", model, plan, "-o", tmp_path / "slim.onnx").code == 0
    before = sorted(tmp_path.rglob("*"))
    ran = run("card", tmp_path / "slim.onnx", "-o", tmp_path / "README.md", "--dry-run")
    assert ran.code == 0, ran.err
    assert "README.md" in ran.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["./-net.onnx", "--"])
def test_names_like_options_are_never_taken_for_some(
    form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """Every next command runs as it stands, and in a shell."""
    monkeypatch.chdir(tmp_path)
    Path("-net.onnx").write_bytes(model.read_bytes())
    words = ["--", "-net.onnx"] if form == "--" else [form]
    line = following(run("plan", "--uniform", "0.5", *words).err)
    planned = run(*line)
    assert planned.code == 0, planned.err
    applied = run(*following(planned.err)[:-1], "-slim.onnx")
    assert applied.code == 0, applied.err
    timed = run(*following(applied.err), "--seconds", "0.02")
    assert timed.code == 0, timed.err
    assert {"-net.onnx", "-slim.onnx", "plan.json"} <= {path.name for path in tmp_path.iterdir()}


def test_what_would_be_replaced_is_told(model: Path, plan: Path, run: Any) -> None:
    ran = run("plan", model, "--uniform", "0.5", "-o", plan, "--dry-run")
    assert ran.code == 4  # as without --dry-run
    line = ("plan", model, "--uniform", "0.5", "-o", plan, "--overwrite", "--dry-run")
    before = plan.read_bytes()
    assert f"would replace   {plan}" in run(*line).out
    assert plan.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["anlyze", "m.onnx"], "analyze"),
        (["Shrink", "m.onnx"], "shrink"),
        (["analyze", "{model}", "--explian", "g1"], "--explain"),
        (["plan", "{model}", "--buget", "flops=50%"], "--budget"),
        (["plan", "{model}", "--score", "l3", "--budget", "flops=50%"], "l2"),
        (["plan", "{model}", "--score", "randm", "--budget", "flops=50%"], "random"),
        (["analyze", "{model}", "--cost", "parms"], "params"),
        (["plan", "{model}", "--budget", "flop=50%"], "flops"),
        (["plan", "{model}", "--budget", "latency@P10=50%"], "P100"),
        (["plan", "{model}", "--budget", "flops=50%", "--include", "cnv1"], "conv1"),
        (["plan", "{model}", "--set", "Conv2=3"], "conv2"),
        (["analyze", "{model}", "--explain", "conv11"], "conv1"),
        (["analyze", "{model}", "--format", "jsn"], "json"),
        (["bench", "{model}", "--runtime", "openvin"], "openvino"),
    ],
)
def test_what_was_meant_is_asked(words: list[str], meant: str, model: Path, run: Any) -> None:
    ran = run(*(word.format(model=model) for word in words))
    assert ran.code in (2, 3)
    assert ran.err.count("\n") == 1
    assert "(did you mean '" in ran.err
    assert f"'{meant}'" in ran.err.partition("did you mean")[2]


def test_nothing_is_proposed_for_what_is_like_nothing(model: Path, run: Any) -> None:
    for words in (["zzzzzz"], ["analyze", model, "--zzzzzz"], ["analyze", model, "--cost", "zzz"]):
        assert "did you mean" not in run(*words).err
    assert "`morphgraph analyze" in run(model).err


@pytest.mark.long
def test_an_interrupted_run_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    """A real SIGINT in the middle of a training; the command that is named finishes it."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (400, 10, 10, 3), dtype=np.uint8), np.arange(400) % 5
    data, folder = tmp_path / "images.npz", tmp_path / "run"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    line = ["morph", str(model), "--data", str(data), "--budget", "flops=60%", "--iterations", "1"]
    line += ["--shrink-epochs", "30", "--epochs", "1", "-o", str(folder), "--bf16", "off"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        [sys.executable, "-m", "morphgraph", *line],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so does what they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        events = folder / "events.jsonl"
        while not (events.exists() and '"epoch"' in events.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("morphgraph: error: interrupted; nothing was left half written; go on")
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    words = shlex.split(last.partition("`")[2].rstrip("`"))[1:]
    assert words == [*line, "--resume"]
    words[words.index("--shrink-epochs") + 1] = "30"
    assert main(words) == 0
    assert (folder / "result.json").exists()
