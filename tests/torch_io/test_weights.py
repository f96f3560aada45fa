"""Trained weights go back into the ONNX model: what it then computes is what was trained."""

import copy
import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.errors import ModelError
from morphgraph.onnx_io import runtime as ort
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights


def trained(net: nn.Module) -> nn.Module:
    """Two steps of SGD, which move weights and running statistics alike."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
    return net.eval()


def answer(model: ir.Model, x: torch.Tensor) -> torch.Tensor:
    rows = [next(iter(ort.run(model, {"x": row.numpy()}).values())) for row in x.split(1)]
    return torch.from_numpy(np.concatenate(rows))


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((out - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return randomize_weights(residual_cnn((8, 16)), image(2))


@pytest.fixture(scope="module")
def model(original: nn.Module) -> ir.Model:
    return export(original, image(1))


def test_the_trained_network_comes_back(original: nn.Module, model: ir.Model) -> None:
    net, x = trained(to_torch(model)), image(3)
    back = with_weights(model, net)
    assert_close(answer(back, x), net(x))
    assert not torch.allclose(answer(back, x), answer(model, x), atol=1e-2)  # training is felt
    assert_close(answer(model, x), original(x))  # the model itself is as it was


def test_the_users_own_module_comes_back(original: nn.Module, model: ir.Model) -> None:
    own, x = trained(copy.deepcopy(original)), image(3)
    assert_close(answer(with_weights(model, own), x), own(x))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_comes_back_without_its_prefixes(model: ir.Model, prefix: str) -> None:
    net, x = trained(to_torch(model)), image(3)
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    assert_close(answer(with_weights(model, state), x), net(x))


def test_wrapped_networks_come_back(model: ir.Model) -> None:
    net, x = trained(to_torch(model)), image(3)
    holder: Any = nn.Module()
    holder.module = torch.compile(net, backend="eager")
    assert_close(answer(with_weights(model, holder), x), net(x))


def test_a_wrapper_is_told_from_a_network_with_a_layer_of_that_name() -> None:
    own: Any = nn.Sequential()
    own.add_module("module", nn.Linear(2, 2))
    own.add_module("last", nn.Linear(2, 1))
    model = export(own, torch.zeros(1, 2))
    own.get_submodule("module").weight.data.mul_(2)
    weight = with_weights(model, own).graph.initializers["module.weight"].const_value.numpy()
    np.testing.assert_array_equal(weight, own.get_parameter("module.weight").detach().numpy())


class Probabilities(nn.Module):
    """A network of somebody who calls the only part of it as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.module(x), dim=1)


