"""Odd models, which are accepted: each says what is odd, or has nothing to say."""

import contextlib
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.testing.limited import Ran, run_limited

TIMEOUT_SECONDS = 120


class Case(NamedTuple):
    """Makes a sound model odd; what `analyze` says of it, if anything."""

    change: Callable[[onnx.ModelProto], object]
    says: tuple[str, ...]


MODELS: dict[str, Case] = {}


def odd_model(*says: str) -> Callable[[Callable[[onnx.ModelProto], object]], object]:
    """Register a function that makes a sound model odd."""

    def register(change: Callable[[onnx.ModelProto], object]) -> object:
        MODELS[change.__name__] = Case(change, says)
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


@odd_model("not described", "'draw'")
def no_inputs(proto: onnx.ModelProto) -> None:
    """What it reads is drawn inside."""
    draw = helper.make_node("RandomNormal", [], ["x"], "draw", shape=[1, 3, 8, 8])
    proto.graph.node.insert(0, draw)
    del proto.graph.input[:]


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


def _add(proto: onnx.ModelProto, *nodes: onnx.NodeProto, **arrays: object) -> None:
    """Add to the output the largest of what nodes make: ``huge``."""
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node[2].output[0] = "c"
    proto.graph.node.extend(nodes)
    proto.graph.node.append(helper.make_node("ReduceMax", ["huge"], ["m"], "most", keepdims=0))
    proto.graph.node.append(helper.make_node("Add", ["c", "m"], ["y"], "add"))


@odd_model()
def expanded_to_64_gigabytes(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Expand", ["one", "size"], ["huge"], "bomb")
    _add(proto, node, one=np.float32(1), size=np.array([2**17, 2**17]))


@odd_model()
def enlarged_to_72_gigabytes(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Resize", ["b", "", "by"], ["huge"], "bomb")
    _add(proto, node, by=np.array([1, 1, 2**13, 2**13], np.float32))


@odd_model("'__class__'", "'w2'", "ignored")
def external_entry_of_another_kind(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[1]
    Path("data.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data.bin")
    tensor.external_data.add(key="__class__", value="os.system")


def _in_type(proto: onnx.ModelProto, kind: int) -> None:
    """The same network in another type of numbers."""
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        made = helper.make_tensor(tensor.name, kind, array.shape, array.ravel().tolist())
        tensor.CopyFrom(made)
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = kind


@odd_model()
def half_precision(proto: onnx.ModelProto) -> None:
    _in_type(proto, TensorProto.FLOAT16)


@odd_model()
def bfloat16(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 22
    _in_type(proto, TensorProto.BFLOAT16)


@odd_model()
def quantized_and_back(proto: onnx.ModelProto) -> None:
    for name, array in {"s": np.float32(0.05), "z": np.uint8(128)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node[2].input[0] = "d"
    proto.graph.node.insert(2, helper.make_node("QuantizeLinear", ["b", "s", "z"], ["q"], "quant"))
    proto.graph.node.insert(3, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "deq"))


@odd_model("'norm'")
def normalization_in_training_mode(proto: onnx.ModelProto) -> None:
    for name in ("scale", "bias", "mean", "variance"):
        array = np.ones(8, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    names = ["b", "scale", "bias", "mean", "variance"]
    proto.graph.node[2].input[0] = "n"
    node = helper.make_node("BatchNormalization", names, ["n", "m2", "v2"], "norm", training_mode=1)
    proto.graph.node.insert(2, node)


@odd_model("'loop0'")
def loop(proto: onnx.ModelProto) -> None:
    def info(name: str, kind: int, shape: list[int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["on"]),
            helper.make_node("Relu", ["v"], ["w"]),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("v", 1, None)],
        [info("on", TensorProto.BOOL, []), info("w", 1, None)],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3), "times"))
    node = helper.make_node("Loop", ["times", "", "a"], ["b"], "loop0", body=body)
    proto.graph.node[1].CopyFrom(node)


COMMANDS: dict[str, list[str]] = {
    "analyze": ["analyze", "odd.onnx"],
    "plan": ["plan", "odd.onnx", "--score", "random", "--uniform", "0.5", "-o", "new.json"],
    "apply": ["apply", "odd.onnx", "new.json", "-o", "new.onnx", "--no-verify"],
}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, sound_model: Callable[[], onnx.ModelProto]
) -> Mapping[tuple[str, str], Ran]:
    root = tmp_path_factory.mktemp("odd")
    jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    for name, case in MODELS.items():
        folder = root / name
        folder.mkdir()
        proto = sound_model()
        with contextlib.chdir(folder):
            case.change(proto)
        (folder / "odd.onnx").write_bytes(proto.SerializeToString())
        jobs.update(((name, command), (folder, line)) for command, line in COMMANDS.items())
    return dict(zip(jobs, run_limited(jobs.values(), TIMEOUT_SECONDS), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_odd_models(results: Mapping[tuple[str, str], Ran], name: str) -> None:
    analyzed, planned, applied = (results[name, command] for command in COMMANDS)
    for ran in (analyzed, planned, applied):
        assert ran.code == 0, ran.err
        lines = ran.err.splitlines()
        known = ("morphgraph: warning: ", "wrote ", "next: morphgraph ")
        assert all(line.startswith(known) for line in lines)
        assert "\x1b" not in ran.out + ran.err
        assert ran.spoilt == ()
    assert ("warning" in analyzed.err) == bool(MODELS[name].says), analyzed.err
    for fragment in MODELS[name].says:
        assert fragment in analyzed.err
    assert (analyzed.made, planned.made, applied.made) == ((), ("new.json",), ("new.onnx",))


@pytest.mark.long
def test_a_chain_of_20000_operators(
    tmp_path: Path, sound_model: Callable[[], onnx.ModelProto]
) -> None:
    # Row 31. What recurses over it, or takes time by the square of its length, ends here.
    proto = sound_model()
    values = ["a", *(f"v{place}" for place in range(20_000)), "b"]
    chain = [helper.make_node("Relu", ends[:1], ends[1:]) for ends in pairwise(values)]
    last = proto.graph.node[2]
    del proto.graph.node[1:]
    proto.graph.node.extend([*chain, last])
    (tmp_path / "long.onnx").write_bytes(proto.SerializeToString())
    line = ["plan", "long.onnx", "--set", "conv0=3", "--format", "csv", "-q"]
    [ran] = run_limited([(tmp_path, line)], TIMEOUT_SECONDS)
    assert (ran.code, ran.err) == (0, "")
    assert "g1,conv0,8,3," in ran.out
