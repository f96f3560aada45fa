"""Files that appear whole or not at all, in place of nothing that was not to be replaced."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from morphgraph.errors import FileError
from morphgraph.onnx_io.check import escape
from morphgraph.onnx_io.wire import Buffer


def write_atomically(
    path: str | PathLike[str], content: str | bytes | Sequence[Buffer], overwrite: bool
) -> None:
    """Write a file by way of a temporary one in the same folder, so that it is never seen half.

    The content may come in pieces.

    Raises:
        FileError: the file exists already (without ``overwrite``) or cannot be written.
    """
    location = Path(os.path.abspath(path))
    check_target(location, overwrite)
    with os_errors(location):
        handle, temporary = tempfile.mkstemp(prefix=f".{location.name}.", dir=location.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                content = content.encode() if isinstance(content, str) else content
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            put(temporary, location, overwrite)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def put(temporary: str | Path, target: Path, overwrite: bool) -> None:
    """Give a file that is written its name; what another program put there meanwhile is spared.

    Raises:
        FileError: without ``overwrite`` there is something now.
        OSError: it cannot be put there.
    """
    if not overwrite:
        try:
            os.link(temporary, target)  # unlike renaming, this replaces nothing
        except FileExistsError:
            check_target(target, overwrite)
        except OSError:  # a file system without links
            check_target(target, overwrite)
        else:
            os.unlink(temporary)
            return
    os.replace(temporary, target)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a place where no file can be written, or one is that must stay.

    Raises:
        FileError: says which, and what to do.
    """
    where = escape(str(path))
    if path.is_dir():
        raise FileError(f"{where}: is a folder; give a file name in it")
    if not path.parent.is_dir():
        raise FileError(f"{where}: there is no folder '{escape(str(path.parent))}'; make it first")
    if path.exists() and not path.is_file():
        raise FileError(f"{where}: is not an ordinary file, and is not replaced; choose another")
    if path.exists() and not overwrite:
        raise FileError(
            f"{where}: exists already; choose another name, or pass --overwrite (overwrite=True)"
        )


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the system refuses as a ``FileError`` that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError):
            reason += "; check the path"
        raise FileError(f"{escape(str(path))}: {reason}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
