"""``bench``: time models side by side, and say which is faster and how sure that is."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np

from morphgraph.benchmark.profile import Profile, Structure, compare_profiles
from morphgraph.benchmark.sessions import Durations, Entry, Feeding, model_name, time_rounds
from morphgraph.benchmark.statistics import Judgement, PairedRatio, judge, paired_ratio, summarize
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import ModelLike, as_model, escape
from morphgraph.onnx_io.fixed import Fixed
from morphgraph.passes.canonical.fix_inputs import fix_inputs
from morphgraph.runtimes import Clock, Executed, Runtime, find_runtime
from morphgraph.version import __version__

SCHEMA_VERSION = 2

MIN_ROUNDS = 10
MAX_SECONDS = 86_400.0

_NAMED = 3
_PROFILED_SECONDS = 1.0
_MIN_PROFILED, _MAX_PROFILED = 3, 50  # runs


@dataclass(frozen=True, slots=True)
class Convolutions:
    """How many convolutions a runtime runs, and the layers of those outside its blocked layout."""

    count: int
    outside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelTiming:
    """One model's runs in one runtime, and how it compares with the first model there.

    Times are milliseconds of the clock that :class:`BenchResult` names; the medians of both clocks
    stand beside. ``speedup`` and ``flops_ratio`` are first model over this one: 2 is twice as fast,
    and half the arithmetic. ``runtime_speedup`` is this model's own time in the first runtime over
    that in this one. Intervals are of 95 %. ``self_ratio`` is what the first model's ``speedup``
    over itself comes out as, in a second session: how far it is from 1 is how far to trust the
    rest. ``convolutions`` is None where the runtime has no blocked layout, or does not tell.
    """

    name: str
    runtime: str
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    cv: float
    cpu_p50_ms: float
    wall_p50_ms: float
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    flops_ratio: float | None = None
    unstable: bool | None = None
    runtime_speedup: float | None = None
    runtime_speedup_interval: tuple[float, float] | None = None
    self_ratio: PairedRatio | None = None
    convolutions: Convolutions | None = None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, and how.

    ``models`` has a timing per runtime and model. ``clock`` is ``"cpu"`` (process CPU time, at one
    thread) or ``"wall"``. ``epochs`` is how often all sessions were built anew. ``profiles`` are of
    every model after the first in each runtime, or of the only one, where they were asked for.
    ``part`` is which of several files of a network was timed, where the models are folders.
    """

    models: tuple[ModelTiming, ...]
    verdict: str
    clock: Clock
    threads: int
    batch: int | None
    seed: int
    epochs: int
    profiles: tuple[Profile, ...] = ()
    part: str = ""
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    @property
    def self_ratio(self) -> PairedRatio | None:
        """The speed-up of the first model over itself; None where there is but one model."""
        return self.models[0].self_ratio


