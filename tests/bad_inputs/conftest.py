"""A sound model, which the cases spoil."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def _sound_model() -> onnx.ModelProto:
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


@pytest.fixture(scope="session")
def sound_model() -> Callable[[], onnx.ModelProto]:
    """Makes a network of two convolutions, ``conv0`` and ``conv1``, with ``relu0`` between."""
    return _sound_model
