"""The part that all frameworks share, and timm's adapter, which any script can use."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError, ModelError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.integrations.phase import ShrinkPhase, part_with
from morphgraph.integrations.timm import shrink

Make = Callable[[int], Any]
Data = tuple[Tensor, Tensor]


def train(net: Any, optimizer: torch.optim.Optimizer, data: Data, begin: int, end: int) -> None:
    net.train()
    for step in range(begin, end):
        rows = torch.arange(16) + 16 * (step % 8)
        optimizer.zero_grad()
        F.cross_entropy(net(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


def adam(net: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)


@pytest.mark.parametrize("stop", [10, 40, 70])  # before anything falls, on the way, settled
def test_a_run_that_was_killed_finds_the_same_structure(
    stop: int, make_net: Make, graph: ChannelGraph, data: Data, tmp_path: Path
) -> None:
    def begun(seed: int) -> tuple[Any, torch.optim.Optimizer, ShrinkPhase]:
        net = make_net(seed)
        optimizer = adam(net)
        return net, optimizer, shrink(graph, {"flops": "50%"}, net, optimizer, steps=80)

    net, optimizer, phase = begun(0)
    train(net, optimizer, data, 0, 80)
    # Another process: it stops after its checkpoint, which a third one reads.
    killed, its_optimizer, _ = begun(0)
    train(killed, its_optimizer, data, 0, stop)
    saved = {"net": killed.state_dict(), "optimizer": its_optimizer.state_dict()}
    torch.save(saved, tmp_path / "last.pt")
    train(killed, its_optimizer, data, stop, stop + 5)
    # The third begins with other random weights, by which nothing may be measured.
    resumed, new_optimizer, new_phase = begun(1)
    loaded = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(loaded["net"])
    new_optimizer.load_state_dict(loaded["optimizer"])
    train(resumed, new_optimizer, data, stop, 80)
    assert phase.budget.met
    assert new_phase.budget.trajectory == phase.budget.trajectory
    assert new_phase.plan().groups == phase.plan().groups
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_phase_that_is_loaded_before_it_begins_goes_on(
    make_net: Make, graph: ChannelGraph, data: Data
) -> None:
    """As Lightning loads callbacks: before there are optimizers, over weights of a later time."""
    net = make_net(0)
    optimizer = adam(net)
    phase = ShrinkPhase(graph, {"flops": "50%", "params": "60%"})
    phase.begin(net, [optimizer], 80)
    train(net, optimizer, data, 0, 40)
    parts = (net, optimizer, phase)
    kept, kept_optimizer, state = (copy.deepcopy(part.state_dict()) for part in parts)
    train(net, optimizer, data, 40, 80)

    other = make_net(1)
    other.load_state_dict(kept)
    again = ShrinkPhase(graph, {"flops": "50%", "params": "60%"})
    again.load_state_dict(state)
    assert again.state_dict().keys() == state.keys()  # a checkpoint now would lose nothing
    its_optimizer = adam(other)
    its_optimizer.load_state_dict(kept_optimizer)
    again.begin(other, [its_optimizer], 80)
    train(other, its_optimizer, data, 40, 80)
    assert again.plan().groups == phase.plan().groups


def test_accumulated_and_skipped_steps_are_none(
    make_net: Make, graph: ChannelGraph, data: Data
) -> None:
    net = make_net(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    phase = shrink(graph, {"flops": "50%"}, net, optimizer, steps=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(12):
        scaler.scale(F.cross_entropy(net(data[0][:8]), data[1][:8])).backward()
        if step % 3 == 2:
            if step == 5:  # the second of four
                net.last.weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert phase.budget.step_number == 3


def test_the_network_is_found_inside_of_what_a_framework_is_given(
    make_net: Make, graph: ChannelGraph
) -> None:
    net = make_net(0)
    module = nn.ModuleDict({"teacher": nn.Linear(3, 3), "inner": nn.ModuleDict({"student": net})})
    assert part_with(module, graph) is net
    assert part_with(net, graph) is net
    assert part_with(nn.Linear(3, 3), graph).weight.shape == (3, 3)


def test_what_was_trained_is_what_is_resized(
    make_net: Make, graph: ChannelGraph, data: Data
) -> None:
    net = make_net(0)
    optimizer = adam(net)
    phase = shrink(graph, {"flops": "50%"}, net, optimizer, steps=80)
    train(net, optimizer, data, 0, 80)
    phase.end()
    plan = phase.plan()
    small = mg.to_torch(mg.apply(graph, plan, weights=net)).eval()
    assert plan.cost["flops"].after <= 0.5 * plan.cost["flops"].before
    # PyTorch computes the same with what is cut at zero; scales and kernels are so by training.
    masked = copy.deepcopy(net).eval()
    for group in plan.groups.values():
        cut = torch.ones(group.width, dtype=torch.bool)
        for begin, end in group.keep:
            cut[begin:end] = False
        weight, bias = (
            (masked.hidden.weight, masked.hidden.bias)
            if group.name == "hidden"
            else (masked.norm.weight, masked.norm.bias)
        )
        assert not weight[cut].any()
        with torch.no_grad():
            bias[cut] = 0.0
    assert torch.allclose(masked(data[0]), small(data[0]), atol=1e-5)
    before = [p.clone() for p in net.parameters()]
    train(net, optimizer, data, 80, 82)  # the phase is over: the optimizer is free again
    assert phase.budget.step_number == 80
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_training_that_ends_early_is_told(
    make_net: Make, graph: ChannelGraph, data: Data
) -> None:
    net = make_net(0)
    optimizer = adam(net)
    phase = ShrinkPhase(graph, {"flops": "50%"})
    phase.begin(net, [optimizer], 80)
    train(net, optimizer, data, 0, 20)
    with pytest.warns(MorphWarning, match=r"of flops instead of 50\.0% after 20 of 80 steps"):
        phase.end()


class Wrapper(torch.optim.Optimizer):
    """As timm's Lookahead: derived, but never initialised."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


def test_what_does_not_belong_together_is_refused(make_net: Make, graph: ChannelGraph) -> None:
    net = make_net(0)
    with pytest.raises(ArgumentError, match="no budget is given"):
        ShrinkPhase(graph, {})
    with pytest.raises(ArgumentError, match="steps=0"):
        ShrinkPhase(graph, {"flops": "50%"}, steps=0)
    with pytest.raises(ArgumentError, match="has not begun"):
        ShrinkPhase(graph, {"flops": "50%"}).plan()
    with pytest.raises(ModelError, match="is not in the module"):
        shrink(graph, {"flops": "50%"}, nn.Linear(3, 3), adam(net), steps=10)
    with pytest.raises(ArgumentError, match="has none of the"):
        shrink(graph, {"flops": "50%"}, net, adam(make_net(1)), steps=10)
    with pytest.raises(ArgumentError, match="Wrapper wraps another optimizer"):
        shrink(graph, {"flops": "50%"}, net, Wrapper(adam(net)), steps=10)
    state = shrink(graph, {"flops": "50%"}, net, adam(net), steps=10).state_dict()
    narrower = shrink(graph, {"flops": "50%"}, net, adam(net), steps=10, exclude=["*conv*"])
    with pytest.raises(ArgumentError, match="of another network, or of other groups"):
        narrower.load_state_dict(state)
    with pytest.raises(ArgumentError, match="the state is of a budget on flops"):
        shrink(graph, {"params": "50%"}, net, adam(net), steps=10).load_state_dict(state)
