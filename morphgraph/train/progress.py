"""How long a run will still take, from what its epochs have taken so far."""

from collections.abc import Mapping


class Progress:
    """Time left for a whole run.

    Args:
        work: per phase its epochs, and how much one of them is to be computed, where an epoch of
            the original is 1.

    >>> progress = Progress({"shrink-1": (2, 1.0), "retrain": (4, 0.5)})
    >>> progress.left("shrink-1", 1, 10.0)
    30.0
    >>> progress.left("shrink-1", 2, 14.0)
    24.0
    """

    def __init__(self, work: Mapping[str, tuple[int, float]]) -> None:
        self._epochs = {phase: epochs for phase, (epochs, _) in work.items()}
        self._left = dict(self._epochs)
        self._unit = {phase: unit for phase, (_, unit) in work.items()}
        self._seconds = self._done = 0.0

    def left(self, phase: str, number: int, seconds: float) -> float:
        """Seconds left for the run after epoch ``number`` (from 1) of a phase took so long."""
        self._left[phase] = self._epochs[phase] - number
        self._done += self._unit[phase]
        self._seconds += seconds
        units = sum(epochs * self._unit[name] for name, epochs in self._left.items())
        return units * self._seconds / self._done

    def over(self, phase: str) -> None:
        """A phase is finished, or will not come."""
        self._left[phase] = 0
