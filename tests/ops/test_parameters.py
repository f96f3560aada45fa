"""Which initializers count as parameters, and which as running statistics."""

import onnx_ir as ir
import pytest

from morphgraph.errors import ModelError
from morphgraph.ops import parameter_names, running_statistics


def test_parameter_names() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[1,2,4] x) => (float[1,2,4] y)
        <float[2] scale = {1,1}, float[2] shift = {0,0},
         float[2] mean = {0,0}, float[2] var = {1,1},
         float half = {0.5}, int64[1] axes = {1}, float[2] buffer = {1,2}>
        { a = BatchNormalization(x, scale, shift, mean, var)
          b = Mul(a, half)
          c = Add(b, buffer)
          d = ReduceSum(c, axes)
          y = Add(c, d) }
        """
    )
    assert parameter_names(model) == ["scale", "shift", "buffer"]
    assert running_statistics(model) == ["mean", "var"]
    model.metadata_props["morphgraph.parameters"] = '["shift", "scale", "gone"]'
    assert parameter_names(model) == ["shift", "scale"]
    model.metadata_props["morphgraph.parameters"] = "{"
    with pytest.raises(ModelError, match="not JSON"):
        parameter_names(model)
