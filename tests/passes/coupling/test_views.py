"""Heads, query heads and sizes of heads in one plan: what each alone may change, all may."""

import re

import numpy as np
import pytest
import torch

import morphgraph as mg
from morphgraph.graph import Attention, ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.coupling.views import View, merge
from morphgraph.passes.planning import same
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, prove, random_removal
from morphgraph.testing.prove import prove_plan
from tests.passes import (
    test_constructs_attention as spellings,
    test_grouped_queries as builders,
)

EACH: tuple[Attention, ...] = ("heads", "query-heads", "head-dim")


def spelled(name: str, attention: Attention = "all") -> ChannelGraph:
    text = spellings.OPSET + spellings.NETWORKS[name][0]
    return mg.lift(model_from_text(text), attention=attention)


def built(name: str, attention: Attention = "all") -> ChannelGraph:
    model = model_from_text(builders.NETWORKS[name][0], inputs=builders.INPUTS)
    return mg.lift(model, attention=attention)


def changing(graph: ChannelGraph) -> set[tuple[int, tuple[tuple[str, int, int], ...]]]:
    """Width and members of the groups that may change."""
    return {
        (g.width, tuple(sorted((m.value, m.axis, m.per_channel) for m in g.members)))
        for g in graph.groups
        if g.resizable
    }


@pytest.mark.parametrize("name", spellings.NETWORKS)
def test_all_may_change_what_each_may(name: str) -> None:
    graph = spelled(name)
    separate = [changing(spelled(name, attention)) for attention in EACH]
    if "grouped" not in name:  # there query heads alone come in other groups than whole ones
        assert changing(graph) == separate[0] | separate[2]
    assert changing(graph) >= separate[0] | separate[2]
    prove(graph, seeds=(0,), faults=8)
    removal = random_removal(graph, 1)
    if removal.groups:
        small = resize(graph, removal.keep_channels(graph))
        assert mg.verify(graph, removal, small).ok


@pytest.mark.parametrize("name", builders.NETWORKS)
def test_the_builders_attentions_lose_all_through_their_caches(name: str) -> None:
    graph = built(name)
    wide = builders.NETWORKS[name][1][0]
    assert sorted(g.width for g in graph.groups if g.resizable) == sorted([2, 3, 8, wide])
    prove(graph, seeds=(0,), faults=5)  # in two steps of generation
    heads, size, shared = (
        next(g for g in graph.groups if g.resizable and g.width == width) for width in (2, wide, 3)
    )
    stays = {heads.index: np.array([1]), size.index: np.arange(8, 16), shared.index: np.array([2])}
    small = resize(graph, stays)
    (node,) = [node for node in small.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes[k].as_int() for k in ("num_heads", "kv_num_heads")] == [1, 1]
    left = 8 * 32 // wide
    assert {str(v.shape) for v in small.graph.inputs if v.name in ("p", "r")} == {f"[B,1,P,{left}]"}


@pytest.mark.parametrize("network", ["written out", "grouped queries, one node, three axes"])
def test_costs_are_products_of_all_widths(network: str) -> None:
    graph = spelled(network)
    rng = np.random.default_rng(0)
    for _ in range(4):
        widths = graph.widths.copy()
        keep = {}
        for group in graph.groups:
            if group.resizable:
                count = int(rng.integers(1, group.width + 1))
                keep[group.index] = np.sort(rng.choice(group.width, count, replace=False))
                widths[group.index] = count
        small = mg.lift(resize(graph, keep))
        for kind in ("macs", "params", "memory", "peak", "latency"):
            assert cost(graph, kind).at(widths) == pytest.approx(cost(small, kind).total, rel=1e-12)
        macs = cost(graph, "macs")
        for index in keep:
            more = widths + (np.arange(len(widths)) == index)
            assert macs.gradient(widths)[index] == pytest.approx(macs.at(more) - macs.at(widths))
        sizes = graph.class_sizes(widths)
        selection = AxisSelection(graph, keep)
        for dim, where in enumerate(graph.couplings.dims):
            kept = selection.axis(where.value, where.axis)
            whole = graph.shapes[where.value][where.axis]
            assert sizes[graph.vertex_class[dim]] == (whole if kept is None else len(kept))