@dataclass(frozen=True, slots=True)
class BenchSweep:
    """Results at several numbers of threads and sizes of the batch, or of several files."""

    points: tuple[BenchResult, ...]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def bench(
    models: Sequence[ModelLike],
    *,
    runtimes: Sequence[str | Runtime] = ("ort",),
    threads: int = 1,
    seconds: float = 5.0,
    batch: int | None = None,
    seed: int = 0,
    flops: Sequence[float] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    profile: bool = False,
    structures: Sequence[Structure] | None = None,
    fixed: Fixed | None = None,
    names: Sequence[str] | None = None,
) -> BenchResult:
    """Time models in turn, on the same random inputs.

    Args:
        models: paths or models; all are compared with the first.
        runtimes: where each of them runs, by names that
            :func:`morphgraph.runtimes.find_runtime` knows, or built.
        threads: within an operator. CPU time is the measure at one thread on this machine's CPU,
            wall time at more, and elsewhere.
        seconds: how long to run each model in each runtime, building sessions apart; at least 10
            rounds are run.
        batch: size of leading axes that the models leave open; 1 if not given.
        seed: of the inputs and of the order in which the models take turns.
        flops: FLOPs per model, to be set beside the speed-ups.
        input_shapes: shapes of inputs that the models leave open, by name.
        profile: whether to look where the time goes, kernel by kernel.
        structures: per model what its channel graph says of its nodes
            (:func:`morphgraph.benchmark.profile.structure_of`): layers and FLOPs of the profile.
        fixed: by input the value that it is fixed to, as of :func:`morphgraph.lift`.
        names: how to call the models; by default by their files or graphs.

    Raises:
        FileError: there is no such file.
        ModelError: a file is broken, or the models do not take the same batch.
        UnsupportedError: a runtime does not run a model, or an argument makes no sense.

    >>> import onnx_ir as ir
    >>> x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1, 8])
    >>> relu = ir.node("Relu", [x])
    >>> graph = ir.Graph([x], relu.outputs, nodes=[relu], opset_imports={"": 20}, name="relu")
    >>> result = bench([ir.Model(graph, ir_version=10)], seconds=0.01)
    >>> result.models[0].name, result.models[0].runs >= 10, result.clock
    ('relu', True, 'cpu')
    """
    _check_arguments(models, runtimes, threads, seconds, batch, flops)
    if names is not None and len(names) != len(models):
        raise UnsupportedError(
            f"bench: names: {len(names)} for {len(models)} models; give one each"
        )
    found = [model_name(model, position) for position, model in enumerate(models)]
    names = _unique(list(map(escape, names or ())) or found)
    if fixed:
        models = [fix_inputs(as_model(model), fixed) for model in models]
    if structures is not None and len(structures) != len(models):
        raise UnsupportedError(
            f"bench: structures: {len(structures)} for {len(models)} models; give one each"
        )
    places = [find_runtime(one) if isinstance(one, str) else one for one in runtimes]
    on_cpu = threads == 1 and all(place.clock == "cpu" for place in places)
    clock: Clock = "cpu" if on_cpu else "wall"
    entries = [
        Entry(place, model, name)
        for place, (model, name) in product(places, zip(models, names, strict=True))
    ]
    # The first model of a runtime takes two turns a round, in a session of its own each time.
    again = entries[:: len(models)] if len(models) > 1 else []
    assumed: dict[str, Sequence[int]] = {}
    for structure in structures or ():
        assumed = {**structure.inputs, **assumed}
    feeding = Feeding(batch, seed, input_shapes or {}, assumed)
    # First, as it may turn out that a runtime has none.
    profiles = (
        tuple(_profiles(entries, len(models), threads, feeding, structures)) if profile else ()
    )
    durations = time_rounds([*entries, *again], threads, seconds, feeding, MIN_ROUNDS)
    race = _Race(entries, len(models), durations, clock, flops)
    timings = [
        replace(
            race.timing(index),
            convolutions=_convolutions(
                entry, threads, structures[index % len(models)].layers if structures else {}
            ),
        )
        for index, entry in enumerate(entries)
    ]
    spent = "CPU time" if clock == "cpu" else "wall time"
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    sentences = [f"Measured is {spent} at {counted}."]
    for index, timing in enumerate(timings):
        sentences += [race.sentence(index, timing), *_outside(timing)]
    return BenchResult(
        models=tuple(timings),
        verdict=" ".join(sentences),
        clock=clock,
        threads=threads,
        batch=batch,
        seed=seed,
        epochs=int(durations.epochs[-1]) + 1,
        profiles=profiles,
    )


def _profiles(
    entries: Sequence[Entry],
    models: int,
    threads: int,
    feeding: Feeding,
    structures: Sequence[Structure] | None,
) -> Iterator[Profile]:
    """Where the time of every model goes, or of the only one."""
    kernels = [_kernels(entry, threads, feeding) for entry in entries]
    for index, entry in enumerate(entries):
        first = index - index % models
        if models > 1 and index == first:
            continue
        known = None if structures is None else (structures[0], structures[index % models])
        yield compare_profiles(
            (entries[first].name if models > 1 else None, entry.name),
            entry.runtime.name,
            kernels[first] if models > 1 else [],
            kernels[index],
            known,
        )


def _kernels(entry: Entry, threads: int, feeding: Feeding) -> Sequence[Executed]:
    session = entry.runtime.session(entry.model, threads, name=entry.name)
    feeds = feeding.feeds(session, entry.name)
    session.run(feeds)
    runs = _PROFILED_SECONDS / max(session.timed_run(feeds).wall, 1e-6)
    return session.executed(feeds, int(min(max(runs, _MIN_PROFILED), _MAX_PROFILED)))


