"""How evenly a phase that shrinks takes its channels: the live cost beside the reference.

    python tools/experiments/late_deaths.py MobileNet --data cifar10_16px.npz --epochs 4
    python tools/experiments/late_deaths.py MobileNet --data cifar10_16px.npz --epochs 4 --relative

A network of `make experiments` is trained from new weights by the recipe of that page, down to the
share that a phase of `mg.morph` shrinks to. Printed are the largest fall of the live cost within so
many steps, beside that of the reference, and how far it was above the reference at most; then,
every twentieth of the phase, per group the channels alive, the mean of their strengths, and their
spread as a share of it.
"""

import argparse
import warnings
from dataclasses import replace
from typing import Any

import torch
from arms import Study
from bench import Bench
from networks import NETWORKS

import morphgraph as mg
from morphgraph.recipes.trainer import train
from morphgraph.train.config import SHRINK_TO
from morphgraph.train.phases import ShrinkPenalty


class Watched(ShrinkPenalty):
    """The penalty of the phase, which notes after every step what is alive."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shares: list[float] = []
        self.references: list[float] = []
        self.lines: list[str] = []

    def step(self, lr: float | None = None) -> None:
        """Shrink, and note."""
        super().step(lr)
        assert self.budget is not None
        self.shares.append(self.budget.share)
        self.references.append(self.budget.reference())
        if len(self.shares) % max(1, self.steps // 20) == 0 and not self.met:
            self.lines.append(self._line())

    def _line(self) -> str:
        strengths = self.regularizer.strengths().detach()
        alive = self.regularizer.alive(strengths)
        groups = []
        for group in self.regularizer.graph.groups:
            living = strengths[group.channels][alive[group.channels]]
            if group.resizable and len(living):
                mean = float(living.mean())
                spread = float(living.std(correction=0)) / max(mean, 1e-9)
                groups.append(f"{len(living)}:{mean:.2f}/{spread:.2f}")
        share, wanted = self.shares[-1], self.references[-1]
        return f"{len(self.shares):6} {share:.3f} ({wanted:.3f})  " + " ".join(groups)


def largest_fall(shares: list[float], within: int) -> float:
    """By how much a series falls at most within so many steps."""
    return max((now - min(shares[k : k + within + 1]) for k, now in enumerate(shares)), default=0.0)


def main() -> None:
    """Run one phase and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--data", required=True, help="as for make experiments")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=int, default=80, help="steps", metavar="STEPS")
    parser.add_argument("--relative", action="store_true", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    study = Study(arguments.network, arguments.data, arguments.seed, 1, arguments.epochs, ())
    bench = Bench(study)
    net = mg.to_torch(mg.fresh(bench.graph, study.seed))
    regularizer = mg.Regularizer(bench.graph, net, relative=arguments.relative)
    penalty = Watched(regularizer, SHRINK_TO * regularizer.initial_cost)
    recipe = replace(bench.recipe, epochs=arguments.epochs, constant=True)
    train(net, bench.dataset, recipe, seed=study.seed, phase="shrink 1", penalty=penalty)
    print("  step live (wanted)  channels alive : mean strength / spread", *penalty.lines, sep="\n")
    above = max(a - b for a, b in zip(penalty.shares, penalty.references, strict=True))
    print(
        f"largest fall within {arguments.within} steps: "
        f"{largest_fall(penalty.shares, arguments.within):.1%} "
        f"(the reference: {largest_fall(penalty.references, arguments.within):.1%}); "
        f"at most {above:.1%} above the reference; "
        f"met: {penalty.met}, at {penalty.shares[-1]:.2%} after {len(penalty.shares)} steps"
    )


if __name__ == "__main__":
    main()
