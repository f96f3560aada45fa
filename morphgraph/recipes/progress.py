"""How long a run will still take, from what its epochs have taken so far."""

from collections import defaultdict
from collections.abc import Mapping


class Progress:
    """Time left for a whole run.

    Epochs of networks of the same size are assumed to take as long as those that were measured.
    While none of a size was measured, they are assumed to take time in proportion to their cost.

    Args:
        work: per phase its epochs, and how much one of them is to be computed, where an epoch of
            the original is 1.

    >>> progress = Progress({"shrink-1": (2, 1.0), "retrain": (4, 0.5), "uniform": (2, 0.5)})
    >>> progress.remaining("shrink-1", 1, 10.0)
    40.0
    >>> progress.finish("shrink-1")
    >>> progress.remaining("retrain", 1, 8.0)    # a small network takes more than half the time
    40.0
    """

    def __init__(self, work: Mapping[str, tuple[int, float]]) -> None:
        self._epochs = {phase: epochs for phase, (epochs, _) in work.items()}
        self._unit = {phase: unit for phase, (_, unit) in work.items()}
        self._left = dict(self._epochs)
        self._times: dict[float, list[float]] = defaultdict(list)  # per unit, seconds of epochs

    def remaining(self, phase: str, number: int, seconds: float) -> float:
        """Seconds that the run still takes, now that epoch ``number`` (from 1) took ``seconds``."""
        self._left[phase] = self._epochs[phase] - number
        self._times[self._unit[phase]].append(seconds)
        return sum(epochs * self._each(self._unit[name]) for name, epochs in self._left.items())

    def finish(self, phase: str) -> None:
        """Take a phase as done; also one that is left out."""
        self._left[phase] = 0

    def _each(self, unit: float) -> float:
        """Seconds that an epoch will take."""
        if unit in self._times:
            return sum(self._times[unit]) / len(self._times[unit])
        seconds = sum(sum(times) for times in self._times.values())
        return unit * seconds / sum(known * len(times) for known, times in self._times.items())
