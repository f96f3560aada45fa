"""Broken and hostile files: one line that helps, the right exit code, nothing left behind.

All command lines run in one process of their own, with limited memory and time; a crash or a hang
there fails every test here. The cases of one folder share it with a sound model and a sound plan.
"""

import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.passes.lift import lift
from morphgraph.passes.widths import uniform

ROOT = Path(__file__).parent.parent
MEMORY_BYTES = 4 * 2**30
TIMEOUT_SECONDS = 60

# Runs the command lines that stdin lists as JSON, each in its folder. Standard streams are caught
# at the level of file descriptors, where libraries in C++ write.
_DRIVER = """
import json, os, resource, sys, tempfile
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
sys.path.insert(0, sys.argv[2])
from morphgraph.cli import main
results, keep = [], os.dup(1)
for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        code = main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        out.seek(0), err.seek(0)
        results.append([code, out.read().decode(), err.read().decode()])
os.write(keep, json.dumps(results).encode())
"""


def sound_model() -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    arrays = {"w1": (8, 3, 3, 3), "w2": (4, 8, 1, 1)}
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in arrays.items()
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], "conv0"),
            helper.make_node("Relu", ["a"], ["b"], "relu0"),
            helper.make_node("Conv", ["b", "w2"], ["y"], "conv1"),
        ],
        "sound",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Case(NamedTuple):
    """How to make a bad file, the exit code, and what the line must say."""

    make: Callable[[Path], object]
    code: int
    says: tuple[str, ...]


MODELS: dict[str, Case] = {}
PLANS: dict[str, Case] = {}


def bad_model(*says: str, code: int = 3) -> Callable[[Callable[[Path], object]], object]:
    """Register a function that writes ``bad.onnx`` (its path is given)."""

    def register(make: Callable[[Path], object]) -> object:
        MODELS[make.__name__] = Case(make, code, ("bad.onnx", *says))
        return make

    return register


def changed_model(*says: str) -> Callable[[Callable[[onnx.ModelProto], object]], object]:
    """Register a function that spoils a sound model."""

    def register(change: Callable[[onnx.ModelProto], object]) -> object:
        def make(path: Path) -> None:
            proto = sound_model()
            change(proto)
            path.write_bytes(proto.SerializeToString())

        MODELS[change.__name__] = Case(make, 3, ("bad.onnx", *says))
        return change

    return register


def external_weight(*says: str) -> Callable[[Callable[[Path, Any], object]], object]:
    """Register a function that gives the weight ``w2`` of a sound model external data."""

    def register(change: Callable[[Path, Any], object]) -> object:
        def make(path: Path) -> None:
            proto = sound_model()
            tensor = proto.graph.initializer[1]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", str(change(path, tensor))
            path.write_bytes(proto.SerializeToString())

        MODELS[change.__name__] = Case(make, 3, ("bad.onnx", "'w2'", *says))
        return change

    return register


# Row 1 to 5: not a model at all.


@bad_model("empty")
def empty_file(path: Path) -> None:
    path.write_bytes(b"")


@bad_model("HTML")
def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><title>404</title></html>\n")


@bad_model("text")
def plain_text(path: Path) -> None:
    path.write_text("404: Not Found\n")


@bad_model("git lfs pull")
def lfs_pointer(path: Path) -> None:
    digest = "0" * 64
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 123\n")


@bad_model("PyTorch", "export")
def torch_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@bad_model("pickle")
def python_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Trap()))


