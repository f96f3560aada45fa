"""Numbers for the entries of a config, found by building: those that make nothing differ."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

Values = dict[str, Any]
Score = tuple[int, int]
REFUSED: Score = (2**31, 0)
_ALL = 64  # choices of all entries that are few enough to look at every one


class ConfigSearch:
    """Looks for the values of entries with the best score, and remembers what it looked at.

    Args:
        score: how many shapes, and how many attributes, differ with some entries changed.
        present: what the config says now.
        options: per entry the values that it may take, those to try first in front.
        extra: entries that are not there, with numbers that they may need; asked for at need.
        builds: how often the score may be asked.
    """

    def __init__(
        self,
        score: Callable[[Values], Score],
        present: Mapping[str, Any],
        options: Mapping[str, Sequence[Any]],
        extra: Callable[[], Iterable[Values]],
        builds: int,
    ) -> None:
        self._score = score
        self._present = present
        self._options = options
        self._extra = extra
        self._left = builds
        self._looked: dict[str, tuple[Score, Values]] = {}

    def run(self) -> tuple[Values, list[Values]]:
        """The numbers with the fewest shapes that differ, and all that make none differ."""
        options = self._options
        newest = {key: values[0] for key, values in options.items()}
        for start in (newest, {}):
            self._descend(start)
        if prod(map(len, options.values())) <= _ALL:
            for picked in product(*options.values()):
                self._look(dict(zip(options, picked, strict=True)))
        if not self._exact():
            self._add(newest)
        return min(self._looked.values(), key=lambda entry: entry[0])[1], self._exact()

    def first(self) -> Values | None:
        """Some numbers that make no shape differ, after as few builds as may be."""
        newest = {key: values[0] for key, values in self._options.items()}
        if self._look(newest)[0] == 0:
            return self._exact()[0]
        exact = self.run()[1]
        return exact[0] if exact else None

    def _add(self, values: Values) -> None:
        """State one entry more after the other, as long as fewer shapes differ by it."""
        extra = list(self._extra())
        while extra and not self._exact():
            before = self._look(values)
            for more in sorted(extra, key=lambda each: self._look(values | each)):
                self._descend(values | more)
                if self._exact():
                    return
            best = min(extra, key=lambda each: self._look(values | each))
            if self._look(values | best) >= before:
                return
            values = values | best
            extra = [each for each in extra if not each.keys() <= values.keys()]

    def _exact(self) -> list[Values]:
        """The numbers that make no shape differ, those with the fewest attributes first."""
        right = [entry for entry in self._looked.values() if entry[0][0] == 0]
        return [values for _, values in sorted(right, key=lambda e: (e[0], len(e[1])))]

    def _look(self, values: Mapping[str, Any]) -> Score:
        """The score of these numbers, built once."""
        changed = {key: v for key, v in values.items() if v != self._present.get(key)}
        known = repr(sorted(changed.items()))
        if known not in self._looked:
            if self._left <= 0:
                return REFUSED
            self._left -= 1
            self._looked[known] = self._score(changed), changed
        return self._looked[known][0]

    def _descend(self, values: Values) -> None:
        """Change one entry after the other as long as fewer shapes differ by it."""
        score = self._look(values)
        while True:
            steps = [values | {key: other} for key, each in self._options.items() for other in each]
            best = min(steps, key=self._look, default=values)
            if self._look(best) >= score:
                return
            values, score = best, self._look(best)
