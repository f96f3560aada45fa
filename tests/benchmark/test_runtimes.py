"""Runtimes of a user's own, whose times are known, and what is told of ONNX Runtime's kernels."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import morphgraph as mg
from morphgraph.benchmark.profile import Structure, compare_profiles, structure_of
from morphgraph.runtimes import Executed, Operator, find_runtime
from morphgraph.testing import model_from_text

PRETENDED = Path(__file__).parent / "pretended.py"

TINY = "{name} (float[N,4] x) => (float[N,4] y) {{ y = Relu(x) }}"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A module of the user's own in the working folder."""
    (tmp_path / "my_phone.py").write_bytes(PRETENDED.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_phone", raising=False)
    return "my_phone"


def _tiny(name: str) -> ir.Model:
    return model_from_text(TINY.format(name=name))


def test_a_runtime_of_ones_own_is_compared_exactly(pretended: str) -> None:
    models = [_tiny("slow"), _tiny("quick")]
    runtimes = [f"{pretended}:Phone", f"{pretended}:FastPhone"]
    result = mg.bench(models, runtimes=runtimes, seconds=0.01, batch=2)
    assert result.clock == "wall"  # CPU time says nothing of a phone
    assert [(one.name, one.runtime) for one in result.models] == [
        ("slow", "phone"),
        ("quick", "phone"),
        ("slow", "fast phone"),
        ("quick", "fast phone"),
    ]
    assert [one.speedup for one in result.models] == [None, *map(pytest.approx, (2.0,)), None, 2.0]
    for one in result.models[1::2]:
        assert one.speedup_interval == pytest.approx((2.0, 2.0))
        assert one.unstable is False
    assert [one.runtime_speedup for one in result.models] == [None, None, *[pytest.approx(4.0)] * 2]
    for one in result.models[::2]:
        assert one.self_ratio is not None
        assert one.self_ratio.ratio == pytest.approx(1.0)
    convolutions = result.models[0].convolutions
    assert convolutions is not None
    assert (convolutions.count, convolutions.outside) == (3, ("conv2", "c"))
    assert "quick in fast phone is 2.00 times" in result.verdict
    assert "4.00 times (95 %: 4.00 to 4.00) as fast as in the first runtime" in result.verdict
    assert "2 of its 3 convolutions run outside the blocked layout: conv2, c." in result.verdict


def test_a_profile_of_ones_own_runtime(pretended: str) -> None:
    structures = [Structure({"n1": "conv1"}, {"n1"}, {"conv1": flops}) for flops in (8.0, 6.0)]
    result = mg.bench(
        [_tiny("slow"), _tiny("quick")],
        runtimes=[f"{pretended}:Phone"],
        seconds=0.01,
        profile=True,
        structures=structures,
    )
    (profile,) = result.profiles
    (row,) = profile.layers
    assert (row.name, row.before_ms, row.after_ms, row.saved_ms) == ("conv1", 2.0, 1.0, 1.0)
    assert row.missed_ms == pytest.approx(1.0 - 2.0 * 6 / 8)


def test_what_a_runtime_does_not_tell(pretended: str) -> None:
    result = mg.bench([_tiny("quick")], runtimes=[f"{pretended}:Mute"], seconds=0.01)
    assert result.models[0].convolutions is None
    with pytest.raises(mg.UnsupportedError, match="no profile"):
        mg.bench([_tiny("quick")], runtimes=[f"{pretended}:Mute"], seconds=0.01, profile=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ortt", "runtime 'ortt' is unknown (did you mean 'ort'?); use ort, openvino or module:"),
        ("no_such_module:Phone", "ModuleNotFoundError"),
        ("my_phone:Missing", "AttributeError"),
        ("my_phone:OnPhone", "TypeError"),
        ("builtins:dict", "makes a dict; derive it from"),
        ("ort:tpu", "no such provider; it has"),
    ],
)
@pytest.mark.usefixtures("pretended")
def test_runtimes_that_are_none(name: str, words: str) -> None:
    with pytest.raises(mg.UnsupportedError, match=re.escape(words)):
        find_runtime(name)


# --- what ONNX Runtime executes ---

CONVS = """
net (float[1,3,8,8] x, float[16,3,3,3] w1, float[16] b1, float[29,16,1,1] w2, float[16,29,1,1] w3,
     float[16,16,1,1] w4) => (float[1,16,6,6] y) {
    a = Conv(x, w1, b1)  b = Relu(a)
    c = Conv(b, w2)  d = Relu(c)
    e = Conv(d, w3)  f = Add(e, b)
    y = Conv(f, w4)
}"""


