"""``calibrate``: measure what kernels cost on this machine in a runtime.

Networks of random widths (:mod:`morphgraph.benchmark.probes`) run with the runtime's profiler on,
so that what is measured is what the runtime makes of them: fused, laid out and padded as it does.
Of every network some kernels are kept, rather those that take long and of which the profile says
little so far; what the next network is like follows from where the profile is worst.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import repeat

import numpy as np
import onnx

from morphgraph.arrays import Arrays, FloatArray, Shape
from morphgraph.benchmark.probes import FAMILIES, probe_network
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.device import DeviceProfile, Kernel, Predictor
from morphgraph.device.kernels import BYTES, around, dense_rule
from morphgraph.device.profile import measurements
from morphgraph.errors import ArgumentError, MorphWarning, UnsupportedError
from morphgraph.passes.analysis.measured import kernel_of
from morphgraph.runtimes import Executed, Runtime, Session, find_runtime
from morphgraph.runtimes.host import processor, version_of
from morphgraph.version import __version__

MINUTES = 5.0
KERNELS = 1000
"""Measurements that a profile holds by default: more are worth little."""
RUNS = 21
"""Profiled runs of a network; a kernel's time is the mean of their middle half."""
PER_NETWORK = 8
"""Measurements that are taken of one network at most."""
WORTH = 0.6
"""Power of a kernel's share of the time in what it is worth."""
NOISY = 0.1
"""Spread of one network's time over the whole measuring above which a machine is too noisy."""
REFERENCE = ("basic", 0)
"""The network that is run again and again: its family and seed."""
REFERENCE_RUNS = 9
_EVERY = 6  # networks between two fits


def calibrate(
    runtime: str | Runtime = "ort",
    *,
    threads: int = 1,
    minutes: float = MINUTES,
    kernels: int = KERNELS,
    resume: DeviceProfile | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    keep: Callable[[DeviceProfile], object] | None = None,
) -> DeviceProfile:
    """A profile of this machine, from which :func:`morphgraph.cost` predicts run times.

    Args:
        runtime: its name, or one.
        threads: within an operator.
        minutes: after which it ends, whatever it has.
        kernels: measurements after which it ends.
        resume: a profile to which measurements are added.
        seed: of the sizes.
        progress: told how many measurements there are.
        keep: called with the profile after the first networks and every few, so that little is
            lost.

    Raises:
        ArgumentError: ``resume`` is of another runtime, or of other threads.
        UnsupportedError: the runtime does not tell what its kernels take.

    >>> profile = calibrate(minutes=0.02, kernels=10)
    >>> len(profile.kernels) > 0, profile.runtime
    (True, 'ort')
    """
    found = find_runtime(runtime) if isinstance(runtime, str) else runtime
    return _Calibration(found, threads, seed, resume).run(minutes, kernels, progress, keep)


