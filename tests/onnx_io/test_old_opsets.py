"""Models of older opsets are raised, and compute what they did: by ONNX Runtime, or stored data."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.onnx_io import old_opsets

GENERATOR = np.random.default_rng(0)
WHEEL = Path(onnx.__file__).parent / "backend" / "test" / "data"


def _model(
    nodes: list[onnx.NodeProto],
    opset: int,
    initializers: dict[str, np.ndarray] | None = None,
    ir_version: int = 4,
) -> onnx.ModelProto:
    """From ``x`` of 1x4x8x8 to ``y``."""
    tensors = [numpy_helper.from_array(a, name) for name, a in (initializers or {}).items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])]
    if ir_version < 4:  # then every initializer is an input, too
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd"))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def _undeclared(
    nodes: list[onnx.NodeProto], opset: int, initializers: dict[str, np.ndarray]
) -> onnx.ModelProto:
    model = _model(nodes, opset, initializers)
    model.ir_version = 3
    return model


def _node(op_type: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    node = helper.make_node(op_type, inputs, ["y"], name="node", **attributes)
    node.metadata_props.add(key="scope", value="here")
    return node


def _run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    (y,) = ort.InferenceSession(model.SerializeToString(), options).run(["y"], {"x": x})
    return np.asarray(y)


def _scales(*numbers: float) -> dict[str, np.ndarray]:
    return {"s": np.array(numbers, np.float32)}


MODELS = {
    "Upsample of opset 7": _model([_node("Upsample", "x", scales=[1.0, 1.0, 2.0, 2.0])], 7),
    "linear Upsample": _model(
        [_node("Upsample", "x", "s", mode="linear")], 9, _scales(1, 1, 2.5, 2)
    ),
    "linear Resize": _model([_node("Resize", "x", "s", mode="linear")], 10, _scales(1, 1, 1.5, 3)),
    "Resize, smaller": _model([_node("Resize", "x", "s")], 10, _scales(1, 1, 0.6, 0.7)),
    "Clip": _model([_node("Clip", "x", max=0.3)], 9),
    "Pad": _model([_node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 3, 1], value=2.0)], 8),
    "Slice": _model([_node("Slice", "x", starts=[1], ends=[3], axes=[1])], 7),
    "Dropout": _model([_node("Dropout", "x", ratio=0.3)], 7),
    "IR 3": _model(
        [_node("Conv", "x", "w")], 7, {"w": GENERATOR.standard_normal((5, 4, 3, 3), np.float32)}, 3
    ),
    # Against the standard, and ONNX Runtime takes it: weights of IR 3 that are no inputs.
    "IR 3 with large and small weights that are no inputs": _undeclared(
        [_node("Conv", "x", *"wb")],
        9,
        {
            "w": GENERATOR.standard_normal((5, 4, 3, 3), np.float32),
            "b": GENERATOR.standard_normal(5, np.float32),
        },
    ),
    "BatchNormalization": _model(
        [_node("BatchNormalization", "x", *"aaaa", spatial=1)], 7, {"a": np.ones(4, np.float32)}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_raised_model_computes_what_it_did(name: str) -> None:
    model = MODELS[name]
    before = model.SerializeToString()
    with pytest.warns(mg.MorphWarning, match=r"opset \d+ is raised to 11") as caught:
        graph = mg.lift(model)
    assert len(caught) == 1
    assert model.SerializeToString() == before
    assert graph.model.opset_imports[""] == 11
    assert [value.name for value in graph.model.graph.inputs] == ["x"]
    x = GENERATOR.standard_normal((1, 4, 8, 8), np.float32)
    expected, found = _run(model, x), _run(ir.to_proto(graph.model), x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_converter_loses_is_put_back() -> None:
    model = MODELS["linear Resize"]
    model.doc_string = "made by hand"
    model.metadata_props.add(key="author", value="me")
    with pytest.warns(mg.MorphWarning):
        raised = mg.lift(model).model
    assert (raised.doc_string, dict(raised.metadata_props)) == ("made by hand", {"author": "me"})
    (node,) = [node for node in raised.graph if node.op_type == "Resize"]
    assert (node.name, dict(node.metadata_props)) == ("node", {"scope": "here"})


@pytest.mark.parametrize(("op_type", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_what_is_resized_in_the_middle_keeps_its_pixels_and_its_names(
    op_type: str, opset: int
) -> None:
    """Of an Upsample whose result is no output the converter makes a Resize of another name."""
    nodes = [
        helper.make_node("Relu", ["x"], ["small"]),
        helper.make_node(op_type, ["small", "s"], ["large"], name="up", mode="linear"),
        helper.make_node(op_type, ["large", "s"], ["larger"], name="again"),
        helper.make_node("Neg", ["larger"], ["y"]),
    ]
    model = _model(nodes, opset, _scales(1, 1, 2.5, 2))
    with pytest.warns(mg.MorphWarning):
        raised = mg.lift(model).model
    assert [n.name for n in raised.graph if n.op_type == "Resize"] == ["up", "again"]
    assert [n.outputs[0].name for n in raised.graph] == ["small", "large", "larger", "y"]
    x = GENERATOR.standard_normal((1, 4, 8, 8), np.float32)
    np.testing.assert_allclose(_run(ir.to_proto(raised), x), _run(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1, 4, 8, 8], ["n", 4, "h", "w"]], ids=["fixed", "open"])
def test_another_function_is_refused(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the converter leaves out of a Resize is left out here: then pixels are others."""
    model = onnx.ModelProto()
    model.CopyFrom(MODELS["linear Resize"])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes))
    monkeypatch.setattr(old_opsets, "_keep_meaning", lambda *_: None)
    with pytest.raises(mg.ModelError, match="another function of this model: output 'y' differs"):
        mg.lift(model)


