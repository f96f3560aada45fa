"""Sensitivity: errors as PyTorch gives them with those channels set to zero."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.errors import MorphError
from morphgraph.onnx_io.inputs import fit_inputs, read_inputs
from morphgraph.onnx_io.runtime import random_inputs


class Net(nn.Module):
    """Two heads; the second layer's channels are far weaker than the first's for the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 4)
        self.side = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).relu()
        return self.c(self.b(h).relu()), self.side(h)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _without(net: Net, name: str, x: Tensor) -> list[Tensor]:
    """The outputs with the weaker half of a layer's channels silenced behind its activation."""
    layer = getattr(net, name)
    norms = layer.weight.norm(dim=1)
    weak = norms.argsort()[: len(norms) - len(norms) // 2]

    def silence(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out.index_fill(1, weak, 0.0)

    handle = layer.register_forward_hook(silence)
    try:
        return list(net(x))
    finally:
        handle.remove()


def _save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def test_errors_are_those_of_silenced_channels(net: Net) -> None:
    x = torch.randn(5, 6)
    graph = mg.lift(mg.export(net, (x,)))
    (name,) = random_inputs(graph.model)
    seen: list[tuple[int, int]] = []
    rows = mg.sensitivity(graph, [{name: x.numpy()}], on_row=lambda *at: seen.append(at))
    assert {row.name for row in rows} == {"a", "b"}
    assert seen == [(1, 2), (2, 2)]
    assert [row.worst for row in rows] == sorted(row.worst for row in rows)
    with torch.no_grad():
        whole = net(x)
        for row in rows:
            assert row.kept == row.width // 2
            parts = _without(net, row.name, x)
            wanted = [float((p - w).norm() / w.norm()) for p, w in zip(parts, whole, strict=True)]
            np.testing.assert_allclose(list(row.error.values()), wanted, rtol=1e-4, atol=1e-7)
            params = mg.cost(graph, "params")
            widths = graph.widths.copy()
            widths[graph.group(row.name).index] = row.kept
            assert row.saved["params"] == pytest.approx(1 - params.at(widths) / params.total)


def test_several_inputs_count_together(net: Net, tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    graph = mg.lift(mg.export(net, (x,)))
    (name,) = random_inputs(graph.model)
    many = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    _save(tmp_path / "x.npz", {name: many})
    feeds = read_inputs(tmp_path / "x.npz")
    assert [feed[name].shape for feed in fit_inputs(feeds, graph.model)] == [(2, 6)] * 3
    rows = mg.sensitivity(graph, feeds)
    with torch.no_grad():
        whole = net(torch.from_numpy(many))[0]
        for row in rows:
            part = _without(net, row.name, torch.from_numpy(many))[0]
            first = next(iter(row.error.values()))
            assert first == pytest.approx(float((part - whole).norm() / whole.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"other": np.zeros((2, 6), np.float32)}, "no input 'other'; it takes"),
        ({}, "is missing; the model takes"),
        ({"x": np.zeros((2, 5), np.float32)}, r"is float32 .2,5.; the model takes"),
        ({"x": np.zeros((3, 6), np.float32)}, r"is float32 .3,6.; the model takes"),
        ({"x": np.zeros((2, 6), np.complex64)}, "is complex64"),
    ],
)
def test_inputs_that_do_not_fit(net: Net, tmp_path: Path, arrays: Any, why: str) -> None:
    graph = mg.lift(mg.export(net, (torch.randn(2, 6),)))
    (name,) = random_inputs(graph.model)
    _save(tmp_path / "x.npz", {name if k == "x" else k: v for k, v in arrays.items()})
    with pytest.raises(MorphError, match=rf"x\.npz: .*{why}"):
        mg.sensitivity(graph, read_inputs(tmp_path / "x.npz"))


def test_a_file_that_holds_no_arrays(net: Net, tmp_path: Path) -> None:
    graph = mg.lift(mg.export(net, (torch.randn(2, 6),)))
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(MorphError, match=r"not an \.npz file"):
        mg.sensitivity(graph, read_inputs(tmp_path / "x.npz"))
