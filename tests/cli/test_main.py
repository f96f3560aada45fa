"""The frame around all commands: start-up, exit codes, streams, what users may see of errors."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest

import morphgraph
from morphgraph.cli import COMMANDS, cli, main

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "onnxruntime", "onnx", "onnx_ir", "networkx", "scipy", "numpy", "rich"}


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


# Runs command lines, and then says which of some modules were loaded for them.
_LOADED = """
import json, sys
from morphgraph.cli import main
modules, *lines = sys.argv[1:]
for line in lines:
    assert main(line.split("|")) == 0, line
print(json.dumps(sorted(sys.modules.keys() & set(json.loads(modules)))), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_is_fast_and_loads_nothing(command: tuple[str, ...]) -> None:
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 0.3:
        before = os.times()
        done = _python(_LOADED, json.dumps(sorted(HEAVY)), "|".join([*command, "--help"]))
        after = os.times()
        # CPU time of the child: the machine that tests run on may be busy.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stderr) == []
        assert all(name in done.stdout for name in command or COMMANDS)
    assert min(seconds) < 0.3


def test_sympy_is_read_where_somebody_asks_it_and_not_before(model: Path) -> None:
    line = f"analyze|{model}"
    done = _python(_LOADED, '["onnx_ir", "sympy.core"]', line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == ["onnx_ir"]
    asked = f"{_LOADED}import onnx_ir\nprint(2 * onnx_ir.SymbolicDim('N') + 1, file=sys.stderr)"
    assert _python(asked, "[]", line).stderr.splitlines()[-2:] == ["[]", "2*N + 1"]


def test_the_work_on_onnx_files_is_done_without_torch(model: Path, plan: Path) -> None:
    slim, fitted, data = (model.with_name(n) for n in ("slim.onnx", "fitted.onnx", "data.npz"))
    np.savez(data, x=np.random.default_rng(0).standard_normal((12, 3, 10, 10)).astype(np.float32))
    done = _python(
        _LOADED,
        '["torch"]',
        f"analyze|{model}",
        f"plan|{model}|--uniform|0.5",
        f"apply|{model}|{plan}|-o|{slim}",
        f"plan|{model}|--score|data|--data|{data}|--budget|flops=50%",
        f"apply|{model}|{plan}|--refit|{data}|-o|{fitted}",
        f"shrink|{model}|--data|{data}|--budget|flops=50%|--curve|-o|{fitted}|--overwrite",
        f"verify|{model}|{plan}|{slim}",
        f"bench|{model}|{slim}|--seconds|0.01",
        f"diff|{model}|{slim}",
        "doctor",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_overview_is_the_first_of_the_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help is not None
    assert command.help.split("\n\n")[0] == COMMANDS[name]
    assert {"-q", "-v", "--debug", "--no-color"} <= {o for p in command.params for o in p.opts}


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"morphgraph, version {morphgraph.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["no-such-command"], 2, "no-such-command"),
        (["analyze"], 2, "MODEL"),
        (["analyze", "nowhere.onnx"], 4, "nowhere.onnx"),
        (["analyze", "{model}", "--top", "0"], 2, "--top"),
        (["analyze", "{model}", "--explain", "nobody"], 2, "nobody"),
        (["analyze", "{model}", "--input-shape", "x=1xthree"], 2, "1xthree"),
        (["analyze", "{model}", "--input-shape", "z=1x3"], 3, "'z'"),
        (["plan", "{model}"], 2, "--budget"),
        (["plan", "{model}", "--budget", "flops"], 2, "flops=50%"),
        (["plan", "{model}", "--budget", "flops=0.01%"], 1, "cannot be met"),
        (["plan", "{model}", "--budget", "flops=50"], 1, "for a share write flops=50%"),
        (["plan", "{model}", "--budget", "flops=0.5"], 1, "for a share write flops=50%"),
        (["verify", "{model}", "{model}", "{model}"], 3, "the model first, the plan second"),
        (["apply", "{model}", "{model}", "-o", "s.onnx"], 3, "the model first, the plan second"),
        (["verify", "{model}", "slim.onnx"], 2, "verify [OPTIONS] MODEL PLAN SLIM"),
        (["shrink", "{model}", "-o", "s.onnx"], 2, "'--data' of `morphgraph shrink [OPTIONS]"),
        (["plan", "{model}", "--budget", "flops=many"], 2, "many"),
        (["plan", "{model}", "--budget", "flops=5ms"], 2, "no amount of FLOPs"),
        (["plan", "{model}", "--budget", "flops=50%", "--include", "typo*"], 3, "typo*"),
        (["plan", "{model}", "--set", "conv1=300%"], 2, "a share from 0% to 100%"),
        (["plan", "{model}", "--set", "conv1=half"], 2, "half"),
        (["plan", "{model}", "--keep-classes", "1-x"], 2, "1-x"),
        (["plan", "{model}", "--budget", "beauty=50%"], 2, "beauty"),
        (["plan", "{model}", "--budget", "flops=50%", "--budget", "flops=2"], 2, "twice"),
        (["plan", "{model}", "--uniform", "1.5"], 2, "1.5"),
        (["plan", "{model}", "--uniform", "fit"], 2, "--budget"),
        (["plan", "{model}", "--uniform", "0.5", "--same", "c1"], 3, "c1"),
        (["plan", "{model}", "--set", "nobody=3"], 3, "nobody"),
        (["plan", "{model}", "--set", "conv1=999"], 3, "conv1"),
        (["plan", "{model}", "--uniform", "0.5", "-o", "{model}"], 4, "input"),
        (["plan", "{model}", "--uniform", "0.5", "-o", "no/such/folder/p.json"], 4, "folder"),
        (["apply", "{model}", "nowhere.json", "-o", "s.onnx"], 4, "nowhere.json"),
        (["apply", "{model}", "{model}", "-o", "s.onnx"], 3, "JSON"),
        (["verify", "{model}", "{model}", "{model}"], 3, "JSON"),
        (["export", "nothing", "--input", "1x2", "-o", "m.onnx"], 2, "package.module:factory"),
        (["export", "a/net.py:make", "--input", "1", "-o", "m.onnx"], 2, "net:make, in the folder"),
        (["export", "json:lods", "--input", "1", "-o", "m.onnx"], 2, "mean 'loads'"),
        (["export", "no.such:thing", "--input", "1x2", "-o", "m.onnx"], 2, "no.such"),
    ],
)
def test_errors_are_one_line_with_a_code(
    arguments: list[str], code: int, fragment: str, model: Path, run: Any
) -> None:
    ran = run(*(argument.format(model=model) for argument in arguments))
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("morphgraph: error: ")
    assert ran.err.count("\n") == 1
    assert fragment in ran.err


def test_an_existing_file_is_kept_unless_told(model: Path, plan: Path, run: Any) -> None:
    before = plan.read_bytes()
    ran = run("plan", model, "--uniform", "0.5", "-o", plan)
    assert (ran.code, plan.read_bytes()) == (4, before)
    assert "--overwrite" in ran.err
    assert run("plan", model, "--uniform", "0.5", "-o", plan, "--overwrite").code == 0
    assert plan.read_bytes() != before


@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_overwritten(model: Path, plan: Path, run: Any, link: bool) -> None:
    before = model.read_bytes()
    output = model
    if link:
        output = model.with_name("link.onnx")
        output.symlink_to(model)
    ran = run("apply", model, plan, "-o", output, "--overwrite")
    assert ran.code == 4
    assert model.read_bytes() == before


def test_quiet_and_verbose(model: Path, run: Any) -> None:
    arguments = ("plan", model, "--uniform", "0.5")
    results = {run(*arguments, *flags).out for flags in ([], ["-q"], ["-v"], ["-vv"])}
    assert len(results) == 1
    assert run(*arguments, "-q").err == ""
    assert "lifting" in run(*arguments, "-v").err
    assert "lifting" not in run(*arguments).err


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, model: Path, run: Any
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("first line\nsecond line\x1b[31m")

    monkeypatch.setattr("morphgraph.onnx_io.load", fail)
    ran = run("analyze", model)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.count("\n") == 1
    assert "ZeroDivisionError" in ran.err
    assert "--debug" in ran.err
    assert "\x1b" not in ran.err
    with pytest.raises(ZeroDivisionError):
        main(["analyze", str(model), "--debug"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (MemoryError(), 3), (OSError(28, "No space left"), 4)],
)
def test_other_ends(
    monkeypatch: pytest.MonkeyPatch, model: Path, run: Any, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("morphgraph.onnx_io.load", fail)
    ran = run("analyze", model)
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.err.strip().splitlines()) == 1


# An interruption while the command line itself is still being read.
_INTERRUPT = """
import runpy, sys
from importlib import import_module

class Interrupt:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
"""


def _command() -> str:
    """The module and the function that an installed ``morphgraph`` calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["project"]["scripts"]["morphgraph"])


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_module('morphgraph', run_name='__main__')",
        "sys.exit(getattr(import_module({module!r}), {function!r})())",
    ],
    ids=["python -m morphgraph", "morphgraph"],
)
def test_an_interruption_before_the_first_line_runs_is_one_line(start: str) -> None:
    module, _, function = _command().partition(":")
    done = _python(_INTERRUPT + start.format(module=module, function=function))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "morphgraph: error: interrupted; nothing was left half written\n"


def test_a_reader_may_go_away(model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", "analyze", "-q", str(model)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_from_a_file_are_text_and_nothing_else(model: Path, run: Any) -> None:
    proto = onnx.load(model)
    evil = "[bold]evil[/bold]\x1b[31m\n| `<script>`"
    for node in proto.graph.node:
        node.name = node.name.replace("c2", evil)
        node.input[:] = [evil if name == "conv2.weight" else name for name in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = evil if tensor.name == "conv2.weight" else tensor.name
    model.write_bytes(proto.SerializeToString())
    for kind in ("table", "md", "csv"):
        for arguments in (["--by", "op"], ["--by", "group"], ["--explain", "d"]):
            ran = run("analyze", model, *arguments, "--format", kind)
            assert ran.code == 0, ran.err
            assert "\x1b" not in ran.out
    table = run("analyze", model, "--by", "op").out
    assert "[bold]evil[/bold]\\x1b[31m\\n| `<script>`" in table
    analysis = json.loads(run("analyze", model, "--format", "json").out)
    assert any(evil in member["tensor"] for g in analysis["groups"] for member in g["members"])


def test_a_step_that_takes_long_is_told_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the time left where it is known; a line that goes again, and none of a short step."""
    from morphgraph.cli import console

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(console, "_LONG_SECONDS", 0.05)
    with click.Context(cli, obj=console.OutputSettings()):
        with console.step("short"):
            pass
        assert capsys.readouterr().err == ""
        for text, expected, said in (("first", 9.5, "10 s left"), ("second", None, "0 s so far")):
            with console.step(text, expected):
                time.sleep(0.3)
            shown = capsys.readouterr().err
            assert f"\r{text}: {said}" in shown
            assert shown.endswith(" \r")  # written over with blanks
        monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
        with console.step("piped", 9.5):
            time.sleep(0.1)
        assert capsys.readouterr().err == ""


def test_color_only_where_wanted(monkeypatch: pytest.MonkeyPatch, model: Path, run: Any) -> None:
    assert "\x1b" not in run("analyze", model).out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    colored = run("analyze", model).out
    assert run("analyze", model, "--no-color").out != colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("analyze", model).out


@pytest.mark.parametrize(
    "line", [("plan", "--budget", "latency=50%"), ("analyze", "--cost", "latency")]
)
def test_a_latency_of_no_device_says_whose_it_is(
    line: tuple[str, ...], model: Path, run: Any
) -> None:
    verb, *rest = line
    assert "that of a V100" in run(verb, model, *rest).err
    for named in ("latency@P100=50%", "flops=50%"):
        assert "V100" not in run("plan", model, "--budget", named).err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_plans_as_windows_writes_them(encoding: str, model: Path, tmp_path: Path, run: Any) -> None:
    """A shell there redirects what is printed as UTF-16; editors put a mark before UTF-8."""
    text = run("plan", model, "--uniform", "0.5", "--format", "json").out
    mark = "\ufeff" if encoding.endswith("be") else ""
    (plan := tmp_path / "plan.json").write_bytes((mark + text).encode(encoding))
    assert run("apply", model, plan, "-o", tmp_path / "slim.onnx").code == 0
