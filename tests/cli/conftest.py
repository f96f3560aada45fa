"""A small network, and the command line as a function."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run_main(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run_main


def small_cnn() -> onnx.ModelProto:
    """Two convolutions with BatchNorm between, pooling, a linear layer; weights that are felt."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = int(np.prod(shape[1:])) or 1
        array = generator.standard_normal(shape) / np.sqrt(fan_in)
        return numpy_helper.from_array(array.astype(np.float32), name)

    def positive(name: str, size: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.uniform(0.5, 1.5, size).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight"], ["a"], "c1", pads=[1, 1, 1, 1]),
        helper.make_node(
            "BatchNormalization",
            ["a", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"],
            ["b"],
            "n1",
        ),
        helper.make_node("Relu", ["b"], ["c"], "r1"),
        helper.make_node("Conv", ["c", "conv2.weight", "conv2.bias"], ["d"], "c2"),
        helper.make_node("Relu", ["d"], ["e"], "r2"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], "pool"),
        helper.make_node("Flatten", ["f"], ["g"], "flat"),
        helper.make_node("Gemm", ["g", "fc.weight", "fc.bias"], ["y"], "head", transB=1),
    ]
    weights = [
        weight("conv1.weight", 8, 3, 3, 3),
        positive("bn.weight", 8),
        weight("bn.bias", 8),
        weight("bn.running_mean", 8),
        positive("bn.running_var", 8),
        weight("conv2.weight", 12, 8, 3, 3),
        weight("conv2.bias", 12),
        weight("fc.weight", 5, 12),
        weight("fc.bias", 5),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    path.write_bytes(small_cnn().SerializeToString())
    return path


@pytest.fixture
def plan(model: Path, run: Run) -> Path:
    path = model.with_name("plan.json")
    assert run("plan", model, "--budget", "flops=50%", "-o", path).code == 0
    return path
