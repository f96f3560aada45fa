"""``morphgraph morph``: train, shrink to a budget, train again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from morphgraph.cli.console import note, show
from morphgraph.cli.models import open_graph
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    assignment,
    common,
    format_option,
    lift_options,
    overwrite_option,
    seed_option,
)
from morphgraph.errors import FileError, UnsupportedError
from morphgraph.onnx_io import escape, static_shape
from morphgraph.report.tables import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from morphgraph.graph import ChannelGraph


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--data",
    required=True,
    metavar="NAME|DIR|FILE.npz",
    help="digits, fashion-mnist, a folder with one sub-folder per class, or an .npz file.",
)
@click.option("--data-dir", type=MODEL, help="Where the files of fashion-mnist lie.")
@click.option(
    "--budget",
    required=True,
    type=assignment(str, "flops=50%"),
    metavar="COST=AMOUNT",
    help="flops, params, memory or latency: an amount (300M) or a share (50%).",
)
@click.option("--shrink-epochs", default=4, show_default=True, type=click.IntRange(1))
@click.option("--epochs", default=8, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(2))
@click.option("--lr", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option(
    "--crop",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Shift training images by up to so many pixels.",
)
@click.option("--flip", is_flag=True, help="Mirror half of the training images.")
@click.option(
    "--strength",
    type=click.Choice(["auto", "bn", "lasso"]),
    default="auto",
    show_default=True,
    help="How the use of a channel is measured.",
)
@click.option("--round-to", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--min-width",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="No group gets narrower; with 0 layers may vanish.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also train the original and the width multiplier at the same cost, for as many epochs.",
)
@click.option("-o", "--output", "folder", required=True, type=MODEL, metavar="runs/NAME")
@seed_option
@overwrite_option
@lift_options
@format_option
@common
def morph(
    model: Path,
    data: str,
    data_dir: Path | None,
    budget: tuple[str, str],
    shrink_epochs: int,
    epochs: int,
    batch_size: int,
    lr: float,
    crop: int,
    flip: bool,
    strength: Any,
    round_to: int,
    min_width: int,
    baselines: bool,
    folder: Path,
    seed: int,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> None:
    """Train, shrink and retrain a network until it meets a budget.

    The first phase trains the model with the regularizer until the budget is met, the second trains
    the resized network. Writes base.onnx, plan.json, slim.onnx, result.json and events.jsonl into
    the output folder.
    """
    import torch

    from morphgraph.report.runs import result_report
    from morphgraph.train.data import Augmentation, load_data
    from morphgraph.train.run import FILES, Settings, run
    from morphgraph.train.trainer import Recipe

    torch.set_num_threads(1)  # two training threads in one process are slower than one
    if any(path.exists() and path.samefile(model) for path in (folder / name for name in FILES)):
        raise FileError(
            f"{escape(str(model))}: is an input, which is never changed; choose another folder"
        )
    graph = open_graph(model, lifting)
    channels, size = _image(graph, model)
    dataset = load_data(data, data_dir, size, channels)
    augmentation = Augmentation(crop, flip)
    recipe = Recipe(epochs, batch_size, lr, augmentation=augmentation)
    shrink = Recipe(shrink_epochs, batch_size, lr, augmentation=augmentation, constant=True)
    settings = Settings(
        dict([budget]), shrink, recipe, strength, round_to, min_width, baselines, seed
    )
    result = run(graph, dataset, settings, folder, overwrite=overwrite, on_event=_tell)
    show(result_report(result, folder), kind)


def _image(graph: "ChannelGraph", path: Path) -> tuple[int, tuple[int, int]]:
    """Channels and (height, width) of the one image that the model takes."""
    shapes = [static_shape(value) for value in graph.model.graph.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise UnsupportedError(
            f"{escape(str(path))}: morph trains image classifiers with one input NxCxHxW; "
            "for other models use mg.morph in Python with your own training loop"
        )
    _, channels, height, width = shapes[0]
    return channels, (height, width)


def _tell(event: "Mapping[str, Any]") -> None:
    """One line of progress per event."""
    if event["event"] == "epoch":
        share = event["live_share"]
        live = f", {share:.1%} of the cost alive" if share is not None else ""
        left = (event["epochs"] - event["number"]) * event["seconds"]
        note(
            f"{event['phase']}: epoch {event['number']}/{event['epochs']}, "
            f"loss {event['loss']:.3f}{live}, {left:.0f} s left in this phase"
        )
    elif event["event"] == "resized":
        note(f"resized: verified (error {event['error']:.1e}), accuracy {event['accuracy']:.2%}")
    elif event["event"] == "arm":
        note(f"{event['name']}: accuracy {event['accuracy']:.2%}, {event['macs'] / 1e6:.3g} M MACs")
