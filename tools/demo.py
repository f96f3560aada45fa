"""The main job on data that every machine has: ``make demo``.

A small residual CNN is trained on scikit-learn's digits. It is then in the position of most
networks: trained, and too large. It is exported, lifted, analyzed, and brought to a quarter of
its FLOPs: its channels are ranked by images, the network is resized, checked, fitted and tuned for
a few epochs. Beside it stand, at the same FLOPs and for the same epochs, what is left if channels
leave by the norms of their kernels, and the width multiplier with new weights. All of it is done
for several seeds; then the networks are timed in ONNX Runtime.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from scipy import stats

import morphgraph as mg
from morphgraph.benchmark import bench
from morphgraph.errors import MorphWarning
from morphgraph.options import Method
from morphgraph.recipes.data import Augmentation, Dataset, load_data
from morphgraph.recipes.results import Arm
from morphgraph.recipes.run import run
from morphgraph.recipes.settings import FromTrained, Settings
from morphgraph.recipes.trainer import Recipe
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    amount,
    number_column,
    render,
    share,
)
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.train.config import SearchConfig

WIDTHS = (64, 64, 64)
BUDGET = {"flops": "25%"}
EPOCHS, TUNED = 12, 4
SEEDS = 8
# ONNX Runtime computes convolutions in blocks of 8 or 16 channels; other widths cost time.
ROUND_TO = 16
NETWORKS = {
    "base": "original",
    "uniform": "width multiplier, new weights",
    "l2": "smallest kernels removed",
    "slim": "morphgraph",
}


@click.command()
@click.option("-o", "--output", default="runs/demo", type=click.Path(path_type=Path))
@click.option("--seeds", default=SEEDS)
def main(output: Path, seeds: int) -> None:
    """Fit a trained CNN into a quarter of its FLOPs, and compare."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MorphWarning)
    dataset = load_data("digits")
    say(f"data: digits, {len(dataset.y_train)} training images, {len(dataset.y_test)} to test")
    found: list[dict[str, Arm]] = []
    for seed in range(seeds):
        say(f"seed {seed}: an original is trained for {EPOCHS} epochs, then shrunk and tuned")
        found.append(one_seed(dataset, output / str(seed), seed, show=not seed))
        say("  " + ", ".join(f"{NETWORKS[k]} {arm.accuracy:.2%}" for k, arm in found[-1].items()))
    say("timing in ONNX Runtime, one thread, interleaved")
    files = [output / "0" / name / arm.file for name, arm in found[0].items()]
    timing = bench(files, seconds=4, batch=64)
    speeds = [model.speedup or 1.0 for model in timing.models]
    print(render(comparison(found, speeds), "table"))
    print(f"written: {output}, a folder per seed and network; plans in {output}/0/slim/plan.json")


def one_seed(dataset: Dataset, output: Path, seed: int, show: bool) -> dict[str, Arm]:
    """The arms of a seed: an original, and three networks of a quarter of its FLOPs."""
    torch.manual_seed(seed)
    tune = recipe(TUNED, 0.03)
    aim = SearchConfig(BUDGET, round_to=ROUND_TO)
    graph = mg.lift(mg.export(residual_cnn(WIDTHS), (image(2),), dynamic_batch=True))
    base = alone(
        "base", graph, dataset, Settings(aim, recipe(0), recipe(EPOCHS), seed=seed), output
    )
    trained = mg.lift(str(output / "base" / base.file))
    if show:
        print(render(groups_report(trained), "table"))
    settings = Settings(aim, recipe(0), tune, seed=seed)
    # New weights can take a larger learning rate.
    anew = replace(settings, aim=replace(aim, weights="fresh"), retrain=recipe(TUNED))
    uniform = alone("uniform", trained, dataset, anew, output)
    pruned = alone("l2", trained, dataset, settings, output)
    ours = replace(settings, trained=FromTrained((BUDGET,)))
    slim = run(trained, dataset, ours, output / "slim", overwrite=True).arms["slim"]
    return {"base": base, "uniform": uniform, "l2": pruned, "slim": slim}


def alone(
    method: Method, graph: mg.ChannelGraph, dataset: Dataset, settings: Settings, output: Path
) -> Arm:
    """One arm by itself."""
    chosen = replace(settings, method=method)
    return run(graph, dataset, chosen, output / method, overwrite=True).arms[method]


def recipe(epochs: int, lr: float = 0.1) -> Recipe:
    """Training on digits."""
    return Recipe(epochs, 64, lr=lr, augmentation=Augmentation(crop=1))


def groups_report(graph: mg.ChannelGraph) -> Report:
    """The groups and what one channel of each costs."""
    macs = mg.cost(graph, "macs")
    slopes = macs.gradient(graph.widths)
    rows = [
        [group.name, group.width, slopes[group.index] / macs.total, group.reason or "yes"]
        for group in graph.groups
    ]
    columns = [
        Column("group"),
        number_column("channels"),
        number_column("MACs per channel", share),
        Column("may shrink"),
    ]
    params = mg.cost(graph, "params").total
    head = [("model", f"{amount(macs.total)} MACs, {amount(params)} parameters")]
    return Report(None, [Table(columns, rows)], head)


def comparison(found: Sequence[dict[str, Arm]], speeds: Sequence[float]) -> Report:
    """Means over the seeds, and how sure the difference to each other network is."""
    base = found[0]["base"].macs
    accuracies = {name: np.array([arms[name].accuracy for arms in found]) for name in NETWORKS}
    rows: list[list[Cell]] = [
        [
            title,
            f"{accuracies[name].mean():.2%}",
            float(np.mean([arms[name].macs for arms in found])) / base,
            float(np.mean([arms[name].params for arms in found])),
            EPOCHS if name == "base" else TUNED,
            f"{speed:.2f}",
        ]
        for (name, title), speed in zip(NETWORKS.items(), speeds, strict=True)
    ]
    columns = [
        Column("network"),
        Column("accuracy"),
        number_column("MACs", share),
        number_column("parameters", amount),
        number_column("epochs"),
        Column("speed-up"),
    ]
    head = [("budget", f"flops={BUDGET['flops']}"), ("seeds", str(len(found)))]
    foot = [
        f"morphgraph - {NETWORKS[name]}: {interval(100 * (accuracies['slim'] - accuracies[name]))}"
        for name in ("uniform", "l2", "base")
    ]
    return Report(None, [Table(columns, rows)], head, foot)


def interval(gains: np.ndarray) -> str:
    """Points, with Student's 95 % interval over the seeds."""
    if len(gains) < 2:
        return f"{gains.mean():+.2f} points"
    half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    low, high = gains.mean() - half, gains.mean() + half
    return f"{gains.mean():+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
