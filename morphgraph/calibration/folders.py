"""Samples in a folder: images, arrays in files."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from morphgraph.calibration.decode import IMAGE_SUFFIXES, decode
from morphgraph.calibration.images import ImageInput, PixelRows
from morphgraph.calibration.progress import Progress
from morphgraph.calibration.rows import FileRows, Scratch
from morphgraph.errors import DataError, warn
from morphgraph.onnx_io import escape

_READABLE = 0.9  # share of images without which a folder is refused
_SHOWN = 4


def files_in(root: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files with these suffixes in a folder and those below it, sorted; none that is hidden."""
    return sorted(path for path in _files(root) if path.suffix.lower() in suffixes)


def _files(root: Path) -> Iterator[Path]:
    seen: set[str] = set()  # links may lead to a folder above
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")
        yield from (Path(folder) / name for name in names if name[0] != ".")


def holds(root: Path) -> str:
    """What a folder holds, for the message that it is not what was wanted."""
    counts = Counter(path.suffix.lower() or "files without a suffix" for path in _files(root))
    if not counts:
        return "no files"
    return ", ".join(f"{count} {escape(name)}" for name, count in counts.most_common(_SHOWN))


def no_samples(root: Path) -> DataError:
    """The error for a folder that holds nothing that is known."""
    return DataError(
        f"{escape(str(root))}: holds {holds(root)}; give a folder of images "
        f"({', '.join(sorted(IMAGE_SUFFIXES))}), of .npz files or of .npy files"
    )


def image_rows(files: Sequence[Path], images: ImageInput, progress: Progress) -> PixelRows:
    """Images, decoded once and kept in a temporary file in the size that the network takes.

    A few that cannot be read are left out with a warning.

    Raises:
        DataError: more than a few cannot be read; names the first.
        UnsupportedError: Pillow is not installed.
    """
    scratch = Scratch()
    broken: list[DataError] = []
    for number, file in enumerate(files, 1):
        try:
            image = images.fit(decode(file)[0])
        except DataError as error:
            broken.append(error)
        else:
            scratch.file.write(np.ascontiguousarray(image).data)
        progress("reading images", number, len(files))
    if len(broken) > (1 - _READABLE) * len(files):
        raise DataError(f"{len(broken)} of {len(files)} images cannot be read: {broken[0]}")
    if broken:
        rest = f"; {len(broken)} such images of {len(files)} are left out"
        warn(f"{broken[0]}{rest}")
    scratch.file.flush()
    shape = (len(files) - len(broken), *images.size, len(images.mean))
    return PixelRows(FileRows(scratch, 0, shape, np.dtype(np.uint8)), images, "")
