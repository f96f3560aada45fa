"""From a trained network: nested plans, the teacher's loss, and what ``fit`` is given."""

import copy
import dataclasses
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.errors import ArgumentError, BudgetError, MorphWarning, PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.nested import falling, nested
from morphgraph.passes.planning.removal_path import continue_plan
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.to_torch import flat_network
from morphgraph.train import loop
from morphgraph.train.config import SearchConfig
from morphgraph.train.phases import Penalty, ShrinkPenalty
from morphgraph.train.tuning import Distillation, LadderPenalty

X, LABELS = image(16), torch.arange(16) % 10
BUDGETS = [{"flops": share} for share in ("75%", "50%", "30%")]


def fit(net: nn.Module, penalty: Penalty, steps: int = 60) -> None:
    """A phase of some steps on a few images."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    penalty.begin(steps)
    penalty.carry(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(X), LABELS) + penalty.loss()).backward()
        optimizer.step()
        penalty.step(lr=0.05 / (1 - 0.9))


def quick(net: nn.Module, penalty: Penalty) -> None:
    """Steps enough for the controller, few to tune."""
    fit(net, penalty, 60 if isinstance(penalty, LadderPenalty) else 3)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return residual_cnn((8,))


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> ChannelGraph:
    return mg.lift(mg.export(net, (X,), dynamic_batch=True))


def require_nested(graph: ChannelGraph, plans: list[mg.Plan]) -> None:
    for large, small in itertools.pairwise(plans):
        kept = large.keep_channels(graph)
        for index, positions in small.keep_channels(graph).items():
            assert set(positions.tolist()) <= set(kept.get(index, np.arange(999)).tolist())
        assert set(kept) <= set(small.keep_channels(graph))


@pytest.mark.parametrize("rank", ["data", "learned"])
def test_a_family_is_nested_and_meets_its_budgets(
    rank: Any, net: nn.Module, graph: ChannelGraph
) -> None:
    mine = copy.deepcopy(net)
    given: dict[str, Any] = {"rank": rank, "data": [X] * 4}
    made = mg.family(mine, (X,), quick, budgets=BUDGETS[2:0:-1], round_to=1, **given)
    plans = [member.plan for member in made.members]
    require_nested(made.graph, plans)
    flops, ceilings = mg.cost(made.graph, "flops"), made.graph.widths
    for budget, member in zip(BUDGETS[1:], made.members, strict=True):
        limit = float(budget["flops"].rstrip("%")) / 100 * flops.total
        widths = member.plan.widths(made.graph)
        assert mg.cost(mg.lift(member.model), "flops").total == flops.at(widths) <= limit
        for group in made.graph.groups:  # no channel more would fit
            if group.resizable and widths[group.index] < ceilings[group.index]:
                wider = widths + (np.arange(len(widths)) == group.index)
                assert flops.at(wider) > limit
        ceilings = widths
        (found,) = run(member.model, {"x": X.numpy()}).values()
        with torch.no_grad():
            wanted = member.net.eval()(X)
        assert np.allclose(found, wanted.numpy(), atol=1e-4)
    changed = any(not torch.equal(a, b) for a, b in zip(mine.parameters(), net.parameters()))
    assert changed == (rank == "learned")


@pytest.mark.parametrize("seed", range(6))
def test_nested_plans_of_any_scores(seed: int, graph: ChannelGraph) -> None:
    """Each plan alone has scores of its own, so that none is a part of another by itself."""
    rng = np.random.default_rng(seed)
    scores = [rng.exponential(size=len(graph.channel_group)) for _ in BUDGETS]
    bounds = WidthBounds(round_to=int(rng.integers(1, 3)))
    alone = [
        mg.plan(graph, budget, score=s, round_to=bounds.round_to)
        for budget, s in zip(BUDGETS, scores, strict=True)
    ]
    plans = nested(graph, BUDGETS, alone, scores, bounds)
    require_nested(graph, plans)
    for plan, budget in zip(plans, BUDGETS, strict=True):
        change, share = plan.cost["flops"], float(budget["flops"].rstrip("%")) / 100
        assert change.after <= share * change.before
    ranking = mg.Ranking.of(graph, plans)
    assert mg.Ranking.of(graph, plans).to_json() == ranking.to_json()
    shares = [0.95, 0.75, 0.6, 0.5, 0.42, 0.31]
    between = [ranking.plan(graph, {"flops": s * change.before}, round_to=1) for s in shares]
    require_nested(graph, between)
    for plan, share in zip(between, shares, strict=True):
        assert plan.cost["flops"].after <= share * change.before
    assert between[1].widths(graph).tolist() >= plans[0].widths(graph).tolist()


def test_rankings_are_files_that_are_checked(graph: ChannelGraph, tmp_path: Any) -> None:
    ranking = mg.Ranking.of(graph, [mg.plan(graph, {"flops": "50%"}, round_to=1)])
    ranking.save(tmp_path / "ranking.json")
    assert mg.Ranking.load(tmp_path / "ranking.json") == ranking
    with pytest.raises(BudgetError, match="smallest rung"):
        ranking.plan(graph, {"flops": "20%"})
    with pytest.raises(PlanError, match="another network"):
        ranking.plan(mg.lift(mg.export(residual_cnn((4,)), (X,))), {"flops": "60%"})
    with pytest.raises(ArgumentError, match="nested"):
        mg.Ranking.of(graph, [mg.plan(graph, each, round_to=1) for each in BUDGETS[::-1]])
    text = ranking.to_json().decode()
    (tmp_path / "broken.json").write_text(text.replace('"order"', '"odor"'))
    with pytest.raises(PlanError, match="is no ranking"):
        mg.Ranking.load(tmp_path / "broken.json")
    index = text.index('"order": [') + len('"order": [')
    (tmp_path / "twice.json").write_text(text[:index] + "0, 0, " + text[index:])
    with pytest.raises(PlanError, match="does not fit the model"):
        mg.Ranking.load(tmp_path / "twice.json").plan(graph, {"flops": "60%"})


def test_distillation_is_the_error_in_units_of_the_variance() -> None:
    """Held against the layers called by hand."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 3)
    net, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(32, 4)
    graph = mg.lift(mg.export(net, (x,)))
    plan = mg.uniform(graph, 0.5)
    small = mg.to_torch(mg.apply(graph, plan))
    keep = plan.keep_channels(graph)
    selection, (kept,) = AxisSelection(graph, keep), keep.values()
    teacher = mg.to_torch(graph.model)
    distillation = Distillation(teacher, small, selection, weight=2.0, inside=3.0)
    with torch.no_grad():
        small.get_parameter("0.weight").add_(0.1)
        hidden, outputs = first(x), net(x)
        cut = torch.nn.functional.linear(x, first.weight[kept] + 0.1, first.bias[kept])
        found = torch.nn.functional.linear(cut.relu(), second.weight[:, kept], second.bias)

    def error(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).square().mean() / other.var(unbiased=False)

    out = error(found, outputs)
    wanted = 2 * (out + 3 * (error(cut, hidden[:, kept]) + out) / 2)
    assert distillation.loss() == 0
    small.train()(x)
    loss = distillation.loss()
    assert isinstance(loss, torch.Tensor)
    assert torch.allclose(loss, wanted, rtol=1e-4)
    loss.backward()
    assert small.get_parameter("0.weight").grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert distillation.loss() == 0  # once for each forward
    small.eval()(x)
    assert distillation.loss() == 0
    distillation.remove()
    small.train()(x)
    assert distillation.loss() == 0


