"""What the user's module was beside its function: the form of its results, frozen and tied weights.

The oracle is the module itself.
"""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import morphgraph as mg
from morphgraph.errors import MorphWarning
from morphgraph.onnx_io import INPUTS_KEY, OUTPUTS_KEY, runtime as ort
from morphgraph.train.settled import Settled


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


@dataclass
class Fields:
    """A dataclass that torch's pytree knows."""

    first: Any
    second: Any = None


pytree.register_dataclass(Fields)

FORMS = {
    "dict": lambda x, y: {"out": x, "features": [x.relu(), y], "aux": y + 1},
    "nested": lambda x, y: [(x, {"a": [y, None]}), [x + y]],
    "one in a tuple": lambda x, y: (x + y,),
    "one in a dict": lambda x, y: {"logits": x + y},
    "named": lambda x, y: Pair(x, {"b": y}),
    "dataclass": lambda x, y: Fields(x, {"b": y}),
    "dataclass with nothing": lambda x, y: [Fields(x), y],
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
    frozen, trained = (net.get_parameter(f"{k}.weight") for k in (0, 2))
    before = [frozen.clone(), trained.clone()]
    regularizer.weight = 50.0
    regularizer.proximal_step(1.0)
    Settled(regularizer, torch.ones(len(graph.channel_group), dtype=torch.bool)).hold()
    assert torch.equal(frozen, before[0])
    assert not torch.equal(trained, before[1])


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


class Sum(nn.Module):
    """Two layers on two tensors, which the forward takes out of its arguments."""

    def __init__(self, take: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.take = take
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 4)

    def both(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c((self.a(x) + self.b(y)).relu())
        return out


class Positional(Sum):
    def forward(self, batch: Any, more: Any = None) -> torch.Tensor:
        return self.both(*self.take(batch, more))


class ByName(Sum):
    def forward(self, x: Any, *, y: Any = None, **others: Any) -> torch.Tensor:
        return self.both(*self.take(x, y, **others))


class Many(Sum):
    def forward(self, *parts: Any) -> torch.Tensor:
        return self.both(*self.take(*parts))


X, Y = torch.randn(2, 3), torch.randn(2, 3)
ARGUMENTS: dict[str, tuple[type[Sum], Callable[..., Any], Any, list[str]]] = {
    "dict": (
        Positional,
        lambda d, _: (d["x"], d["y"]),
        ({"x": X, "y": Y},),
        ["batch_x", "batch_y"],
    ),
    "odd keys": (
        Positional,
        lambda d, _: (d["a b"], d["class"]),
        ({"a b": X, "class": Y},),
        ["batch_a b", "batch_class"],
    ),
    "list": (Positional, lambda d, _: d, ([X, Y],), ["batch_0", "batch_1"]),
    "nested": (
        Positional,
        lambda d, more: (d["l"][1]["x"], more[0]),
        ({"l": [None, {"x": X}]}, (Y,)),
        ["batch_l_1_x", "more_0"],
    ),
    "named tuple": (
        Positional,
        lambda p, _: (p.first, p.second),
        (Pair(X, Y),),
        ["batch_first", "batch_second"],
    ),
    "dataclass": (
        Positional,
        lambda p, _: (p.first, p.second["y"]),
        (Fields(X, {"y": Y}),),
        ["batch_first", "batch_second_y"],
    ),
    "dict behind a tensor": (
        Positional,
        lambda x, more: (x, more["y"]),
        (X, {"y": Y}),
        ["batch", "more_y"],
    ),
    "by name": (ByName, lambda x, y: (x, y), {"x": X, "y": Y}, ["x", "y"]),
    "other names": (ByName, lambda x, _, z: (x, z["k"]), {"x": X, "z": {"k": Y}}, ["x", "z_k"]),
    "any number": (Many, lambda d, y: (d["x"], y), ({"x": X}, Y), ["input_0_x", "input_1"]),
}


def _of_size(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.repeat(3, 1)[:size]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("odd keys", False),
        ("nested", True),
        ("named tuple", False),
        ("dataclass", False),
        ("dict behind a tensor", False),
        ("other names", True),
        ("any number", False),
        *(
            pytest.param(name, dynamic, marks=pytest.mark.long)
            for name, dynamic in (("dict", True), ("list", True), ("by name", True))
        ),
    ],
)
def test_arguments_are_given_as_the_network_takes_them(name: str, dynamic: bool) -> None:
    """To the network of torch, before and after a resize; the model has inputs side by side."""
    kind, take, example, inputs = ARGUMENTS[name]
    net = kind(take).eval()
    model = mg.export(net, example, dynamic_batch=dynamic)
    assert [value.name for value in model.graph.inputs] == inputs
    graph = mg.lift(model)
    plan = mg.uniform(graph, 0.5)
    again, slim = mg.to_torch(model), mg.to_torch(mg.apply(graph, plan))
    feeds = {value.name or "": tensor.numpy() for value, tensor in zip(model.graph.inputs, (X, Y))}
    for size in (2, 5) if dynamic else (2,):
        given = pytree.tree_map_only(torch.Tensor, _of_size(size), example)
        fed = {key: np.tile(array, (3, 1))[:size] for key, array in feeds.items()}
        keywords = given if isinstance(given, dict) else {}
        positional = () if keywords else given
        for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
            torch.testing.assert_close(
                copied(*positional, **keywords), net(*positional, **keywords)
            )
        (expected,) = ort.run(mg.apply(graph, plan), fed).values()
        np.testing.assert_allclose(slim(*positional, **keywords).detach(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["nested", "dataclass", "other names", "any number"])
def test_a_module_is_resized_without_an_example_of_its_arguments(name: str) -> None:
    """How its arguments are put together was noted at the export."""
    kind, take, example, _ = ARGUMENTS[name]
    net = kind(take).eval()
    graph = mg.lift(mg.export(net, example))
    plan = mg.uniform(graph, 0.5)
    values = zip(graph.model.graph.inputs, (X, Y), strict=True)
    feeds = {value.name or "": tensor.numpy() for value, tensor in values}
    (expected,) = ort.run(mg.apply(graph, plan), feeds).values()
    mg.resize_module(net, graph, plan)
    found = net(**example) if isinstance(example, dict) else net(*example)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "noted",
    ["{", "7", '{"list": ["batch_x"]}', '{"dict": [["batch", {"dict": [["x", "elsewhere"]]}]]}'],
)
def test_arguments_that_do_not_fit_are_ignored(noted: str) -> None:
    kind, take, example, _ = ARGUMENTS["dict"]
    net = kind(take).eval()
    model = mg.export(net, example)
    model.metadata_props[INPUTS_KEY] = noted
    torch.testing.assert_close(mg.to_torch(model)(X, Y), net(*example))


def test_a_batch_that_is_one_argument_is_told_from_arguments_by_name() -> None:
    kind, take, example, _ = ARGUMENTS["dict"]
    with pytest.raises(mg.UnsupportedError, match=r"'batch' is missing.*is given as \(dict,\)"):
        mg.export(kind(take), example[0])
