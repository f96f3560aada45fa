"""What training costs in a loaded module, and with a regularizer: tables for the benchmarks.

    python tools/bench_training.py                          # a quarter of an hour
    python tools/bench_training.py -o docs/benchmarks.md    # as their section of the page
    python tools/bench_training.py --ways eager --only resnet18 --penalized
    python tools/bench_training.py --only --penalized vit_s --seconds 60

A step is forward, cross-entropy, backward and SGD. Two copies of a network take turns, in an order
that changes: torchvision's own module, and what `mg.to_torch` makes of its ONNX model. Times are
CPU seconds of one thread; the ratio is the median of the paired ratios with its 95 % interval,
above 1 where the loaded module is slower. What a budget adds is timed beside a step of the same
network in the same loop: `mg.Budget.step`, of which one in some steps works, in the mean; and a
penalty in the loss with its gradients. Memory: the most bytes that tensors have at once in three
steps of training, each with a step of the penalty.
"""

import argparse
import datetime as dt
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import morphgraph as mg
from morphgraph.benchmark.statistics import paired_ratio
from morphgraph.testing.random_weights import randomize_weights

HEADING = "## A step of training"
NETWORKS = ("resnet18", "mobilenet_v2", "vit_tiny")
PENALIZED = ("resnet50", "vit_s", "bert_base")
PENALTY_PIXELS = 64  # tokens of the language model
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
    parser.add_argument(
        "--penalized", nargs="*", default=PENALIZED, help="networks of the second table"
    )
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tables = []
    if options.only:
        tables.append(steps_table(options.only, options.ways, options.pixels, options.seconds))
    if options.penalized:
        tables.append(penalty_table(options.penalized, options.seconds))
    text = "\n\n".join(tables)
    if options.output:
        write(options.output, text, options.pixels)


def write(page: Path, tables: str, pixels: int) -> None:
    """Put the tables into their section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    made = (
        f"Made by `tools/bench_training.py` on {dt.date.today()}, torch {torch.__version__}, batch "
        f"{BATCH}, {pixels} x {pixels} pixels (the "
        f"second table: {PENALTY_PIXELS} x {PENALTY_PIXELS}, and {PENALTY_PIXELS} tokens)."
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


def penalty_table(names: Sequence[str], seconds: float) -> str:
    """The table of what a budget, and a penalty in the loss, add to a step."""
    lines = [
        "| network | forward, backward, SGD, ms | `budget.step`, ms | share | penalty and its "
        "gradients, ms | share | memory, with a budget / without |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for name in names:
        case = penalized(name, PENALTY_PIXELS)
        budget = case.budget()
        times = alternate([case.training_step(), budget.step, in_loss(budget.regularizer)], seconds)
        whole = times[: len(times) // budget.interval * budget.interval]  # some work, some do not
        step, *added = 1e3 * whole.mean(axis=0)
        shares = [f"{spent:.2f} | {spent / step:.2%}" for spent in added]
        plain, budgeted = peaks(name, PENALTY_PIXELS)
        lines.append(f"| {name} | {step:.1f} | {' | '.join(shares)} | {budgeted / plain:.4f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def in_loss(regularizer: mg.Regularizer) -> Step:
    """The penalty as a term of the loss, forward and backward."""
    return lambda: torch.autograd.backward(regularizer())


@dataclass(frozen=True)
class Case:
    """A network with random weights, and a batch that it learns.

    Attributes:
        net: takes the inputs.
        inputs: of the batch.
        scores: picks the scores of the classes out of what the network answers.
    """

    net: nn.Module
    inputs: tuple[torch.Tensor, ...]
    scores: Callable[[Any], torch.Tensor]

    def training_step(self) -> Step:
        """A step of training with SGD, as its own module trains."""
        optimizer = torch.optim.SGD(self.net.train().parameters(), lr=LR, momentum=0.9)
        labels = torch.arange(BATCH) % 2

        def step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.scores(self.net(*self.inputs)), labels))
            optimizer.step()

        return step

    def budget(self, interval: int | None = None) -> mg.Budget:
        """Half of the FLOPs, at the begin of a long phase."""
        graph = mg.lift(mg.export(self.net, self.inputs))
        regularizer = mg.Regularizer(graph, self.net)
        return mg.Budget(regularizer, {"flops": "50%"}, 100_000, interval=interval)


def penalized(name: str, pixels: int) -> Case:
    """A network of :data:`PENALIZED`; of the language model ``pixels`` are tokens."""
    torch.manual_seed(0)
    if name == "bert_base":
        from transformers import BertConfig, BertForSequenceClassification

        tokens = torch.arange(BATCH * pixels).reshape(BATCH, pixels)
        bert = BertForSequenceClassification(BertConfig(attn_implementation="eager"))
        return Case(bert, (tokens,), lambda answer: answer.logits)
    if name == "vit_s":
        net: nn.Module = torchvision.models.VisionTransformer(pixels, 16, 12, 6, 384, 1536)
    else:
        net = torchvision.models.get_model(name, weights=None)
    return Case(net, (images(BATCH, pixels),), lambda answer: answer)


def peaks(name: str, pixels: int) -> tuple[int, int]:
    """Bytes of the tensors alive at once in training, without and with a budget's steps."""
    found = []
    for budgeted in (False, True):
        case = penalized(name, pixels)
        budget = case.budget(interval=1) if budgeted else None
        step = case.training_step()
        step()
        with LiveTensors(case.net.parameters()) as live:
            for _ in range(3):
                step()
                if budget is not None:
                    budget.step()
        found.append(live.peak)
    return found[0], found[1]


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made within; ``peak`` is their most at once.

    Args:
        known: counted from the beginning.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen: dict[int, int] = {}
        for tensor in known:
            self._count(tensor)
            if tensor.grad is not None:
                self._count(tensor.grad)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count what it takes and gives."""
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, (args, kwargs, found))
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - its identity
        if address in self._seen:
            return
        self._seen[address] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._gone, address)

    def _gone(self, address: int) -> None:
        self._now -= self._seen.pop(address)


if __name__ == "__main__":
    main()
