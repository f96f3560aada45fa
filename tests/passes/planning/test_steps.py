"""Widths by default: no convolution leaves ONNX Runtime's blocks, read off what it optimizes."""

import re
import warnings
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import BudgetError, MorphWarning
from morphgraph.graph import ChannelGraph, Group
from morphgraph.passes.analysis.convolutions import convolutions, out_of_blocks
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.constraints import resolve_budget
from morphgraph.passes.planning.finer import within_reach
from morphgraph.passes.planning.steps import Steps, auto_steps
from morphgraph.testing import model_from_text

HEAD = "net (float[1,3,16,16] x, "
TAIL = "float[5,{}] fc) => (float[1,5] y) {{"
END = "g = GlobalAveragePool({}) f = Flatten(g) y = Gemm<transB=1>(f, fc) }}"

NETWORKS = {
    # A stem, a pointwise and a depthwise layer twice, a bottleneck that is added.
    "depthwise": HEAD
    + """float[24,3,3,3] s, float[96,24,1,1] a, float[96,1,3,3] b, float[24,96,1,1] c,
 float[80,24,1,1] d, float[80,1,3,3] e, """
    + TAIL.format(80)
    + """ s0 = Conv<pads=[1,1,1,1]>(x, s) s1 = Relu(s0) a0 = Conv(s1, a) a1 = Relu(a0)
 b0 = Conv<group=96, pads=[1,1,1,1]>(a1, b) b1 = Relu(b0) c0 = Conv(b1, c) t = Add(s1, c0)
 d0 = Conv(t, d) d1 = Relu(d0) e0 = Conv<group=80, pads=[1,1,1,1]>(d1, e) """
    + END.format("e0"),
    # What a layer of 10 and one of 3 channels make of the mean switches channels on and off.
    "squeezed": HEAD
    + """float[64,3,3,3] a, float[64,1,3,3] b, float[10,64,1,1] p, float[64,10,1,1] q,
 float[40,64,1,1] c, float[3,40,1,1] r, float[40,3,1,1] u, """
    + TAIL.format(40)
    + """ a0 = Conv(x, a) a1 = Relu(a0) b0 = Conv<group=64>(a1, b) b1 = Relu(b0)
 m = GlobalAveragePool(b1) p0 = Conv(m, p) p1 = Relu(p0) q0 = Conv(p1, q) q1 = Sigmoid(q0)
 o = Mul(b1, q1) c0 = Conv(o, c) c1 = Relu(c0) n = GlobalAveragePool(c1) r0 = Conv(n, r)
 r1 = Relu(r0) u0 = Conv(r1, u) u1 = Sigmoid(u0) v = Mul(c1, u1) """
    + END.format("v"),
    # Four groups of 16 between dense layers.
    "grouped": HEAD
    + """float[64,3,3,3] a, float[64,16,3,3] b, float[96,64,1,1] c, float[32,96,3,3] d, """
    + TAIL.format(32)
    + """ a0 = Conv(x, a) a1 = Relu(a0) b0 = Conv<group=4>(a1, b) b1 = Relu(b0)
 c0 = Conv(b1, c) c1 = Relu(c0) d0 = Conv(c1, d) d1 = Relu(d0) """
    + END.format("d1"),
    # Layers that read all before them, and a depthwise one over two of them.
    "concatenated": HEAD
    + """float[20,3,3,3] a, float[12,20,3,3] b, float[28,32,3,3] c, float[60,1,3,3] d,
 float[48,60,1,1] e, """
    + TAIL.format(48)
    + """ a0 = Conv<pads=[1,1,1,1]>(x, a) a1 = Relu(a0) b0 = Conv<pads=[1,1,1,1]>(a1, b)
 b1 = Relu(b0) j = Concat<axis=1>(a1, b1) c0 = Conv<pads=[1,1,1,1]>(j, c) c1 = Relu(c0)
 k = Concat<axis=1>(j, c1) d0 = Conv<group=60>(k, d) d1 = Relu(d0) e0 = Conv(d1, e)
 e1 = Relu(e0) """
    + END.format("e1"),
}
MLP = """
net (float[4,30] x, float[600,30] a, float[40,600] b, float[12,40] c, float[5,12] d)
=> (float[4,5] y) {
    a0 = Gemm<transB=1>(x, a) a1 = Relu(a0) b0 = Gemm<transB=1>(a1, b) b1 = Relu(b0)
    c0 = Gemm<transB=1>(b1, c) c1 = Relu(c0) y = Gemm<transB=1>(c1, d) }"""


