"""What ``bench`` prints for people: times, and where they went."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from morphgraph.benchmark import (
    BenchResult,
    BenchSweep,
    Convolutions,
    ModelTiming,
    Profile,
    TimeRow,
)
from morphgraph.onnx_io import escape
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    number_column,
    plain,
    share,
    table_of,
)

_LAYERS_SHOWN = 12
_KINDS_SHOWN = 3
_WORTH_SHOWING = 0.005  # of a network's time
_DISTURBED = 1.5  # times what a run takes


def timing_report(points: Sequence[BenchResult]) -> Report:
    """The times of some models, and where they went; of a sweep a row per point and model."""
    first = points[0]
    if len(points) == 1:
        title = f"{_clock(first)} in ms, {first.threads} thread(s) per operator"
        return Report(
            first,
            [_times(points, title), *_profiles(first)],
            foot=[first.verdict, *_disturbed(first)],
        )
    tables = [_times(points, "times in ms")]
    for point in points:
        tables += _profiles(point, f"{_point(point)}: ")
    sweep = BenchSweep(tuple(points))
    foot = [
        f"{_point(point)}: {line}"
        for point in points
        for line in (point.verdict, *_disturbed(point))
    ]
    return Report(sweep, tables, foot=foot)


def _disturbed(result: BenchResult) -> list[str]:
    """Of profiles that are far from the times above: what they can be taken for."""
    if result.clock != "cpu":
        return []
    medians = {(timing.name, timing.runtime): timing.p50_ms for timing in result.models}
    told = []
    for one in result.profiles:
        median = medians[one.model, one.runtime]
        if one.after_ms > _DISTURBED * median:
            told.append(
                f"The profiled runs of {one.model} took {one.after_ms:.3g} ms by the clock on the "
                f"wall, of which the processor worked some {median:.3g} ms: other programs ran "
                "beside. Take their milliseconds for shares."
            )
    return told


def _clock(result: BenchResult) -> str:
    return "CPU time" if result.clock == "cpu" else "wall time"


def _point(result: BenchResult) -> str:
    """Which point of a sweep a result is."""
    part = f"{escape(result.part)}, " if result.part else ""
    batch = "" if result.batch is None else f", batch {result.batch}"
    return f"{part}{result.threads} thread(s){batch}"


_Row = tuple[BenchResult, ModelTiming]


def _times(points: Sequence[BenchResult], title: str) -> Table:
    rows: list[_Row] = [(point, timing) for point in points for timing in point.models]
    several = len({timing.runtime for _, timing in rows}) > 1
    settings = len({(point.threads, point.batch) for point in points}) > 1
    batches = settings and any(point.batch is not None for point in points)
    columns: list[tuple[Column | str, Callable[[_Row], Cell]] | None] = [
        ("file", lambda row: row[0].part) if points[0].part else None,
        ("model", lambda row: row[1].name),
        ("runtime", lambda row: row[1].runtime) if several else None,
        (number_column("threads", plain), lambda row: row[0].threads) if settings else None,
        (number_column("batch", plain), lambda row: row[0].batch) if batches else None,
        (Column("clock", minor=1), lambda row: row[0].clock) if points[1:] else None,
        (number_column("min", _decimal, minor=6), lambda row: row[1].min_ms),
        (number_column("p50", _decimal), lambda row: row[1].p50_ms),
        (number_column("p90", _decimal, minor=3), lambda row: row[1].p90_ms),
        (number_column("p99", _decimal, minor=7), lambda row: row[1].p99_ms),
        (number_column("runs", plain, minor=4), lambda row: row[1].runs),
        (number_column("cv", share, minor=5), lambda row: row[1].cv),
        (number_column("speed-up", _decimal), lambda row: row[1].speedup),
        ("95 %", lambda row: _interval(row[1].speedup_interval)),
        (number_column("FLOPs ratio", _decimal, minor=2), lambda row: row[1].flops_ratio),
        ("convs out of blocks", lambda row: _outside(row[1].convolutions)),
        ("note", lambda row: "unstable" if row[1].unstable else None),
    ]
    return table_of(rows, *filter(None, columns), title=title)


def _outside(convolutions: Convolutions | None) -> str | None:
    if convolutions is None:
        return None
    return f"{len(convolutions.outside)} of {convolutions.count}"


def _interval(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _decimal(value: Cell) -> str:
    return f"{value:.3f}" if isinstance(value, float) else plain(value)


def _profiles(result: BenchResult, prefix: str = "") -> list[Table]:
    return [table for one in result.profiles for table in _profile(one, prefix)]


def _profile(profile: Profile, prefix: str) -> list[Table]:
    """Where the time went: kinds of kernels, then the layers that hold most of what was missed."""
    if profile.base is None:
        head = f"{prefix}{profile.model} in {profile.runtime}: wall ms by the profiler,"
        shown, behind = _most(profile, lambda row: row.after_ms)
        return [
            table_of(
                [*profile.kinds, _all(profile)],
                ("kernel", lambda row: row.name),
                (number_column("runs", plain), lambda row: sum(row.after.values())),
                *_alone(profile),
                title=f"{head} by kind",
            ),
            table_of(
                shown,
                ("layer", lambda row: row.name),
                *_alone(profile),
                ("kernels", lambda row: _kinds(row.after)),
                title=f"{head} by layer{behind}",
            ),
        ]
    against = f"{profile.model} against {profile.base} in {profile.runtime}"
    head = f"{prefix}{against}: wall ms by the profiler,"
    kinds = table_of(
        [*profile.kinds, _all(profile)],
        ("kernel", lambda row: row.name),
        ("runs", lambda row: f"{sum(row.before.values())} -> {sum(row.after.values())}"),
        *_BEFORE_AFTER,
        title=f"{head} by kind",
    )
    order = "most missed of what FLOPs promised first"
    shown, behind = _most(profile, lambda row: row.missed_ms)
    if not shown:
        order = "longest first, as FLOPs promised"
        shown, behind = _most(profile, lambda row: row.after_ms)
    layers = table_of(
        shown,
        ("layer", lambda row: row.name),
        *_BEFORE_AFTER,
        (
            number_column("time left", share, minor=1),
            lambda row: _left(row.before_ms, row.after_ms),
        ),
        (number_column("FLOPs left", share), lambda row: _left(row.flops_before, row.flops_after)),
        (number_column("missed", _decimal), lambda row: row.missed_ms),
        ("kernels", _change),
        title=f"{head} by layer, {order}{behind}",
    )
    return [kinds, layers]


def _most(profile: Profile, time: Callable[[TimeRow], float]) -> tuple[list[TimeRow], str]:
    """The layers with most of a time, where it is worth showing, and how many there are beside."""
    least = _WORTH_SHOWING * max(profile.before_ms, profile.after_ms)
    worth = sorted((row for row in profile.layers if time(row) >= least), key=lambda r: -time(r))
    shown = worth[:_LAYERS_SHOWN]
    rest = len(profile.layers) - len(shown)
    return shown, f" ({rest} more in the JSON)" if rest else ""


def _all(profile: Profile) -> TimeRow:
    """The row below all kinds of kernels: what they add up to."""
    before, after = Counter[str](), Counter[str]()
    for row in profile.kinds:
        before.update(row.before)
        after.update(row.after)
    return TimeRow("all", profile.before_ms, profile.after_ms, before, after)


_RowColumn = tuple[Column, Callable[[TimeRow], Cell]]

_BEFORE_AFTER: tuple[_RowColumn, ...] = (
    (number_column("before", _decimal), lambda row: row.before_ms),
    (number_column("after", _decimal), lambda row: row.after_ms),
    (number_column("saved", _decimal, minor=2), lambda row: row.saved_ms),
)


def _alone(profile: Profile) -> tuple[_RowColumn, _RowColumn]:
    return (
        (number_column("time", _decimal), lambda row: row.after_ms),
        (number_column("share", share), lambda row: _left(profile.after_ms, row.after_ms)),
    )


def _left(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def _kinds(kernels: Mapping[str, int]) -> str:
    """The most frequent kinds of kernels.

    >>> _kinds({"Gemm": 1, "Reshape": 2, "Split": 1, "Softmax": 1})
    '2 Reshape + Gemm + Split + 1 more'
    """
    ordered = sorted(kernels.items(), key=lambda item: -item[1])
    texts = [f"{count} {kind}" if count > 1 else kind for kind, count in ordered[:_KINDS_SHOWN]]
    rest = sum(count for _, count in ordered[_KINDS_SHOWN:])
    return " + ".join([*texts, *([f"{rest} more"] if rest else [])])


def _change(row: TimeRow) -> str:
    before, after = _kinds(row.before), _kinds(row.after)
    return after if before == after else f"{before or 'none'} -> {after or 'none'}"
