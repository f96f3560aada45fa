"""Whole branches beside widths: held against all choices that there are, and against a run."""

from collections.abc import Iterator
from functools import cache
from itertools import chain, combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.arrays import FloatArray, IntArray
from morphgraph.cli import main
from morphgraph.errors import ArgumentError, BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.branches import Branch
from morphgraph.passes.analysis.liveness import is_viable
from morphgraph.passes.calibration.outputs import output_error
from morphgraph.passes.calibration.skips import measure_skips
from morphgraph.passes.planning.allocate import allocate
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds
from morphgraph.passes.planning.constraints import fits, resolve_budget
from morphgraph.passes.planning.parts import Losses, weigh
from morphgraph.testing import model_from_text

# Two branches on a stream, and two side by side of which one must stay.
STREAM = """net (float[1,3,4,4] x, float[5,3,1,1] sw, float[4,5,3,3] aw, float[5,4,3,3] bw,
    float[6,5,1,1] cw, float[5,6,1,1] dw, float[2,5,1,1] ew) => (float[1,2,4,4] y) {
    s = Conv(x, sw)
    a = Conv<pads=[1,1,1,1]>(s, aw)  ra = Relu(a)  b = Conv<pads=[1,1,1,1]>(ra, bw)  t = Add(s, b)
    c = Conv(t, cw)  rc = Relu(c)  d = Conv(rc, dw)  u = Add(t, d)  y = Conv(u, ew)
}"""
FORKED = """net (float[1,3,4,4] x, float[4,3,3,3] aw, float[5,4,3,3] bw, float[6,3,1,1] cw,
    float[5,6,1,1] dw, float[2,5,1,1] ew) => (float[1,2,4,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, aw)  ra = Relu(a)  b = Conv<pads=[1,1,1,1]>(ra, bw)
    c = Conv(x, cw)  rc = Relu(c)  d = Conv(rc, dw)  t = Add(b, d)  y = Conv(t, ew)
}"""
GRAPHS = {
    "stream": mg.lift(model_from_text(STREAM)),
    "forked": mg.lift(model_from_text(FORKED)),
}
DEEP = WidthBounds(depth="branches")


class Loss:
    """What widths and dead branches lose, counted anew."""

    def __init__(self, graph: ChannelGraph, seed: int, parts: tuple[Branch, ...]) -> None:
        generator = np.random.default_rng(seed)
        self.graph = graph
        self.scores = np.ones(len(graph.channel_group))
        for group in graph.groups:
            rising = np.sort(generator.uniform(0, 1, group.width) ** generator.uniform(1, 5))
            self.scores[group.channels] = rising * 10 ** generator.uniform(-1, 1)
        self.parts: Losses = {
            part.groups: self._inside(part) * generator.uniform(0.2, 1.2) for part in parts
        }

    def _inside(self, part: Branch) -> float:
        return sum(float(self.scores[self.graph.groups[k].channels].sum()) for k in part.groups)

    def of(self, widths: IntArray, gone: tuple[Branch, ...]) -> float:
        dead = {k for part in gone for k in part.groups}
        kept = sum(
            float(np.sort(self.scores[group.channels])[: group.width - int(width)].sum())
            for group, width in zip(self.graph.groups, widths, strict=True)
            if group.index not in dead
        )
        return kept + sum(self.parts[part.groups] for part in gone)


def choices(
    graph: ChannelGraph, allowed: AllowedWidths, may_die: bool
) -> Iterator[tuple[IntArray, tuple[Branch, ...]]]:
    """All widths with all sets of dead branches."""
    parts = allowed.parts if may_die else ()
    for gone in chain.from_iterable(combinations(parts, n) for n in range(len(parts) + 1)):
        dead = {k for part in gone for k in part.groups}
        if is_viable(graph, dead):
            ranges = [
                (0,) if g.index in dead else range(int(allowed.floors[g.index]), g.width + 1)
                for g in graph.groups
            ]
            for widths in product(*ranges):
                yield np.array(widths), gone


def found_loss(loss: Loss, widths: IntArray, allowed: AllowedWidths) -> float:
    dead = {k for k, width in enumerate(widths.tolist()) if width == 0}
    gone = tuple(part for part in allowed.parts if dead.issuperset(part.groups))
    return loss.of(widths, gone)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", ["75%", "45%", "25%"])
@pytest.mark.parametrize("name", GRAPHS)
def test_widths_and_branches_together_are_near_the_least(name: str, share: str, seed: int) -> None:
    graph = GRAPHS[name]
    allowed, constraints = DEEP.on(graph), resolve_budget(graph, {"flops": share}, "default")
    assert len(allowed.parts) == 2
    loss = Loss(graph, seed, allowed.parts)
    least, widths_alone = (
        min(
            (
                loss.of(*each)
                for each in choices(graph, allowed, may_die)
                if fits(constraints, each[0])
            ),
            default=np.inf,
        )
        for may_die in (True, False)
    )
    widths = allocate(graph, loss.scores, constraints, allowed, loss.parts)
    assert fits(constraints, widths)
    mine = found_loss(loss, widths, allowed)
    assert least - 1e-9 <= mine <= 1.15 * least
    assert mine <= 1.03 * widths_alone


def test_one_of_two_branches_that_meet_stays() -> None:
    graph = GRAPHS["forked"]
    allowed = DEEP.on(graph)
    lowest = allowed.lowest()
    assert is_viable(graph, np.flatnonzero(lowest == 0).tolist())
    assert sum(int((lowest[list(part.groups)] == 0).all()) for part in allowed.parts) == 1
    with pytest.raises(BudgetError, match="the lowest that can is"):
        mg.plan(graph, {"flops": "0.1%"}, depth="branches")
    with pytest.raises(ArgumentError, match="keep, branches, blocks"):
        mg.plan(graph, {"flops": "50%"}, depth="layers")  # type: ignore[arg-type]