@cache
def graph_of(name: str) -> ChannelGraph:
    return mg.lift(model_from_text(NETWORKS[name]))


@pytest.fixture(params=NETWORKS)
def graph(request: pytest.FixtureRequest) -> ChannelGraph:
    return graph_of(request.param)


def outside(model: ir.Model, tmp_path: Path) -> int:
    """How many convolutions ONNX Runtime leaves outside of its layout of blocks."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    found = [node for node in nodes if node.op_type in ("Conv", "FusedConv")]
    return sum(node.domain != "com.microsoft.nchwc" for node in found)


@cache
def block() -> int:
    """Channels of a block on this processor; 0 where ONNX Runtime has no such layout."""
    text = HEAD + "float[4,3,1,1] w) => (float[1,4,16,16] y) { y = Conv(x, w) }"
    options = ort.SessionOptions()
    with TemporaryDirectory() as at:
        options.optimized_model_filepath = f"{at}/optimized.onnx"
        options.log_severity_level = 3
        data = ir.to_proto(model_from_text(text)).SerializeToString()
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath).graph
    if all(node.domain != "com.microsoft.nchwc" for node in optimized.node):
        return 0
    return max(weight.dims[0] for weight in optimized.initializer)


def kernels(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of convolutions' kernels, by name."""
    weights = model.graph.initializers
    return {
        name: tuple(weights[name].shape.numpy())
        for node in model.graph
        if node.op_type == "Conv"
        for name in [node.inputs[1].name or ""]
    }


@pytest.mark.parametrize("share", ["80%", "65%", "50%"])
def test_no_convolution_of_a_default_plan_leaves_the_blocks(
    graph: ChannelGraph, share: str, tmp_path: Path
) -> None:
    if not block():
        pytest.skip("ONNX Runtime has no layout of blocks on this processor")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        made = mg.plan(graph, {"flops": share})
    small = mg.apply(graph, made)
    assert outside(small, tmp_path) == outside(graph.model, tmp_path) == 0
    before = kernels(graph.model)
    for name, (width, *_) in kernels(small).items():
        wide = before[name][0]
        # Over joined groups of which one has 12 channels, no more than a multiple of 4.
        grid = 16 if before[name][1] == 1 and wide != 60 else 4
        assert width % grid == 0 or width == wide or wide <= 4


