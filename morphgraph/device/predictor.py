"""What a kernel's run time is, learned from measurements.

By kind of kernel two steps. First physics: a start, arithmetic, and numbers moved, each at a price
that is not negative; it also carries beyond the sizes that were measured. Then what physics does
not say, how efficient a kernel is at these sizes: a Gaussian process on the logarithm of the ratio
(Rasmussen & Williams 2006, chapters 2 and 5), whose variance says where it would be worth to
measure more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from scipy import linalg

from morphgraph.arrays import FloatArray
from morphgraph.device.kernels import Kernel

#: Measurements of a kind from which on a process is fitted, and spreads that it begins with.
ENOUGH = 5
BLOCKS = (1, 4, 8, 16, 32)
#: The unexplained spread of a kind with too few measurements, in the logarithm.
UNKNOWN = 0.5
#: Rounds of a fit, and of one that only compares blocks; features of kinds without channels.
ROUNDS, FEW_ROUNDS = 60, 12
FEW_FEATURES = 4


@dataclass(frozen=True, eq=False)
class Process:
    """A Gaussian process on standardized features.

    Attributes:
        points: features of what was measured, standardized, ``[measurements, features]``.
        mean, scale: what they were standardized by, ``[features]``.
        theta: logarithms of the lengths on which features matter, of spread and noise,
            ``[features + 2]``.
        weights: of the points in a prediction, ``[measurements]``.
        factor: of the points' covariance.
        residuals: each value without what the others predict of it.
    """

    points: FloatArray
    mean: FloatArray
    scale: FloatArray
    theta: FloatArray
    weights: FloatArray
    factor: Any
    residuals: FloatArray

    @property
    def spread(self) -> float:
        """Standard deviation of what the process says of a point far from all others."""
        return float(np.exp(self.theta[-2]))

    @property
    def noise(self) -> float:
        """Standard deviation of a measurement."""
        return float(np.exp(self.theta[-1]))

    def predict(self, features: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation at some features, ``[n, features]``."""
        cross = self.spread**2 * _similar(
            (features - self.mean) / self.scale, self.points, np.exp(self.theta[:-2])
        )
        solved = linalg.cho_solve(self.factor, cross.T, check_finite=False)
        variance = self.spread**2 - np.einsum("np,pn->n", cross, solved)
        return cross @ self.weights, np.sqrt(np.maximum(variance, 0.0) + self.noise**2)


def _similar(one: FloatArray, other: FloatArray, lengths: FloatArray) -> FloatArray:
    apart = (one[:, None, :] - other[None, :, :]) / lengths
    similar: FloatArray = np.exp(-0.5 * np.square(apart).sum(axis=2))
    return similar


