"""A budget is met whatever moves the parameters, and what is wired wrongly is said."""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError, MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.train.sparing import only_as_far

STEPS = 100


class Lion(torch.optim.Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, 2023."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(0.9 * momentum + 0.1 * p.grad))
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "Lion": lambda p: Lion(p, lr=3e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}
EXAMPLE = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def block(into: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


@cache
def lifted(strength: str) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)]
    if strength == "kernels":
        net = nn.Sequential(nn.Conv2d(2, 96, 3), nn.GELU(), nn.Conv2d(96, 24, 1), nn.GELU(), *ends)
        for module in net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
    else:
        net = nn.Sequential(*block(2, 32), *block(32, 32), *block(32, 24), *ends)
    return net, mg.lift(mg.export(net, (EXAMPLE,)))


def made(strength: str = "scales", **options: Any) -> tuple[nn.Module, mg.Regularizer]:
    net, graph = lifted(strength)
    net = copy.deepcopy(net).train()
    return net, mg.Regularizer(graph, net, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(16) % 4
    patterns = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(9))
    return patterns[labels] + torch.randn(16, 2, 6, 6, generator=generator), labels


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, begin: int = 0, end: int = STEPS
) -> None:
    for step in range(begin, end):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strength", ["scales", "kernels"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.filterwarnings("ignore:masking changed the outputs")
def test_half_within_a_hundredth(name: str, strength: str, seed: int) -> None:
    """With default arguments, no layer a neck, and nothing settled before it was asked for."""
    net, reg = made(strength)
    torch.manual_seed(seed)
    for parameter in net.parameters() if seed else ():
        with torch.no_grad():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    optimizer = OPTIMIZERS[name](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    first = None
    for step in range(STEPS):
        train(net, optimizer, STEPS * seed + step, STEPS * seed + step + 1)
        first = step if budget.met and first is None else first
    assert first is not None
    assert first >= 0.55 * STEPS
    assert 0.49 <= budget.share <= 0.5
    small = mg.lift(mg.apply(reg.graph, reg.plan(), weights=net, verify=False))
    assert mg.cost(small, "flops").total <= budget.share * reg.initial_cost * 1.0001


def test_what_is_met_is_filled_with_channels_that_died_long_before() -> None:
    """Nothing cheaper than what is left of the budget stays away; the last to die come first."""
    net, reg = made()
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS)
    with torch.no_grad():
        net.get_parameter("7.weight")[:16] = 0.0  # of cheap channels
        net.get_parameter("4.weight")[:20] = 0.02  # these die in this step
    cheap = torch.from_numpy(reg.graph.group("6").channels)[:16]
    lived = torch.zeros(len(reg.graph.channel_group), dtype=torch.int32)
    lived[cheap[5]], lived[cheap[11]] = 8, 9
    step = reg.shrinkage(0.05 / float(reg.marginals().max()) * reg.initial_cost / reg.weight)
    target = 0.4862
    budget.paces[0].target = target
    step, spared = only_as_far(reg, budget.paces, step, [target], lived)
    assert cheap[spared[cheap]].tolist() == [int(cheap[11])]
    widths = reg.live_widths(step.after.masked_fill(spared, 1.0))
    dearer = [
        reg.cost.at(widths + np.eye(len(widths))[group.index]) / reg.initial_cost
        for group in reg.graph.groups
        if group.resizable and widths[group.index] < group.width
    ]
    assert len(dearer) == 2
    assert reg.cost.at(widths) / reg.initial_cost <= target < min(dearer)