@bad_model("truncated or corrupt")
def truncated(path: Path) -> None:
    content = sound_model().SerializeToString()
    path.write_bytes(content[: len(content) // 2])


@bad_model("truncated or corrupt")
def flipped_bit(path: Path) -> None:
    content = bytearray(sound_model().SerializeToString())
    content[content.index(b"Relu") - 1] ^= 0x40  # a length
    path.write_bytes(content)


# Row 6: paths.


@bad_model("folder", code=4)
def folder(path: Path) -> None:
    path.mkdir()


@bad_model("No such file", code=4)
def missing(path: Path) -> None:
    assert not path.exists()


@bad_model("No such file", code=4)
def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone.onnx"))


@bad_model("ordinary file", code=4)
def pipe(path: Path) -> None:
    os.mkfifo(path)


@bad_model("ermission", code=4)
def no_permission(path: Path) -> None:
    path.write_bytes(sound_model().SerializeToString())
    path.chmod(0)


# Rows 7, 9, 14: graphs that cannot be.


@changed_model("cycle", "conv0", "relu0")
def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "b"


@changed_model("'relu0'", "'nothing'")
def dangling_input(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].input[0] = "nothing"


@changed_model("'nothing'")
def dangling_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "nothing"


@changed_model("'conv0'")
def groups_that_do_not_divide(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("group", 2))


@changed_model("'conv0'")
def wrong_input_channels(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


@changed_model("'conv1'")
def wrong_weight(proto: onnx.ModelProto) -> None:
    array = np.zeros((4, 7, 1, 1), np.float32)
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "w2"))


# Rows 19, 21, 22: external data.


@external_weight("refused", "secret.bin")
def outside_by_dots(path: Path, tensor: TensorProto) -> str:
    path.parent.parent.joinpath("secret.bin").write_bytes(bytes(128))
    return "../secret.bin"


@external_weight("refused")
def outside_by_absolute_path(path: Path, tensor: TensorProto) -> str:
    return "/etc/passwd"


@external_weight("refused", "links.bin")
def outside_by_link(path: Path, tensor: TensorProto) -> str:
    path.with_name("links.bin").symlink_to("/etc/passwd")
    return "links.bin"


@external_weight("refused", "folder/passwd")
def outside_by_linked_folder(path: Path, tensor: TensorProto) -> str:
    path.with_name("folder").symlink_to("/etc", target_is_directory=True)
    return "folder/passwd"


@external_weight("missing", "gone.bin", "copy it")
def external_missing(path: Path, tensor: TensorProto) -> str:
    return "gone.bin"


@external_weight("short.bin", "128", "10")
def external_short(path: Path, tensor: TensorProto) -> str:
    path.with_name("short.bin").write_bytes(bytes(10))
    return "short.bin"


# Row 27: sizes that nobody can know.


@changed_model("'x'", "--input-shape")
def dynamic_channels(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "channels"


@changed_model("'x'", "--input-shape")
def no_shape(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.ClearField("shape")


@changed_model("'relu0'", "'b'")
def unknowable_result(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Gate", "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))


# Row 38: plans.


def bad_plan(*says: str) -> Callable[[Callable[[dict[str, Any]], Any]], object]:
    """Register a function that spoils a sound plan, or returns what the file holds instead."""

    def register(change: Callable[[dict[str, Any]], Any]) -> object:
        def make(path: Path) -> None:
            found = json.loads(path.with_name("plan.json").read_bytes())
            content = change(found)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(found).encode())

        PLANS[change.__name__] = Case(make, 3, ("bad.json", *says))
        return change

    return register


@bad_plan("model.structure", "another network")
def other_model(plan: dict[str, Any]) -> None:
    plan["model"]["structure"] = "0" * 64


@bad_plan("schema_version", "2")
def newer_schema(plan: dict[str, Any]) -> None:
    plan["schema_version"] = 2


@bad_plan("groups", "width")
def width_zero(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["width"] = 0


@bad_plan("width 0 of g1 'conv0'", "no longer depend on any input", "keep at least one")
def nothing_kept(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = []


@bad_plan("groups.g1.width", "9")
def wrong_width(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["width"] = 9


@bad_plan("groups.g1.keep", "range")
def index_out_of_range(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 9]]


@bad_plan("keep", "groups")
def index_negative(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[-1, 4]]


@bad_plan("groups.g1.keep", "repeats")
def index_twice(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 3], [2, 5]]


@bad_plan("groups.g1.width", "8")
def range_of_petabytes(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 2**50]]
    plan["groups"]["g1"]["width"] = 2**50


@bad_plan("bad.json")
def number_too_large(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 2**70]]
    plan["groups"]["g1"]["width"] = 2**70


@bad_plan("JSON")
def not_a_number(plan: dict[str, Any]) -> None:
    plan["cost"]["flops"]["after"] = math.nan


