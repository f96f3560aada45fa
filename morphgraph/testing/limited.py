"""Run command lines where they can do no harm: in another process, with limited memory and time.

All lines of one call share a process, since each start would cost half a second. A crash, a hang or
an exit there is an error here. What lies in a line's folder is compared before and after it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

MEMORY_BYTES = 4 * 2**30
_HASHED_BYTES = 2**26  # a larger file is told by its size and when it was written

# Runs the command lines that stdin lists as JSON, each in its folder. Standard streams are caught
# at the level of file descriptors, where libraries in C++ write.
_DRIVER = """
import ctypes, faulthandler, json, os, resource, sys, tempfile
faulthandler.enable()
from morphgraph.cli import main
from morphgraph.testing.limited import contents
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
if sys.platform == "linux":  # without capabilities also root may do only what permissions say
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, sets)
results, keep = os.fdopen(os.dup(1), "w"), os.dup(2)
for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    before = contents(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        code = main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(keep, 2)
        out.seek(0), err.seek(0)
        said = out.read().decode(), err.read().decode()
    after = contents(folder)
    made = [name for name in after if name not in before]
    spoilt = [name for name in before if after.get(name) != before[name]]
    results.write(json.dumps([code, *said, made, spoilt]) + "\\n"), results.flush()
"""

Job = tuple[Path, Sequence[str]]
"""A folder, and the arguments of a command line that runs in it."""


@dataclass(frozen=True)
class Ran:
    """What a command line came to.

    Attributes:
        code: its exit code.
        out, err: what it wrote to stdout and stderr.
        made: paths in its folder that were not there before.
        spoilt: those that are gone or have other contents.
    """

    code: int
    out: str
    err: str
    made: tuple[str, ...]
    spoilt: tuple[str, ...]


def run_limited(
    jobs: Iterable[Job], seconds: float, memory_bytes: int = MEMORY_BYTES, file_bytes: int = 0
) -> list[Ran]:
    """Run command lines one after the other in one process.

    Args:
        jobs: the lines.
        seconds: all together, after which the process is killed.
        memory_bytes: of address space that the process may take.
        file_bytes: that a file may become long, as on a disk that is full; 0: any number.

    Raises:
        RuntimeError: the process was killed, or ended by itself; names the line.
    """
    lines = [(str(folder), list(arguments)) for folder, arguments in jobs]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(  # noqa: S603  # this interpreter
        [sys.executable, "-c", _DRIVER, str(memory_bytes), str(file_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    how = ""
    try:
        results, said = process.communicate(json.dumps(lines), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        results, said = process.communicate()
        how = f"took more than {seconds} s"
    found = [json.loads(line) for line in results.splitlines()]
    if process.returncode or len(found) < len(lines):
        ended = how or f"ended the process with {process.returncode}"
        raise RuntimeError(
            f"{lines[len(found)] if len(found) < len(lines) else '?'}: {ended}: {said}"
        )
    return [
        Ran(code, out, err, tuple(made), tuple(spoilt)) for code, out, err, made, spoilt in found
    ]


def contents(folder: str | os.PathLike[str]) -> dict[str, str]:
    """What lies in a folder, by path in it: hashes of readable files, kinds of what is none."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        kind = path.lstat()
        is_read = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        if is_read and kind.st_size < _HASHED_BYTES:
            found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
        else:
            shown = f"{kind.st_mode:o} {kind.st_size} {kind.st_mtime_ns}"
            found[str(path.relative_to(folder))] = shown
    return found