def test_of_sgd_nothing_changes() -> None:
    """Its scales move as it moves them; of others, all by one factor of their gradients."""
    ways = []
    for attached in (False, True):
        net, reg = made()
        optimizer = OPTIMIZERS["SGD"](net.parameters())
        if attached:
            budget = mg.Budget(reg, {"flops": "50%"}, 10**6).attach(optimizer)
            reg.weight = 0.0
            for pace in budget.paces:
                pace.first = 0.0
        train(net, optimizer, end=12)
        ways.append(torch.cat([s.parameter.detach().flatten() for s in reg.scales]))
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-5, atol=1e-6)
    assert float((ways[0] - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["Adam", "Lion"])
def test_scales_move_in_proportion_to_their_gradients(name: str) -> None:
    net, reg = made()
    optimizer = OPTIMIZERS[name](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, 1000, interval=1000)
    before = torch.cat([s.parameter.detach().clone() for s in reg.scales])
    train(net, optimizer, end=1)
    budget.step()
    moved = torch.cat([s.parameter.detach() for s in reg.scales]) - before
    gradient = torch.cat([s.parameter.grad for s in reg.scales if s.parameter.grad is not None])
    rate = float((-moved @ gradient) / (gradient @ gradient))
    assert rate > 0
    torch.testing.assert_close(moved, -rate * gradient, rtol=1e-4, atol=1e-7)


def test_attached_it_steps_when_the_optimizer_does() -> None:
    """Micro-batches and steps that a scaler skips are none; of two optimizers both count as one."""
    net, reg = made()
    scales = [p for p in net.parameters() if p.dim() == 1]
    rest = [p for p in net.parameters() if p.dim() > 1]
    both = torch.optim.AdamW(scales, lr=1e-3), torch.optim.SGD(rest, lr=0.1)
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(*both)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        for micro in range(2):
            images, labels = batch(2 * step + micro)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(images), labels)
            scaler.scale(loss).backward()
        if step == 2:
            next(net.parameters()).grad.fill_(torch.inf)
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in both:
            optimizer.zero_grad()
    assert budget.step_number == 6  # the step behind the one that a scaler skipped counts both
    budget.detach()
    train(net, both[0], end=1)
    assert budget.step_number == 6


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_several_budgets_and_ceilings(name: str) -> None:
    net, reg = made(floors={"0": 20}, ceilings={"6": "50%"})
    optimizer = OPTIMIZERS[name](net.parameters())
    budget = mg.Budget(reg, {"flops": "60%", "params": "50%"}, STEPS).attach(optimizer)
    train(net, optimizer)
    assert budget.met
    plan = reg.plan({"flops": "60%", "params": "50%"})
    widths = plan.widths(reg.graph)
    assert widths[reg.graph.group("0").index] >= 20
    assert widths[reg.graph.group("6").index] <= 12
    small = mg.lift(mg.apply(reg.graph, plan, weights=net))
    for kind, share in (("flops", 0.6), ("params", 0.5)):
        assert mg.cost(small, kind).total <= share * mg.cost(reg.graph, kind).total
    weights = [{m.weight for m in pace.trajectory} for pace in budget.paces]
    assert weights[0] != weights[1]


def test_floors_ceilings_and_frozen_parts_by_glob() -> None:
    """Each where the training alone decides otherwise: the first of the two runs is without."""
    guards: dict[str, Any] = {"exclude": ["0*"], "floors": {"[3-4]": 24}, "ceilings": {"6*": "50%"}}
    found = []
    for options in ({}, guards):
        net, reg = made(**options)
        optimizer = OPTIMIZERS["AdamW"](net.parameters())
        budget = mg.Budget(reg, {"flops": "60%"}, STEPS).attach(optimizer)
        train(net, optimizer)
        assert budget.met
        widths = reg.plan({"flops": "60%"}).widths(reg.graph)
        found.append({name: int(widths[reg.graph.group(name).index]) for name in ("0", "3", "6")})
    free, guarded = found
    assert free["0"] < 32
    assert free["3"] < 24
    assert free["6"] > 12
    assert guarded["0"] == 32
    assert guarded["3"] >= 24
    assert guarded["6"] <= 12


def test_another_budget_in_mid_training() -> None:
    net, reg = made()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    budget = mg.Budget(reg, {"flops": "70%"}, STEPS).attach(optimizer)
    train(net, optimizer, end=90)
    assert budget.met
    budget.change({"flops": "40%"}, steps=200)
    assert budget.share > 0.6
    with pytest.warns(MorphWarning, match=r"not met: .* after 90 of 200 steps; promise"):
        reg.plan()
    train(net, optimizer, begin=90, end=200)
    assert budget.met
    assert 0.35 <= budget.share <= 0.4
    with pytest.raises(ArgumentError, match="no steps are left"):
        budget.change({"flops": "30%"})
    with pytest.warns(MorphWarning, match="do not come back"):
        budget.change({"flops": "90%"}, steps=300)
    with pytest.raises(ArgumentError, match="only flops can change"):
        budget.change({"params": "30%"}, steps=300)


def test_a_state_goes_on_as_if_nothing_had_been() -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, mg.Budget]:
        net, reg = made()
        optimizer = OPTIMIZERS["AdamW"](net.parameters())
        return net, optimizer, mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)

    net, optimizer, budget = begun()
    train(net, optimizer, end=40)
    parts = (net, optimizer, budget)
    states = copy.deepcopy([part.state_dict() for part in parts])
    train(net, optimizer, begin=40)
    again = begun()
    again[0].load_state_dict(states[0])
    again[1].load_state_dict(states[1])
    again[2].load_state_dict(states[2])
    train(again[0], again[1], begin=40)
    for one, other in zip(net.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)
    net, reg = made()
    other_run, sgd = mg.Budget(reg, {"flops": "50%"}, STEPS), OPTIMIZERS["SGD"](net.parameters())
    other_run.load_state_dict(states[2])
    with pytest.warns(MorphWarning, match="of a run with AdamW, and now SGD trains"):
        other_run.attach(sgd)
    with pytest.raises(ArgumentError, match="of a budget on flops, not on params"):
        mg.Budget(reg, {"params": "50%"}, STEPS).load_state_dict(states[2])