def test_every_rung_of_a_ladder_computes_what_it_will_when_it_is_resized() -> None:
    """Biases behind kernels of zero and the sigmoids of them are read by nobody at any rung."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    wanted = torch.randn(64, 4)
    layers = [nn.Linear(8, 24), nn.Sigmoid(), nn.Linear(24, 16), nn.Sigmoid(), nn.Linear(16, 4)]
    net = nn.Sequential(*layers)
    graph = mg.lift(mg.export(net, (x,)))
    regularizer = mg.Regularizer(graph, net)
    targets = [share * regularizer.initial_cost for share in (0.8, 0.6, 0.4)]
    penalty = LadderPenalty(regularizer, net, targets)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    penalty.begin(120)
    penalty.attach(optimizer)
    for _ in range(120):
        optimizer.zero_grad()
        (net(x) - wanted).square().mean().backward()
        optimizer.step()
    penalty.end()
    steps = []
    for rung in penalty.rungs:
        net.load_state_dict(rung["weights"])
        alive = rung["alive"].numpy()
        keep = {group.index: np.flatnonzero(alive[group.channels]) for group in graph.groups}
        scores, limits = rung["scores"].double().numpy(), WidthBounds(round_to=1)
        plan = continue_plan(graph, keep, scores, {}, regularizer.cost, limits)
        steps.append(int(plan.widths(graph).sum()))
        small = mg.apply(graph, plan, weights=net)
        (found,) = run(small, {small.graph.inputs[0].name or "": x.numpy()}).values()
        np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert graph.widths.sum() > steps[0] > steps[1] > steps[2]


def test_the_whole_network_has_nothing_to_learn_from_itself(graph: ChannelGraph) -> None:
    net = flat_network(graph.model)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    distillation = Distillation(flat_network(graph.model), net, AxisSelection(graph, {}), inside=1)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    net(X)
    assert float(distillation.loss()) < 1e-6


def test_morph_from_trained_keeps_the_weights(net: nn.Module, graph: ChannelGraph) -> None:
    seen: list[np.ndarray[Any, Any]] = []

    def watching(small: nn.Module, penalty: Penalty) -> None:
        with torch.no_grad():
            seen.append(small(X).numpy())
        assert penalty.loss() == 0
        small.train()(X)
        assert float(penalty.loss()) > 0

    result = mg.morph(
        net, (X,), watching, budget={"flops": "50%"}, start="trained", rank="l2", round_to=1
    )
    (wanted,) = run(mg.apply(result.graph, result.plan), {"x": X.numpy()}).values()
    (found,) = seen  # one phase, of the network as it was cut
    assert np.allclose(found, wanted, atol=1e-5)


class _SeenError(Exception):
    """The first phase has begun; no need to train."""


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize(("norm", "decided"), [(True, False), (False, True)])
def test_relative_is_decided_by_the_network_unless_given(
    norm: bool, decided: bool, given: bool | None
) -> None:
    """Kernels are measured where no norm has scales: such a network's penalties are relative."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)] if norm else [nn.Conv2d(3, 4, 3)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def watching(_net: nn.Module, penalty: Penalty) -> None:
        assert isinstance(penalty, ShrinkPenalty)
        assert penalty.regularizer.relative == (decided if given is None else given)
        raise _SeenError

    options: dict[str, Any] = {} if given is None else {"relative": given}
    for start in ({"start": "new"}, {"start": "trained", "rank": "learned", "refit": False}):
        with pytest.raises(_SeenError):
            mg.morph(
                net, (torch.zeros(2, 3, 8, 8),), watching, budget={"flops": "50%"}, **start,
                **options,
            )  # fmt: skip
    with pytest.raises(_SeenError):
        mg.family(
            net, (torch.zeros(2, 3, 8, 8),), watching, budgets=BUDGETS[1:], rank="learned",
            **options,
        )  # fmt: skip


