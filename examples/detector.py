"""A detector in YOLO's manner: raw maps in training, boxes in evaluation, resized in place.

python examples/detector.py --steps 400
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg

SIZE, CLASSES, STRIDES = 32, 2, (4, 8)


def conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution with its norm and activation."""
    layer = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.SiLU())


class Split(nn.Module):
    """A cross-stage block: one part goes by, the other through a bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.by, self.inward = conv(width, half, 1), conv(width, half, 1)
        self.bottleneck = nn.Sequential(conv(half, half), conv(half, half))
        self.outward = conv(width + half, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width, h, w]`` to the same."""
        through = self.inward(x)
        parts = [self.by(x), through, through + self.bottleneck(through)]
        result: Tensor = self.outward(torch.cat(parts, 1))
        return result


class Detector(nn.Module):
    """Two scales; per cell whether an object is there, its class, and its box."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 8, stride=2), conv(8, 16, stride=2), Split(16))
        self.down = nn.Sequential(conv(16, 32, stride=2), Split(32))
        self.lateral, self.merge = conv(32, 16, 1), conv(32, 16)
        outputs = 1 + CLASSES + 4
        self.heads = nn.ModuleList([nn.Conv2d(16, outputs, 1), nn.Conv2d(32, outputs, 1)])

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """In training the raw map of every scale, else all boxes, ``[n, cells, outputs]``."""
        fine = self.stem(x)
        coarse = self.down(fine)
        up = F.interpolate(self.lateral(coarse), scale_factor=2.0, mode="nearest")
        fine = self.merge(torch.cat([fine, up], 1))
        maps = [head(y) for head, y in zip(self.heads, (fine, coarse), strict=True)]
        if self.training:
            return maps
        return torch.cat([self.boxes(y, s) for y, s in zip(maps, STRIDES, strict=True)], 1)

    def boxes(self, raw: Tensor, stride: int) -> Tensor:
        """Probabilities, and centres and sizes in pixels."""
        cells = raw.flatten(2).transpose(1, 2)
        at = torch.arange(raw.shape[-1], device=raw.device)
        grid = torch.stack([at.repeat(len(at)), at.repeat_interleave(len(at))], 1) + 0.5
        sure, centre, size = cells.split([1 + CLASSES, 2, 2], 2)
        return torch.cat([sure.sigmoid(), (grid + centre.tanh()) * stride, size.exp() * stride], 2)


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of one bright or dark rectangle, and its class, centre and size."""
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    centre = torch.rand(count, 2, generator=generator) * 16 + 8
    size = torch.rand(count, 2, generator=generator) * 8 + 5
    places = torch.arange(SIZE) + 0.5
    inside = [(places - centre[:, k : k + 1]).abs() < size[:, k : k + 1] / 2 for k in (0, 1)]
    shape = inside[1][:, :, None] & inside[0][:, None, :]
    noise = 0.2 * torch.randn(count, SIZE, SIZE, generator=generator)
    images = shape * (2.0 * label - 1)[:, None, None] + noise
    return images[:, None], torch.cat([label[:, None].float(), centre, size], 1)


def loss_of(maps: list[Tensor], targets: Tensor) -> Tensor:
    """Every scale is to find the object in the cell of its centre."""
    total = torch.zeros(())
    samples = torch.arange(len(targets))
    for raw, stride in zip(maps, STRIDES, strict=True):
        cell = (targets[:, 1:3] / stride).long()
        found = raw[samples, :, cell[:, 1], cell[:, 0]]
        there = torch.zeros_like(raw[:, 0])
        there[samples, cell[:, 1], cell[:, 0]] = 1.0
        weight = torch.tensor(10.0)
        total = total + F.binary_cross_entropy_with_logits(raw[:, 0], there, pos_weight=weight)
        total = total + F.cross_entropy(found[:, 1 : 1 + CLASSES], targets[:, 0].long())
        offset = targets[:, 1:3] / stride - cell - 0.5
        total = total + F.l1_loss(found[:, -4:-2].tanh(), offset)
        total = total + F.l1_loss(found[:, -2:], (targets[:, 3:] / stride).log())
    return total


def train(net: nn.Module, steps: int, lr: float, penalty: mg.Budget | None = None) -> None:
    """A training loop like any other, but for one line."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    if penalty is not None:
        penalty.attach(optimizer)
    net.train()
    for _ in range(steps):
        x, targets = scenes(16, generator)
        optimizer.zero_grad()
        loss_of(net(x), targets).backward()
        optimizer.step()


@torch.no_grad()
def hits(net: nn.Module) -> float:
    """The share of objects whose surest box has their class, and their centre within 3 pixels."""
    x, targets = scenes(128, torch.Generator().manual_seed(2))
    found = net.eval()(x)
    best = found[torch.arange(len(x)), found[:, :, 0].argmax(1)]
    right = best[:, 1 : 1 + CLASSES].argmax(1) == targets[:, 0]
    near = (best[:, -4:-2] - targets[:, 1:3]).abs().amax(1) < 3
    return float((right & near).float().mean())


def main(steps: int = 400) -> tuple[float, float]:
    """Shrink to half of the FLOPs, fine-tune; the share of the FLOPs left, and the hits."""
    torch.manual_seed(0)
    net = Detector()
    graph = mg.lift(mg.export(net, (torch.zeros(1, 1, SIZE, SIZE),)))
    budget = mg.Budget(mg.Regularizer(graph, net), {"flops": "50%"}, steps=steps)
    train(net, steps, 3e-3, budget)
    plan = budget.regularizer.plan({"flops": "50%"})
    small = copy.deepcopy(net)
    report = mg.resize_module(small, graph, plan)  # compared with the resized ONNX model
    train(small, steps // 3, 1e-3)
    change = plan.cost["flops"]
    print(f"{len(report.tensors)} tensors resized, checked in eval and in training form")
    print(f"FLOPs {change.before:,.0f} -> {change.after:,.0f}")
    print(f"objects found: {hits(net):.1%}, then {hits(small):.1%}")
    return change.after / change.before, hits(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
