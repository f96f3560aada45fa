"""Work grows as networks do: counted, not timed, so that no other program disturbs it."""

import math
import runpy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.passes.analysis import along
from morphgraph.passes.analysis.polynomial import Cost

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "bench_growth.py"))
FAMILIES = ("chain", "dense blocks", "transformer", "cached decoder", "builder's decoder")


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, built-in ones too."""
    found: Counter[str] = Counter()

    def note(_frame: Any, event: str, _argument: Any) -> None:
        found[event] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found["call"] + found["c_call"]


def stages(model: ir.Model | str) -> dict[str, int]:
    """Calls of every stage, by its name."""
    made: dict[str, Any] = {}

    def run(stage: str, work: Callable[[], Any]) -> int:
        return calls(lambda: made.update({stage: work()}))

    found = {"lift": run("lift", lambda: mg.lift(model))}
    graph = made["lift"]
    found["cost"] = run("cost", lambda: mg.cost(graph, "flops").gradient(graph.widths))
    given = np.random.default_rng(0).uniform(0.5, 1.0, len(graph.channel_group))
    found["plan"] = run("plan", lambda: mg.plan(graph, {"flops": "50%"}, score=given, round_to=2))
    found["resize"] = run("resize", lambda: mg.apply(graph, made["plan"], verify=False))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_calls_functions_in_proportion_to_the_nodes(family: str) -> None:
    few, many = (TOOL["NETWORKS"][family](count) for count in (60, 180))
    factor = len(many.graph) / len(few.graph)
    stages(few)  # what is remembered of operators is there for both
    least, most = stages(few), stages(many)
    grown = {stage: math.log(most[stage] / least[stage]) / math.log(factor) for stage in least}
    assert max(grown.values()) < 1.1, grown


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_computes_in_proportion_to_the_nodes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole evaluations do not become more with the network, and parts of it only in proportion."""
    nodes, parts, wholes = [], [], []
    monkeypatch.setattr(along, "FEW", 0)
    for count in (100, 300):
        graph = mg.lift(TOOL["NETWORKS"][family](count))
        given = np.random.default_rng(0).uniform(0.5, 1.0, len(graph.channel_group))
        found: Counter[str] = Counter()
        with monkeypatch.context() as patched:
            for name in ("at", "gradient"):
                patched.setattr(Cost, name, counted(getattr(Cost, name), found))
            patched.setattr(along.Sums, "put", counted(along.Sums.put, found, len))
            mg.plan(graph, {"flops": "50%"}, score=given)
        nodes.append(len(graph.ops))
        parts.append(found["put"])
        wholes.append(found["at"] + found["gradient"])
    assert wholes[1] <= wholes[0] + 5
    assert wholes[1] < 40
    assert math.log(parts[1] / parts[0]) / math.log(nodes[1] / nodes[0]) < 1.1


def counted(
    function: Callable[..., Any], found: Counter[str], size: Callable[[Any], int] = lambda _: 1
) -> Callable[..., Any]:
    """A method that adds the size of its first argument to what is found under its name."""

    def noted(*arguments: Any) -> Any:
        found[function.__name__] += size(arguments[1])
        return function(*arguments)

    return noted


def test_a_decoder_of_7_billion_parameters_is_planned_by_its_structure() -> None:
    """Its weights are a hole in the disk, of 13 GB, which nothing reads."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = TOOL["Decoder"]().write(32, Path(folder))
        before = TOOL["resident"]()
        graph = mg.lift(path)
        params = mg.cost(graph, "params")
        plan = mg.plan(graph, {"params": "50%"}, score=np.ones(len(graph.channel_group)))
        assert 6.7e9 < params.total < 6.8e9
        assert params.at(plan.widths(graph)) <= params.total / 2
        assert TOOL["resident"]() - before < 1e9
