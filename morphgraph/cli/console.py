"""Output of the command line: results to stdout, notes, warnings and errors to stderr."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import click

from morphgraph.errors import MorphWarning
from morphgraph.words import file_word, with_options

if TYPE_CHECKING:
    from morphgraph.report.tables import Format, Report

_TICK_SECONDS = 0.5
_LONG_SECONDS = 2.0


@dataclass
class OutputSettings:
    """How much is said, and how; options of every command set it.

    ``verbosity`` is -1 (errors only), 0, or 1 and more (every step with its time). Of a
    process that is ``silent`` only errors are heard, which ``speaker`` introduces. ``arguments``
    are the command line's, and ``resuming`` those that go on with it once it is interrupted.
    What has been shown was ``for_programs`` in JSON or CSV.
    """

    verbosity: int = 0
    silent: bool = False
    speaker: str = ""
    debug: bool = False
    color: bool = True
    arguments: tuple[str, ...] = ()
    resuming: tuple[str, ...] | None = None
    for_programs: bool = False


def settings() -> OutputSettings:
    """The settings of the command that runs."""
    return click.get_current_context().ensure_object(OutputSettings)


def emit(text: str) -> None:
    """Write a result to stdout. A reader that has gone away (``| head``) has seen enough."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would raise again when the interpreter closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(report: "Report", output_format: "Format") -> None:
    """Write a report to stdout in the format that the user wants."""
    settings().for_programs = output_format in ("json", "csv")
    if settings().silent:
        return
    from morphgraph.report.tables import render

    color = settings().color and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    emit(render(report, output_format, color=color, width=_columns(sys.stdout)))


def _columns(stream: TextIO) -> int | None:
    """Columns of the terminal; ``None`` where a stream is none, and lines are not broken."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None


def note(text: str) -> None:
    """Say on stderr what was done, unless the user wants quiet."""
    if settings().verbosity >= 0:
        _say(text)


def suggest(*words: object) -> None:
    """Say on stderr which command comes next, as a shell takes it; programs need not know.

    Words that are paths are never taken for options.
    """
    if not settings().for_programs:
        line = [file_word(word) if isinstance(word, Path) else str(word) for word in words]
        note(f"next: {shlex.join(['morphgraph', *line])}")


def resumed_by(*more: str) -> None:
    """From now on an interruption leaves something: this command line goes on with it.

    Args:
        more: options that it needs beside those that it has.
    """
    now = settings()
    missing = (word for word in more if word not in now.arguments)
    now.resuming = tuple(with_options(now.arguments, *missing))


@contextmanager
def step(text: str, expected: float | None = None) -> Iterator[None]:
    """Tell a step while it takes long, in a terminal; with ``-v`` also how long it took.

    Args:
        text: what is done.
        expected: seconds that it will take, where that is known.
    """
    start = perf_counter()
    with _ticking(text, expected):
        yield
    if settings().verbosity > 0:
        _say(f"{text}: {perf_counter() - start:.2f} s")


@contextmanager
def _ticking(text: str, expected: float | None) -> Iterator[None]:
    """A line at the foot of the terminal, from two seconds on, unless others write there."""
    if not sys.stderr.isatty() or settings().verbosity < 0 or settings().silent:
        yield
        return
    start, over = perf_counter(), Event()

    def tick() -> None:
        while not over.wait(_TICK_SECONDS):
            taken = perf_counter() - start
            if taken >= _LONG_SECONDS and STATUS.idle >= 2 * _TICK_SECONDS:
                STATUS.show(f"{text}: {_time(taken, expected)}")

    thread = Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        STATUS.clear()


def _time(taken: float, expected: float | None) -> str:
    """How far a step has come.

    >>> _time(4.2, 10.0), _time(4.2, None), _time(12.0, 10.0)
    ('6 s left', '4 s so far', '12 s so far')
    """
    if expected is None or taken >= expected:
        return f"{duration(int(taken) - 1)} so far"
    return f"{duration(expected - taken)} left"


def be_silent(process: int) -> None:
    """Write errors only, with the number of this process: another one writes the rest."""
    now = settings()
    now.verbosity, now.silent, now.speaker = -1, True, f"process {process}: "


class StatusLine:
    """A line at the foot of a terminal that says how far work has come, and is written over."""

    def __init__(self) -> None:
        self._width = 0
        self._last = 0.0
        self._lock = Lock()  # a step that takes long is told by a thread

    @property
    def idle(self) -> float:
        """Seconds since somebody wrote there."""
        return perf_counter() - self._last

    def show(self, text: str) -> None:
        """Write over what stands there."""
        limit = (_columns(sys.stderr) or 80) - 1  # a longer line could not be written over
        text = _one_line(text)[:limit]
        with self._lock:
            self._write("\r" + text.ljust(self._width))
            self._width, self._last = len(text), perf_counter()

    def clear(self) -> None:
        """Make room for other lines."""
        with self._lock:
            if self._width:
                self._write("\r" + " " * self._width + "\r")
                self._width = 0

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


STATUS = StatusLine()


def complain(text: str) -> None:
    """Write an error: one line on stderr."""
    _say(f"morphgraph: error: {text}")


@contextmanager
def talking(settings: OutputSettings) -> Iterator[None]:
    """Warnings and log records become lines on stderr while a command runs."""

    def warn(message: Warning | str, category: type[Warning], *_: Any, **_place: Any) -> None:
        if settings.verbosity >= 0:
            source = "" if issubclass(category, MorphWarning) else f"{category.__name__}: "
            _say(f"morphgraph: warning: {source}{message}")

    handler = _LogLines(settings)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MorphWarning)
            warnings.showwarning = warn
            yield
    finally:
        root.removeHandler(handler)


class _LogLines(logging.Handler):
    """Other libraries' log records: they explain, and never count as our warnings."""

    def __init__(self, settings: OutputSettings) -> None:
        super().__init__(logging.INFO)
        self._settings = settings

    def emit(self, record: logging.LogRecord) -> None:
        if self._settings.verbosity > 1:
            _say(f"{record.name}: {record.getMessage()}")


def _say(text: str) -> None:
    STATUS.clear()
    try:
        print(_one_line(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _one_line(text: str) -> str:
    """Text whose control characters are shown and not obeyed; messages may quote anything."""
    if text.isprintable():
        return text
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def duration(seconds: float) -> str:
    """Time in the unit that people would use.

    >>> duration(7.2), duration(90), duration(4000)
    ('8 s', '2 min', '1 h 7 min')
    """
    if seconds < 60:
        return f"{int(seconds) + 1} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
