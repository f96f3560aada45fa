"""Weights and the rest of a message apart: protobuf itself is the oracle."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.errors import ModelError
from morphgraph.onnx_io import load, save
from morphgraph.onnx_io.wire import WireError, parted

GENERATOR = np.random.default_rng(0)
DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int64", "bool")


def message(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    """A model that adds up its initializers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Sum", ["x", *(t.name for t in tensors)], ["y"])]
    graph = helper.make_graph(nodes, "sums", [x], [y], list(tensors))
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def weight(name: str, count: int, dtype: str = "float32") -> onnx.TensorProto:
    numbers = GENERATOR.integers(0, 2, count) if dtype == "bool" else GENERATOR.normal(0, 9, count)
    tensor = numpy_helper.from_array(numbers.astype(dtype), name)
    tensor.doc_string = f"what {name} is"
    return tensor


@pytest.mark.parametrize("counts", [(), (5,), (3000,), (3000, 5, 40_000), (128, 1024, 4097)])
def test_parts_are_those_of_the_message_that_protobuf_reads(counts: tuple[int, ...]) -> None:
    proto = message(*(weight(f"w{k}", count) for k, count in enumerate(counts)))
    whole = proto.SerializeToString(deterministic=True)
    light, places = parted(memoryview(whole))
    held = {name: whole[place] for name, place in places.items()}
    rest = onnx.ModelProto.FromString(light)
    for tensor, part in zip(proto.graph.initializer, rest.graph.initializer, strict=True):
        assert (tensor.name in held) == (len(tensor.raw_data) >= 1024) == (not part.raw_data)
        assert held.get(tensor.name, b"") in (b"", tensor.raw_data)
        part.raw_data = held.get(tensor.name, part.raw_data)
    assert rest == proto


def test_bytes_that_are_cut_off_are_no_message_or_one_that_protobuf_takes() -> None:
    whole = message(weight("w", 600), weight("v", 900)).SerializeToString()
    for end in range(0, len(whole), 37):
        try:
            light, held = parted(memoryview(whole[:end]))
        except WireError:
            continue
        cut = onnx.ModelProto.FromString(whole[:end])
        onnx_names = [tensor.name for tensor in cut.graph.initializer]
        assert [t.name for t in onnx.ModelProto.FromString(light).graph.initializer] == onnx_names
        assert set(held) <= set(onnx_names)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_loaded_and_saved_is_what_onnx_reads(dtype: str, tmp_path: Path) -> None:
    proto = message(weight("w", 6000, dtype), weight("v", 3, dtype))
    onnx.save(proto, tmp_path / "a.onnx")
    model = load(tmp_path / "a.onnx")
    for tensor in proto.graph.initializer:
        value = model.graph.initializers[tensor.name].const_value
        assert value is not None
        assert np.array_equal(value.numpy(), numpy_helper.to_array(tensor))
        assert value.doc_string == tensor.doc_string
    save(model, tmp_path / "b.onnx")
    again = onnx.load(tmp_path / "b.onnx")
    assert list(again.graph.initializer) == list(proto.graph.initializer)
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor)


def test_data_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    tensor = weight("w", 6000)
    tensor.dims[0] = 6001
    onnx.save(message(tensor), tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="declares 6001 of FLOAT, which needs 24004 bytes"):
        load(tmp_path / "a.onnx")


def test_data_in_two_places_is_refused(tmp_path: Path) -> None:
    tensor = weight("w", 6000)
    tensor.float_data.append(1.0)
    (tmp_path / "a.onnx").write_bytes(message(tensor).SerializeToString())
    with pytest.raises(ModelError, match="stores data of more than one type"):
        load(tmp_path / "a.onnx")
