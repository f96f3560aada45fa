"""Elastic networks: shared weights against modules that are cut by hand, and their slices."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.errors import ArgumentError, BudgetError, MorphWarning
from morphgraph.onnx_io.runtime import run
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.weights import named_tensors
from morphgraph.train.phases import Penalty
from morphgraph.train.sandwich import SandwichPenalty, Slice

X, LABELS = image(16), torch.arange(16) % 10
BUDGETS = [{"flops": share} for share in ("100%", "60%", "30%")]


def fit(net: nn.Module, penalty: Penalty) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net.train()(X), LABELS) + penalty.loss()).backward()
        optimizer.step()


class Tied(nn.Module):
    """Two layers with one weight, and a layer normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.into, self.norm, self.out = nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        h = h + self.first(h).relu()
        return self.out(self.norm(h + self.second(h).relu()))


NETWORKS = {
    "residual": (lambda: residual_cnn((8, 12)), X),
    "tied, normalized": (Tied, torch.randn(16, 5)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
            nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 4 * 4, 4),
        ),
        X,
    ),
    "recurrent": (lambda: Last(), torch.randn(16, 6, 4)),
}  # fmt: skip


class Last(nn.Module):
    """A recurrent layer's last state, and a layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_a_network_that_was_cut(name: str) -> None:
    """The cut network has weights of its own; each gradient's place is found by counting."""
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    original = make().train()
    graph = mg.lift(mg.export(original, (x,)))
    plan = mg.uniform(graph, 0.5)
    assert plan.groups
    net, slice_ = mg.to_torch(graph.model), Slice(graph, plan).train()
    cut = mg.to_torch(mg.apply(graph, plan)).train()
    target = torch.randn_like(cut(x).detach())
    cut = mg.to_torch(mg.apply(graph, plan)).train()
    found = slice_(named_tensors(net), x)
    wanted = cut(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    (found * target).sum().backward()
    (wanted * target).sum().backward()
    # A network whose weights are their own positions, cut: where each weight comes from.
    places = {n: torch.arange(t.numel()).view(t.shape).float() for n, t in net.state_dict().items()}
    origin = mg.to_torch(mg.apply(graph, plan, weights=places, verify=False))
    shared = dict(net.named_parameters())
    for path, parameter in cut.named_parameters():
        gradient = torch.zeros(shared[path].numel())
        assert parameter.grad is not None
        where = origin.get_parameter(path).long().flatten()
        gradient[where] = parameter.grad.flatten()
        grad = shared[path].grad
        assert grad is not None
        assert torch.allclose(grad.flatten(), gradient, atol=1e-5)
        assert len(where) <= len(gradient)
    statistics = dict(cut.named_buffers())
    for key, value in slice_.net.named_buffers():
        assert torch.allclose(value.float(), statistics[key].float(), atol=1e-6)


def test_an_elastic_network_is_sliced_at_any_budget(tmp_path: Any) -> None:
    torch.manual_seed(0)
    trained = residual_cnn((8, 12))
    before = copy.deepcopy(trained.state_dict())
    made = mg.elastic(trained, (X,), fit, budgets=BUDGETS, data=[X] * 4, between=3, round_to=1)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert not torch.equal(made.net.get_parameter("fc.weight"), before["fc.weight"])
    total = mg.cost(made.graph, "flops").total
    sizes = [plan.cost["flops"].after for plan in made.plans]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) >= 4
    mg.save(made.graph.model, tmp_path / "elastic.onnx")
    made.ranking.save(tmp_path / "ranking.json")
    again = mg.Elastic(
        mg.lift(tmp_path / "elastic.onnx"), mg.Ranking.load(tmp_path / "ranking.json")
    )
    kept: list[dict[int, set[int]]] = []
    for share in (1.0, 0.8, 0.55, 0.31):
        sliced = made.slice({"flops": share * total}, round_to=1)
        assert mg.cost(mg.lift(sliced.model), "flops").total <= share * total
        other = again.slice({"flops": share * total}, round_to=1, data=[X] * 4)
        results = [run(model, {"x": X.numpy()}) for model in (sliced.model, other.model)]
        for found, wanted in zip(results[0].values(), results[1].values(), strict=True):
            assert np.array_equal(found, wanted)
        # The same weights, cut by `apply`, and statistics by torch's own cumulative average.
        net = mg.to_torch(mg.apply(again.graph, sliced.plan))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            net.train()(torch.cat([X] * 4))
            expected = net.eval()(X).numpy()
        assert np.allclose(next(iter(results[0].values())), expected, atol=1e-4)
        everything = {g.index: set(range(g.width)) for g in made.graph.groups}
        chosen = sliced.plan.keep_channels(made.graph).items()
        kept.append(everything | {index: set(each.tolist()) for index, each in chosen})
    for large, small in itertools.pairwise(kept):
        assert all(small[index] <= large[index] for index in small)
    with pytest.raises(BudgetError):
        made.slice({"flops": "20%"})
    with pytest.warns(MorphWarning, match="statistics of the whole network"):
        again.slice({"params": "60%"})


