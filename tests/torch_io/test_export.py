"""What is exported computes what the network computes, and every parameter keeps its name."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from morphgraph.errors import MorphWarning, UnsupportedError
from morphgraph.onnx_io import as_model, load, save, static_shape
from morphgraph.onnx_io.runtime import run
from morphgraph.ops import parameter_names
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.torch_io import export as exporter, translate as translating
from morphgraph.torch_io.export import export


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_function(net: nn.Module, model: ir.Model, *inputs: torch.Tensor) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feed = {info.name: x.numpy() for info, x in zip(session.get_inputs(), inputs, strict=True)}
    net.eval()
    with torch.no_grad():
        expected = net(*inputs).numpy()
    (result,) = session.run(None, feed)
    scale = np.abs(expected).max()
    assert scale > 0
    assert np.abs(result - expected).max() < 1e-4 * scale


def assert_named(net: nn.Module, model: ir.Model) -> None:
    """Parameters and statistics stand in the model under their names, with their values."""
    state = net.state_dict()
    assert parameter_names(model) == [name for name, _ in net.named_parameters()]
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        if name in state:
            np.testing.assert_array_equal(value.const_value.numpy(), state[name].numpy())


NETWORKS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("resnet18", {}, {"Conv": 20, "BatchNormalization": 20, "Gemm": 1}),
]
LARGE: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("mobilenet_v3_small", {}, {"Conv": 52, "BatchNormalization": 34, "Dropout": 1}),
    ("googlenet", {"aux_logits": False, "init_weights": False}, {"Dropout": 1, "Concat": 9}),
    ("convnext_tiny", {}, {"LayerNormalization": 23, "Gelu": 18}),
]


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [*NETWORKS, *(pytest.param(*network, marks=pytest.mark.long) for network in LARGE)],
)
def test_networks(name: str, options: dict[str, Any], counts: dict[str, int]) -> None:
    net = torchvision.models.get_model(name, weights=None, **options)
    example = torch.randn(1, 3, 64, 64)
    model = export(net, example)
    assert_same_function(net, model, example)
    assert_named(net, model)
    found = ops(model)
    assert {op: found.count(op) for op in counts} == counts
    assert "Identity" not in found
    again = canonicalize(as_model(ir.to_proto(model)))
    assert ir.to_proto(again) == ir.to_proto(model)


@pytest.mark.long
def test_dynamic_batch() -> None:
    net = torchvision.models.shufflenet_v2_x0_5(weights=None)
    model = export(net, (torch.randn(1, 3, 32, 32),), dynamic_batch=True)
    assert str(model.graph.inputs[0].shape) == "[batch,3,32,32]"
    assert str(model.graph.outputs[0].shape) == "[batch,1000]"
    assert static_shape(model.graph.outputs[0]) == (2, 1000)
    for batch in (1, 2, 5):
        assert_same_function(net, model, torch.randn(batch, 3, 32, 32))


def test_dynamic_batch_of_a_transformer() -> None:
    net = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=10)
    nn.init.normal_(net.heads[-1].weight)
    model = export(net, torch.randn(1, 3, 16, 16), dynamic_batch=True)
    assert_named(net, model)
    for batch in (1, 2, 5):
        assert_same_function(net, model, torch.randn(batch, 3, 16, 16))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.recurrent = kind(8, 16, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    net = Recurrent(kind)
    model = export(net, torch.randn(1, 6, 8), dynamic_batch=True)
    assert_named(net, model)
    (layer,) = (node for node in model.graph if node.op_type in ("LSTM", "GRU"))
    assert len(layer.inputs) == 4  # the initial state was made up
    for batch in (1, 3):
        assert_same_function(net, model, torch.randn(batch, 6, 8))


class Odd(nn.Module):
    """Scalars, buffers, parametrizations, tied and unused parameters, dropout in place."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Linear(3, 3)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.dropout = nn.Dropout(0.3, inplace=True)
        self.late = nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()) * self.temperature.exp() + self.shift
        return self.late(self.dropout(self.normed(x)))


