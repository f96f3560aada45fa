"""What comes between: parameters that are frozen, replaced or swapped, states, other amounts."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError, BudgetError, MorphWarning
from tests.train.test_optimizers import OPTIMIZERS, STEPS, batch, made, train


def test_scales_frozen_in_mid_training_are_left_alone() -> None:
    """Whatever momentum they had; their optimizer leaves them alone as well."""
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    budget = mg.Budget(reg, {"flops": "60%"}, STEPS).attach(optimizer)
    train(net, optimizer, end=30)
    scale = net.get_parameter("4.weight").requires_grad_(False)
    scale.grad = None
    before = scale.detach().clone()
    train(net, optimizer, begin=30)
    assert torch.equal(scale, before)
    assert budget.met


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_optimizer_that_maximizes_moves_scales_as_one_that_minimizes(name: str) -> None:
    ways = []
    for uphill in (False, True):
        net, reg = made()
        kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name]
        optimizer = kind(net.parameters(), lr=0.01, maximize=uphill)
        mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
        for step in range(20):
            images, labels = batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            (-loss if uphill else loss).backward()
            optimizer.step()
        ways.append(torch.cat([s.parameter.detach() for s in reg.scales]))
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-4, atol=1e-6)
    assert float((ways[0] - ways[0].mean()).abs().max()) > 1e-2


def test_parameters_in_no_optimizer_are_told() -> None:
    net, reg = made()
    rest = [parameter for name, parameter in net.named_parameters() if name != "4.weight"]
    with pytest.warns(MorphWarning, match=r"1 of 3 .* in no optimizer, such as '4\.weight'"):
        mg.Budget(reg, {"flops": "50%"}, STEPS).attach(OPTIMIZERS["SGD"](rest))


@pytest.mark.parametrize("another", [False, True])
def test_a_loss_of_ones_own_that_shrinks_scales_is_told(*, another: bool) -> None:
    """The cost falls far below what the penalty would take; without that loss nothing is said."""
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MorphWarning)
        for step in range(STEPS // 3):
            images, labels = batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            if another:
                loss = loss + sum(source.parameter.abs().sum() for source in reg.scales)
            loss.backward()
            optimizer.step()
    said = [str(each.message) for each in caught if "far below the reference" in str(each.message)]
    assert len(said) == another


def test_a_step_by_hand_beside_an_attached_one_does_not_count() -> None:
    ways = []
    for twice in (False, True):
        net, reg = made()
        optimizer = OPTIMIZERS["SGD"](net.parameters())
        budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
        train(net, optimizer, end=1)
        if twice:
            with pytest.warns(MorphWarning, match="steps after it by itself; remove the call"):
                budget.step()
        for step in range(1, 30):
            train(net, optimizer, step, step + 1)
            if twice:
                budget.step()
        assert budget.step_number == 30
        ways.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *ways))


@pytest.mark.parametrize("attached", [False, True])
def test_a_plan_before_any_step_was_counted_is_told(*, attached: bool) -> None:
    """As of an optimizer that is not the one that trains, or whose ``step`` nobody calls."""
    net, reg = made()
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS)
    if attached:
        budget.attach(OPTIMIZERS["AdamW"](net.parameters()))
    train(net, OPTIMIZERS["AdamW"](net.parameters()), end=3)
    who = "AdamW" if attached else "an optimizer"
    with pytest.warns(MorphWarning, match=f"no step of {who} was counted; attach the budget"):
        reg.plan()


class Averaging(torch.optim.Optimizer):
    """As schedule-free ones (Defazio et al., The Road Less Scheduled, 2024): it swaps them."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            average = self.state[p].setdefault("average", p.clone())
            p.sub_(self.param_groups[0]["lr"] * p.grad)
            average.lerp_(p, 0.05)

    @torch.no_grad()
    def swap(self) -> None:
        for p in self.param_groups[0]["params"]:
            average, now = self.state[p]["average"], p.clone()
            p.copy_(average)
            average.copy_(now)


def test_the_structure_stays_where_the_optimizer_swaps_parameters() -> None:
    """Of what a budget has taken nothing comes back, though the average still has it."""
    net, reg = made()
    optimizer = Averaging(net.parameters(), lr=0.05)
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    for step in range(STEPS):
        train(net, optimizer, step, step + 1)
        if step % 10 == 0:  # to look at the average, and back
            optimizer.swap()
            optimizer.swap()
    assert budget.met
    plan = reg.plan()
    optimizer.swap()
    assert reg.live_share(reg.strengths()) > 0.8  # by what stands in the module
    assert reg.live_share() == budget.share
    assert reg.plan().groups == plan.groups
    assert plan.cost["flops"].after <= 0.5 * plan.cost["flops"].before
    again = mg.Regularizer(reg.graph, net)
    resumed = mg.Budget(again, {"flops": "50%"}, STEPS)
    resumed.load_state_dict(budget.state_dict())
    assert again.plan().groups == plan.groups


