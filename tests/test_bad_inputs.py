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
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.passes.lift import lift
from morphgraph.passes.planning.uniform import uniform

ROOT = Path(__file__).parent.parent
MEMORY_BYTES = 4 * 2**30
TIMEOUT_SECONDS = 120

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


# Rows 8, 34: one name, two tensors.


@changed_model("'a'", "'conv0'", "'relu0'")
def value_made_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].output[0] = proto.graph.node[2].input[0] = "a"


@changed_model("'w2'", "twice")
def initializer_twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[1])


# Rows 11 to 13: versions.


@changed_model("opset 999", "newer")
def opset_of_the_future(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


@changed_model("IR version 9999", "newer")
def format_of_the_future(proto: onnx.ModelProto) -> None:
    proto.ir_version = 9999


@changed_model("no operator set")
def no_opset(proto: onnx.ModelProto) -> None:
    proto.ClearField("opset_import")


@changed_model("no graph")
def no_graph(proto: onnx.ModelProto) -> None:
    proto.ClearField("graph")


# Rows 15 to 18, 28: tensors that are not what they say.


@changed_model("'w2'", "4x1099511627776x1x1", "128")
def size_of_terabytes(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].dims[1] = 2**40


@changed_model("'w2'", "negative size -8")
def negative_size(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].dims[1] = -8


@changed_model("'x'", "negative size")
def negative_size_of_an_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3


@changed_model("'w2'", "128", "20")
def stored_too_short(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[1]
    tensor.raw_data = tensor.raw_data[:20]


@changed_model("'w2'", "777")
def unknown_type(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].data_type = 777


@changed_model("'x'", "--input-shape")
def no_channels(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0


# Rows 30, 32, 37: small files that stand for something endless, and weights that are not dense.


def _call(proto: onnx.ModelProto, bodies: Mapping[str, list[str]]) -> None:
    """Call local functions, each a chain of others, in the place of the ReLU."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    proto.opset_import.append(opsets[1])
    proto.graph.node[1].op_type, proto.graph.node[1].domain = next(iter(bodies)), "local"
    for name, called in bodies.items():
        values = ["i", *(f"v{place}" for place in range(len(called) - 1)), "o"]
        nodes = [
            helper.make_node(kind, [before], [after], domain="local" if kind in bodies else "")
            for kind, before, after in zip(called, values, values[1:], strict=False)
        ]
        proto.functions.append(helper.make_function("local", name, ["i"], ["o"], nodes, opsets))


@changed_model("function 'F'", "calls itself")
def recursive_function(proto: onnx.ModelProto) -> None:
    _call(proto, {"F": ["F"]})


@changed_model("calls itself")
def functions_that_call_each_other(proto: onnx.ModelProto) -> None:
    _call(proto, {"F": ["G"], "G": ["F"]})


@changed_model("local functions", "nodes")
def functions_that_double(proto: onnx.ModelProto) -> None:
    doubled = {f"F{k}": [f"F{k + 1}"] * 2 for k in range(40)}
    _call(proto, {**doubled, "F40": ["Relu"]})


@changed_model("axis 0 of 'huge'", str(2**34))
def fill_of_64_gigabytes(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2**34]), "size"))
    proto.graph.node[2].output[0] = "c"
    proto.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["size"], ["huge"], "bomb"),
            helper.make_node("ReduceSum", ["huge"], ["sum"], "sum", keepdims=0),
            helper.make_node("Add", ["c", "sum"], ["y"], "add"),
        ]
    )


@changed_model("'sparse'", "dense")
def sparse_weight(proto: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


# Rows 19 to 23, 25: external data.


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


@external_weight("links.bin")
def link_to_itself(path: Path, tensor: TensorProto) -> str:
    path.with_name("links.bin").symlink_to("links.bin")
    return "links.bin"


@external_weight("not a file", "_ORT_MEM_ADDR_")
def memory_address(path: Path, tensor: TensorProto) -> str:
    return "*/_ORT_MEM_ADDR_/*"


def _range(tensor: TensorProto, **entries: int) -> str:
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return "data.bin"


@external_weight("data.bin", "1128")
def external_offset_behind_the_end(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    return _range(tensor, offset=1000)


@external_weight("-4")
def external_offset_negative(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    return _range(tensor, offset=-4)


@external_weight(str(2**50))
def external_length_of_petabytes(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    return _range(tensor, length=2**50)


# Row 27: sizes that nobody can know.


@changed_model("'x'", "--input-shape")
def dynamic_channels(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "channels"


@changed_model("'x'", "--input-shape")
def no_shape(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.ClearField("shape")


# Rows 10, 24, 26, 29, 33, 35: odd, and accepted. Each says what is odd, or has nothing to say.

ODD: dict[str, Case] = {}


def odd_model(*says: str) -> Callable[[Callable[[onnx.ModelProto], object]], object]:
    """Register a function that makes a sound model odd; what `analyze` says of it, if anything."""

    def register(change: Callable[[onnx.ModelProto], object]) -> object:
        def make(path: Path) -> None:
            proto = sound_model()
            change(proto)
            path.write_bytes(proto.SerializeToString())

        ODD[change.__name__] = Case(make, 0, says)
        return change

    return register


@odd_model("not described", "'relu0'")
def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Gate", "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    proto.graph.value_info.append(
        helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 8, 6, 6])
    )


@odd_model("NaN", "'w1'")
def weight_that_is_no_number(proto: onnx.ModelProto) -> None:
    array = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[0, 0, 0, 0] = math.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))


@odd_model("not described", "'relu0'")
def conditions_25_deep(proto: onnx.ModelProto) -> None:
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    proto.graph.input.append(yes)

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )

    node = helper.make_node("Relu", ["a"], ["leaf"])
    for depth in range(25):
        inner = branch(node.output[0], [node])
        other = branch(f"e{depth}", [helper.make_node("Relu", ["a"], [f"e{depth}"])])
        node = helper.make_node(
            "If", ["yes"], [f"d{depth}"], "relu0", then_branch=inner, else_branch=other
        )
    node.output[0] = "b"
    proto.graph.node[1].CopyFrom(node)


@odd_model()
def names_with_controls(proto: onnx.ModelProto) -> None:
    name = "\x1b[31m\n<script>"
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = name
    proto.graph.node[0].name = proto.graph.input[0].name = proto.graph.node[0].input[0] = name + "x"
    proto.graph.node[1].name = proto.graph.node[2].name = ""


@odd_model()
def weights_are_inputs(proto: onnx.ModelProto) -> None:
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims)
        )


@odd_model()
def weight_of_two_layers(proto: onnx.ModelProto) -> None:
    square = np.random.default_rng(1).standard_normal((8, 8, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(square, "shared"))
    proto.graph.node[2].input[0] = "d"
    proto.graph.node.extend(
        [
            helper.make_node("Conv", ["b", "shared"], ["c"], "first"),
            helper.make_node("Conv", ["c", "shared"], ["d"], "second"),
        ]
    )


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
ODD_COMMANDS: dict[str, list[str]] = {
    "analyze": ["analyze", "bad.onnx"],
    "plan": ["plan", "bad.onnx", "--score", "random", "--uniform", "0.5", "-o", "new.json"],
    "apply": ["apply", "bad.onnx", "new.json", "-o", "new.onnx", "--no-verify"],
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
        (ODD, ODD_COMMANDS, "bad.onnx"),
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
    return {
        key: Ran(*ran, before[folder], _snapshot(folder))
        for (key, (folder, _)), ran in zip(jobs.items(), _drive(jobs.values()), strict=True)
    }


def _drive(jobs: Iterable[tuple[Path, list[str]]]) -> list[tuple[int, str, str]]:
    """Run command lines, each in its folder: exit code, stdout and stderr of each."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(MEMORY_BYTES), str(ROOT)],
        input=json.dumps([(str(folder), line) for folder, line in jobs]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout)
    return found


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


@pytest.mark.parametrize("name", ODD)
def test_odd_models(results: Mapping[tuple[str, str], Ran], name: str) -> None:
    analyzed, planned, applied = (results[name, command] for command in ODD_COMMANDS)
    for ran in (analyzed, planned, applied):
        assert ran.code == 0, ran.err
        assert all(line.startswith(("morphgraph: warning: ", "wrote ")) for line in _lines(ran))
        assert "\x1b" not in ran.out + ran.err
    assert ("warning" in analyzed.err) == bool(ODD[name].says)
    for fragment in ODD[name].says:
        assert fragment in analyzed.err
    before, after = applied.before, applied.after
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"new.json", "new.onnx"}


def _lines(ran: Ran) -> list[str]:
    return ran.err.splitlines()


@pytest.mark.parametrize("command", PLAN_COMMANDS)
@pytest.mark.parametrize("name", PLANS)
def test_bad_plans(results: Mapping[tuple[str, str], Ran], name: str, command: str) -> None:
    _check(results[name, command], PLANS[name])


@pytest.mark.long
def test_a_chain_of_20000_operators(tmp_path: Path) -> None:
    # Row 31. What recurses over it, or takes time by the square of its length, ends here.
    proto = sound_model()
    values = ["a", *(f"v{place}" for place in range(20_000)), "b"]
    chain = [helper.make_node("Relu", ends[:1], ends[1:]) for ends in pairwise(values)]
    last = proto.graph.node[2]
    del proto.graph.node[1:]
    proto.graph.node.extend([*chain, last])
    (tmp_path / "long.onnx").write_bytes(proto.SerializeToString())
    line = ["plan", "long.onnx", "--set", "conv0=3", "--format", "csv", "-q"]
    [(code, out, err)] = _drive([(tmp_path, line)])
    assert (code, err) == (0, "")
    assert "g1,conv0,8,3," in out


def test_sizes_that_are_given_heal_a_model_without_them(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    MODELS["no_shape"].make(path)
    line = ["analyze", str(path), "--input-shape", "x=1x3x8x8"]
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", *line], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
