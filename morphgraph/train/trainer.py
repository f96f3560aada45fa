"""Training an image classifier: one recipe for every arm of a comparison.

SGD with Nesterov momentum, a linear warm-up, then a linear decay (or a constant rate, for a phase
that learns the structure), weight decay on kernels only, so that the regularizer alone moves the
scales.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.errors import UnsupportedError
from morphgraph.train.controller import Budget
from morphgraph.train.data import Augmentation, Dataset


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate.
        momentum: of Nesterov's method.
        weight_decay: on kernels (tensors of rank 2 and more) only.
        warmup: share of the steps over which the rate rises to its peak.
        constant: keep the rate after the warm-up instead of letting it fall to zero.
        augmentation: random crops and flips.
        bf16: compute convolutions and matrix products in bfloat16, with float32 weights. Faster
            where the processor has such instructions, slower for depthwise convolutions.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.15
    constant: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    bf16: bool = False

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step.

        >>> [round(Recipe(1, lr=1.0, warmup=0.5).rate(step, 4), 2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr if self.constant else self.lr * (steps - step) / (steps - rising)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to."""

    number: int
    epochs: int
    loss: float
    seconds: float
    live_share: float | None = None
    weight: float | None = None


def steps_per_epoch(dataset: Dataset, recipe: Recipe) -> int:
    """Training steps in one epoch: whole batches, at least one."""
    return max(1, len(dataset.y_train) // recipe.batch_size)


def train(
    net: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    make_budget: Callable[[int], Budget] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Budget | None:
    """Train a classifier in place.

    Args:
        net: ``[N, channels, height, width] -> [N, classes]``, on the device where it is to train.
        dataset: the images.
        recipe: how.
        seed: of the order of images, crops and flips.
        make_budget: makes the controller of the structure from the number of steps.
        on_epoch: called after every epoch.

    Returns:
        The controller, if there is one.

    Raises:
        UnsupportedError: the loss is no number any more.
    """
    steps = recipe.epochs * steps_per_epoch(dataset, recipe)
    budget = make_budget(steps) if make_budget is not None else None
    # Convolutions are faster where the channels of a pixel lie side by side.
    net.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, recipe)
    generator = torch.Generator().manual_seed(seed)
    device = next(net.parameters()).device
    step = 0
    for number in range(1, recipe.epochs + 1):
        net.train()
        began, total, batches = time.perf_counter(), 0.0, 0
        for images, labels in dataset.training_batches(
            recipe.batch_size, generator, recipe.augmentation
        ):
            lr = recipe.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                loss = F.cross_entropy(net(_placed(images, device)), labels.to(device))
            if budget is not None:
                loss = loss + budget.loss()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if budget is not None:
                budget.step(lr / (1 - recipe.momentum))
            total, batches, step = total + loss.item(), batches + 1, step + 1
        if on_epoch is not None:
            on_epoch(
                Epoch(
                    number,
                    recipe.epochs,
                    total / batches,
                    time.perf_counter() - began,
                    budget.regularizer.live_share() if budget else None,
                    budget.regularizer.weight if budget else None,
                )
            )
        if not math.isfinite(total):
            raise UnsupportedError(
                f"the training has diverged: the loss of epoch {number} is {total}; lower the "
                f"learning rate (now {recipe.lr:g})"
            )
    net.eval()
    return budget


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD as the recipe says; made anew after every resize, since its state has the old sizes."""
    kernels = [p for p in net.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.dim() <= 1]
    return torch.optim.SGD(
        [
            {"params": kernels, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )


@torch.no_grad()
def accuracy(net: nn.Module, dataset: Dataset, batch_size: int = 512) -> float:
    """The share of test images that the network classifies rightly, 0 to 1."""
    net.eval()
    device = next(net.parameters()).device
    right = sum(
        _right(net(_placed(images, device)), labels.to(device))
        for images, labels in dataset.test_batches(batch_size)
    )
    return right / len(dataset.y_test)


def _placed(images: Tensor, device: torch.device) -> Tensor:
    """Images on the device where the network is, in the memory layout that it is fast with."""
    return images.to(device, memory_format=torch.channels_last)


def _right(scores: Tensor, labels: Tensor) -> int:
    return int((scores.argmax(dim=1) == labels).sum())
