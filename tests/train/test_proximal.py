"""Shrinking: the proximal operator against a general minimizer, steps, and phases of them."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.graph import ChannelGraph
from morphgraph.options import Strength, Tied
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.lift import lift
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.train.controller import Budget
from morphgraph.train.proximal import TiedStrengths
from morphgraph.train.regularizer import Regularizer
from morphgraph.train.sources import root
from morphgraph.workflow import apply

NUMBERS = st.floats(0.0, 2.0, width=32)
WEIGHTS = st.floats(0.125, 4.0, width=32)


def step(values: list[float], weights: list[float], amount: float, tied: Tied) -> np.ndarray:
    """One channel with these producers after a step."""
    index = [torch.tensor([0]) for _ in values]
    ties = TiedStrengths(index, [torch.tensor([weight]) for weight in weights], channels=1)
    parts = [torch.tensor([value]) for value in values]
    factors = ties.factors(parts, torch.tensor([amount]), tied)
    return np.array([float(part * f) for part, f in zip(parts, factors, strict=True)])


def minimum(values: np.ndarray, weights: np.ndarray, amount: float, tied: Tied) -> np.ndarray:
    """The same by scipy: the norm as a bound that is minimized beside the distance."""

    def goal(z: np.ndarray) -> float:
        return float(amount * z[-1] + 0.5 * (weights * (z[:-1] - values) ** 2).sum())

    if tied == "max":
        bound = {"type": "ineq", "fun": lambda z: z[-1] - z[:-1]}
    else:
        bound = {"type": "ineq", "fun": lambda z: z[-1] ** 2 - (z[:-1] ** 2).sum()}
    start = np.append(values, np.linalg.norm(values) + 0.1)
    found = minimize(
        goal,
        start,
        method="SLSQP",
        bounds=[(0, None)] * len(start),
        constraints=[bound],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return found.x[:-1]


@pytest.mark.parametrize("tied", ["max", "l2"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, WEIGHTS), min_size=1, max_size=4), st.floats(0.01, 3.0))
def test_a_step_goes_to_the_minimum(
    tied: Tied, producers: list[tuple[float, float]], amount: float
) -> None:
    values, weights = (list(part) for part in zip(*producers, strict=True))
    got = step(values, weights, amount, tied)

    def goal(s: np.ndarray) -> float:
        size = s.max() if tied == "max" else np.linalg.norm(s)
        return float(amount * size + 0.5 * (np.array(weights) * (s - values) ** 2).sum())

    best = goal(minimum(np.array(values), np.array(weights), amount, tied))
    assert goal(got) <= best + 1e-5


@pytest.mark.parametrize("tied", ["max", "l2"])
def test_one_producer_is_a_soft_threshold_to_exact_zero(tied: Tied) -> None:
    assert step([1.0], [2.0], 0.5, tied) == pytest.approx([0.75])
    assert step([0.25], [2.0], 0.5, tied) == [0.0]
    assert step([0.7], [2.0], 0.0, tied) == pytest.approx([0.7])
    assert step([0.0], [2.0], 0.0, tied) == [0.0]


def test_ties_share_the_amount_under_the_maximum() -> None:
    assert step([1.0, 1.0, 1.0, 0.2], [1.0] * 4, 0.6, "max") == pytest.approx([0.8, 0.8, 0.8, 0.2])
    assert step([1.0, 0.9], [1.0, 1.0], 2.0, "max").tolist() == [0.0, 0.0]


def test_an_l2_norm_is_shortened() -> None:
    assert step([3.0, 4.0], [1.0, 1.0], 1.0, "l2") == pytest.approx([2.4, 3.2], rel=1e-5)
    assert step([0.3, 0.4], [1.0, 1.0], 0.5, "l2").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tied", ["max", "l2"])
def test_channels_do_not_touch_each_other(tied: Tied) -> None:
    """A source may have a channel twice, and channels may have no source at all."""
    torch.manual_seed(0)
    index = [torch.tensor([0, 2, 2, 4]), torch.tensor([4, 2])]
    values: list[Tensor] = [torch.rand(4), torch.rand(2)]
    ties = TiedStrengths(index, [torch.ones(4), torch.full((2,), 2.0)], channels=5)
    amounts = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    first, second = ties.factors(values, amounts, tied)
    (alone,) = step([float(values[0][0])], [1.0], 0.1, tied)
    assert float(first[0] * values[0][0]) == pytest.approx(alone)
    three = [float(values[0][1]), float(values[0][2]), float(values[1][1])]
    together = [first[1] * values[0][1], first[2] * values[0][2], second[1] * values[1][1]]
    assert [float(x) for x in together] == pytest.approx(step(three, [1.0, 1.0, 2.0], 0.3, tied))
    assert ties.rate.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]


@cache
def residual_network() -> tuple[Any, ChannelGraph]:
    net = residual_cnn()
    return net, lift(export(net.eval(), (image(),)))


def test_proximal_step_reaches_exact_zero() -> None:
    """Of the maximum: the two scales that meet in the sum fall by half of the amount each."""
    original, graph = residual_network()
    net = copy.deepcopy(original)
    reg = Regularizer(graph, net)
    before = reg.marginals()[torch.from_numpy(graph.channels_at("stem.weight", 0))]
    step = 0.25 * reg.initial_cost / float(before.max())
    reg.proximal_step(step)
    shrunk = 1 - before * step / reg.initial_cost / 2
    assert torch.allclose(net.bn.weight, shrunk, atol=1e-6)
    assert torch.equal(net.bn.weight, net.blocks[0].bn2.weight)
    for _ in range(200):
        reg.proximal_step(step)
    assert float(net.bn.weight.abs().min()) == 0.0


def test_a_relative_step_does_not_see_a_shared_scale() -> None:
    """A layer whose scales are all three times smaller loses a third: nothing else changes."""

    def after(shared: float, *, relative: bool = True) -> tuple[float, Tensor]:
        original, graph = residual_network()
        net = copy.deepcopy(original)
        scale = net.get_parameter("blocks.0.bn1.weight")
        with torch.no_grad():
            scale.copy_(shared * torch.linspace(0.5, 1.5, len(scale)))
        reg = Regularizer(graph, net, relative=relative)
        value = float(reg.value().detach())
        reg.proximal_step(0.4 * reg.initial_cost / float(reg.marginals().max()))
        assert 0 < float(scale.detach().max()) < 1.5 * shared
        return value, scale.detach()

    whole, third = after(1.0), after(1 / 3)
    assert torch.allclose(3 * third[1], whole[1], atol=1e-6)
    absolute = after(1.0, relative=False)
    assert absolute[0] == pytest.approx(whole[0])  # at a mean of 1 both are the same
    assert torch.allclose(absolute[1], whole[1], atol=1e-6)
    assert not torch.allclose(3 * after(1 / 3, relative=False)[1], whole[1], atol=1e-2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.001, 0.2])
def test_the_first_weight_would_end_an_average_channel_with_the_phase(
    threshold: float | None, *, relative: bool
) -> None:
    """Without a loss, in steps of any length: not long before, and not after."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    graph = lift(export(net, (torch.zeros(1, 2, 4, 4),)))
    reg = Regularizer(graph, net, relative=relative, threshold=threshold)
    reg.weight = reg.initial_weight(path=200 * 0.3)
    for _ in range(160):
        reg.proximal_step(0.3)
    assert reg.live_share() == 1.0
    for _ in range(40):
        reg.proximal_step(0.3)
    assert reg.live_share() == reg.lowest_share()


