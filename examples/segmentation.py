"""Segmentation with an auxiliary head: the class is resized in place, and keeps its own forward.

In training the network also returns the auxiliary head's map, which the exported model does not
have. `mg.resize_module` cuts both heads.

    python examples/segmentation.py --steps 600
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg

SIZE, CLASSES = 32, 3


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """A convolution with its norm."""
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class Segmenter(nn.Module):
    """An encoder, a decoder that also reads the first features, and an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = block(1, 16), block(16, 32, stride=2)
        self.middle, self.up = block(32, 32), block(32 + 16, 24)
        self.head, self.aux = nn.Conv2d(24, CLASSES, 1), nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Scores per pixel; in training also those of the auxiliary head."""
        fine = self.stem(x)
        coarse = self.middle(self.down(fine))
        larger = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        scores: Tensor = self.head(self.up(torch.cat([larger, fine], 1)))
        if not self.training:
            return scores
        aux = F.interpolate(self.aux(coarse), scale_factor=2.0, mode="nearest")
        return scores, aux


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images of a bright disc and a dark square, and the class of every pixel."""
    places = torch.arange(SIZE)
    y, x = places[:, None], places[None, :]
    at = torch.randint(6, SIZE - 6, (count, 4, 1, 1), generator=generator)
    square = ((y - at[:, 0]).abs() < 5) & ((x - at[:, 1]).abs() < 5)
    disc = (y - at[:, 2]) ** 2 + (x - at[:, 3]) ** 2 < 25
    labels = torch.where(disc, 1, torch.where(square, 2, 0))
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    return (disc.float() - 0.7 * (square & ~disc).float())[:, None] + 0.4 * noise, labels


def train(net: nn.Module, steps: int, lr: float, penalty: mg.Budget | None = None) -> None:
    """A training loop like any other, but for one line."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    if penalty is not None:
        penalty.attach(optimizer)
    net.train()
    for _ in range(steps):
        x, labels = scenes(8, generator)
        scores, aux = net(x)
        loss = F.cross_entropy(scores, labels) + 0.4 * F.cross_entropy(aux, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of a shape's pixels that get their class."""
    x, labels = scenes(32, torch.Generator().manual_seed(2))
    right = net.eval()(x).argmax(1) == labels
    return float(right[labels > 0].float().mean())


def main(steps: int = 600) -> tuple[float, float]:
    """Shrink to half of the FLOPs, fine-tune; the share of the FLOPs left, and the accuracy."""
    torch.manual_seed(0)
    net = Segmenter()
    graph = mg.lift(mg.export(net, (scenes(1, torch.Generator())[0],)))
    budget = mg.Budget(mg.Regularizer(graph, net), {"flops": "50%"}, steps=steps)
    train(net, steps, 3e-3, budget)
    plan = budget.regularizer.plan({"flops": "50%"})
    small = copy.deepcopy(net)
    report = mg.resize_module(small, graph, plan)  # compared with the resized ONNX model
    train(small, steps // 3, 1e-3)
    change = plan.cost["flops"]
    print(f"{len(report.tensors)} tensors resized, checked in eval and in training form")
    print(f"FLOPs {change.before:,.0f} -> {change.after:,.0f}")
    print(f"accuracy on shapes: {accuracy(net):.1%}, then {accuracy(small):.1%}")
    return change.after / change.before, accuracy(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    main(parser.parse_args().steps)
