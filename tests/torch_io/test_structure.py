"""What the user's module was beside its function: the form of its results, frozen and tied weights.

The oracle is the module itself.
"""

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import morphgraph as mg
from morphgraph.errors import MorphWarning
from morphgraph.onnx_io import OUTPUTS_KEY


class Pair(NamedTuple):
    first: Any
    second: Any


class Output(OrderedDict[str, Any]):
    """As ``transformers`` gives its results: a dict with attributes, which torch's pytree knows."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="tests.Output",
)

FORMS = {
    "dict": lambda x, y: {"out": x, "features": [x.relu(), y], "aux": y + 1},
    "nested": lambda x, y: [(x, {"a": [y, None]}), [x + y]],
    "one in a tuple": lambda x, y: (x + y,),
    "one in a dict": lambda x, y: {"logits": x + y},
    "named": lambda x, y: Pair(x, {"b": y}),
    "object": lambda x, y: Output(logits=x, hidden=(x, y), loss=None),
    "keys that are no names": lambda x, y: {0: x, "a b": y},
    "twice the same": lambda x, y: {"b": x, "a": (x, y)},
    "tuple": lambda x, y: (x, y),
    "tensor": lambda x, y: x - y,
}


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.a(x).relu()
        return FORMS[self.form](self.b(x), self.c(x))


@pytest.mark.parametrize("form", FORMS)
def test_results_come_in_the_form_in_which_the_network_gave_them(form: str, tmp_path: Path) -> None:
    net, x = Net(form).eval(), torch.randn(2, 3)
    mg.save(mg.export(net, (x,)), tmp_path / "net.onnx")
    model = mg.load(tmp_path / "net.onnx")
    expected = net(x)
    again = mg.to_torch(model)
    for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        found = copied(x)
        assert type(found) is type(expected)
        torch.testing.assert_close(pytree.tree_flatten(found), pytree.tree_flatten(expected))
    assert (OUTPUTS_KEY in model.metadata_props) == (form not in ("tuple", "tensor"))


def test_the_form_outlives_a_resize() -> None:
    net, x = Net("dict").eval(), torch.randn(2, 3)
    graph = mg.lift(mg.export(net, (x,)))
    slim = mg.to_torch(mg.apply(graph, mg.uniform(graph, 0.5)))
    found = slim(x)
    assert [found["out"].shape, len(found["features"])] == [(2, 4), 2]


@pytest.mark.parametrize(
    "noted",
    ["{", '["linear"]', '{"dict": [["a", "elsewhere"]]}', '{"dict": [["a"]]}', '{"set": []}', "7"],
)
def test_a_form_that_does_not_fit_is_ignored(noted: str) -> None:
    net, x = Net("tuple").eval(), torch.randn(2, 3)
    model = mg.export(net, (x,))
    model.metadata_props[OUTPUTS_KEY] = noted
    assert isinstance(mg.to_torch(model)(x), tuple)


def test_no_class_is_imported_or_called_that_is_no_result() -> None:
    model = mg.export(Net("one in a dict").eval(), (torch.randn(2, 3),))
    (name,) = [value.name for value in model.graph.outputs]
    model.metadata_props[OUTPUTS_KEY] = (
        '{"object": [["logits", "%s"]], "class": "subprocess:Popen"}' % name  # noqa: UP031
    )
    found = mg.to_torch(model)(torch.randn(2, 3))
    assert found.logits is found["logits"]


def frozen_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).eval()
    net[0].requires_grad_(False)
    return net


def test_frozen_layers_are_held_and_stay_frozen() -> None:
    net, x = frozen_net(), torch.randn(2, 3, 8, 8)
    graph = mg.lift(mg.export(net, (x,)))
    reasons = {group.name: group.reason for group in graph.groups}
    assert reasons["0"] == "'0.weight' is frozen (include overrides)"
    assert reasons["2"] is None
    small = mg.apply(graph, mg.plan(graph, {"flops": "80%"}))
    slim = mg.to_torch(small)
    assert slim.get_parameter("0.weight").shape == (8, 3, 3, 3)
    trains = {name: parameter.requires_grad for name, parameter in slim.named_parameters()}
    assert trains == {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert "0" in [g.name for g in mg.lift(small).groups if g.held]
    asked = mg.plan(graph, {"flops": "40%"}, include=["*"])
    assert asked.widths(graph)[reasons_index(graph, "0")] < 8


def reasons_index(graph: Any, name: str) -> int:
    return next(group.index for group in graph.groups if group.name == name)


def test_no_step_changes_a_frozen_tensor() -> None:
    net, x = frozen_net(), torch.randn(2, 3, 8, 8)
    graph = mg.lift(mg.export(net, (x,)))
    with pytest.warns(MorphWarning, match=r"0.weight is frozen \(requires_grad=False\)"):
        regularizer = mg.Regularizer(graph, net, include=["*"])
    frozen, trained = net[0].weight.clone(), net[2].weight.clone()
    regularizer.weight = 50.0
    regularizer.proximal_step(1.0)
    regularizer.zero_channels(torch.ones(len(graph.channel_group), dtype=torch.bool))
    assert torch.equal(net[0].weight, frozen)
    assert not torch.equal(net[2].weight, trained)


def test_a_network_that_is_frozen_as_a_whole_says_nothing_by_it() -> None:
    net, x = frozen_net().requires_grad_(False), torch.randn(2, 3, 8, 8)
    model = mg.export(net, (x,))
    graph = mg.lift(model)
    assert {group.name for group in graph.groups if group.resizable} == {"0", "2"}
    assert all(parameter.requires_grad for parameter in mg.to_torch(model).parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.f = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = self.embed.weight
        self.other.weight, self.other.bias = self.one.weight, self.one.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.other(self.one(self.f(self.embed(x)).relu()).relu()))


def test_tied_parameters_are_one_parameter_at_all_paths() -> None:
    net, x = Tied().eval(), torch.randint(0, 10, (2, 5))
    model = mg.export(net, (x,))
    again = mg.to_torch(model)
    for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert set(copied.state_dict()) == set(net.state_dict())
        assert len(list(copied.parameters())) == len(list(net.parameters()))
        torch.testing.assert_close(copied(x), net(x))
    other = Tied().eval()
    again.load_state_dict(other.state_dict())
    torch.testing.assert_close(again(x), other(x))
    trained = mg.with_weights(model, again.state_dict())
    torch.testing.assert_close(mg.to_torch(trained)(x), other(x))
    assert isinstance(trained, ir.Model)
