"""Runs the blocks of a documentation page in order: one folder and one Python namespace per page.

``python`` blocks run as they stand. Of ``console`` blocks every ``$ morphgraph`` command runs, in
this process, and must print what is shown; ``...`` stands for anything, and digits for others, for
they depend on the machine. A command that is shown with an error must fail. Commands of ``sh``
blocks run and must succeed. ``pycon`` blocks are doctests, which pytest collects by itself.
"""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphgraph.cli import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", re.MULTILINE)
_FIGURE = re.compile(r"[\d.]+(?: [kMG](?= ))?|=+|(?<=\n)─+")


@dataclass
class Page:
    """A page, and what its blocks have done so far."""

    path: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: dict[str, str] = field(default_factory=dict)
    without: str = "(?!)"  # commands that do not run: a regular expression
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
                for command, expected in _COMMAND.findall(block):
                    self.console(command, expected)
            elif language == "sh":
                for line in commands(block):
                    if not re.search(self.without, line):
                        self.printed[line] = start(line)

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
            found = start(command)
        self.printed[command] = found
        one, other = (
            _FIGURE.sub("#", text.replace("...\n", "ANYTHING\n")) for text in (expected, found)
        )
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        wanted = one.replace("ANYTHING", "...")
        assert not expected.strip() or doctest.OutputChecker().check_output(
            wanted, other, options
        ), f"{self.path.name}: {command}\n{found}"


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