def _with_weights(text: str, names: dict[str, str] | None = None) -> ir.Model:
    """A model from text whose inputs beside x are random weights; nodes may get names."""
    model = model_from_text(text)
    generator = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        assert value.shape is not None
        shape = tuple(int(size) for size in value.shape.numpy())
        array = generator.standard_normal(shape).astype(np.float32) / 4
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = (names or {}).get(node.outputs[0].name or "", "")
    return model


def _optimized(model: ir.Model, folder: Path) -> onnx.GraphProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return onnx.load(folder / "optimized.onnx").graph


def test_convolutions_outside_the_blocked_layout_are_named(tmp_path: Path) -> None:
    model = _with_weights(CONVS, {"c": "narrow", "e": "wide"})
    found = mg.bench([model], seconds=0.01).models[0].convolutions
    assert found is not None
    convolutions = [n for n in _optimized(model, tmp_path).node if n.op_type.endswith("Conv")]
    plain = [node for node in convolutions if node.domain != "com.microsoft.nchwc"]
    assert (found.count, len(found.outside)) == (len(convolutions), len(plain))
    if len(plain) < len(convolutions):  # a processor with such a layout
        assert "wide" in found.outside  # 29 channels are no whole number of blocks
        assert "output 'y'" not in found.outside
    else:
        assert set(found.outside) == {"narrow", "wide", "output 'a'", "output 'y'"}


def _kernels(model: Any, feeds: dict[str, np.ndarray], runs: int = 2) -> list[Executed]:
    return list(find_runtime("ort").session(model).executed(feeds, runs))


def test_activations_that_are_fused_are_told() -> None:
    pads = "pads = [1, 1, 1, 1]"
    model = model_from_text(
        f"""g (float[1,16,8,8] x, float[2,8] z, float[16,16,3,3] a, float[18,16,3,3] b,
               float[16,18,3,3] c, float[8,4] d, float[4] e)
        => (float[1,16,8,8] y, float[2,4] t) <float low = {{0}}, float high = {{6}}>
        {{
            a1 = Conv<{pads}>(x, a)
            a2 = Clip(a1, low, high)
            b1 = Conv<{pads}>(a2, b)
            c1 = Conv<{pads}>(b1, c)
            y = Relu(c1)
            s = Gemm(z, d, e)
            t = LeakyRelu(s)
        }}""",
        inputs=("x", "z"),
    )
    operators = find_runtime("ort").session(model).operators()
    convolutions = {(one.layout, one.activation) for one in operators if "Conv" in one.op_type}
    assert convolutions == {("blocked", "Clip"), ("blocked", ""), ("plain", "Relu")}
    assert [one.activation for one in operators if "Gemm" in one.op_type] == ["LeakyRelu"]


def test_every_node_is_in_one_kernel() -> None:
    """Also where names are missing, or look like those of the runtime."""
    model = _with_weights(CONVS, {"a": "same", "f": "b_nchwc"})
    kernels = _kernels(model, {"x": np.ones((1, 3, 8, 8), np.float32)})
    origins = Counter(origin for kernel in kernels for origin in kernel.origins)
    assert sum(origins.values()) == len(list(model.graph))
    outputs = {f"output '{name}'" for name in "bcdey"}
    assert origins.keys() == {"same", "b_nchwc"} | outputs
    by_layer = {kernel.layer: kernel for kernel in kernels if "Conv" in kernel.op_type}
    assert by_layer["output 'y'"].origins == ("output 'y'",)
    assert all(kernel.microseconds >= 0 for kernel in kernels)
    assert kernels[-1].outputs[-1] == (1, 16, 6, 6)


def test_a_layer_of_a_transformer_block() -> None:
    """Fusions that ONNX Runtime names after a node; packed weights have their shapes."""
    text = """
    net (float[2,5,8] x, float[8,32] w1, float[32] b1, float[32,8] w2, float[8] b2,
         float[8] s, float[8] t) => (float[2,5,8] y) {
        n = LayerNormalization(x, s, t)
        m = MatMul(n, w1)  h = Add(m, b1)  g = Gelu(h)
        o = MatMul(g, w2)  p = Add(o, b2)
        y = Add(x, p)
    }"""
    names = {name: f"node_{name}" for name in "nmhgopy"}
    kernels = _kernels(_with_weights(text, names), {"x": np.ones((2, 5, 8), np.float32)})
    origins = Counter(origin for kernel in kernels for origin in kernel.origins)
    assert origins == Counter(names.values())
    (first,) = [kernel for kernel in kernels if "node_m" in kernel.origins]
    assert first.inputs[1] == (8, 32)
    assert first.layer == "node_m"


