"""Completion in real shells, where they are installed."""

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
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


FULL = {  # what is typed, and what stands there after the tabulator
    "morphgraph ana": "morphgraph analyze",
    "morphgraph plan --sens": "morphgraph plan --sensitivity",
    "morphgraph plan --score la": "morphgraph plan --score lasso",
    "morphgraph analyze ne": "morphgraph analyze net.onnx",
    "morphgraph analyze net.onnx --by la": "morphgraph analyze net.onnx --by layer",
}

ZSH = """
autoload -Uz compinit && compinit -u -d {folder}/dump
eval "$(morphgraph completion zsh)"
told() {{ print -r -- $BUFFER >> {folder}/told; BUFFER= }}
zle -N told; bindkey '^X' told; bindkey '^I' complete-word; unsetopt beep; touch {folder}/ready
"""


def _until(path: Path, lines: int = 0) -> None:
    """Wait for a file of a shell that runs elsewhere."""
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(environment: dict[str, str], tmp_path: Path) -> None:
    """As a person types: in a terminal, with the tabulator."""
    folder, settings = tmp_path / "here", tmp_path / "settings"
    folder.mkdir()
    settings.mkdir()
    (folder / "net.onnx").touch()
    (settings / ".zshrc").write_text(ZSH.format(folder=settings))
    master, slave = pty.openpty()
    with subprocess.Popen(
        ["zsh", "-d", "-i"],
        env=environment | {"ZDOTDIR": str(settings), "TERM": "vt100"},
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    ) as shell:
        os.close(slave)
        reader = Thread(target=_drained, args=(master,), daemon=True)
        reader.start()
        try:
            _until(settings / "ready")
            for number, typed in enumerate(FULL, 1):
                os.write(master, f"{typed}\t\x18".encode())
                _until(settings / "told", number)
        finally:
            shell.kill()
    found = [line.rstrip() for line in (settings / "told").read_text().splitlines()]
    assert found == list(FULL.values())


def _drained(terminal: int) -> None:
    """Read what a terminal shows, so that its buffer does not fill."""
    with contextlib.suppress(OSError):  # the terminal is gone once its shell is
        while os.read(terminal, 4096):
            pass


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    script = "morphgraph completion fish | source\n"
    script += "".join(f"complete -C '{typed}'\necho .\n" for typed in FULL)
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        env=environment | {"HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = done.stdout.split("\n.\n")[:-1]
    found = [line.split("\t")[0] for answer in answers for line in answer.splitlines()]
    assert found == [full.split()[-1] for full in FULL.values()], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(shell: str, run: Any, tmp_path: Path) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert f"_MORPHGRAPH_COMPLETE={shell}_complete" in ran.out
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(ran.out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)
    assert run("completion", "zhs").err.count("did you mean 'zsh'") == 1