def test_the_optimizers_state_is_carried_from_the_learning_phase(net: nn.Module) -> None:
    momenta: list[dict[str, torch.Tensor]] = []

    def watching(net: nn.Module, penalty: Penalty) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        penalty.carry(optimizer)
        names: dict[torch.Tensor, str] = {p: name for name, p in net.named_parameters()}
        if momenta:
            state = {names[p]: s["momentum_buffer"] for p, s in optimizer.state.items()}
            momenta.append({name: buffer.clone() for name, buffer in state.items()})
            return
        fit_with(net, penalty, optimizer)
        momenta.append({names[p]: s["momentum_buffer"] for p, s in optimizer.state.items()})

    def fit_with(net: nn.Module, penalty: Penalty, optimizer: torch.optim.Optimizer) -> None:
        penalty.begin(60)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(X), LABELS).backward()
            optimizer.step()
            penalty.step(lr=0.5)

    result = mg.morph(
        copy.deepcopy(net), (X,), watching, budget={"flops": "50%"}, start="trained",
        rank="learned", round_to=1, distill=0,
    )  # fmt: skip
    before, after = momenta
    selection = AxisSelection(result.graph, result.plan.keep_channels(result.graph))
    assert set(after) == {name for name, _ in result.net.named_parameters()}
    for name, buffer in after.items():
        wanted = before[name]
        for axis, kept in selection.cuts(name):
            wanted = wanted.index_select(axis, torch.from_numpy(kept))
        assert torch.equal(buffer, wanted)


