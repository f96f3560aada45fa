"""What a resize does not change is written as the original computes it; no constant grows."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.testing import prove

RNG = np.random.default_rng(0)


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=f"n_{output}", **attributes)


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    x: list[int | str],
    y: list[int | str],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def noise(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


# -- weights that are stored in few bytes ----------------------------------------------------------

KINDS = {
    "cast, scale per channel": (["Cast", "Mul"], (1, 32), (32, 32)),
    "cast, one scale": (["Cast", "Mul"], (), (32, 32)),
    "cast, shift, scale": (["Cast", "Sub", "Mul"], (1, 32), (32, 32)),
    "cast, scale, transposed": (["Cast", "Mul", "Transpose"], (32, 1), (32, 32)),
    "cast, scale, reshaped": (["Cast", "Mul", "Reshape"], (1, 1, 32), (4, 8, 32)),
    "dequantized": (["DequantizeLinear"], (32,), (32, 32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_int8_stay_so(kind: str) -> None:
    steps, scale, stored = KINDS[kind]
    nodes, weights, x = [], {"o": noise(32, 5), "two": np.array([32, 32])}, "x"
    for k in range(3):
        weights[f"q{k}"] = RNG.integers(-127, 128, stored).astype(np.int8)
        weights[f"s{k}"] = np.asarray(0.01 + np.abs(noise(*scale)) / 100, np.float32)
        weights[f"z{k}"] = np.asarray(RNG.integers(-5, 5, scale), np.float32)
        value = f"q{k}"
        for step in steps:
            operands = {
                "Mul": f"{value} s{k}",
                "Sub": f"{value} z{k}",
                "Reshape": f"{value} two",
                "DequantizeLinear": f"{value} s{k}",
            }
            attributes: dict[str, dict[str, Any]] = {
                "Cast": {"to": TensorProto.FLOAT},
                "Transpose": {"perm": [1, 0]},
                "DequantizeLinear": {"axis": 1},
            }
            result = f"{step}{k}"
            nodes.append(node(step, operands.get(step, value), result, **attributes.get(step, {})))
            value = result
        nodes += [node("MatMul", f"{x} {value}", f"m{k}"), node("LeakyRelu", f"m{k}", f"r{k}")]
        x = f"r{k}"
    model = build([*nodes, node("MatMul", f"{x} o", "y")], weights, [4, 32], [4, 5])
    graph = mg.lift(model)
    assert sum(g.resizable for g in graph.groups) == 3
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    quantized = {
        v.name: v for v in small.graph.initializers.values() if v.dtype == ir.DataType.INT8
    }
    assert {name: v.const_value.size for name, v in quantized.items() if v.const_value} == {
        "q0": 32 * 16,
        "q1": 16 * 16,
        "q2": 16 * 16,
    }
    assert [op for op in ops(small) if op in steps] == [op for op in ops_of(model) if op in steps]
    assert ir.to_proto(small).ByteSize() < 0.75 * model.ByteSize()
    prove(graph, seeds=(0,), faults=6)


def ops_of(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


# -- constants that are made of little -------------------------------------------------------------

SIDE = 64
SIDES = np.array([1, 1, SIDE, SIDE])


def generators() -> dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]]:
    whole = np.array([1, 4, SIDE, SIDE])
    half = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
    return {
        "ConstantOfShape": ([node("ConstantOfShape", "sh", "z", value=half)], {"sh": whole}),
        "Expand": ([node("Expand", "k sh", "z")], {"k": noise(1, 4, 1, 1), "sh": whole}),
        "Expand of rows": (
            [node("Expand", "k sh", "z")],
            {"k": noise(1, 1, SIDE, 1), "sh": whole},
        ),
        "Tile": (
            [node("Tile", "k sh", "z")],
            {"k": noise(1, 4, 1, 1), "sh": whole // [1, 4, 1, 1]},
        ),
        "Range": (
            [
                node("Range", "zero end one", "r"),
                node("Cast", "r", "f", to=TensorProto.FLOAT),
                node("Div", "f end_f", "d"),
                node("Reshape", "d sh", "z"),
            ],
            {
                "zero": np.array(0),
                "end": np.array(4 * SIDE * SIDE),
                "one": np.array(1),
                "end_f": np.array(4 * SIDE * SIDE, np.float32),
                "sh": whole,
            },
        ),
        "EyeLike": (
            [
                node("ConstantOfShape", "sq", "e0"),
                node("EyeLike", "e0", "e", dtype=TensorProto.FLOAT, k=3),
                node("Expand", "e sh", "z"),
            ],
            {"sq": np.array([SIDE, SIDE]), "sh": whole},
        ),
        "OneHot": (
            [node("OneHot", "at depth values", "o", axis=-1), node("Expand", "o sh", "z")],
            {
                "at": np.arange(SIDE)[None, None] % 7,
                "depth": np.array(SIDE),
                "values": np.array([0.5, 1], np.float32),
                "sh": whole,
            },
        ),
    }


@pytest.mark.parametrize("kind", generators())
@pytest.mark.parametrize("cut", [True, False])
def test_constants_that_are_computed_stay_so(kind: str, cut: bool) -> None:
    """Added to channels that go, or to some that stay: never written in full."""
    nodes, weights = generators()[kind]
    reader = node("Add", "c z", "a") if cut else node("Add", "x z", "xz")
    chain = [
        node("Conv", "x w" if cut else "xz w", "c", pads=[1] * 4),
        node("GlobalAveragePool", "a" if cut else "c", "p"),
        node("Conv", "p v", "y"),
    ]
    order = [chain[0], reader, *chain[1:]] if cut else [reader, *chain]
    weights = {**weights, "w": noise(4, 4, 3, 3), "v": noise(5, 4, 1, 1)}
    model = build([*nodes, *order], weights, [1, 4, SIDE, SIDE], [1, 5, 1, 1])
    graph = mg.lift(model)
    assert sum(g.resizable for g in graph.groups) == 1
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    assert ir.to_proto(small).graph.ByteSize() < model.graph.ByteSize() + 300
    if not cut:
        assert ops(small)[: len(nodes)] == [n.op_type for n in nodes]
        assert [n.name for n in small.graph] == [n.name for n in model.graph.node]


# -- what the resize does not need ---------------------------------------------------------------


def attention(batch: int | str) -> onnx.ModelProto:
    """Heads by a shape that is put together, a mask from ones, and a hidden layer behind."""
    weights = {name: noise(8, 8) for name in ("q", "k", "v", "o")}
    weights |= {"up": noise(8, 16), "down": noise(16, 8), "zero": np.array(0), "one": np.array(1)}
    weights |= {"tail": np.array([2, 4]), "rows": np.array([0]), "flat": np.array([8])}
    weights |= {"low": np.array(-1e4, np.float32), "unit": np.array(1, np.float32)}
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "b"),
        node("Gather", "s one", "t"),
        node("Unsqueeze", "b rows", "b1"),
        node("Unsqueeze", "t rows", "t1"),
        node("Concat", "b1 t1 tail", "heads", axis=0),
        node("Concat", "b1 t1 flat", "joined", axis=0),
        node("Concat", "t1 t1", "square", axis=0),
        node("ConstantOfShape", "square", "ones"),
        node("Sub", "unit ones", "inverse"),
        node("Trilu", "inverse", "upper"),
        node("Mul", "upper low", "mask"),
        node("Identity", "x", "same"),
    ]
    for name in "qkv":
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes += [
            node("MatMul", f"same {name}", f"{name}0"),
            node("Reshape", f"{name}0 heads", f"{name}1"),
            node("Transpose", f"{name}1", f"{name}2", perm=perm),
        ]
    nodes += [
        node("MatMul", "q2 k2", "scores"),
        node("Add", "scores mask", "masked"),
        node("Softmax", "masked", "p", axis=-1),
        node("MatMul", "p v2", "c0"),
        node("Transpose", "c0", "c1", perm=[0, 2, 1, 3]),
        node("Reshape", "c1 joined", "c2"),
        node("MatMul", "c2 o", "c3"),
        node("Add", "x c3", "h"),
        node("MatMul", "h up", "u"),
        node("LeakyRelu", "u", "r"),
        node("MatMul", "r down", "d"),
        node("Add", "h d", "y"),
    ]
    return build(nodes, weights, [batch, 5, 8], [batch, 5, 8])


@pytest.mark.parametrize("batch", [2, "N"])
def test_what_the_resize_does_not_need_is_as_it_was(batch: int | str) -> None:
    model = attention(batch)
    graph = mg.lift(model)
    hidden = next(g for g in graph.groups if g.width == 16)
    small = mg.apply(graph, mg.uniform(graph, 0.5, include=[hidden.id]))
    assert [n.name for n in small.graph] == [n.name for n in model.graph.node]
    for one, other in zip(small.graph, model.graph.node, strict=True):
        assert [v.name for v in one.inputs if v is not None] == list(other.input)
    assert set(small.graph.initializers) == {t.name for t in model.graph.initializer}
    again = mg.lift(small)
    assert [g.width for g in again.groups] == [
        8 if g.id == hidden.id else g.width for g in graph.groups
    ]


@pytest.mark.parametrize("batch", [2, "N"])
def test_a_shape_that_names_what_was_cut_is_not_restored(batch: int | str) -> None:
    """An Expand whose shape holds a width that its operand has already."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s first", "n"),
        node("Concat", "n four", "sizes", axis=0),
        node("Expand", "token sizes", "t"),
        node("MatMul", "x a", "h"),
        node("Add", "h t", "sum"),
        node("MatMul", "sum b", "y"),
    ]
    weights = {"first": np.array([0]), "four": np.array([4]), "token": noise(1, 4)}
    weights |= {"a": noise(3, 4), "b": noise(4, 2)}
    graph = mg.lift(build(nodes, weights, [batch, 3], [batch, 2]))
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    assert mg.lift(small).widths.tolist()[1:-1] == [2]


