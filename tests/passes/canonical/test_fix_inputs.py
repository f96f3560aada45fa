"""Inputs that are fixed to a value, against ONNX Runtime on the file as it was."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_io import as_model, known_shape
from morphgraph.onnx_io.fixed import fixed_values
from morphgraph.passes.canonical.fix_inputs import fix_inputs

X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)


def parsed(text: str, opset: int = 20, ir_version: int = 10) -> onnx.ModelProto:
    """A file in ONNX text, whose weights, declared without numbers, are drawn."""
    head = f'<ir_version: {ir_version}, opset_import: ["": {opset}]> '
    model = onnx.parser.parse_model(head + text)
    generator = np.random.default_rng(1)
    for value in model.graph.value_info:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        numbers = generator.standard_normal(sizes).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, value.name))
    del model.graph.value_info[:]
    return model


def outputs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, dict(feeds))
    return results


def check(model: onnx.ModelProto, fixed: Mapping[str, Any], feeds: Mapping[str, Array]) -> ir.Model:
    """The fixed model, once ONNX Runtime has found it equal to the file, fixed and lifted."""
    source = ir.from_proto(model)
    types = {value.name: value for value in source.graph.inputs}
    given = {
        name: np.array(value, types[name].dtype.numpy()).reshape(
            [size if isinstance(size, int) else 1 for size in types[name].shape]
            if np.size(value) == 1
            else np.shape(value)
        )
        for name, value in fixed.items()
    }
    expected = outputs(model, {**feeds, **given})
    small = fix_inputs(source, fixed)
    onnx.checker.check_model(ir.to_proto(small))
    assert not set(fixed) & {value.name for value in small.graph.inputs}
    assert set(fixed_values(small)) == set(fixed)
    assert [v.name for v in small.graph.outputs] == [v.name for v in source.graph.outputs]
    canonical = mg.lift(small).model
    for made in (small, canonical):
        for wanted, found in zip(expected, outputs(ir.to_proto(made), feeds), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert [value.name for value in source.graph.inputs] == [i.name for i in model.graph.input]
    return small


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


TWO = """net (float[2,4] x, {flag} flag) => (float[2,3] y) <float[4,3] w, float[4,3] v> {{
    {condition}
    y = If (c) <
        then_branch = one () => (float[2,3] p) {{ p = MatMul(x, w) }},
        else_branch = two () => (float[2,3] q) {{ n = Neg(x)  q = MatMul(n, v) }}>
}}"""


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("shape", ["bool", "bool[1]"])
def test_flag(shape: str, value: bool) -> None:
    model = parsed(TWO.format(flag=shape, condition="c = Identity(flag)"))
    small = check(model, {"flag": value}, {"x": X})
    assert ops(small) == (["MatMul"] if value else ["Neg", "MatMul"])
    assert set(small.graph.initializers) == ({"w"} if value else {"v"})


@pytest.mark.parametrize("opset", [9, 11, 13, 16, 20, 23])
@pytest.mark.parametrize("value", [16000, 8000])
def test_number_that_is_compared(opset: int, value: int) -> None:
    condition = "r = Constant<value = int64 {16000}>()  c = Equal(flag, r)"
    model = parsed(TWO.format(flag="int64", condition=condition), opset)
    if opset < 11:
        source = as_model(model)
        assert ops(fix_inputs(source, {"flag": value})).count("If") == 0
    else:
        check(model, {"flag": value}, {"x": X})


@pytest.mark.parametrize("ir_version", [4, 7, 8, 10, 11])
def test_versions_of_the_format(ir_version: int) -> None:
    model = parsed(TWO.format(flag="bool", condition="c = Not(flag)"), 17, ir_version)
    assert ops(check(model, {"flag": True}, {"x": X})) == ["Neg", "MatMul"]


@pytest.mark.parametrize("value", [False, True])
def test_condition_that_an_unknown_one_decides_with(value: bool) -> None:
    condition = """m = ReduceMax<keepdims=0>(x)  z = Constant<value = float {0.0}>()
        g = Greater(m, z)  b = And(flag, g)  c = Not(b)"""
    model = parsed(TWO.format(flag="bool", condition=condition))
    assert ("If" in ops(check(model, {"flag": value}, {"x": X}))) == value


def test_nested_with_values_of_both_scopes() -> None:
    model = parsed("""net (float[2,4] x, bool a, int64 n)
        => (float[2,4] y, float[2,4] z, float[2] k)
        <float[4] w> {
        h = Relu(x)
        t = Constant<value = int64 {2}>()
        y, z, k = If (a) <
            then_branch = one () => (float[2,4] y1, float[2,4] z1, float[2] k1)
            <float[2] k1 = {1, 2}> {
                h1 = Add(h, w)
                e = Equal(n, t)
                y1 = If (e) <
                    then_branch = in1 () => (float[2,4] p) { s = Mul(h1, h)  p = Identity(s) },
                    else_branch = in2 () => (float[2,4] q) { s = Sub(h1, x)  q = Relu(s) }>
                z1 = Identity(h)
            },
            else_branch = two () => (float[2,4] y2, float[2,4] z2, float[2] k2) {
                y2 = Identity(x)
                z2 = Identity(x)
                k2 = Constant<value = float[2] {3, 4}>()
            }>
    }""")
    onnx.checker.check_model(model)
    for fixed in ({"a": True, "n": 2}, {"a": True, "n": 3}, {"a": False, "n": 2}):
        assert "If" not in ops(check(model, fixed, {"x": X}))
    partly = fix_inputs(ir.from_proto(model), {"a": True})
    assert ops(partly).count("If") == 1
    assert ops(fix_inputs(partly, {"n": 2})).count("If") == 0


def test_names_that_both_branches_and_the_graph_have() -> None:
    model = parsed("""net (float[2,4] x, bool a) => (float[2,4] y) <float[4] w> {
        y = If (a) <
            then_branch = one () => (float[2,4] y) { s = Add(x, w)  y = Relu(s) },
            else_branch = two () => (float[2,4] y) { s = Sub(x, w)  y = Tanh(s) }>
    }""")
    for value in (True, False):
        small = check(model, {"a": value}, {"x": X})
        assert [node.outputs[0].name for node in small.graph] == ["s", "y"]


def test_branch_inside_of_a_loop() -> None:
    model = parsed("""net (float[2,4] x, bool a) => (float[2,4] y) {
        m = Constant<value = int64 {3}>()  t = Constant<value = bool {1}>()
        y = Loop (m, t, x) <
            body = step (int64 i, bool c, float[2,4] s) => (bool d, float[2,4] r) {
                d = Identity(c)
                r = If (a) <
                    then_branch = one () => (float[2,4] p) { p = Add(s, x) },
                    else_branch = two () => (float[2,4] q) { q = Mul(s, x) }>
            }>
    }""")
    for value in (True, False):
        small = check(model, {"a": value}, {"x": X})
        (loop,) = (node for node in small.graph if node.op_type == "Loop")
        inside = [node.op_type for node in loop.attributes["body"].as_graph()]
        assert "If" not in inside
        assert ("Add" in inside) == value


def test_function() -> None:
    text = """<ir_version: 10, opset_import: ["": 20, "own": 1]>
        net (float[2,4] x, bool a) => (float[2,4] y) { y = own.pick(x, a) }
        <domain: "own", opset_import: ["": 20]> pick (x, a) => (y) {
            y = If (a) <then_branch = one () => (p) { p = Relu(x) },
                        else_branch = two () => (q) { q = Tanh(x) }>
        }"""
    model = onnx.parser.parse_model(text)
    assert ops(fix_inputs(ir.from_proto(model), {"a": True})) == ["Relu"]
    for value in (True, False):
        check(model, {"a": value}, {"x": X})


def test_numbers_that_are_sizes_places_and_factors() -> None:
    model = parsed(
        """net (float[2,4] x, int64 k, int64[2] s, float t, float[1] u, float[1,4] r)
        => (float[N,M] y, float[2] z, int64 k2) {
        one = Constant<value = int64[1] {1}>()
        k1 = Unsqueeze(k, zero)
        taken = Gather<axis=1>(x, k)
        m = Mul(x, t)  d = Div(m, u)  e = Add(d, r)
        y = Reshape(e, s)
        z = Add(taken, u)
        k2 = Identity(k)
    }""".replace(
            "one = Constant<value = int64[1] {1}>()", "zero = Constant<value = int64[1] {0}>()"
        )
    )
    row = np.array([[1.0, -2.0, 0.5, 3.0]], np.float32)
    fixed = {"k": 2, "s": [4, 2], "t": 0.1, "u": 3, "r": row}
    small = check(model, fixed, {"x": X})
    assert fixed_values(small) == fixed | {"r": row.tolist()}
    # What is fixed is no weight, though it is a floating-point initializer.
    assert mg.cost(mg.lift(small), "params").total == 0


def test_value_that_gives_open_sizes_a_number() -> None:
    model = parsed("""net (float[B,4] x, int64[B] k) => (float[B,4] y) {
        f = Cast<to=1>(k)  a = Constant<value = int64[1] {1}>()
        c = Unsqueeze(f, a)  y = Mul(x, c) }""")
    small = check(model, {"k": np.array([3, 5])}, {"x": X})
    assert known_shape(small.graph.inputs[0]) == (2, 4)
    with pytest.raises(
        ModelError, match="'k' cannot be fixed to one number: its shape is B, and 'B'"
    ):
        fix_inputs(ir.from_proto(model), {"k": 3})


def test_input_with_a_default() -> None:
    model = parsed(TWO.format(flag="bool", condition="c = Identity(flag)"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "flag"))
    assert ops(check(model, {"flag": False}, {"x": X})) == ["Neg", "MatMul"]


def test_dropout_that_an_input_switches() -> None:
    model = parsed("""net (float[2,4] x, bool training) => (float[2,3] y) <float[4,3] w> {
        r = Constant<value = float {0.5}>()
        d = Dropout(x, r, training)  y = MatMul(d, w) }""")
    check(model, {"training": False}, {"x": X})


def test_the_same_again_and_another_value() -> None:
    source = ir.from_proto(parsed(TWO.format(flag="bool", condition="c = Identity(flag)")))
    small = fix_inputs(source, {"flag": True})
    assert fix_inputs(small, {"flag": True}) is small
    with pytest.raises(ModelError, match=r"made for flag=true .* cannot be fixed to false"):
        fix_inputs(small, {"flag": False})


ALL = parsed("""net (float[2,4] x, bool flag, int32 k, float t, int64[2] s, string w, uint8 b)
    => (float[2,4] y) { y = Relu(x) }""")


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"flags": True}, "no such input to be fixed; its inputs are x, flag, .*mean 'flag'"),
        ({"flag": 2}, "'flag' cannot be fixed to 2: it takes true or false"),
        ({"flag": [True, False]}, "'flag' cannot be fixed to true,false: that is 2, and its shape"),
        ({"flag": "yes"}, "to 'yes', which is no number; write flag=true"),
        ({"flag": None}, "which is no number"),
        ({"k": 1.5}, "'k' cannot be fixed to 1.5: it takes whole numbers"),
        ({"k": 2**40}, "it takes whole numbers"),
        ({"k": True}, "it takes whole numbers"),
        ({"b": -1}, "it takes whole numbers"),
        ({"t": float("nan")}, "it takes finite numbers"),
        ({"s": 3}, "that is one number, and its shape is 2"),
        ({"s": [1, 2, 3]}, "that is 3, and its shape is 2"),
        ({"s": [[1], [2, 3]]}, "which is no number"),
    ],
)
def test_values_that_do_not_fit(fixed: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        fix_inputs(ir.from_proto(ALL), fixed)


def test_text_and_everything() -> None:
    with pytest.raises(UnsupportedError, match="'w' cannot be fixed: it is text"):
        fix_inputs(ir.from_proto(ALL), {"w": "a"})
    whole = ir.from_proto(parsed("net (bool a) => (bool y) { y = Not(a) }"))
    with pytest.raises(ModelError, match="all inputs would be fixed"):
        fix_inputs(whole, {"a": True})
    large = ir.from_proto(
        parsed("net (float[100,100] x, float a) => (float[100,100] y) { y = Mul(x, a) }")
    )
    with pytest.raises(UnsupportedError, match="10000 numbers are more than 4096"):
        fix_inputs(large, {"x": np.zeros((100, 100))})


def test_constant_if_gives_an_initializer_of_its_branch() -> None:
    model = parsed("""net (float[2,4] x) => (float[2,4] y, float[2] k) {
        c = Constant<value = bool {1}>()
        y, k = If (c) <
            then_branch = one () => (float[2,4] p, float[2] q) <float[2] q = {1, 2}> {
                p = Relu(x) },
            else_branch = two () => (float[2,4] r, float[2] s) <float[2] s = {3, 4}> { r = Neg(x) }>
    }""")
    onnx.checker.check_model(model)
    canonical = mg.lift(model).model
    assert "If" not in ops(canonical)
    for wanted, found in zip(
        outputs(model, {"x": X}), outputs(ir.to_proto(canonical), {"x": X}), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_empty_constant_that_is_a_result() -> None:
    model = parsed("""net (float[2,4] x) => (float[2,3] y, float[0,4] e)
        <float[4,6] w, float[6,3] v> {
        h = MatMul(x, w)  y = MatMul(h, v)  e = Identity(c) }""")
    empty = np.zeros((0, 4), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(empty, "c"))
    graph = mg.lift(model)
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    assert known_shape(small.graph.initializers["w"]) == (4, 3)
    assert outputs(ir.to_proto(small), {"x": X})[1].shape == (0, 4)


def test_mask_that_shares_a_name_and_not_the_size() -> None:
    model = parsed("""net (float[B,T,4] x, int64[B,T] mask, float[B,P,4] past)
        => (float[B,S,4] y, float[B,S,4] present) <float[4,4] w> {
        h = MatMul(x, w)
        present = Concat<axis=1>(past, h)
        shape = Shape(present)
        one = Constant<value = int64 {1}>()  none = Constant<value = int64 {0}>()
        length = Gather(shape, one)
        places = Range(none, length, one)
        marks = Gather<axis=1>(mask, places)
        last = Constant<value = int64[1] {2}>()
        wide = Unsqueeze(marks, last)  real = Cast<to=1>(wide)
        y = Mul(present, real) }""")
    canonical = mg.lift(model).model
    assert [str(value.shape) for value in canonical.graph.inputs] == [
        "[B,T,4]",
        "[B,P + T]",
        "[B,P,4]",
    ]
    feeds: dict[str, Array] = {
        "x": np.ones((1, 2, 4), np.float32),
        "mask": np.ones((1, 5), np.int64),
        "past": np.ones((1, 3, 4), np.float32),
    }
    for wanted, found in zip(
        outputs(model, feeds), outputs(ir.to_proto(canonical), feeds), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("flag", "condition", "words"),
    [
        ("bool", "c = Not(flag)", "--fix flag=true or --fix flag=false"),
        (
            "int32",
            "s = Constant<value = int32 {8}>()  d = Cast<to=6>(flag)  "
            "g = Greater(d, s)  c = Not(g)",
            "--fix flag=8 or another number",
        ),
        (
            "bool",
            "m = ReduceMax<keepdims=0>(x)  z = Constant<value = float {0.0}>()  "
            "g = Greater(m, z)  c = Or(g, flag)",
            "--fix flag=true (fixed",
        ),
        ("bool", "m = ReduceMax<keepdims=0>(x)  c = Cast<to=9>(m)", None),
    ],
)
def test_what_frees_an_if_is_told(flag: str, condition: str, words: str | None) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graph = mg.lift(parsed(TWO.format(flag=flag, condition=condition)))
    reasons = [op.opaque or "" for op in graph.ops if op.ir.op_type == "If"]
    found = " ".join([*reasons, *(str(each.message) for each in told)])
    if words is None:
        assert "--fix" not in found
    else:
        assert words in reasons[0]
        assert words in str(told[-1].message)


def test_what_carries_channels_is_sliced_with_them() -> None:
    model = parsed("""net (float[2,4] x, float[1,6] style) => (float[2,3] y)
        <float[4,6] w, float[6,3] v> {
        h = MatMul(x, w)  s = Mul(h, style)  y = MatMul(s, v) }""")
    style = np.random.default_rng(2).standard_normal((1, 6)).astype(np.float32)
    graph = mg.lift(model, fixed={"style": style})
    (group,) = [group for group in graph.groups if group.resizable]
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    held = small.graph.initializers["style"]
    assert group.width == 6
    assert known_shape(held) == (1, 3)
