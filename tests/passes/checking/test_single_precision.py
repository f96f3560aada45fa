"""Weights of every type and in every place: lifted, resized, checked, trained."""

import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.onnx_io import not_finite, runtime as ort, static_shape
from morphgraph.passes.analysis.score import score
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.testing import model_from_text, prove, random_weight, randomize_weights
from morphgraph.torch_io.tensors import torch_type

KINDS = ["float", "double", "float16", "bfloat16"]
HEAD = '<ir_version: 10, opset_import: ["": 22]>'
NETWORK = """net ({t}[2,3,8,8] x, {t}[8,3,3,3] w1, {t}[8] b1, {t}[8] s, {t}[8] h, {t}[8] m,
    {t}[8] v, {t}[12,8,3,3] w2, {t}[12,10] w3, {t}[10] b3) => ({t}[2,10] y) {{
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  n = BatchNormalization(a, s, h, m, v)  r = Relu(n)
    c = Conv<strides=[2,2]>(r, w2)  g = GlobalAveragePool(c)  f = Flatten(g)  y = Gemm(f, w3, b3)
}}"""
MIXED = """net (float[2,3,4,4] x, float16[8,3,1,1] w1, float[8] b1, bfloat16[6,8,1,1] w2,
    double[2,6,1,1] w3) => (double[2,2,4,4] y) <int64[4] shape = {1,8,1,1}> {
    x16 = Cast<to=10>(x)  a = Conv(x16, w1)  a32 = Cast<to=1>(a)  c = Reshape(b1, shape)
    s = Add(a32, c)  s16 = Cast<to=16>(s)  d = Conv(s16, w2)  e = Cast<to=11>(d)  y = Conv(e, w3)
}"""


def network(kind: str) -> ir.Model:
    return model_from_text(HEAD + NETWORK.format(t=kind))


def mixed() -> ir.Model:
    return model_from_text(HEAD + MIXED)


def in_places() -> ir.Model:
    """One kernel each in an initializer, a Constant node, and repeated by ConstantOfShape."""
    generator = np.random.default_rng(0)
    model = network("float")
    graph = model.graph
    array = random_weight((12, 8, 3, 3), generator)
    del graph.initializers["w2"]
    constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name="constant")
    shape = ir.node("Constant", [], {"value_ints": [12, 10]}, name="shape")
    number = {"value": ir.tensor(np.array([0.125], np.float32))}
    fill = ir.node("ConstantOfShape", [shape.outputs[0]], number, name="fill")
    old = {
        name: next(v for n in graph for v in n.inputs if v and v.name == name)
        for name in ("w2", "w3")
    }
    graph.insert_before(graph[0], [constant, shape, fill])
    for name, node in (("w2", constant), ("w3", fill)):
        old[name].replace_all_uses_with(node.outputs[0])
    del graph.initializers["w3"]
    constant.outputs[0].name, fill.outputs[0].name = "w2", "w3"
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_resized_exactly(kind: str) -> None:
    prove(network(kind), faults=40)


def test_mixed_types_are_resized_exactly() -> None:
    prove(mixed(), faults=40)


def types_of(values: Iterable[ir.Value]) -> dict[str, ir.DataType]:
    return {str(value.name): value.dtype for value in values if value.dtype is not None}


@pytest.mark.parametrize(
    "model", [*map(network, KINDS), mixed(), in_places()], ids=[*KINDS, "mixed", "places"]
)
def test_types_and_trainable_weights_survive(model: ir.Model) -> None:
    graph = mg.lift(model)
    small = mg.apply(graph, mg.plan(graph, budget={"flops": "50%"}))
    types = types_of(graph.model.graph.initializers.values())
    assert types_of(small.graph.initializers.values()) == types
    weight_bytes = sum(
        math.prod(static_shape(value)) * types[name].itemsize
        for name, value in small.graph.initializers.items()
        if types[name].is_floating_point()
    )
    assert mg.cost(mg.lift(small), "weight_bytes").total == weight_bytes
    net = mg.to_torch(small)
    names = net.meta["morphgraph.parameters"]
    floats = {name for name, dtype in types.items() if dtype.is_floating_point()}
    assert set(names.values()) == floats
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch_type(types[names[name]])
    single = in_single_precision(small)
    feeds = ort.random_inputs(single)
    (expected,) = ort.run(single, feeds).values()
    (input_type,) = types_of(small.graph.inputs).values()
    (output_type,) = types_of(small.graph.outputs).values()
    out = net(torch.from_numpy(feeds["x"]).to(torch_type(input_type)))
    assert out.dtype == torch_type(output_type)
    eps = max(torch.finfo(p.dtype).eps for p in (*net.parameters(), torch.ones(1)))
    atol = 4 * eps * np.abs(expected).max()
    np.testing.assert_allclose(out.detach().double().numpy(), expected, rtol=0, atol=atol)
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    trained = mg.with_weights(small, net)
    assert types_of(trained.graph.initializers.values()) == types


