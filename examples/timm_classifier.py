"""Classification in a training script with timm's parts: an EfficientNet's blocks on digits.

pip install 'morphgraph[timm,data]'
python examples/timm_classifier.py --steps 300
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.integrations.timm import shrink

NAME = "test_efficientnet"  # three small stages of inverted bottlenecks


def network() -> nn.Module:
    """From images ``[n, 1, 32, 32]`` to a score per digit, with random weights."""
    net: nn.Module = timm.create_model(NAME, pretrained=False, in_chans=1, num_classes=10)
    return net


def digits() -> tuple[Tensor, Tensor]:
    """Enlarged images and labels; every fifth is for the test."""
    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return F.interpolate(x, scale_factor=4.0), torch.tensor(found.target)


def train_epoch(
    net: nn.Module, average: ModelEmaV2, optimizer: torch.optim.Optimizer, epoch: int, steps: int
) -> None:
    """As in timm's ``train_one_epoch``; nothing in it knows of budgets."""
    x, labels = digits()
    seen = torch.nonzero(torch.arange(len(x)) % 5 > 0).flatten()
    generator = torch.Generator().manual_seed(epoch)
    net.train()
    for _ in range(steps):
        batch = seen[torch.randint(0, len(seen), (32,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), labels[batch]).backward()
        optimizer.step()
        average.update(net)


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of test images that get their digit."""
    x, labels = digits()
    test = torch.arange(len(x)) % 5 == 0
    return float((net.eval()(x[test]).argmax(1) == labels[test]).float().mean())


def main(steps: int = 300, folder: Path | None = None, every: int = 50) -> tuple[float, float]:
    """Shrink to half of the FLOPs, fine-tune; the share of the FLOPs left, and the accuracy."""
    folder = folder or Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    net = network()
    graph = mg.lift(mg.export(net, (torch.zeros(1, 1, 32, 32),)))
    optimizer = create_optimizer_v2(net, opt="adamw", lr=3e-3)
    epochs = max(1, steps // every)
    phase = shrink(graph, {"flops": "50%"}, net, optimizer, steps=epochs * every)
    last, begin = folder / "last.pth.tar", 0
    average = ModelEmaV2(net, decay=0.9)
    if last.exists():  # a run that was killed goes on
        begin = resume_checkpoint(net, str(last), optimizer) or 0
        average.set(net)
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(folder), max_history=1)
    for epoch in range(begin, epochs):
        train_epoch(net, average, optimizer, epoch, every)
        saver.save_checkpoint(epoch, epoch)
    phase.end()

    plan = phase.plan()  # off the network; its average has no zeros
    slim = mg.apply(graph, plan, weights=average.module)  # compared with the masked average
    small = mg.to_torch(slim)
    tuned = ModelEmaV2(small, decay=0.9)
    optimizer = create_optimizer_v2(small, opt="adamw", lr=1e-3)
    train_epoch(small, tuned, optimizer, epochs, steps // 3)
    change = plan.cost["flops"]
    print(f"FLOPs {change.before:,.0f} -> {change.after:,.0f}")
    print(f"accuracy: {accuracy(average.module):.1%}, then {accuracy(tuned.module):.1%}")
    return change.after / change.before, accuracy(tuned.module)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="of checkpoints; a second run goes on there")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder, arguments.every)
