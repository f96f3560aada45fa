"""How images become a network's input: as the user says, or as the file does.

Images are brought to the network's channels and size in 8 bits, divided by 255 or not, and
standardized: ``(pixel - mean) / std`` per channel.
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.calibration.decode import Pixels
from morphgraph.calibration.rows import MemoryRows, Rows
from morphgraph.errors import ArgumentError, DataError, UnsupportedError
from morphgraph.onnx_io import PREPROCESSING_KEY, dtype_of, escape, is_float
from morphgraph.onnx_io.inputs import described
from morphgraph.options import Axes as Axes, Fit as Fit, Order as Order

Size = tuple[int, int]  # height, width

_CHANNELS = (1, 3)
_GRAY = 114  # of the borders that Ultralytics adds


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What somebody said about the preprocessing of images; ``None`` where nothing was said.

    Attributes:
        size: height and width of the input.
        mean, std: per channel in the order in which the network takes them, or one for all; on
            the scale that pixels have after the division, if there is one.
        scale: whether pixels are divided by 255. If nobody says it, they are, unless mean or std
            has a number above 1.
        layout: which axes the input has.
        resize: how images of another shape are brought to ``size``.
        channels: the order of colours.
        border: gray of 0 to 255 that is added by ``"pad"``; the mean if nobody says it.
    """

    size: Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: bool | None = None
    layout: Axes | None = None
    resize: Fit | None = None
    channels: Order | None = None
    border: int | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def or_else(self, other: "ImageOptions") -> "ImageOptions":
        """The same, and what another says where this says nothing."""
        said = {
            field.name: getattr(other, field.name)
            for field in fields(self)
            if getattr(self, field.name) is None
        }
        return replace(self, **said)


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An input that takes images, and what is done to them before.

    Attributes:
        value: the input.
        size: its height and width.
        mean, std: per channel, ``[channels]``; standardization of pixels of 0 to 255.
        is_nchw: whether channels stand before height and width.
        options: what was chosen.
    """

    value: ir.Value
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_nchw: bool
    options: ImageOptions

    @property
    def shape(self) -> Shape:
        """The sizes of one image as the network takes it."""
        channels = len(self.mean)
        return (channels, *self.size) if self.is_nchw else (*self.size, channels)

    @property
    def described(self) -> str:
        """In words, what is done to images.

        The numbers are those that were given, which refer to the scale that was chosen.
        """
        fit = {"stretch": "resized", "crop": "resized and cropped", "pad": "resized and padded"}
        parts = [f"{fit[self.options.resize or 'stretch']} to {self.size[0]}x{self.size[1]}"]
        if is_float(self.value):
            scale = _divides(self.options)
            parts.append("divided by 255" if scale else "not divided by 255")
            if self.options.mean is not None or self.options.std is not None:
                parts.append(f"mean {_numbers(self.options.mean or (0.0,))}")
                parts.append(f"std {_numbers(self.options.std or (1.0,))}")
        parts.append("gray" if len(self.mean) == 1 else self.options.channels or "RGB")
        return ", ".join(parts)

    def fit(self, image: Pixels) -> Pixels:
        """One image ``[height, width, channels]`` in the network's channels and size."""
        if image.shape[:2] == self.size and image.shape[2] == len(self.mean):
            return image
        picture = _picture(image).convert("L" if len(self.mean) == 1 else "RGB")
        fitted = _FITS[self.options.resize or "stretch"](picture, self.size, self._border)
        return np.asarray(fitted).reshape(*self.size, -1)

    @property
    def _border(self) -> tuple[int, ...]:
        if self.options.border is not None:
            return (self.options.border,) * len(self.mean)
        colours = [min(max(round(mean), 0), 255) for mean in self.mean]
        return tuple(colours[::-1] if self.options.channels == "BGR" else colours)

    def normalise(self, images: Pixels) -> Array:
        """Images ``[N, height, width, channels]`` as the network takes them."""
        if self.options.channels == "BGR":
            images = images[..., ::-1]
        typed: Array = images
        if is_float(self.value):
            mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
            typed = ((images.astype(np.float32) - mean) / std).astype(dtype_of(self.value))
        return np.ascontiguousarray(typed.transpose(0, 3, 1, 2) if self.is_nchw else typed)


def with_stated(options: ImageOptions, found: ImageOptions, value: ir.Value) -> ImageOptions:
    """What the user said, and for the rest what the file states.

    Scale, mean and standard deviation belong together, and come from one of the two. A size that a
    file states does not count where its input has one.
    """
    if options.scale is not None or options.mean or options.std:
        found = replace(found, scale=None, mean=None, std=None)
    if all(isinstance(size, int) for size in list(value.shape or ())[1:]):
        found = replace(found, size=None)
    return options.or_else(found)


