"""Options of commands that read calibration data."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from morphgraph.cli.console import note
from morphgraph.cli.progress import ProgressLines
from morphgraph.cli.shared_options import shape
from morphgraph.options import Axes, Fit, Order, option

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.calibration import Samples
    from morphgraph.folders.found import ModelFolder

DATA_METAVAR = "FILE.npz|FILE.npy|FILE.txt|DIR"


def image_size(text: str) -> tuple[int, int]:
    """Height and width in ``224x224``.

    >>> image_size("224x160")
    (224, 160)
    """
    sizes = shape(text) if "x" in text else ()
    if len(sizes) != 2:
        raise click.BadParameter(f"'{text}' is no size of images; write 224x224, the height first")
    return sizes[0], sizes[1]


image_size.__name__ = "size"


def numbers(text: str) -> tuple[float, ...]:
    """The numbers in ``0.485,0.456,0.406``.

    >>> numbers("0.5"), numbers("0.485,0.456,0.406")
    ((0.5,), (0.485, 0.456, 0.406))
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(abs(number) < float("inf") for number in found):
        raise click.BadParameter(
            f"'{text}' is no list of numbers; write 0.485,0.456,0.406, or one for all channels"
        )
    return found


_CHANNELS_METAVAR = "R,G,B"


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How many calibration inputs are read, and how images become inputs.

    And how text does. What is not said about images is read from the model's metadata.
    """

    samples: Annotated[
        int, option("Read so many samples of the data at most.", ge=1, metavar="N")
    ] = 512
    size: Annotated[
        tuple[int, int] | None,
        option(
            "For images: the size to which they are brought, where the model leaves it open.",
            type=image_size,
            metavar="HxW",
            multiple=False,
        ),
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        option(
            "For images: subtracted from every channel, in the model's order of colours.",
            type=numbers,
            metavar=_CHANNELS_METAVAR,
            multiple=False,
        ),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        option(
            "For images: what every channel is divided by then.",
            type=numbers,
            metavar=_CHANNELS_METAVAR,
            multiple=False,
        ),
    ] = None
    scale: Annotated[
        bool | None,
        option(
            "For images: whether pixels are divided by 255 first; by default, unless --mean or "
            "--std has a number above 1.",
        ),
    ] = None
    layout: Annotated[
        Axes | None,
        option("For images: the axes of the input, where its shape does not say them."),
    ] = None
    resize: Annotated[
        Fit | None,
        option(
            "For images of another aspect ratio: stretch them (the default), crop the borders, or "
            "pad."
        ),
    ] = None
    channels: Annotated[
        Order | None,
        option("For images: the order of colours in the input; RGB by default."),
    ] = None

    tokenizer: Annotated[
        Path | None,
        option(
            "For text: the model's tokenizer.json, or its folder; by default the one in the "
            "model's folder.",
            metavar="TOKENIZER",
        ),
    ] = None
    length: Annotated[
        int | None,
        option(
            "For text: tokens of a sequence; what the model takes, or 512 where it leaves that "
            "open, and no more than its tables and its folder's configs have positions for.",
            ge=1,
            metavar="TOKENS",
        ),
    ] = None

    def words(self, data: Path) -> list[str]:
        """The options of ``apply`` that fit to the same inputs."""
        found = ["--refit", str(data)]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value == field.default:
                continue
            if isinstance(value, bool):
                found.append(f"--{'' if value else 'no-'}{field.name}")
            elif isinstance(value, tuple):
                sign = "x" if field.name == "size" else ","
                found += [f"--{field.name}", sign.join(f"{number:.12g}" for number in value)]
            else:
                found += [f"--{field.name}", str(value)]
        return found

    def read(
        self, data: Path, model: "ir.Model", seed: int = 0, folder: "ModelFolder | None" = None
    ) -> "Samples":
        """The samples of a file or folder; says what they are, and shows progress.

        Text is split by the tokenizer that stands in the model's folder, if no other is given.

        Raises:
            MorphError: as of :meth:`morphgraph.calibration.Samples.of`.
        """
        from morphgraph.calibration import ImageOptions, Samples, TextOptions
        from morphgraph.calibration.text import is_text

        images = ImageOptions(
            self.size, self.mean, self.std, self.scale, self.layout, self.resize, self.channels
        )
        tokenizer = self.tokenizer
        if tokenizer is None and folder is not None and is_text(data):
            beside = folder.path / "tokenizer.json"
            tokenizer = beside if beside.is_file() else None
        longest = None if folder is None else folder.positions
        text = TextOptions(tokenizer, self.length, longest)
        found = Samples.of(
            data, model, self.samples, seed, images=images, text=text, progress=ProgressLines()
        )
        note(f"calibration data: {found.described}")
        return found
