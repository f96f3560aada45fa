"""Options of commands that train, and what they make of a model and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from morphgraph.cli.options import MODEL, Decorator
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape, static_shape

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.recipes.data import Dataset
    from morphgraph.recipes.settings import Settings


@dataclass(frozen=True, slots=True)
class Training:
    """How the user wants networks trained; the options of the same names describe the fields."""

    data: str
    data_dir: Path | None
    iterations: int
    shrink_to: float | None
    max_growth: float | None
    weights: Any
    absorb: bool
    shrink_epochs: int
    epochs: int
    batch_size: int
    lr: float
    crop: int
    flip: bool
    strength: Any
    update: Any
    relative: bool
    round_to: int
    min_width: int
    bf16: str
    compiled: bool

    def load_data(self, graph: "ChannelGraph", path: Path) -> "Dataset":
        """The images, in the size and with the channels that the model takes.

        Raises:
            FileError: there is no such file or folder.
            UnsupportedError: the model takes no images, or the data are broken.
        """
        from morphgraph.recipes.data import load_data

        shapes = [static_shape(value) for value in graph.model.graph.inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4:
            raise UnsupportedError(
                f"{escape(str(path))}: morph trains image classifiers with one input NxCxHxW; "
                "for other models use mg.morph in Python with your own training loop"
            )
        _, channels, height, width = shapes[0]
        return load_data(self.data, self.data_dir, (height, width), channels)

    def settings(
        self, graph: "ChannelGraph", budget: Mapping[str, str], cost: str | None, seed: int = 0
    ) -> "Settings":
        """The settings of a run without baselines.

        Raises:
            ArgumentError: a budget or cost is none.
        """
        import torch

        from morphgraph.recipes.data import Augmentation
        from morphgraph.recipes.precision import bf16_helps
        from morphgraph.recipes.settings import Settings
        from morphgraph.recipes.trainer import Recipe
        from morphgraph.train.loop import SHRINK_TO, SearchConfig

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        recipe = Recipe(
            self.epochs,
            self.batch_size,
            self.lr,
            augmentation=Augmentation(self.crop, self.flip),
            bf16=bf16_helps(graph, device) if self.bf16 == "auto" else self.bf16 == "on",
            compiled=self.compiled,
        )
        aim = SearchConfig(
            budget,
            cost=cost,
            iterations=self.iterations,
            shrink_to=SHRINK_TO if self.shrink_to is None else self.shrink_to,
            strength=self.strength,
            round_to=self.round_to,
            min_width=self.min_width,
            max_growth=self.max_growth,
            weights=self.weights,
            absorb=self.absorb,
            update=self.update,
            relative=self.relative,
        )
        return Settings(aim, recipe.shrinking(self.shrink_epochs), recipe, seed=seed)


_OPTIONS: tuple[Decorator[Any], ...] = (
    click.option(
        "--data",
        required=True,
        metavar="NAME|DIR|FILE.npz",
        help="digits, fashion-mnist, a folder with one sub-folder per class, or an .npz file.",
    ),
    click.option("--data-dir", type=MODEL, help="Where the files of fashion-mnist lie."),
    click.option(
        "--iterations",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="How often to shrink and scale before the last training.",
    ),
    click.option(
        "--shrink-to",
        type=click.FloatRange(0, 1, min_open=True),
        help="How far a phase shrinks, as a share of what it begins with, before all widths are "
        "multiplied by the factor that brings them to the budget.",
    ),
    click.option(
        "--max-growth",
        type=click.FloatRange(1),
        metavar="TIMES",
        help="No group gets wider than so many times its width in the model.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["keep", "fresh"]),
        default="keep",
        show_default=True,
        help="Whether the last training goes on with the weights or begins with new ones.",
    ),
    click.option(
        "--absorb", is_flag=True, help="Move what removed channels still add into the next bias."
    ),
    click.option(
        "--shrink-epochs",
        default=4,
        show_default=True,
        type=click.IntRange(1),
        help="Epochs of a phase that learns the structure.",
    ),
    click.option(
        "--epochs",
        default=8,
        show_default=True,
        type=click.IntRange(1),
        help="Epochs of the last training.",
    ),
    click.option("--batch-size", default=128, show_default=True, type=click.IntRange(2)),
    click.option("--lr", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True)),
    click.option(
        "--crop",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="Shift training images by up to so many pixels.",
    ),
    click.option("--flip", is_flag=True, help="Mirror half of the training images."),
    click.option(
        "--strength",
        type=click.Choice(["auto", "bn", "lasso"]),
        default="auto",
        show_default=True,
        help="How the use of a channel is measured.",
    ),
    click.option(
        "--update",
        type=click.Choice(["proximal", "subgradient"]),
        default="proximal",
        show_default=True,
        help="Shrink to exact zeros after every step, or by a term of the loss and a threshold.",
    ),
    click.option(
        "--relative",
        is_flag=True,
        help="Channels compete within their group only: for networks whose layers would lose their "
        "channels all at once (depthwise convolutions, transformers).",
    ),
    click.option("--round-to", default=1, show_default=True, type=click.IntRange(1)),
    click.option(
        "--min-width",
        default=1,
        show_default=True,
        type=click.IntRange(0),
        help="No group gets narrower; with 0 layers may vanish.",
    ),
    click.option(
        "--bf16",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Compute in bfloat16; by default where the device has instructions for it and the "
        "model no grouped convolutions.",
    ),
    click.option("--compile", "compiled", is_flag=True, help="Train with torch.compile."),
)


def train_options(command: Any) -> Any:
    """The options of :class:`Training`; the command gets them as ``training``."""

    @wraps(command)
    def with_training(*args: Any, **options: Any) -> Any:
        own = {name: options.pop(name) for name in Training.__slots__}
        return command(*args, training=Training(**own), **options)

    decorated: Any = with_training
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
