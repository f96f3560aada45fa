"""Once a budget is met, the network in training computes what the resized one will.

The oracle is ONNX Runtime, which runs the resized network.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.onnx_io.runtime import run

STEPS = 60
TOLERANCE = 1e-5
Inputs = Callable[[], Tensor]


class Tagger(nn.Module):
    """A recurrent tagger of tokens, whose biases make a constant of a unit without kernels."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 8), rnn
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        tags: Tensor = self.head(self.rnn(self.embedding(tokens))[0])
        return tags


class FromAState(nn.Module):
    """An LSTM whose initial states are learned, behind a function that is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 12, 3, padding=1)
        self.rnn, self.head = nn.LSTM(12, 10), nn.Linear(10, 3)
        self.h, self.c = (nn.Parameter(torch.randn(1, 1, 10)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.exp(-F.relu(self.conv(x))).permute(2, 0, 1)
        states = [s.expand(1, x.shape[1], 10).contiguous() for s in (self.h, self.c)]
        scores: Tensor = self.head(self.rnn(x, tuple(states))[0][-1])
        return scores


class Convolutions(nn.Module):
    """Biases everywhere: pointwise, depthwise, transposed, beside a squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.less, self.more = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.silu(self.stem(x))))
        x = F.gelu(self.pointwise(x))
        x = x * torch.sigmoid(self.more(F.relu(self.less(x.mean((2, 3), keepdim=True)))))
        scores: Tensor = self.head(torch.sigmoid(self.up(x)).mean((2, 3)))
        return scores


class Attention(nn.Module):
    """Heads with biases, and a residual stream that an embedding of positions is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(1, 7, 16) / 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        scores: Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return scores


class Products(nn.Module):
    """Sums that no kernel is in: what is added must be zero there, on one side at least."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.gate = (nn.Linear(6, 16) for _ in range(3))
        self.value, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        alike = (torch.sigmoid(self.key(x)) * self.query(x)).sum(-1, keepdim=True)
        scores: Tensor = self.head(torch.sigmoid(self.gate(x)) * self.value(x)) + alike
        return scores


class Normed(nn.Module):
    """Scales, whose shifts are left: of norms, of a layer scale, and of one without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(k, 16, 3, padding=1) for k in (3, 16, 16))
        self.batch, self.groups = nn.BatchNorm2d(16), nn.GroupNorm(4, 16)
        self.plain, self.scale = (
            nn.BatchNorm2d(16, affine=False),
            nn.Parameter(torch.ones(16, 1, 1)),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.batch(self.a(x)))
        x = F.relu6(self.groups(self.b(x)))
        x = F.softplus(self.plain(self.c(x)) * self.scale + 0.5)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class WeightNorm(nn.Module):
    """Kernels that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(k, 12, 3, padding=1)) for k in (4, 12)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.sigmoid(self.a(x))))
        scores: Tensor = self.head(x.mean(-1))
        return scores


class SpectralNorm(nn.Module):
    """A kernel that is divided by a number of its own, behind one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        weight, spectral = nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm
        self.a = weight(nn.Conv1d(4, 12, 3, padding=1))
        self.b = spectral(nn.Conv1d(12, 12, 3, padding=1))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(F.leaky_relu(self.a(x))))
        scores: Tensor = self.head(x.mean(-1))
        return scores


class RootMeanSquare(nn.Module):
    """Written out, with the scale that a Llama, a Gemma or nobody has."""

    def __init__(self, width: int, scale: str) -> None:
        super().__init__()
        self.added = float(scale == "Gemma")
        self.weight = nn.Parameter(torch.rand(width) + 0.5 - self.added) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-9)
        normed: Tensor = (x * root).to(x.dtype) * (self.weight + self.added)
        return normed


class Stream(nn.Module):
    """A pre-norm residual stream, all of whose norms count its channels."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, width) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        scores: Tensor = self.head(self.norms[2](x))
        return scores


def perceptron(act: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 24), act(), nn.Linear(24, 16), act(), nn.Linear(16, 4))


def tokens() -> Tensor:
    return torch.randint(0, 20, (4, 7))


def numbers(*shape: int) -> Inputs:
    return lambda: torch.randn(shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "LSTM": (lambda: Tagger(nn.LSTM(8, 12, batch_first=True), 12), tokens),
    "LSTM, two layers, both ways": (
        lambda: Tagger(nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True), 16),
        tokens,
    ),
    "GRU": (lambda: Tagger(nn.GRU(8, 12, batch_first=True), 12), tokens),
    "RNN": (lambda: Tagger(nn.RNN(8, 12, batch_first=True), 12), tokens),
    "learned states": (FromAState, numbers(4, 4, 7)),
    "sigmoid": (lambda: perceptron(nn.Sigmoid), numbers(4, 8)),
    "relu": (lambda: perceptron(nn.ReLU), numbers(4, 8)),
    "convolutions": (Convolutions, numbers(4, 3, 6, 6)),
    "attention": (Attention, tokens),
    "products": (Products, numbers(4, 5, 6)),
    "norms": (Normed, numbers(4, 3, 6, 6)),
    "RMSNorm": (lambda: Stream(lambda width: nn.RMSNorm(width, 1e-9)), numbers(4, 5, 6)),
    "RMSNorm without a scale": (
        lambda: Stream(lambda width: nn.RMSNorm(width, 1e-9, elementwise_affine=False)),
        numbers(4, 5, 6),
    ),
    "RMSNorm of Llama": (lambda: Stream(lambda k: RootMeanSquare(k, "Llama")), numbers(4, 5, 6)),
    "RMSNorm of Gemma": (lambda: Stream(lambda k: RootMeanSquare(k, "Gemma")), numbers(4, 5, 6)),
    "written out without a scale": (
        lambda: Stream(lambda k: RootMeanSquare(k, "")),
        numbers(4, 5, 6),
    ),
    "weight norm": (WeightNorm, numbers(4, 4, 9)),
}


