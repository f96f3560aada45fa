"""Models whose weights stand in files, as runs take them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

import morphgraph as mg
from morphgraph.onnx_io.messages import Written, message_without_weights
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


# Numbers of one byte and of several, below zero, and attributes of all kinds that are common.
TEXT = """<ir_version: 9, opset_import: ["": 20]>
    net (float[1,4,300,8] x, float[4,4,3,3] k, float[4] b) => (float[1,1,2400] y)
    <int64[3] to = {1, -1, 2400}, float low = {-0.5}> {
      a = Conv<pads=[200,1,200,1], dilations=[200,1], auto_pad="NOTSET">(x, k, b)
      r = LeakyRelu<alpha=0.25>(a)
      c = Clip(r, low)
      m = ReduceMax<keepdims=1>(c)
      s = Shape<start=-1>(m)
      o = ConstantOfShape<value = float[1] {2.0}>(s)
      e = Mul(c, o)
      t = Transpose<perm=[0,3,2,1]>(e)
      y = Reshape<allowzero=0>(t, to)
    }"""


def test_messages_say_what_onnx_ir_writes() -> None:
    model = model_from_text(TEXT)
    written = onnx.ModelProto.FromString(message_without_weights(model)).graph
    expected = ir.to_proto(model).graph
    assert list(written.node) == list(expected.node)
    assert list(written.input) == list(expected.input)
    small = {tensor.name: tensor for tensor in written.initializer if not tensor.external_data}
    assert small.keys() == {"b", "to", "low"}
    for tensor in expected.initializer:
        if tensor.name in small:
            found, wanted = map(onnx.numpy_helper.to_array, (small[tensor.name], tensor))
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert np.array_equal(found, wanted)


def test_one_writer_gives_the_messages_for_all_shapes() -> None:
    model = model_from_text(
        """net (float[1,4,8,8] x, float[4,4,3,3] k) => (float[1,4,6,6] y) { y = Conv(x, k) }"""
    )
    writer = Written(model)
    for size in (8, 5, 300):
        shapes = {"x": (1, 4, size, size)}
        message = writer.message(shapes)
        assert message == message_without_weights(model, shapes)
        inferred = onnx.shape_inference.infer_shapes(message, strict_mode=True).graph.output[0]
        dims = [dim.dim_value for dim in inferred.type.tensor_type.shape.dim]
        assert dims == [1, 4, size - 2, size - 2]
