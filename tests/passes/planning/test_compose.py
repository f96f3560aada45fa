"""Two resizes as one plan: the same network in ONNX Runtime, the same widths where it grew."""

import numpy as np
import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.compose import Provenance
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan
from morphgraph.testing import model_from_text, random_plan, random_removal
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.testing.random_weights import randomize_model_weights
from morphgraph.torch_io.export import export

HEAD = "net (float[1,3,8,8] x, "

NETWORKS = {
    "towers": """float[5,3,1,1] w1, float[6,3,1,1] w0, float[4,6,1,1] w2, float[4] b2,
    float[7,4,3,3] w3, float[7] b3, float[6,12,1,1] w4, float[2,6,1,1] w5)
    => (float[1,2,8,8] y) {
    a = Conv(x, w1)  ra = Relu(a)  s = Conv(x, w0)  b = Conv(s, w2, b2)  rb = Relu(b)
    c = Conv<pads=[1,1,1,1]>(rb, w3, b3)  rc = Sigmoid(c)
    d = Concat<axis=1>(ra, rc)  e = Conv(d, w4)  re = Sigmoid(e)  y = Conv(re, w5)
}""",
    "shuffle": """float[12,3,1,1] w1, float[12,1,3,3] w2, float[7,12,1,1] w3,
    float[2,7,1,1] w4) => (float[1,2,8,8] y)
    <int64[5] split = {1, 3, 4, 8, 8}, int64[4] join = {1, 12, 8, 8}> {
    a = Conv(x, w1)  r = Relu(a)  m = Reshape(r, split)  t = Transpose<perm=[0,2,1,3,4]>(m)
    f = Reshape(t, join)  d = Conv<group=12, pads=[1,1,1,1]>(f, w2)  e = Conv(d, w3)
    s = Sigmoid(e)  y = Conv(s, w4)
}""",
    # `u` is read by `c` alone: where the group of `c` dies, `p` and `q` are no longer tied.
    "comes apart": """float[6,3,1,1] wp, float[6,3,1,1] wq, float[5,6,1,1] wc, float[5] bc,
    float[4,6,1,1] wd, float[4,6,1,1] we, float[4,5,1,1] wf, float[2,4,1,1] wy)
    => (float[1,2,8,8] y) {
    a = Conv(x, wp)  p = Relu(a)  b = Conv(x, wq)  q = Relu(b)  u = Add(p, q)
    c = Conv(u, wc, bc)  rc = Relu(c)  d = Conv(p, wd)  e = Conv(q, we)  f = Conv(rc, wf)
    g = Add(d, e)  h = Add(g, f)  s = Sigmoid(h)  y = Conv(s, wy)
}""",
}


def network(name: str) -> ChannelGraph:
    if name == "residual":
        model = export(residual_cnn((8, 12)), (image(),))
        return lift(randomize_model_weights(model, random_inputs(model)))
    return lift(model_from_text(HEAD + NETWORKS[name]))


def sizes(graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
    values = graph.model.graph.initializers
    return {name: static_shape(value) for name, value in values.items()}


def second(lineage: Provenance, plan: Plan) -> Plan:
    """The plan, but for groups that must keep their widths."""
    bound = set(lineage.frozen_groups())
    groups = {key: entry for key, entry in plan.groups.items() if key not in bound}
    return Plan(plan.model, plan.request, plan.cost, groups)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deaths", [False, True])
@pytest.mark.parametrize("name", ["residual", *NETWORKS])
def test_two_removals_are_one(name: str, deaths: bool, seed: int) -> None:
    graph = network(name)
    draw = random_removal if deaths else random_plan
    first = draw(graph, seed)
    small = lift(resize(graph, first.keep_channels(graph)))
    lineage = Provenance.of(graph).after(first, small)
    again = second(lineage, random_plan(small, seed + 10))
    smaller = resize(small, again.keep_channels(small))
    composed = lineage.compose(again, {})
    once = resize(graph, composed.keep_channels(graph))
    feeds = random_inputs(graph.model)
    for one, other in zip(run(smaller, feeds).values(), run(once, feeds).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert sizes(lift(smaller)) == sizes(lift(once))
    for kind, change in composed.cost.items():
        assert change.before == cost(graph, kind).total
    assert composed.cost["flops"].after == cost(lift(once), "flops").total


@pytest.mark.parametrize("name", ["residual", *NETWORKS])
def test_growth_is_new(name: str) -> None:
    graph = network(name)
    first = expand(graph, random_plan(graph, 1), {"flops": "90%"})
    wide = lift(resize(graph, first.keep_channels(graph), first.added(graph)))
    lineage = Provenance.of(graph).after(first, wide)
    again = expand(wide, random_plan(wide, 2), {"flops": "100%"})
    twice = lift(resize(wide, again.keep_channels(wide), again.added(wide)))
    composed = lineage.compose(again, {})
    once = lift(resize(graph, composed.keep_channels(graph), composed.added(graph)))
    assert sizes(twice) == sizes(once)
    # What is said to be kept was kept by both.
    for key, entry in composed.groups.items():
        group = graph.group(key)
        survivors = set(
            first.keep_channels(graph).get(group.index, np.arange(group.width)).tolist()
        )
        assert set(entry.positions.tolist()) <= survivors or entry.keep == ((0, 1),)


def test_what_has_come_apart_keeps_its_width() -> None:
    graph = network("comes apart")
    (tied,) = [group for group in graph.groups if {"Conv_a", "Conv_b"} <= set(group.producers)]
    dead = next(group for group in graph.groups if group.producers == ("Conv_c",))
    plan = random_plan(graph, 0)
    entry = plan.groups[dead.id]
    plan = Plan(
        plan.model,
        {},
        {},
        plan.groups | {dead.id: type(entry)(entry.name, entry.width, ())},
    )
    small = lift(resize(graph, plan.keep_channels(graph)))
    lineage = Provenance.of(graph).after(plan, small)
    apart = [g.id for g in small.groups if lineage.origin_group[g.index] == tied.index]
    assert len(apart) == 2
    assert lineage.frozen_groups() == apart


def test_a_group_of_which_only_new_channels_stay_keeps_its_first() -> None:
    graph = network("towers")
    first = expand(graph, random_plan(graph, 1), {"flops": "100%"})
    wide = lift(resize(graph, first.keep_channels(graph), first.added(graph)))
    lineage = Provenance.of(graph).after(first, wide)
    grown = next(g for g in graph.groups if first.added(graph).get(g.index, 0) > 1)
    here = wide.groups[int(np.flatnonzero(lineage.origin_group == grown.index)[0])]
    only = random_plan(wide, 0)
    entry = type(next(iter(only.groups.values())))(
        here.name, here.width, ((here.width - 2, here.width),)
    )
    plan = Plan(only.model, {}, {}, {here.id: entry})
    composed = lineage.compose(plan, {})
    assert composed.groups[grown.id].keep == ((0, 1),)
    assert composed.groups[grown.id].new == 1
