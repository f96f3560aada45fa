"""The arms of a study: ways to come to a structure, and its training by the same recipe.

A study is one seed network on one dataset with one seed of everything random. All its arms are
trained from new weights (``weights="fresh"``) by one recipe over the same batches, unless the arm
is about something else. What several arms need (a phase that shrinks, the trained seed network) is
computed once per study.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morphgraph.options import Update
from morphgraph.train.config import SHRINK_TO

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One network to be trained.

    Attributes:
        method: ``seed``, ``uniform``, ``l2`` (magnitude), ``bn`` (Torch-Pruning's BN-scale
            pruner), ``random``, ``morph``; ``fixed`` for weights of the regularizer set by hand.
        budget: share of the seed's cost in percent.
        cost: what is budgeted.
        target: what the regularizer counts; ``cost`` if not given.
        iterations, weights, update, relative, shrink_to, min_width, absorb: as for ``mg.morph``.
        extra_epochs: trained longer, by the epochs of so many shrinking phases.
        weight: of the regularizer, for ``fixed``.
        threshold: alive is above this, for ``fixed``.
    """

    method: str
    budget: float = 100.0
    cost: str = "flops"
    target: str | None = None
    iterations: int = 1
    weights: str = "fresh"
    update: Update = "proximal"
    relative: bool = False
    shrink_to: float = SHRINK_TO
    min_width: int = 1
    absorb: bool = False
    extra_epochs: int = 0
    weight: float = 0.0
    threshold: float | None = None

    @property
    def name(self) -> str:
        """A row's name: the method and what is not the default."""
        plain = Arm(self.method)
        differing = [
            f"{name}={getattr(self, name):g}"
            if isinstance(getattr(self, name), float)
            else f"{name}={getattr(self, name)}"
            for name in vars(plain)
            if name != "method" and getattr(self, name) != getattr(plain, name)
        ]
        return " ".join([self.method, *differing])


@dataclass(frozen=True)
class Study:
    """One seed network on one dataset, one seed of everything random.

    ``data`` is a name or path for :func:`morphgraph.recipes.data.load_data`.
    """

    network: str
    data: str
    seed: int
    epochs: int
    shrink_epochs: int
    arms: tuple[Arm, ...]

    @property
    def title(self) -> str:
        """What a row says of its study."""
        return f"{self.network} | {Path(self.data).stem} | {self.epochs}+{self.shrink_epochs}"

    def key(self, arm: Arm) -> str:
        """What tells a row from all others, with the share that is a default: it may change."""
        to = f" | to {100 * arm.shrink_to:g} %" if arm.method == "morph" else ""
        return f"{self.title} | seed {self.seed} | {arm.name}{to}"


def standard_error(numbers: list[float]) -> float:
    """Of the mean; NaN for one number."""
    if len(numbers) < 2:
        return math.nan
    return float(np.std(numbers, ddof=1) / math.sqrt(len(numbers)))