def test_what_the_loss_pushes_below_the_threshold_stays_where_the_budget_allows_it() -> None:
    """Else a phase could end far below its budget: the strongest that are not zero fill it."""
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    budget = mg.Budget(reg, {"flops": "60%"}, STEPS).attach(optimizer)
    train(net, optimizer, end=66)
    assert budget.share > 0.6
    with torch.no_grad():
        for source in reg.scales:
            source.parameter[8:] *= 1e-4
    for step in range(66, STEPS):
        train(net, optimizer, step, step + 1)
    assert budget.met
    assert 0.59 <= budget.share <= 0.6
    plan = reg.plan()
    assert plan.cost["flops"].after == pytest.approx(budget.share * plan.cost["flops"].before)


def renewed(net: nn.Module) -> None:
    """Other parameters of the same values in the places of the norms' scales."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = nn.Parameter(module.weight.detach().clone())


def test_parameters_that_are_replaced_in_mid_training() -> None:
    """With an optimizer that has them the phase goes on, with the old one it does not."""
    net, reg = made()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    train(net, optimizer, end=30)
    renewed(net)
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    budget.attach(optimizer)
    train(net, optimizer, begin=30, end=60)
    renewed(net)
    with pytest.raises(ArgumentError, match="AdamW has none of the 3 regularized parameters"):
        train(net, optimizer, begin=60)


def test_parameters_that_are_replaced_and_nobody_trains() -> None:
    """Without ``attach`` nothing but the penalty moves them, and that is seen."""
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, STEPS)
    for step in range(42):
        if step == 30:
            renewed(net)
        train(net, optimizer, step, step + 1)
        if step < 40:
            budget.step()
    with pytest.warns(MorphWarning, match="nothing but the penalty moves 3 of 3 .* in 10 steps"):
        budget.step()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_no_gradient_reaches_is_not_taken_for_untrained(
    frozen: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """The first unit of a layer is silent from the beginning; a layer is frozen on the way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    reg = mg.Regularizer(mg.lift(mg.export(net, (torch.zeros(2, 6),))), net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    first = net.get_submodule("0")
    with torch.no_grad():
        first.get_parameter("bias")[0] = -100.0
    if frozen:
        first.requires_grad_(False)
    for step in range(20):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(8) % 3).backward()
        optimizer.step()
    assert not [str(each.message) for each in recwarn if "nothing but" in str(each.message)]


def test_a_state_of_a_settled_structure_changes_no_bit() -> None:
    """Not either where a channel that stays has become weaker than those that went."""
    ways = []
    for resumed in (False, True):
        net, reg = made()
        optimizer = OPTIMIZERS["SGD"](net.parameters())
        budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
        train(net, optimizer, end=90)
        assert budget.met
        alive = torch.nonzero(net.get_parameter("4.weight")).flatten()
        with torch.no_grad():
            net.get_parameter("4.weight")[alive[0]] = 1e-3
        if resumed:
            state = copy.deepcopy(budget.state_dict())
            budget.detach()
            reg = mg.Regularizer(reg.graph, net)
            budget = mg.Budget(reg, {"flops": "50%"}, STEPS)
            budget.load_state_dict(state)
            budget.attach(optimizer)
        train(net, optimizer, begin=90)
        ways.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *ways))


def test_a_state_of_other_amounts_or_another_length_is_told() -> None:
    _, reg = made()
    state = mg.Budget(reg, {"flops": "50%", "params": "60%"}, STEPS).state_dict()
    other = mg.Budget(reg, {"flops": "30%", "params": "60%"}, 2 * STEPS)
    said = r"goes on to flops at 50.0%, 100 steps, not to flops at 30.0%, 200 steps; to change"
    with pytest.warns(MorphWarning, match=said):
        other.load_state_dict(state)
    other.change({"flops": "30%"}, steps=2 * STEPS)
    assert other.target == 0.3
    assert other.steps == 2 * STEPS


def test_a_change_that_is_refused_changes_nothing() -> None:
    _, reg = made()
    budget = mg.Budget(reg, {"flops": "50%", "params": "60%"}, STEPS)
    before = copy.deepcopy(budget.state_dict()["paces"])
    with pytest.raises(BudgetError, match=r"params=0.01% cannot be met"):
        budget.change({"flops": "40%", "params": "0.01%"})
    with pytest.raises(ArgumentError, match="only flops, params can change"):
        budget.change({"flops": "40%", "memory": "50%"})
    assert budget.state_dict()["paces"] == before


def test_several_optimizers_in_a_list_are_told_apart() -> None:
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    with pytest.raises(ArgumentError, match="a list is no optimizer; give several one by one"):
        mg.Budget(reg, {"flops": "50%"}, STEPS).attach([optimizer])