@bad_plan("groups.g99", "no such group")
def unknown_group(plan: dict[str, Any]) -> None:
    plan["groups"]["g99"] = plan["groups"].pop("g1")


@bad_plan("groups", "surprise")
def unknown_field(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["surprise"] = 1


@bad_plan("groups.g1.new")
def too_many_new_channels(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["new"] = 10**12


@bad_plan("groups.g0", "graph input")
def pinned_group(plan: dict[str, Any]) -> None:
    plan["groups"]["g0"] = {"name": "x", "width": 3, "keep": [[0, 1]]}


@bad_plan("JSON")
def empty_plan(plan: dict[str, Any]) -> bytes:
    return b""


@bad_plan("JSON")
def deep_plan(plan: dict[str, Any]) -> bytes:
    return b"[" * 100_000


@bad_plan("schema_version")
def list_for_plan(plan: dict[str, Any]) -> bytes:
    return b"[1, 2]"


@bad_plan("bytes")
def plan_of_100_megabytes(plan: dict[str, Any]) -> bytes:
    return bytes(100_000_000)


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    before: Mapping[str, object]
    after: Mapping[str, object]


COMMANDS: dict[str, list[str]] = {
    "analyze": ["analyze", "bad.onnx"],
    "plan": ["plan", "bad.onnx", "--budget", "flops=50%", "-o", "new.json"],
    "apply": ["apply", "bad.onnx", "plan.json", "-o", "new.onnx"],
}
PLAN_COMMANDS: dict[str, list[str]] = {
    "apply": ["apply", "sound.onnx", "bad.json", "-o", "new.onnx"],
    "verify": ["verify", "sound.onnx", "bad.json", "sound.onnx"],
}


def _snapshot(folder: Path) -> dict[str, object]:
    """What lies in a folder: the contents of files, and what else there is."""
    return {
        path.name: path.read_bytes()
        if path.is_file() and os.access(path, os.R_OK)
        else path.lstat()
        for path in folder.iterdir()
        if not path.name.startswith("plan_of_100")
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Ran]:
    """All cases with all their commands, run in one process."""
    root = tmp_path_factory.mktemp("bad")
    jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    model = sound_model()
    plan = uniform(lift(model), 0.5).to_json()
    for cases, commands, name in (
        (MODELS, COMMANDS, "bad.onnx"),
        (PLANS, PLAN_COMMANDS, "bad.json"),
    ):
        for case, (make, _, _) in cases.items():
            folder = root / case / "here"
            folder.mkdir(parents=True)
            folder.joinpath("sound.onnx").write_bytes(model.SerializeToString())
            folder.joinpath("plan.json").write_bytes(plan)
            make(folder / name)
            jobs.update(((case, c), (folder, line)) for c, line in commands.items())
    before = {folder: _snapshot(folder) for folder, _ in jobs.values()}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(MEMORY_BYTES), str(ROOT)],
        input=json.dumps([(str(folder), line) for folder, line in jobs.values()]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {
        key: Ran(*ran, before[folder], _snapshot(folder))
        for (key, (folder, _)), ran in zip(jobs.items(), json.loads(done.stdout), strict=True)
    }


def _check(ran: Ran, case: Case) -> None:
    assert ran.code == case.code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("morphgraph: error: "), ran.err
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err
    for fragment in case.says:
        assert fragment in ran.err, ran.err
    assert ran.after == ran.before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", MODELS)
def test_bad_models(results: Mapping[tuple[str, str], Ran], name: str, command: str) -> None:
    if name == "no_permission" and os.access("/etc/shadow", os.R_OK):
        pytest.skip("this user may read everything")
    _check(results[name, command], MODELS[name])


@pytest.mark.parametrize("command", PLAN_COMMANDS)
@pytest.mark.parametrize("name", PLANS)
def test_bad_plans(results: Mapping[tuple[str, str], Ran], name: str, command: str) -> None:
    _check(results[name, command], PLANS[name])


def test_sizes_that_are_given_heal_a_model_without_them(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    MODELS["no_shape"].make(path)
    line = ["analyze", str(path), "--input-shape", "x=1x3x8x8"]
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", *line], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