def fit_process(
    features: FloatArray, values: FloatArray, known: FloatArray | None = None, rounds: int = 60
) -> Process:
    """The process under which values with mean 0 are likeliest.

    Args:
        features: ``[n, features]``.
        values: ``[n]``.
        known: logarithms of lengths, spread and noise, where they have been found before.
        rounds: of the search for them.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    points = (features - mean) / scale
    count, size = points.shape
    varies = features.std(axis=0) > 0
    start = np.concatenate([np.where(varies, 0.5, 5.0), [np.log(0.2), np.log(0.03)]])

    def covariance(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        similar = np.exp(2 * theta[size]) * _similar(points, points, np.exp(theta[:size]))
        return similar, similar + np.eye(count) * (np.exp(2 * theta[size + 1]) + 1e-10)

    def unlikely(theta: FloatArray) -> tuple[float, FloatArray]:
        similar, whole = covariance(theta)
        try:
            factor = linalg.cho_factor(whole, lower=True)
        except linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        inverse = linalg.cho_solve(factor, np.eye(count))
        weights = inverse @ values
        half = inverse - np.outer(weights, weights)
        slopes = np.empty_like(theta)
        for k in range(size):
            apart = np.square((points[:, None, k] - points[None, :, k]) / np.exp(theta[k]))
            slopes[k] = 0.5 * np.sum(half * similar * apart)
        slopes[size] = np.sum(half * similar)
        slopes[size + 1] = np.exp(2 * theta[size + 1]) * np.trace(half)
        value = 0.5 * values @ weights + np.log(np.diag(factor[0])).sum()
        # Weak beliefs: features matter on the scale of their spread, noise is a few per cent.
        width = np.concatenate([np.full(size, 1.5), [1.0, 0.7]])
        off = (theta - start) / width
        return float(value + 0.5 * off @ off), slopes + off / width

    theta = known
    if theta is None:
        from scipy import optimize

        options = {"maxiter": rounds}
        found = optimize.minimize(unlikely, start, jac=True, method="L-BFGS-B", options=options)
        theta = found.x
    _, whole = covariance(theta)
    factor = linalg.cho_factor(whole, lower=True)
    weights = linalg.cho_solve(factor, values)
    # Each value as the others predict it (Rasmussen & Williams 2006, equation 5.12).
    own = np.diag(linalg.cho_solve(factor, np.eye(count)))
    return Process(
        points,
        mean,
        scale,
        theta,
        weights,
        factor,
        weights / own,
    )


@dataclass(frozen=True, eq=False)
class KindModel:
    """What is known of one kind of kernel.

    Attributes:
        prices: in microseconds, of what :meth:`morphgraph.device.Kernel.work` counts, ``[5]``.
        block: channels that are computed together.
        process: of the logarithm of time over physics; ``None`` of a kind with few measurements.
        offset: median of that logarithm.
        error: root mean square of what the others predict of each measurement, in the logarithm.
        count: measurements of the kind.
        bounds: least and largest of what the process was fitted to.
    """

    prices: FloatArray
    block: int
    process: Process | None
    offset: float
    error: float
    count: int
    bounds: tuple[float, float] = (0.0, 0.0)

    def log_time(self, kernels: Sequence[Kernel]) -> tuple[FloatArray, FloatArray]:
        """Logarithms of microseconds, and their standard deviations, ``[n]`` each."""
        work = np.stack([kernel.work(self.block) for kernel in kernels])
        physics = np.log(np.maximum(work @ self.prices, 1e-3))
        if self.process is None:
            return physics + self.offset, np.full(len(kernels), max(self.error, 0.1))
        features = np.stack([kernel.features(self.block) for kernel in kernels])
        more, spread = self.process.predict(features)
        # No kernel is more or less efficient than those that were measured.
        more = np.clip(more, *self.bounds)
        return physics + self.offset + more, spread


def _prices(work: FloatArray, times: FloatArray) -> FloatArray:
    """Prices that are not negative, with the least relative errors."""
    from scipy import optimize  # slow to import, and of use for new measurements alone

    scale = np.maximum(work.max(axis=0), 1e-30)
    found, _ = optimize.nnls(work / scale / times[:, None], np.ones(len(times)))
    prices: FloatArray = found / scale
    return prices


class Settings(msgspec.Struct, frozen=True):
    """What was found once for a kind, so that a profile is read without a search."""

    block: int
    theta: list[float]


def fit_kind(
    kernels: Sequence[Kernel],
    times: FloatArray,
    block: int = 1,
    known: Settings | None = None,
    rounds: int = ROUNDS,
) -> KindModel:
    """What some measurements say of a kind.

    Args:
        kernels: of the kind, ``[n]``.
        times: in microseconds, ``[n]``.
        block: channels that are computed together.
        known: of an earlier fit.
        rounds: of the search, where nothing is known.
    """
    work = np.stack([kernel.work(block) for kernel in kernels])
    prices = _prices(work, times)
    ratios = np.log(times / np.maximum(work @ prices, 1e-3))
    offset = float(np.median(ratios))
    features = np.stack([kernel.features(block) for kernel in kernels])
    theta = None
    if known is not None and known.block == block and len(known.theta) == features.shape[1] + 2:
        theta = np.array(known.theta)
    process = fit_process(features, ratios - offset, theta, rounds)
    error = float(np.sqrt(np.mean(np.square(process.residuals))))
    more = ratios - offset
    return KindModel(
        prices, block, process, offset, error, len(times), (float(more.min()), float(more.max()))
    )


def fit_physics(
    kernels: Sequence[Kernel], times: FloatArray, block: int, prices: FloatArray | None = None
) -> KindModel:
    """What few measurements say, or those of many kinds have in common.

    Args:
        kernels: ``[n]``.
        times: in microseconds, ``[n]``.
        block: channels that are computed together.
        prices: of work; fitted if not given.
    """
    work = np.stack([kernel.work(block) for kernel in kernels])
    prices = _prices(work, times) if prices is None else prices
    offset = float(np.median(np.log(times / np.maximum(work @ prices, 1e-3))))
    return KindModel(prices, block, None, offset, UNKNOWN, len(times))


class Predictor:
    """Run times of kernels, from measurements of others."""

    def __init__(
        self,
        kernels: Sequence[Kernel],
        times: FloatArray,
        known: Mapping[str, Settings] | None = None,
    ) -> None:
        known = known or {}
        by_kind: dict[str, list[int]] = {}
        for place, kernel in enumerate(kernels):
            by_kind.setdefault(kernel.kind, []).append(place)
        self.kinds: dict[str, KindModel] = {}
        few: dict[str, int] = {}
        for together in _computed_alike(by_kind).values():
            data = {k: ([kernels[p] for p in by_kind[k]], times[by_kind[k]]) for k in together}
            block = _block_of(data, known)
            for kind, (some, spent) in data.items():
                if len(spent) < ENOUGH:
                    few[kind] = block
                else:
                    self.kinds[kind] = fit_kind(some, spent, block, known.get(kind))
        computes = np.array([kernel.work()[1] > 0 for kernel in kernels])
        light, heavy = (np.flatnonzero(each).tolist() for each in (~computes, computes))
        every = [*range(len(kernels))]
        block = max((model.block for model in self.kinds.values()), default=1)
        #: For kinds that were never measured: by what they move, and by what they compute.
        self.other = fit_physics([kernels[k] for k in light or every], times[light or every], 1)
        self.heavy = fit_physics([kernels[k] for k in heavy or every], times[heavy or every], block)
        for kind, own in few.items():
            some, spent = [kernels[p] for p in by_kind[kind]], times[by_kind[kind]]
            common = self.heavy if some[0].work()[1] > 0 else self.other
            self.kinds[kind] = fit_physics(some, spent, own, common.prices)
        self._known: dict[Kernel, float] = {}

    @property
    def settings(self) -> dict[str, Settings]:
        """What was found for every kind."""
        return {
            kind: Settings(model.block, model.process.theta.tolist())
            for kind, model in self.kinds.items()
            if model.process is not None
        }

    def log_times(self, kernels: Sequence[Kernel]) -> tuple[FloatArray, FloatArray]:
        """Logarithms of microseconds, and their standard deviations, ``[n]`` each."""
        found, spread = np.empty(len(kernels)), np.empty(len(kernels))
        by_kind: dict[str, list[int]] = {}
        for place, kernel in enumerate(kernels):
            by_kind.setdefault(kernel.kind, []).append(place)
        for kind, places in by_kind.items():
            chosen = [kernels[place] for place in places]
            if kind in self.kinds:
                found[places], spread[places] = self.kinds[kind].log_time(chosen)
                continue
            spread[places] = UNKNOWN
            common = self.heavy if chosen[0].work()[1] > 0 else self.other
            found[places], _ = self.kinds.get(self._alike(kind), common).log_time(chosen)
        return found, spread

    def _alike(self, kind: str) -> str:
        """Of a kind that was not measured the one that runs most alike; else empty."""
        name, *words = kind.split()
        if name == "Conv":
            form, layout = words
            others = [f"Conv {each} {layout}" for each in _FORMS.get(form, ())]
        elif words in (["blocked"], ["plain"]):  # a pooling; tables may tell no layout
            others = [name, f"{name} blocked", f"{name} plain"]
        else:
            others = []
        return next((other for other in others if other in self.kinds), "")

    def times(self, kernels: Sequence[Kernel]) -> FloatArray:
        """Microseconds, ``[n]``."""
        new = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._known]
        if new:
            logs, _ = self.log_times(new)
            self._known.update(zip(new, np.exp(logs).tolist(), strict=True))
        return np.array([self._known[kernel] for kernel in kernels])


_FORMS: Mapping[str, tuple[str, ...]] = {
    "dense": ("pointwise", "image", "grouped"),
    "image": ("dense", "pointwise"),
    "pointwise": ("dense", "grouped"),
    "grouped": ("dense", "pointwise"),
}
"""Forms of convolutions that run alike, the nearest first."""


def _computed_alike(kinds: Iterable[str]) -> dict[str, list[str]]:
    """Kinds whose channels lie alike, and so are computed in one block."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        words = kind.split()
        found.setdefault(f"Conv {words[-1]}" if words[0] == "Conv" else kind, []).append(kind)
    return found


def _block_of(
    data: Mapping[str, tuple[Sequence[Kernel], FloatArray]], known: Mapping[str, Settings]
) -> int:
    """The block under which measurements predict each other best: the staircase in the width."""
    for kind in data:
        if kind in known:
            return known[kind].block
    with_channels = {
        kind: each
        for kind, each in data.items()
        if len(each[1]) >= ENOUGH and len(each[0][0].features(1)) > FEW_FEATURES
    }
    if not with_channels:
        return 1
    errors = {}
    for block in BLOCKS:
        tried = [fit_kind(*each, block, None, FEW_ROUNDS) for each in with_channels.values()]
        errors[block] = sum(model.error**2 * model.count for model in tried)
    return min(errors, key=lambda block: errors[block])
