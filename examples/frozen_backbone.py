"""A frozen backbone with a trained head: what is frozen stays as it is, to the last bit.

The channels that a frozen kernel makes are left alone, so the budget counts what remains: of the
parameters here most are the head's.

    python examples/frozen_backbone.py --steps 400
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg


class Classifier(nn.Module):
    """Convolutions that know odd from even, and a head that is to know the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, 8, 8]`` to a score per digit."""
        scores: Tensor = self.last(self.head(self.backbone(x)))
        return scores


def digits() -> tuple[Tensor, Tensor]:
    """Images and labels; every fifth is for the test."""
    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16
    return x, torch.from_numpy(found.target).long()


def train(
    net: nn.Module, labels: Tensor, steps: int, lr: float, penalty: mg.Budget | None = None
) -> None:
    """A training loop like any other, but for one line."""
    generator = torch.Generator().manual_seed(1)
    x, _ = digits()
    seen = torch.nonzero(torch.arange(len(x)) % 5 > 0).flatten()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    if penalty is not None:
        penalty.attach(optimizer)
    for _ in range(steps):
        batch = seen[torch.randint(0, len(seen), (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of test images that get their digit."""
    x, labels = digits()
    test = torch.arange(len(x)) % 5 == 0
    return float((net.eval()(x[test]).argmax(1) == labels[test]).float().mean())


def main(steps: int = 400) -> tuple[float, float]:
    """Shrink to half of the parameters, fine-tune; the share that is left, and the accuracy."""
    torch.manual_seed(0)
    net = Classifier().train()
    labels = digits()[1]
    train(net, labels % 2, steps // 4, 1e-2)  # what somebody else has trained
    net.eval()  # statistics stay as well
    net.backbone.requires_grad_(False)
    nn.init.kaiming_uniform_(net.last.weight)
    before = [tensor.clone() for tensor in net.backbone.state_dict().values()]

    graph = mg.lift(mg.export(net, (torch.zeros(1, 1, 8, 8),)))
    budget = mg.Budget(mg.Regularizer(graph, net, cost="params"), {"params": "50%"}, steps=steps)
    train(net, labels, steps, 3e-3, budget)
    same = zip(before, net.backbone.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)

    plan = budget.regularizer.plan({"params": "50%"})
    slim = mg.apply(graph, plan, weights=net)  # compared with the masked original
    small = mg.to_torch(slim)  # its backbone is frozen as well
    train(small, labels, steps // 3, 1e-3)
    change = plan.cost["params"]
    print(f"parameters {change.before:,.0f} -> {change.after:,.0f}")
    print(f"accuracy: {accuracy(net):.1%}, then {accuracy(small):.1%}")
    return change.after / change.before, accuracy(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
