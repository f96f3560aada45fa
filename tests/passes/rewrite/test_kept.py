"""A resized file differs from the original in sizes alone: whatever ONNX can hold stays."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.origin import KEYS
from morphgraph.plans import make_plan
from morphgraph.testing import random_plan

FLOAT = TensorProto.FLOAT


def weight(name: str, *shape: int) -> onnx.TensorProto:
    random = np.random.default_rng(len(name))
    tensor = numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
    tensor.doc_string = f"what {name} is for"
    tensor.metadata_props.add(key="layer", value=name)
    return tensor


def described() -> onnx.ModelProto:
    """Two convolutions with everything that a file may say of them."""
    info = helper.make_tensor_value_info
    x, y = info("x", FLOAT, ["batch", 3, 8, 8]), info("y", FLOAT, ["detections", 5, "rows", 8])
    inner = info("c", FLOAT, ["batch", 8, 8, 8])
    for value in (x, y, inner):
        value.doc_string = f"the value {value.name}"
        value.metadata_props.add(key="unit", value=value.name)
        value.type.denotation = "IMAGE"
        for axis, meaning in enumerate(("DATA_BATCH", "DATA_CHANNEL", "", "DATA_FEATURE")):
            if meaning:
                value.type.tensor_type.shape.dim[axis].denotation = meaning
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="act"),
        helper.make_node("Conv", ["r", "v"], ["y"], name="second"),
    ]
    for node in nodes:
        node.doc_string = f"the node {node.name}"
        node.metadata_props.add(key="pkg.scope", value=node.name)
        node.attribute.sort(key=lambda attribute: attribute.name)
    weights = [weight("w", 8, 3, 3, 3), weight("b", 8), weight("v", 5, 8, 1, 1)]
    graph = helper.make_graph(nodes, "a net", [x], [y], weights, "what it does", [inner])
    graph.metadata_props.add(key="of", value="the graph")
    graph.quantization_annotation.add(tensor_name="c").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="b"
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
        producer_name="somebody",
        producer_version="1.2",
        domain="com.example",
        model_version=7,
        doc_string="the model",
    )
    model.metadata_props.add(key="author", value="me")
    return model


def without_origin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that does not say by which plan it was made."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    copy.metadata_props.extend(e for e in model.metadata_props if e.key not in KEYS)
    return copy


def without_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without weights' numbers, and without what is no size that the file declared."""
    copy = without_origin(model)
    for tensor in copy.graph.initializer:
        for field in ("dims", "raw_data", "float_data"):
            tensor.ClearField(field)
    declared = [value for value in copy.graph.value_info if value.name == "c"]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(declared)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                dim.ClearField("dim_value")
    return copy


@pytest.mark.parametrize("resized", [False, True])
def test_what_the_file_says_stays(resized: bool, tmp_path: Path) -> None:
    proto = described()
    onnx.checker.check_model(proto, full_check=True)
    graph = mg.lift(proto)
    plan = random_plan(graph, 1) if resized else make_plan(graph, {}, {}, {})
    mg.save(mg.apply(graph, plan), tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(found, full_check=True)
    kept = found.graph.initializer[0].dims[0]
    assert kept < 8 if resized else kept == 8
    expected, got = without_sizes(proto), without_sizes(found)
    assert str(got) == str(expected)
    # Once more, as a second round would.
    again = mg.lift(tmp_path / "out.onnx")
    mg.save(mg.apply(again, make_plan(again, {}, {}, {})), tmp_path / "again.onnx")
    same = without_origin(onnx.load(tmp_path / "again.onnx"))
    assert str(same) == str(without_origin(found))


def with_default(*shape: int, ir_version: int = 9, also: tuple[str, ...] = ()) -> onnx.ModelProto:
    """A gain between two convolutions that callers may override."""
    info = helper.make_tensor_value_info
    weights = [weight("w", 8, 3, 3, 3), weight("v", 5, 8, 1, 1), weight("deep", 8, 8, 1, 1)]
    weights.append(numpy_helper.from_array(np.full(shape, 0.5, np.float32), "gain"))
    listed = [info(w.name, FLOAT, list(w.dims)) for w in weights if w.name in also]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "gain"], ["c"], name="scale"),
        helper.make_node("Neg", ["gain"], ["n"], name="negative"),  # must not be folded
        helper.make_node("Add", ["c", "n"], ["s"], name="shift"),
        helper.make_node("Conv", ["s", "deep"], ["d"], name="middle"),
        helper.make_node("Relu", ["d"], ["r"], name="act"),
        helper.make_node("Conv", ["r", "v"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", FLOAT, [1, 3, 8, 8]), info("gain", FLOAT, list(shape)), *listed],
        [info("y", FLOAT, [1, 5, 6, 6])],
        weights,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=ir_version)


def run_in_ort(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (result,) = session.run(None, feeds)
    return np.asarray(result)


def sliced(proto: onnx.ModelProto, graph: mg.ChannelGraph, plan: mg.Plan) -> onnx.ModelProto:
    """The original with zeros in what reads the removed channels, by hand."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for index, kept in plan.keep_channels(graph).items():
        for member in graph.groups[index].members:
            for tensor in copy.graph.initializer:
                if tensor.name == member.value and member.axis == 1:
                    array = numpy_helper.to_array(tensor).copy()
                    gone = np.setdiff1d(np.arange(array.shape[1]), kept)
                    array[:, gone] = 0
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


@pytest.mark.parametrize("shape", [(), (1,), (8, 1, 1), (1, 8, 1, 1)])
def test_a_default_may_still_be_overridden(shape: tuple[int, ...]) -> None:
    proto = with_default(*shape)
    graph = mg.lift(proto)
    plan = random_plan(graph, 0)
    assert plan.groups
    small = ir.to_proto(mg.apply(graph, plan))
    onnx.checker.check_model(small, full_check=True)
    assert [value.name for value in small.graph.input] == ["x", "gain"]
    masked = sliced(proto, graph, plan)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    other = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for feeds in ({"x": x}, {"x": x, "gain": np.asarray(other)}):
        expected = run_in_ort(masked, feeds)
        assert run_in_ort(small, feeds) == pytest.approx(expected, abs=1e-4)
    again = mg.lift(small)
    assert [value.name for value in again.model.graph.inputs] == ["x", "gain"]


@pytest.mark.parametrize(
    ("ir_version", "listed"), [(3, ("w", "v", "deep")), (4, ("w", "v", "deep")), (4, ("v",))]
)
def test_weights_that_old_files_list_as_inputs_stay_weights(
    ir_version: int, listed: tuple[str, ...]
) -> None:
    """Also where a quantizer has taken those that it replaced off the list."""
    proto = with_default(8, 1, 1, ir_version=ir_version, also=listed)
    graph = mg.lift(proto)
    assert sum(group.resizable for group in graph.groups) == 2
    plan = random_plan(graph, 0)
    small = ir.to_proto(mg.apply(graph, plan))
    onnx.checker.check_model(small, full_check=True)
    names = ["x"] if ir_version == 3 else ["x", "gain", *listed]
    assert [value.name for value in small.graph.input] == names
    sizes = {tensor.name: list(tensor.dims) for tensor in small.graph.initializer}
    for value in small.graph.input[1:]:
        assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == sizes[value.name]