def test_a_relative_price_is_that_of_the_living() -> None:
    original, graph = residual_network()
    net = copy.deepcopy(original)
    scale = net.get_parameter("blocks.0.bn1.weight")
    reg = Regularizer(graph, net, relative=True, min_width=0)
    channels = torch.from_numpy(graph.channels_at("blocks.0.conv1.weight", 0))
    with torch.no_grad():
        scale.fill_(0.5)
        scale[: len(scale) // 2] = 0.0
    reg().backward()
    price = 0.5 * reg.marginals()[channels] / reg.initial_cost
    alive = reg.alive()[channels]
    assert scale.grad is not None
    assert torch.allclose(scale.grad[alive], price[alive])
    with torch.no_grad():
        scale.fill_(1e-3)  # all dead: they are not to come back because nothing is asked
    strengths = reg.strengths().detach()
    reg.proximal_step(1e-3 * reg.initial_cost / float(reg.marginals(strengths)[channels].max()))
    assert float(scale.detach().abs().max()) == 0.0


@pytest.mark.parametrize("convention", ["default", "morphnet"])
def test_lasso_proximal_step_shortens_the_norm(convention: Convention) -> None:
    """The strength falls by step / n for a kernel of n numbers: the step of a mean norm.

    In units of the group's mean u it falls by step / (n u^2): like a scale's, whatever n is, since
    kernels begin at u^2 = 1 / (3 n).
    """
    original, graph = residual_network()
    net = copy.deepcopy(original)
    reg = Regularizer(graph, net, strength="lasso", convention=convention)
    index = torch.from_numpy(graph.channels_at("blocks.0.conv1.weight", 0))
    kernel = net.get_parameter("blocks.0.conv1.weight").detach()
    mean = float(kernel.square().mean(dim=(1, 2, 3)).sqrt().mean())
    unit = 1.0 if convention == "morphnet" else mean
    before, amount = reg.strengths()[index], reg.marginals()[index]
    assert float(before.mean().detach()) == pytest.approx(mean / unit, rel=1e-5)
    reg.proximal_step(1e-3)
    expected = before - amount * 1e-3 / reg.initial_cost / kernel[0].numel() / unit**2
    assert torch.allclose(reg.strengths()[index], expected.detach(), atol=1e-6)


@pytest.mark.parametrize("tied", ["max", "l2"])
@pytest.mark.parametrize("strength", ["bn", "lasso"])
def test_a_dead_channel_has_no_strength_and_no_slope(tied: Tied, strength: Strength) -> None:
    """The norms' slope has no bound at zero; the penalty's must be a number there."""
    original, graph = residual_network()
    net = copy.deepcopy(original)
    reg = Regularizer(graph, net, strength=strength, tied=tied)
    reg.weight = 1e6
    reg.proximal_step(1.0)
    strengths = reg.strengths()
    dead = ~reg.alive()
    assert dead.any()
    assert float(strengths.detach()[dead].max()) == 0.0
    reg().backward()
    closed = 0
    for source in (*reg.scales, *reg.kernels):
        slopes = source.parameter.grad
        assert slopes is not None
        assert slopes.isfinite().all()
        rows = slopes.movedim(source.axis, 0).flatten(1) if slopes.dim() > 1 else slopes[:, None]
        rows = rows[source.positions[dead[source.index]]]
        assert not rows.any()
        closed += len(rows)
    assert closed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_root_is_that_of_its_type(dtype: torch.dtype) -> None:
    """Below the smallest normal number of float16, 6e-5, lie the mean squares of usual kernels."""
    squares = torch.tensor([0.0, 1e-6, 4e-6, 0.25], dtype=dtype, requires_grad=True)
    roots = root(squares)
    assert torch.equal(roots, squares.sqrt())
    roots.sum().backward()
    assert squares.grad is not None
    assert squares.grad[0] == 0
    expected = 0.5 / squares[1:].detach().sqrt()
    assert torch.allclose(squares.grad[1:], expected, rtol=1e-2)


class Mixer(nn.Module):
    """One transformer layer, norms first, behind a convolution with BatchNorm."""

    def __init__(self, depth: int = 1, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Sequential(nn.Conv2d(2, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        for _ in range(depth - 1):
            self.stem.extend([nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()])
        self.patch = nn.Conv2d(16, width, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(self.stem(x)).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        q, k, v = (
            linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        scores: Tensor = self.head(self.norm3(x).mean(dim=1))
        return scores


def shrunk(net: nn.Module, reg: Regularizer, target: str, steps: int = 150) -> Budget:
    """A phase on three noisy patterns."""
    noise = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 2, 9, 9, generator=noise)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    budget = Budget(reg, {"flops": target}, steps)
    net.train()
    while not budget.met and budget.step_number < steps:
        labels = torch.randint(0, 3, (8,), generator=noise)
        images = patterns[labels] + torch.randn(8, 2, 9, 9, generator=noise)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        budget.step(lr=0.05 / (1 - 0.9))
    return budget


def shares(reg: Regularizer, *parameters: str) -> list[float]:
    """Which share of the channels is alive that kernels make."""
    index = [reg.graph.channels_at(parameter, 0) for parameter in parameters]
    return [float(reg.alive()[torch.from_numpy(channels)].float().mean()) for channels in index]


def test_heads_and_hidden_units_are_learned() -> None:
    torch.manual_seed(0)
    net = Mixer()
    graph = lift(export(net.eval(), (torch.rand(2, 2, 9, 9),)))
    reg = Regularizer(graph, net, exclude=["stem*", "patch*"])
    assert not reg.scales
    assert shrunk(net, reg, "50%").met
    heads, hidden = shares(reg, "query.weight", "up.weight")
    assert 0 < heads < 1
    assert 0 < hidden < 1
    plan = reg.plan({"flops": "50%"})
    assert plan.cost["flops"].after == reg.live_cost() <= 0.5 * reg.initial_cost
    apply(graph, plan, weights=net.eval())  # verifies


def test_scales_and_kernels_shrink_alike() -> None:
    """Under one weight not all of the shrinking falls on one kind; as they are, it does."""

    def left(**options: object) -> tuple[float, float]:
        torch.manual_seed(0)
        net = Mixer(depth=3)
        graph = lift(export(net.eval(), (torch.rand(2, 2, 9, 9),)))
        reg = Regularizer(graph, net, **options)  # type: ignore[arg-type]
        assert len(reg.scales) == 3
        shrunk(net, reg, "50%")
        stem = shares(reg, "stem.0.weight", "stem.3.weight", "stem.6.weight")
        rest = shares(reg, "patch.weight", "query.weight", "up.weight")
        return float(np.mean(stem)), min(rest)

    scales, kernels = left()
    assert kernels < 1
    raw_scales, raw_kernels = left(convention="morphnet")
    assert raw_kernels == 1
    assert raw_scales < scales


def test_strengths_of_kernels_begin_at_one() -> None:
    """As scales do, whatever their fan-in; what is not a kernel is not divided."""
    torch.manual_seed(0)
    net = Mixer()
    graph = lift(export(net.eval(), (torch.rand(2, 2, 9, 9),)))
    strengths = Regularizer(graph, net).strengths().detach().numpy()
    for group in graph.groups:
        if group.resizable:
            assert strengths[group.channels].mean() == pytest.approx(1.0, rel=1e-5)
    raw = Regularizer(graph, net, convention="morphnet").strengths().detach().numpy()
    units = graph.channels_at("up.weight", 0)
    expected = net.up.weight.detach().square().mean(1).sqrt()
    np.testing.assert_allclose(raw[units], expected, rtol=1e-5)


def test_a_large_step_does_not_take_the_last_of_the_kernels() -> None:
    """In units of their mean strengths fall faster than by the amount: the guard must know."""
    torch.manual_seed(0)
    net = Mixer()
    graph = lift(export(net.eval(), (torch.rand(2, 2, 9, 9),)))
    reg = Regularizer(graph, net, strength="lasso", min_width=2, relative=False)
    largest = float(reg.marginals().max()) / reg.initial_cost
    for share in (0.2, 0.3, 0.4, 0.6, 0.9, 1.5):
        reg.proximal_step(share / largest)
        assert all(reg.live_widths()[g.index] >= 2 for g in graph.groups if g.resizable)
    assert reg.live_share() < 1
