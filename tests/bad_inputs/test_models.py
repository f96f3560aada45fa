"""Broken and hostile models: one line that helps, the right exit code, nothing left behind.

Every case goes through every command that takes a model, in one process with limited memory and
time; a crash or a hang there fails all of them.
"""

import gzip
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
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.passes.lift import lift
from morphgraph.passes.planning.uniform import uniform
from morphgraph.testing.limited import Ran, run_limited
from morphgraph.workflow import apply

TIMEOUT_SECONDS = 120


class Case(NamedTuple):
    """Makes a bad file out of a sound model; the exit code, and what the line must say."""

    make: Callable[[Path, onnx.ModelProto], object]
    code: int
    says: tuple[str, ...]


MODELS: dict[str, Case] = {}


def bad_model(*says: str, code: int = 3) -> Callable[[Callable[..., object]], object]:
    """Register a function that writes ``bad.onnx``, given its path and a sound model."""

    def register(make: Callable[[Path, onnx.ModelProto], object]) -> object:
        MODELS[make.__name__] = Case(make, code, ("bad.onnx", *says))
        return make

    return register


def changed_model(*says: str) -> Callable[[Callable[[onnx.ModelProto], object]], object]:
    """Register a function that spoils a sound model."""

    def register(change: Callable[[onnx.ModelProto], object]) -> object:
        def make(path: Path, proto: onnx.ModelProto) -> None:
            change(proto)
            path.write_bytes(proto.SerializeToString())

        MODELS[change.__name__] = Case(make, 3, ("bad.onnx", *says))
        return change

    return register


