"""Completion in a real bash, and scripts for the other shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from morphgraph.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH on which `morphgraph` is this program."""
    program = tmp_path / "bin" / "morphgraph"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m morphgraph "$@"\n')
    program.chmod(0o755)
    return dict(os.environ, PATH=f"{program.parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))


def completed(words: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    """What bash proposes behind these words, the last of which is being typed."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
    eval "$(morphgraph completion bash)"
    COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
    _morphgraph_completion morphgraph
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "rror" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    assert completed(["morphgraph", ""], environment, tmp_path) == list(COMMANDS)
    assert completed(["morphgraph", "ana"], environment, tmp_path) == ["analyze"]
    options = completed(["morphgraph", "plan", "--se"], environment, tmp_path)
    assert set(options) == {"--set", "--sensitivity", "--seed"}
    scores = completed(["morphgraph", "plan", "--score", "l"], environment, tmp_path)
    assert scores == ["l2", "l1", "lasso"]
    assert completed(["morphgraph", "nonsense", "--x"], environment, tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(shell: str, run: Any, tmp_path: Path) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert f"_MORPHGRAPH_COMPLETE={shell}_complete" in ran.out
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(ran.out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)
    assert run("completion", "zhs").err.count("did you mean 'zsh'") == 1
