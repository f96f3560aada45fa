"""The controllers, on nets so small that every phase takes a blink: no data, often no loss."""

import copy
import io
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.errors import ArgumentError, BudgetError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.passes.lift import lift
from morphgraph.torch_io.export import export
from morphgraph.train.controller import Budget, ControlStep
from morphgraph.train.fixed_weight import FixedWeight
from morphgraph.train.regularizer import Regularizer

pytestmark = pytest.mark.filterwarnings("ignore:nothing but the penalty moves")  # often no loss


class Normed(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())


class Block(nn.Module):
    """A stem, a residual block without a shortcut's convolution, two towers that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = Normed(2, 4), Normed(4, 3)
        self.outer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.left, self.right = Normed(4, 3), Normed(4, 2)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.outer(self.inner(x)))
        both: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1))
        return both


class Side(nn.Module):
    """An output that goes around a convolution that may die."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.head = Normed(2, 3), Normed(3, 2), nn.Conv2d(3, 2, 1)
        self.aside = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x) + self.aside(self.side(x))
        return out


EXAMPLE = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
NETS: dict[str, Any] = {
    "chain": lambda: nn.Sequential(Normed(2, 20), Normed(20, 6), Normed(6, 8), nn.Conv2d(8, 2, 1)),
    "block": Block,
    "side": Side,
}


@cache
def exported(name: str) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    return net, lift(export(net, (EXAMPLE,)))


def made(name: str = "chain", **options: Any) -> tuple[nn.Module, Regularizer]:
    net, graph = exported(name)
    net = copy.deepcopy(net)
    return net, Regularizer(graph, net, **options)


