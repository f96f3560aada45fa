"""Names as messages show them, and what somebody may have meant by one that is not known."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

_MAX_NAME = 200  # characters of a name that a message repeats
_MOST_COMPARED = 20_000  # names; more would take seconds
_MOST_MEANT = 3
_SHORT = 3


def escape(name: str | bytes) -> str:
    r"""A name as it may stand in a message: one line, printable, and of bounded length.

    A damaged file may hold names that are not UTF-8; protobuf hands them out as bytes.

    >>> escape("conv\n\x1b[31m")
    'conv\\n\\x1b[31m'
    """
    if isinstance(name, bytes):
        name = name.decode(errors="backslashreplace")
    shown = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."
    if shown.isprintable():  # as nearly all are
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def file_word(path: str | Path) -> str:
    """A file's name as a word of a command line, where none may be taken for an option.

    >>> file_word("net.onnx"), file_word("-net.onnx")
    ('net.onnx', './-net.onnx')
    """
    return f"./{path}" if str(path).startswith("-") else str(path)


def with_options(line: Sequence[str], *more: str) -> list[str]:
    """A command line with further options, which stand in front of a ``--``.

    >>> with_options(["plan", "--", "-net.onnx"], "-o", "plan.json")
    ['plan', '-o', 'plan.json', '--', '-net.onnx']
    """
    end = line.index("--") if "--" in line else len(line)
    return [*line[:end], *more, *line[end:]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to put behind a message about a name that is not known; empty if none is near.

    >>> did_you_mean("flop", ["flops", "params"]), did_you_mean("beauty", ["flops"])
    (" (did you mean 'flops'?)", '')
    >>> did_you_mean("Conv1", ["conv1", "conv2", "fc"])
    " (did you mean 'conv1' or 'conv2'?)"
    """
    near = _nearest(word, known)
    if not near:
        return ""
    names = [f"'{escape(name)}'" for name in near]
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    return f" (did you mean {listed}?)"


def _nearest(word: str, known: Iterable[str]) -> list[str]:
    """The names that are most like a word, the nearest first; upper and lower case are alike."""
    by_folded: dict[str, str] = {}
    for name, _ in zip(known, range(_MOST_COMPARED), strict=False):
        by_folded.setdefault(name[:_MAX_NAME].lower(), name)
    likeness = 0.5 if len(word) <= _SHORT else 0.6  # one letter of two may be wrong
    near = difflib.get_close_matches(word[:_MAX_NAME].lower(), by_folded, _MOST_MEANT, likeness)
    return [by_folded[name] for name in near]
