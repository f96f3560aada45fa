"""Models whose weights stand in files, as runs take them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from morphgraph.testing import model_from_text


def test_weights_of_all_sizes_may_stand_in_a_file(tmp_path: Path) -> None:
    """Also those that are too small to be lent to ONNX Runtime: a message stands beside no file."""
    model = model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,3,8,8] x, float[16,3,3,3] a, float[16] b, float[4,16,1,1] c)
        => (float[1,4,6,6] y) { h = Conv(x, a, b)  r = Relu(h)  y = Conv(r, c) }""")
    path = tmp_path / "model.onnx"
    onnx.save(
        ir.to_proto(model), path, save_as_external_data=True, location="data", size_threshold=0
    )
    stored = onnx.load(path, load_external_data=False).graph.initializer
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, feeds)
    np.testing.assert_allclose(run(mg.load(path), feeds)["y"], expected, atol=1e-6)