def test_the_body_of_a_loop_is_no_part_of_the_loop() -> None:
    text = """
    <opset_import: ["": 20], ir_version: 9>
    net (float[64,64] x) => (float[64,64] y)
        <int64 n = {9}, bool go = {1}> {
        y = Loop(n, go, x) <body = b (int64 i, bool c, float[64,64] v) => (bool d, float[64,64] w) {
            d = Identity(c)  w = MatMul(v, v)
        }>
    }"""
    model = onnx.parser.parse_model(text)
    session = find_runtime("ort").session(model)
    feeds = {"x": np.zeros((64, 64), np.float32)}
    kernels = session.executed(feeds, 3)
    by_type = {kernel.op_type: kernel for kernel in kernels}
    assert by_type["MatMul"].inputs[0] == (64, 64)
    # The loop itself does next to nothing, its body nine products a run.
    assert by_type["Loop"].microseconds < sum(one.microseconds for one in kernels)
    assert by_type["Loop"].origins == ("output 'y'",)


def test_a_session_runs_as_onnx_runtime_does(tmp_path: Path) -> None:
    model = _with_weights(CONVS)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    data = ir.to_proto(model).SerializeToString()
    (wanted,) = onnxruntime.InferenceSession(data).run(None, feeds)
    path = tmp_path / "net.onnx"
    mg.save(model, path)
    for source in (model, data, path, str(path), onnx.load_from_string(data)):
        session = find_runtime("ort:CPU").session(source)
        assert np.array_equal(session.run(feeds)[0], wanted)
        assert [(one.name, one.shape) for one in session.inputs] == [("x", (1, 3, 8, 8))]
        assert len(session.operators()) == len(session.executed(feeds))
    with pytest.raises(mg.ModelError, match="7 bytes are not an ONNX model"):
        find_runtime("ort").session(b"garbage")


# --- the profile ---


def test_where_the_time_went() -> None:
    def kernel(layer: str, kind: str, microseconds: float, **more: Any) -> Executed:
        return Executed(
            layer, kind, layer=layer, origins=(layer,), microseconds=microseconds, **more
        )

    depthwise = {"inputs": ((1, 8, 4, 4), (8, 1, 3, 3))}
    before = [
        kernel("a", "Conv", 1000.0, layout="blocked"),
        kernel("b", "Conv", 400.0, layout="blocked", **depthwise),
        kernel("r", "Relu", 100.0),
    ]
    after = [
        kernel("a", "Conv", 500.0, layout="blocked"),
        kernel("b", "FusedConv", 600.0, layout="plain", **depthwise),
        Executed("ReorderOutput", "ReorderOutput", microseconds=50.0),
    ]
    structures = (
        Structure({"a": "one", "b": "two", "r": "act"}, {"a", "b"}, {"one": 80.0, "two": 20.0}),
        Structure({"a": "one", "b": "two"}, {"a", "b"}, {"one": 40.0, "two": 10.0}),
    )
    found = compare_profiles(("base", "slim"), "ort", before, after, structures)
    assert (found.before_ms, found.after_ms) == (1.5, 1.15)
    rows = {row.name: row for row in found.layers}
    assert [row.name for row in found.layers] == ["two", "(ReorderOutput)", "one", "act"]
    missed = {name: pytest.approx(ms) for name, ms in (("two", 0.4), ("one", 0.0), ("act", -0.05))}
    assert {name: rows[name].missed_ms for name in missed} == missed
    assert (rows["two"].flops_before, rows["two"].flops_after) == (20.0, 10.0)
    assert rows["two"].before == {"depthwise Conv, blocked": 1}
    assert rows["two"].after == {"depthwise FusedConv, plain": 1}
    assert sum(row.saved_ms for row in found.layers) == pytest.approx(0.35)
    assert sum(row.saved_ms for row in found.kinds) == pytest.approx(0.35)
    alone = compare_profiles((None, "slim"), "ort", [], after)
    assert [row.name for row in alone.layers] == ["b", "a", "(ReorderOutput)"]
    assert {row.missed_ms for row in alone.layers} == {0.0}


