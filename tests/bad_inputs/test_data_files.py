"""Broken and hostile data, inputs and device files: one line that names the file and says what."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from morphgraph.passes.lift import lift
from morphgraph.passes.planning.uniform import uniform
from morphgraph.testing.limited import Ran, run_limited

TIMEOUT_SECONDS = 120


class Case(NamedTuple):
    """Makes a bad file of this name in a folder; exit codes that may be, and what the line says."""

    name: str
    make: Callable[[Path], object]
    codes: tuple[int, ...]
    says: tuple[str, ...]


Change = Callable[[dict[str, Any]], bytes | None]
ARRAYS: dict[str, Case] = {}
DEVICES: dict[str, Case] = {}


def bad_arrays(
    *says: str, name: str = "bad.npz"
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Register a function that writes what shall be arrays."""

    def register(make: Callable[[Path], object]) -> Callable[[Path], object]:
        ARRAYS[make.__name__] = Case(name, make, (3, 4), (name, *says))
        return make

    return register


def bad_device(
    *says: str, name: str = "bad.json", codes: tuple[int, ...] = (3,)
) -> Callable[[Change], Change]:
    """Register a function that spoils a device's measurements, or returns what the file holds."""

    def register(change: Change) -> Change:
        def make(path: Path) -> None:
            kernel: dict[str, Any] = {"op_type": "Conv", "inputs": [[1, 3, 8, 8], [8, 3, 3, 3]]}
            kernel |= {"outputs": [[1, 8, 6, 6]], "microseconds": 5.0}
            found = {"runtime": "ort", "threads": 1, "kernels": [kernel] * 8}
            found = json.loads(json.dumps(found))  # nothing in it stands there twice
            content = change(found)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(found).encode())

        DEVICES[change.__name__] = Case(name, make, codes, (name, *says))
        return change

    return register


@bad_arrays()
def empty(path: Path) -> None:
    path.touch()


@bad_arrays()
def text(path: Path) -> None:
    path.write_text("x\n1\n")


@bad_arrays("object")
def pickled(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object))


@bad_arrays()
def python_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": [1.0]}))


@bad_arrays("ordinary file")
def pipe(path: Path) -> None:
    os.mkfifo(path)


@bad_arrays("ordinary file")
def without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


@bad_arrays("No such file")
def missing(path: Path) -> None:
    assert not path.exists()


def _member(shape: tuple[int, ...], numbers: bytes) -> bytes:
    held = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(held, header)
    return held.getvalue() + numbers


@bad_arrays("cut short")
def header_of_terabytes(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", _member((2**40, 3, 8, 8), bytes(100)))


@bad_arrays("cut short")
def packed_header_of_terabytes(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", _member((2**40, 3, 8, 8), bytes(100)))


@bad_arrays()
def negative_size(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", _member((-1, 3, 8, 8), bytes(100)))


@bad_arrays()
def header_that_is_no_python(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        content = _member((1, 3, 8, 8), bytes(768))
        archive.writestr("x.npy", content.replace(b"fortran", b"(((((("[:6] + b"{"))


@bad_arrays()
def truncated(path: Path) -> None:
    np.savez(path, x=np.zeros((8, 3, 8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:-200])


@bad_arrays()
def damaged_in_the_middle(path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    np.savez_compressed(path, x=x)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@bad_arrays("'x'", "model takes")
def other_shape(path: Path) -> None:
    np.savez(path, x=np.zeros((8, 4, 8, 8), np.float32))


@bad_arrays(r"\x1b[2J")
def name_with_controls(path: Path) -> None:
    np.savez(path, **{"\x1b[2J": np.zeros((8, 3, 8, 8), np.float32)})  # type: ignore[arg-type]


@bad_device("no device profile")
def empty_device(device: dict[str, Any]) -> bytes:
    return b""


@bad_device("no device profile")
def deep_device(device: dict[str, Any]) -> bytes:
    return b'{"kernels":' + b"[" * 100_000


@bad_device("no measurements")
def no_kernels(device: dict[str, Any]) -> None:
    device["kernels"] = []


@bad_device("measurement 0", "names no operator")
def kernel_without_name(device: dict[str, Any]) -> None:
    device["kernels"][0]["op_type"] = " "


@bad_device("measurement 2", "beyond all machines")
def kernel_of_impossible_size(device: dict[str, Any]) -> None:
    device["kernels"][2]["inputs"][0][1] = 10**30


@bad_device("measurement 1", "not positive")
def kernel_of_no_time(device: dict[str, Any]) -> None:
    device["kernels"][1]["microseconds"] = -1.0


@bad_device("20001 measurements", "more than a profile")
def too_many_kernels(device: dict[str, Any]) -> None:
    device["kernels"] = device["kernels"][:1] * 20_001


@bad_device("surprise")
def unknown_field(device: dict[str, Any]) -> None:
    device["surprise"] = 1


@bad_device("no column", name="bad.csv")
def table_without_columns(device: dict[str, Any]) -> bytes:
    return b"a,b\n1,2\n"


@bad_device("line 2", name="bad.csv")
def table_of_words(device: dict[str, Any]) -> bytes:
    return b"op_type,inputs,outputs,microseconds\nConv,1x3,1x3,soon\n"


@bad_device("CSV", name="bad.csv")
def table_of_bytes(device: dict[str, Any]) -> bytes:
    return b"\xff\xfe\x00" * 10


def _lines(case: Case) -> dict[str, list[str]]:
    if case.name.endswith(".npz"):
        return {
            "shrink": [
                *("shrink", "sound.onnx", "--data", case.name),
                *("--budget", "flops=70%", "-o", "new.onnx"),
            ],
            "apply": ["apply", "sound.onnx", "plan.json", "--inputs", case.name, "-o", "new.onnx"],
        }
    latency = ["--budget", "latency=60%", "--device", case.name]
    return {"plan": ["plan", "sound.onnx", *latency, "-o", "new.json"]}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, sound_model: Callable[[], onnx.ModelProto]
) -> Mapping[tuple[str, str], Ran]:
    root = tmp_path_factory.mktemp("data")
    jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    plan = uniform(lift(sound_model()), 0.5).to_json()
    for name, case in {**ARRAYS, **DEVICES}.items():
        folder = root / name
        folder.mkdir()
        (folder / "sound.onnx").write_bytes(sound_model().SerializeToString())
        (folder / "plan.json").write_bytes(plan)
        case.make(folder / case.name)
        jobs.update(((name, command), (folder, line)) for command, line in _lines(case).items())
    return dict(zip(jobs, run_limited(jobs.values(), TIMEOUT_SECONDS), strict=True))


@pytest.mark.parametrize(
    ("name", "command"),
    [(name, c) for name, case in {**ARRAYS, **DEVICES}.items() for c in _lines(case)],
)
def test_bad_data(results: Mapping[tuple[str, str], Ran], name: str, command: str) -> None:
    ran, case = results[name, command], {**ARRAYS, **DEVICES}[name]
    assert ran.code in case.codes, ran.err
    assert ran.out == ""
    assert ran.err.startswith("morphgraph: error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    assert "\x1b" not in ran.err
    assert "unexpected" not in ran.err, ran.err
    for fragment in case.says:
        assert fragment in ran.err, ran.err
    assert ran.made == ran.spoilt == ()
