"""Read small files of users: ordinary ones of a bounded size, with one line for what is wrong."""

import codecs
import os
import stat
from os import PathLike
from typing import TypeVar

import msgspec

from morphgraph.errors import FileError, MorphError
from morphgraph.onnx_io.check import escape

MAX_BYTES = 64 * 2**20
"""No plan, result, config or list is larger; what claims to be one is another file."""

_T = TypeVar("_T")


def read_bounded(
    path: str | PathLike[str], broken: type[MorphError], limit: int = MAX_BYTES
) -> bytes:
    """The content of a file that may have at most so many bytes.

    A pipe or a device, which may never end, is not opened.

    Raises:
        FileError: there is no such file, it is no ordinary one, or it cannot be read.
        MorphError: of the type ``broken``: it is larger.
    """
    where = escape(os.fspath(path))
    try:
        require_ordinary(path)
        size = os.stat(path).st_size
        if size > limit:
            raise broken(
                f"{where}: {size} bytes are more than such a file can have ({limit}); is this the "
                "right file?"
            )
        with open(path, "rb") as file:
            return file.read(limit)  # also where it grows meanwhile
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}; check the path") from None


def require_ordinary(path: str | PathLike[str]) -> None:
    """Refuse what is not an ordinary file, without opening it.

    Raises:
        FileError: it is a folder, a pipe or a device.
        OSError: there is no such file, or nobody may look at it.
    """
    mode = os.stat(path).st_mode
    where = escape(os.fspath(path))
    if stat.S_ISDIR(mode):
        raise FileError(f"{where}: is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise FileError(f"{where}: is not an ordinary file; give one")


def from_json(data: bytes, type: type[_T]) -> _T:  # noqa: A002  # as msgspec calls it
    """What JSON says, as a type.

    Raises:
        ValueError: it is none, or says something else; in words for a message of one line.

    >>> from_json(b"[1]", list[int]), from_json("[1]".encode("utf-16"), list[int])
    ([1], [1])
    """
    try:
        return msgspec.json.decode(_utf8(data), type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(escape(str(error))) from None


def _utf8(data: bytes) -> bytes:
    """Text without a mark of its encoding, as editors and shells of Windows write it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16").encode()
    return data.removeprefix(codecs.BOM_UTF8)