def test_a_structure_knows_layers_by_every_name() -> None:
    graph = mg.lift(_with_weights(CONVS, {"c": "narrow"}))
    found = structure_of(graph)
    assert found.layers["narrow"] == found.layers["output 'c'"]
    assert {"narrow", "output 'a'", "output 'y'"} <= set(found.arithmetic)
    assert "output 'b'" not in found.arithmetic
    assert sum(found.flops.values()) == mg.cost(graph, "flops").total


# --- OpenVINO, where it is installed ---


def test_openvino_names_what_it_fuses() -> None:
    pytest.importorskip("openvino")
    model = _with_weights(CONVS, {"c": "narrow"})
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    runtime = find_runtime("openvino")
    session = runtime.session(model)
    (wanted,) = find_runtime("ort").session(model).run(feeds)
    # In single precision; in bfloat16, OpenVINO's own choice on some processors, 1e-3 is off.
    assert np.abs(session.run(feeds)[0] - wanted).max() < 1e-5 * np.abs(wanted).max()
    kernels = session.executed(feeds, 2)
    origins = Counter(origin for kernel in kernels for origin in kernel.origins)
    assert {"narrow", "output 'a'", "output 'e'", "output 'y'"} <= origins.keys()
    assert max(origins.values()) == 1
    assert {one.name for one in kernels} <= {one.name for one in session.operators()}
    assert all(isinstance(one, Operator) for one in session.operators())


def test_without_openvino_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(mg.UnsupportedError, match="pip install openvino"):
        find_runtime("openvino")


def test_a_kernel_keeps_its_node_through_a_change_of_type() -> None:
    """ONNX Runtime computes float16 in float32 on most CPUs: casts come in, values are renamed."""
    text = """
    <opset_import: ["": 20], ir_version: 9>
    net (float16[1,4,8,8] x, float16[4,4,3,3] w) => (float16[1,4,6,6] y) { y = Conv(x, w) }"""
    session = find_runtime("ort").session(onnx.parser.parse_model(text))
    (convolution,) = [one for one in session.operators() if one.layout is not None]
    assert convolution.layer == "output 'y'"


def test_layers_of_half_precision_keep_their_names() -> None:
    """Values that ONNX Runtime computes in single precision are renamed, those of blocks too."""
    text = """
    <opset_import: ["": 20], ir_version: 9>
    net (float16[1,16,8,8] x, float16[16,16,3,3] v, float16[16,16,3,3] w, float16[16,16,3,3] u)
        => (float16[1,16,6,6] y) {
        [first] a = Conv <pads=[1,1,1,1]> (x, v)  [act] b = Relu(a)
        [second] c = Conv <pads=[1,1,1,1]> (b, w)  [sum] d = Add(c, b)  [behind] e = Relu(d)
        [third] y = Conv(e, u)
    }"""
    kernel = np.ones((16, 16, 3, 3), np.float16)
    model = _with_constants(text, dict.fromkeys("vwu", kernel))
    operators = find_runtime("ort").session(model).operators()
    layers = {one.layer: set(one.origins) for one in operators if one.layout is not None}
    assert layers.keys() == {"first", "second", "third"}
    assert sorted(name for names in layers.values() for name in names) == sorted(
        ["first", "act", "second", "sum", "behind", "third"]
    )


def test_layers_in_int8_keep_their_names() -> None:
    """ONNX Runtime numbers names that it uses twice: ``conv_token_3``."""
    text = """
    <opset_import: ["": 20], ir_version: 9>
    net (float[1,4,8,8] x, float s, uint8 z, int8[8,4,3,3] w, float ws, int8 wz)
        => (float[1,8,6,6] y) {
        [q] xq = QuantizeLinear(x, s, z)  [d] xd = DequantizeLinear(xq, s, z)
        [wd] k = DequantizeLinear(w, ws, wz)
        [conv] a = Conv(xd, k)
        [qa] aq = QuantizeLinear(a, s, z)  [da] y = DequantizeLinear(aq, s, z)
    }"""
    constants = {
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "w": np.ones((8, 4, 3, 3), np.int8),
        "ws": np.float32(0.01),
        "wz": np.int8(0),
    }
    model = _with_constants(text, constants)
    operators = find_runtime("ort").session(model).operators()
    (convolution,) = [one for one in operators if "Conv" in one.op_type]
    assert convolution.op_type == "QLinearConv"
    assert convolution.layer == "conv"


def _with_constants(text: str, constants: dict[str, Any]) -> onnx.ModelProto:
    """A model in ONNX's text, some of whose inputs are constants."""
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        model.graph.input.remove(next(one for one in model.graph.input if one.name == name))
    return model