@pytest.mark.parametrize(
    ("node", "opset", "why"),
    [
        (_node("RandomNormalLike", "x"), 9, "it draws random numbers"),
        (_node("Upsample", "x", height_scale=2.0, width_scale=2.0), 1, "ONNX Runtime does not run"),
    ],
    ids=["random", "opset 1"],
)
def test_what_cannot_be_compared_is_said(node: onnx.NodeProto, opset: int, why: str) -> None:
    with pytest.warns(mg.MorphWarning, match=f"is raised to 11.*was not checked: .*{why}"):
        mg.lift(_model([node], opset))


@pytest.mark.parametrize(
    ("node", "initializers", "opset"),
    [
        (_node("BatchNormalization", "x", *"aaaa", spatial=0), {"a": np.ones(4, np.float32)}, 7),
        (_node("ATen", "x", operator="roll"), {}, 9),
        (_node("Cast", "x", to="FLOAT"), {}, 5),
        (_node("Resize", "x", "s"), _scales(1, 1, 0.5, 2), 10),
    ],
    ids=["BatchNormalization", "ATen", "Cast", "Resize"],
)
def test_what_cannot_be_raised_is_named(
    node: onnx.NodeProto, initializers: dict[str, np.ndarray], opset: int
) -> None:
    first = helper.make_node("Relu", ["x"], ["r"], name="first")
    node.input[0] = "r"
    with pytest.raises(mg.ModelError, match=rf"node 'node' \({node.op_type}\)") as caught:
        mg.lift(_model([first, node], opset, initializers))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("export again with a newer opset")


def test_files_are_raised_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is written has the raised opset; the file itself stays as it is."""
    weights = {
        "w": GENERATOR.standard_normal((8, 4, 3, 3), np.float32),
        "v": GENERATOR.standard_normal((5, 8, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="one"),
        helper.make_node("Clip", ["a"], ["b"], name="clip", min=0.0, max=6.0),
        helper.make_node("Conv", ["b", "v"], ["y"], name="two"),
    ]
    old, plan, small = (str(tmp_path / name) for name in ("old.onnx", "plan.json", "small.onnx"))
    onnx.save(_model(nodes, 8, weights, 3), old)
    for arguments in (
        ["analyze", old],
        ["plan", old, "--uniform", "0.5", "-o", plan],
        ["apply", old, plan, "-o", small],
    ):
        assert main(arguments) == 0
        assert "opset 8 is raised to 11" in capsys.readouterr().err
    assert [o.version for o in onnx.load(old).opset_import] == [8]
    assert [o.version for o in onnx.load(small).opset_import] == [11]
    onnx.checker.check_model(onnx.load(small))


WHOLE = sorted(
    str(path.relative_to(WHEEL))
    for kind in ("simple", "pytorch-operator", "pytorch-converted")
    for path in (WHEEL / kind).rglob("model.onnx")
    if "strnorm" not in str(path) and "gradient" not in str(path)  # which no runtime here runs
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) for n in WHOLE])
def test_the_models_of_the_wheel_compute_their_stored_results(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mg.MorphWarning)
        model = mg.load(WHEEL / name)
        mg.lift(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    for folder in (WHEEL / name).parent.glob("test_data_set_*"):
        inputs, outputs = (
            [_tensor(path) for path in sorted(folder.glob(f"{kind}_*.pb"))]
            for kind in ("input", "output")
        )
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, dict(zip(names, inputs, strict=True)))
        for array, expected in zip(found, outputs, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-5)


def _tensor(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