def image_input(value: ir.Value, options: ImageOptions, where: str) -> ImageInput:
    """An input that takes images.

    Raises:
        ArgumentError: what was said contradicts the input or itself.
        UnsupportedError: the input takes no images.
    """
    sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
    if len(sizes) not in (3, 4):
        raise UnsupportedError(
            f"{where}images do not fit input {described(value)}; give arrays in an .npz file"
        )
    last = sizes[-3:]
    is_nchw = _is_nchw(last, options.layout, value, where)
    channels, *space = last if is_nchw else (last[2], *last[:2])
    if channels is None:
        channels = max((len(each or ()) for each in (options.mean, options.std)), default=0)
        channels = channels if channels in _CHANNELS and options.mean else 3
    if channels not in _CHANNELS:
        raise UnsupportedError(
            f"{where}input {described(value)} has {channels} channels, images have 1 or 3; give "
            "arrays in an .npz file"
        )
    size = _size(space, options.size, value, where)
    if not is_float(value) and (options.mean or options.std or options.scale):
        raise ArgumentError(
            f"{where}input {described(value)} takes pixels as they are; leave out --mean, --std "
            "and --scale"
        )
    factor = 255.0 if _divides(options) else 1.0
    mean = tuple(factor * m for m in _per_channel("mean", options.mean or (0.0,), channels))
    std = tuple(factor * s for s in _per_channel("std", options.std or (1.0,), channels))
    if not all(s > 0 for s in std):
        raise ArgumentError(f"--std {_numbers(options.std or ())}: give numbers above 0")
    return ImageInput(value, size, mean, std, is_nchw, options)


def _is_nchw(sizes: Sequence[int | None], layout: Axes | None, value: ir.Value, where: str) -> bool:
    """Whether channels stand first; said by the user, else by the axis that has 1 or 3."""
    if layout is not None:
        return layout == "NCHW"
    first, second, last = sizes
    if first in _CHANNELS or last in _CHANNELS:
        return first in _CHANNELS
    if first is None and last is None:
        raise ArgumentError(
            f"{where}input {described(value)} does not say where the channels stand; give "
            "--layout NCHW or NHWC"
        )
    return first is None or last is not None or second is None


def _size(space: Sequence[int | None], size: Size | None, value: ir.Value, where: str) -> Size:
    """Height and width: those of the input where it says them, else those that were chosen."""
    if size is not None and any(
        own is not None and own != given for own, given in zip(space, size, strict=True)
    ):
        raise ArgumentError(
            f"{where}--size {size[0]}x{size[1]}: the model takes {described(value)}; leave the "
            "option out"
        )
    found = [own or given for own, given in zip(space, size or (None, None), strict=True)]
    if found[0] is None or found[1] is None:
        raise ArgumentError(
            f"{where}input {described(value)} leaves height and width open; say with --size HxW to "
            "what size images are brought"
        )
    return found[0], found[1]


def _per_channel(name: str, numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(numbers) not in (1, channels):
        raise ArgumentError(
            f"--{name} {_numbers(numbers)}: the model takes {channels} channels; give {channels} "
            "numbers or one"
        )
    return numbers if len(numbers) == channels else numbers * channels


def _divides(options: ImageOptions) -> bool:
    """Whether pixels are divided by 255."""
    if options.scale is not None:
        return options.scale
    return all(abs(number) <= 1 for number in (*(options.mean or ()), *(options.std or ())))


def _numbers(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:.6g}" for number in numbers)


# ---- pictures


def _picture(image: Pixels) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UnsupportedError(
            "images of another size or colour: Pillow is not installed; "
            "pip install 'morphgraph[data]'"
        ) from None
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _stretched(picture: Any, size: Size, _border: tuple[int, ...]) -> Any:
    from PIL import Image

    return picture.resize(size[::-1], Image.Resampling.BILINEAR)  # antialiased where it shrinks


def _cropped(picture: Any, size: Size, _border: tuple[int, ...]) -> Any:
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)


def _padded(picture: Any, size: Size, border: tuple[int, ...]) -> Any:
    from PIL import Image, ImageOps

    colour = border[0] if len(border) == 1 else border
    return ImageOps.pad(picture, size[::-1], Image.Resampling.BILINEAR, color=colour)


_FITS: dict[str, Callable[[Any, Size, tuple[int, ...]], Any]] = {
    "stretch": _stretched,
    "crop": _cropped,
    "pad": _padded,
}


# ---- what files say


def stated(model: ir.Model) -> ImageOptions:
    """What a model's metadata say about the images that it takes.

    Three kinds are known: what ``morph`` writes; the keys of ONNX's specification
    (``Image.BitmapPixelFormat``, ``Image.NominalPixelRange``); and those of Ultralytics (``imgsz``,
    with whose networks images are padded and divided by 255, or cropped by classifiers).

    >>> model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
    >>> model.metadata_props["Image.BitmapPixelFormat"] = "Bgr8"
    >>> model.metadata_props["Image.NominalPixelRange"] = "NominalRange_0_255"
    >>> found = stated(model)
    >>> found.channels, found.scale
    ('BGR', False)
    """
    metadata = dict(model.metadata_props)
    found = _of_morph(metadata)
    return found.or_else(_of_onnx(metadata)).or_else(_of_ultralytics(metadata))


