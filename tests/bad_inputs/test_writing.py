"""Where results cannot be written: one line, exit code 4, nothing half there, inputs untouched."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import morphgraph as mg
from morphgraph.errors import FileError
from morphgraph.onnx_io import write_atomically
from morphgraph.recipes.lock import FolderLock
from morphgraph.testing.limited import run_limited

TIMEOUT_SECONDS = 120


@pytest.fixture
def folder(tmp_path: Path, sound_model: Callable[[], onnx.ModelProto]) -> Path:
    """A folder with models (weights inside, and beside), a plan, and data."""
    proto = sound_model()
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    mg.uniform(mg.lift(proto), 0.5).save(tmp_path / "plan.json")
    images = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=images)
    wide = sound_model()
    for tensor, shape in zip(wide.graph.initializer, ((64, 3, 3, 3), (4, 64, 1, 1)), strict=True):
        array = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    mg.uniform(mg.lift(wide), 0.9).save(tmp_path / "wide.json")
    beside = tmp_path / "beside"
    beside.mkdir()
    onnx.save(
        wide, beside / "wide.onnx", save_as_external_data=True, location="weights.data",
        size_threshold=100,
    )  # fmt: skip
    return tmp_path


LINES: dict[str, list[str]] = {
    "apply": ["apply", "model.onnx", "plan.json", "-o", "OUT/new.onnx"],
    "apply beside": ["apply", "beside/wide.onnx", "wide.json", "-o", "OUT/new.onnx"],
    "plan": ["plan", "model.onnx", "--uniform", "0.5", "-o", "OUT/new.json"],
    "expand": ["expand", "model.onnx", "plan.json", "--budget", "flops=100%", "-o", "OUT/new.json"],
    "shrink": [
        "shrink",
        "model.onnx",
        "--data",
        "data.npz",
        "--budget",
        "flops=70%",
        "-o",
        "OUT/new.onnx",
    ],
}


def into(out: str, line: list[str]) -> list[str]:
    return [part.replace("OUT", out) for part in line]


@pytest.mark.long
def test_a_disk_that_is_full(folder: Path) -> None:
    # A file may have 300 bytes: as on a full disk, what is written is refused in the middle.
    jobs = [(folder, into(".", line)) for line in LINES.values()]
    for ran in run_limited(jobs, TIMEOUT_SECONDS, file_bytes=300):
        assert ran.code == 4, ran
        assert ran.err.splitlines()[-1].startswith("morphgraph: error: "), ran
        assert "File too large" in ran.err
        assert "new." in ran.err
        assert ran.made == ran.spoilt == ()


@pytest.mark.long
def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    jobs = [(folder, into("closed", line)) for line in LINES.values()]
    for ran in run_limited(jobs, TIMEOUT_SECONDS):
        assert ran.code == 4, ran
        assert ran.err.splitlines()[-1].startswith("morphgraph: error: "), ran
        assert "ermission denied" in ran.err
        assert "model.onnx: closed" not in ran.err  # the fault is not the model's
        assert ran.made == ran.spoilt == ()


REFUSED: dict[str, tuple[list[str], str]] = {
    "output is the model": (
        ["apply", "model.onnx", "plan.json", "-o", "model.onnx", "--overwrite"],
        "is an input",
    ),
    "output is the folder itself": (
        ["apply", "model.onnx", "plan.json", "-o", "."],
        "is a folder",
    ),
    "output is the folder above": (["plan", "model.onnx", "--uniform", "0.5", "-o", ".."], "is a"),
    "output is no file at all": (["plan", "model.onnx", "--uniform", "0.5", "-o", "/"], "is a fo"),
    "output is the plan": (
        ["apply", "model.onnx", "plan.json", "-o", "plan.json", "--overwrite"],
        "is an input",
    ),
    "output is a link to the model": (
        ["apply", "model.onnx", "plan.json", "-o", "link.onnx", "--overwrite"],
        "is an input",
    ),
    "output is another name of the model": (
        ["apply", "model.onnx", "plan.json", "-o", "hard.onnx", "--overwrite"],
        "is an input",
    ),
    "output is the model's weights": (
        ["apply", "beside/wide.onnx", "wide.json", "-o", "beside/weights.data", "--overwrite"],
        "is an input",
    ),
    "output's weights are the model's": (
        ["apply", "beside/wide.onnx", "wide.json", "-o", "beside/weights", "--overwrite"],
        "is an input",
    ),
    "plan over the weights": (
        [
            "plan",
            "beside/wide.onnx",
            "--uniform",
            "0.5",
            "-o",
            "beside/weights.data",
            "--overwrite",
        ],
        "is an input",
    ),
    "plan over the model": (
        ["plan", "model.onnx", "--uniform", "0.5", "-o", "model.onnx", "--overwrite"],
        "is an input",
    ),
    "shrunk over the data": (
        [
            "shrink",
            "model.onnx",
            "--data",
            "data.npz",
            "--budget",
            "flops=70%",
            "-o",
            "data.npz",
            "--overwrite",
        ],
        "is an input",
    ),
    "output exists": (
        ["apply", "model.onnx", "plan.json", "-o", "other.onnx"],
        "exists already",
    ),
    "output is a folder": (["apply", "model.onnx", "plan.json", "-o", "beside"], "is a folder"),
    "output is a pipe": (
        ["apply", "model.onnx", "plan.json", "-o", "pipe", "--overwrite"],
        "not an ordinary file",
    ),
    "output is a device": (
        ["plan", "model.onnx", "--uniform", "0.5", "-o", "/dev/null", "--overwrite"],
        "not an ordinary file",
    ),
    "no such folder": (
        ["apply", "model.onnx", "plan.json", "-o", "nowhere/new.onnx"],
        "no such folder",
    ),
    "a file for a folder": (
        ["apply", "model.onnx", "plan.json", "-o", "plan.json/new.onnx"],
        "plan.json",
    ),
    "a name that is too long": (
        ["apply", "model.onnx", "plan.json", "-o", "n" * 300 + ".onnx"],
        "too long",
    ),
    "a name with controls": (
        ["apply", "model.onnx", "plan.json", "-o", "nowhere\x1b[2J\n/new.onnx"],
        r"nowhere\x1b[2J",
    ),
}


def test_outputs_that_are_refused(folder: Path) -> None:
    (folder / "link.onnx").symlink_to("model.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "model.onnx")
    (folder / "other.onnx").write_bytes(b"other")
    os.mkfifo(folder / "pipe")
    jobs = [(folder, line) for line, _ in REFUSED.values()]
    for ran, (name, (_, says)) in zip(
        run_limited(jobs, TIMEOUT_SECONDS), REFUSED.items(), strict=True
    ):
        assert ran.code == 4, (name, ran)
        assert ran.err.startswith("morphgraph: error: "), (name, ran)
        assert ran.err.count("\n") == 1, (name, ran)
        assert says in ran.err, (name, ran)
        assert "\x1b" not in ran.err
        assert ran.made == ran.spoilt == (), (name, ran)
    assert Path("/dev/null").is_char_device()


def test_what_another_program_writes_meanwhile_is_spared(tmp_path: Path) -> None:
    target = tmp_path / "new.json"

    def pieces() -> Iterator[bytes]:
        yield b"ours"
        target.write_bytes(b"theirs")

    with pytest.raises(FileError, match="exists already"):
        write_atomically(target, pieces(), overwrite=False)  # type: ignore[arg-type]  # comes late
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]
    write_atomically(target, b"ours", overwrite=True)
    assert target.read_bytes() == b"ours"


def test_of_many_writers_at_once_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "new.bin"
    refused: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        try:
            write_atomically(target, bytes([number]) * 100_000, overwrite=False)
        except FileError:
            refused.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = target.read_bytes()
    assert len(content) == 100_000
    assert len(set(content)) == 1
    assert sorted([*refused, content[0]]) == list(range(8))
    assert list(tmp_path.iterdir()) == [target]


def test_one_run_per_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(FileError, match=r"another run writes to this folder.*give another folder"):
        FolderLock(tmp_path)
    lock.close()
    FolderLock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
