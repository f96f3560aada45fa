"""Options of commands that train, and what they make of a model and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from morphgraph.cli.command import Fields
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape, static_shape
from morphgraph.options import option
from morphgraph.train.config import SearchConfig

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.recipes.data import Dataset
    from morphgraph.recipes.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the user wants networks trained: on which data, to what end, and by which recipe."""

    data: Annotated[
        str,
        option(
            "digits, fashion-mnist, a folder with one sub-folder per class, or an .npz file.",
            metavar="NAME|DIR|FILE.npz",
        ),
    ]
    data_dir: Annotated[Path | None, option("Where the files of fashion-mnist lie.")] = None
    targets: Annotated[dict[str, Any], Fields(SearchConfig, "iterations", "absorb")]
    shrink_epochs: Annotated[int, option("Epochs of a phase that learns the structure.", ge=1)] = 4
    epochs: Annotated[int, option("Epochs of the last training.", ge=1)] = 8
    batch_size: Annotated[int, option(ge=2)] = 128
    lr: Annotated[float, option(gt=0)] = 0.1
    crop: Annotated[int, option("Shift training images by up to so many pixels.", ge=0)] = 0
    flip: Annotated[bool, option("Mirror half of the training images.")] = False
    shrinking: Annotated[dict[str, Any], Fields(SearchConfig, "strength", "min_width")]
    bf16: Annotated[
        Literal["auto", "on", "off"],
        option(
            "Compute in bfloat16; by default where the device has instructions for it and the "
            "model no grouped convolutions."
        ),
    ] = "auto"
    compiled: Annotated[
        bool,
        option("Train with torch.compile.", "--compile"),
    ] = False

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
        from morphgraph.recipes.data import Augmentation
        from morphgraph.recipes.precision import bf16_helps
        from morphgraph.recipes.settings import Settings
        from morphgraph.recipes.trainer import Recipe, best_device

        recipe = Recipe(
            self.epochs,
            self.batch_size,
            self.lr,
            augmentation=Augmentation(self.crop, self.flip),
            bf16=bf16_helps(graph, best_device()) if self.bf16 == "auto" else self.bf16 == "on",
            compiled=self.compiled,
        )
        aim = SearchConfig(budget, cost, **self.targets, **self.shrinking)
        return Settings(aim, recipe.shrinking(self.shrink_epochs), recipe, seed=seed)
