"""Image files as they are stored: pixels of 8 bits."""

from pathlib import Path
from typing import Any

import numpy as np

from morphgraph.errors import DataError, UnsupportedError
from morphgraph.onnx_io import escape

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [images, height, width, channels]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def decode(file: Path) -> Pixels:
    """One image as it is to be looked at, ``[1, height, width, 1 or 3]``.

    Raises:
        DataError: it is none, or cannot be read.
        UnsupportedError: Pillow is not installed.
    """
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