class _Calibration:
    def __init__(
        self, runtime: Runtime, threads: int, seed: int, resume: DeviceProfile | None
    ) -> None:
        self.runtime, self.threads = runtime, threads
        self.start = time.monotonic()
        self.kernels: list[Kernel] = []
        self.times: list[float] = []  # by the profiler
        self.run_of: list[int] = []  # of every kernel, from the end of those that were resumed
        self.resumed = resume
        self.before = 0.0
        if resume is not None:
            if (resume.runtime, resume.threads) != (runtime.name, threads):
                raise ArgumentError(
                    f"the profile is of {resume.runtime} with {resume.threads} thread(s), and "
                    f"{runtime.name} with {threads} is measured; write to another file"
                )
            self.kernels = [each.kernel for each in resume.kernels]
            self.times = [each.microseconds for each in resume.kernels]
            self.before = resume.minutes
            self.run_of = [-1] * len(self.kernels)
        self.random = np.random.default_rng([seed, len(self.kernels)])
        self.predictor: Predictor | None = None
        self.runs: list[Run] = []
        #: Microseconds of one network, before each of the runs and at the end: other programs, and
        #: other guests of the same machine, slow it down for minutes at a time.
        self.references: list[float] = []
        self.reference = self._session(*REFERENCE)[:2]
        self.layouts: list[tuple[str, int]] = []
        #: How wrong the profile was of each family, on widths that are multiples and on others.
        self.wrong: dict[tuple[str, bool], list[float]] = {
            (name, free): [] for name in FAMILIES for free in (False, True)
        }

    def run(
        self,
        minutes: float,
        most: int,
        progress: Progress,
        keep: Callable[[DeviceProfile], object] | None,
    ) -> DeviceProfile:
        number = 0
        while len(self.kernels) < most:
            progress("calibrate", len(self.kernels), most)
            if number % _EVERY == 0:
                self._again()
            self._measure(*self._next(number), most)
            if keep is not None and (number < _EVERY or number % _EVERY == 0):
                keep(self.profile())
            number += 1
            if time.monotonic() - self.start > minutes * 60:
                break
        self.references.append(self._whole(*self.reference, REFERENCE_RUNS))
        self._again()
        progress("calibrate", most, most)
        enough = len(self.wrong) * PER_NETWORK
        if len(self.kernels) < enough:
            warnings.warn(
                f"the profile has {len(self.kernels)} measurements; below {enough} it has not seen "
                "every family of networks, and guesses at what it has not: go on with --resume "
                "(resume=), and give it more minutes and kernels",
                MorphWarning,
                stacklevel=3,
            )
        return self.profile(final=True)

    def _again(self) -> None:
        """Fit what there is."""
        if self.kernels:
            self.predictor = Predictor(self.kernels, self._microseconds())

    def _next(self, number: int) -> tuple[str, bool]:
        """A family, and whether its widths are any: all once, then by how wrong the profile was."""
        kinds = list(self.wrong)
        if number < len(kinds):
            return kinds[number]
        worth = np.array([np.mean(self.wrong[kind][-3:]) for kind in kinds])
        return kinds[int(self.random.choice(len(kinds), p=worth / worth.sum()))]

    def _session(
        self, family: str, seed: int, free: bool = False
    ) -> tuple[Session, Arrays, dict[str, "_Written"]]:
        model = probe_network(family, seed, free)
        session = self.runtime.session(model, self.threads, name=f"probe {family}")
        random = np.random.default_rng(0)
        feeds = {
            one.name: random.standard_normal(
                [n if isinstance(n, int) and n > 0 else 1 for n in one.shape]
            ).astype(np.float32)
            for one in session.inputs
        }
        return session, feeds, _written(model)

    def _measure(self, family: str, free: bool, most: int) -> None:
        seed = int(self.random.integers(2**31))
        self.references.append(self._whole(*self.reference, REFERENCE_RUNS))
        session, feeds, own = self._session(family, seed, free)
        every = session.executed(feeds, RUNS)
        executed = [each for each in every if each.microseconds > 0]
        if not executed:
            raise UnsupportedError(
                f"runtime '{self.runtime.name}' tells no times of its kernels; give a table of "
                "measurements (.csv) instead"
            )
        self.layouts += [
            (each.layout, own[each.layer].channels)
            for each in executed
            if each.layout is not None and each.layer in own and own[each.layer].groups == 1
        ]
        spent = np.array([each.microseconds for each in executed])
        self.runs.append(Run(self._whole(session, feeds), spent))
        bytes_around = around(BYTES * sum(kernel_of(each).passes() for each in every))
        found: dict[Kernel, list[float]] = {}
        for each in executed:
            kernel = replace(_as_written(each, own.get(each.layer)), around=bytes_around)
            found.setdefault(kernel, []).append(each.microseconds)
        kernels = list(found)
        times = np.array([float(np.median(found[kernel])) for kernel in kernels])
        spent_on = np.array([float(np.sum(found[kernel])) for kernel in kernels])
        share = profiler_share(self.runs)
        scale = self.runs[-1].scale(share) * self._speed() / self.references[-1]
        unsure, wrong = self._doubts(kernels, without(times, share) * scale)
        self.wrong[family, free].append(wrong)
        # What takes long is worth more: a network's time is a sum. Drawn, and not the worst first:
        # a profile that is sure of a kind and wrong would never learn of it.
        worth = unsure * (spent_on / spent_on.sum()) ** WORTH
        room = min(PER_NETWORK, most - len(self.kernels), len(kernels))
        chosen = self.random.choice(len(kernels), room, replace=False, p=worth / worth.sum())
        for place in chosen:
            self.kernels.append(kernels[place])
            self.times.append(float(times[place]))
            self.run_of.append(len(self.runs) - 1)

    def _microseconds(self) -> FloatArray:
        """What each kernel takes of its network's whole run, ``[n]``."""
        share = profiler_share(self.runs)
        # Between fits nothing has been measured behind the last run yet.
        ends = [*self.references, *self.references[-1:]][: len(self.runs) + 1]
        speeds = speeds_of_runs(ends, self._speed())
        scales = np.array([*map(Run.scale, self.runs, repeat(share)), 1.0])
        scales[:-1] *= speeds
        times, places = np.array(self.times), np.array(self.run_of, dtype=int)
        return np.where(places < 0, times, without(times, share) * scales[places])

    def _speed(self) -> float:
        """What the reference takes on the machine that the profile is of."""
        if self.resumed is not None and self.resumed.reference:
            return self.resumed.reference
        return float(np.median(self.references)) if self.references else 0.0

    def _doubts(self, kernels: Sequence[Kernel], times: np.ndarray) -> tuple[np.ndarray, float]:
        """How unsure the profile is of each kernel, and how wrong of all together."""
        if self.predictor is None:
            return np.ones(len(kernels)), 1.0
        logs, unsure = self.predictor.log_times(kernels)
        shares = times / times.sum()
        wrong = float(np.sqrt(shares @ np.square(logs - np.log(times))))
        return unsure, max(wrong, 0.01)

    def _whole(self, session: Session, feeds: Arrays, count: int = RUNS) -> float:
        """Microseconds of a whole run, by the clock that `bench` would take."""
        for _ in range(3):
            session.run(feeds)
        runs = [session.timed_run(feeds) for _ in range(count)]
        on_cpu = self.threads == 1 and self.runtime.clock == "cpu"
        return float(np.median([run.cpu if on_cpu else run.wall for run in runs])) * 1e6

    def profile(self, final: bool = False) -> DeviceProfile:
        """What there is so far."""
        references = np.array(self.references)
        (multiple, below), former = dense_rule(self.layouts), self.resumed
        if former is not None:  # a few networks more may show less than those before
            multiple = max(multiple, former.blocked_multiple)
            below = max(below, former.blocked_below)
        return DeviceProfile(
            runtime=self.runtime.name,
            threads=self.threads,
            kernels=measurements(self.kernels, self._microseconds()),
            machine=processor(),
            versions={"morphgraph": __version__, **version_of(self.runtime.name)},
            measured=date.today().isoformat(),
            noise=float(np.std(references) / np.mean(references)) if len(references) else 0.0,
            reference=self._speed(),
            minutes=round(self.before + (time.monotonic() - self.start) / 60, 2),
            blocked_multiple=multiple,
            blocked_below=below,
            settings=self.predictor.settings if final and self.predictor else {},
        )