def external_weight(*says: str) -> Callable[[Callable[[Path, Any], object]], object]:
    """Register a function that gives the weight ``w2`` of a sound model external data."""

    def register(change: Callable[[Path, Any], object]) -> object:
        def make(path: Path, proto: onnx.ModelProto) -> None:
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
def empty_file(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(b"")


@bad_model("HTML")
def web_page(path: Path, proto: onnx.ModelProto) -> None:
    path.write_text("<!DOCTYPE html><html><title>404</title></html>\n")


@bad_model("text")
def plain_text(path: Path, proto: onnx.ModelProto) -> None:
    path.write_text("404: Not Found\n")


@bad_model("git lfs pull")
def lfs_pointer(path: Path, proto: onnx.ModelProto) -> None:
    digest = "0" * 64
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 123\n")


@bad_model("PyTorch", "export")
def torch_zip(path: Path, proto: onnx.ModelProto) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@bad_model("pickle")
def python_pickle(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(pickle.dumps(_Trap()))


@bad_model("truncated or corrupt")
def truncated(path: Path, proto: onnx.ModelProto) -> None:
    content = proto.SerializeToString()
    path.write_bytes(content[: len(content) // 2])


@bad_model("truncated or corrupt")
def flipped_bit(path: Path, proto: onnx.ModelProto) -> None:
    content = bytearray(proto.SerializeToString())
    content[content.index(b"Relu") - 1] ^= 0x40  # a length
    path.write_bytes(content)


# Row 6: paths.


@bad_model("folder", code=4)
def folder(path: Path, proto: onnx.ModelProto) -> None:
    path.mkdir()


@bad_model("No such file", code=4)
def missing(path: Path, proto: onnx.ModelProto) -> None:
    assert not path.exists()


@bad_model("No such file", code=4)
def dangling_link(path: Path, proto: onnx.ModelProto) -> None:
    path.symlink_to(path.with_name("gone.onnx"))


@bad_model("ordinary file", code=4)
def pipe(path: Path, proto: onnx.ModelProto) -> None:
    os.mkfifo(path)


@bad_model("ermission", code=4)
def no_permission(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(proto.SerializeToString())
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


# Relatives of the rows above.


@bad_model("bytes", "external data")
def larger_than_a_message(path: Path, proto: onnx.ModelProto) -> None:
    with path.open("wb") as file:
        file.truncate(2**31)  # a hole: it takes no room


@bad_model("compressed")
def gzipped(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(gzip.compress(proto.SerializeToString()))


@bad_model("truncated or corrupt")
def random_bytes(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


@bad_model("not a valid model")
def zeros(path: Path, proto: onnx.ModelProto) -> None:
    path.write_bytes(b"\x10\x00" * 1000)  # fields of number 2, all of them 0


@bad_model("truncated or corrupt")
def subgraphs_1000_deep(path: Path, proto: onnx.ModelProto) -> None:
    inner = b""
    for _ in range(1000):  # a node in a graph in an attribute of a node
        for number in (6, 5, 1):
            inner = bytes([number << 3 | 2]) + _varint(len(inner)) + inner
    proto.graph.node[0].attribute.append(helper.make_attribute("then_branch", "here"))
    content = proto.SerializeToString()
    path.write_bytes(content + b"\x3a" + _varint(len(inner)) + inner)


def _varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


@changed_model("'conv0'", "'k'", "64", "20")
def attribute_too_short(proto: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros((4, 4), np.float32), "k")
    tensor.raw_data = tensor.raw_data[:20]
    proto.graph.node[0].attribute.append(helper.make_attribute("k", tensor))


@changed_model("'value'", "refused", "/etc/passwd")
def attribute_outside(proto: onnx.ModelProto) -> None:
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    _constant(proto, tensor)


def _constant(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], "constant", value=tensor))


@changed_model("inside", "refused", "up.bin")
def weight_of_a_branch_outside(proto: onnx.ModelProto) -> None:
    tensor = TensorProto(name="inside", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../up.bin")
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    node = helper.make_node("Identity", ["inside"], ["r"])
    graph = helper.make_graph([node], "branch", [], [result], [tensor])
    flag = numpy_helper.from_array(np.array(True), "flag")
    proto.graph.initializer.append(flag)
    proto.graph.node.append(
        helper.make_node("If", ["flag"], ["i"], "if0", then_branch=graph, else_branch=graph)
    )


@changed_model("'w2'", "more than one type")
def data_of_two_types(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].float_data.append(1.0)


@changed_model("'w2'", "10000 axes")
def ten_thousand_axes(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].dims[:] = [2] * 10_000


@changed_model("'x'", "twice")
def input_twice(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(proto.graph.input[0])


@changed_model("node 'conv0'")
def strides_of_zero(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("strides", [0, 0]))


@changed_model("node 'conv0'")
def dilations_without_end(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("dilations", [2**62, 2**62]))


@changed_model("node 'conv0'")
def pads_below_zero(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("pads", [-9] * 4))


@changed_model("node 'conv0'")
def pads_of_three(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("pads", [1, 1, 1]))


@changed_model("node 'conv0'")
def group_below_zero(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("group", -1))


@changed_model("node 'conv0'")
def group_of_another_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("group", "one"))


@changed_model("node 'conv0'")
def convolution_without_weights(proto: onnx.ModelProto) -> None:
    del proto.graph.node[0].input[1:]


@changed_model("node 'relu0'")
def operator_without_inputs(proto: onnx.ModelProto) -> None:
    del proto.graph.node[1].input[:]


@changed_model("node 'conv0'")
def weight_of_another_type(proto: onnx.ModelProto) -> None:
    array = np.zeros((8, 3, 3, 3), np.int64)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))


@changed_model("node 'turn'")
def axes_that_are_none(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].output[0] = "c"
    proto.graph.node.append(helper.make_node("Transpose", ["c"], ["y"], "turn", perm=[0, 1, 2, 7]))


def _bomb(proto: onnx.ModelProto, *nodes: onnx.NodeProto, **arrays: object) -> None:
    """Add to the output the sum of what nodes make out of constants: ``huge``."""
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node[2].output[0] = "c"
    proto.graph.node.extend(nodes)
    proto.graph.node.append(helper.make_node("ReduceMax", ["huge"], ["m"], "most", keepdims=0))
    proto.graph.node.append(helper.make_node("Add", ["c", "m"], ["y"], "add"))


@changed_model("'huge'", str(2**34))
def range_of_64_gigabytes(proto: onnx.ModelProto) -> None:
    ends = {"first": np.float32(0), "last": np.float32(2**34), "by": np.float32(1)}
    _bomb(proto, helper.make_node("Range", [*ends], ["huge"], "bomb"), **ends)


@changed_model("'huge'", str(2**34))
def tiled_to_64_gigabytes(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Tile", ["one", "times"], ["huge"], "bomb")
    _bomb(proto, node, one=np.ones(1, np.float32), times=np.array([2**34]))


@changed_model("'huge'", str(2**34 + 1))
def padded_to_64_gigabytes(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Pad", ["one", "pads"], ["huge"], "bomb")
    _bomb(proto, node, one=np.ones(1, np.float32), pads=np.array([0, 2**34]))


@changed_model("'huge'", str(2**34))
def hot_of_64_gigabytes(proto: onnx.ModelProto) -> None:
    node = helper.make_node("OneHot", ["at", "depth", "both"], ["huge"], "bomb")
    both = np.array([0, 1], np.float32)
    _bomb(proto, node, at=np.array([1]), depth=np.int64(2**34), both=both)


@external_weight("refused", "hard links")
def outside_by_hard_link(path: Path, tensor: TensorProto) -> str:
    secret = path.parent.parent / "own.bin"
    secret.write_bytes(bytes(128))
    path.with_name("links.bin").hardlink_to(secret)
    return "links.bin"


@external_weight("refused")
def outside_by_windows_path(path: Path, tensor: TensorProto) -> str:
    return "C:\\secret.bin"


@external_weight("refused")
def outside_by_backslashes(path: Path, tensor: TensorProto) -> str:
    return "here\\..\\..\\secret.bin"


@external_weight("not a readable file")
def external_folder(path: Path, tensor: TensorProto) -> str:
    path.with_name("folder").mkdir()
    return "folder"


@external_weight("not a readable file")
def external_pipe(path: Path, tensor: TensorProto) -> str:
    os.mkfifo(path.with_name("pipe.bin"))
    return "pipe.bin"


@external_weight("not a file")
def external_name_with_an_end(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    return "data.bin\0.bin"


@external_weight("not a number")
def external_offset_of_words(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    tensor.external_data.add(key="offset", value="nothing")
    return "data.bin"


@external_weight("not a number")
def external_offset_of_10000_digits(path: Path, tensor: TensorProto) -> str:
    path.with_name("data.bin").write_bytes(bytes(128))
    tensor.external_data.add(key="offset", value="1" * 10_000)
    return "data.bin"


# Found by tools/fuzz.py.


@changed_model("no outputs")
def no_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.ClearField("output")


@changed_model("input 'x'", "data type is not set")
def input_without_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 0


@changed_model("node 'conv0'", "would have the size -")
def kernel_larger_than_its_input(proto: onnx.ModelProto) -> None:
    array = np.zeros((8, 3, 3, 30), np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))


@changed_model("axis 2 of 'x'", str(2**62))
def input_without_end(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**62


# The bad file comes first, second (a resized model, or one that is timed beside a sound one).
COMMANDS: dict[str, list[str]] = {
    "analyze": ["analyze", "bad.onnx"],
    "plan": ["plan", "bad.onnx", "--budget", "flops=50%", "-o", "new.json"],
    "apply": ["apply", "bad.onnx", "plan.json", "-o", "new.onnx"],
    "verify": ["verify", "bad.onnx", "plan.json", "small.onnx"],
    "verify the result": ["verify", "sound.onnx", "plan.json", "bad.onnx"],
    "bench": ["bench", "bad.onnx", "--seconds", "0.05"],
    "bench beside": ["bench", "sound.onnx", "bad.onnx", "--seconds", "0.05"],
    "shrink": [
        "shrink",
        "bad.onnx",
        "--data",
        "data.npz",
        "--budget",
        "flops=70%",
        "-o",
        "new.onnx",
    ],
}
QUICK = {"analyze", "apply", "shrink"}

Results = Mapping[tuple[str, str], Ran]


def _run(
    root: Path, sound_model: Callable[[], onnx.ModelProto], commands: Mapping[str, list[str]]
) -> Results:
    """All cases with these commands, each case in a folder with what the commands need."""
    jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    model = sound_model().SerializeToString()
    graph = lift(sound_model())
    plan = uniform(graph, 0.5)
    small = ir.to_proto(apply(graph, plan)).SerializeToString()
    images = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    for name, case in MODELS.items():
        folder = root / name / "here"
        folder.mkdir(parents=True)
        folder.joinpath("sound.onnx").write_bytes(model)
        folder.joinpath("small.onnx").write_bytes(small)
        folder.joinpath("plan.json").write_bytes(plan.to_json())
        np.savez(folder / "data.npz", x=images)
        case.make(folder / "bad.onnx", sound_model())
        jobs.update(((name, c), (folder, line)) for c, line in commands.items())
    return dict(zip(jobs, run_limited(jobs.values(), TIMEOUT_SECONDS), strict=True))


@pytest.fixture(scope="module")
def quick(
    tmp_path_factory: pytest.TempPathFactory, sound_model: Callable[[], onnx.ModelProto]
) -> Results:
    commands = {name: line for name, line in COMMANDS.items() if name in QUICK}
    return _run(tmp_path_factory.mktemp("quick"), sound_model, commands)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, sound_model: Callable[[], onnx.ModelProto]
) -> Results:
    return _run(tmp_path_factory.mktemp("bad"), sound_model, COMMANDS)


def _check(name: str, command: str, ran: Ran) -> None:
    case = MODELS[name]
    code, says = case.code, case.says
    if command == "verify the result" and ran.code == 1:
        # Sound as a message, and compared: the runtime refuses it, or it computes something else.
        code, says = 1, ("bad.onnx", "do not use")
    elif command == "verify the result" and "the original takes" in ran.err:
        code, says = 3, ("bad.onnx", "'x'")
    if name == "no_permission" and os.access("/etc/shadow", os.R_OK):
        pytest.skip("this user may read everything")
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("morphgraph: error: "), ran.err
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err
    for fragment in says:
        assert fragment in ran.err, ran.err
    assert ran.made == ran.spoilt == ()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", sorted(QUICK))
def test_bad_models(quick: Results, name: str, command: str) -> None:
    _check(name, command, quick[name, command])


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_models_through_every_command(results: Results, name: str, command: str) -> None:
    _check(name, command, results[name, command])


def test_sizes_that_are_given_heal_a_model_without_them(
    tmp_path: Path, sound_model: Callable[[], onnx.ModelProto]
) -> None:
    path = tmp_path / "bad.onnx"
    MODELS["no_shape"].make(path, sound_model())
    line = ["analyze", str(path), "--input-shape", "x=1x3x8x8", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", *line], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
