"""The canonical form computes what the model does, keeps what training needs, is found once."""

import time
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from morphgraph.errors import ModelError, MorphWarning, UnsupportedError
from morphgraph.onnx_io import PARAMETERS_KEY, as_model, static_shape
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.testing import model_from_text


def parse(text: str, opset: int = 18) -> ir.Model:
    return as_model(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    )


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    results: list[np.ndarray] = ort.InferenceSession(content, options).run(None, inputs)
    return results


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def assert_same_function(a: ir.Model, b: ir.Model, **inputs: np.ndarray) -> None:
    for one, other in zip(run(a, **inputs), run(b, **inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Shape arithmetic as exporters write it, weights in a Constant node, an alias of a parameter.
FLATTEN = """
g (float[{batch},4,2,2] x) => (float[{batch},2] y)
<float[2,16] w = {{{w}}}, int64[1] first = {{0}}, int64[1] rest = {{-1}}, float zero = {{0}}>
{{
    bias = Constant<value = float[2] {{0.5, -0.5}}>()
    s = Shape(x)
    n = Gather(s, first)
    target = Concat<axis = 0>(n, rest)
    flat = Reshape(x, target)
    wt = Transpose(w)
    two = Constant<value_int = 2>()
    one = Constant<value_int = 1>()
    sum = Add(two, one)
    same = Identity(flat)
    [product] p = MatMul(same, wt)
    f = Cast<to = 1>(p)
    y = Add(f, bias)
}}
"""
WEIGHTS = ",".join(str(i / 16) for i in range(32))


def flatten(batch: int | str) -> ir.Model:
    return parse(FLATTEN.format(batch=batch, w=WEIGHTS))


def test_static_model() -> None:
    model = flatten(3)
    before = ir.to_proto(model).SerializeToString()
    canonical = canonicalize(model)
    assert ops(canonical) == ["Reshape", "Transpose", "MatMul", "Add"]
    assert set(canonical.graph.initializers) == {"w", "target", "bias"}
    assert static_shape(canonical.graph.initializers["w"]) == (2, 16)
    assert all(
        static_shape(value) and value.dtype for node in canonical.graph for value in node.outputs
    )
    names = [node.name for node in canonical.graph]
    assert names == ["Reshape_flat", "Transpose_wt", "product", "Add_y"]
    assert_same_function(model, canonical, x=noise(3, 4, 2, 2))
    assert ir.to_proto(model).SerializeToString() == before
    weights = [m.graph.initializers["w"].const_value for m in (model, canonical)]
    assert weights[0] is weights[1]


def test_found_once() -> None:
    canonical = canonicalize(flatten(3))
    assert canonicalize(canonical) is canonical
    again = canonicalize(as_model(ir.to_proto(canonical)))
    assert ir.to_proto(again) == ir.to_proto(canonical)


@pytest.mark.parametrize("batch", ["N", ""])
def test_dynamic_batch(batch: str) -> None:
    model = flatten("N")
    if not batch:
        model.graph.inputs[0].shape = ir.Shape([None, 4, 2, 2])
    canonical = canonicalize(model)
    assert ops(canonical) == ["Reshape", "Transpose", "MatMul", "Add"]
    target = canonical.graph.initializers["target"].const_value
    assert target is not None
    assert target.numpy().tolist() == [-1, 16]
    flat = next(iter(canonical.graph)).outputs[0]
    assert flat.shape is not None
    assert [str(size) for size in flat.shape] == [batch or "batch", "16"]
    assert static_shape(flat) == (2, 16)
    assert static_shape(canonical.graph.inputs[0]) == (2, 4, 2, 2)
    for size in (1, 2, 5):
        assert_same_function(model, canonical, x=noise(size, 4, 2, 2))
    again = canonicalize(as_model(ir.to_proto(canonical)))
    assert ir.to_proto(again) == ir.to_proto(canonical)


def test_input_shapes_make_static() -> None:
    canonical = canonicalize(flatten("N"), {"x": (3, 4, 2, 2)})
    assert [str(size) for size in canonical.graph.outputs[0].shape or ()] == ["3", "2"]
    assert "static_shape" not in canonical.graph.outputs[0].meta
    narrowed = canonicalize(canonicalize(flatten("N")), {"x": (5, 4, 2, 2)})
    assert static_shape(narrowed.graph.outputs[0]) == (5, 2)


def test_unknown_sizes_are_asked_for() -> None:
    model = parse("g (float[1,3,0,8] pic) => (float[1,3,0,8] y) { y = Relu(pic) }")
    with pytest.raises(ModelError, match=r"input 'pic'.*give --input-shape pic=\.\.\."):
        canonicalize(model)
    assert static_shape(canonicalize(model, {"pic": (1, 3, 8, 8)}).graph.outputs[0]) == (1, 3, 8, 8)


@pytest.mark.parametrize(("shape", "needed"), [("1,C,8,8", "1x3x8x8"), ("N,C,H,W", "2x3x224x224")])
def test_open_channels_that_a_kernel_decides_are_asked_for(shape: str, needed: str) -> None:
    model = model_from_text(
        f"g (float[{shape}] pic, float[4,3,1,1] w) => (float[N,4,H,W] y) {{ y = Conv(pic, w) }}",
        inputs=("pic",),
    )
    with pytest.raises(ModelError, match=f"input 'pic'.*give --input-shape pic={needed}\\)"):
        canonicalize(model)


def test_open_channels_that_nobody_cares_for_stay_open() -> None:
    model = parse("g (float[N,C,H,W] pic) => (float[N,C,H,W] y) { y = Relu(pic) }")
    (y,) = canonicalize(model).graph.outputs
    assert [str(size) for size in y.shape or ()] == ["N", "C", "H", "W"]


def test_input_without_a_shape_is_asked_for() -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="give --input-shape"):
        canonicalize(model)


def test_dynamic_repeat_of_something_without_a_batch() -> None:
    model = parse(
        """
        g (float[N,3,4] x) => (float[N,4,4] y)
        <float[1,1,4] token = {1,2,3,4}, int64[1] first = {0}, int64[2] rest = {1,4}>
        {
            s = Shape(x)
            n = Gather(s, first)
            target = Concat<axis = 0>(n, rest)
            tokens = Expand(token, target)
            y = Concat<axis = 1>(tokens, x)
        }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Shape", "Concat", "Expand", "Concat"]
    for size in (1, 2, 5):
        assert_same_function(model, canonical, x=noise(size, 3, 4))
    again = canonicalize(as_model(ir.to_proto(canonical)))
    assert ir.to_proto(again) == ir.to_proto(canonical)


def test_expand_along_another_axis_keeps_the_batch_open() -> None:
    model = parse(
        """
        g (float[N,1,4] x) => (float[N,3,4] y)
        <int64[1] first = {0}, int64[2] rest = {3,4}>
        { s = Shape(x)  n = Gather(s, first)  t = Concat<axis = 0>(n, rest)  y = Expand(x, t) }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Expand"]
    assert_same_function(model, canonical, x=noise(5, 1, 4))


def test_repeats_that_depend_on_the_batch_stay_computed() -> None:
    model = parse(
        """
        g (float[N,4] x) => (float[M,4] y)
        <int64[1] first = {0}, int64[1] one = {1}>
        { s = Shape(x)  n = Gather(s, first)  t = Concat<axis = 0>(n, one)  y = Tile(x, t) }
        """
    )
    canonical = canonicalize(model)
    for batch in (1, 4):
        assert_same_function(model, canonical, x=noise(batch, 4))
    assert static_shape(canonicalize(model, {"x": (2, 4)}).graph.outputs[0]) == (4, 4)


def test_shared_shape_operands_are_told_apart() -> None:
    model = parse(
        """
        g (float[N,4] x) => (float[N,2,2] y, float[N,2,2] z)
        <int64[1] first = {0}, int64[2] rest = {2,2}>
        {
            s = Shape(x)  n = Gather(s, first)  t = Concat<axis = 0>(n, rest)
            y = Reshape(x, t)
            r = Relu(x)
            z = Reshape(r, t)
        }
        """
    )
    canonical = canonicalize(model)
    assert_same_function(model, canonical, x=noise(5, 4))


@pytest.mark.parametrize("listed", [True, False])
def test_aliases_of_parameters_are_split(listed: bool) -> None:
    """Where the export lists both as parameters; in files from elsewhere they are one weight."""
    model = parse(
        """
        g (float[1,2] x) => (float[1,2] y)
        <float[2] a = {3,4}>
        { b = Identity(a)  m = Mul(x, a)  y = Mul(m, b) }
        """
    )
    if listed:
        model.metadata_props[PARAMETERS_KEY] = '["a", "b"]'
    canonical = canonicalize(model)
    assert ops(canonical) == ["Mul", "Mul"]
    assert list(canonical.graph.initializers) == (["a", "b"] if listed else ["a"])
    assert_same_function(model, canonical, x=noise(1, 2))


def test_tied_weights_stay_tied() -> None:
    model = parse(
        """
        g (float[1,2] x) => (float[1,2] y)
        <float[2] a = {3,4}, float[2] b = {3,4}>
        { m = Mul(x, a)  n = Mul(m, a)  y = Mul(n, b) }
        """
    )
    canonical = canonicalize(model)
    assert [node.inputs[1].name for node in canonical.graph if node.inputs[1]] == ["a", "a", "b"]


def test_training_operators_survive() -> None:
    model = parse(
        """
        g (float[1,2,4] x) => (float[1,2,4] y)
        <float[2] scale = {2,3}, float[2] shift = {0,1},
         float[2] mean = {1,0}, float[2] var = {1,4}, float half = {0.5}>
        { b = BatchNormalization(x, scale, shift, mean, var)  y, mask = Dropout(b, half) }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["BatchNormalization", "Dropout"]
    assert len(list(canonical.graph)[1].outputs) == 1
    assert_same_function(model, canonical, x=noise(1, 2, 4))


def test_what_is_computed_from_parameters_stays_computed() -> None:
    model = parse(
        """
        g (float[1,2] x) => (float[1,2] y)
        <float[2] v = {3,4}, float[1] buffer = {9}>
        { n = ReduceL2(v)  w = Div(v, n)  k = Sqrt(buffer)  m = Mul(x, w)  y = Mul(m, k) }
        """
    )
    assert ops(canonicalize(model)) == ["ReduceL2", "Div", "Sqrt", "Mul", "Mul"]


def test_zeros_in_constant_nodes_are_no_weights() -> None:
    """TorchScript shares one zero state among the layers of a stack."""
    weights = "float[1,32,4] w, float[1,32,8] r, float[1,32,8] v, float[1,32,8] u"
    model = model_from_text(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[5,2,4] x, {weights}) => (float[5,1,2,8] y) {{
            n = Constant<value_floats = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                0.0, 0.0, 0.0, 0.0, 0.0]>()
            f = Constant<value = int64[3] {{1, 2, 8}}>()  z = Reshape(n, f)
            s = Constant<value = float[1,2,8] {{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}>()
            a = LSTM<hidden_size = 8>(x, w, r, , , s, z)  o = Constant<value_ints = [1]>()
            b = Squeeze(a, o)  y = LSTM<hidden_size = 8>(b, v, u, , , s, z)
        }}"""
    )
    layers = [node for node in canonicalize(model).graph if node.op_type == "LSTM"]
    assert [len(layer.inputs) for layer in layers] == [3, 3]


def test_weights_in_constant_nodes_become_initializers() -> None:
    model = parse(
        """
        g (float[1,2] x) => (float[1,2] y)
        {
            w = Constant<value = float[2,2] {1,2,3,4}>()
            size = Constant<value = int64[1] {2}>()
            fill = ConstantOfShape<value = float[1] {0.5}>(size)
            wt = Transpose(w)
            m = MatMul(x, wt)
            y = Add(m, fill)
        }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Transpose", "MatMul", "Add"]
    assert {"w", "fill"} == set(canonical.graph.initializers)
    assert_same_function(model, canonical, x=noise(1, 2))


def test_made_up_zeros_are_dropped() -> None:
    model = parse(
        """
        g (float[3,2,4] x) => (float[3,1,2,5] y)
        <float[1,20,4] w, float[1,20,5] r, int64[3] size = {1,2,5}>
        {
            h = ConstantOfShape<value = float[1] {0}>(size)
            y = LSTM<hidden_size = 5>(x, w, r, , , h, h)
        }
        """.replace("float[1,20,4] w", f"float[1,20,4] w = {{{','.join(['0.1'] * 80)}}}").replace(
            "float[1,20,5] r", f"float[1,20,5] r = {{{','.join(['0.2'] * 100)}}}"
        )
    )
    canonical = canonicalize(model)
    (lstm,) = canonical.graph
    assert len(lstm.inputs) == 3
    assert_same_function(model, canonical, x=noise(3, 2, 4))


def test_gather_of_everything_in_order_is_a_reshape() -> None:
    model = parse(
        """
        g (float[1,4,1,1] x) => (float[1,4,1,1] y)
        <int64[1] flat = {-1}, int64[1,4,1,1] order = {0,1,2,3}, int64[1,4,1,1] mixed = {1,0,2,3}>
        {
            v = Reshape(x, flat)  g1 = Gather(v, order)  r = Relu(g1)
            u = Reshape(r, flat)  y = Gather(u, mixed)
        }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Relu", "Reshape", "Gather"]
    assert_same_function(model, canonical, x=noise(1, 4, 1, 1))


def test_branches_of_a_known_condition() -> None:
    text = """
        g (float[1,4] x) => (float[1,4] y)
        <int64 want = {RANK}>
        {
            s = Shape(x)  r = Size(s)  c = Equal(r, want)
            z = If(c) <
                then_branch = a () => (float[1,4] t) {
                    k = Constant<value_float = 2.0>()  t = Mul(x, k)
                },
                else_branch = b () => (float[1,4] e) {
                    k = Constant<value_float = 3.0>()  e = Add(x, k)
                }
            >
            q = If(c) <
                then_branch = a2 () => (float[1,4] t2) {
                    k = Constant<value_float = 2.0>()  t2 = Mul(z, k)
                },
                else_branch = b2 () => (float[1,4] e2) { e2 = Identity(z) }
            >
            y = Relu(q)
        }
        """
    for rank, expected in ((2, ["Mul", "Mul", "Relu"]), (3, ["Add", "Relu"])):
        model = parse(text.replace("RANK", str(rank)))
        canonical = canonicalize(model)
        assert ops(canonical) == expected
        assert_same_function(model, canonical, x=noise(1, 4))


def test_branches_of_an_unknown_condition_keep_their_captures() -> None:
    model = parse(
        """
        g (float[N,4] x, bool c) => (float[N,4] y)
        {
            d = Relu(x)
            y = If(c) <
                then_branch = a () => (float[N,4] t) { t = Neg(d) },
                else_branch = b () => (float[N,4] e) { e = Exp(d) }
            >
        }
        """
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Relu", "If"]
    assert static_shape(canonical.graph.outputs[0]) == (2, 4)
    assert_same_function(model, canonical, x=noise(3, 4), c=np.array(True))


def test_local_functions_are_inlined() -> None:
    model = as_model(
        onnx.parser.parse_model(
            """
            <ir_version: 8, opset_import: ["" : 18, "local" : 1]>
            g (float[1,4] x) => (float[1,4] y) { a = local.twice(x)  y = local.twice(a) }
            <domain: "local", opset_import: ["" : 18]>
            twice (v) => (w) { w = Add(v, v) }
            """
        )
    )
    canonical = canonicalize(model)
    assert ops(canonical) == ["Add", "Add"]
    assert not canonical.functions
    assert len({node.name for node in canonical.graph}) == 2
    assert_same_function(model, canonical, x=noise(1, 4))


def functions(calls: dict[str, list[str]]) -> ir.Model:
    """A model of local functions, each calling others one after the other."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    made = []
    for name, callees in calls.items():
        nodes = [
            helper.make_node(callee, [f"v{i}"], [f"v{i + 1}"], domain="local")
            for i, callee in enumerate(callees)
        ]
        nodes.append(helper.make_node("Relu", [f"v{len(callees)}"], ["out"]))
        made.append(helper.make_function("local", name, ["v0"], ["out"], nodes, imports))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node(next(iter(calls)), ["x"], ["y"], domain="local")
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    return as_model(helper.make_model(graph, functions=made, opset_imports=imports, ir_version=8))


def test_recursive_functions_are_refused() -> None:
    with pytest.raises(ModelError, match="calls itself"):
        canonicalize(functions({"f": ["g"], "g": ["f"]}))


def test_exploding_functions_are_refused() -> None:
    bomb = {f"f{i}": [f"f{i + 1}"] * 10 for i in range(30)} | {"f30": []}
    with pytest.raises(ModelError, match="expand to more than"):
        canonicalize(functions(bomb))


@pytest.mark.parametrize(
    "bomb",
    [
        "big = ConstantOfShape<value = int64[1] {1}>(huge)",
        "big = Expand(one, huge)",
        "big = Tile(one, huge)",
    ],
)
def test_fold_bombs_are_not_computed(bomb: str) -> None:
    model = parse(
        f"""
        g (float[1] x) => (float[1] y, int64[a,b] z)
        <int64[2] huge = {{1073741824, 1073741824}}, int64[1,1] one = {{1}}>
        {{ {bomb}  z = Abs(big)  y = Relu(x) }}
        """
    )
    started = time.perf_counter()
    canonical = canonicalize(model)
    assert time.perf_counter() - started < 2
    assert len(canonical.graph) == 3


def test_operands_that_do_not_fit() -> None:
    model = parse("g (float[1,2] x, float[1,3] z) => (float[1,3] y) { [sum] y = Add(x, z) }")
    with pytest.raises(ModelError, match=r"node 'sum' \(Add\): its operands do not fit together"):
        canonicalize(model)


def test_operators_without_operands() -> None:
    model = parse("g (float[1,2] x) => (float[1,2] y) { [bare] y = Transpose() }")
    with pytest.raises(ModelError, match=r"node 'bare' \(Transpose\): is not valid"):
        canonicalize(model)


def test_nodes_of_one_form_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = onnx.checker.check_node

    def counted(node: onnx.NodeProto, *args: Any) -> None:
        checked.append(node.name)
        check(node, *args)

    monkeypatch.setattr(onnx.checker, "check_node", counted)
    text = "[a] b = Concat<axis=1>(x, x)  [c] d = Concat<axis=1>(b, b)  [e] y = Concat<axis=0>(d)"
    canonicalize(parse(f"g (float[1,2] x) => (float[1,8] y) {{ {text} }}"))
    assert checked == ["a", "e"]


@pytest.mark.parametrize(
    "odd", ["Transpose<perm=[1,0]>()", "Transpose<perm=[1,0]>(a, a)", "Transpose<turned=1>(a)"]
)
def test_nodes_beside_a_right_one_of_their_kind_are_checked(odd: str) -> None:
    model = parse(
        f"g (float[2,2] x) => (float[2,2] y) {{ a = Transpose<perm=[1,0]>(x)  [odd] y = {odd} }}"
    )
    with pytest.raises(ModelError, match=r"node 'odd' \(Transpose\): is not valid"):
        canonicalize(model)


def test_custom_operators_with_declared_sizes() -> None:
    model = as_model(
        onnx.parser.parse_model(
            """
            <ir_version: 8, opset_import: ["" : 18, "com.acme" : 1]>
            g (float[N,4] x) => (float[N,4] y) <float[N,4] a>
            { a = com.acme.Magic(x)  y = Relu(a) }
            """
        )
    )
    canonical = canonicalize(model)
    assert [static_shape(node.outputs[0]) for node in canonical.graph] == [(2, 4), (2, 4)]
    assert str(canonical.graph.outputs[0].shape) == "[N,4]"


def test_unknown_sizes_are_named() -> None:
    model = parse("g (float[1,4] x) => (int64[2,n] y) { [find] y = NonZero(x) }")
    with pytest.warns(MorphWarning, match=r"node 'find' \(NonZero\): the size of its result 'y'"):
        canonical = canonicalize(model)
    assert [str(size) for size in canonical.graph.outputs[0].shape or ()] == ["2", "n"]


def test_sequence_inputs_are_refused() -> None:
    model = parse("g (seq(float[1]) x) => (int64 y) { y = SequenceLength(x) }")
    with pytest.raises(UnsupportedError, match="input 'x': is not a tensor"):
        canonicalize(model)


def test_old_and_new_opsets() -> None:
    text = "g (float[1] x) => (float[1] y) { y = Relu(x) }"
    assert ops(canonicalize(parse(text, opset=11))) == ["Relu"]
    model = parse(text)
    for version, word in ((10, "older"), (999, "newer")):
        model.opset_imports[""] = version
        with pytest.raises(ModelError, match=word):
            canonicalize(model)


def test_initializers_that_are_inputs_too() -> None:
    model = parse(
        """
        g (float[1,2] x, float[2] w = {3,4}) => (float[1,2] y) { y = Mul(x, w) }
        """
    )
    canonical = canonicalize(model)
    assert [value.name for value in canonical.graph.inputs] == ["x"]
    np.testing.assert_allclose(run(canonical, x=np.ones((1, 2), np.float32))[0], [[3, 4]])


def test_constant_and_passed_on_outputs_keep_their_names() -> None:
    model = parse(
        """
        g (float[1,2] x) => (int64[1] k, float[1,2] y, float[1,2] same)
        { k = Constant<value_ints = [7]>()  r = Relu(x)  y = Identity(r)  same = Identity(x) }
        """
    )
    canonical = canonicalize(model)
    assert [value.name for value in canonical.graph.outputs] == ["k", "y", "same"]
    assert Counter(ops(canonical)) == {"Identity": 2, "Relu": 1}
    assert_same_function(model, canonical, x=noise(1, 2))


def test_long_chains_take_linear_time() -> None:
    length = 20_000
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    infos = [helper.make_tensor_value_info(f"v{i}", TensorProto.FLOAT, [1, 2]) for i in (0, length)]
    graph = helper.make_graph(nodes, "chain", infos[:1], infos[1:])
    opsets = [helper.make_opsetid("", 18)]
    model = as_model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    started = time.perf_counter()
    assert len(canonicalize(model).graph) == length
    assert time.perf_counter() - started < 30


def test_a_result_that_nobody_wants_may_have_open_sizes() -> None:
    text = """
    net (float[T,1,3] x, float[1,24,3] w, float[1,24,6] r) => (float[1,1,6] h) {
        , h = LSTM<hidden_size=6>(x, w, r)
    }"""
    model = canonicalize(model_from_text(text))
    assert [str(value.shape) for value in model.graph.inputs] == ["[T,1,3]"]


def test_a_result_that_nobody_wants_may_have_a_dynamic_batch() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    net (float[B,3,5,4] q, float[B,3,5,4] k, float[B,3,2,4] past)
    => (float[B,3,5,4] y, float[B,3,7,4] b) { y, , b = Attention(q, k, k, , past, past) }"""
    model = canonicalize(model_from_text(text, inputs=("q", "k", "past")))
    assert [str(value.shape) for value in model.graph.outputs] == ["[B,3,5,4]", "[B,3,7,4]"]


ALIKE = """
net (float[2,6] x, float[2,6] y) => (float[3,4] a, float[4,3] b, float[2,2] c, float[2,3] d,
    int32[2,6] e, int64[2,6] f, float[3,2,2] g, int64[k] h, float[m] i, float[2,6] j, float[2,6] k)
<int64[2] ab = {3, 4}, int64[2] ba = {4, 3}, int64[1] zeros = {0}, int64[1] one = {1},
 int64[1] two = {2}, int64[1] four = {4}, float half = {0.5}, float zero = {0}, float more = {2},
 float minus = {-0.0}> {
    a = Reshape(x, ab)
    b = Reshape(x, ba)
    c = Slice(x, two, four, one)
    d = Slice(x, one, four, one)
    e = Cast<to=6>(x)
    f = Cast<to=7>(x)
    p, q, r = Split<axis=1, num_outputs=3>(x)
    s = Shape<start=1>(x)
    t = Shape<end=1>(x)
    st = Concat<axis=0>(s, t, s)
    gs = Gather<axis=0>(st, two)
    u = Unsqueeze(p, zeros)
    v = Unsqueeze(q, zeros)
    w = Unsqueeze(r, zeros)
    g = Concat<axis=0>(u, v, w)
    h = Concat<axis=0>(gs, t, s, gs)
    i = Range(zero, more, half)
    over = Div(half, zero)
    under = Div(half, minus)
    j = Min(x, over)
    k = Max(x, under)
}
"""


def test_nodes_that_are_nearly_alike_are_told_apart() -> None:
    model = parse(ALIKE)
    before = ir.to_proto(model).SerializeToString()
    canonical = canonicalize(model)
    assert ir.to_proto(model).SerializeToString() == before
    inputs = {"x": noise(2, 6), "y": noise(2, 6)}
    for value, one, other in zip(
        canonical.graph.outputs, run(canonical, **inputs), run(model, **inputs), strict=True
    ):
        assert one.dtype == other.dtype
        assert static_shape(value) == one.shape
        np.testing.assert_array_equal(one, other, strict=True)