def test_a_fill_keeps_taking_no_memory() -> None:
    graph = mg.lift(in_places())
    small = mg.apply(graph, mg.uniform(graph, 0.5, round_to=1))
    array = small.graph.initializers["w3"].const_value.numpy()
    assert array.shape == (6, 10)
    assert not any(array.strides)
    assert (array == 0.125).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_type(kind: str) -> None:
    """float16 cannot hold the square of 300, nor bfloat16 a sum of many numbers."""
    graph = mg.lift(network(kind))
    weight = graph.model.graph.initializers["w2"]
    array = (np.arange(12 * 8 * 9) % 7 + 300).reshape(12, 8, 3, 3).astype(weight.dtype.numpy())
    weight.const_value = ir.Tensor(array, dtype=weight.dtype, name="w2")
    expected = np.sqrt((array.astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(score(graph, "l2")[graph.channels_at("w2", 0)], expected, rtol=1e-12)


def test_large_doubles_are_finite() -> None:
    graph = mg.lift(network("double"))
    bias = graph.model.graph.initializers["b1"]
    bias.const_value = ir.Tensor(np.full(8, 1e300), name="b1")
    assert not_finite(graph.model) == []
    single = in_single_precision(graph.model).graph.initializers["b1"]
    np.testing.assert_array_equal(single.const_value.numpy(), np.finfo(np.float32).max)
    bias.const_value = ir.Tensor(np.full(8, np.inf), name="b1")
    assert not_finite(graph.model) == ["b1"]
    for array, broken in (([0, -np.inf] * 4, []), ([1, -np.inf] * 4, ["b1"])):  # a mask, and none
        bias.const_value = ir.Tensor(np.array(array), name="b1")
        assert not_finite(graph.model) == broken
    bias.const_value = ir.Tensor(np.full(8, np.inf), name="b1")
    single = in_single_precision(graph.model).graph.initializers["b1"]
    np.testing.assert_array_equal(single.const_value.numpy(), np.inf)


def test_single_precision_computes_the_same() -> None:
    """Against ONNX Runtime on the original, where it has the kernels."""
    model = mg.lift(network("float16")).model
    single = in_single_precision(model)
    feeds = ort.random_inputs(single)
    (expected,) = ort.run(model, {k: v.astype(np.float16) for k, v in feeds.items()}).values()
    (found,) = ort.run(single, feeds).values()
    np.testing.assert_allclose(found, expected, atol=4e-3 * np.abs(expected).max())
    assert in_single_precision(single) is single
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_torch_network_of_another_type(dtype: torch.dtype) -> None:
    """Down and back: exported to an opset whose Conv does not list bfloat16."""
    net: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(8 * 9),
        nn.Linear(8 * 9, 4),
    )
    x = torch.randn(2, 3, 8, 8)
    net = randomize_weights(net, x).to(dtype)
    graph = mg.lift(mg.export(net, x.to(dtype)))
    back = mg.to_torch(graph.model)
    state = net.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in back.named_parameters())
    expected = net(x.to(dtype)).double()
    eps = torch.finfo(dtype).eps
    assert (back(x.to(dtype)).double() - expected).abs().max() <= 4 * eps * expected.abs().max()
    prove(graph, seeds=[0])
    slim = mg.plan(graph, budget={"flops": "40%"})
    grown = mg.apply(graph, mg.expand(graph, slim, budget={"flops": "120%"}))
    assert {v.dtype for v in grown.graph.initializers.values() if v.dtype.is_floating_point()} == {
        ir.DataType[{"torch.float64": "DOUBLE"}.get(str(dtype), str(dtype)[6:].upper())]
    }
