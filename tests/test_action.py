"""The steps of ``action.yml``, run by bash as GitHub would run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import morphgraph as mg
from morphgraph.testing.examples import image, residual_cnn

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("bash") is None, reason="its steps are bash"),
]


class Job:
    """A job in a folder: inputs, the outputs of steps, and what is written for people."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.folder = folder
        self.inputs = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()}
        self.inputs |= {name.replace("_", "-"): value for name, value in inputs.items()}
        self.inputs["morphgraph"] = "none"  # it is here already
        self.outputs: dict[str, dict[str, str]] = {}
        self.ran: list[str] = []
        self.summary = folder / "summary.md"
        programs = folder / "bin"
        programs.mkdir()
        script = f'#!/bin/bash\nexec "{sys.executable}" -m morphgraph "$@"\n'
        (programs / "morphgraph").write_text(script)
        (programs / "morphgraph").chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "RUNNER_TEMP": str(folder),
        }

    def value(self, expression: str) -> str:
        """What GitHub puts in the place of ``${{ ... }}``: an input, or an output of a step."""
        kind, *path = expression.strip().split(".")
        if kind == "inputs":
            return self.inputs[path[0]]
        if kind == "github":
            return {"action_path": str(ROOT)}[path[0]]
        assert (kind, path[1]) == ("steps", "outputs"), expression
        return self.outputs[path[0]][path[2]]

    def holds(self, condition: str) -> bool:
        """Conditions of this file: inputs that are not empty."""
        inner = condition.removeprefix("${{").removesuffix("}}")
        wanted = [part.strip() for part in inner.split("&&")]
        names = [re.fullmatch(r"(inputs\.[\w-]+) != ''", part) for part in wanted]
        assert all(names), condition
        return all(self.value(name[1]) != "" for name in names if name)

    def run(self, *names: str) -> subprocess.CompletedProcess[str]:
        """All steps, or these, until one fails; the last one's result."""
        for step in ACTION["runs"]["steps"]:
            if names and step["name"] not in names:
                continue
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "inputs come by the environment, never into the script"
            if "if" in step and not self.holds(step["if"]):
                continue
            given = {
                name: re.sub(r"\$\{\{(.+?)\}\}", lambda found: self.value(found[1]), text)
                for name, text in step.get("env", {}).items()
            }
            output = self.folder / f"{step['name']}.out"
            output.touch()
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.folder,
                env=self.environment | given | {"GITHUB_OUTPUT": str(output)},
                capture_output=True,
                text=True,
            )
            self.ran.append(step["name"])
            if done.returncode:
                break
            lines = output.read_text().splitlines()
            self.outputs[step.get("id", "")] = dict(line.split("=", 1) for line in lines)
        return done


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    graph = mg.lift(mg.export(residual_cnn(), (image(),), dynamic_batch=True))
    mg.save(graph.model, folder / "a model; echo.onnx")
    plan = mg.uniform(graph, 0.5)
    plan.save(folder / "plan.json")
    mg.save(mg.apply(graph, plan), folder / "slim.onnx")
    mg.save(mg.apply(graph, plan, weights="fresh"), folder / "wrong.onnx")
    return folder


def test_a_smaller_model_is_analyzed_compared_and_verified(models: Path, tmp_path: Path) -> None:
    """Also with a name that a shell would split."""
    job = Job(
        tmp_path,
        model=str(models / "a model; echo.onnx"),
        slim=str(models / "slim.onnx"),
        plan=str(models / "plan.json"),
        max_flops="1500000",
        options="--top 3",
    )
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.ran == ["Install", "Analyze", "Compare", "Verify", "Limit"]
    small = mg.lift(models / "slim.onnx")
    assert int(job.outputs["analyze"]["flops"]) == mg.cost(small, "flops").total
    assert int(job.outputs["analyze"]["params"]) == mg.cost(small, "params").total
    summary = job.summary.read_text()
    assert summary.count("## ") == 3
    assert "| stem " in summary
    assert "computes what the masked original computes" in summary


def test_what_is_not_what_the_plan_says_fails(models: Path, tmp_path: Path) -> None:
    paths = {"slim": str(models / "wrong.onnx"), "plan": str(models / "plan.json")}
    job = Job(tmp_path, model=str(models / "a model; echo.onnx"), **paths)
    assert job.run("Verify").returncode == 1
    assert "morphgraph.errors" not in job.summary.read_text()


@pytest.mark.parametrize(("flops", "code"), [("1000", 0), ("1001", 1), ("20000000000000", 1)])
def test_what_costs_too_much_fails(tmp_path: Path, flops: str, code: int) -> None:
    job = Job(tmp_path, model="unread.onnx", max_flops="1000")
    job.outputs["analyze"] = {"flops": flops}
    done = job.run("Limit")
    assert done.returncode == code
    assert ("::error::" in done.stdout) == bool(code)


def test_the_page_names_every_input() -> None:
    page = (ROOT / "docs" / "github-action.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w-]+)` \|", page, re.M))
    assert rows == set(ACTION["inputs"])
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    job = yaml.safe_load(example)["jobs"]["models"]
    (used,) = [step for step in job["steps"] if "morphgraph" in step["uses"]]
    assert set(used["with"]) <= set(ACTION["inputs"])