def speeds_of_runs(references: Sequence[float], wanted: float) -> FloatArray:
    """By what the times of runs are multiplied to be of one machine at one speed, ``[n]``.

    Args:
        references: times of one network before each of the runs, and once more behind the last one.
        wanted: its time at that speed.

    >>> speeds_of_runs([2.0, 2.0, 2.0, 4.0, 4.0], 2.0).round(2).tolist()  # half as fast in the end
    [1.0, 1.0, 0.71, 0.5]
    """
    times = np.array(references)
    speeds: FloatArray = wanted / np.sqrt(times[:-1] * times[1:])
    return speeds


@dataclass(frozen=True, eq=False)
class Run:
    """A network's run: microseconds of the whole, and of each kernel by the profiler, ``[n]``.

    The two differ. The profiler takes time itself, and its clock goes on while other programs have
    the processor; that of whole runs is the clock of ``bench``.
    """

    whole: float
    kernels: FloatArray

    def scale(self, share: float) -> float:
        """What makes the kernels' sum the whole, if the profiler adds ``share`` to each."""
        return self.whole / float(without(self.kernels, share).sum())


def without(times: FloatArray, share: float) -> FloatArray:
    """Microseconds of kernels without what the profiler adds; a fifth of them at least.

    >>> without(np.array([10.0, 3.0]), 2.5)
    array([7.5, 0.6])
    """
    return np.maximum(times - share, 0.2 * times)


def profiler_share(runs: Sequence[Run]) -> float:
    """Microseconds that the profiler adds to every kernel.

    Without them, sums of kernels are to whole runs the same in every network, be its kernels few
    and long or many and short: it is what makes these ratios most alike.

    >>> long, short = Run(250.0, np.full(5, 53.0)), Run(200.0, np.full(100, 5.0))
    >>> round(profiler_share([long, long, short, short]), 1)
    3.0
    """
    shortest = [float(run.kernels.min()) for run in runs]
    tried = np.arange(0.0, np.median(shortest) if shortest else 0.0, _STEP)
    spreads = []
    for share in tried:
        ratios = np.log([run.scale(share) for run in runs])
        spreads.append(np.mean(np.abs(ratios - np.median(ratios))))
    return float(tried[int(np.argmin(spreads))]) if spreads else 0.0


_STEP = 0.1  # microseconds


@dataclass(frozen=True, slots=True)
class _Written:
    """A convolution as the model has it, whatever a runtime has padded."""

    weight: Shape
    groups: int

    @property
    def channels(self) -> int:
        return self.weight[1] * self.groups


def _written(model: onnx.ModelProto) -> dict[str, _Written]:
    """The convolutions of a model by the names of their nodes."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return {
        node.name: _Written(
            shapes[node.input[1]],
            next((a.i for a in node.attribute if a.name == "group"), 1),
        )
        for node in model.graph.node
        if node.op_type == "Conv"
    }


def _as_written(executed: Executed, own: _Written | None) -> Kernel:
    """A kernel that ran, with the channels that the model has: what padding costs is its time."""
    kernel = kernel_of(executed)
    if own is None or executed.layout is None:
        return kernel
    operand, _, *more = kernel.inputs
    result = kernel.outputs[0]
    inputs = ((operand[0], own.channels, *operand[2:]), own.weight, *more)
    return replace(kernel, inputs=inputs, outputs=((result[0], own.weight[0], *result[2:]),))
