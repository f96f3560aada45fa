"""``morphgraph morph``: learn a structure within a budget, and train it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from morphgraph.cli.console import be_silent, note, show
from morphgraph.cli.models import open_graph
from morphgraph.cli.options import (
    MODEL,
    Lifting,
    assignment,
    common,
    format_option,
    lift_options,
    overwrite_option,
    refuse_repeated,
    seed_option,
)
from morphgraph.errors import FileError, UnsupportedError
from morphgraph.onnx_io import escape, static_shape
from morphgraph.report.tables import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from morphgraph.graph import ChannelGraph

_BASELINES: Any = ("uniform", "l2", "bn", "random")


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
    "budgets",
    multiple=True,
    required=True,
    type=assignment(str, "flops=50%"),
    metavar="COST=AMOUNT",
    help="flops, params, memory or latency: an amount (300M) or a share (50%); may be repeated, "
    "all hold.",
)
@click.option(
    "--cost", metavar="COST", help="What the regularizer counts; by default the first budget's."
)
@click.option(
    "--iterations",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How often to shrink and scale before the last training.",
)
@click.option(
    "--shrink-to",
    type=click.FloatRange(0, 1, min_open=True),
    help="How far a phase shrinks, as a share of what it begins with, before all widths are "
    "multiplied by the factor that brings them to the budget.",
)
@click.option(
    "--max-growth",
    type=click.FloatRange(1),
    metavar="TIMES",
    help="No group gets wider than so many times its width in the model.",
)
@click.option(
    "--weights",
    type=click.Choice(["keep", "fresh"]),
    default="keep",
    show_default=True,
    help="Whether the last training goes on with the weights or begins with new ones.",
)
@click.option(
    "--absorb", is_flag=True, help="Move what removed channels still add into the next bias."
)
@click.option(
    "--shrink-epochs",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Epochs of a phase that learns the structure.",
)
@click.option(
    "--epochs",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Epochs of the last training.",
)
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
@click.option(
    "--update",
    type=click.Choice(["proximal", "subgradient"]),
    default="proximal",
    show_default=True,
    help="Shrink to exact zeros after every step, or by a term of the loss and a threshold.",
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
    "--baseline",
    "chosen",
    multiple=True,
    type=click.Choice(_BASELINES),
    help="Also train the original and this, for as many epochs; may be repeated.",
)
@click.option("--baselines", is_flag=True, help="All of them.")
@click.option(
    "--bf16",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Compute in bfloat16; by default where the device has instructions for it and the model "
    "no grouped convolutions.",
)
@click.option("--compile", "compiled", is_flag=True, help="Train with torch.compile.")
@click.option(
    "--smoke",
    is_flag=True,
    help="Only check within a few steps that a much too strong penalty collapses the cost and that "
    "none does not move it; writes nothing.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the run in the output folder, or begin one."
)
@click.option(
    "--checkpoint-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Between two checkpoints within an epoch.",
)
@click.option("-o", "--output", "folder", type=MODEL, metavar="runs/NAME")
@seed_option
@overwrite_option
@lift_options
@format_option
@common
def morph(
    model: Path,
    data: str,
    data_dir: Path | None,
    budgets: tuple[tuple[str, str], ...],
    cost: str | None,
    iterations: int,
    shrink_to: float | None,
    max_growth: float | None,
    weights: Any,
    absorb: bool,
    shrink_epochs: int,
    epochs: int,
    batch_size: int,
    lr: float,
    crop: int,
    flip: bool,
    strength: Any,
    update: Any,
    round_to: int,
    min_width: int,
    chosen: tuple[Any, ...],
    baselines: bool,
    bf16: str,
    compiled: bool,
    smoke: bool,
    resume: bool,
    checkpoint_seconds: float,
    folder: Path | None,
    seed: int,
    overwrite: bool,
    lifting: Lifting,
    kind: Format,
) -> int:
    """Learn a network's structure within a budget, and train it.

    Each iteration trains the model with the regularizer until its cost has fallen far, and
    multiplies the widths that are left by the factor that brings them to the budget. Then the
    network that came out is trained. A budget of 100% gives another network of the same cost.
    Writes base.onnx, plan.json, slim.onnx, result.json and events.jsonl into the output folder.
    """
    import torch

    from morphgraph.report.runs import result_report, smoke_report
    from morphgraph.train import distributed
    from morphgraph.train.data import Augmentation, load_data
    from morphgraph.train.loop import SHRINK_TO, Aim
    from morphgraph.train.precision import bf16_helps
    from morphgraph.train.run import Settings, run, smoke_run
    from morphgraph.train.trainer import Recipe

    torch.set_num_threads(1)  # two training threads in one process are slower than one
    click.get_current_context().with_resource(distributed.launched())
    if not distributed.is_first():
        be_silent(distributed.rank())
    refuse_repeated(budgets)
    if folder is None and not smoke:
        raise click.UsageError("Missing option '-o'")
    if folder is not None:
        _spare(model, folder)
    graph = open_graph(model, lifting)
    channels, size = _image(graph, model)
    dataset = load_data(data, data_dir, size, channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        epochs,
        batch_size,
        lr,
        augmentation=Augmentation(crop, flip),
        bf16=bf16_helps(graph, device) if bf16 == "auto" else bf16 == "on",
        compiled=compiled,
    )
    aim = Aim(
        dict(budgets),
        cost=cost,
        iterations=iterations,
        shrink_to=SHRINK_TO if shrink_to is None else shrink_to,
        strength=strength,
        round_to=round_to,
        min_width=min_width,
        max_growth=max_growth,
        weights=weights,
        absorb=absorb,
        update=update,
    )
    settings = Settings(
        aim,
        recipe.shrinking(shrink_epochs),
        recipe,
        _BASELINES if baselines else tuple(dict.fromkeys(chosen)),
        seed,
    )
    if smoke:
        checked = smoke_run(graph, dataset, settings)
        show(smoke_report(checked), kind)
        return 0 if checked.passed else 1
    assert folder is not None
    result = run(
        graph,
        dataset,
        settings,
        folder,
        overwrite=overwrite,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        on_event=_tell,
    )
    show(result_report(result, folder), kind)
    return 0


def _spare(model: Path, folder: Path) -> None:
    """Refuse a folder where the run would replace its own input."""
    from morphgraph.train.run import FILES

    files = [path.resolve() for name in FILES for path in folder.glob(name)]
    if any(model.resolve().is_relative_to(path) for path in files):
        raise FileError(
            f"{escape(str(model))}: is an input, which is never changed; choose another folder"
        )


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
    from morphgraph.report.runs import event_line

    line = event_line(event)
    if line is not None:
        note(line)