def test_one_plan_takes_of_all_under_one_budget() -> None:
    graph = spelled("grouped queries, one node, three axes")
    plan = mg.plan(graph, {"macs": "35%"}, round_to=1)
    shrunk = [g.index for g in graph.groups if plan.widths(graph)[g.index] < g.width]
    assert len(shrunk) > 2
    small = mg.apply(graph, plan)
    assert cost(mg.lift(small), "macs").total == plan.cost["macs"].after
    assert plan.cost["macs"].after <= 0.35 * plan.cost["macs"].before


@pytest.mark.parametrize("name", [name for name in spellings.NETWORKS if name != "a past"])
def test_heads_and_their_elements_grow_in_one_plan(name: str) -> None:
    """Nothing reads what is new yet: the results are those without it, to the last digit."""
    graph = spelled(name)
    narrow = mg.plan(graph, {"params": "60%"}, round_to=1)
    wide = mg.expand(graph, narrow, {"params": "120%"}, round_to=1)
    keep, added = wide.keep_channels(graph), wide.added(graph)
    seen_twice = {v for v in range(len(graph.base)) if len(graph.views(int(graph.base[v]))) > 1}
    rows = graph.per_channel[:, sorted(added)].tocoo()
    assert len(set(rows.coords[1][np.isin(rows.coords[0], list(seen_twice))])) == len(added) == 2
    grown, before = resize(graph, keep, added), resize(graph, keep)
    inputs = random_inputs(before)
    for value, expected in run(before, inputs).items():
        np.testing.assert_array_equal(run(grown, inputs)[value], expected)
    for kind in ("macs", "params", "memory", "peak"):
        assert cost(mg.lift(grown), kind).total == pytest.approx(
            cost(graph, kind).at(wide.widths(graph))
        )
    assert mg.verify(graph, wide, grown).ok


def test_a_new_element_comes_in_every_head_old_or_new() -> None:
    graph = spelled("written out")
    heads, _, values = (g.index for g in graph.groups if g.resizable)
    keep = {heads: np.array([0, 2]), values: np.array([1, 3])}
    selection = AxisSelection(graph, keep, {heads: 1, values: 2})
    # Of heads 0, 2 and a copy of 2 the elements 1, 3 and two copies of 3.
    each = [1, 3, 3, 3]
    expected = [*each, *(8 + k for k in each), *(8 + k for k in each)]
    found = selection.axis("v", 1)
    assert found is not None
    assert found.tolist() == expected
    assert selection.fresh("v", 1).tolist() == [2, 3, 6, 7, 8, 9, 10, 11]
    assert not selection.ungrowable({heads, values})


@pytest.mark.parametrize("count", ["flops", "params"])
def test_a_budget_is_met_in_training(count: str) -> None:
    """The regularizer measures heads and elements by the same kernels, each along its view."""
    graph = blocks(2)
    net = mg.to_torch(graph.model).train()
    inputs = torch.randn(8, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    regularizer = mg.Regularizer(graph, net, cost=count)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0)
    budget = mg.Budget(regularizer, {count: "50%"}, 100).attach(optimizer)
    for _ in range(100):
        optimizer.zero_grad()
        sum((net(x) - y).square().mean() for x, y in zip(inputs, wanted, strict=True)).backward()
        optimizer.step()
    plan = regularizer.plan()
    small = mg.apply(graph, plan, weights=net)
    left = cost(mg.lift(small), count).total / cost(graph, count).total
    assert 0.35 < left == pytest.approx(budget.share)
    assert left <= 0.5
    widths = plan.widths(graph)
    shrunk = {same._view(graph, g) for g in graph.groups if widths[g.index] < g.width}
    assert len(shrunk) == 2  # heads, and elements of heads
    # What was trained to nothing is nothing.
    with torch.no_grad():
        expected = [net(x).numpy() for x in inputs]
    for x, y in zip(inputs, expected, strict=True):
        (found,) = run(small, {"x0": x.numpy()}).values()
        np.testing.assert_allclose(found, y, atol=0.05 * np.abs(y).max())


