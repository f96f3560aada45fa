"""Training an image classifier: one recipe for every arm of a comparison.

SGD with Nesterov momentum, a linear warm-up, then a linear decay (or a constant rate, for a phase
that learns the structure), weight decay on kernels only, so that the regularizer alone moves the
scales.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.recipes import norms
from morphgraph.recipes.checkpoint import (
    Checkpoint,
    random_states,
    restore_random_states,
    seed_everything,
    seed_of,
)
from morphgraph.recipes.data import Augmentation, Dataset
from morphgraph.train import distributed
from morphgraph.train.distributed import State
from morphgraph.train.phases import NoPenalty, ResumablePenalty


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate.
        momentum: of Nesterov's method.
        weight_decay: on kernels only: not on biases, nor on scales, whatever axes of size 1 they
            have (``[C, 1, 1]``).
        warmup: share of the steps over which the rate rises to its peak.
        constant: keep the rate after the warm-up instead of letting it fall to zero.
        augmentation: random crops and flips.
        bf16: compute convolutions and matrix products in bfloat16, with float32 weights. Faster
            where the processor has such instructions, slower for depthwise convolutions.
        compiled: train what ``torch.compile`` makes of the network.
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
    compiled: bool = False

    def shrinking(self, epochs: int) -> "Recipe":
        """The same for a phase that learns a structure, at a constant rate."""
        return replace(self, epochs=epochs, constant=True)

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
    """The result of one epoch."""

    number: int
    epochs: int
    loss: float
    seconds: float
    live_share: float | None = None
    weight: float | None = None


def best_device() -> torch.device:
    """Where to train: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steps_per_epoch(dataset: Dataset, recipe: Recipe) -> int:
    """Training steps in one epoch: whole batches, at least one."""
    return max(1, len(dataset.y_train) // recipe.batch_size)


def train(
    net: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    phase: str = "train",
    penalty: ResumablePenalty | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train a classifier in place.

    The order of images, crops and flips follow from the seed, the phase and the number of the
    epoch; the global generators are seeded for the phase. So a phase that is resumed from a
    checkpoint gives the same numbers as one that was never stopped, on as many threads.

    Args:
        net: ``[N, channels, height, width] -> [N, classes]``, on the device where it is to train.
        dataset: the images.
        recipe: how.
        seed: of everything random.
        phase: name of what is trained.
        penalty: what shrinks the network, if anything does.
        on_epoch: called after every epoch.
        checkpoint: to resume from; written after every epoch, and within one where it is due.

    Of several processes (see :mod:`morphgraph.train.distributed`) each trains on its share of
    every batch; ``recipe.batch_size`` is that of all of them together.

    Raises:
        ArgumentError: there are more processes than images in a batch.
        UnsupportedError: the loss is no number any more.
    """
    _Training(net, dataset, recipe, seed, phase, penalty or NoPenalty(), checkpoint).go(on_epoch)


@dataclass
class _Training:
    """A running phase. ``step``, ``epoch`` and ``batch`` count what is done."""

    net: nn.Module
    dataset: Dataset
    recipe: Recipe
    seed: int
    phase: str
    penalty: ResumablePenalty
    checkpoint: Checkpoint | None
    step: int = 0
    epoch: int = 0
    batch: int = 0
    total: float = 0.0  # the sum of losses of this epoch
    seconds: float = 0.0  # of this epoch

    def __post_init__(self) -> None:
        # Of a batch, on all processes.
        self.images = min(self.recipe.batch_size, len(self.dataset.y_train))
        if self.images < distributed.size():
            raise ArgumentError(
                f"batches of {self.images} images cannot be shared by {distributed.size()} "
                "processes; raise --batch-size, or start fewer"
            )
        self.steps = self.recipe.epochs * steps_per_epoch(self.dataset, self.recipe)
        # Convolutions are faster where the channels of a pixel are adjacent in memory.
        self.net.to(memory_format=torch.channels_last)
        self.device = next(self.net.parameters()).device
        self.optimizer = make_optimizer(self.net, self.recipe)
        self.penalty.carry(self.optimizer)
        forward = distributed.shared(self.net)
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(forward) if self.recipe.compiled else forward
        )

    def go(self, on_epoch: Callable[[Epoch], None] | None) -> None:
        with norms.synchronized(self.net):
            self._go(on_epoch)
        self.net.eval()

    def _go(self, on_epoch: Callable[[Epoch], None] | None) -> None:
        seed_everything(seed_of(self.seed, self.phase))
        self.penalty.begin(self.steps)
        self._restore()
        while self.epoch < self.recipe.epochs:
            self.net.train()
            self._pass()
            done = self._finished()
            if on_epoch is not None:
                on_epoch(done)
            self.batch, self.total, self.seconds = 0, 0.0, 0.0
            self._save()

    def _pass(self) -> None:
        """The remainder of the epoch."""
        recipe, began = self.recipe, time.perf_counter() - self.seconds
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.phase, self.epoch))
        batches = self.dataset.training_batches(
            recipe.batch_size, generator, recipe.augmentation, distributed.own_share
        )
        for images, labels in islice(batches, self.batch, None):
            self._step(_placed(images, self.net), labels.to(self.device))
            self.seconds = time.perf_counter() - began
            if self.checkpoint is not None and self.checkpoint.due():
                self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        lr = self.recipe.rate(self.step, self.steps)
        if distributed.size() > 1:  # every process drops other activations
            torch.manual_seed(seed_of(self.seed, self.phase, self.step, distributed.rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            loss = F.cross_entropy(self.forward(images), labels)
        # Gradients are averaged over processes, so that a larger share counts for more. A penalty
        # of the weights alone is the same on all: the mean leaves it as it is.
        loss = (loss + self.penalty.loss()) * (len(labels) * distributed.size() / self.images)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.penalty.step(lr / (1 - self.recipe.momentum))
        self.total += distributed.total(loss.item(), self.device) / distributed.size()
        self.batch += 1
        self.step += 1

    def _finished(self) -> Epoch:
        """Count the epoch that is over, and return its result."""
        self.epoch += 1
        if not math.isfinite(self.total):
            raise UnsupportedError(
                f"the training has diverged: the loss of epoch {self.epoch} is {self.total}; lower "
                f"the learning rate (now {self.recipe.lr:g})"
            )
        distributed.broadcast_state(self.net, self.penalty)
        loss = self.total / self.batch
        regularizer = self.penalty.regularizer
        live = None if regularizer is None else regularizer.live_share()
        weight = None if regularizer is None else regularizer.weight
        return Epoch(self.epoch, self.recipe.epochs, loss, self.seconds, live, weight)

    def _save(self) -> None:
        """Write what is needed to resume here, or to go on from a phase that is over."""
        if self.checkpoint is None or not distributed.is_first():
            return
        state: State = {
            "counts": (self.step, self.epoch, self.batch, self.total, self.seconds),
            "net": self.net.state_dict(),
            "penalty": self.penalty.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.epoch < self.recipe.epochs:
            state["random"] = random_states()
        self.checkpoint.save(state)

    def _restore(self) -> None:
        if self.checkpoint is None:
            return
        state = distributed.state_from_first(
            partial(self.checkpoint.load, self.device), self.device
        )
        if state is None:
            return
        self.step, self.epoch, self.batch, self.total, self.seconds = state["counts"]
        self.net.load_state_dict(state["net"])
        self.penalty.load_state_dict(state["penalty"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "random" in state:
            restore_random_states(state["random"])


def _kernels(net: nn.Module) -> set[nn.Parameter]:
    """Linear layers' weights, and all parameters with several axes of more than one number.

    A layer scale has one, as has a depthwise convolution with a window of 1, which is a scale.
    """
    linear = {id(module.weight) for module in net.modules() if isinstance(module, nn.Linear)}
    return {p for p in net.parameters() if id(p) in linear or sum(size > 1 for size in p.shape) > 1}


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD as the recipe says; made anew after every resize, since its state has the old sizes."""
    decayed = _kernels(net)
    kernels = [p for p in net.parameters() if p.requires_grad and p in decayed]
    others = [p for p in net.parameters() if p.requires_grad and p not in decayed]
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
    own = slice(distributed.rank(), None, distributed.size())
    right = sum(
        _right(net(_placed(images, net)), labels.to(device))
        for images, labels in dataset.test_batches(batch_size, own)
    )
    return distributed.total(right, device) / len(dataset.y_test)


def _placed(images: Tensor, net: nn.Module) -> Tensor:
    """Images where and in the type in which the network is, in the layout that it is fast with."""
    weight = next(net.parameters())
    return images.to(weight.device, weight.dtype, memory_format=torch.channels_last)


def _right(scores: Tensor, labels: Tensor) -> int:
    return int((scores.argmax(dim=1) == labels).sum())
