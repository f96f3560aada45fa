"""How far long work has come, on stderr: a line that is written over, or a few lines in a log."""

import sys
from time import monotonic

from morphgraph.cli.console import STATUS, duration, note, settings

_REDRAW_SECONDS = 0.2
_LINE_SECONDS = 5.0  # between two lines in a log, at least
_STEPS = 10  # lines in a log of a phase, at most


class ProgressLines:
    """Tells the user; is called with a phase, how much of it is done, and how much there is.

    In a terminal one line is written over, with the time left. Elsewhere there is a line for every
    tenth of work that takes long, and none of work that takes a few seconds.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._began = self._last = 0.0
        self._step = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say it, if it is time to."""
        now = monotonic()
        if phase != self._phase:
            self._phase, self._began, self._last, self._step = phase, now, now, 0
        if settings().verbosity < 0 or settings().silent:
            return
        if sys.stderr.isatty():
            self._redraw(now, done, total)
        else:
            self._log(now, done, total)

    def _redraw(self, now: float, done: int, total: int) -> None:
        if total and done >= total:
            STATUS.clear()
        elif now - self._last >= _REDRAW_SECONDS:
            self._last = now
            STATUS.show(self._line(now, done, total))

    def _log(self, now: float, done: int, total: int) -> None:
        step = done * _STEPS // total if total else self._step + 1
        if step > self._step and done != total and now - self._last >= _LINE_SECONDS:
            self._last, self._step = now, step
            note(self._line(now, done, total))

    def _line(self, now: float, done: int, total: int) -> str:
        if not total:
            return f"{self._phase}: {done}"
        left = (now - self._began) / max(done, 1) * (total - done)
        return f"{self._phase}: {done} of {total}, {duration(left)} left"
