"""Experiment: width against depth. What goes under one budget, and what is left?

    python tools/experiments/depth.py  # digits, by a network that is trained here; minutes
    python tools/experiments/depth.py --networks decoder  # that `decoder.py` has trained
    python tools/experiments/depth.py --networks ResNet-20 MiniLM --data cifar10_16px.npz

Three ways to a budget, each with the fit behind it: by widths alone, by whole branches alone, and
with both allowed. Printed are a row for each, the share of the cost that is reached, how many
layers went, and what the network comes to on inputs that nobody has seen.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from decoder import FOLDER
from decoder_table import Material as Text
from shrink_networks import Subject, material
from shrink_rows import RUNS
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import morphgraph as mg
from morphgraph.errors import BudgetError
from morphgraph.options import Depth
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.calibration.segments import run_all
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.testing.examples import residual_cnn

#: By the name of a way what may go; a width that no group has lets none become narrower.
WAYS: dict[str, tuple[Depth, int]] = {
    "widths": ("keep", 1),
    "branches": ("branches", 10**6),
    "both": ("branches", 1),
}
EPOCHS = 15


@dataclass(frozen=True)
class Case:
    """A network, inputs to shrink it with, and what it is judged by.

    Attributes:
        graph: the lifted network.
        inputs: by name.
        measure: what is judged.
        judge: by that a model.
        cost: of the budgets, and the shares of it.
    """

    graph: mg.ChannelGraph
    inputs: dict[str, Any]
    measure: str
    judge: Callable[[ir.Model], float]
    cost: str = "flops"
    shares: tuple[float, ...] = (0.7, 0.5, 0.35)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["digits"])
    parser.add_argument("--data", type=Path, help="CIFAR-10 at 16x16 pixels, an .npz file")
    parser.add_argument("--decoder", type=Path, default=FOLDER, help="folder of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.networks:
        if name == "digits":
            case = _digits(options.seed)
        elif name == "decoder":
            case = _decoder(options.decoder, options.seed)
        else:
            case = _subject(name, options.data, options.seed)
        found = case.judge(case.graph.model)
        print(f"{name}, {time.strftime('%Y-%m-%d')}: {case.measure} {found:.4g}\n")
        print(f"| {case.cost} | may go | reached | layers gone | {case.measure} |")
        print("|---:|---|---:|---:|---:|")
        for row in rows(case, options.seed):
            print(row, flush=True)
    return 0


def rows(case: Case, seed: int) -> Iterator[str]:
    """A row of the table for each budget and way."""
    price = mg.cost(case.graph, case.cost)
    shrinkers: dict[str, Shrinker] = {}
    for share in case.shares:
        for way, (depth, least) in WAYS.items():
            if way not in shrinkers:
                bounds = WidthBounds(min_width=least, depth=depth)
                shrinkers[way] = Shrinker(
                    case.graph, case.inputs, bounds=bounds, seed=seed, threads=1
                )
            head = f"| {share:.0%} | {way} | "
            try:
                plan = shrinkers[way].plan({case.cost: share * price.total})
            except BudgetError:
                yield head + "none meets it | | |"
                continue
            widths = plan.widths(case.graph)
            dead = np.flatnonzero(widths == 0).tolist()
            gone = len(liveness(case.graph, dead).removed_layers)
            judged = case.judge(finish(shrinkers[way], plan, verify=False).model)
            yield head + f"{price.at(widths) / price.total:.0%} | {gone} | {judged:.4g} |"


def _digits(seed: int) -> Case:
    """A residual network that is trained on scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = (images.reshape(-1, 1, 8, 8)[order] / 8 - 1).astype(np.float32)
    y = torch.from_numpy(labels[order])
    torch.manual_seed(seed)
    net = residual_cnn()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for part in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            cross_entropy(net(torch.from_numpy(x[part.numpy()])), y[part]).backward()
            optimizer.step()
    net.eval()
    model = mg.export(net, (torch.from_numpy(x[:2]),), dynamic_batch=True)
    (name,) = (value.name or "" for value in model.graph.inputs)

    def accuracy(found: ir.Model) -> float:
        (outputs,) = run_all(found, [{name: x[1200:]}], 1)
        (logits,) = outputs.values()
        return float((logits.argmax(axis=1) == labels[order][1200:]).mean())

    return Case(mg.lift(model), {name: x[:600]}, "accuracy", accuracy)


def _decoder(folder: Path, seed: int) -> Case:
    text = Text(folder, seed)
    inputs = {"input_ids": text.text}
    return Case(text.graph, inputs, "perplexity", text.judge, "params", (0.8, 0.65))


def _subject(name: str, data: Path | None, seed: int) -> Case:
    """One of the networks of the experiments on shrinking."""
    given = material(Subject(name, "nodes" if name != "MiniLM" else "", seed), data, RUNS)
    measure = next(iter(given.judged(ir.to_proto(mg.load(given.path)))))

    def judge(model: ir.Model) -> float:
        return given.judged(ir.to_proto(model))[measure]

    return Case(mg.lift(given.path), given.inputs, measure, judge)


if __name__ == "__main__":
    raise SystemExit(main())
