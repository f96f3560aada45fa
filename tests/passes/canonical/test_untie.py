"""Constants that a file stores once tie no layers; weights that layers share stay tied."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.testing import prove

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: list[int], y: list[int]
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


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=f"n_{output}", **attributes)


def gemms(vector: dict[int, str], values: dict[str, np.ndarray]) -> onnx.ModelProto:
    nodes, value = [], "x"
    weights = {f"w{k}": noise(8, 8) for k in range(4)}
    for k in range(4):
        nodes.append(node("Gemm", f"{value} w{k} {vector[k]}", f"h{k}", transB=1))
        value = f"r{k}" if k < 3 else "y"
        nodes.append(node("LeakyRelu", f"h{k}", value))
    return build(nodes, weights | values, [1, 8], [1, 8])


def products(vector: dict[int, str], values: dict[str, np.ndarray]) -> onnx.ModelProto:
    nodes, value = [], "x"
    weights = {f"w{k}": noise(8, 8) for k in range(4)}
    for k in range(4):
        nodes.append(node("MatMul", f"{value} w{k}", f"m{k}"))
        nodes.append(node("Add", f"m{k} {vector[k]}", f"h{k}"))
        value = f"r{k}" if k < 3 else "y"
        nodes.append(node("LeakyRelu", f"h{k}", value))
    return build(nodes, weights | values, [2, 3, 8], [2, 3, 8])


def norms(vector: dict[int, str], values: dict[str, np.ndarray]) -> onnx.ModelProto:
    nodes, value = [], "x"
    weights = {f"w{k}": noise(8, 8, 1, 1) for k in range(4)}
    for k in range(4):
        v = vector[k]
        nodes.append(node("Conv", f"{value} w{k}", f"c{k}"))
        nodes.append(node("BatchNormalization", f"c{k} {v} {v} {v} {v}", f"h{k}"))
        value = f"r{k}" if k < 3 else "y"
        nodes.append(node("LeakyRelu", f"h{k}", value))
    return build(nodes, weights | values, [1, 8, 4, 4], [1, 8, 4, 4])


def quantized(vector: dict[int, str], values: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Zero points per channel, shared by all layers; the scales are each layer's own."""
    nodes, value, weights = [], "x", dict[str, np.ndarray]()
    for k in range(4):
        weights[f"w{k}"] = RNG.integers(-99, 99, (8, 8)).astype(np.int8)
        weights[f"s{k}"] = np.abs(noise(8)) / 50 + 0.01
        nodes.append(node("DequantizeLinear", f"w{k} s{k} {vector[k]}", f"q{k}", axis=0))
        nodes.append(node("Gemm", f"{value} q{k}", f"h{k}", transB=1))
        value = f"r{k}" if k < 3 else "y"
        nodes.append(node("LeakyRelu", f"h{k}", value))
    zeros = {name: np.zeros(8, np.int8) for name in values}
    return build(nodes, weights | zeros, [1, 8], [1, 8])


NUMBERS = {"zeros": np.zeros(8, np.float32), "ones": np.ones(8, np.float32), "any": abs(noise(8))}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("network", [gemms, products, norms, quantized])
def test_a_vector_stored_once_ties_no_layers(network: Any, numbers: str) -> None:
    vector = NUMBERS[numbers]
    once = network(dict.fromkeys(range(4), "z"), {"z": vector})
    apart = network({k: f"z{k}" for k in range(4)}, {f"z{k}": vector for k in range(4)})
    graph, expected = mg.lift(once), mg.lift(apart)
    assert [(g.width, g.reason) for g in graph.groups] == [
        (g.width, g.reason) for g in expected.groups
    ]
    assert sum(g.resizable for g in graph.groups) == 3
    assert mg.cost(graph, "params").total == mg.cost(expected, "params").total
    if numbers == "any":  # with zeros a wrong slice of a vector is right
        prove(graph, seeds=(0, 1), faults=6)
    # Copies that hold the same in the result are one again.
    half = mg.uniform(graph, 0.5)
    small = mg.apply(graph, half)
    vectors = [v for v in small.graph.initializers.values() if v.name and v.name[0] == "z"]
    assert len(vectors) <= 2 or numbers == "any"
    # Each layer has its own in PyTorch, and comes back with it.
    net = mg.to_torch(once)
    if numbers != "any" and network is gemms:
        with torch.no_grad():
            for k, parameter in enumerate(p for p in net.parameters() if p.ndim == 1):
                parameter.fill_(k + 1.0)
        again = mg.to_torch(mg.with_weights(once, net))
        x = torch.randn(1, 8)
        torch.testing.assert_close(again(x), net(x))