@pytest.mark.parametrize("wrap", [Probabilities, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_that_was_exported_is_the_network(wrap: Any, original: nn.Module) -> None:
    own, x = wrap(copy.deepcopy(original)).eval(), image(3)
    model = export(own, x[:1], input_names=["x"])
    net = trained(to_torch(model))
    assert_close(answer(with_weights(model, net), x), net(x))
    assert_close(answer(with_weights(model, own), x), own(x))
    assert_close(answer(with_weights(model, own.state_dict()), x), own(x))
    graph = mg.lift(model)
    plan = mg.uniform(graph, 0.5)
    assert mg.Regularizer(graph, own).live_share() == 1.0
    small = mg.to_torch(mg.apply(graph, plan, weights=own))
    mg.resize_module(own, graph, plan)
    assert_close(small(x), own(x))


def test_running_statistics_come_back(model: ir.Model) -> None:
    net = trained(to_torch(model))
    back = with_weights(model, net).graph.initializers
    for name in ("bn.running_mean", "bn.running_var"):
        np.testing.assert_array_equal(
            back[name].const_value.numpy(), net.state_dict()[name].numpy()
        )


def test_names_that_are_not_torchs_find_their_way_back_even_from_a_file() -> None:
    text = (
        "net (float[1,3] x, float[4,3] k, float[4] b) => (float y) "
        "{ y = Gemm <transB = 1> (x, k, b) }"
    )
    model = model_from_text(text)
    model.graph.initializers["k"].name = "dense/kernel:0"
    net = to_torch(model)
    next(net.parameters()).data.mul_(3)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (net, copy.deepcopy(net), torch.load(file, weights_only=False)):
        back = with_weights(model, twin).graph.initializers["dense/kernel:0"].const_value.numpy()
        np.testing.assert_array_equal(back, net.state_dict()["Gemm_y.weight"].numpy())


def test_the_element_type_of_the_model_is_kept(model: ir.Model) -> None:
    net = to_torch(model).double()
    back = with_weights(model, net)
    for name, value in back.graph.initializers.items():
        assert value.const_value.dtype == model.graph.initializers[name].const_value.dtype


def test_later_training_does_not_reach_the_model(model: ir.Model) -> None:
    net = to_torch(model)
    back = with_weights(model, net)
    before = back.graph.initializers["stem.weight"].const_value.numpy().copy()
    net.get_parameter("stem.weight").data.zero_()
    np.testing.assert_array_equal(
        back.graph.initializers["stem.weight"].const_value.numpy(), before
    )


@pytest.mark.parametrize("name", ["fc.weight", "bn.running_var"])
def test_a_missing_tensor_is_named(model: ir.Model, name: str) -> None:
    state = to_torch(model).state_dict()
    del state[name]
    with pytest.raises(ModelError, match=f"tensor '{name}': the network has no"):
        with_weights(model, state)


def test_a_network_of_another_size_is_refused(model: ir.Model) -> None:
    other = residual_cnn((8, 12))
    with pytest.raises(ModelError, match=r"12x8x3x3 in the network, 16x8x3x3 in the model"):
        with_weights(model, other)


def dense(names: list[str]) -> ir.Model:
    """Two layers and a norm from elsewhere, with weights of these names: all of one shape each."""
    model = model_from_text(
        "net (float[2,3] x, float[8,3] k, float[8] b, float[8] s, float[8] t, float[2,8] q) "
        "=> (float y) { h = Gemm <transB = 1> (x, k, b)  l = LayerNormalization (h, s, t) "
        "r = Relu(l) y = Gemm <transB = 1> (r, q) }"
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    for value, name in zip([model.graph.initializers[k] for k in "kbstq"], names, strict=True):
        value.name = name
    return model


HOSTILE = [
    ["conv/kernel:0", "conv/bias:0", "ln/gamma", "ln/beta", "out/kernel:0"],
    ["1", "2", "3", "4", "5"],
    ["a.b", "a_b", "a/b", "a:b", "a b"],
    ["state_dict", "training", "forward", "class", "self.weight."],
    ["h.bias", "h.weight", "l.bias", "l.weight", "y.weight"],  # roles that are mixed up
    ["l.weight", "l.bias", "y.weight", "h.bias", "h.weight"],
]


@pytest.mark.parametrize("names", HOSTILE, ids=" ".join)
def test_a_state_dict_of_a_network_from_elsewhere_comes_back(names: list[str]) -> None:
    model = dense(names)
    net, x = to_torch(model), torch.randn(2, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand(parameter.shape))
    file = io.BytesIO()
    torch.save({f"module.{key}": tensor for key, tensor in net.state_dict().items()}, file)
    file.seek(0)
    for state in (net.state_dict(), torch.load(file)):
        back = with_weights(model, state)
        assert_close(answer_whole(back, x), net(x).detach())
        graph = mg.lift(model)
        plan = mg.uniform(graph, 0.5)
        by_state, by_net = (mg.apply(graph, plan, weights=given) for given in (state, net))
        assert_close(answer_whole(by_state, x), answer_whole(by_net, x))
    by_onnx = {net.meta["morphgraph.parameters"][k]: t for k, t in net.state_dict().items()}
    assert_close(answer_whole(with_weights(model, by_onnx), x), net(x).detach())


def answer_whole(model: ir.Model, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(next(iter(ort.run(model, {"x": x.numpy()}).values())))


def test_a_tensor_that_is_missing_in_a_state_dict_from_elsewhere_is_named() -> None:
    model = dense(HOSTILE[0])
    state = to_torch(model).state_dict()
    del state["l.bias"]
    with pytest.raises(ModelError, match="tensor 'ln/beta': the network has no weight"):
        with_weights(model, state)


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("block", [0, 8])
def test_weights_of_four_bits(kind: str, block: int) -> None:
    """Everything behind them trains; they go back as they were."""
    random = np.random.default_rng(0)
    low = -8 if kind == "INT4" else 0
    codes = random.integers(low, low + 16, (16, 6))
    sizes = (2, 6) if block else (6,)
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        net (float[1,16] x, {kind.lower()}[16,6] w, float[{",".join(map(str, sizes))}] s,
             float[6,3] v) => (float[1,3] y) {{
        d = DequantizeLinear<axis={0 if block else 1}, block_size={block}>(w, s)
        h = MatMul(x, d)  r = Relu(h)  y = MatMul(r, v) }}"""
    proto = onnx.parser.parse_model(text)
    element = getattr(onnx.TensorProto, kind)
    given = {"s": random.uniform(0.01, 0.1, sizes), "v": random.normal(size=(6, 3))}
    weights = [onnx.helper.make_tensor("w", element, (16, 6), codes.reshape(-1))]
    for name, array in given.items():
        weights.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    proto.graph.initializer.extend(weights)
    del proto.graph.input[1:]
    model = ir.from_proto(proto)
    net, x = to_torch(model), torch.randn(4, 16)
    assert_close(net(x), answer(model, x))
    back = with_weights(model, net)
    assert_close(answer(back, x), net(x))
    np.testing.assert_array_equal(back.graph.initializers["w"].const_value.numpy(), codes)
