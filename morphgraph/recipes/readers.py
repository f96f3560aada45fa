"""Where labelled images come from: scikit-learn's digits, IDX files, ``.npz`` files, folders."""

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from morphgraph.arrays import Array, Flags
from morphgraph.calibration.decode import IMAGE_SUFFIXES, decode
from morphgraph.errors import DataError, FileError, UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.recipes.images import Images, Labels, Size, resized, with_channels

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


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Images ``[N, height, width, channels]`` and labels ``[N]``, split in two, as read."""

    name: str
    classes: tuple[str, ...]
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels


def read(spec: str | PathLike[str], data_dir: str | PathLike[str] | None, size: Size | None) -> Raw:
    """The images that a spec names (:func:`morphgraph.recipes.data.load_data` lists them).

    Args:
        spec: a dataset's name, a folder, or an ``.npz`` file.
        data_dir: where the IDX files of ``fashion-mnist`` lie.
        size: to which the images of a folder are brought.
    """
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


def _read_digits() -> Raw:
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
    return Raw("digits", classes, images[~test], labels[~test], images[test], labels[test])


def _held_back(labels: Labels) -> Flags:
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


def _read_fashion(folder: Path) -> Raw:
    arrays: list[Array] = []
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
    return Raw("fashion-mnist", FASHION_CLASSES, *arrays)


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


def _read_npz(path: Path) -> Raw:
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
                present = ", ".join(escape(name) for name in stored.files) or "nothing"
                raise DataError(
                    f"{where}: there is no {missing[0]}; needed are {', '.join(wanted)}, "
                    f"found {present}"
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
    return Raw(escape(path.stem), classes, x_train, y_train, x_test, y_test)


def _as_images(array: Array, where: str) -> Images:
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


def _as_labels(array: Array, count: int, where: str) -> Labels:
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{where}: labels are {array.dtype}, wanted are integers from 0")
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.shape != (count,):
        raise DataError(f"{where}: shape {array.shape}, but there are {count} images")
    if labels.min(initial=0) < 0:
        raise DataError(f"{where}: label {labels.min()} is out of range; number the classes from 0")
    return labels.astype(np.int64)


# ---- folders


def _read_folder(root: Path, size: Size | None) -> Raw:
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
    return Raw(escape(root.absolute().name), escaped, x_train, y_train, x_test, y_test)


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
        images = sorted(
            entry
            for entry in folder.iterdir()
            if entry.suffix.lower() in IMAGE_SUFFIXES and entry.name[0] != "."
        )
        if not images:
            raise DataError(
                f"{escape(str(folder))}: there are no images in the folder of this class; add some "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}), or remove the folder"
            )
        files += images
        labels += [label] * len(images)
    return files, np.array(labels, dtype=np.int64)


def _decode_all(files: Sequence[Path], size: Size | None) -> Images:
    """All images in one array: of ``size``, or of the one size that they have."""
    images = [torch.from_numpy(decode(file)) for file in files]
    if size is not None:
        images = [resized(image, size) for image in images]
    for file, image in zip(files, images, strict=True):
        if image.shape[1:3] != images[0].shape[1:3]:
            raise DataError(
                f"{escape(str(file))}: the image is {_by(image)}, {escape(str(files[0]))} is "
                f"{_by(images[0])}; say to which size to bring them"
            )
    channels = max(image.shape[3] for image in images)
    return torch.cat([with_channels(image, channels) for image in images]).numpy()


def _by(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