def test_constant_maps() -> None:
    """Tensors of one number are fillers, whatever their rank."""
    nodes = [
        node("Conv", "x a", "c0"),
        node("Add", "c0 z", "h0"),
        node("Conv", "h0 b", "c1"),
        node("Add", "c1 z", "h1"),
        node("Conv", "h1 c", "y"),
    ]
    weights = {"a": noise(8, 8, 1, 1), "b": noise(8, 8, 1, 1), "c": noise(8, 8, 1, 1)}
    graph = mg.lift(
        build(nodes, {**weights, "z": np.full((1, 8, 4, 4), 0.5, "f")}, [1, 8, 4, 4], [1, 8, 4, 4])
    )
    assert sum(g.resizable for g in graph.groups) == 2
    prove(graph, seeds=(0, 1))


def repeated(wrap: str) -> onnx.ModelProto:
    """One block of two products, biases and a LayerNorm that runs three times (as in ALBERT)."""
    weights = {"up": noise(8, 16), "down": noise(16, 8), "bu": noise(16), "bd": noise(8)}
    weights |= {"g": 1 + noise(8), "b": noise(8), "first": noise(8, 8), "last": noise(8, 8)}
    nodes, value = [node("MatMul", "x first", "x0")], "x0"
    for k in range(3):
        kernels = {"up": "up", "down": "down"}
        for name in kernels:
            if wrap == "Identity" and k:
                nodes.append(node("Identity", name, f"{name}{k}"))
                kernels[name] = f"{name}{k}"
            elif wrap == "Transpose":
                nodes.append(node("Transpose", name, f"{name}t{k}", perm=[1, 0]))
                nodes.append(node("Transpose", f"{name}t{k}", f"{name}{k}", perm=[1, 0]))
                kernels[name] = f"{name}{k}"
            elif wrap == "Cast":
                nodes.append(node("Cast", name, f"{name}h{k}", to=TensorProto.FLOAT16))
                nodes.append(node("Cast", f"{name}h{k}", f"{name}{k}", to=TensorProto.FLOAT))
                kernels[name] = f"{name}{k}"
        nodes += [
            node("LayerNormalization", f"{value} g b", f"l{k}", axis=-1),
            node("MatMul", f"l{k} {kernels['up']}", f"u{k}"),
            node("Add", f"u{k} bu", f"ub{k}"),
            node("Relu", f"ub{k}", f"r{k}"),
            node("MatMul", f"r{k} {kernels['down']}", f"d{k}"),
            node("Add", f"d{k} bd", f"db{k}"),
            node("Add", f"{value} db{k}", f"s{k}"),
        ]
        value = f"s{k}"
    return build([*nodes, node("MatMul", f"{value} last", "y")], weights, [2, 3, 8], [2, 3, 8])


@pytest.mark.parametrize("wrap", ["", "Identity", "Transpose", "Cast"])
def test_layers_that_share_their_kernels_stay_tied(wrap: str) -> None:
    model = repeated(wrap)
    numbers = sum(numpy_helper.to_array(t).size for t in model.graph.initializer)
    graph = mg.lift(model)
    assert mg.cost(graph, "params").total == numbers
    assert len(graph.model.graph.initializers) == 8
    net = mg.to_torch(model)
    assert sum(p.numel() for p in net.parameters()) == numbers
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    assert len(small.graph.initializers) == 8
    size = ir.to_proto(small).ByteSize()
    share = mg.cost(mg.lift(small), "params").total / numbers
    assert size < share * 4 * numbers + 110 * len(model.graph.node)
    prove(graph, seeds=(0, 1))


def test_names_that_an_identity_gave_are_kept() -> None:
    nodes = [
        node("Identity", "z", "second.bias"),
        node("Gemm", "x a z", "h", transB=1),
        node("Relu", "h", "r"),
        node("Gemm", "r b second.bias", "y", transB=1),
    ]
    weights = {"a": noise(8, 8), "b": noise(8, 8), "z": np.zeros(8, np.float32)}
    graph = mg.lift(build(nodes, weights, [1, 8], [1, 8]))
    assert "second.bias" in graph.model.graph.initializers
    assert [g.resizable for g in graph.groups] == [False, True, False]


def test_deep_copied_layers_of_a_module_are_apart() -> None:
    """Equal parameters of one's own module are parameters of their own; a tied one is not."""
    torch.manual_seed(0)
    first = torch.nn.Linear(8, 8)
    second = torch.nn.Linear(8, 8)
    second.load_state_dict(first.state_dict())
    tied = torch.nn.Linear(8, 8, bias=False)
    tied.weight = first.weight
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), tied).eval()
    graph = mg.lift(mg.export(net, (torch.randn(2, 8),)))
    assert mg.cost(graph, "params").total == 2 * (64 + 8)
