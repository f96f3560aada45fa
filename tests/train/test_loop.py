"""``mg.morph`` around a user's own training: iterations, budgets, phases; and its sanity checks."""

import copy
import warnings
from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.errors import ArgumentError, BudgetError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.recipes.trainer import Recipe
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.train.config import SearchConfig
from morphgraph.train.phases import NoPenalty, Penalty

X, LABELS = image(16), torch.arange(16) % 10


def fitting(steps: int, begin: bool = True) -> Callable[[nn.Module, Penalty], None]:
    """A phase of so many steps on a few images."""

    def fit(net: nn.Module, penalty: Penalty) -> None:
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        if begin:
            penalty.begin(steps)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X), LABELS).backward()
            optimizer.step()
            penalty.step(lr=0.05 / (1 - 0.9))

    return fit


def seed_network(widths: tuple[int, ...] = (8, 12)) -> nn.Module:
    torch.manual_seed(0)
    return residual_cnn(widths)


def test_every_iteration_starts_from_the_network_before() -> None:
    seen: list[tuple[int, bool]] = []
    inner = fitting(100)

    def fit(net: nn.Module, penalty: Penalty) -> None:
        seen.append((sum(p.numel() for p in net.parameters()), isinstance(penalty, NoPenalty)))
        inner(net, penalty)

    net = seed_network()
    result = mg.morph(net, (X,), fit, budget={"flops": "100%"}, iterations=2)
    assert [quiet for _, quiet in seen] == [False] * len(result.iterations) + [True]
    assert len(result.iterations) == 2
    first, second = result.iterations
    assert seen[0][0] == sum(p.numel() for p in net.parameters())
    assert seen[1][0] == sum(p.numel() for p in second.net.parameters())
    assert second.graph.widths.tolist() == first.plan.widths(result.graph).tolist()
    told = mg.lift(mg.apply(result.graph, result.plan))
    made = mg.lift(result.model)
    for kind in ("flops", "params"):
        assert mg.cost(told, kind).total == mg.cost(made, kind).total
    whole = mg.cost(result.graph, "flops").total
    assert 0.95 * whole < mg.cost(made, "flops").total <= whole
    # What is said to stay is, untrained and unshrunk, the same channel.
    gone = first.plan.keep_channels(result.graph)
    for index, kept in result.plan.keep_channels(result.graph).items():
        assert set(kept.tolist()) <= set(gone.get(index, np.arange(99)).tolist()) | {0}


def test_the_structure_that_repeats_ends_the_loop() -> None:
    """With ``shrink_to=1`` only the budget narrows the network: there is nothing left to do."""
    result = mg.morph(
        seed_network(), (X,), fitting(100), budget={"flops": "60%"}, iterations=5, shrink_to=1.0
    )
    assert 1 < len(result.iterations) < 5
    last, before = result.iterations[-1], result.iterations[-2]
    assert last.last
    assert not before.last
    assert last.plan.widths(result.graph).tolist() == before.plan.widths(result.graph).tolist()


def test_all_budgets_hold_whatever_is_regularized() -> None:
    budget = {"flops": "60%", "params": "50%", "memory": "90%"}
    for cost in (None, "params", "flops+20*params"):
        result = mg.morph(seed_network(), (X,), fitting(100), budget=budget, cost=cost, round_to=1)
        made = mg.lift(result.model)
        near = 0.0
        for kind, share in budget.items():
            limit = float(share.rstrip("%")) / 100 * mg.cost(result.graph, kind).total
            assert mg.cost(made, kind).total <= limit
            near = max(near, mg.cost(made, kind).total / limit)
        assert near > 0.9  # one of them is used up


def test_growth_is_bounded_by_the_width_in_the_original() -> None:
    result = mg.morph(
        seed_network(), (X,), fitting(100), budget={"flops": "150%"}, iterations=3, max_growth=1.25
    )
    graph = result.graph
    assert len(result.iterations) > 1
    for found in result.iterations:
        assert (found.plan.widths(graph) <= 1.25 * graph.widths).all()


def test_channels_may_compete_within_their_group_only() -> None:
    """The plan says so, and the phase goes another way."""
    found = [
        mg.morph(seed_network(), (X,), fitting(100), budget={"flops": "50%"}, relative=relative)
        for relative in (False, True)
    ]
    assert [result.plan.request["relative"] for result in found] == [False, True]
    absolute, relative = (result.iterations[0].trajectory for result in found)
    assert (absolute[0].share, absolute[0].reference) == (relative[0].share, relative[0].reference)
    # The scales are 1 yet, and fall by shares, down to a hundredth.
    assert relative[0].weight == pytest.approx(absolute[0].weight * log(100))
    assert absolute[-1].weight < relative[-1].weight  # what has shrunk is asked for less


