"""One run per folder: whoever writes to a folder holds a lock on it, which ends with the process.

The lock is on the folder itself (``flock``): a run that is killed leaves nothing behind.
"""

import os
import sys
from pathlib import Path

from morphgraph.errors import FileError
from morphgraph.onnx_io import escape


class FolderLock:
    """A lock on a folder that exists, until it is closed.

    File systems and platforms without locks are written to as they are.

    Raises:
        FileError: another process, or another run of this one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        if sys.platform == "win32":
            return
        import fcntl

        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise FileError(
                f"{escape(str(folder))}: another run writes to this folder now; wait until it has "
                "ended, or give another folder"
            ) from None
        except OSError:
            self.close()

    def close(self) -> None:
        """Give the folder free."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