def trained(
    net: nn.Module, inputs: Inputs, *, absorb: bool = False, loaded: bool = False
) -> tuple[nn.Module, mg.Budget]:
    """A network after a phase that has met its budget, and went on."""
    model = mg.export(net, (inputs(),))
    net = mg.to_torch(model) if loaded else net
    # A stream has no kernels but its blocks', which are worth less: then these would go alone.
    ceilings = {"stem": "50%"} if isinstance(net, Stream) else {}
    regularizer = mg.Regularizer(mg.lift(model), net, absorb=absorb, ceilings=ceilings)
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    budget = mg.Budget(regularizer, {"flops": "50%"}, STEPS).attach(optimizer)
    wanted = torch.randn(net(inputs()).shape)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net.train()(inputs()) - wanted).square().mean().backward()
        optimizer.step()
    assert budget.met
    return net.eval(), budget


def off(net: nn.Module, budget: mg.Budget, x: Tensor, *, absorb: bool = False) -> float:
    """How far the resized network is from the one in training, as a share of its outputs."""
    reg = budget.regularizer
    small = mg.apply(reg.graph, reg.plan(), weights=net, absorb=absorb)
    (got,) = run(small, {small.graph.inputs[0].name or "": x.numpy()}).values()
    wanted = net(x).detach().numpy()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("loaded", [False, True], ids=["own", "loaded"])
@pytest.mark.parametrize("name", CASES)
def test_the_dead_act_as_dead(name: str, loaded: bool) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs, loaded=loaded)
    assert budget.regularizer.live_share() < 0.6
    assert off(net, budget, inputs()) < TOLERANCE


@pytest.mark.filterwarnings("ignore:constant channels were dropped")
@pytest.mark.parametrize("name", CASES)
def test_what_is_absorbed_stays_a_constant(name: str) -> None:
    """Constants that the resize cannot absorb are silenced; the others are there to the end."""
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs, absorb=True)
    assert off(net, budget, inputs(), absorb=True) < TOLERANCE


@pytest.mark.parametrize("absorb", [False, True])
def test_what_a_kernel_is_divided_by_does_not_become_zero(absorb: bool) -> None:
    torch.manual_seed(0)
    inputs = numbers(4, 4, 9)
    net, budget = trained(SpectralNorm(), inputs, absorb=absorb)
    net.train()(inputs()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert off(net.eval(), budget, inputs(), absorb=absorb) < TOLERANCE


@pytest.mark.parametrize("name", ["sigmoid", "convolutions", "norms"])
def test_constants_that_can_be_absorbed_are_not_silenced(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs, absorb=True)
    assert off(net, budget, inputs(), absorb=False) > 100 * TOLERANCE


def test_kernels_that_read_are_frozen() -> None:
    """Then what is added has to be zero; frozen parameters keep their numbers."""
    torch.manual_seed(0)
    layers = perceptron(nn.ReLU)
    frozen = list(layers[2].requires_grad_(False).parameters())
    before = [parameter.clone() for parameter in frozen]
    net, budget = trained(layers, numbers(4, 8))
    assert off(net, budget, torch.randn(4, 8)) < TOLERANCE
    assert all(map(torch.equal, before, frozen))


@pytest.mark.parametrize("name", [name for name in CASES if "RMS" in name or "out" in name])
def test_norms_that_counted_the_dead_in_place(name: str) -> None:
    """The network's own class, resized: its scales make up for what is not counted any more."""
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs)
    x = inputs()
    wanted, plan = net(x).detach(), budget.regularizer.plan()
    report = mg.resize_module(net, budget.regularizer.graph, plan)
    assert any(t.name == "stem.weight" and t.after[0] < 24 for t in report.tensors)
    assert float((net(x) - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "sigmoid", "attention"])
def test_a_phase_that_goes_on_holds_the_same(name: str, absorb: bool) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs, absorb=absorb)
    again = mg.Budget(budget.regularizer, {"flops": "50%"}, STEPS)
    again.load_state_dict(budget.state_dict())
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    again.step()
    moved = {key: value - weights[key] for key, value in net.state_dict().items()}
    still = sum(int((change == 0).sum()) for change in moved.values())
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    assert still == zeros > 0


@pytest.mark.parametrize("name", ["LSTM", "sigmoid", "convolutions"])
def test_what_a_plan_takes_back_can_learn(name: str) -> None:
    """On a grid the strongest of the dead come back: each has a gradient to go on with."""
    torch.manual_seed(0)
    build, inputs = CASES[name]
    net, budget = trained(build(), inputs)
    reg = budget.regularizer
    plan = reg.plan(round_to=8)
    assert (plan.widths(reg.graph) > reg.live_widths()).any()
    small = mg.to_torch(mg.apply(reg.graph, plan, weights=net))
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        (small.train()(x := inputs()) - net(x).detach() - 1.0).square().mean().backward()
        optimizer.step()
    for kernel in (p for p in small.parameters() if p.dim() > 1):
        for slices in (kernel, kernel.transpose(0, 1)):
            assert bool((slices.flatten(1).norm(dim=1) > 0).all())
