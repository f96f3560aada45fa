"""Crops of photographs for the stages of a detector of faces: faces, near misses, other things.

The photographs come in packages for Python: a group of six people (insightface), an astronaut, 100
small gray faces and 100 crops without one (scikit-image). No person is both in what a network is
shrunk with and in what it is judged by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pictures = NDArray[np.float32]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Face:
    """Where a face is in a photograph: its middle and the side of its square, in pixels."""

    file: str
    x: int
    y: int
    side: int


_GROUP = "insightface/data/images/t1.jpg"
_ASTRONAUT = "skimage/data/astronaut.png"
_SMALL = "skimage/data/lfw_subset.npy"  # faces first, then as many crops without
_FACES = (
    (Face(_GROUP, 124, 344, 140), Face(_GROUP, 324, 205, 130), Face(_GROUP, 524, 336, 150)),
    (
        Face(_GROUP, 810, 385, 140),
        Face(_GROUP, 970, 120, 150),
        Face(_GROUP, 1184, 340, 130),
        Face(_ASTRONAUT, 225, 120, 120),
    ),
)
_OTHERS = (
    ("skimage/data/coffee.png", "skimage/data/motorcycle_left.png"),
    ("skimage/data/chelsea.png", "skimage/data/rocket.jpg"),
)


def crops(packages: Path, size: int, part: int, count: int, rng: np.random.Generator) -> Pictures:
    """Crops as MTCNN takes them, ``[count, 3, size, size]``.

    A third are near faces of large photographs, a third small gray crops, half of them of faces,
    and a third show other things.

    Args:
        packages: the folder that the packages are installed in.
        size: of the network's input.
        part: 0 for calibration, 1 for the test.
        count: how many.
        rng: what chooses them.
    """
    photographs = {
        name: Image.open(packages / name).convert("RGB")
        for name in {face.file for face in _FACES[part]} | set(_OTHERS[part])
    }
    small = np.load(packages / _SMALL, allow_pickle=False)
    half = len(small) // 2
    own = np.concatenate([np.arange(half)[part::2], half + np.arange(half)[part::2]])
    found = []
    for number in range(count):
        if number % 3 == 0:
            face = _chosen(_FACES[part], rng)
            found.append(_near(photographs[face.file], face, rng))
        elif number % 3 == 1:
            found.append(_jittered(small[rng.choice(own)], rng))
        else:
            found.append(_anywhere(photographs[_chosen(_OTHERS[part], rng)], rng))
    resized = [np.asarray(each.resize((size, size), Image.Resampling.BOX)) for each in found]
    return ((np.stack(resized).transpose(0, 3, 1, 2) - 127.5) / 128).astype(np.float32)


def _chosen(several: Sequence[_T], rng: np.random.Generator) -> _T:
    return several[int(rng.integers(len(several)))]


def _near(photograph: Image.Image, face: Face, rng: np.random.Generator) -> Image.Image:
    side = face.side * rng.uniform(0.7, 1.7)
    x, y = np.array([face.x, face.y]) + face.side * rng.normal(0, 0.15, 2)
    return _square(photograph, x, y, side, rng)


def _anywhere(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = rng.uniform(24, min(photograph.size) / 2)
    x, y = (rng.uniform(side / 2, length - side / 2) for length in photograph.size)
    return _square(photograph, x, y, side, rng)


def _jittered(gray: NDArray[np.float64], rng: np.random.Generator) -> Image.Image:
    """A small gray picture, 25 pixels wide, in colours that all are that gray."""
    picture = Image.fromarray((255 * gray).astype(np.uint8)).convert("RGB")
    x, y = 12.5 + rng.uniform(-2, 2, 2)
    return _square(picture, x, y, rng.uniform(20, 25), rng)


def _square(
    picture: Image.Image, x: float, y: float, side: float, rng: np.random.Generator
) -> Image.Image:
    """A square cut out, brighter or darker, mirrored or not."""
    left, top, length = round(x - side / 2), round(y - side / 2), round(side)
    gain = rng.uniform(0.7, 1.3)
    cut = picture.crop((left, top, left + length, top + length)).point(
        lambda value: min(255, value * gain)
    )
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut
