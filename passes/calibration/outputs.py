"""What a network gives beside what the original gives, batch by batch: errors of the outputs.

Outputs may be large, and samples many: sums are kept of them, and never all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from morphgraph.arrays import Array, Arrays, Flags
from morphgraph.errors import VerificationError
from morphgraph.onnx_io import escape

WORST = 100.0
"""Error that is given to outputs that are no numbers any more."""
_CHUNK = 2**16
"""Numbers that are summed in their own precision."""


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


def _squares(array: Array, less: Array | None = None) -> float:
    """The sum of squares of an array, or of its difference from another."""
    flat, other, total = array.reshape(-1), None if less is None else less.reshape(-1), 0.0
    for start in range(0, flat.size, _CHUNK):
        part = _wide(flat[start : start + _CHUNK])
        if other is not None:
            part = part - _wide(other[start : start + _CHUNK])
        total += float(np.dot(part, part))
    return total


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _not_finite(array: Array) -> Flags | None:
    """Where an array holds no finite numbers; ``None``: nowhere."""
    with np.errstate(all="ignore"):
        if np.isfinite(_wide(array).sum()):
            return None
    missing: Flags = ~np.isfinite(array)
    return missing if missing.any() else None


@dataclass
class Energy:
    """How much an output of the original varies, from sums over the batches."""

    floating: bool = True
    squares: float = 0.0
    count: int = 0
    total: Any = 0.0  # over samples, element by element
    samples: int = 0
    alike: bool = True  # all samples have one shape
    shape: tuple[int, ...] | None = None

    def add(self, one: Array) -> None:
        """Count a batch."""
        self.floating = bool(np.issubdtype(one.dtype, np.floating))
        self.count += one.size
        if not self.floating:
            return
        if (missing := _not_finite(one)) is not None:
            one = np.where(missing, 0, one)
        self.squares += _squares(one)
        shape = one.shape[1:]
        self.alike &= self.shape in (None, shape) and one.ndim > 0
        self.shape = shape
        if self.alike:
            self.total = self.total + one.sum(axis=0, dtype=np.float64)
            self.samples += len(one)

    def variance(self) -> float:
        """The sum of squares from the mean over the samples."""
        energy = self.squares
        if self.alike and self.samples > 1:
            energy -= float(np.square(self.total).sum()) / self.samples
        elif self.count:
            energy -= float(np.sum(self.total)) ** 2 / self.count if self.alike else 0.0
        return energy


@dataclass
class Difference:
    """How far an output is from the original's, from sums over the batches.

    Attributes:
        differs: shapes do, or where there are no finite numbers.
        squares: of the differences.
        unequal: how many integers differ.
    """

    differs: bool = False
    squares: float = 0.0
    unequal: int = 0

    def add(self, one: Array, other: Array) -> None:
        """Count a batch of the original's and of the other network's."""
        if one.shape != other.shape:
            self.differs = True
            return
        if not np.issubdtype(one.dtype, np.floating):
            self.unequal += int((one != other).sum())
            return
        if _not_finite(one) is not None or _not_finite(other) is not None:
            missing = ~np.isfinite(one) | ~np.isfinite(other)
            if not np.array_equal(one[missing], other[missing], equal_nan=True):
                self.differs = True
            one, other = (np.where(missing, 0, each) for each in (one, other))
        self.squares += _squares(one, other)

    def share(self, energy: Energy) -> float | None:
        """The squared error as a share of the variance; ``None`` of what is always the same."""
        if not energy.floating:
            return 1.0 if self.differs else self.unequal / max(energy.count, 1)
        if self.differs:
            return WORST
        variance = energy.variance()
        if variance <= 1e-12 * energy.squares:
            return None
        return min(float(np.nan_to_num(self.squares / variance, nan=WORST)), WORST)


@dataclass
class OutputErrors:
    """Sums over the batches of all outputs of a network.

    >>> errors, energies = OutputErrors(), Energies()
    >>> energies.add({"y": np.array([[0.0], [2.0]])})
    >>> errors.add({"y": np.array([[0.0], [2.0]])}, {"y": np.array([[0.0], [1.0]])})
    >>> errors.share(energies)
    0.5
    """

    of: dict[str, Difference] = field(default_factory=dict)

    def add(self, expected: Arrays, found: Arrays) -> None:
        """Count a batch of the original's and of the other network's outputs."""
        for name, array in _arrays(expected):
            self.of.setdefault(name, Difference()).add(array, found[name])

    def share(self, energies: "Energies") -> float:
        """The squared error of all outputs, each as a share of its variance; their mean."""
        shares = [each.share(energies.of[name]) for name, each in self.of.items()]
        counted = [share for share in shares if share is not None]
        return float(np.mean(counted)) if counted else 0.0


@dataclass
class Energies:
    """How much all outputs of the original vary."""

    of: dict[str, Energy] = field(default_factory=dict)

    def add(self, outputs: Arrays) -> None:
        """Count a batch."""
        for name, array in _arrays(outputs):
            self.of.setdefault(name, Energy()).add(array)


def _arrays(outputs: Arrays) -> Iterator[tuple[str, Array]]:
    """Those that are no sequences or maps."""
    return ((name, array) for name, array in outputs.items() if hasattr(array, "dtype"))


def output_error(expected: Iterable[Arrays], found: Iterable[Arrays]) -> float:
    """The squared error of all outputs, each as a share of its variance; their mean.

    Of integers and booleans the share that differs. Outputs that are always the same do not count.

    >>> ones = [{"y": np.array([[0.0], [2.0]])}]
    >>> output_error(ones, [{"y": np.array([[0.0], [1.0]])}])
    0.5
    """
    errors, energies = OutputErrors(), Energies()
    for one, other in zip(expected, found, strict=True):
        errors.add(one, other)
        energies.add(one)
    return errors.share(energies)


def _class_axis(array: Array) -> int:
    """The axis of an output on which scores of classes would stand."""
    return 2 if array.ndim == 3 else 1


def answers(array: Any) -> int:
    """How many places an output has per sample; 1 of what is no array of numbers.

    >>> answers(np.zeros((2, 10))), answers(np.zeros((2, 512, 32000)))
    (1, 512)
    """
    if not hasattr(array, "dtype") or array.ndim < 2 or not array.size:
        return 1
    return int(array.size // (len(array) * array.shape[_class_axis(array)]))


@dataclass
class _Places:
    """Where the largest numbers of an output stand, and the angle between both, summed."""

    energy: Energy = field(default_factory=Energy)
    difference: Difference = field(default_factory=Difference)
    places: int = 0
    agreeing: int = 0
    cosines: float = 0.0
    unit: bool = True
    rank: int = 0
    classes: int = 0

    def add(self, one: Array, other: Array) -> None:
        self.rank = one.ndim
        self.energy.add(one)
        self.difference.add(one, other)
        if one.shape != other.shape or not self.energy.floating or one.ndim < 2:
            return
        for first, second in zip(one, other, strict=True):  # sample by sample: they may be large
            both = np.isfinite(first) & np.isfinite(second)
            self._count(
                *(np.where(both, each, 0.0).astype(np.float64)[None] for each in (first, second))
            )

    def _count(self, first: Array, second: Array) -> None:
        axis = _class_axis(first)
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
        energy, difference = self.energy, self.difference
        if not energy.floating:
            return OutputCheck(name, difference.share(energy) or 0.0)
        if energy.squares > 0:
            error = float(np.sqrt(difference.squares / energy.squares))
        else:
            error = float("inf") if difference.squares else 0.0
        if difference.differs:
            error = float("inf")
        if self.rank < 2 or self.classes < 2 or not self.places:
            return OutputCheck(name, error)
        cosine = self.cosines / self.places if self.rank == 2 else None
        if self.unit and self.places > 1:
            return OutputCheck(name, error, None, cosine)
        return OutputCheck(name, error, self.agreeing / self.places, cosine)


def checks(expected: Iterable[Arrays], found: Iterable[Arrays]) -> tuple[OutputCheck, ...]:
    """Every output beside the original's.

    >>> one, other = [{"y": np.array([[1.0, 0.0]])}], [{"y": np.array([[0.9, 0.1]])}]
    >>> (check,) = checks(one, other)
    >>> round(check.error, 3), check.agreement
    (0.141, 1.0)
    """
    sums: dict[str, _Places] = {}
    for one, other in zip(expected, found, strict=True):
        for name, array in _arrays(one):
            sums.setdefault(name, _Places()).add(array, other[name])
    return tuple(each.check(name) for name, each in sums.items())


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