@dataclass(frozen=True, slots=True)
class _Race:
    """Durations of models in runtimes: all models in the first, then in the next.

    Behind them stand those of each runtime's first model in a second session, if there are others.
    """

    entries: Sequence[Entry]
    models: int
    durations: Durations
    clock: Clock
    flops: Sequence[float] | None

    def _ratio(self, base: int, other: int) -> PairedRatio:
        turns = np.median(self.durations.by(self.clock), axis=2)  # [rounds, models]
        return paired_ratio(turns[:, base], turns[:, other], self.durations.epochs)

    def _first(self, index: int) -> int:
        """The first model in the same runtime."""
        return index - index % self.models

    def _self_ratio(self, index: int) -> PairedRatio | None:
        again = len(self.entries) + index // self.models
        return self._ratio(self._first(index), again) if self.models > 1 else None

    def timing(self, index: int) -> ModelTiming:
        entry, first = self.entries[index], self._first(index)
        timing = ModelTiming(
            name=entry.name,
            runtime=entry.runtime.name,
            **asdict(summarize(self.durations.by(self.clock)[:, index].ravel())),
            cpu_p50_ms=1e3 * float(np.median(self.durations.cpu[:, index])),
            wall_p50_ms=1e3 * float(np.median(self.durations.wall[:, index])),
        )
        if index >= self.models:
            across = self._ratio(index % self.models, index)
            timing = replace(
                timing,
                runtime_speedup=across.ratio,
                runtime_speedup_interval=(across.low, across.high),
            )
        if index == first:
            return replace(timing, self_ratio=self._self_ratio(index))
        speedup = self._ratio(first, index)
        flops = self.flops
        return replace(
            timing,
            speedup=speedup.ratio,
            speedup_interval=(speedup.low, speedup.high),
            flops_ratio=None if flops is None else flops[0] / flops[index % self.models],
            unstable=self._judgement(index) == "unstable",
        )

    def _judgement(self, index: int) -> Judgement:
        self_ratio = self._self_ratio(index)
        assert self_ratio is not None  # there are several models
        return judge(self._ratio(self._first(index), index), self_ratio)

    def sentence(self, index: int, timing: ModelTiming) -> str:
        """What the verdict says of a model."""
        name = self._label(index)
        if index == self._first(index):
            return f"{name} takes {timing.p50_ms:.3g} ms ({timing.runs} runs{_across(timing)})."
        base, speedup = self._label(self._first(index)), self._ratio(self._first(index), index)
        self_ratio = self._self_ratio(index)
        assert self_ratio is not None
        measured, promise = f"{_times(speedup)} as fast", _promise(timing)
        match self._judgement(index):
            case "unstable":
                return (
                    f"{name} against {base}: the machine was too noisy to say; measured "
                    f"{measured}, but {base} came out {_times(self_ratio)} as fast as itself. Run "
                    "longer, or on a quieter machine."
                )
            case "faster":
                return f"{name} is {measured} as {base}{promise}."
            case "slower":
                return f"{name} is slower: {measured} as {base}{promise}."
            case "same":
                return f"{name} is neither faster nor slower than {base}: {measured}{promise}."

    def _label(self, index: int) -> str:
        entry = self.entries[index]
        several = len(self.entries) > self.models
        return f"{entry.name} in {entry.runtime.name}" if several else entry.name


def _across(timing: ModelTiming) -> str:
    if timing.runtime_speedup is None or timing.runtime_speedup_interval is None:
        return ""
    ratio = PairedRatio(timing.runtime_speedup, *timing.runtime_speedup_interval)
    return f", {_times(ratio)} as fast as in the first runtime"


def _convolutions(entry: Entry, threads: int, layers: Mapping[str, str]) -> Convolutions | None:
    """The convolutions of a model in a runtime that has a blocked layout and tells of it."""
    session = entry.runtime.session(entry.model, threads, name=entry.name)
    try:
        operators = session.operators()
    except UnsupportedError:
        return None
    laid_out = [
        operator
        for operator in operators
        if operator.layout is not None and "Conv" in operator.op_type
    ]
    outside = [operator for operator in laid_out if operator.layout == "plain"]
    if not laid_out:
        return None
    names = [one.layer or one.name for one in outside]
    return Convolutions(len(laid_out), tuple(layers.get(name, name) for name in names))


def _outside(timing: ModelTiming) -> list[str]:
    """What the verdict says of convolutions outside the blocked layout."""
    found = timing.convolutions
    if found is None or not found.outside:
        return []
    more = len(found.outside) - _NAMED
    named = ", ".join(found.outside[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return [
        f"{len(found.outside)} of its {found.count} convolutions run outside the blocked layout: "
        f"{named}."
    ]


def _check_arguments(
    models: Sequence[ModelLike],
    runtimes: Sequence[str | Runtime],
    threads: int,
    seconds: float,
    batch: int | None,
    flops: Sequence[float] | None,
) -> None:
    if not models:
        raise UnsupportedError("bench: there is no model to time; give at least one")
    if not runtimes:
        raise UnsupportedError("bench: there is no runtime to time them in; give ort")
    if threads < 1:
        raise UnsupportedError(f"bench: threads: {threads} is not a number of threads; give 1")
    if not 0 < seconds < MAX_SECONDS:
        raise UnsupportedError(f"bench: seconds: {seconds} is not a duration; give 5, say")
    if batch is not None and batch < 1:
        raise UnsupportedError(f"bench: batch: {batch} is not a batch size; give 1 or more")
    if flops is not None and (len(flops) != len(models) or min(flops) <= 0):
        raise UnsupportedError(
            f"bench: flops: {list(flops)} for {len(models)} models; give one positive number each"
        )


def _unique(names: Sequence[str]) -> list[str]:
    """Names with their places where they are not unique.

    >>> _unique(["a/m.onnx", "b.onnx", "a/m.onnx"])
    ['a/m.onnx (1)', 'b.onnx', 'a/m.onnx (3)']
    """
    counts = Counter(names)
    return [
        f"{name} ({position})" if counts[name] > 1 else name
        for position, name in enumerate(names, start=1)
    ]


def _times(ratio: PairedRatio) -> str:
    return f"{ratio.ratio:.2f} times (95 %: {ratio.low:.2f} to {ratio.high:.2f})"


def _promise(timing: ModelTiming) -> str:
    if timing.flops_ratio is None:
        return ""
    return f", with {1 / timing.flops_ratio:.0%} of its FLOPs"
