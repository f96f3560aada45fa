"""What is asked, and which studies answer it.

Budgets are percents of the seed network's cost. All arms of one seed network are computed in one
process, each once, whatever questions they belong to. Studies stand in the order in which they are
computed: the seeds of one question before those of the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arms import Arm, Study
from sounds import sounds

from morphgraph.train.config import SHRINK_TO

WEIGHTS = (0.3, 1.0, 3.0)  # of the regularizer, set by hand


@dataclass(frozen=True)
class Question:
    """A question of the page: a title, what stands below it, and the studies with the answer."""

    title: str
    text: str
    studies: tuple[Study, ...]


def arms_at(method: str, *budgets: float, **options: Any) -> list[Arm]:
    """One arm for each budget."""
    return [replace(Arm(method), budget=float(b), **options) for b in budgets]


def over_seeds(
    network: str, data: str, seeds: int | range, epochs: int, shrink: int, arms: Iterable[Arm]
) -> tuple[Study, ...]:
    """The same study for several seeds."""
    chosen = tuple(arms)
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    return tuple(Study(network, data, seed, epochs, shrink, chosen) for seed in numbers)


SEED = Arm("seed")
AGAINST = [
    *arms_at("uniform", 50, 25),
    *arms_at("l2", 50, 25),
    *arms_at("bn", 50, 25),
]
BY_SIZE = {"cost": "params", "target": "params"}


def full(cifar: Path, folder: Path) -> list[Question]:
    """The questions at their full setting; ``folder`` is for data that are made here."""
    data = str(cifar)
    main = [SEED, *arms_at("morph", 100, 50, 25), *AGAINST]
    few = [SEED, *arms_at("morph", 100, 25), *arms_at("uniform", 25)]
    vgg, resnet, mobile, tower = "VGG [24]*7", "ResNet-14", "MobileNet", "Inception"
    among = arms_at("morph", 100, 25, relative=True)
    pruned = [*arms_at("l2", 25), *arms_at("bn", 25)]
    half = [SEED, *arms_at("morph", 100)]
    quarter = [*arms_at("uniform", 25), *arms_at("morph", 25)]
    controlled = [*arms_at("morph", 100), *arms_at("morph", 100, update="subgradient")]
    vit = [
        *arms_at("uniform", 50),
        *arms_at("morph", 50),
        *arms_at("morph", 50, relative=True),
    ]
    by_hand = [
        *(replace(Arm("fixed"), weight=w) for w in WEIGHTS),
        *(replace(Arm("fixed"), weight=w, update="subgradient", threshold=1e-2) for w in WEIGHTS),
    ]
    sizes = [*arms_at("morph", 100, 25, **BY_SIZE), *arms_at("uniform", 25, cost="params")]
    return [
        Question(
            "MorphNet against the multiplier and two pruners",
            "Accuracy at the same FLOPs, every arm trained from new weights.",
            (
                *over_seeds(vgg, data, 3, 5, 3, main),
                *over_seeds(vgg, data, range(3, 5), 5, 3, [*few, *pruned]),
                *over_seeds(resnet, data, 3, 5, 3, main),
                *over_seeds(resnet, data, range(3, 5), 5, 3, [*few, *pruned]),
                *over_seeds("VGG, by hand", data, 5, 5, 3, half),
                *over_seeds(tower, data, 1, 5, 3, few),
                *over_seeds(tower, data, range(1, 3), 5, 3, quarter),
                *over_seeds(mobile, data, 5, 5, 4, [*few, *among]),
                *over_seeds(vgg, "fashion-mnist", 3, 2, 2, quarter),
                *over_seeds("MobileNet x0.5", data, 2, 5, 4, half),
                *over_seeds("ResNet, bottlenecks", data, 3, 5, 3, quarter),
                *over_seeds(vgg, "digits", 3, 20, 40, few),
                *over_seeds(vgg, str(sounds(folder)), 3, 4, 8, quarter),
            ),
        ),
        Question(
            "FLOPs as the target, or parameters",
            "Every structure with both of its costs: what is saved in one is paid in the other.",
            (
                *over_seeds(
                    "VGG, by hand", data, 5, 5, 3, [*half, *arms_at("morph", 100, **BY_SIZE)]
                ),
                *over_seeds(vgg, data, 3, 5, 3, [*few, *sizes]),
            ),
        ),
        Question(
            "One iteration or two",
            "Both end at the same FLOPs; the second begins with the network of the first.",
            over_seeds(
                vgg,
                data,
                3,
                5,
                3,
                [*half, *arms_at("morph", 100, iterations=2)],
            ),
        ),
        Question(
            "Whole blocks and whole towers",
            "Strong budgets, and no floor: groups may die, and their layers vanish.",
            (
                *over_seeds(resnet, data, 3, 5, 3, strong(8)),
                *over_seeds(tower, data, 1, 5, 3, [strong(8)[0], strong(8)[-1]]),
            ),
        ),
        Question(
            "A controller, or a weight set by hand; proximal steps, or the subgradient",
            "The widths are scaled to 100 % of the FLOPs and trained; *live* is where the phase "
            f"itself ended, of the {100 * SHRINK_TO:g} % that the controller was asked for.",
            (
                *over_seeds(vgg, data, 1, 5, 3, [*controlled, *by_hand]),
                *over_seeds(vgg, data, range(1, 2), 5, 3, [*controlled, by_hand[1]]),
            ),
        ),
        Question(
            "Inherited weights, or training from scratch",
            "`weights=keep` goes on with the weights of the phase that shrank; `extra_epochs=1` is "
            "trained from new weights for the epochs of that phase longer.",
            over_seeds(
                vgg,
                data,
                3,
                5,
                3,
                [
                    *arms_at("morph", 25),
                    *arms_at("uniform", 25),
                    *arms_at("morph", 25, weights="keep"),
                    *arms_at("morph", 25, weights="keep", absorb=True),
                    *arms_at("morph", 25, extra_epochs=1),
                    *arms_at("uniform", 25, extra_epochs=1),
                ],
            ),
        ),
        Question(
            "Without BatchNorm: group lasso, and a vision transformer",
            "Kernels, heads and MLP widths instead of BatchNorm scales.",
            (
                *over_seeds("VGG without BN", data, 3, 5, 3, quarter),
                *over_seeds("ViT", data, 3, 5, 3, vit),
            ),
        ),
    ]


def strong(budget: float) -> list[Arm]:
    """The arms at a budget at which layers go."""
    share = budget / 100
    return [
        *arms_at("uniform", budget),
        *arms_at("morph", budget, shrink_to=share),
        *arms_at("morph", budget, shrink_to=share, min_width=0),
    ]


def quick(cifar: Path | None, folder: Path) -> list[Question]:
    """The main question in a few minutes; the figures say little."""
    data = str(sounds(folder)) if cifar is None else str(cifar)
    arms = [SEED, *arms_at("morph", 100, 25), *arms_at("uniform", 25)]
    return [
        Question(
            "MorphNet against the multiplier, quickly",
            "Two seeds and two epochs: the commands work; the figures say little.",
            (
                *over_seeds("VGG [24]*7", data, 2, 2, 1, arms),
                *over_seeds("ResNet-14", data, 2, 2, 1, arms),
                *over_seeds("VGG [24]*7", "digits", 2, 10, 20, arms),
            ),
        )
    ]
