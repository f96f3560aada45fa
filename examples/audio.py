"""Audio: a network of one-dimensional convolutions over the waveform, within two budgets at once.

python examples/audio.py --steps 400
"""

import argparse
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg

LENGTH, CLASSES = 512, 4


class Block(nn.Module):
    """A depthwise and a pointwise convolution around which the input goes by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width, bias=False)
        self.pointwise = nn.Conv1d(width, width, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width, time]`` to the same."""
        y = self.norm1(self.depthwise(x)).relu()
        result: Tensor = x + self.norm2(self.pointwise(y))
        return result


def network() -> nn.Sequential:
    """From a waveform ``[n, 1, time]`` to a score per class."""
    return nn.Sequential(
        nn.Conv1d(1, 24, 16, stride=8, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        Block(24),
        nn.Conv1d(24, 48, 5, stride=4, padding=2, bias=False),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        Block(48),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy tones; even classes rise, odd ones fall, high or low."""
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    time = torch.arange(LENGTH) / LENGTH
    begin = torch.rand(count, 1, generator=generator) * 5 + torch.where(label < 2, 15, 40)[:, None]
    slope = torch.where(label % 2 == 0, 12, -12)[:, None]
    wave = torch.sin(2 * pi * (begin + 0.5 * slope * time) * time)
    noise = torch.randn(count, LENGTH, generator=generator)
    return (wave + 0.3 * noise)[:, None], label


def train(net: nn.Module, steps: int, lr: float, penalty: mg.Budget | None = None) -> None:
    """A training loop like any other, but for one line."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    if penalty is not None:
        penalty.attach(optimizer)
    net.train()
    for _ in range(steps):
        x, labels = sounds(32, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of sounds that get their class."""
    x, labels = sounds(256, torch.Generator().manual_seed(2))
    return float((net.eval()(x).argmax(1) == labels).float().mean())


def main(steps: int = 400) -> tuple[float, float]:
    """Half of the FLOPs and 60 % of the parameters; the share of the FLOPs, and the accuracy."""
    torch.manual_seed(0)
    net = network()
    graph = mg.lift(mg.export(net, (torch.zeros(1, 1, LENGTH),)))
    wanted = {"flops": "50%", "params": "60%"}
    budget = mg.Budget(mg.Regularizer(graph, net), wanted, steps=steps)
    train(net, steps, 3e-3, budget)
    plan = budget.regularizer.plan(wanted)
    slim = mg.apply(graph, plan, weights=net)  # compared with the masked original
    small = mg.to_torch(slim)
    train(small, steps // 3, 1e-3)
    for kind in wanted:
        print(f"{kind} {plan.cost[kind].before:,.0f} -> {plan.cost[kind].after:,.0f}")
    print(f"accuracy: {accuracy(net):.1%}, then {accuracy(small):.1%}")
    return plan.cost["flops"].after / plan.cost["flops"].before, accuracy(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
