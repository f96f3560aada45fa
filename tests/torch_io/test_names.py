"""Any names that torch or ONNX take: through the export, to torch and back, by weights and groups.

The oracles are PyTorch itself, ONNX Runtime, and ``onnx.checker``.
"""

import copy
import json
import pickle
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings, strategies as st
from onnx import helper, numpy_helper
from torch import nn

import morphgraph as mg
from morphgraph.torch_io import export as exporting, translate as translating

HOSTILE = ("class", "a b", "a_b", "a/b:0", "ünï", "1", "q\"'\\\n", "ﬁ", "lambda", "x", "val_0")


class Named(nn.Module):
    """Weights called like operations, like each other once cleaned, and like the input."""

    def __init__(self, name: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.val_0 = nn.Parameter(torch.rand(8, 1, 1))
        self.linear = nn.Parameter(torch.rand(4))
        self.exp = torch.rand(1, 3, 1, 1)  # no buffer, no parameter
        self.heads = nn.ModuleDict({key: nn.Linear(4, 4) for key in keys})
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, linear: torch.Tensor) -> torch.Tensor:
        x = linear * self.exp.exp()
        x = torch.relu(self.b(torch.relu(self.a(x - getattr(self, self.name)))))
        x = self.f((x * self.val_0).mean((2, 3))) + self.linear
        for head in self.heads.values():
            x = head(x)
        return x


def run(model: ir.Model, x: torch.Tensor) -> Any:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def refused(*_args: Any) -> Any:
    raise RuntimeError("torch.export is not asked")


@pytest.mark.filterwarnings("ignore:network Named. torch.export refused it")
@pytest.mark.parametrize(
    ("name", "keys", "by_torchscript"),
    [("mean", (), False), ("conv2d", HOSTILE, False), ("relu", HOSTILE, True)],
)
def test_a_module_of_any_names_goes_through_export_and_back(
    name: str, keys: tuple[str, ...], by_torchscript: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = Named(name, keys).eval(), torch.randn(2, 3, 8, 8)
    if by_torchscript:
        monkeypatch.setattr(translating, "_translate_by_dynamo", refused)
    model = mg.export(net, (x,))
    monkeypatch.undo()
    expected = net(x).detach()
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)
    assert set(net.state_dict()) <= set(model.graph.initializers)
    graph = mg.lift(model)
    free = {group.name for group in graph.groups if group.resizable}
    assert {"a", "b"} <= free

    again = mg.to_torch(model)
    assert set(again.state_dict()) == set(net.state_dict())
    for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        torch.testing.assert_close(copied(x), expected)
    torch.testing.assert_close(mg.Regularizer(graph, again)(), mg.Regularizer(graph, net)())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.5)
    trained = mg.with_weights(model, again.state_dict())
    np.testing.assert_allclose(run(trained, x), again(x).detach(), atol=1e-5)


def test_a_second_export_keeps_the_names() -> None:
    net, x = Named("log", ("class", "a b", "a_b")).eval(), torch.randn(2, 3, 8, 8)
    again = mg.export(mg.to_torch(mg.export(net, (x,))), (x,))
    assert set(net.state_dict()) <= set(again.graph.initializers)
    np.testing.assert_allclose(run(again, x), net(x).detach(), atol=1e-5)


def test_an_input_takes_another_name_where_a_weight_has_its_own_unless_it_was_given() -> None:
    net, x = Named("std").eval(), torch.randn(2, 3, 8, 8)
    model = mg.export(net, (x,))
    assert [value.name for value in model.graph.inputs] == ["linear_"]
    with pytest.raises(mg.UnsupportedError, match=r"input 'a\.weight' has the name of a parameter"):
        mg.export(net, (x,), input_names=["a.weight"])


def test_an_exported_model_that_the_checker_refuses_is_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "checker_refusal", lambda _model: "it is not sorted")
    with pytest.raises(mg.UnsupportedError, match=r"onnx\.checker refuses .*: it is not sorted"):
        mg.export(nn.Linear(2, 2), torch.zeros(1, 2))


# What Python, torch.fx, nn.Module and ONNX files put into names.
PARTS = st.sampled_from(
    [
        *("class", "lambda", "in", "None", "self", "torch", "getattr", "slice", "meta", "graph"),
        *("forward", "training", "type", "to", "parameters", "_modules", "code", "T"),
        *("weight", "bias", "in_features", "stride", "b.weight", "b.bias", "b..c", ".d", "e."),
        *("mean", "relu", "val_0", "node_Add", "x", "y", "1", "2", "a", "a_b", "a.b", "a:b"),
        *("ünï", "ﬁ", "a b", "q\"'\\", "a\tb", "kernel:0", " = ", "self.a(", "onnx_names"),
    ]
)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=7, max_size=7, unique=True), exported=st.booleans())
def test_a_file_of_any_names_becomes_a_network_of_torch(names: list[str], exported: bool) -> None:
    x, y, w1, b1, w2, scale, shift = names
    rng = np.random.default_rng(0)
    shapes = {w1: (4, 3), b1: (4,), w2: (4, 4), scale: (4,), shift: (4,)}
    weights = {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Gemm", [x, w1, b1], ["t1-"], name=w1, transB=1),
        helper.make_node("Relu", ["t1-"], ["t2-"], name=y),
        helper.make_node("Mul", ["t2-", scale], ["t3-"], name=x),
        helper.make_node("Gemm", ["t3-", w2], ["t4-"], name=w2, transB=1),
        helper.make_node("Add", ["t4-", shift], [y], name=shift),
    ]
    graph = helper.make_graph(
        nodes,
        "class",
        [helper.make_tensor_value_info(x, 1, ["n", 3])],
        [helper.make_tensor_value_info(y, 1, ["n", 4])],
        [numpy_helper.from_array(tensor, name) for name, tensor in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = ir.from_proto(proto)
    if exported:
        model.metadata_props["morphgraph.parameters"] = json.dumps(list(weights))
    net = mg.to_torch(model)
    data = torch.from_numpy(rng.standard_normal((3, 3)).astype("f"))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    expected = torch.from_numpy(session.run(None, {x: data.numpy()})[0])
    for copied in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(data), expected)
    assert set(net.meta["morphgraph.parameters"].values()) == set(weights)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-0.5)
    trained = mg.with_weights(model, net)
    np.testing.assert_allclose(run(trained, data), net(data).detach(), atol=1e-5)
    by_state = mg.with_weights(model, net.state_dict())  # by the names that torch has for them
    np.testing.assert_allclose(run(by_state, data), net(data).detach(), atol=1e-5)


@pytest.mark.parametrize(
    "names", [("self", "torch"), ("Self", "self_"), ("input", "input_1"), ("a b", "a_b")]
)
def test_inputs_of_any_names_are_arguments(names: tuple[str, str]) -> None:
    nodes = [helper.make_node("Sub", [*names], ["d"]), helper.make_node("Relu", ["d"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, 1, [2, 3]) for name in names],
        [helper.make_tensor_value_info("y", 1, [2, 3])],
    )
    net = mg.to_torch(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    one, other = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(net(one, other), (one - other).relu())