@pytest.mark.parametrize("batch", [2, "N"])
def test_a_shape_that_has_changed_has_numbers(batch: int | str) -> None:
    graph = mg.lift(attention(batch))
    heads = next(g for g in graph.groups if g.resizable and g.width == 2)
    small = mg.apply(graph, mg.uniform(graph, 0.5, include=[heads.id]))
    nodes = {n.name: n for n in small.graph}
    target = nodes["n_q1"].inputs[1]
    assert target is not None
    assert target.const_value is not None
    sizes = target.const_value.numpy().tolist()
    assert sizes[2:] == [1, 4]
    assert {"n_mask", "n_upper", "n_ones"} <= nodes.keys()  # not of the heads


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([2, 5, -1, 4], [2, 5, 2, 4]),
        ([2, 5, 4, -1], [2, 5, 2, 4]),
        ([0, 0, -1, 4], [0, 0, 2, 4]),
        ([-1, 5, 4, 4], [-1, 5, 2, 4]),  # the batch stays what the operand says
    ],
)
def test_numbers_where_heads_were_cut(target: list[int], expected: list[int]) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Reshape", "a heads", "b"),
        node("Softmax", "b", "c", axis=-1),
        node("Reshape", "c flat", "d"),
        node("MatMul", "d o", "y"),
    ]
    weights = {"w": noise(8, 16), "o": noise(16, 8), "heads": np.array(target)}
    graph = mg.lift(build(nodes, weights | {"flat": np.array([2, 5, -1])}, [2, 5, 8], [2, 5, 8]))
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    operands = [n.inputs[1] for n in small.graph if n.op_type == "Reshape"]
    tensors = [value.const_value for value in operands if value is not None]
    assert [t.numpy().tolist() for t in tensors if t is not None] == [expected, [2, 5, 8]]
