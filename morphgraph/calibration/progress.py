"""How far long work has come."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is; 0 if unknown."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody."""
    del phase, done, total