def test_smaller_networks_come_to_answer_as_the_whole_one() -> None:
    """Against the same slices of a network that was trained as long without them."""
    torch.manual_seed(0)
    net, errors = residual_cnn((8, 12)), []

    def longer(net: nn.Module, penalty: Penalty) -> None:
        for _ in range(10):
            fit(net, penalty)

    for distill in (0.0, 4.0):
        arguments: dict[str, Any] = {"data": [X] * 4, "between": 2, "distill": distill}
        made = mg.elastic(net, (X,), longer, budgets=BUDGETS, round_to=1, **arguments)
        whole, small = (made.slice({"flops": s}).model for s in ("100%", "35%"))
        (wanted,), (found,) = (run(m, {"x": X.numpy()}).values() for m in (whole, small))
        errors.append(np.square(found - wanted).mean() / wanted.var())
    assert errors[1] < errors[0] / 2


def test_the_penalty_resumes_where_it_was() -> None:
    torch.manual_seed(0)
    graph = mg.lift(mg.export(residual_cnn((8,)), (X,)))
    plans = [mg.uniform(graph, share, round_to=1) for share in (0.9, 0.75, 0.6, 0.4)]

    def made() -> tuple[nn.Module, SandwichPenalty]:
        net = mg.to_torch(graph.model).train()
        return net, SandwichPenalty(net, [Slice(graph, plan) for plan in plans], draws=1)

    net, penalty = made()
    assert penalty.loss() == 0
    for _ in range(3):
        net(X)
        penalty.loss()
    state = copy.deepcopy(penalty.state_dict())
    _, other = made()
    other.load_state_dict(state)
    draws = [penalty.drawn() for _ in range(20)]
    assert draws == [other.drawn() for _ in range(20)]
    assert {tuple(each) for each in draws} == {(0, 3), (1, 3), (2, 3)}
    for one, two in zip(penalty.slices.buffers(), other.slices.buffers(), strict=True):
        assert torch.equal(one, two)
    net.eval()(X)
    assert penalty.loss() == 0  # only what trains is answered
    penalty.end()
    net.train()(X)
    assert penalty.loss() == 0
    with pytest.warns(MorphWarning, match="learned nothing"):
        made()[1].end()


def test_what_makes_no_sense_is_refused() -> None:
    net = residual_cnn((8,))
    with pytest.raises(ArgumentError, match="learned"):
        mg.elastic(net, (X,), fit, budgets=BUDGETS, data=[X], rank="learned")
    with pytest.raises(ArgumentError, match="meets every budget"):
        mg.elastic(net, (X,), fit, budgets=BUDGETS[:1], data=[X])
    with pytest.raises(ArgumentError, match="calibration inputs"):
        mg.elastic(net, (X,), fit, budgets=BUDGETS)
    with pytest.raises(ArgumentError, match="from 0"):
        mg.elastic(net, (X,), fit, budgets=BUDGETS, data=[X], between=-1)