def test_what_is_wired_wrongly_is_said() -> None:
    net, reg = made()
    trained = copy.deepcopy(net)
    with pytest.raises(ArgumentError, match="has none of the 3 regularized parameters"):
        mg.Budget(reg, {"flops": "50%"}, 50).attach(OPTIMIZERS["SGD"](trained.parameters()))
    with pytest.raises(ArgumentError, match="is no torch"):
        mg.Budget(reg, {"flops": "50%"}, 50).attach(trained)
    decayed = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    budget = mg.Budget(reg, {"flops": "50%"}, 5000)
    with pytest.warns(MorphWarning, match="weight decay also shrinks 3 of 3"):
        budget.attach(decayed)
    budget = mg.Budget(reg, {"flops": "50%"}, 20)
    optimizer = OPTIMIZERS["SGD"](trained.parameters())
    for step in range(9):
        train(trained, optimizer, step, step + 1)
        budget.step()
    with pytest.warns(MorphWarning, match="nothing but the penalty moves 3 of 3"):
        budget.step()
    for _ in range(9):
        budget.step(lr=0.0)
    with pytest.warns(MorphWarning, match=r"the phase ends at .* of flops instead of 50.0%"):
        budget.step(lr=0.0)


def test_gradients_that_are_gone_are_missed() -> None:
    net, reg = made()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, 20)
    for step in range(10):
        train(net, optimizer, step, step + 1)
        optimizer.zero_grad()
        if step < 9:
            budget.step()
    with pytest.warns(MorphWarning, match="gradients were cleared before budget"):
        budget.step()


@pytest.mark.parametrize("strength", ["scales", "kernels"])
def test_a_training_that_diverges_is_refused(strength: str) -> None:
    net, reg = made(strength)
    budget = mg.Budget(reg, {"flops": "50%"}, 20)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="the training has diverged"):
        budget.step()


def test_frozen_in_mid_training_is_left_alone() -> None:
    net, reg = made("kernels")
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    kernel = net.get_parameter("0.weight")
    kernel.requires_grad_(False)
    before = kernel.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)
        train(net, optimizer)
    assert torch.equal(kernel, before)
    assert budget.step_number == STEPS


def test_smoke_runs_what_to_torch_makes() -> None:
    """A loop that needs more than the call of the user's class fails before the training."""

    def fit(net: nn.Module, penalty: Any) -> None:
        optimizer = OPTIMIZERS["AdamW"](net.parameters())
        penalty.begin(STEPS)
        penalty.attach(optimizer)
        train(net, optimizer)

    def by_index(net: nn.Module, penalty: Any) -> None:
        assert isinstance(net, nn.Sequential), "no Sequential"
        fit(net, penalty)

    net, _ = made()
    assert mg.smoke(net, (EXAMPLE,), fit).passed
    report = mg.smoke(net, (EXAMPLE,), by_index)
    assert [check.passed for check in report.checks] == [True, True, False]
    assert "AssertionError: no Sequential" in report.checks[2].reason


def test_gradients_of_an_embedding_may_be_sparse() -> None:
    """Two optimizers, as sparse gradients take: every step of both is one, as with dense ones."""

    def shares(sparse: bool) -> list[float]:
        torch.manual_seed(0)
        words: Any = nn.EmbeddingBag(20, 16, mode="sum", sparse=sparse)
        net = nn.Sequential(words, nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        ids = torch.arange(40).reshape(8, 5) % 20
        graph = mg.lift(mg.export(net, (ids,)))
        first = torch.optim.SGD(words.parameters(), lr=0.05)
        second = torch.optim.SGD(list(net.parameters())[1:], lr=0.05, momentum=0.9)
        budget = mg.Budget(mg.Regularizer(graph, net), {"flops": "50%"}, 60).attach(first, second)
        for _ in range(60):
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(net(ids), torch.arange(8) % 4).backward()
            first.step()
            second.step()
        assert budget.step_number == 60
        return [step.share for step in budget.trajectory]

    assert shares(sparse=True) == pytest.approx(shares(sparse=False))


def test_a_warning_names_the_line_of_the_caller() -> None:
    net, reg = made()
    decayed = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mg.Budget(reg, {"flops": "50%"}, STEPS).attach(decayed)
        train(net, decayed, end=STEPS)
    ours = [each for each in caught if issubclass(each.category, MorphWarning)]
    assert any("decay" in str(each.message) for each in ours)
    assert {each.filename for each in ours} == {__file__}