def scales_of(net: nn.Module) -> list[Tensor]:
    return [module.weight for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("target", ["70%", "40%"])
def test_lands_at_the_target_exactly(spread: float, target: str) -> None:
    """Without a loss; with equal scales a whole layer would die in one step."""
    net, reg = made()
    torch.manual_seed(1)
    with torch.no_grad():
        for scale in scales_of(net):
            scale.uniform_(1.0 - spread, 1.0)
    budget = Budget(reg, {"flops": target}, steps=80)
    before = reg.strengths()
    while not budget.met:
        before = reg.strengths().detach()
        budget.step(lr=1.0)
        assert budget.step_number <= 80
    assert budget.share == reg.live_share() <= budget.target
    strengths = reg.strengths().detach()
    died = torch.nonzero(reg.alive(before) & ~reg.alive()).flatten()
    strongest = died[before[died].argmax()]
    assert reg.live_share(strengths.index_copy(0, strongest[None], before[strongest][None])) > (
        budget.target
    )
    budget.step(lr=1.0)
    assert budget.share == reg.live_share()  # settled


def test_equal_channels_die_together_but_for_those_that_fit() -> None:
    """The test above is about something: left alone, more than half of a layer dies in a step."""
    _, reg = made()
    widths, fell = reg.live_widths(), 0.0
    reg.weight = 1.0
    for _ in range(2000):
        reg.proximal_step(0.01)
        fell = max(fell, float(((widths - reg.live_widths()) / reg.graph.widths).max()))
        widths = reg.live_widths()
    assert fell > 0.5


def test_the_prediction_leads_and_all_is_recorded() -> None:
    _, reg = made()
    budget = Budget(reg, {"flops": "40%"}, steps=120)
    while not budget.met:
        budget.step(lr=1.0)
    moments = budget.trajectory
    assert [moment.step for moment in moments] == list(range(1, budget.step_number))
    assert all(moment.predicted <= moment.share for moment in moments)
    foreseen = next(moment.step for moment in moments if moment.predicted < 1)
    happened = next((m.step for m in moments if m.share < 1), budget.step_number)
    assert 1 < foreseen < happened <= foreseen + budget.ahead + 1
    for moment in moments:
        progress = (moment.step + budget.ahead) / 120
        fallen = min(1.0, max(0.0, (progress - 0.1) / 0.6))
        assert moment.reference == pytest.approx(1 - 0.6 * fallen)
    for earlier, later in itertools.pairwise(m for m in moments if m.step > 12):
        error = later.predicted - later.reference
        assert (later.weight > earlier.weight) == (error > 0) or error == 0
        assert 0.9 < later.weight / earlier.weight < 1.11


def test_control_steps_have_an_interval() -> None:
    _, reg = made()
    budget = Budget(reg, {"flops": "40%"}, steps=60, interval=5)
    for _ in range(20):
        budget.step(lr=0.1)
    assert [moment.step for moment in budget.trajectory] == [5, 10, 15, 20]


class Training:
    """A net that learns noise while a budget shrinks it; all of it can be saved."""

    def __init__(self, name: str, steps: int, **options: Any) -> None:
        self.net, self.regularizer = made(name, **options)
        self.net.train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.budget = Budget(self.regularizer, {"flops": "40%"}, steps)
        self.taken = 0

    def train(self, until: int) -> "Training":
        for step in range(self.taken, until):
            x = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
            loss = (self.net(x) - 1).square().mean() + self.budget.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.budget.step(lr=0.05 / (1 - 0.9))
        self.taken = until
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.net, self.optimizer, self.budget)
        torch.save([self.taken, *(part.state_dict() for part in parts)], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> "Training":
        self.taken, net, optimizer, budget = torch.load(file, weights_only=True)
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict(optimizer)
        self.budget.load_state_dict(budget)
        return self


@pytest.mark.parametrize("options", [{}, {"min_width": 0}, {"strength": "lasso"}])
def test_going_on_from_a_state_changes_no_bit(options: dict[str, Any]) -> None:
    whole = Training("block", 60, **options)
    files = [(step, whole.train(step).saved()) for step in (3, 20, 40, 58)]
    whole.train(60)
    assert whole.budget.met
    for step, file in files:
        again = Training("block", 60, **options).load(file)
        assert again.taken == step
        again.train(60)
        assert again.budget.state_dict().keys() == whole.budget.state_dict().keys()
        assert again.budget.trajectory == whole.budget.trajectory
        assert again.budget.share == whole.budget.share
        assert isinstance(again.budget.trajectory[0], ControlStep)
        for one, other in zip(again.net.parameters(), whole.net.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_fixed_weight_by_proximal_steps() -> None:
    net, reg = made()
    penalty = FixedWeight(reg, weight=0.5)
    penalty.begin(10)
    before = [scale.detach().clone() for scale in scales_of(net)]
    amounts = reg.marginals() / reg.initial_cost
    assert penalty.loss() == 0.0
    penalty.step(lr=0.2)
    for old, scale, source in zip(before, scales_of(net), reg.scales, strict=True):
        expected = (old.abs() - 0.2 * 0.5 * amounts[source.index]).clamp_min(0) * old.sign()
        assert torch.allclose(scale, expected)
    state = penalty.state_dict()
    other = FixedWeight(made()[1], weight=1.0)
    other.load_state_dict(state)
    assert other.regularizer.weight == 0.5


def test_a_fixed_weight_by_the_subgradient() -> None:
    """The loss gets weight x G / F0; its slope at every scale is the marginal cost."""
    net, reg = made()
    penalty = FixedWeight(reg, weight=0.5, update="subgradient")
    term = penalty.loss()
    assert isinstance(term, Tensor)
    amounts = reg.marginals() / reg.initial_cost
    assert float(term.detach()) == pytest.approx(
        0.5 * float((amounts * reg.strengths().detach()).sum())
    )
    term.backward()
    before = [scale.detach().clone() for scale in scales_of(net)]
    for scale, source in zip(scales_of(net), reg.scales, strict=True):
        assert scale.grad is not None
        assert torch.allclose(scale.grad, 0.5 * amounts[source.index])
    penalty.step(lr=0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, scales_of(net), strict=True))


def test_a_budget_by_the_subgradient() -> None:
    """It is met by the threshold; then nothing is added, and the dead are exactly zero."""
    net, reg = made("block")
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    budget = Budget(reg, {"flops": "50%"}, steps=200, update="subgradient")
    assert isinstance(budget.loss(), Tensor)
    for step in range(200):
        x = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - 1).square().mean() + budget.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = reg.strengths()
        budget.step(lr=0.05)
        if not budget.met:
            assert torch.equal(before, reg.strengths())
    assert budget.met
    assert reg.live_share() <= 0.5
    assert budget.loss() == 0.0
    # All others are exactly zero: what is not counts as much as the living do.
    assert reg.live_share((reg.strengths() > 0).float()) <= 0.5


def test_the_weight_falls_where_a_subgradient_revives_channels() -> None:
    """Too large a weight throws dead scales over the threshold; more of it would revive more."""
    weights = []
    for revives in (False, True):
        net, reg = made()
        budget = Budget(reg, {"flops": "50%"}, steps=20, interval=1, update="subgradient")
        for _ in range(8):
            budget.step(lr=0.1)
        scale = scales_of(net)[0].detach()
        kept = scale.clone()
        scale[0] = 0.0
        budget.step(lr=0.1)
        if revives:
            scale.copy_(kept)
        before = reg.weight
        budget.step(lr=0.1)
        weights.append(reg.weight / before)
    assert weights[1] < 1 < weights[0]


def test_a_word_when_nothing_shrinks() -> None:
    _, reg = made()
    budget = Budget(reg, {"flops": "50%"}, steps=20)
    for _ in range(10):
        budget.step(lr=0.0)
    with pytest.warns(MorphWarning, match=r"at half of the phase 100.0% .* 50.0% are wanted"):
        budget.step(lr=0.0)
    for _ in range(9):
        budget.step(lr=0.0)  # once is enough: warnings are errors here


def test_a_word_when_a_group_is_dying() -> None:
    net, reg = made()
    first = scales_of(net)[0]
    budget = Budget(reg, {"flops": "5%"}, steps=60)
    with torch.no_grad():
        first[1:] = 0.0
    with pytest.warns(MorphWarning, match=r"group '0\.0' is nearly pruned: 1 of 20 .* min_width"):
        budget.step(lr=0.1)


