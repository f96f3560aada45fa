"""An optimizer's state is cut as its parameters: held against what ``apply`` makes of them."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.testing.examples import image, residual_cnn


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.reshape(*y.shape[:2], 4, 2).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)) + x


def flattened() -> nn.Module:
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), grouped, nn.BatchNorm2d(12), deep, nn.Flatten(),
        nn.Linear(12 * 16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: residual_cnn((8,)), (2, 1, 8, 8)),
    "groups, blocks, square matrices": (flattened, (2, 1, 4, 4)),
    "recurrent": (Recurrent, (2, 6, 5)),
    "attention": (Heads, (2, 4, 8)),
}
OPTIMIZERS: tuple[Callable[..., torch.optim.Optimizer], ...] = (
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    torch.optim.Adagrad,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_is_cut_as_the_parameters_are(name: str) -> None:
    """Every entry is made a function of the parameter's numbers, and is that of the new one's."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = make(), torch.randn(shape)
    graph = mg.lift(mg.export(net, (x,)))
    plan = mg.plan(graph, {"params": "50%"}, round_to=1)
    small = mg.to_torch(mg.apply(graph, plan, weights=net))
    olds, news = dict(net.named_parameters()), dict(small.named_parameters())
    assert any(news[key].shape != olds[key].shape for key in news)
    net(x).square().mean().backward()
    small.train()(x).square().mean().backward()
    for make_optimizer in OPTIMIZERS:
        start = {key: p.detach().clone() for key, p in (*olds.items(), *news.items())}
        old, new = make_optimizer(net.parameters()), make_optimizer(small.parameters())
        old.step()
        for p in net.parameters():
            for entry in old.state[p].values():
                if entry.dim():
                    entry.copy_(2 * p.detach() + 1)
        told = mg.transfer_optimizer_state(old, new, graph, plan, net=net, new_net=small)
        assert (set(told.carried), dict(told.left_out)) == (set(news), {})
        expected = mg.apply(graph, plan, weights=net, verify=False).graph.initializers
        for key in news:
            wanted = torch.from_numpy(expected[key].const_value.numpy().copy())
            for kind, entry in new.state[news[key]].items():
                if entry.dim():
                    assert torch.equal(entry, 2 * wanted + 1), (key, kind)
                else:
                    assert entry == old.state[olds[key]][kind] == 1
        new.step()  # the optimizer goes on with it
        with torch.no_grad():
            for key, p in olds.items():
                p.copy_(start[key] if p.shape == start[key].shape else p)


@cache
def square_graph() -> tuple[nn.Module, mg.ChannelGraph, mg.Plan, ir.Model]:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    net = nn.Sequential(*layers)
    graph = mg.lift(mg.export(net, (torch.randn(2, 8),)))
    plan = mg.plan(graph, {"params": "50%"}, round_to=1)
    return net, graph, plan, mg.apply(graph, plan)


def square() -> tuple[nn.Module, mg.ChannelGraph, mg.Plan, nn.Module]:
    """Layers whose matrices are square: shapes alone do not tell rows from columns."""
    net, graph, plan, model = square_graph()
    return copy.deepcopy(net), graph, plan, mg.to_torch(model)


def test_averages_over_an_axis_are_cut_along_the_others() -> None:
    """Adafactor's: with the axis of size 1 (torch), and without it, by name (transformers)."""
    net, graph, plan, small = square()
    first, second = (plan.keep_channels(graph)[k] for k in sorted(plan.keep_channels(graph)))
    weight, new_weight = net.get_parameter("2.weight"), small.get_parameter("2.weight")
    assert tuple(new_weight.shape) == (len(second), len(first))
    assert not np.array_equal(first, second)
    old, new = (torch.optim.Adafactor(each.parameters()) for each in (net, small))
    rows, columns = torch.arange(8.0), 100 + torch.arange(8.0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    old.step()
    assert old.state[weight]["row_var"].shape == (8, 1)
    old.state[weight]["row_var"][:, 0] = rows
    old.state[weight]["col_var"][0] = columns
    mg.transfer_optimizer_state(old, new, graph, plan, net=net, new_net=small)
    found = new.state[new_weight]
    assert found["row_var"][:, 0].tolist() == rows[second].tolist()
    assert found["col_var"][0].tolist() == columns[first].tolist()
    old.state[weight] = {"step": 3, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns, "RMS": 0.5}
    mg.transfer_optimizer_state(old, new, graph, plan, net=net, new_net=small)
    found = new.state[new_weight]
    assert (found["step"], found["RMS"]) == (3, 0.5)
    assert found["exp_avg_sq_row"].tolist() == rows[second].tolist()
    assert found["exp_avg_sq_col"].tolist() == columns[first].tolist()


@pytest.mark.parametrize("entry", [torch.ones(8), torch.ones(3, 3), [torch.ones(8, 8)]])
def test_what_is_not_known_is_left_out_with_a_word(entry: object) -> None:
    net, graph, plan, small = square()
    old, new = (torch.optim.AdamW(each.parameters()) for each in (net, small))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    old.step()
    old.state[net.get_parameter("2.weight")]["factor"] = entry
    with pytest.warns(MorphWarning, match="'2.weight' .its factor"):
        told = mg.transfer_optimizer_state(old, new, graph, plan, net=net, new_net=small)
    assert list(told.left_out) == ["2.weight"]
    assert new.state[small.get_parameter("2.weight")] == {}
    assert len(told.carried) == 5


def test_optimizers_of_other_networks_are_refused() -> None:
    net, graph, plan, small = square()
    old, new = (torch.optim.AdamW(each.parameters()) for each in (net, small))
    with pytest.raises(ArgumentError, match="AdamW owns no parameter of the Sequential"):
        mg.transfer_optimizer_state(new, new, graph, plan, net=net, new_net=small)
    with pytest.raises(ArgumentError, match="owns no parameter"):
        mg.transfer_optimizer_state(old, old, graph, plan, net=net, new_net=small)


def test_added_channels_begin_without_a_direction() -> None:
    net, graph, plan, _ = square()
    wide = mg.expand(graph, plan, {"params": "120%"})
    big = mg.to_torch(mg.apply(graph, wide, weights=net))
    old, new = (torch.optim.AdamW(each.parameters()) for each in (net, big))
    for p in net.parameters():
        p.grad = -torch.ones_like(p)
    old.step()
    mg.transfer_optimizer_state(old, new, graph, wide, net=net, new_net=big)
    added, bias = wide.added(graph), big.get_parameter("0.bias")
    (index, count) = next(iter(added.items()))
    kept = len(bias) - count
    assert graph.groups[index].id == graph.groups[min(added)].id
    state = new.state[bias]
    assert (state["exp_avg"][:kept] < 0).all()
    assert (state["exp_avg"][kept:] == 0).all()
    assert (state["exp_avg_sq"] > 0).all()


def test_a_module_resized_in_place_keeps_its_optimizer() -> None:
    torch.manual_seed(0)
    net = residual_cnn((8, 12))
    graph = mg.lift(mg.export(net, (image(2),)))
    plan = mg.plan(graph, {"flops": "50%"}, round_to=1)
    optimizer = torch.optim.AdamW(net.parameters())
    net.train()(image(4)).square().mean().backward()
    optimizer.step()
    for p in net.parameters():
        optimizer.state[p]["exp_avg"].copy_(3 * p.detach())
    mg.resize_module(net, graph, plan, optimizer=optimizer)
    assert net.get_parameter("stem.weight").shape[0] < 8
    for name, p in net.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], 3 * p.detach()), name
    net.train()(image(4)).square().mean().backward()
    optimizer.step()