def _of_morph(metadata: Mapping[str, str]) -> ImageOptions:
    try:
        record = json.loads(metadata.get(PREPROCESSING_KEY, "null"))
        if not isinstance(record, dict):
            return ImageOptions()
        height, width = map(int, record["size"])
        layout = record.get("layout", "NCHW")
        return ImageOptions(
            size=(height, width),
            mean=tuple(map(float, record["mean"])),
            std=tuple(map(float, record["std"])),
            scale=True,
            layout=layout if layout in get_args(Axes) else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the model's metadata '{PREPROCESSING_KEY}' cannot be read ({escape(str(error))}); "
            "say what is done to images with --size, --mean and --std"
        ) from None


# https://onnx.ai/onnx/repo-docs/MetadataProps.html: keys and values are case insensitive.
_RANGES = {
    "nominalrange_0_255": ImageOptions(scale=False),
    "normalized_0_1": ImageOptions(scale=True),
    "normalized_1_1": ImageOptions(scale=True, mean=(0.5,), std=(0.5,)),
    "nominalrange_16_235": ImageOptions(scale=False, mean=(-16 * 255 / 219,), std=(255 / 219,)),
}
_FORMATS: dict[str, ImageOptions] = {
    "rgb8": ImageOptions(channels="RGB"),
    "bgr8": ImageOptions(channels="BGR"),
}


def _of_onnx(metadata: Mapping[str, str]) -> ImageOptions:
    lower = {key.lower(): value.lower() for key, value in metadata.items()}
    colours = _FORMATS.get(lower.get("image.bitmappixelformat", ""), ImageOptions())
    return colours.or_else(_RANGES.get(lower.get("image.nominalpixelrange", ""), ImageOptions()))


def _of_ultralytics(metadata: Mapping[str, str]) -> ImageOptions:
    if metadata.get("author") != "Ultralytics":
        return ImageOptions()
    crops = metadata.get("task") == "classify"
    said = ImageOptions(scale=True, channels="RGB", resize="crop" if crops else "pad", border=_GRAY)
    try:
        size = ast.literal_eval(metadata.get("imgsz", ""))
        height, width = (size, size) if isinstance(size, int) else map(int, size)
    except (ValueError, TypeError, SyntaxError):
        return said
    return replace(said, size=(height, width))


# ---- arrays of pixels


class PixelRows:
    """Rows of an array of pixels, as the network takes them.

    Args:
        rows: uint8 ``[N, height, width, channels]``, ``[N, channels, height, width]``,
            ``[N, height, width]``, or one image without its first axis.
        images: what the input takes.
        where: what messages begin with.

    Raises:
        DataError: the array has another shape.
    """

    def __init__(self, rows: Rows, images: ImageInput, where: str) -> None:
        self._images = images
        self._rows, self._channels_first = _as_images(rows, len(images.mean), where)

    @property
    def shape(self) -> Shape:
        """The sizes of the whole array, as the network takes it."""
        return (self._rows.shape[0], *self._images.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the network takes."""
        return dtype_of(self._images.value)

    def reshaped(self, shape: Shape) -> Rows:
        """The same numbers in another shape."""
        return MemoryRows(self.take(0, range(self._rows.shape[0])).reshape(shape))

    def choose(self, axis: int, indices: IntArray) -> None:
        """Promise that no other rows will be asked for."""
        self._rows.choose(axis, indices)

    def take(self, axis: int, indices: Sequence[int]) -> Array:
        """Some images."""
        assert axis == 0
        images = self._rows.take(0, indices)
        if self._channels_first:
            images = images.transpose(0, 2, 3, 1)
        fitted = [self._images.fit(image) for image in images]
        return self._images.normalise(np.stack(fitted))


def _as_images(rows: Rows, channels: int, where: str) -> tuple[Rows, bool]:
    """Rows of images, and whether their channels stand before height and width."""
    shape = rows.shape
    if len(shape) == 3 and shape[2] not in _CHANNELS and not (channels == 3 and shape[0] == 3):
        return rows.reshaped((*shape, 1)), False  # gray images
    if len(shape) == 2:
        return rows.reshaped((1, *shape, 1)), False
    if len(shape) == 3:
        rows = rows.reshaped((1, *shape))
    if len(rows.shape) == 4 and rows.shape[3] in _CHANNELS:
        return rows, False
    if len(rows.shape) == 4 and rows.shape[1] in _CHANNELS:
        return rows, True
    raise DataError(
        f"{where}pixels of shape {list(shape)} are no images; give [N, height, width, 1 or 3]"
    )
