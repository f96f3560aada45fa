"""Options of commands that train, and what they make of a model and data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from morphgraph.cli.command import Fields
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.options import option
from morphgraph.train.config import SearchConfig
from morphgraph.words import escape

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.recipes.data import Dataset
    from morphgraph.recipes.settings import FromTrained, Settings

TRAINED_LR = 0.03
"""Peak learning rate of a fine-tuning."""
TRAINED_WARMUP = 0.1


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
    shrink_epochs: Annotated[
        int | None,
        option(
            "Epochs of a phase that learns the structure; 4, and none from a trained network, "
            "whose channels are then ranked by calibration images.",
            ge=0,
            metavar="N",
        ),
    ] = None
    epochs: Annotated[
        int,
        option("Epochs of the last training; from a trained network those in all.", ge=1),
    ] = 8
    batch_size: Annotated[int, option(ge=2)] = 128
    lr: Annotated[
        float | None,
        option("Peak learning rate; 0.1, and 0.03 from a trained network.", gt=0, metavar="RATE"),
    ] = None
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
        from morphgraph.onnx_io import static_shape
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
        self,
        graph: "ChannelGraph",
        budget: Mapping[str, str],
        cost: str | None,
        seed: int = 0,
        trained: "FromTrained | None" = None,
    ) -> "Settings":
        """The settings of a run without baselines.

        Raises:
            ArgumentError: a budget or cost is none, or there are too few epochs.
        """
        from morphgraph.recipes.data import Augmentation
        from morphgraph.recipes.precision import bf16_helps
        from morphgraph.recipes.settings import Settings
        from morphgraph.recipes.trainer import Recipe, best_device

        shrinking, epochs, lr = self.shrink_epochs, self.epochs, self.lr
        if trained is None:
            shrinking, lr = 4 if shrinking is None else shrinking, lr or 0.1
        else:
            shrinking, lr = shrinking or 0, lr or TRAINED_LR
            epochs -= shrinking
            trained = replace(trained, rank="learned") if shrinking else trained
        if epochs < 1 or (trained is None and shrinking < 1):
            raise ArgumentError(
                f"--shrink-epochs {shrinking}, --epochs {self.epochs}: a new network needs 1 or "
                "more of each, and a trained one more epochs in all than the structure takes"
            )
        recipe = Recipe(
            epochs,
            self.batch_size,
            lr,
            augmentation=Augmentation(self.crop, self.flip),
            bf16=bf16_helps(graph, best_device()) if self.bf16 == "auto" else self.bf16 == "on",
            compiled=self.compiled,
        )
        aim = SearchConfig(budget, cost, **self.targets, **self.shrinking)
        if trained is not None:
            recipe = replace(recipe, warmup=TRAINED_WARMUP)
        return Settings(aim, recipe.shrinking(shrinking), recipe, seed=seed, trained=trained)
