"""``bench``: time models side by side, and say which is faster and how sure that is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from morphgraph.benchmark.runtimes import Clock, find_runtime
from morphgraph.benchmark.sessions import Durations, Entry, Feeding, model_name, time_rounds
from morphgraph.benchmark.statistics import Judgement, PairedRatio, judge, paired_ratio, summarize
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import ModelLike
from morphgraph.version import __version__

SCHEMA_VERSION = 1

MIN_ROUNDS = 10
MAX_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class ModelTiming:
    """One model's runs, and for every model after the first how it compares with the first.

    Times are milliseconds of the clock that :class:`BenchResult` names; the medians of both clocks
    stand beside. ``speedup`` and ``flops_ratio`` are first model over this one: 2 is twice as fast,
    and half the arithmetic.
    """

    name: str
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


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, and how.

    ``clock`` is ``"cpu"`` (process CPU time, at one thread) or ``"wall"``. ``self_ratio`` is the
    speed-up of the first model over itself in a second session, with its 95 % interval: how far it
    is from 1 is how far to trust the rest. It is None where there is but one model.
    """

    models: tuple[ModelTiming, ...]
    verdict: str
    clock: Clock
    threads: int
    batch: int | None
    seed: int
    self_ratio: PairedRatio | None
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def bench(
    models: Sequence[ModelLike],
    *,
    threads: int = 1,
    seconds: float = 5.0,
    batch: int | None = None,
    seed: int = 0,
    flops: Sequence[float] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> BenchResult:
    """Time models in ONNX Runtime on the CPU, in turn, on the same random inputs.

    Args:
        models: paths or models; all are compared with the first.
        threads: within an operator. CPU time is the measure at one thread, wall time at more.
        seconds: how long to run each model, warm-up apart; at least 10 rounds are run.
        batch: size of leading axes that the models leave open; 1 if not given.
        seed: of the inputs and of the order in which the models take turns.
        flops: FLOPs per model, to be set beside the speed-ups.
        input_shapes: shapes of inputs that the models leave open, by name.

    Raises:
        FileError: there is no such file.
        ModelError: a file is broken, or the models do not take the same batch.
        UnsupportedError: ONNX Runtime does not run a model, or an argument makes no sense.

    >>> import onnx_ir as ir
    >>> x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1, 8])
    >>> relu = ir.node("Relu", [x])
    >>> graph = ir.Graph([x], relu.outputs, nodes=[relu], opset_imports={"": 20}, name="relu")
    >>> result = bench([ir.Model(graph, ir_version=10)], seconds=0.01)
    >>> result.models[0].name, result.models[0].runs >= 10, result.clock
    ('relu', True, 'cpu')
    """
    _check_arguments(models, threads, seconds, batch, flops)
    names = _unique([model_name(model, position) for position, model in enumerate(models)])
    clock: Clock = "cpu" if threads == 1 else "wall"
    # The first model runs twice a round, in a session of its own each time, so that luck in how
    # memory was laid out shows as well.
    repeated = 1 if len(models) > 1 else 0
    runtime = find_runtime("ort")
    entries = [Entry(runtime, model, name) for model, name in zip(models, names, strict=True)]
    durations = time_rounds(
        [*entries, *entries[:repeated]],
        threads,
        seconds,
        Feeding(batch, seed, input_shapes or {}),
        MIN_ROUNDS,
    )
    measured = durations.by(clock)
    self_ratio = paired_ratio(measured[:, 0], measured[:, -1]) if repeated else None
    timings = [_timing(names[0], durations, 0, clock)]
    sentences = [_describe(timings[0], clock, threads)]
    for index, name in enumerate(names[1:], start=1):
        assert self_ratio is not None
        speedup = paired_ratio(measured[:, 0], measured[:, index])
        judgement = judge(speedup, self_ratio)
        timing = replace(
            _timing(name, durations, index, clock),
            speedup=speedup.ratio,
            speedup_interval=(speedup.low, speedup.high),
            flops_ratio=None if flops is None else flops[0] / flops[index],
            unstable=judgement == "unstable",
        )
        timings.append(timing)
        sentences.append(_sentence(judgement, timing, names[0], speedup, self_ratio))
    verdict = " ".join(sentences)
    return BenchResult(tuple(timings), verdict, clock, threads, batch, seed, self_ratio)


def _check_arguments(
    models: Sequence[ModelLike],
    threads: int,
    seconds: float,
    batch: int | None,
    flops: Sequence[float] | None,
) -> None:
    if not models:
        raise UnsupportedError("bench: there is no model to time; give at least one")
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


def _timing(name: str, durations: Durations, index: int, clock: Clock) -> ModelTiming:
    return ModelTiming(
        name=name,
        **asdict(summarize(durations.by(clock)[:, index])),
        cpu_p50_ms=summarize(durations.cpu[:, index]).p50_ms,
        wall_p50_ms=summarize(durations.wall[:, index]).p50_ms,
    )


def _describe(timing: ModelTiming, clock: Clock, threads: int) -> str:
    spent = "CPU time" if clock == "cpu" else "wall time"
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{timing.name} takes {timing.p50_ms:.3g} ms ({spent}, {counted}, {timing.runs} runs)."


def _sentence(
    judgement: Judgement,
    timing: ModelTiming,
    base: str,
    speedup: PairedRatio,
    self_ratio: PairedRatio,
) -> str:
    """What the verdict says of a model."""
    name = timing.name
    if judgement == "unstable":
        return (
            f"{name} against {base}: the machine was too noisy to say; measured "
            f"{_times(speedup)} as fast, but {base} came out {_times(self_ratio)} as fast as "
            "itself. Run longer, or on a quieter machine."
        )
    measured, promise = f"{_times(speedup)} as fast", _promise(timing)
    match judgement:
        case "faster":
            return f"{name} is {measured} as {base}{promise}."
        case "slower":
            return f"{name} is slower: {measured} as {base}{promise}."
        case "same":
            return f"{name} is neither faster nor slower than {base}: {measured}{promise}."


def _times(ratio: PairedRatio) -> str:
    return f"{ratio.ratio:.2f} times (95 %: {ratio.low:.2f} to {ratio.high:.2f})"


def _promise(timing: ModelTiming) -> str:
    if timing.flops_ratio is None:
        return ""
    return f", with {1 / timing.flops_ratio:.0%} of its FLOPs"
