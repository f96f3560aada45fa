"""Values that are maps: onnx_ir has no type for them, and they stay what they are."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg

GENERATOR = np.random.default_rng(0)
ML = "ai.onnx.ml"
LABELS: dict[str, tuple[int, dict[str, Any]]] = {
    "integers": (TensorProto.INT64, {"classlabels_int64s": [0, 1, 2, 3, 4]}),
    "words": (TensorProto.STRING, {"classlabels_strings": list("abcde")}),
}


def classifier(kind: str, scores: bool, normalized: bool) -> onnx.ModelProto:
    """Two layers, and class scores by name."""
    key, labels = LABELS[kind]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["s"], name="second"),
        helper.make_node("Softmax" if normalized else "Identity", ["s"], ["p"], name="scores"),
        helper.make_node("ZipMap", ["p"], ["y"], domain=ML, name="names", **labels),
    ]
    weights = [
        numpy_helper.from_array(GENERATOR.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w1", (8, 32)), ("w2", (32, 5)))
    ]
    entry = helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    outputs = [helper.make_value_info("y", helper.make_sequence_type_proto(entry))]
    if scores:
        outputs.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 5]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(nodes, "g", [x], outputs, weights)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_classifier_that_names_its_classes(
    kind: str, scores: bool, normalized: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    given = classifier(kind, scores, normalized)
    before = given.SerializeToString()
    graph = mg.lift(given)
    assert not recwarn.list
    assert given.SerializeToString() == before
    assert [g.width for g in graph.groups if g.resizable] == [32]
    plan = mg.uniform(graph, 0.5)
    small = mg.apply(graph, plan)
    mg.save(small, tmp_path / "small.onnx")
    written = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(written)
    assert list(written.graph.output) == list(given.graph.output)
    # Against the original whose removed channels are zero, by hand.
    kept = plan.keep_channels(graph)[graph.group("first").index]
    (w2,) = (t for t in given.graph.initializer if t.name == "w2")
    masked = np.zeros((32, 5), np.float32)
    masked[kept] = numpy_helper.to_array(w2)[kept]
    w2.CopyFrom(numpy_helper.from_array(masked, "w2"))
    x = {"x": GENERATOR.standard_normal((3, 8)).astype(np.float32)}
    expected, found = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], x)[0]
        for model in (given, written)
    )
    assert [list(row) for row in found] == [list(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4, atol=1e-5)
    again = mg.lift(tmp_path / "small.onnx")
    assert [g.width for g in again.groups if g.resizable] == [16]


def test_an_input_that_is_a_map_is_refused_by_its_name() -> None:
    model = classifier("words", True, True)
    entry = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    model.graph.input.append(
        helper.make_value_info("d", helper.make_map_type_proto(TensorProto.STRING, entry))
    )
    with pytest.raises(mg.MorphError, match="input 'd': is a map"):
        mg.lift(model)
