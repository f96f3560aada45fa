"""Labelled images for ``morph``: where they come from, and how they become batches.

A dataset is held as it is stored, in uint8; :class:`Preprocessing` says how images become a
network's input and is recorded with every network that was trained on it. All that is random (the
split of a folder, the order of batches, crops and flips) follows from seeds.
"""

import gzip
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from morphgraph.errors import FileError, MorphError, UnsupportedError
from morphgraph.onnx_io import escape

Images = np.ndarray[Any, np.dtype[np.uint8]]  # [N, height, width, channels]
Labels = np.ndarray[Any, np.dtype[np.int64]]  # [N]
Size = tuple[int, int]  # height, width

# The share of images that is held back for the test where nobody has said which, and the seed of
# that choice.
TEST_SHARE = 0.2
SPLIT_SEED = 0

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".webp"})

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RESIZE_CHUNK = 1024  # images; bounds the memory of a resize


class DataError(MorphError):
    """The training data are broken, or are not what was asked for."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How images become a network's input; plain data, to be recorded beside the network.

    Images are brought to the network's number of channels, resized (bilinear, antialiased, the
    aspect ratio given up), scaled to 0..1, and standardized per channel.

    Attributes:
        size: height and width of the network's input.
        mean: per channel, of the training images on a scale of 0..1.
        std: likewise.
        layout: axes of what comes out.

    >>> gray = Preprocessing(size=(2, 2), mean=(0.5,), std=(0.25,))
    >>> gray(np.full((1, 2, 2, 1), 255, dtype=np.uint8)).tolist()
    [[[[2.0, 2.0], [2.0, 2.0]]]]
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str = "NCHW"

    def __call__(self, images: Images) -> Tensor:
        """``[N, height, width, channels]`` uint8 to ``[N, channels, *size]`` float32."""
        return self.normalise(self.fit(images))

    def fit(self, images: Images) -> Tensor:
        """Images in the network's channels and size, still uint8 ``[N, height, width, channels]``.

        Raises:
            DataError: the network takes neither 1, 3 nor as many channels as the images have.
        """
        return _resize(_with_channels(torch.from_numpy(images), len(self.mean)), self.size)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[N, height, width, channels]`` to float32 ``[N, channels, height, width]``."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        standardized = (images.float() / 255 - mean) / std
        return standardized.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to a training image at random.

    Attributes:
        crop: the image is shifted by up to so many pixels each way; black moves in.
        flip: half of the images are mirrored left to right.
    """

    crop: int = 0
    flip: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images with labels, split in two, and how to feed them to a network."""

    name: str
    classes: tuple[str, ...]
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels
    preprocessing: Preprocessing

    def training_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        augmentation: Augmentation = Augmentation(),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order: inputs ``[batch, channels, *size]`` and labels ``[batch]``.

        The images beyond the last whole batch wait for another epoch, since BatchNorm learns little
        from a batch of one; a dataset smaller than a batch is one batch. The generator's
        state decides order, crops and flips.
        """
        order = torch.randperm(len(self.y_train), generator=generator).numpy()
        for start in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
            chosen = order[start : start + batch_size]
            images = self.preprocessing.fit(self.x_train[chosen])
            images = _augment(images, augmentation, generator)
            yield self.preprocessing.normalise(images), torch.from_numpy(self.y_train[chosen])

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in their order, all of them, as :meth:`training_batches` gives them."""
        for start in range(0, len(self.y_test), batch_size):
            chosen = slice(start, start + batch_size)
            yield self.preprocessing(self.x_test[chosen]), torch.from_numpy(self.y_test[chosen])


def load_data(
    spec: str | PathLike[str],
    data_dir: str | PathLike[str] | None = None,
    size: Size | None = None,
    channels: int | None = None,
) -> Dataset:
    """Read labelled images.

    Args:
        spec: ``digits`` (scikit-learn's, 8x8), ``fashion-mnist``, a folder with one sub-folder of
            images per class, or an ``.npz`` file with ``x_train, y_train, x_test, y_test`` (uint8
            images ``[N, height, width]`` or ``[N, height, width, channels]``, integer labels). A
            folder may hold ``train/`` and ``test/`` (or ``val/``) with the classes in them; else,
            and for ``digits``, a fifth of every class is held back for the test.
        data_dir: where the IDX files of ``fashion-mnist`` lie, if not in Debian's folder.
        size: height and width of the network's input; the images' own if not given. Larger images
            are made smaller here, smaller ones larger when they are fed.
        channels: of the network's input; the images' own if not given. Gray images serve a network
            with three, colour images one with one.

    Raises:
        DataError: the data are broken; says which file or array, and what is wrong with it.
        FileError: there is no such file or folder.
        UnsupportedError: the data need a package that is not installed.
    """
    raw = _read(spec, data_dir, size)
    if not len(raw.y_train) or not len(raw.y_test):
        part = "test" if len(raw.y_train) else "training"
        raise DataError(f"{raw.name}: there are no {part} images; add some")
    x_train, x_test = torch.from_numpy(raw.x_train), torch.from_numpy(raw.x_test)
    if channels is not None:
        x_train, x_test = _with_channels(x_train, channels), _with_channels(x_test, channels)
    if size is not None and prod(size) < prod(x_train.shape[1:3]):
        x_train, x_test = _resize(x_train, size), _resize(x_test, size)
    height, width = x_train.shape[1:3]
    mean, std = _mean_and_std(x_train.numpy())
    preprocessing = Preprocessing(size or (height, width), mean, std)
    return Dataset(
        raw.name,
        raw.classes,
        x_train.numpy(),
        raw.y_train,
        x_test.numpy(),
        raw.y_test,
        preprocessing,
    )


@dataclass(frozen=True, slots=True)
class _Raw:
    """What a reader finds."""

    name: str
    classes: tuple[str, ...]
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels


def _read(
    spec: str | PathLike[str], data_dir: str | PathLike[str] | None, size: Size | None
) -> _Raw:
    if spec == "digits":
        return _read_digits()
    if spec == "fashion-mnist":
        return _read_fashion(FASHION_FOLDER if data_dir is None else Path(data_dir))
    path = Path(spec)
    if path.is_dir():
        return _read_folder(path, size)
    if not path.exists():
        raise FileError(
            f"{escape(fspath(spec))}: there is no such file or folder; give digits, fashion-mnist, "
            "a folder with one sub-folder per class, or an .npz file"
        )
    if path.suffix != ".npz":
        raise DataError(
            f"{escape(str(path))}: not a folder and not an .npz file; "
            "save it with numpy.savez(x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    return _read_npz(path)


# ---- digits


def _read_digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnsupportedError(
            "data 'digits': scikit-learn is not installed; pip install 'morphgraph[data]'"
        ) from None
    bunch = load_digits()
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = bunch.target.astype(np.int64)
    test = _held_back(labels)
    classes = tuple(str(digit) for digit in range(10))
    return _Raw("digits", classes, images[~test], labels[~test], images[test], labels[test])


def _held_back(labels: Labels) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which images are for the test: of every class with two or more a fifth, at least one.

    >>> _held_back(np.repeat([0, 1], 10)).reshape(2, 10).sum(axis=1).tolist()
    [2, 2]
    """
    generator = np.random.default_rng(SPLIT_SEED)
    test = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = max(round(len(members) * TEST_SHARE), 1) if len(members) > 1 else 0
        test[members[:count]] = True
    return test


# ---- IDX files


def _read_fashion(folder: Path) -> _Raw:
    arrays: list[np.ndarray[Any, Any]] = []
    for part in ("train", "t10k"):
        images = _read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"), rank=3)[..., None]
        labels = _read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"), rank=1)
        if len(images) != len(labels):
            raise DataError(
                f"{escape(str(folder))}: {part}: {len(images)} images but {len(labels)} labels; "
                "are the files of one dataset?"
            )
        if len(labels) and labels.max() >= len(FASHION_CLASSES):
            raise DataError(
                f"{escape(str(folder))}: {part}: label {labels.max()} is out of range, "
                f"there are {len(FASHION_CLASSES)} classes"
            )
        arrays += [images, labels.astype(np.int64)]
    return _Raw("fashion-mnist", FASHION_CLASSES, *arrays)


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileError(
        f"{escape(str(folder))}: there is no {name} or {name}.gz; install Debian's "
        "dataset-fashion-mnist, or say with --data-dir where the files lie"
    )


def _read_idx(path: Path, rank: int) -> Images:
    """A uint8 array from an IDX file: 0, 0, type 8, rank, big-endian sizes, then the bytes."""
    where = escape(str(path))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) != 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
                raise DataError(
                    f"{where}: not an IDX file of bytes with {rank} axes; download it again"
                )
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            content = file.read(prod(shape) + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error, OverflowError, MemoryError) as error:
        raise DataError(f"{where}: damaged ({error}); download it again") from None
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the file") from None
    if len(content) != prod(shape):
        raise DataError(
            f"{where}: {shape} needs {prod(shape)} bytes, the file has "
            f"{'more' if len(content) > prod(shape) else len(content)}; download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()  # a writable one, for torch


# ---- .npz files


def _read_npz(path: Path) -> _Raw:
    where = escape(str(path))
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(
                f"{where}: not an .npz file (a zip of arrays); save it with numpy.savez"
            )
        with np.load(path, allow_pickle=False) as stored:  # arrays of objects are refused
            missing = [key for key in wanted if key not in stored.files]
            if missing:
                found = ", ".join(escape(name) for name in stored.files) or "nothing"
                raise DataError(
                    f"{where}: there is no {missing[0]}; needed are {', '.join(wanted)}, "
                    f"found {found}"
                )
            arrays = {key: stored[key] for key in wanted}
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the file") from None
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        words = "it holds pickled objects" if "allow_pickle" in str(error) else str(error)
        raise DataError(
            f"{where}: cannot be read ({escape(words)}); save uint8 images and integer labels with "
            "numpy.savez"
        ) from None

    x_train, x_test = (_as_images(arrays[key], f"{where}: {key}") for key in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{where}: x_test: images are {x_test.shape[1:]}, those of x_train "
            f"{x_train.shape[1:]}; they must be alike"
        )
    y_train = _as_labels(arrays["y_train"], len(x_train), f"{where}: y_train")
    y_test = _as_labels(arrays["y_test"], len(x_test), f"{where}: y_test")
    count = int(y_train.max(initial=-1)) + 1
    if count > len(y_train):
        raise DataError(
            f"{where}: y_train: label {count - 1} is out of range for {len(y_train)} images; "
            "number the classes from 0"
        )
    if y_test.max(initial=-1) >= count:
        raise DataError(
            f"{where}: y_test: label {y_test.max()} is out of range, the largest in y_train is "
            f"{count - 1}"
        )
    classes = tuple(str(label) for label in range(count))
    return _Raw(escape(path.stem), classes, x_train, y_train, x_test, y_test)


def _as_images(array: np.ndarray[Any, Any], where: str) -> Images:
    if array.dtype != np.uint8:
        raise DataError(f"{where}: images are {array.dtype}, wanted are uint8 from 0 to 255")
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{where}: shape {array.shape} is neither [N, height, width] nor [N, height, width, "
            "1 or 3]; move the channels to the end"
        )
    if 0 in images.shape[1:]:
        raise DataError(f"{where}: shape {array.shape}: the images have no pixels")
    return np.ascontiguousarray(images)


def _as_labels(array: np.ndarray[Any, Any], count: int, where: str) -> Labels:
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{where}: labels are {array.dtype}, wanted are integers from 0")
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.shape != (count,):
        raise DataError(f"{where}: shape {array.shape}, but there are {count} images")
    if labels.min(initial=0) < 0:
        raise DataError(f"{where}: label {labels.min()} is out of range; number the classes from 0")
    return labels.astype(np.int64)


# ---- folders


def _read_folder(root: Path, size: Size | None) -> _Raw:
    where = escape(str(root))
    try:
        names = _subfolders(root)
        held = next((name for name in ("test", "val") if name in names), None)
        if "train" in names and held is not None:
            classes = _subfolders(root / "train")
            strange = sorted(set(_subfolders(root / held)) - set(classes))
            if strange:
                raise DataError(
                    f"{where}: class '{escape(strange[0])}' is in {held} but not in train; "
                    "the same classes are needed in both"
                )
            train, y_train = _labelled_files(root / "train", classes)
            test, y_test = _labelled_files(root / held, classes)
        else:
            classes = names
            files, labels = _labelled_files(root, classes)
            back = _held_back(labels)
            train, y_train = [files[i] for i in np.flatnonzero(~back)], labels[~back]
            test, y_test = [files[i] for i in np.flatnonzero(back)], labels[back]
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the folder") from None
    if len(classes) < 2:
        raise DataError(
            f"{where}: there are {len(classes)} classes and two are needed; make one sub-folder "
            "per class, or train/ and test/ with such sub-folders"
        )
    images = _decode_all([*train, *test], size)
    x_train, x_test = images[: len(train)], images[len(train) :]
    escaped = tuple(escape(name) for name in classes)
    return _Raw(escape(root.absolute().name), escaped, x_train, y_train, x_test, y_test)


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _labelled_files(root: Path, classes: Sequence[str]) -> tuple[list[Path], Labels]:
    """The image files of every class, sorted by name, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        if not folder.is_dir():
            continue  # a class without test images
        found = sorted(
            entry
            for entry in folder.iterdir()
            if entry.suffix.lower() in IMAGE_SUFFIXES and entry.name[0] != "."
        )
        if not found:
            raise DataError(
                f"{escape(str(folder))}: there are no images in the folder of this class; add some "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}), or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _decode_all(files: Sequence[Path], size: Size | None) -> Images:
    """All images in one array: of ``size``, or of the one size that they have."""
    images = [torch.from_numpy(_decode(file)) for file in files]
    if size is not None:
        images = [_resize(image, size) for image in images]
    for file, image in zip(files, images, strict=True):
        if image.shape[1:3] != images[0].shape[1:3]:
            raise DataError(
                f"{escape(str(file))}: the image is {_by(image)}, {escape(str(files[0]))} is "
                f"{_by(images[0])}; say to which size to bring them"
            )
    channels = max(image.shape[3] for image in images)
    return torch.cat([_with_channels(image, channels) for image in images]).numpy()


def _by(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"


def _decode(file: Path) -> Images:
    """One image as it is to be looked at, ``[1, height, width, 1 or 3]``."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UnsupportedError(
            f"{escape(str(file))}: Pillow is not installed; pip install 'morphgraph[data]'"
        ) from None
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode[0] in "IF":
                raise DataError(
                    f"{escape(str(file))}: its pixels have more than 8 bits; save it with 8"
                )
            pixels = np.array(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{escape(str(file))}: not an image that can be read ({escape(str(error))}); "
            "replace or remove it"
        ) from None
    return pixels.reshape(1, *pixels.shape[:2], -1)


