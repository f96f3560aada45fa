"""What ``bench`` prints: where the time went, and what its sums are."""

from dataclasses import replace

import numpy as np

from morphgraph.benchmark import BenchResult, ModelTiming
from morphgraph.benchmark.profile import Profile, Structure, compare_profiles
from morphgraph.report.timing import timing_report
from morphgraph.runtimes import Executed


def _kernel(layer: str, op_type: str, microseconds: float) -> Executed:
    return Executed(layer, op_type, layer=layer, origins=(layer,), microseconds=microseconds)


BEFORE = [_kernel("a", "Conv", 600.0), _kernel("b", "Conv", 300.0), _kernel("c", "Relu", 100.0)]


def _profile(after: list[Executed]) -> Profile:
    structures = (
        Structure({}, ("a", "b"), {"a": 4e6, "b": 2e6}),
        Structure({}, ("a", "b"), {"a": 2e6, "b": 1e6}),
    )
    return compare_profiles(("base", "small"), "ort", BEFORE, after, structures)


def _result(profile: Profile, p50_ms: float = 1.0) -> BenchResult:
    timing = ModelTiming("base", "ort", 1.0, p50_ms, 1.0, 1.0, 10, 0.0, 1.0, 1.0)
    models = (timing, replace(timing, name="small"))
    return BenchResult(models, "Verdict.", "cpu", 1, None, 0, 1, profiles=(profile,))


def test_kinds_add_up_to_the_last_row() -> None:
    after = [_kernel("a", "Conv", 450.0), _kernel("b", "Conv", 150.0), _kernel("c", "Relu", 60.0)]
    _, kinds, _ = timing_report([_result(_profile(after))]).tables
    *rows, total = kinds.rows
    assert total[:2] == ["all", "3 -> 3"]
    for place in (2, 3, 4):
        parts = [float(row[place] or 0) for row in rows]
        assert np.isclose(sum(parts), float(total[place] or 0))


def test_layers_that_missed_nothing_are_shown_by_time() -> None:
    """A network that is as fast as its FLOPs promised has a table by layer too."""
    after = [_kernel("a", "Conv", 300.0), _kernel("b", "Conv", 150.0), _kernel("c", "Relu", 50.0)]
    _, _, layers = timing_report([_result(_profile(after))]).tables
    assert [row[0] for row in layers.rows] == ["a", "b", "c"]
    assert "longest first" in layers.title
    missed = [_kernel("a", "Conv", 300.0), _kernel("b", "Conv", 250.0), _kernel("c", "Relu", 50.0)]
    _, _, layers = timing_report([_result(_profile(missed))]).tables
    assert [row[0] for row in layers.rows] == ["b"]
    assert "most missed" in layers.title


def test_a_profile_beside_other_programs_is_told() -> None:
    """Its clock goes on while others have the processor: 0.5 ms of work may take it 2 ms."""
    after = [_kernel("a", "Conv", 1200.0), _kernel("b", "Conv", 800.0)]
    foot = timing_report([_result(_profile(after), p50_ms=0.5)]).foot
    assert any("other programs" in line and "2 ms" in line for line in foot)
    quiet = timing_report([_result(_profile(after), p50_ms=1.9)]).foot
    assert quiet == ["Verdict."]
    wall = replace(_result(_profile(after), p50_ms=0.5), clock="wall")
    assert timing_report([wall]).foot == ["Verdict."]
