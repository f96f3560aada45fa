"""What a network gives beside what the original gives, batch by batch: errors of the outputs.

Outputs may be large, and samples many: sums are kept of them, and never all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import VerificationError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.runtime import session

WORST = 100.0
"""Error that is given to outputs that are no numbers any more."""


@dataclass(frozen=True)
class OutputCheck:
    """How far an output is from the original's, on inputs that were held out.

    Attributes:
        name: of the output.
        error: root mean square of the difference, as a share of the output's; of integers the
            share that differs.
        agreement: share of places at which the largest of several numbers is the same, where the
            output looks like scores of classes; ``None`` where not.
        cosine: mean cosine between both, sample by sample; ``None`` where samples give no vectors.
    """

    name: str
    error: float
    agreement: float | None = None
    cosine: float | None = None


def run_all(model: ir.Model, feeds: Iterable[Arrays], threads: int = 0) -> Iterator[Arrays]:
    """What a model gives, batch by batch; feeds may hold more than it takes."""
    running = session(model, threads)
    names = [output.name for output in running.get_outputs()]
    taken = {source.name for source in running.get_inputs()}
    for feed in feeds:
        given = {name: array for name, array in feed.items() if name in taken}
        yield dict(zip(names, running.run(names, given), strict=True))


@dataclass
class _Sums:
    """Sums over the batches of one output."""

    differs: bool = False
    wanted: float = 0.0  # sum of squares
    difference: float = 0.0
    count: int = 0
    unequal: int = 0  # of integers
    total: Any = 0.0  # over samples, element by element
    samples: int = 0
    alike: bool = True  # all samples have one shape
    shape: tuple[int, ...] | None = None
    places: int = 0
    agreeing: int = 0
    cosines: float = 0.0
    unit: bool = True
    floating: bool = True
    rank: int = 0
    classes: int = 0

    def add(self, one: Array, other: Array) -> None:
        self.rank, self.floating = one.ndim, bool(np.issubdtype(one.dtype, np.floating))
        if one.shape != other.shape:
            self.differs = True
            return
        self.count += one.size
        if not self.floating:
            self.unequal += int((one != other).sum())
            return
        first, second = one.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(first) & np.isfinite(second)
        if not finite.all():
            if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
                self.differs = True
            first, second = np.where(finite, first, 0.0), np.where(finite, second, 0.0)
        self.wanted += float(np.square(first).sum())
        self.difference += float(np.square(first - second).sum())
        shape = one.shape[1:]
        self.alike &= self.shape in (None, shape) and one.ndim > 0
        self.shape = shape
        if self.alike:
            self.total = self.total + first.sum(axis=0)
            self.samples += len(first)
        if one.ndim >= 2:
            self._count_places(first, second)

    def _count_places(self, first: Array, second: Array) -> None:
        axis = 2 if first.ndim == 3 else 1
        rows, others = (
            np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in (first, second)
        )
        self.classes = max(self.classes, rows.shape[1])
        self.places += len(rows)
        if not rows.size:
            return
        self.agreeing += int((rows.argmax(axis=1) == others.argmax(axis=1)).sum())
        lengths = np.linalg.norm(rows, axis=1)
        self.unit &= bool(np.allclose(lengths, 1.0, atol=1e-3))
        products = np.einsum("nc,nc->n", rows, others)
        norms = lengths * np.linalg.norm(others, axis=1)
        self.cosines += float((products / np.maximum(norms, 1e-30)).sum())

    def check(self, name: str) -> OutputCheck:
        """The verdict."""
        if not self.floating:
            error = 1.0 if self.differs else self.unequal / max(self.count, 1)
            return OutputCheck(name, error)
        if self.wanted > 0:
            error = float(np.sqrt(self.difference / self.wanted))
        else:
            error = float("inf") if self.difference else 0.0
        if self.differs:
            error = float("inf")
        if self.rank < 2 or self.classes < 2 or not self.places:
            return OutputCheck(name, error)
        cosine = self.cosines / self.places if self.rank == 2 else None
        if self.unit and self.places > 1:
            return OutputCheck(name, error, None, cosine)
        return OutputCheck(name, error, self.agreeing / self.places, cosine)

    def share(self) -> float | None:
        """The squared error as a share of the variance; ``None`` of what is always the same."""
        if not self.floating:
            return 1.0 if self.differs else self.unequal / max(self.count, 1)
        if self.differs:
            return WORST
        energy = self.wanted
        if self.alike and self.samples > 1:
            energy -= float(np.square(self.total).sum()) / self.samples
        elif self.count:
            energy -= float(np.sum(self.total)) ** 2 / self.count if self.alike else 0.0
        if energy <= 1e-12 * self.wanted:
            return None
        return min(float(np.nan_to_num(self.difference / energy, nan=WORST)), WORST)


def _sums(expected: Iterable[Arrays], found: Iterable[Arrays]) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = {}
    for one, other in zip(expected, found, strict=True):
        for name, array in one.items():
            if hasattr(array, "dtype"):  # no sequences or maps
                sums.setdefault(name, _Sums()).add(array, other[name])
    return sums


def checks(expected: Iterable[Arrays], found: Iterable[Arrays]) -> tuple[OutputCheck, ...]:
    """Every output beside the original's.

    >>> one, other = [{"y": np.array([[1.0, 0.0]])}], [{"y": np.array([[0.9, 0.1]])}]
    >>> (check,) = checks(one, other)
    >>> round(check.error, 3), check.agreement
    (0.141, 1.0)
    """
    return tuple(each.check(name) for name, each in _sums(expected, found).items())


def output_error(expected: Iterable[Arrays], found: Iterable[Arrays]) -> float:
    """The squared error of all outputs, each as a share of its variance; their mean.

    Of integers and booleans the share that differs. Outputs that are always the same do not count.

    >>> ones = [{"y": np.array([[0.0], [2.0]])}]
    >>> output_error(ones, [{"y": np.array([[0.0], [1.0]])}])
    0.5
    """
    shares = [each.share() for each in _sums(expected, found).values()]
    counted = [share for share in shares if share is not None]
    return float(np.mean(counted)) if counted else 0.0


#: Largest difference, as a share of an output's scale, between the walk and the finished network.
WALKED = 1e-2


def require_same(walked: Iterable[Arrays], found: Iterable[Arrays]) -> None:
    """The finished network must give what it gave piece by piece while it was fitted.

    Raises:
        VerificationError: names the output that is another.
    """
    for one, other in zip(walked, found, strict=True):
        for name, array in one.items():
            if hasattr(array, "dtype") and np.issubdtype(array.dtype, np.floating):
                scale = float(np.abs(array[np.isfinite(array)]).max(initial=0.0)) or 1.0
                if not np.allclose(other[name], array, rtol=0, atol=WALKED * scale, equal_nan=True):
                    raise VerificationError(
                        f"output '{escape(name)}' of the fitted network is not what it was while "
                        "it was fitted; please report the model's structure, and do without the "
                        "refit (refit=False, --no-refit)"
                    )
