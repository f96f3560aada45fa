"""What a file declares of a weight beside the weight itself, and otherwise: the weight counts."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import morphgraph as mg
from morphgraph.testing import model_from_text, prove

DECLARED: dict[str, tuple[int, Sequence[int | str] | None]] = {
    "another size": (TensorProto.FLOAT, [9, 3, 3, 3]),
    "fewer axes": (TensorProto.FLOAT, [8]),
    "more axes": (TensorProto.FLOAT, [8, 3, 3, 3, 3]),
    "a negative size": (TensorProto.FLOAT, [-1, 3, 3, 3]),
    "another type": (TensorProto.INT64, [8, 3, 3, 3]),
    "an open size": (TensorProto.FLOAT, ["n", 3, 3, 3]),
    "no shape": (TensorProto.FLOAT, None),
}


@pytest.mark.parametrize("case", DECLARED)
def test_declared_sizes_of_weights_do_not_count(
    sound_model: Callable[[], onnx.ModelProto], case: str
) -> None:
    proto = sound_model()
    kind, shape = DECLARED[case]
    proto.graph.value_info.append(helper.make_tensor_value_info("w1", kind, shape))
    graph = mg.lift(proto)
    assert {group.name: group.width for group in graph.groups}["conv0"] == 8
    prove(proto)


@pytest.mark.parametrize(
    "scale",
    ["float[1,5,6] s", "float[5,6] s", "float[5,1] s", "float[1] s", "float[1,1,6] s"],
)
@pytest.mark.parametrize("kind", ["LayerNormalization", "RMSNormalization"])
def test_scales_that_are_spread_over_more_axes_than_are_normalized(scale: str, kind: str) -> None:
    # A scale of the input's own width is one channel with it, wherever it is laid.
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    net (float[1,5,4] x, float[4,6] up, {scale}, float[6,3] down) => (float[1,5,3] y) {{
        u = MatMul(x, up)  n = {kind}(u, s)  r = Relu(n)  y = MatMul(r, down) }}"""
    prove(model_from_text(text))


@pytest.mark.parametrize("kind", ["LayerNormalization", "RMSNormalization"])
def test_a_scale_that_is_computed(kind: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    net (float[1,5,4] x, float[4,6] up, float[4,6] gate, float[6,3] down) => (float[1,5,3] y) {{
        u = MatMul(x, up)  s = MatMul(x, gate)  n = {kind}(u, s)  y = MatMul(n, down) }}"""
    graph = mg.lift(model_from_text(text))
    assert [group.width for group in graph.groups if group.resizable] in ([6], [])
    prove(model_from_text(text))
    assert np.isfinite(mg.cost(graph, "flops").total)
