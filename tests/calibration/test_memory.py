"""Memory does not grow with the number of samples; temporary files go."""

import gc
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.calibration import Samples

ROWS, WIDTH = 75_000, 1000  # 300 MB of float32
BLOCK = 500  # rows that are written at once

# Reads all samples in another process; prints by how many MB its peak has grown, and a sum.
READ = """
import sys
from pathlib import Path
import onnx_ir as ir
from morphgraph.calibration import Samples

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

x = ir.val("x", ir.DataType.FLOAT, ["N", int(sys.argv[2])])
model = ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10)
before = peak()
limit = int(sys.argv[3]) or None
rest, held = Samples.of(sys.argv[1], model, limit).split()
total = sum(float(feed["x"][:, 0].sum()) for part in (rest, held) for feed in part.batches(256))
print(peak() - before, total)
"""


def _header() -> bytes:
    with tempfile.TemporaryFile() as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, WIDTH)}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0)
        return file.read()


def _packed(path: Path) -> None:
    block = np.zeros((BLOCK, WIDTH), np.float32)
    block[:, 0] = 1
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(_header())
        for _ in range(ROWS // BLOCK):
            member.write(block.tobytes())


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(_header())
        file.truncate(file.tell() + 4 * ROWS * WIDTH)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize(("name", "limit"), [("x.npz", 0), ("x.npz", 512), ("x.npy", 0)])
def test_files_are_streamed(name: str, limit: int, tmp_path: Path) -> None:
    path = tmp_path / name
    (_packed if name == "x.npz" else _sparse)(path)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(WIDTH), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, total = map(float, done.stdout.split())
    assert total == (0 if name == "x.npy" else limit or ROWS)
    assert grown < 40


def test_temporary_files_are_gone_with_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["N", 100])
    model = ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10)
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("asks Linux for open files")

    def scratch_files() -> int:
        links = []
        for entry in folder.iterdir():
            try:
                links.append(str(entry.readlink()))
            except OSError:
                continue
        return sum("morphgraph-" in link or str(tmp_path) in link for link in links)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    samples = Samples.of((np.full(100, k) * 1.0 for k in range(50)), model)
    part = samples.split()[1]
    del samples
    gc.collect()
    assert scratch_files() == 1
    assert sum(len(feed["x"]) for feed in part.batches(8)) == 10
    assert list(tmp_path.iterdir()) == []  # it never had a name
    del part
    gc.collect()
    assert scratch_files() == 0
