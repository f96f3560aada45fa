"""Runs the blocks of a documentation page in order: one folder and one Python namespace per page.

``python`` blocks run as they stand. Of ``console`` blocks every ``$ morphgraph`` command runs, in
this process, and must print what is shown; ``...`` stands for anything, and digits for others, for
they depend on the machine. A command that is shown with an error must fail. Commands of ``sh``
blocks run and must succeed. ``pycon`` blocks are doctests, which pytest collects by itself.

Where a network, a training or a measurement is another, smaller one than the page's
(``Page.shorter``), rows differ, and the heads of the tables are compared alone.
"""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

from morphgraph.cli import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", re.MULTILINE)
_FIGURE = re.compile(r"[\d.]+(?: [kMG](?= ))?|=+|(?<=\n)─+")


@dataclass
class Page:
    """A page, and what its blocks have done so far."""

    path: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: dict[str, str] = field(default_factory=dict)
    without: str = "(?!)"  # commands that do not run: a regular expression
    shorter: Mapping[str, str] = field(default_factory=dict)  # in commands: what stands for what
    code: int = 0

    @property
    def text(self) -> str:
        """What the page says."""
        return self.path.read_text(encoding="utf-8")

    def run(self) -> None:
        """Run all blocks in the current folder."""
        for found in BLOCK.finditer(self.text):
            language, block = found[1], found[2]
            if language == "python":
                above = self.text.count("\n", 0, found.start(2))
                exec(compile("\n" * above + block, str(self.path), "exec"), self.names)
            elif language == "console":
                block = dedent(block)
                for command, expected in _COMMAND.findall(block):
                    self.console(command, expected)
            elif language == "sh":
                for line in commands(block):
                    if not re.search(self.without, line):
                        self.printed[line] = start(self._shortened(line))

    def console(self, command: str, expected: str) -> None:
        """Run a command and compare what it prints; the files that it wrote come last."""
        if re.search(self.without, command):
            return
        if command == "echo $?":
            found = f"{self.code}\n"
        elif expected.startswith("morphgraph: error"):
            self.code, _, found = started(command)
            assert self.code
        else:
            found = start(self._shortened(command))
        self.printed[command] = found
        if self.shorter:
            missing = {*heads(expected)} - {*heads(found)}
            assert not missing, f"{self.path.name}: {command}\n{found}"
            return
        one, other = (
            _FIGURE.sub("#", text.replace("...\n", "ANYTHING\n")) for text in (expected, found)
        )
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        wanted = one.replace("ANYTHING", "...")
        assert not expected.strip() or doctest.OutputChecker().check_output(
            wanted, other, options
        ), f"{self.path.name}: {command}\n{found}"

    def _shortened(self, command: str) -> str:
        for pattern, instead in self.shorter.items():
            command = re.sub(pattern, instead, command)
        return command


def heads(printed: str) -> Iterator[str]:
    """The heads of the tables in what a command prints."""
    lines = printed.splitlines()
    for line, below in pairwise(lines):
        if below.startswith("──"):
            yield " ".join(line.split())


def commands(block: str) -> Iterator[str]:
    """The commands of this program in a block of shell; continued lines are joined."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("morphgraph "):
            yield line


def start(command: str) -> str:
    """What a command of this program prints, and which files it wrote; it must succeed."""
    code, out, notes = started(command)
    assert code == 0, f"{command}: {notes}"
    written = [line for line in notes.splitlines(keepends=True) if line.startswith("wrote ")]
    return "".join([out, *written])


def started(command: str) -> tuple[int, str, str]:
    """The exit code of a command of this program, what it prints, and its notes."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "morphgraph", command
    out, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        code = main(arguments)
    return code, out.getvalue(), notes.getvalue()