@pytest.mark.parametrize("seed", range(4))
def test_what_leaves_the_blocks_is_foretold(graph: ChannelGraph, seed: int, tmp_path: Path) -> None:
    """By the sizes alone, for any widths: as many as ONNX Runtime leaves outside."""
    if block() != 16:
        pytest.skip("blocks are of another size on this processor")
    rng = np.random.default_rng(seed)
    step = [1, 2, 4, 6][seed]
    wishes: dict[str, int | str] = {
        group.id: min(group.width, step * int(rng.integers(1, group.width // step + 2)))
        for group in graph.groups
        if group.resizable
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = mg.plan(graph, {}, widths=wishes)
    found = outside(mg.apply(graph, made, verify=False), tmp_path)
    assert len(out_of_blocks(graph, made.widths(graph))) == found
    told = [str(each.message) for each in caught if "off the grid" in str(each.message)]
    assert len(told) == (found > 0)
    if told:
        assert sum(map(int, re.findall(r"(\d+) (?:depthwise|other)", told[0]))) == found


def test_free_widths_are_told_once_with_their_price() -> None:
    graph = graph_of("depthwise")
    depthwise = {each.name for each in convolutions(graph) if each.depthwise}
    assert len(depthwise) == 2
    with pytest.warns(MorphWarning, match="off the grid") as caught:
        made = mg.plan(graph, {"flops": "47%"}, round_to=1)
    (line,) = (str(each.message) for each in caught if "off the grid" in str(each.message))
    assert "about twice the time" in line
    assert "--round-to auto" in line
    with pytest.warns(MorphWarning, match="off the grid"):
        mg.apply(graph, made, verify=False)
    with pytest.warns(MorphWarning, match="off the grid"):
        mg.uniform(graph, 0.7, round_to=1)


def test_narrow_groups_can_shrink_and_never_grow() -> None:
    graph = graph_of("squeezed")
    three, ten = (next(g for g in graph.groups if g.name == f"Conv_{n}") for n in ("r0", "p0"))
    assert (three.width, ten.width) == (3, 10)
    for share in ("80%", "50%", "20%"):
        widths = mg.plan(graph, {"flops": share}).widths(graph)
        assert 0 < widths[three.index] <= 3
        assert widths[ten.index] in (4, 8, 10)
    wide = mg.uniform(graph, 0.5).widths(graph)
    assert wide[three.index] == 2
    assert wide[ten.index] == 4


def _floor(graph: ChannelGraph, group: Group, step: int) -> int:
    return min(group.width, step) if group.resizable else group.width


def test_a_budget_below_the_grid_takes_finer_steps_for_the_fewest_groups() -> None:
    """The number of groups by enumeration, where those of one level suffice."""
    graph = graph_of("depthwise")
    flops = mg.cost(graph, "flops")
    free = [group for group in graph.groups if group.resizable]
    steps = auto_steps(graph)

    def lowest(finer: tuple[Group, ...]) -> float:
        levels = [3 - (g in finer) for g in graph.groups]
        at = [_floor(graph, g, steps[g.index].at(n)) for g, n in zip(graph.groups, levels)]
        return flops.at(np.array(at))

    reachable, level = lowest(()), lowest(tuple(free))
    for share in (0.97, 0.8, 0.5, 0.0):
        limit = level + share * (reachable - level)
        fewest = next(
            count
            for count in range(len(free) + 1)
            if any(lowest(some) <= limit for some in combinations(free, count))
        )
        with pytest.warns(MorphWarning, match="below what the grid of --round-to auto can reach"):
            made = mg.plan(graph, {"flops": limit})
        widths = made.widths(graph)
        assert flops.at(widths) <= limit
        finer = [g for g in free if widths[g.index] < _floor(graph, g, steps[g.index].at(9))]
        assert 0 < len(finer) <= fewest
        assert all(widths[g.index] % 4 == 0 for g in free)


def test_what_no_grid_can_meet_is_refused_and_what_one_channel_can_is_met() -> None:
    graph = graph_of("depthwise")
    flops = mg.cost(graph, "flops")
    least = flops.at(WidthBounds().lowest(graph))
    with pytest.warns(MorphWarning, match="finer widths"):
        made = mg.plan(graph, {"flops": least})
    assert made.cost["flops"].after == least
    with pytest.raises(BudgetError, match=f"the lowest that can is {least:.6g}"):
        mg.plan(graph, {"flops": least - 1})


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_what_coarse_steps_leave_of_a_budget_is_spent(graph: ChannelGraph, share: float) -> None:
    flops = mg.cost(graph, "flops")
    limit = share * flops.total
    for made in (
        mg.plan(graph, {"flops": limit}),
        mg.plan(graph, {"flops": limit}, allocation="sum"),
        mg.uniform(graph, budget={"flops": limit}),
    ):
        widths = made.widths(graph)
        assert flops.at(widths) <= limit
        grids = WidthBounds("auto").on(graph).grids
        for group in graph.groups:
            if group.resizable and widths[group.index] < group.width:
                wider = widths.copy()
                wider[group.index] = min(
                    group.width, grids[group.index].above(int(wider[group.index]))
                )
                assert flops.at(wider) > limit or auto_steps(graph)[group.index].sizes == (1,)


def test_wishes_hold_on_the_grid() -> None:
    graph = graph_of("depthwise")
    names = {group.name: group.index for group in graph.groups}
    by_hand, other = (index for name, index in names.items() if name in ("Conv_a0", "Conv_d0"))
    for options, index, width in (
        ({"widths": {"Conv_a0": 37}}, by_hand, 37),
        ({"widths": {"Conv_a0": "50%"}}, by_hand, 48),
        ({"exclude": ["Conv_a0"]}, by_hand, 96),
        ({"include": ["Conv_a0"]}, other, 80),
    ):
        made = mg.plan(graph, {"flops": "70%"}, **options)
        assert made.widths(graph)[index] == width
        assert made.cost["flops"].after <= 0.7 * made.cost["flops"].before
    least = mg.plan(graph, {"flops": "60%"}, min_width=20).widths(graph)
    assert least.min() >= 3
    assert all(least[g.index] >= 20 for g in graph.groups if g.resizable)


def test_products_of_matrices_are_on_a_grid_where_they_are_wide() -> None:
    graph = mg.lift(model_from_text(MLP))
    sizes = {g.name: auto_steps(graph)[g.index].sizes for g in graph.groups if g.resizable}
    assert sizes == {"Gemm_a0": (16, 4, 1), "Gemm_b0": (4, 1), "Gemm_c0": (1,)}
    widths = mg.plan(graph, {"params": "43%"}).widths(graph)
    for group in graph.groups:
        assert widths[group.index] % sizes.get(group.name, (1,))[0] == 0


def test_measured_steps_stand_in_for_those_of_auto() -> None:
    graph = graph_of("grouped")
    measured = [Steps((24, 12, 1), "measured")] * len(graph.groups)
    bounds = WidthBounds("auto", steps=measured)
    grids = bounds.on(graph).grids
    c = graph.group("Conv_c0")
    assert [grids[c.index].at_most(width) for width in (23, 24, 50)] == [0, 24, 48]
    flops = resolve_budget(graph, {"flops": "2%"}, "default")
    fine = within_reach(graph, bounds, flops)
    assert fine.floors[c.index] < 24
    assert flops[0].holds(fine.lowest())


def test_groups_of_one_width_share_the_coarsest_step() -> None:
    text = NETWORKS["depthwise"].replace("float[80,", "float[96,").replace("group=80", "group=96")
    graph = mg.lift(model_from_text(text.replace("[5,80]", "[5,96]")))
    widths = mg.plan(graph, {"flops": "50%"}, same=["Conv_[ad]0"]).widths(graph)
    assert widths[graph.group("Conv_a0").index] == widths[graph.group("Conv_d0").index]
    assert widths[graph.group("Conv_a0").index] % 16 == 0


def test_a_command_tells_of_widths_off_the_grid_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan, small = (str(tmp_path / name) for name in ("m.onnx", "p.json", "s.onnx"))
    mg.save(model_from_text(NETWORKS["depthwise"]), model)

    def told(*words: str) -> int:
        assert main(list(words)) == 0
        return capsys.readouterr().err.count("off the grid")

    assert told("plan", model, "--budget", "flops=50%", "-o", plan) == 0
    assert told("apply", model, plan, "-o", small) == 0
    free: tuple[Any, ...] = ("--round-to", "1", "--overwrite")
    assert told("plan", model, "--budget", "flops=47%", *free, "-o", plan) == 1
    assert told("apply", model, plan, "--overwrite", "-o", small) == 1
    assert told("plan", model, "--set", "Conv_a0=37") == 1
    np.savez(
        tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(20, 3, 16, 16)).astype("f")
    )
    data = ("--data", str(tmp_path / "x.npz"), "--budget", "flops=60%")
    assert told("shrink", model, *data, "--overwrite", "-o", small) == 0
    assert told("shrink", model, *data, *free, "-o", small) == 1


def test_a_warning_names_the_line_of_the_caller() -> None:
    graph = graph_of("depthwise")
    plan = mg.plan(graph, {"flops": "70%"}, round_to=1)
    calls = [
        lambda: mg.plan(graph, {"flops": "47%"}, round_to=1),
        lambda: mg.apply(graph, plan, verify=False),
        lambda: mg.uniform(graph, 0.7, round_to=1),
    ]
    for call in calls:
        with pytest.warns(MorphWarning, match="off the grid") as caught:
            call()
        assert {(each.filename, each.lineno) for each in caught} == {
            (__file__, call.__code__.co_firstlineno)
        }