@pytest.mark.parametrize("steps", [10, 60])
def test_a_zero_learning_rate_at_first_does_no_harm(steps: int) -> None:
    """As warm-ups begin; with few steps, no other step sets the first weight."""
    _, reg = made()
    budget = Budget(reg, {"flops": "50%"}, steps=steps)
    first = reg.weight
    budget.step(lr=0.0)
    assert reg.weight == first
    budget.step(lr=0.5)
    assert float(reg.strengths()[reg.alive()].max()) > 0.5
    assert reg.live_share() == 1.0


@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_the_first_weight_makes_up_for_the_learning_rate(lr: float) -> None:
    _, reg = made()
    budget = Budget(reg, {"flops": "50%"}, steps=80)
    for _ in range(80):
        budget.step(lr=lr)
    assert budget.met


@pytest.mark.parametrize("floor", [1, 3])
@pytest.mark.parametrize("strength", ["bn", "lasso"])
def test_floors_hold_in_training(floor: int, strength: Any) -> None:
    net, reg = made("block", min_width=floor, strength=strength)
    for _ in range(5):
        reg.proximal_step(1e6)
        own = [group for group in reg.graph.groups if group.resizable]
        expected = [min(floor, group.width) for group in own]
        assert [reg.live_widths()[group.index] for group in own] == expected
    assert reg.live_share() == pytest.approx(reg.lowest_share())
    assert float(net(EXAMPLE).std(dim=(0, 2, 3)).max().detach()) > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", list(NETS))
def test_the_last_path_never_dies(name: str, seed: int) -> None:
    """With min_width=0 and steps of any size the output still depends on the input."""
    net, reg = made(name, min_width=0)
    torch.manual_seed(seed)
    net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 1.0)
                module.bias.uniform_(0.1, 1.0)
        if isinstance(net, Block):  # a strength is the most of both arms; the stem's stay longer
            stem = net.get_parameter("stem.1.weight")
            net.get_parameter("outer.1.weight").copy_(0.5 * stem)
    pairs = torch.rand(2, 8, 2, 5, 5, dtype=torch.float64)
    smallest = 1.0
    for _ in range(12):
        reg.proximal_step(float(10 ** torch.empty(()).uniform_(-1, 4)))
        smallest = min(smallest, reg.live_share())
        one, other = net(pairs[0]), net(pairs[1])
        assert float((one - other).abs().max().detach()) > 0
    if name != "chain":
        assert 0 in reg.live_widths()  # something died as a whole
    assert smallest == pytest.approx(reg.lowest_share())


@pytest.mark.parametrize(
    ("cost", "spelled"),
    [
        ("flops+20*params", "flops+20*params"),
        ("flops+20*params", "flops + 20.0 * params"),
        (" flops + 20 * params", "flops+20*params"),
        ("latency@P100", "latency@P100"),
        ("latency", "latency"),
    ],
)
def test_any_cost_can_be_the_budget(cost: str, spelled: str) -> None:
    _, reg = made("block", cost=cost)
    budget = Budget(reg, {spelled: "80%"}, steps=80)
    for _ in range(80):
        budget.step(lr=1.0)
    assert budget.met
    assert reg.plan().cost[reg.cost.kind].after <= 0.8 * reg.initial_cost


def test_absolute_amounts() -> None:
    _, reg = made("block")
    assert Budget(reg, {"flops": reg.initial_cost / 2}, steps=10).target == pytest.approx(0.5)


def test_what_a_budget_refuses() -> None:
    _, reg = made()
    with pytest.raises(ArgumentError, match="no budget is given"):
        Budget(reg, {}, steps=10)
    with pytest.raises(ArgumentError, match="steps=0"):
        Budget(reg, {"flops": "50%"}, steps=0)
    with pytest.raises(BudgetError, match="params=1% cannot be met"):
        Budget(reg, {"flops": "50%", "params": "1%"}, steps=10)
    with pytest.raises(ArgumentError, match="cost 'flop' is unknown"):
        Budget(reg, {"flop": "50%"}, steps=10)
    with pytest.raises(BudgetError, match="the narrowest network needs"):
        Budget(reg, {"flops": "0.1%"}, steps=10)


def test_what_holds_a_budget_is_named() -> None:
    """Frozen kernels, as under adapters."""
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    net[0].requires_grad_(False)
    reg = Regularizer(lift(export(net, torch.zeros(2, 8))), net)
    with pytest.raises(BudgetError, match=r"held by '0' with .*'0.weight' is frozen"):
        Budget(reg, {"params": "20%"}, steps=10)


def test_a_budget_that_is_met_already_shrinks_nothing() -> None:
    net, reg = made()
    before = copy.deepcopy(net.state_dict())
    budget = Budget(reg, {"flops": "100%"}, steps=10)
    budget.step(lr=1.0)
    assert budget.met
    assert reg.weight == 0.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
