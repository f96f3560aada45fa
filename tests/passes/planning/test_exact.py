"""Several budgets at once: the least loss of all widths that there are, found by counting."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import morphgraph as mg
from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.planning import exact
from morphgraph.passes.planning.allocate import allocate
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds
from morphgraph.passes.planning.constraints import Constraint, fits, resolve_budget
from morphgraph.passes.planning.removal_path import plan
from morphgraph.testing import model_from_text

CHAIN = """net (float[1,3,8,8] x, float[8,3,3,3] a, float[6,8,3,3] b, float[7,6,1,1] c,
    float[2,7] d) => (float[1,2] y) {
    u = Conv<pads=[1,1,1,1]>(x, a)  v = Relu(u)  w = Conv<strides=[2,2]>(v, b)  q = Relu(w)
    r = Conv(q, c)  g = GlobalAveragePool(r)  f = Flatten(g)  y = Gemm<transB=1>(f, d) }"""
RESIDUAL = """net (float[1,3,4,4] x, float[8,3,1,1] s, float[6,8,3,3] a, float[8,6,3,3] b,
    float[5,8,1,1] c, float[2,5,1,1] e) => (float[1,2,4,4] y) {
    u = Conv(x, s)  v = Conv<pads=[1,1,1,1]>(u, a)  r = Relu(v)
    w = Conv<pads=[1,1,1,1]>(r, b)  t = Add(u, w)  k = Conv(t, c)  q = Relu(k)  y = Conv(q, e) }"""
CONCAT = """net (float[1,3,4,4] x, float[6,3,1,1] a, float[6,3,3,3] b, float[5,12,1,1] c,
    float[4,17,1,1] d, float[2,4,1,1] e) => (float[1,2,4,4] y) {
    u = Conv(x, a)  v = Conv<pads=[1,1,1,1]>(x, b)  w = Concat<axis=1>(u, v)  r = Relu(w)
    k = Conv(r, c)  q = Concat<axis=1>(r, k)  m = Conv(q, d)  n = Relu(m)  y = Conv(n, e) }"""
DEPTHWISE = """net (float[1,3,6,6] x, float[7,3,1,1] a, float[7,1,3,3] d, float[6,7,1,1] b,
    float[5,6,3,3] c, float[2,5] e) => (float[1,2] y) {
    u = Conv(x, a)  h = Relu(u)  v = Conv<group=7>(h, d)  w = Conv(v, b)  r = Relu(w)
    k = Conv(r, c)  g = GlobalAveragePool(k)  f = Flatten(g)  y = Gemm<transB=1>(f, e) }"""
GRAPHS = {
    name: lift(model_from_text(text))
    for name, text in {
        "chain": CHAIN,
        "residual": RESIDUAL,
        "concat": CONCAT,
        "depthwise": DEPTHWISE,
    }.items()
}
KINDS = ["flops", "params", "memory", "peak", "latency"]


def scores_of(graph: ChannelGraph, seed: int) -> FloatArray:
    generator = np.random.default_rng(seed)
    scores = np.ones(len(graph.channel_group))
    for group in graph.groups:
        height = 10 ** generator.uniform(-1, 1)
        scores[group.channels] = height * generator.uniform(0.05, 1, group.width)
    return scores


def every_width(allowed: AllowedWidths) -> list[IntArray]:
    """All widths from the floors to the ceilings, by counting."""
    ranges = [
        range(int(low), int(high) + 1)
        for low, high in zip(allowed.floors, allowed.ceilings, strict=True)
    ]
    blocks = [list(block) for block in allowed.blocks]
    return [
        widths
        for widths in map(np.array, product(*ranges))
        if all(len(set(widths[block])) == 1 for block in blocks)
    ]


def sum_of_shares(
    graph: ChannelGraph, scores: FloatArray, budget: Mapping[str, Any], widths: Sequence[int]
) -> float:
    """Of every group's share of the costs as many parts as its scores are more than what is left.

    The losses of ``docs/theory.md``, added up by hand.
    """
    total = 0.0
    for group, width in zip(graph.groups, widths, strict=True):
        share = sum(
            cost(graph, kind).gradient(graph.widths)[group.index]
            / cost(graph, kind).at(graph.widths)
            for kind in budget
        )
        own = np.sort(scores[group.channels])[::-1]
        total += share * group.width * (own.sum() / own[:width].sum() - 1)
    return total


def least(
    loss: Any, constraints: Sequence[Constraint], allowed: AllowedWidths
) -> tuple[float, IntArray]:
    inside = [widths for widths in every_width(allowed) if fits(constraints, widths)]
    return min(((loss(widths), widths) for widths in inside), key=lambda each: each[0])


def reachable(graph: ChannelGraph, shares: Mapping[str, int], allowed: AllowedWidths) -> Any:
    """Budgets as shares of what can be saved."""
    low = allowed.lowest()
    return {
        kind: cost(graph, kind).at(low)
        + share / 100 * (cost(graph, kind).at(graph.widths) - cost(graph, kind).at(low))
        for kind, share in shares.items()
    }


BUDGETS = st.dictionaries(st.sampled_from(KINDS), st.integers(10, 90), min_size=2, max_size=3)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.sampled_from(["chain", "residual", "depthwise"]), st.integers(0, 2**16), BUDGETS)
def test_a_plan_within_several_budgets_loses_least(
    name: str, seed: int, shares: dict[str, int]
) -> None:
    graph = GRAPHS[name]
    scores = scores_of(graph, seed)
    allowed = WidthBounds(1).on(graph)
    budget = reachable(graph, shares, allowed)
    constraints = resolve_budget(graph, budget, "default")

    def loss(widths: IntArray) -> float:
        return sum_of_shares(graph, scores, budget, widths.tolist())

    widths = plan(graph, budget, score=scores, round_to=1).widths(graph)
    assert fits(constraints, widths)
    best, _ = least(loss, constraints, allowed)
    assert loss(widths) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    "shares", [{"flops": 40}, {"flops": 50, "params": 30}, {"peak": 50, "memory": 40, "params": 60}]
)
def test_a_sum_of_scores_is_least_with_one_budget_and_with_several(
    name: str, shares: dict[str, int]
) -> None:
    graph = GRAPHS[name]
    scores = scores_of(graph, len(name))
    same = ["Conv_[uv]"] if name == "concat" else []
    allowed = WidthBounds(1, min_width=2 if name == "concat" else 1, same=same).on(graph)
    constraints = resolve_budget(graph, reachable(graph, shares, allowed), "default")

    def loss(widths: IntArray) -> float:
        return sum(
            float(np.sort(scores[group.channels])[: group.width - int(width)].sum())
            for group, width in zip(graph.groups, widths, strict=True)
        )

    widths = allocate(graph, scores, constraints, allowed)
    assert fits(constraints, widths)
    best, there = least(loss, constraints, allowed)
    assert loss(widths) == pytest.approx(best, rel=1e-8), there


def test_where_all_widths_are_too_many_what_is_near_is_no_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = GRAPHS["chain"]
    scores = scores_of(graph, 5)
    budget = reachable(graph, {"flops": 40, "params": 60}, WidthBounds(1).on(graph))
    lost = []
    for most in (0, 60, 400):
        monkeypatch.setattr(exact, "MOST_UNKNOWNS", most)
        widths = plan(graph, budget, score=scores, round_to=1).widths(graph)
        assert fits(resolve_budget(graph, budget, "default"), widths)
        lost.append(sum_of_shares(graph, scores, budget, widths.tolist()))
    assert lost[0] > lost[1] >= lost[2]


def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    graph = GRAPHS["chain"]
    plan(graph, {"flops": "40%", "params": "60%"}, score=scores_of(graph, 5), round_to=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("before", ["", "highspy.Highs().run(); "])
def test_a_plan_does_not_depend_on_who_solved_before(before: str, tmp_path: Path) -> None:
    """HiGHS has one set of threads in a process; a program that uses it may have made another."""
    ir.save(model_from_text(CHAIN), tmp_path / "chain.onnx")
    program = (
        f"import highspy; {before}import morphgraph as mg; graph = mg.lift('chain.onnx'); "
        "plan = mg.plan(graph, {'flops': '40%', 'params': '60%'}, round_to=1); "
        "print(plan.widths(graph).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    graph = mg.lift(tmp_path / "chain.onnx")
    wanted = plan(graph, {"flops": "40%", "params": "60%"}, round_to=1).widths(graph)
    assert done.stdout.splitlines()[-1] == str(wanted.tolist())
