"""Outputs by index: the resized network gives the original's numbers at the classes that stay."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.errors import MorphError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.testing import model_from_text


def lifted(net: nn.Module, *shape: int) -> ChannelGraph:
    torch.manual_seed(1)
    return mg.lift(mg.export(net.eval(), (torch.randn(shape),)), pin_outputs=False)


class Two(nn.Module):
    """A classifier with an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.aux = nn.Linear(6, 16), nn.Linear(16, 10), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x).relu()
        return self.main(h), self.aux(h)


class Boxes(nn.Module):
    """Four numbers and 8 classes in one axis, as detectors give them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.box, self.cls = (nn.Conv2d(*c, 1) for c in ((3, 8), (8, 4), (8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return torch.cat([self.box(h), self.cls(h).sigmoid()], 1)


def _classifier() -> nn.Module:
    features = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 10))


def _segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2))


def _token_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 9))


NETS: dict[str, tuple[Any, tuple[int, ...], int, list[int]]] = {
    "classifier": (_classifier, (2, 3, 8, 8), 1, [0, 3, 7]),
    "segmentation": (_segmenter, (1, 3, 6, 6), 1, [5, 1]),
    "classes of every token": (_token_classifier, (2, 5, 6), 2, [8]),
    "boxes and classes": (Boxes, (1, 3, 4, 4), 1, [0, 1, 2, 3, 6, 9]),
}


def _outputs(model: ir.Model, feeds: Any) -> list[np.ndarray]:
    return list(run(model, feeds).values())


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_the_originals_at_these_indices(name: str) -> None:
    make, shape, axis, classes = NETS[name]
    graph = lifted(make(), *shape)
    made = mg.plan(graph, {}, keep_classes=classes)
    small = mg.apply(graph, made)
    feeds = random_inputs(graph.model, seed=2)
    (whole,), (part,) = _outputs(graph.model, feeds), _outputs(small, feeds)
    assert part.shape[axis] == len(classes)
    np.testing.assert_allclose(part, whole.take(sorted(classes), axis), rtol=1e-4, atol=1e-5)
    assert made.request["keep_classes"] == sorted(classes)
    assert mg.Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("name", NETS)
def test_beside_a_budget_the_classes_stay_and_the_rest_shrinks(name: str) -> None:
    make, shape, axis, classes = NETS[name]
    graph = lifted(make(), *shape)
    flops = cost(graph, "flops")
    for how in ("plan", "uniform"):
        if how == "plan":
            made = mg.plan(graph, {"flops": "60%"}, keep_classes=classes)
        else:
            made = mg.uniform(graph, budget={"flops": "60%"}, keep_classes=classes)
        small = mg.apply(graph, made)
        assert static_shape(small.graph.outputs[0])[axis] == len(classes)
        assert flops.at(made.widths(graph)) <= 0.6 * flops.total
    size = static_shape(graph.model.graph.outputs[0])[axis]
    with pytest.warns(MorphWarning, match="the plan changes nothing"):
        assert not mg.plan(graph, {}, keep_classes=list(range(size))).groups


@pytest.mark.parametrize("name", ["main", "aux"])
def test_of_several_outputs_one_is_named_and_the_other_keeps_its_size(name: str) -> None:
    graph = lifted(Two(), 1, 6)
    outputs = [str(value.name) for value in graph.model.graph.outputs]
    k = ["main", "aux"].index(name)
    for key in (outputs[k], f"{outputs[k]}:1"):
        made = mg.plan(graph, {"flops": "70%"}, keep_classes={key: [2, 5]})
        sizes = [static_shape(value)[1] for value in mg.apply(graph, made).graph.outputs]
        assert sizes == [2 if j == k else size for j, size in enumerate((10, 7))]


TIED = """
net (float[1,4] x, float[4,6] "a.weight") => (float[1,6] y, float[1,6] z)
{ y = MatMul(x, "a.weight")  z = Relu(y) }"""


def test_outputs_that_share_channels_are_given_the_same_classes() -> None:
    graph = mg.lift(model_from_text(TIED), pin_outputs=False)
    made = mg.plan(graph, {}, keep_classes={"y": [1, 2], "z": [2, 1]})
    assert [len(entry.positions) for entry in made.groups.values()] == [2]
    with pytest.raises(MorphError, match="shares its channels with another output"):
        mg.plan(graph, {}, keep_classes={"y": [1, 2], "z": [0]})


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ([0, 10], "give whole numbers from 0 to 9, each once"),
        ([1, 1], "each once"),
        ([-1], "from 0 to 9"),
        ({"nobody": [1]}, "no such output or axis"),
        ({"output:7": [1]}, "no such output or axis"),
    ],
)
def test_classes_that_are_none(classes: Any, why: str) -> None:
    graph = lifted(_classifier(), 1, 3, 8, 8)
    with pytest.raises(MorphError, match=why):
        mg.plan(graph, {}, keep_classes=classes)


def test_what_cannot_go_says_why() -> None:
    pinned = mg.lift(mg.export(_classifier().eval(), (torch.randn(1, 3, 8, 8),)))
    with pytest.raises(MorphError, match="pin_outputs=False"):
        mg.plan(pinned, {}, keep_classes=[1])
    with pytest.raises(MorphError, match="say of which output"):
        mg.plan(lifted(Two(), 1, 6), {}, keep_classes=[1])
    text = """
    net (float[1,4] x, float[4,6] "a.weight") => (float[1,12] y)
    { h = MatMul(x, "a.weight")  y = Concat<axis=1>(h, h) }"""
    twice = mg.lift(model_from_text(text), pin_outputs=False)
    with pytest.raises(MorphError, match="positions 1, 7 are one channel"):
        mg.plan(twice, {}, keep_classes=[1, 2])
    assert mg.plan(twice, {}, keep_classes=[1, 7]).groups