def test_odd_parameters() -> None:
    net = Odd()
    example = torch.randn(2, 8)
    model = export(net, example)
    assert_same_function(net, model, example)
    expected = [name for name, _ in net.named_parameters() if not name.startswith("unused")]
    assert parameter_names(model) == expected
    assert json.loads(model.metadata_props["morphgraph.parameters"]) == expected
    gemms = [node for node in model.graph if node.op_type == "Gemm"]
    assert gemms[0].inputs[1] is gemms[1].inputs[1]
    assert "shift" in model.graph.initializers
    assert ops(model).count("Dropout") == 2
    assert all(len(node.inputs) == 2 for node in model.graph if node.op_type == "Dropout")


def test_the_network_is_left_as_it_was() -> None:
    net = Odd()
    net.first.eval()
    net.second.weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = export(net, torch.randn(2, 8))
    assert [module.training for module in net.modules()] == modes
    assert net.dropout.inplace
    assert not net.first.weight.requires_grad
    assert net.first.bias.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        net.first.bias.zero_()
    stored = model.graph.initializers["first.bias"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), before["first.bias"].numpy())


def test_names_and_notes() -> None:
    class Sum(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right.relu()

    example = (torch.randn(2, 3), torch.randn(2, 3))
    model = export(Sum(), example)
    assert [value.name for value in model.graph.inputs] == ["left", "right"]
    model = export(Sum(), example, input_names=["a", "b"], dynamic_batch=True)
    assert [value.name for value in model.graph.inputs] == ["a", "b"]
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch,3]", "[batch,3]"]
    model = export(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3))
    (node,) = model.graph
    assert set(node.metadata_props) == {
        "pkg.torch.onnx.name_scopes",
        "pkg.torch.onnx.class_hierarchy",
    }
    assert "'0'" in node.metadata_props["pkg.torch.onnx.name_scopes"]
    assert str(Path(__file__).parent) not in str(ir.to_proto(model))


def test_the_exporters_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)), torch.randn(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_torchscript_splits_what_it_ties(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("torch.export has\nmany words")

    monkeypatch.setattr(translating, "_translate_by_dynamo", refuse)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )  # a fresh network: both norms are equal
    example = torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"refused it \(torch.export has\); .* TorchScript"):
        model = export(net, example, dynamic_batch=True)
    assert ops(model) == ["Conv", "BatchNormalization", "Relu", "Conv", "BatchNormalization"]
    assert_named(net, model)
    assert str(model.graph.outputs[0].shape) == "[batch,4,4,4]"
    assert_same_function(net, model, torch.randn(5, 3, 8, 8))
    save(model, tmp_path / "m.onnx")
    assert_named(net, load(tmp_path / "m.onnx"))


def test_networks_that_do_not_run() -> None:
    with pytest.raises(UnsupportedError, match="Linear: does not run on the example: mat1"):
        export(nn.Linear(3, 2), torch.randn(1, 4))


def test_lost_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    translate = translating.translate

    def optimized(*arguments: Any) -> ir.Model:
        model = translate(*arguments)
        weight = model.graph.initializers["1.weight"]
        weight.name = "val_7"
        return model

    monkeypatch.setattr(exporter, "translate", optimized)
    with pytest.raises(UnsupportedError, match=r"lost 1 of 4 parameters \(1\.weight\)"):
        export(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(1, 3))


def test_half_precision_weights() -> None:
    net = nn.Linear(4, 2).to(torch.bfloat16)
    model = export(net, torch.randn(1, 4, dtype=torch.bfloat16))
    stored = model.graph.initializers["weight"].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.BFLOAT16
    expected = net.weight.detach().float().numpy()
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), expected)


