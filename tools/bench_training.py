"""What training costs in a loaded module, and with a regularizer: tables for the benchmarks.

    python tools/bench_training.py                          # a quarter of an hour
    python tools/bench_training.py -o docs/benchmarks.md    # as their section of the page
    python tools/bench_training.py --ways eager --only resnet18

A step is forward, cross-entropy, backward and SGD. Two copies of a network take turns, in an order
that changes: torchvision's own module, and what `mg.to_torch` makes of its ONNX model. Times are
CPU seconds of one thread; the ratio is the median of the paired ratios with its 95 % interval,
above 1 where the loaded module is slower. What a regularizer adds is timed beside a step of
resnet50 in the same loop: `mg.Budget.step`, and a penalty in the loss with its gradients.
"""

import argparse
import datetime as dt
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.benchmark.statistics import paired_ratio
from morphgraph.testing.random_weights import randomize_weights

HEADING = "## A step of training"
NETWORKS = ("resnet18", "mobilenet_v2", "vit_tiny")
WAYS = ("eager", "compiled")
BATCH = 8
LR = 1e-3
MIN_ROUNDS = 10

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=NETWORKS, help="networks", metavar="NETWORK")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--pixels", type=int, default=96, help="height and width of the images")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each network and way")
    parser.add_argument("--without-regularizer", action="store_true", help="the first table alone")
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = steps_table(options.only, options.ways, options.pixels, options.seconds)
    if not options.without_regularizer:
        text += "\n\n" + regularizer_table(options.seconds)
    if options.output:
        write(options.output, text, options.pixels)


def write(page: Path, tables: str, pixels: int) -> None:
    """Put the tables into their section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    made = (
        f"Made by `tools/bench_training.py` on {dt.date.today()}, torch {torch.__version__}, batch "
        f"{BATCH}, {pixels} x {pixels} pixels (the regularizer's table: 224 x 224)."
    )
    section = f"{HEADING}\n\n{made}\n{about}\n\n{tables}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    behind = "".join(f"\n## {each}" for each in rest.split("\n## ")[1:])
    page.write_text(f"{before.rstrip()}\n\n{section}{behind}", encoding="utf-8")


def steps_table(names: Sequence[str], ways: Sequence[str], pixels: int, seconds: float) -> str:
    """The table of steps in the original and in the loaded module."""
    lines = [
        "| network | way | original, ms | loaded, ms | loaded / original |",
        "|---|---|---:|---:|---|",
    ]
    print("\n".join(lines))
    for name in names:
        net = network(name, pixels)
        loaded = mg.to_torch(mg.export(net, (images(1, pixels),)))
        for way in ways:
            nets = [
                cast(nn.Module, torch.compile(n)) if way == "compiled" else n for n in (net, loaded)
            ]
            times = alternate([training_step(n, pixels) for n in nets], seconds)
            first, second = 1e3 * np.median(times, axis=0)
            found = paired_ratio(times[:, 1], times[:, 0])
            lines.append(
                f"| {name} | {way} | {first:.1f} | {second:.1f} | "
                f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}) |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def network(name: str, pixels: int) -> nn.Module:
    """A network with random weights."""
    if name == "vit_tiny":
        net: nn.Module = torchvision.models.VisionTransformer(pixels, 16, 12, 3, 192, 768)
    else:
        net = cast(nn.Module, torchvision.models.get_model(name, weights=None))
    net.eval()
    randomize_weights(net, (images(1, pixels),))
    return net


def images(batch: int, pixels: int) -> torch.Tensor:
    """The same random images every time."""
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


def training_step(net: nn.Module, pixels: int) -> Step:
    """A step of training of a network."""
    net.train()
    x, labels = images(BATCH, pixels), torch.arange(BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), labels))
        optimizer.step()

    return step


def alternate(steps: Sequence[Step], seconds: float) -> np.ndarray:
    """CPU seconds of steps that take turns, ``[rounds, steps]``."""
    for step in steps:
        step()
        step()
    rounds = list[list[float]]()
    end = time.process_time() + seconds
    while time.process_time() < end or len(rounds) < MIN_ROUNDS:
        times = [0.0] * len(steps)
        order = range(len(steps))
        for index in order if len(rounds) % 2 else reversed(order):
            times[index] = timed(steps[index])
        rounds.append(times)
    return np.array(rounds)


def timed(step: Step) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def regularizer_table(seconds: float) -> str:
    """The table of what a regularizer adds to a step of resnet50."""
    net = network("resnet50", 224)
    graph = mg.lift(mg.export(net, (images(1, 224),)))
    regularizer = mg.Regularizer(graph, net)
    budget = mg.Budget(regularizer, {"flops": "50%"}, steps=100_000)
    times = alternate(
        [
            training_step(net, 224),
            lambda: budget.step(lr=LR / (1 - 0.9)),
            lambda: torch.autograd.backward(regularizer()),
        ],
        seconds,
    )
    step, *added = 1e3 * times.mean(axis=0)
    lines = ["| in a step of resnet50 | ms | share |", "|---|---:|---:|"]
    lines.append(f"| forward, backward, SGD | {step:.1f} | |")
    for what, spent in zip(("`budget.step`", "penalty and its gradients"), added, strict=True):
        lines.append(f"| {what} | {spent:.1f} | {spent / step:.2%} |")
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
