"""Weights that are stored as whole numbers count as those that they stand for.

The oracle is the network before ONNX Runtime's own tools quantized it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.testing import model_from_text

HEAD = '<ir_version: 9, opset_import: ["": 20]> '
KINDS = ("params", "body_params")
INPUT, UNITS, OUTPUT = 48, 96, 10


def plain() -> onnx.ModelProto:
    """Two linear layers with biases, float32."""
    generator = np.random.default_rng(0)
    sizes = {"a": (INPUT, UNITS), "c": (UNITS,), "b": (UNITS, OUTPUT), "d": (OUTPUT,)}
    held = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    text = f"""net (float[4,{INPUT}] x) => (float[4,{OUTPUT}] y) {{
        p = MatMul(x, a)  q = Add(p, c)  r = Relu(q)  s = MatMul(r, b)  y = Add(s, d)
    }}"""
    model = onnx.parser.parse_model(HEAD + text)
    for name, array in held.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def in_blocks(source: Path, target: Path, bits: int, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def static(source: Path, target: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": np.ones((4, INPUT), np.float32)}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    quantize_static(source, target, Reader(), per_channel=True)


WAYS: dict[str, tuple[Callable[[Path, Path], None], float]] = {
    "4 bits": (lambda s, t: in_blocks(s, t, 4, True), 0.5),
    "4 bits, zero points": (lambda s, t: in_blocks(s, t, 4, False), 0.5),
    "8 bits": (lambda s, t: in_blocks(s, t, 8, True), 1),
    "dynamic": (dynamic, 1),
    "static": (static, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_network_has_the_weights_of_the_original(way: str, tmp_path: Path) -> None:
    source, target = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
    onnx.save(plain(), source)
    quantize, size = WAYS[way]
    quantize(source, target)
    graphs = [mg.lift(path) for path in (source, target)]
    biases = UNITS + OUTPUT
    kernels = INPUT * UNITS + UNITS * OUTPUT
    assert [mg.cost(g, k).total for g in graphs for k in KINDS] == [kernels + biases] * 4
    # In bytes the codes count, too: a scale and at most a zero point for every block or column.
    least = size * (INPUT * UNITS + UNITS * OUTPUT)
    codes = 5 * (UNITS * -(-INPUT // 32) + OUTPUT * -(-UNITS // 32))
    padding = size * (64 - INPUT) * UNITS
    found = mg.cost(graphs[1], "weight_bytes").total
    assert least < found <= least + 4 * biases + codes + padding


def test_a_plan_counts_what_is_left_of_packed_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
    onnx.save(plain(), source)
    in_blocks(source, target, 4, True)
    graph = mg.lift(target)
    plan = mg.plan(graph, {"params": "70%"}, round_to=1)
    left = plan.cost["params"].after
    small = mg.apply(graph, plan)
    assert left == mg.cost(mg.lift(small), "params").total
    # Blocks of 32 units.
    assert left == 64 * (INPUT + 1 + OUTPUT) + OUTPUT
    (kernel,) = (node for node in small.graph if node.attributes.get_int("K", 0) == INPUT)
    assert kernel.attributes.get_int("N") == 64


def test_a_share_of_no_parameters_is_refused() -> None:
    graph = mg.lift(model_from_text(HEAD + "net (float[1,6] x) => (float[1,6] y) { y = Relu(x) }"))
    assert mg.cost(graph, "params").total == 0
    for kind in KINDS:
        with pytest.raises(ArgumentError, match=rf"{kind}=50%: the network has no parameters"):
            mg.plan(graph, {kind: "50%"})


def test_constants_that_are_no_weights_do_not_count() -> None:
    """Scales of activations, shapes and indices are integers or floats of no layer."""
    text = """net (float[1,6] x, int64[2] shape, float s, uint8 z) => (float[2,3] y) {
        q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  y = Reshape(r, shape)
    }"""
    proto = onnx.parser.parse_model(HEAD + text)
    arrays = {
        "shape": np.array([2, 3]),
        "s": np.array(0.1, np.float32),
        "z": np.array(128, np.uint8),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    del proto.graph.input[1:]
    graph = mg.lift(ir.serde.deserialize_model(proto))
    assert mg.cost(graph, "params").total == 0
