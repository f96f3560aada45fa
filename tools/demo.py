"""The main job on data at hand: ``make demo``.

A small residual CNN is exported, lifted, analyzed, trained under a FLOPs budget of 50 %, resized,
checked, trained again, and compared with the original and with the width multiplier at the same
FLOPs, in accuracy and in ONNX Runtime. Data: Fashion-MNIST where Debian's package has put it,
scikit-learn's digits otherwise.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

import morphgraph as mg
from morphgraph.benchmark import bench
from morphgraph.recipes.data import Augmentation, load_data
from morphgraph.recipes.readers import FASHION_FOLDER
from morphgraph.recipes.run import Settings, run
from morphgraph.recipes.trainer import Recipe
from morphgraph.report.runs import event_line, result_report
from morphgraph.report.tables import Column, Report, Table, amount, number_column, render, share
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.train.config import SearchConfig

# ONNX Runtime computes convolutions in blocks of 8 or 16 channels; other widths cost time.
ROUND_TO = 16


@click.command()
@click.option("-o", "--output", default="runs/demo", type=click.Path(path_type=Path))
@click.option("--data", help="digits or fashion-mnist; what is at hand if not given.")
@click.option("--seed", default=0)
def main(output: Path, data: str | None, seed: int) -> None:
    """Fit a small CNN into half of its FLOPs, and compare."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chosen = data or ("fashion-mnist" if FASHION_FOLDER.is_dir() else "digits")
    dataset = load_data(chosen)
    height, width = dataset.preprocessing.size
    large = height > 16
    net = residual_cnn((32, 64, 128), stem_stride=4 if large else 1)

    say(f"data: {chosen}, {len(dataset.y_train)} training images of {height}x{width}")
    say("exporting to ONNX, lifting into the channel graph")
    graph = mg.lift(mg.export(net, (image(2, height, width),), dynamic_batch=True))
    print(render(groups_report(graph), "table"))

    epochs, batch = ((1, 2), 128) if large else ((25, 35), 64)
    recipe = Recipe(epochs[1], batch, augmentation=Augmentation(crop=2 if large else 1))
    settings = Settings(
        SearchConfig({"flops": "50%"}, round_to=ROUND_TO),
        recipe.shrinking(epochs[0]),
        recipe,
        baselines=("uniform",),
        seed=seed,
    )
    result = run(graph, dataset, settings, output, overwrite=True, on_event=tell)

    say("timing in ONNX Runtime, one thread, interleaved")
    files = [output / arm.file for arm in result.arms.values()]
    flops = [2 * arm.macs for arm in result.arms.values()]
    timing = bench(files, seconds=8, batch=32 if large else 64, flops=flops)
    print(render(result_report(result, output, timing), "table"))


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


def tell(event: Mapping[str, Any]) -> None:
    """Progress on stderr: every fifth epoch where there are many."""
    if event["event"] == "phase":
        say(f"{event['phase']}: {event['epochs']} epochs")
    elif event["event"] != "epoch" or _worth_telling(event["number"], event["epochs"]):
        line = event_line(event)
        if line is not None:
            say(f"  {line}")


def _worth_telling(number: int, epochs: int) -> bool:
    return number == epochs or not number % max(1, epochs // 6)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
