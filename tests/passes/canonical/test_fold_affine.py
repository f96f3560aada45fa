"""Scales and shifts in the layers beside them: the same function, in ONNX Runtime, without them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.ops import parameter_names
from morphgraph.passes.canonical.fold_affine import fold_affine

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class Build:
    """Nodes and random weights, one after the other."""

    def __init__(self, shape: list[int], kind: int = FLOAT) -> None:
        self.rng = np.random.default_rng(0)
        self.kind, self.shape, self.value = kind, shape, "x"
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int, low: float = -1, high: float = 1) -> str:
        name = f"w{len(self.weights)}"
        numbers = self.rng.uniform(low, high, shape)
        array = numbers.astype(helper.tensor_dtype_to_np_dtype(self.kind))
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, *operands: str, **attributes: Any) -> "Build":
        name = f"v{len(self.nodes)}"
        node = helper.make_node(op_type, [self.value, *operands], [name], f"n_{name}", **attributes)
        self.nodes.append(node)
        self.value = name
        return self

    def norm(self, channels: int, **attributes: Any) -> "Build":
        w = self.weight
        parts = [w(channels), w(channels), w(channels), w(channels, low=0.3, high=2)]
        return self.add("BatchNormalization", *parts, **attributes)

    def model(self, *outputs: str) -> ir.Model:
        names = outputs or (self.value,)
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", self.kind, self.shape)],
            [helper.make_tensor_value_info(name, self.kind, None) for name in names],
            self.weights,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    results: list[np.ndarray] = ort.InferenceSession(data, options).run(None, {"x": x})
    return results


def folded_ops(built: Build, *outputs: str, tolerance: float = 1e-5) -> list[str]:
    """The operators of the folded model, which computes the same."""
    model = built.model(*outputs)
    before = ir.to_proto(model).SerializeToString()
    folded = fold_affine(model)
    assert ir.to_proto(model).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    assert [v.name for v in folded.graph.outputs] == [v.name for v in model.graph.outputs]
    dtype = np.float16 if built.kind == HALF else np.float32
    x = np.random.default_rng(1).standard_normal(built.shape).astype(dtype)
    for one, other in zip(run(model, x), run(folded, x), strict=True):
        scale = np.abs(one.astype(np.float32)).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * scale)
    return [node.op_type for node in folded.graph]


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions(spatial: int, group: int, op_type: str, biased: bool) -> None:
    b = Build([2, 4, *[6] * spatial])
    kernel = (8, 4 // group) if op_type == "Conv" else (4, 8 // group)
    operands = [b.weight(*kernel, *[3] * spatial), *([b.weight(8)] if biased else [])]
    b.add(op_type, *operands, group=group, pads=[1] * 2 * spatial)
    assert folded_ops(b.norm(8).add("Relu")) == [op_type, "Relu"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,)])
def test_gemm(transposed: int, bias: tuple[int, ...] | None) -> None:
    b = Build([3, 4])
    operands = [b.weight(5, 4) if transposed else b.weight(4, 5)]
    if bias is not None:
        operands.append(b.weight(*bias))
    b.add("Gemm", *operands, transB=transposed, alpha=0.5, beta=2.0)
    assert folded_ops(b.norm(5)) == ["Gemm"]


@pytest.mark.parametrize("biased", [True, False])
def test_products(biased: bool) -> None:
    b = Build([3, 4])
    b.add("MatMul", b.weight(4, 5))
    if biased:
        b.add("Add", b.weight(5))
    assert folded_ops(b.norm(5).add("Relu")) == ["MatMul", "Add", "Relu"]


def test_a_product_of_more_axes_is_scaled_along_its_last_only() -> None:
    b = Build([2, 3, 4])
    b.add("MatMul", b.weight(4, 3)).add("Add", b.weight(3)).add("Mul", b.weight(3))
    assert folded_ops(b) == ["MatMul", "Add"]
    b = Build([2, 3, 4])
    b.add("MatMul", b.weight(4, 3)).norm(3)  # its channels are the axis before
    assert folded_ops(b) == ["MatMul", "BatchNormalization"]


@pytest.mark.parametrize("shape", [(), (1,), (8, 1, 1), (1, 8, 1, 1)])
def test_scales_and_shifts(shape: tuple[int, ...]) -> None:
    b = Build([2, 4, 6, 6])
    b.add("Conv", b.weight(8, 4, 3, 3))
    for op_type in ("Mul", "Add", "Sub", "Div"):
        b.add(op_type, b.weight(*shape, low=0.5, high=2))
    assert folded_ops(b.norm(8).add("Relu")) == ["Conv", "Relu"]


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (1, 1, 6, 6), (2, 1, 1, 1)])
def test_what_scales_other_axes_stays(shape: tuple[int, ...]) -> None:
    b = Build([2, 4, 6, 6])
    b.add("Conv", b.weight(6, 4, 1, 1)).add("Mul", b.weight(*shape))
    assert folded_ops(b) == ["Conv", "Mul"]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_norm_in_front_of_a_convolution(group: int) -> None:
    b = Build([2, 4, 6, 6])
    b.add("Relu").norm(4).add("Conv", b.weight(8, 4 // group, 3, 3), group=group)
    assert folded_ops(b) == ["Relu", "Conv"]
    b = Build([2, 4, 6, 6])  # padded zeros are not shifted
    b.norm(4).add("Conv", b.weight(8, 4 // group, 3, 3), group=group, pads=[1] * 4)
    assert folded_ops(b) == ["BatchNormalization", "Conv"]


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul", "ConvTranspose"])
def test_a_norm_in_front_of_others(op_type: str) -> None:
    b = Build([3, 4, 5] if op_type == "ConvTranspose" else [3, 4])
    kernel = b.weight(4, 5, 3) if op_type == "ConvTranspose" else b.weight(4, 5)
    b.add("Relu").norm(4).add(op_type, kernel)
    if op_type == "MatMul":
        b.add("Add", b.weight(5))
    b.add("Relu")
    expected = {
        "Gemm": ["Relu", "Gemm", "Relu"],
        "MatMul": ["Relu", "MatMul", "Add", "Relu"],
        "ConvTranspose": ["Relu", "BatchNormalization", "ConvTranspose", "Relu"],
    }
    assert folded_ops(b) == expected[op_type]


def test_what_others_read_stays() -> None:
    b = Build([2, 4, 6, 6])  # a branch
    b.add("Conv", b.weight(4, 4, 3, 3), pads=[1] * 4)
    conv = b.value
    b.norm(4).add("Add", conv)
    assert folded_ops(b) == ["Conv", "BatchNormalization", "Add"]
    b = Build([2, 4, 6, 6])  # an output
    b.add("Conv", b.weight(4, 4, 3, 3))
    conv = b.value
    b.norm(4)
    assert folded_ops(b, b.value, conv) == ["Conv", "BatchNormalization"]
    b = Build([2, 4, 6, 6])  # a kernel of two layers
    shared = b.weight(4, 4, 3, 3)
    b.add("Conv", shared, pads=[1] * 4).norm(4).add("Relu").add("Conv", shared).norm(4)
    assert folded_ops(b).count("BatchNormalization") == 2
    b = Build([2, 4, 6, 6])  # a bias of two layers: each has its own then
    bias = b.weight(4)
    b.add("Conv", b.weight(4, 4, 3, 3), bias).norm(4).add("Relu")
    b.add("Conv", b.weight(4, 4, 3, 3), bias).norm(4)
    assert folded_ops(b) == ["Conv", "Relu", "Conv"]


def test_statistics_of_the_batch_stay() -> None:
    b = Build([2, 4, 6, 6])
    b.add("Conv", b.weight(4, 4, 3, 3)).norm(4, training_mode=1)
    assert [n.op_type for n in fold_affine(b.model()).graph] == ["Conv", "BatchNormalization"]


def test_computed_kernels_stay_computed() -> None:
    b = Build([2, 4, 6, 6])
    kernel, factor = b.weight(4, 4, 3, 3), b.weight(4, 1, 1, 1)
    b.nodes.append(helper.make_node("Mul", [kernel, factor], ["scaled"], "scale"))
    assert folded_ops(b.add("Conv", "scaled").norm(4)) == ["Mul", "Conv", "BatchNormalization"]


def test_half_precision() -> None:
    b = Build([2, 4, 6, 6], HALF)
    b.add("Conv", b.weight(8, 4, 3, 3)).norm(8).add("Relu")
    assert folded_ops(b, tolerance=5e-3) == ["Conv", "Relu"]
    b = Build([2, 4, 6, 6], HALF)  # 400 * 1000 is infinite in half precision
    b.add("Conv", b.weight(8, 4, 1, 1, low=300, high=400)).add(
        "Mul", b.weight(8, 1, 1, low=900, high=999)
    )
    model = b.model()
    assert [node.op_type for node in fold_affine(model).graph] == ["Conv", "Mul"]


def test_saved_folded(tmp_path: Path) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    net(torch.randn(4, 3, 8, 8))
    graph = mg.lift(mg.export(net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_batch=True))
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    mg.save(small, tmp_path / "small.onnx", folded=True)
    written = mg.load(tmp_path / "small.onnx")
    assert [node.op_type for node in written.graph] == ["Conv", "Relu", "Conv"]
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(mg.to_torch(written)(x), mg.to_torch(small)(x))
    assert set(parameter_names(written)) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert len(small.graph) == 4