# ---- pixels: uint8 images, N by height by width by channels


def _with_channels(images: Tensor, channels: int) -> Tensor:
    present = images.shape[3]
    if present == channels:
        return images
    if present == 1:
        return images.expand(-1, -1, -1, channels)
    if present == 3 and channels == 1:
        luma = (images.float() * torch.tensor(_LUMA)).sum(3, keepdim=True)
        return luma.round().to(torch.uint8)
    raise DataError(
        f"the images have {present} channels, the network takes {channels}; convert the images"
    )


def _resize(images: Tensor, size: Size) -> Tensor:
    if images.shape[1:3] == size:
        return images
    resized = torch.empty((len(images), *size, images.shape[3]), dtype=torch.uint8)
    for start in range(0, len(images), _RESIZE_CHUNK):
        chunk = images[start : start + _RESIZE_CHUNK].permute(0, 3, 1, 2).float()
        chunk = F.interpolate(chunk, size, mode="bilinear", antialias=True)
        resized[start : start + _RESIZE_CHUNK] = chunk.round().permute(0, 2, 3, 1)
    return resized


def _mean_and_std(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel on a scale of 0..1; a channel without contrast gets one step of it as deviation.

    >>> mean, std = _mean_and_std(np.array([0, 255], dtype=np.uint8).reshape(1, 2, 1, 1))
    >>> mean, std
    ((0.5,), (0.5,))
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        # From counts of the 256 levels: no copy of the images in floats is made.
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = float(np.average(levels, weights=counts))
        variance = float(np.average((levels - mean) ** 2, weights=counts))
        means.append(mean)
        deviations.append(max(variance**0.5, 1 / 255))
    return tuple(means), tuple(deviations)


def _augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    count, height, width, _ = images.shape
    rows = torch.arange(height).expand(count, -1)  # [N, height]: where each pixel comes from
    columns = torch.arange(width).expand(count, -1)  # [N, width]
    if augmentation.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if augmentation.crop:
        pad = augmentation.crop
        shifts = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
        rows, columns = rows + shifts[0], columns + shifts[1]
        images = F.pad(images, (0, 0, pad, pad, pad, pad))
    return images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
