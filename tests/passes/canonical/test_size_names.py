"""What is written of open sizes is true, and ONNX Runtime runs it at any of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import morphgraph as mg
from morphgraph.passes.rewrite.mask import mask


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.head = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        z = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        z = self.out(z.transpose(1, 2).reshape(batch, length, 8))
        return self.head(self.wide(x + z).relu())


class Pixels(nn.Module):
    """Pixels become rows: sizes that are products of two or three open ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        batch, channels, height, width = y.shape
        rows = y.flatten(2).transpose(1, 2).reshape(batch * height * width, channels)
        return self.fc(rows.relu()).reshape(batch, height * width, 4)


class Windows(nn.Module):
    """Windows of two; a size of several times the batch, and twice a length and one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 12, 3, padding=1), nn.ConvTranspose1d(12, 5, 3, 2)
        self.fc = nn.Linear(24, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        batch, channels, length = y.shape
        pairs = y.transpose(1, 2).reshape(batch * (length // 2), 2 * channels)
        z = self.head(self.fc(pairs).relu())
        return self.b(y), z.reshape(batch, length // 2, 5)


NETS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[int, ...]], dict[int, Any]]
] = {
    "attention": (Attention, lambda b, n: (b, 2 * n, 8), {0: Dim("b"), 1: Dim("t")}),
    "pixels": (
        Pixels,
        lambda b, n: (b, 3, 2 * n, 2 * n + 2),
        {0: Dim("b"), 2: 2 * Dim("h"), 3: 2 * Dim("w")},
    ),
    "windows": (Windows, lambda b, n: (b, 6, 2 * n), {0: Dim("b"), 2: 2 * Dim("t")}),
}


def assert_true_at(path: Path, x: np.ndarray, expected: list[np.ndarray]) -> None:
    """A file runs as it is, gives what is expected, and its names of sizes say what they are."""
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    found = session.run(None, {given.name: x})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    sizes = {name: n for name, n in zip(given.shape, x.shape, strict=True) if name != n}
    model = onnx.load(path)
    outputs = {output.name for output in model.graph.output}
    declared = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    model.graph.output.extend(v for v in model.graph.value_info if v.name not in outputs)
    everything = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in everything.get_outputs()]
    for name, array in zip(names, everything.run(None, {given.name: x}), strict=True):
        dims = declared[name].type.tensor_type.shape.dim
        for dim, size in zip(dims, array.shape, strict=True):
            # What has one name has one size, and a name that is a formula has its value.
            if dim.dim_param:
                assert sizes.setdefault(dim.dim_param, size) == size, (name, dim.dim_param)
    known = {base: size for base, size in map(_base, sizes.items()) if base.isidentifier()}
    for formula, size in sizes.items():
        if set(re.findall(r"[A-Za-z_]\w*", formula)) <= known.keys():
            assert eval(formula, {}, known) == size, formula


def _base(named: tuple[str, int]) -> tuple[str, int]:
    """``2*t`` says what ``t`` is."""
    factor, _, base = named[0].rpartition("*")
    return (base, named[1] // int(factor)) if factor.isdigit() else named


@pytest.mark.parametrize("name", NETS)
def test_files_run_at_any_open_size(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape, dims = NETS[name]
    net = make().eval()
    graph = mg.lift(mg.export(net, (torch.randn(*shape(2, 3)),), dynamic_shapes=(dims,)))
    plan = mg.uniform(graph, 0.5)
    mg.save(graph.model, tmp_path / "same.onnx")
    mg.save(mg.apply(graph, plan), tmp_path / "small.onnx")
    masked = mask(graph, plan.keep_channels(graph))
    mg.save(masked, tmp_path / "masked.onnx")
    for batch, length in ((2, 3), (1, 5), (5, 8)):
        x = torch.randn(*shape(batch, length))
        with torch.no_grad():
            results = net(x)
        results = results if isinstance(results, tuple) else (results,)
        array = x.numpy()
        assert_true_at(tmp_path / "same.onnx", array, [each.numpy() for each in results])
        session = onnxruntime.InferenceSession(tmp_path / "masked.onnx")
        silenced = session.run(None, {session.get_inputs()[0].name: array})
        assert_true_at(tmp_path / "small.onnx", array, silenced)
