"""What training does around a budget: other precisions, skipped steps, compilation, two optimizers.

Where nothing may change the oracle is the same training without it, to the last digit.
"""

import copy
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "bench_training.py"))
IMAGE, ROW = (2, 2, 6, 6), (2, 12)
pytestmark = pytest.mark.filterwarnings("ignore:masking changed the outputs")


class Residual(nn.Module):
    """``x + f(x)``, with a norm before and a hidden layer within."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.into(self.norm(x))))


def convolutions() -> nn.Sequential:
    def block(into: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)]
    return nn.Sequential(*block(2, 32), *block(32, 32), *block(32, 24), *ends)


def normalized() -> nn.Module:
    blocks = [(nn.Linear(n, m), nn.BatchNorm1d(m), nn.ReLU()) for n, m in ((12, 96), (96, 64))]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(64, 4))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4)
    )


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), Residual(24, 64), Residual(24, 64), nn.Linear(24, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, IMAGE),
    "normalized": (normalized, ROW),
    "perceptron": (perceptron, ROW),
    "residual": (residual, ROW),
}


@cache
def lifted(name: str) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make()
    return net, mg.lift(mg.export(net, (torch.zeros(shape),)))


def made(name: str) -> tuple[nn.Module, mg.Regularizer]:
    net, graph = lifted(name)
    net = copy.deepcopy(net).train()
    return net, mg.Regularizer(graph, net)


def batch(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    labels = torch.arange(16) % 4
    patterns = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(9))
    noise = torch.randn(16, *shape[1:], generator=torch.Generator().manual_seed(step))
    return patterns[labels] + noise, labels


def loss_of(net: nn.Module, step: int, name: str) -> Tensor:
    x, labels = batch(step, NETWORKS[name][1])
    return F.cross_entropy(net(x), labels)


def state(net: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in net.state_dict().values()]


# -- two optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normalized", "perceptron", "residual"])
def test_muon_and_adamw_meet_half(name: str) -> None:
    """Matrices in Muon; scales, biases and the last layer in AdamW, as its authors advise."""
    net, reg = made(name)
    last = list(net.parameters())[-2]
    matrices = [p for p in net.parameters() if p.dim() == 2 and p is not last]
    rest = [p for p in net.parameters() if all(p is not each for each in matrices)]
    both = (
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0),
        torch.optim.AdamW(rest, lr=3e-3, weight_decay=0),
    )
    budget = mg.Budget(reg, {"flops": "50%"}, 100).attach(*both)
    first = None
    for step in range(100):
        for optimizer in both:
            optimizer.zero_grad()
        loss_of(net, step, name).backward()
        for optimizer in both:
            optimizer.step()
        first = step if budget.met and first is None else first
    assert budget.step_number == 100
    assert first is not None
    assert first >= 55
    assert 0.49 <= budget.share <= 0.5
    small = mg.lift(mg.apply(reg.graph, reg.plan(), weights=net))
    assert mg.cost(small, "flops").total <= budget.share * reg.initial_cost * 1.0001


# -- steps that a scaler skips --------------------------------------------------------------------

ONE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0, fused=True),
}


@pytest.mark.parametrize("optimizer_name", list(ONE))
@pytest.mark.parametrize("name", ["convolutions", "perceptron"])
def test_a_step_that_a_scaler_skips_moves_nothing(name: str, optimizer_name: str) -> None:
    """And what it does not skip is what it is without a scaler: scaled by a power of two."""
    ways = []
    for scaled in (False, True):
        net, reg = made(name)
        optimizer = ONE[optimizer_name](net.parameters())
        budget = mg.Budget(reg, {"flops": "50%"}, 40, interval=1).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step, name)).backward()
            if step in (0, 5) and scaled:
                list(net.parameters())[-1].grad.fill_(torch.inf)
            parameters = [p.detach().clone() for p in net.parameters()]
            before = budget.step_number, copy.deepcopy(budget.state_dict())
            if step not in (0, 5) or scaled:
                scaler.step(optimizer)
            scaler.update()
            if step in (0, 5):
                assert all(map(torch.equal, parameters, net.parameters()))
                assert budget.step_number == before[0]
                assert same(budget.state_dict(), before[1])
            else:
                assert not all(map(torch.equal, parameters, net.parameters()))
        assert budget.step_number == 10
        ways.append(state(net))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("turned", [False, True], ids=["as attached", "the other way"])
@pytest.mark.parametrize("left_out", [0, 1])
def test_of_two_optimizers_one_leaves_a_step_out(left_out: int, *, turned: bool) -> None:
    """Whether a scaler leaves it out or the loop; the next step counts it, and none after is off.

    Gradients that are scaled still when the other optimizer steps are not taken for real ones.
    """
    ways = []
    for scaled in (False, True):
        net, reg = made("convolutions")
        scales = [p for p in net.parameters() if p.dim() == 1]
        kernels = [p for p in net.parameters() if p.dim() > 1]
        both = torch.optim.AdamW(scales, lr=1e-3), torch.optim.SGD(kernels, lr=0.1)
        budget = mg.Budget(reg, {"flops": "50%"}, 40, interval=1).attach(*both)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        for step in range(10):
            for optimizer in both:
                optimizer.zero_grad()
            scaler.scale(loss_of(net, step, "convolutions")).backward()
            skipped = left_out if step == 4 else None
            if skipped is not None and scaled:
                next(iter((scales, kernels)[skipped])).grad.fill_(torch.inf)
            for index in (1, 0) if turned else (0, 1):
                if index != skipped or scaled:
                    scaler.step(both[index])
            scaler.update(2.0**16 if scaled else None)
            assert budget.step_number == step + (step != 4)
        ways.append(state(net))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_step() -> None:
    """Of two halves of a batch, by a plain loop, the network is what it is of the whole batch."""
    ways = []
    for parts in (1, 2):
        net, reg = made("perceptron")
        optimizer = ONE["AdamW"](net.parameters())
        budget = mg.Budget(reg, {"flops": "50%"}, 40, interval=1).attach(optimizer)
        for step in range(12):
            x, labels = batch(step, ROW)
            optimizer.zero_grad()
            for part in range(parts):
                loss = F.cross_entropy(net(x[part::parts]), labels[part::parts])
                (loss / parts).backward()
            optimizer.step()
        assert budget.step_number == 12
        ways.append(state(net))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutions", "normalized", "residual"])
def test_half_within_a_hundredth_in_bfloat16(name: str) -> None:
    """Under autocast parameters and gradients stay in single precision."""
    net, reg = made(name)
    optimizer = ONE["AdamW"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, 100).attach(optimizer)
    seen = set()
    for step in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            x, labels = batch(step, NETWORKS[name][1])
            scores = net(x)
            seen.add(scores.dtype)
            loss = F.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
    assert seen == {torch.bfloat16}
    assert budget.met
    assert 0.49 <= budget.share <= 0.5
    small = mg.lift(mg.apply(reg.graph, reg.plan(), weights=net))
    assert mg.cost(small, "flops").total <= budget.share * reg.initial_cost * 1.0001


# -- torch.compile --------------------------------------------------------------------------------


def trained_by(what: str, *, compiled: bool, budgeted: bool) -> tuple[int, list[Tensor]]:
    """How many graphs a training has, and the network after eight steps."""
    torch._dynamo.reset()
    counters.clear()
    net, reg = made("convolutions")
    optimizer = ONE["AdamW"](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, 60)
    if budgeted and what != "by hand":
        budget.attach(optimizer)

    def update() -> None:
        optimizer.step()
        if budgeted and what == "by hand":
            budget.step()

    called: Any = net
    if compiled and what == "module":
        called = torch.compile(net, fullgraph=True, backend="aot_eager")
    elif compiled:
        update = torch.compile(update, backend="aot_eager")
    early: list[Tensor] = []
    for step in range(60):
        early = state(net) if step == 8 else early
        optimizer.zero_grad()
        loss_of(called, step, "convolutions").backward()
        update()
    assert budget.met == budgeted
    return counters["stats"]["unique_graphs"], early


@pytest.mark.parametrize("what", ["module", "optimizer", "by hand"])
def test_compiled_training_has_no_more_graphs(what: str) -> None:
    """One for the module, in all steps of the phase; the budget is never traced.

    CUDA graphs need a CUDA device: not tested here.
    """
    graphs, compiled = trained_by(what, compiled=True, budgeted=True)
    assert graphs == trained_by(what, compiled=True, budgeted=False)[0]
    assert what != "module" or graphs == 1
    _, eager = trained_by(what, compiled=False, budgeted=True)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW", "fused AdamW"])
@pytest.mark.parametrize("name", ["convolutions", "perceptron", "residual"])
def test_a_loss_that_is_no_number_is_refused(name: str, optimizer_name: str) -> None:
    net, reg = made(name)
    optimizer = ONE[optimizer_name](net.parameters())
    budget = mg.Budget(reg, {"flops": "50%"}, 400).attach(optimizer)

    def train() -> None:
        for step in range(2 * budget.interval):
            optimizer.zero_grad()
            loss = loss_of(net, step, name)
            (loss * torch.nan if step == 1 else loss).backward()
            optimizer.step()

    with pytest.raises(UnsupportedError, match=r"^the training has diverged: .*checkpoint$"):
        train()


def wider() -> nn.Module:
    """Of the right names and the wrong sizes."""
    net = convolutions()
    net[1] = nn.BatchNorm2d(40)
    return net


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: nn.ModuleDict({"body": convolutions()}), "give the part of it at 'body'"),
        (perceptron, "is not in the module; give the module that was exported"),
        (wider, r"'1.weight' has shape \(40,\), but the graph has 32 .*; lift the model that this"),
    ],
)
def test_names_that_do_not_fit_are_refused(other: Callable[[], nn.Module], said: str) -> None:
    _, graph = lifted("convolutions")
    with pytest.raises(ModelError, match=said) as raised:
        mg.Regularizer(graph, other())
    assert "\n" not in str(raised.value)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", 11.7e6),
        pytest.param("resnet50", 25.5e6, marks=pytest.mark.long),
        pytest.param("vit_s", 21.6e6, marks=pytest.mark.long),
    ],
)
def test_a_budget_takes_no_more_than_a_hundredth_of_the_memory(name: str, weights: float) -> None:
    """Of the tensors alive at once, in steps of which each is one of the penalty."""
    plain, budgeted = TOOL["peaks"](name, pixels=64)
    assert plain > 3 * 4 * weights  # with gradients and momentum
    assert plain <= budgeted <= 1.01 * plain