def test_a_phase_says_its_length_or_is_told_so() -> None:
    net, budget = seed_network(), {"flops": "50%"}
    silent = fitting(100, begin=False)
    with pytest.warns(MorphWarning, match=r"100 steps of 1000: say so by penalty.begin\(100\)"):
        mg.morph(copy.deepcopy(net), (X,), silent, budget=budget, shrink_to=0.5)
    with pytest.warns(MorphWarning, match="fit never called penalty.step"):
        mg.morph(copy.deepcopy(net), (X,), lambda net, penalty: None, budget=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        result = mg.morph(copy.deepcopy(net), (X,), silent, budget=budget, steps=100, shrink_to=0.5)
    assert result.iterations[0].met


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"budget": {}}, ArgumentError),
        ({"budget": {"flops": "50%"}, "iterations": 0}, ArgumentError),
        ({"budget": {"flops": "50%"}, "shrink_to": 0.0}, ArgumentError),
        ({"budget": {"flops": "50%"}, "max_growth": 0.5}, ArgumentError),
        ({"budget": {"beauty": "50%"}}, ArgumentError),
        ({"budget": {"flops": "0.01%"}}, BudgetError),
    ],
)
def test_what_cannot_be_is_refused_before_the_training(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    def fit(net: nn.Module, penalty: Penalty) -> None:
        raise AssertionError("trained")

    with pytest.raises(error):
        mg.morph(seed_network(), (X,), fit, **arguments)


def test_fresh_weights_forget_what_was_trained() -> None:
    found = {}

    def fit(net: Any, penalty: Penalty) -> None:
        if isinstance(penalty, NoPenalty):
            found["start"] = net.stem.weight.detach().clone()
            return
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(0.25)

    whole = {"flops": "100%"}
    mg.morph(seed_network(), (X,), fit, budget=whole, shrink_to=1.0)
    assert (found["start"] == 0.25).all()
    mg.morph(seed_network(), (X,), fit, budget=whole, shrink_to=1.0, weights="fresh")
    assert not (found["start"] == 0.25).any()


def graph_of(net: nn.Module) -> ChannelGraph:
    return mg.lift(mg.export(net, (X,)))


def test_smoke_finds_what_is_wired_wrongly() -> None:
    net = seed_network()
    before = copy.deepcopy(net.state_dict())
    assert mg.smoke(net, (X,), fitting(100)).passed
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def another_module(net: nn.Module, penalty: Penalty) -> None:
        fitting(100)(copy.deepcopy(net), penalty)

    def no_rate(net: nn.Module, penalty: Penalty) -> None:
        for _ in range(100):
            penalty.step(lr=0.0)

    def decayed(net: nn.Module, penalty: Penalty) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=2.0)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X), LABELS).backward()
            optimizer.step()
            penalty.step(lr=0.1)

    def restored(net: nn.Module, penalty: Penalty) -> None:
        """An average of the weights that knows nothing of the penalty is put back."""
        kept = copy.deepcopy(net.state_dict())
        try:
            fitting(100)(net, penalty)
        finally:
            net.load_state_dict(kept)

    zero = mg.smoke(net, (X,), decayed).checks[1]
    assert "weight decay" in zero.reason
    for broken in (no_rate, restored):
        strong = mg.smoke(net, (X,), broken).checks[0]
        assert "did not collapse" in strong.reason
    assert mg.smoke(
        net, (X,), another_module
    ).passed  # the penalty has the right module all the same


def test_recipes_of_the_structure_phase_keep_their_rate() -> None:
    recipe = Recipe(8, bf16=True).shrinking(3)
    assert (recipe.epochs, recipe.constant, recipe.bf16) == (3, True, True)


def test_an_aim_names_costs_as_plans_do() -> None:
    aim = SearchConfig({"flops + 20*params": "50%"}, cost="flops + 20.0*params")
    assert (list(aim.budget), aim.regularized) == (["flops+20*params"], "flops+20*params")


class Labelled(nn.Module):
    """A network that computes its own loss where it is given labels, as those of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("start", ["new", "trained"])
def test_labels_for_what_a_resize_makes_are_told(start: Any) -> None:
    """The first network takes them, the resized one has the arguments of the export."""
    torch.manual_seed(0)
    x, labels = torch.randn(128, 4), torch.arange(128) % 3

    def fit(net: nn.Module, penalty: Penalty) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            net(x, labels=labels)["loss"].backward()
            optimizer.step()
            penalty.step(lr=0.05)

    def other(net: nn.Module, penalty: Penalty) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'x'")

    given = {"budget": {"flops": "60%"}, "start": start, "steps": 3}
    given |= {"data": x} if start == "trained" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)
        with pytest.raises(
            ArgumentError, match=r"'labels'.* the example alone \(x\).*cross_entropy"
        ):
            mg.morph(Labelled(), {"x": x[:2]}, fit, **given)
        with pytest.raises(TypeError, match="argument 'x'"):
            mg.morph(Labelled(), {"x": x[:2]}, other, **given)
