"""Labelled images for ``morph``, and how they become batches.

A dataset is held as it is stored, in uint8; :class:`Preprocessing` says how images become a
network's input and is recorded with every network that was trained on it. All that is random (the
split of a folder, the order of batches, crops and flips) follows from seeds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from os import PathLike

import torch
from torch import Tensor
from torch.nn import functional as F

from morphgraph.errors import DataError
from morphgraph.recipes.images import (
    Images,
    Size,
    mean_and_std,
    resized,
    with_channels,
)
from morphgraph.recipes.readers import Raw, read


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

    >>> import numpy as np
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
        return resized(with_channels(torch.from_numpy(images), len(self.mean)), self.size)

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
class Dataset(Raw):
    """Images with labels, split in two, and how to feed them to a network."""

    preprocessing: Preprocessing

    def training_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        augmentation: Augmentation = Augmentation(),
        share: Callable[[int], slice] = slice,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order: inputs ``[batch, channels, *size]`` and labels ``[batch]``.

        The images beyond the last whole batch wait for another epoch, since BatchNorm learns little
        from a batch of one; a dataset smaller than a batch is one batch. The generator's
        state decides order, crops and flips. Of every batch only a share is computed: ``share``
        says which of so many images, all of them by default.
        """
        order = torch.randperm(len(self.y_train), generator=generator).numpy()
        for start in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
            chosen = order[start : start + batch_size]
            moves = _moves(len(chosen), self.preprocessing.size, augmentation, generator)
            own = share(len(chosen))
            images = self.preprocessing.fit(self.x_train[chosen[own]])
            images = _moved(images, moves[0][own], moves[1][own], augmentation.crop)
            yield self.preprocessing.normalise(images), torch.from_numpy(self.y_train[chosen[own]])

    def test_batches(
        self, batch_size: int, which: slice = slice(None)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in their order, as :meth:`training_batches` gives them.

        All of them, or those of some batches: ``which`` counts batches.
        """
        for start in range(0, len(self.y_test), batch_size)[which]:
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
    raw = read(spec, data_dir, size)
    if not len(raw.y_train) or not len(raw.y_test):
        part = "test" if len(raw.y_train) else "training"
        raise DataError(f"{raw.name}: there are no {part} images; add some")
    x_train, x_test = torch.from_numpy(raw.x_train), torch.from_numpy(raw.x_test)
    if channels is not None:
        x_train, x_test = with_channels(x_train, channels), with_channels(x_test, channels)
    if size is not None and prod(size) < prod(x_train.shape[1:3]):
        x_train, x_test = resized(x_train, size), resized(x_test, size)
    height, width = x_train.shape[1:3]
    mean, std = mean_and_std(x_train.numpy())
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


def _moves(
    count: int, size: Size, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Where each pixel of so many images comes from: rows ``[N, height]``, columns ``[N, width]``.

    With a crop they count from the corner of the border that moves in.
    """
    height, width = size
    rows = torch.arange(height).expand(count, -1)
    columns = torch.arange(width).expand(count, -1)
    if augmentation.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if augmentation.crop:
        top = 2 * augmentation.crop + 1
        shifts = torch.randint(0, top, (2, count, 1), generator=generator)
        rows, columns = rows + shifts[0], columns + shifts[1]
    return rows, columns


def _moved(images: Tensor, rows: Tensor, columns: Tensor, border: int) -> Tensor:
    """Images ``[N, height, width, channels]`` behind a black border, each pixel moved."""
    if border:
        images = F.pad(images, (0, 0, border, border, border, border))
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