def test_views_that_depend_on_each_other_stay_apart() -> None:
    """Pairs along a diagonal: no table of rows and columns, so that the second view is left out."""
    sizes = np.array([4, 2, 2])
    pin = mg.graph.Pin("elsewhere", None)
    first = View(np.array([0, 0, 1, 1, 0, 1, 2, 3]), np.array([-1, -1, 2, 2]), {2: pin})
    dependent = View(np.array([0, 0, 0, 1, 2, 3, 0, 1]), np.array([-1, -1, 1, 1]), {1: pin})
    crossing = View(np.array([0, 1, 0, 1, 2, 3, 0, 1]), np.array([-1, -1, 1, 1]), {1: pin})
    assert merge(sizes, [first, dependent]).base.tolist() == [0, 1, 2]
    found = merge(sizes, [first, crossing])
    assert found.base.tolist() == [0, 1, 2, 0]
    assert found.view.atom_channel.tolist()[:4] == [0, 0, 1, 1]
    assert len(set(found.view.atom_channel[-4:].tolist())) == 2


LAYER = """q# = MatMul(x#, wq#)  qs# = Reshape(q#, four)  qt# = Transpose<perm=[0,2,1,3]>(qs#)
    k# = MatMul(x#, wk#)  ks# = Reshape(k#, four)  kt# = Transpose<perm=[0,2,3,1]>(ks#)
    v# = MatMul(x#, wv#)  vs# = Reshape(v#, four)  vt# = Transpose<perm=[0,2,1,3]>(vs#)
    l# = MatMul(qt#, kt#)  p# = Softmax(l#)  o# = MatMul(p#, vt#)
    ot# = Transpose<perm=[0,2,1,3]>(o#)  of# = Reshape(ot#, three)  y# = MatMul(of#, wo#)
    x@ = Add(x#, y#)"""


def blocks(count: int) -> ChannelGraph:
    """So many attentions of 3 heads of size 4 on a residual stream."""
    each = range(count)
    weights = ", ".join(f"float[6,12] w{letter}{k}" for k in each for letter in "qkv")
    outs = ", ".join(f"float[12,6] wo{k}" for k in each)
    body = " ".join(LAYER.replace("#", str(k)).replace("@", str(k + 1)) for k in each)
    text = f"""net (float[1,5,6] x0, {weights}, {outs}, float[6,2] w) => (float[1,5,2] z)
        <int64[4] four = {{1, 5, 3, 4}}, int64[3] three = {{1, 5, 12}}> {{
            {body} z = MatMul(x{count}, w) }}"""
    model = model_from_text(spellings.OPSET + text, inputs=("x0",))
    for node in model.graph:
        if (made := re.fullmatch(r"([a-z]+)(\d)", node.outputs[0].name or "")) is not None:
            node.name = f"blocks.{made[2]}.{made[1]}"
    return mg.lift(model, attention="all")


def test_deaths_of_either_are_deaths_of_the_attention() -> None:
    graph = blocks(1)
    heads, queries, values = (g for g in graph.groups if g.resizable)
    for dead in ((heads,), (values,), (queries, values)):
        keep = {g.index: np.zeros(0, dtype=np.int64) for g in dead}
        plan = make_plan(graph, keep, {}, [cost(graph, "flops")])
        assert prove_plan(graph, plan, faults=1).ok
    small = resize(graph, {values.index: np.zeros(0, dtype=np.int64)})
    assert not [node for node in small.graph if node.op_type == "Softmax"]


def test_blocks_get_the_same_of_everything() -> None:
    graph = blocks(3)
    plan = mg.plan(graph, {"flops": "50%"}, round_to=1, same=["repeated"])
    widths = plan.widths(graph)
    by_kind = [[widths[g.index] for g in graph.groups if g.resizable][k::3] for k in range(3)]
    assert all(len(set(each)) == 1 for each in by_kind)
    assert mg.verify(graph, plan, mg.apply(graph, plan)).ok
