"""Bags of words: PyTorch's own results, and networks with them exported, resized and back."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.onnx_io import runtime as ort
from morphgraph.testing import prove
from morphgraph.torch_io.embedding_bags import embedding_bag

WORDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [3, 3, 3, 3]])
FLAT, STARTS = WORDS.flatten()[:10], torch.tensor([0, 3, 3, 8])
FORMS = {
    "rows": (WORDS, None, False),
    "offsets": (FLAT, STARTS, False),
    "offsets with an end": (FLAT, torch.tensor([0, 3, 3, 8, 10]), True),
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3, -9])
@pytest.mark.parametrize("form", FORMS)
def test_a_bag_is_what_torch_gives(form: str, padding: int | None, mode: str) -> None:
    words, offsets, last = FORMS[form]
    table = torch.randn(12, 5)
    weights = torch.rand(words.shape) if mode == "sum" else None
    found, expected = (
        bag(
            words,
            table,
            offsets,
            mode=mode,
            per_sample_weights=weights,
            include_last_offset=last,
            padding_idx=padding,
        )
        for bag in (embedding_bag, F.embedding_bag)
    )
    torch.testing.assert_close(found, expected)


class Bags(nn.Module):
    """A bag by a module, and one by the function."""

    def __init__(self, mode: str, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(12, 8, mode=mode, padding_idx=padding)
        self.table = nn.Parameter(torch.randn(12, 8))
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, words: Tensor, offsets: Tensor | None = None) -> Tensor:
        bags = self.words(words, offsets) + F.embedding_bag(words, self.table, offsets)
        out: Tensor = self.head(self.hidden(bags).relu())
        return out


@pytest.mark.parametrize(
    ("mode", "padding", "form"),
    [("mean", None, "rows"), ("max", 3, "rows"), ("sum", None, "offsets")],
)
def test_a_network_of_bags_is_exported_resized_and_back(
    mode: str, padding: int | None, form: str
) -> None:
    torch.manual_seed(0)
    net = Bags(mode, padding).eval()
    arguments = [x for x in FORMS[form][:2] if x is not None]
    model = mg.export(net, arguments)
    expected = net(*arguments).detach()
    feeds = {v.name or "": x.numpy() for v, x in zip(model.graph.inputs, arguments, strict=True)}
    (found,) = ort.run(model, feeds).values()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again = mg.to_torch(model)
    assert set(again.state_dict()) == set(net.state_dict())
    torch.testing.assert_close(again(*arguments), expected)
    graph = mg.lift(model)
    assert sorted(group.width for group in graph.groups if group.resizable) == [6, 8]
    prove(graph, (0,))
    plan = mg.uniform(graph, 0.5)
    mg.resize_module(net, graph, plan, example=arguments)
    assert tuple(net.words.weight.shape) == (12, 4)
    assert net.words.embedding_dim == 4
    (found,) = ort.run(mg.apply(graph, plan), feeds).values()
    np.testing.assert_allclose(found, net(*arguments).detach(), atol=1e-5)


def test_a_bag_that_changes_its_table_is_refused() -> None:
    net = nn.Sequential(nn.EmbeddingBag(12, 8, max_norm=1.0), nn.Linear(8, 3))
    with pytest.raises(mg.UnsupportedError, match=r"EmbeddingBag with max_norm=1\.0 changes"):
        mg.export(net, (WORDS,))


@pytest.mark.parametrize("both", [False, True])
def test_an_lstm_with_projection_is_refused_by_name(both: bool) -> None:
    net = nn.ModuleDict({"a": nn.LSTM(3, 6, 2, proj_size=2, bidirectional=both)})
    net.forward = lambda x: net["a"](x)[0]
    with pytest.raises(mg.UnsupportedError, match="module 'a' is an LSTM with proj_size=2"):
        mg.export(net, (torch.randn(5, 2, 3),))