class Residual(nn.Module):
    """A stream with branches, of which some hardly write to it."""

    def __init__(self, weak: tuple[int, ...], depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.up = nn.ModuleList(nn.Linear(width, 16) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(16, width) for _ in range(depth))
        for k, layer in enumerate(self.down):
            if k in weak and isinstance(layer, nn.Linear):
                layer.weight.data *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        y: Tensor = self.head(x)
        return y

    def without(self, x: Tensor, left_out: int) -> Tensor:
        """The outputs with the mean of a branch in its place."""
        x = self.stem(x)
        for k, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            added = down(up(x).relu())
            x = x + (added.mean(0, keepdim=True) if k == left_out else added)
        y: Tensor = self.head(x)
        return y


@cache
def residual(*weak: int) -> tuple[Residual, ChannelGraph]:
    torch.manual_seed(1)
    net = Residual(weak).eval()
    return net, mg.lift(mg.export(net, (torch.randn(2, 6),), dynamic_batch=True))


def test_what_a_branch_is_worth_is_measured_with_its_mean_in_its_place() -> None:
    net, graph = residual(1, 3)
    inputs = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    (name,) = (str(value.name) for value in graph.model.graph.inputs)
    parts = DEEP.on(graph).parts
    feeds = [{name: inputs[:20]}, {name: inputs[20:]}]
    found = measure_skips(graph, parts, feeds, feeds)
    with torch.no_grad():
        whole = net(torch.from_numpy(inputs)).numpy()
        for k, part in enumerate(parts):
            other = net.without(torch.from_numpy(inputs), k).numpy()
            expected = output_error([{"y": whole}], [{"y": other}])
            assert found[part.groups] == pytest.approx(expected, rel=1e-3), part.name


def test_branches_that_hardly_write_to_the_stream_go_first() -> None:
    """By data both go, the network hardly feels it, and the rest keeps its width."""
    _, graph = residual(1, 3)
    inputs = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    made = mg.plan(
        graph, {"params": "55%"}, score="data", data=inputs, depth="branches", include=["up.*"]
    )
    widths = {g.name: w for g, w in zip(graph.groups, made.widths(graph).tolist(), strict=True)}
    assert made.request["depth"] == "branches"
    assert [widths[f"up.{k}"] for k in range(4)] == [16, 0, 16, 0]
    small = mg.apply(graph, made)
    (name,) = (str(value.name) for value in graph.model.graph.inputs)
    (one,), (other,) = (list(run(m, {name: inputs[:50]}).values()) for m in (graph.model, small))
    assert np.abs(one - other).max() < 0.1 * np.abs(one).max()
    assert not any("up.1" in str(name) for name in small.graph.initializers)


def test_shrink_removes_branches_checks_and_fits_what_is_left() -> None:
    _, graph = residual(1, 3)
    inputs = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    result = mg.shrink(graph, inputs, {"params": "55%"}, depth="branches", include=["up.*"])
    assert int((result.plan.widths(graph) == 0).sum()) == 2
    assert result.check is not None
    assert result.error[0].error <= result.before[0].error * 1.01
    assert result.error[0].error < 0.05


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plan = tmp_path / "m.onnx", tmp_path / "p.json"
    mg.save(residual(1, 3)[1].model, model)
    asked = ["plan", str(model), "--depth", "branches"]
    assert main([*asked, "--budget", "params=25%", "-o", str(plan)]) == 0
    assert mg.Plan.load(plan).request["depth"] == "branches"
    assert main(["apply", str(model), str(plan), "-o", str(tmp_path / "s.onnx")]) == 0
    capsys.readouterr()
    assert main([*asked, "--set", "up.0=50%"]) == 2
    assert "--depth goes with a --budget" in capsys.readouterr().err
    assert main([*asked, "--uniform", "fit", "--budget", "params=50%"]) == 2
    assert "leave --depth out" in capsys.readouterr().err


def test_widths_that_are_to_be_the_same_are_so_in_what_is_left() -> None:
    _, graph = residual(1, 3)
    inputs = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    made = mg.plan(
        graph,
        {"params": "50%"},
        score="data",
        data=inputs,
        depth="blocks",
        include=["up.*"],
        same=["up.*"],
    )
    inner = [g.index for g in graph.groups if g.name.startswith("up.")]
    left = set(made.widths(graph)[inner].tolist())
    assert 0 in left
    assert len(left - {0}) == 1
    mg.apply(graph, made)


def test_without_data_weak_scores_make_a_branch_cheap() -> None:
    _, graph = residual()
    parts = DEEP.on(graph).parts
    scores: FloatArray = np.ones(len(graph.channel_group))
    scores[graph.groups[parts[2].groups[0]].channels] = 0.1
    weights = weigh(graph, parts, scores)
    assert weights.argmin() == 2
    assert weights.mean() == pytest.approx(1)
    made = mg.plan(graph, {"params": "80%"}, score=scores, depth="branches", include=["up.*"])
    assert np.flatnonzero(made.widths(graph) == 0).tolist() == list(parts[2].groups)


def test_plans_with_the_grid_of_one_number_keep_subsets() -> None:
    _, graph = residual()
    before = graph.widths
    for share in ("90%", "70%", "50%", "30%", "15%"):
        made = mg.plan(graph, {"params": share}, depth="branches", round_to=1)
        assert (made.widths(graph) <= before).all()
        before = made.widths(graph)
    assert (before == 0).any()
