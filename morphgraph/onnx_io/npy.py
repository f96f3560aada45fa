"""NumPy's files: what stands before the numbers, and how much memory these would take.

Nothing is unpickled, and no memory is taken for numbers that a file does not have.
"""

import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from os import PathLike
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from morphgraph.onnx_io.check import escape

UNREADABLE = (
    *(ValueError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What the standard library and NumPy raise for files that are damaged, or are no arrays."""


@dataclass(frozen=True)
class Header:
    """What stands before the numbers of an array in a file.

    Attributes:
        offset: bytes before the numbers.
        shape, dtype: of the array.
        columns: whether its first axis runs fastest (Fortran's order).
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns: bool

    @property
    def nbytes(self) -> int:
        """How many bytes the numbers take."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes]) -> Header:
    """The header of an array in NumPy's format, from where the file stands.

    Raises:
        ValueError: it is none, or the array holds objects, which are never unpickled.
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    readers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    if version not in ((1, 0), (2, 0)):
        raise ValueError("its format is newer than what is known")
    try:
        shape, columns, dtype = readers[version[0] - 1](file)
    except (SyntaxError, TypeError, RecursionError, MemoryError, TokenError) as error:
        raise ValueError("its header is damaged") from error  # NumPy parses it as Python
    if dtype.hasobject or dtype.names:
        raise ValueError("it holds pickled objects and not plain numbers")
    if any(size < 0 for size in shape):
        raise ValueError("its shape has a negative size")
    return Header(file.tell() - start, tuple(shape), dtype, columns and len(shape) > 1)


def headers(archive: zipfile.ZipFile) -> Iterator[tuple[zipfile.ZipInfo, Header]]:
    """The members of an ``.npz`` file, each with its header; none of their numbers is read.

    Raises:
        ValueError: one is no array, or is cut short.
    """
    for info in archive.infolist():
        with archive.open(info) as member:
            header = read_header(member)
        if info.file_size - header.offset < header.nbytes:
            raise ValueError(f"array '{escape(info.filename)}' is cut short")
        yield info, header


def check_memory(path: str | PathLike[str]) -> None:
    """Refuse a file whose arrays could not stand in this machine's memory, or are not all there.

    Raises:
        ValueError: it is no file of arrays, is cut short, or says how much memory is missing.
        OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            need = sum(header.nbytes for _, header in headers(archive))
    else:
        with open(path, "rb") as file:
            header = read_header(file)
            need = header.nbytes
            if file.seek(0, os.SEEK_END) - header.offset < need:
                raise ValueError("it is cut short")
    have = _memory()
    if have and need > have:
        raise ValueError(f"its numbers take {need} bytes, this machine has {have}")


def _memory() -> int:
    """Bytes of memory of this machine; 0 where nobody knows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return 0