def test_the_average_of_weights_is_applied_by_the_nets_plan(graph: ChannelGraph) -> None:
    """The plan is off the network, the weights are of the module that averages it."""
    net = mg.to_torch(graph.model)
    average = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(1.5)
    plan = mg.plan(graph, {"flops": "50%"}, round_to=1)
    (found,) = run(mg.apply(graph, plan, weights=average), {"x": X.numpy()}).values()
    whole = mg.with_weights(
        graph.model, dict(average.module.named_parameters()) | dict(net.named_buffers())
    )
    (wanted,) = run(mg.apply(whole, plan), {"x": X.numpy()}).values()
    (other,) = run(mg.apply(graph, plan), {"x": X.numpy()}).values()
    assert np.array_equal(found, wanted)
    assert not np.allclose(found, other)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rank": "data"}, "need calibration inputs"),
        ({"start": "old"}, "start='old' is unknown"),
        ({"iterations": 2}, "iterations goes with start='new'"),
        ({"distill": -1.0}, "0 or more"),
        ({"weights": "fresh"}, "weights goes with"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], fragment: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    given: dict[str, Any] = {"start": "trained", "rank": "l2", "budget": {"flops": "50%"}} | changes
    with pytest.raises(ArgumentError, match=fragment):
        mg.morph(net, (torch.zeros(2, 4),), fit, **given)


def test_budgets_of_a_family_fall(graph: ChannelGraph) -> None:
    for budgets in ([], [{"flops": "50%"}] * 2, [{"flops": "50%"}, {"params": "40%"}]):
        with pytest.raises(ArgumentError):
            falling(graph, budgets)


def test_a_teacher_that_nobody_asks_is_told() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 4)
    with pytest.warns(MorphWarning, match=r"never added penalty.loss\(\)"):
        mg.morph(
            net, (x,), lambda net, penalty: None, budget={"flops": "50%"}, start="trained",
            rank="l2",
        )  # fmt: skip


@pytest.mark.parametrize("call", [mg.morph, mg.family, loop.morph])
def test_defaults_are_those_of_the_configuration(call: Any) -> None:
    """Else what the configuration decides by itself is decided by a default before it."""
    wanted = {field.name: field.default for field in dataclasses.fields(SearchConfig)}
    found = inspect.signature(call).parameters
    shared = (wanted.keys() & found.keys()) - {"budget"}
    assert {"relative", "strength", "update", "round_to", "min_width", "absorb"} <= shared
    assert {name: found[name].default for name in shared} == {n: wanted[n] for n in shared}


class Positions(nn.Module):
    """A language model that looks its positions up once for every sample, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)
        self.register_buffer("numbers", torch.arange(6).reshape(1, -1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(self.get_buffer("numbers").expand(len(ids), -1))
        return x + self.outer(torch.relu(self.inner(x)))


@pytest.mark.parametrize("start", ["new", "trained"])
def test_a_phase_has_other_batches_than_the_example(start: Any) -> None:
    ids = torch.arange(160).reshape(-1, 5)[:, [0, 1, 2, 3, 4, 0]] % 20

    def fit(net: nn.Module, penalty: Penalty) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        penalty.begin(60)
        penalty.attach(optimizer)
        for step in range(60):
            optimizer.zero_grad()
            answers = net(ids[: 3 + step % 4])
            assert len(answers) == 3 + step % 4
            (answers.square().mean() + penalty.loss()).backward()
            optimizer.step()

    torch.manual_seed(0)
    given: dict[str, Any] = {"data": ids} if start == "trained" else {}
    result = mg.morph(Positions(), (ids[:2],), fit, budget={"flops": "60%"}, start=start, **given)
    # One sample at a time gives what all of them give: that it takes any batch, and mixes none.
    whole = result.net(ids)
    torch.testing.assert_close(torch.cat([result.net(one) for one in ids.split(1)]), whole)
    (found,) = run(result.model, {"ids": ids.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), whole, rtol=1e-4, atol=1e-5)