class KeepsInInference(nn.Module):
    """Keeps what it derives from a parameter until training begins, as LeViT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> "KeepsInInference":
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x + self.table.flip(0)
        if "bias" not in self.kept:
            self.kept["bias"] = self.table.flip(0)
        return x + self.kept["bias"]


def test_what_a_network_keeps_for_inference_is_computed_again() -> None:
    net, x = KeepsInInference().eval(), torch.randn(2, 4)
    net(x)
    model = export(net, (x,))
    assert parameter_names(model) == ["table"]
    assert_same_function(net, model, x)
    assert type(net.kept["bias"]) is torch.Tensor


class Several(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.form = form

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> Any:
        hidden = torch.relu(self.first(x if scale is None else x * scale))
        hidden = hidden if mask is None else hidden * mask
        y = self.second(hidden)
        forms = {"tuple": (y, hidden), "dict": {"logits": y, "parts": [hidden, y + 1]}}
        return {**forms, "number": (y, 3)}[self.form]


def test_results_in_a_dict_keep_their_names_and_arguments_may_be_named() -> None:
    net, x, mask = Several("dict").eval(), torch.randn(2, 4), torch.rand(2, 8)
    model = export(net, {"mask": mask, "x": x})
    assert [value.name for value in model.graph.inputs] == ["x", "mask"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    assert [info.name for info in session.get_outputs()] == ["logits", "parts.0", "parts.1"]
    found = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    expected = net(x, mask=mask)
    for one, other in zip(found, [expected["logits"], *expected["parts"]], strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-5)
    assert len(export(Several("tuple"), (x,)).graph.outputs) == 2


def test_examples_and_results_that_do_not_fit_are_refused_by_name() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match=r"'z' cannot be given, 'x' is missing.*x, scale"):
        export(Several("tuple"), {"mask": x, "z": x})
    with pytest.raises(UnsupportedError, match="returns 3 beside tensors"):
        export(Several("number"), (x,))


class TrainsMore(nn.Module):
    """A head of the training forward alone, a table that nothing reads, and what is used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.auxiliary, self.spare = nn.Linear(8, 2), nn.Parameter(torch.zeros(3))
        self.again = self.head.weight  # tied: the same parameter is not absent

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.body(x).relu()
        y = self.head(hidden)
        return (y, self.auxiliary(hidden)) if self.training else y


def test_parameters_that_the_exported_forward_does_not_read_are_named() -> None:
    net = TrainsMore()
    with pytest.warns(MorphWarning) as caught:
        model = export(net, (torch.randn(2, 4),))
    (words,) = [str(w.message) for w in caught if issubclass(w.category, MorphWarning)]
    absent = "does not use spare, auxiliary.weight, auxiliary.bias; where its forward in training"
    assert absent in words
    assert "mg.resize_module(net, plan), and where nothing does, remove them" in words
    assert sorted(parameter_names(model)) == sorted(
        ["body.bias", "body.weight", "head.bias", "head.weight"]
        if "head.weight" in model.graph.initializers
        else ["again", "body.bias", "body.weight", "head.bias"]
    )
    del net.spare, net.auxiliary
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        export(net.eval(), (torch.randn(2, 4),))


def test_many_absent_parameters_are_counted() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    for k in range(7):
        net[0].register_parameter(f"spare{k}", nn.Parameter(torch.zeros(1)))
    with pytest.warns(MorphWarning, match=r"0\.spare3, 0\.spare4 and 2 more; where"):
        export(net, (torch.randn(2, 4),))


def test_what_a_refusal_announces_is_told() -> None:
    """PyTorch's words on sizes that contradict each other stand in a second line."""
    told = ValueError("Inconsistencies were found:\n\n  Eq(s1, 1) is inconsistent!\n\n(See above.)")
    outer = RuntimeError("outer")
    outer.__cause__ = told
    assert translating.first_line(outer) == (
        "Inconsistencies were found: Eq(s1, 1) is inconsistent!"
    )
    assert translating.first_line(ValueError("")) == "ValueError"
    assert translating.first_line(ValueError("one\ntwo")) == "one"


class _Exponential(nn.Module):
    """What no exporter has a form for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x)


def test_what_no_exporter_takes_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), _Exponential())
    with pytest.raises(UnsupportedError, match="linalg_matrix_exp"):
        export(net, torch.zeros(4, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.Linear(4, 8)])
def test_a_computed_weight_without_a_form_is_named(layer: nn.Module) -> None:
    """And what the message says to do makes of it the network that it was."""
    torch.manual_seed(0)
    parametrizations.orthogonal(layer)
    x = torch.randn((2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else (2, 4))
    net = nn.Sequential(nn.ReLU(), layer)
    expected = net(x).detach()
    with pytest.raises(UnsupportedError, match=r"module '1' computes its weight by _Orthogonal"):
        export(net, x)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    (found,) = run(export(net, x), {"input": x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_the_slower_way_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning would tell a user nothing to do; what stands in the way is for the curious."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no such\nname")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr("morphgraph.torch_io.quick.capture", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = export(nn.Linear(3, 2), torch.zeros(1, 3))
    assert ops(model) == ["Gemm"]
    said = [each.getMessage() for each in caplog.records if each.name.startswith("morphgraph")]
    assert said == [
        "network Linear: exported by torch.export; a single run is quicker and did not do: "
        "RuntimeError: no such"
    ]
