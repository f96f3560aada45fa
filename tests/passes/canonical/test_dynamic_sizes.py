"""Networks that leave sequences, heights and widths open stay right at every size once resized."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import runtime as ort, static_shape
from morphgraph.passes.rewrite.mask import mask
from morphgraph.testing import model_from_text, prove, randomize_weights

OPEN = torch.export.Dim.DYNAMIC
Size = tuple[int, ...]


class Block(nn.Module):
    """Causal attention and a perceptron; keys have no bias, for a softmax does not feel it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(self.mix(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(torch.relu(self.up(self.norm2(x))))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        places = torch.arange(q.shape[2])
        later = places[:, None] < places[None]
        return (q @ k.transpose(-1, -2) / 3).masked_fill(later, -1e4).softmax(-1) @ v


class Fused(Block):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.place = nn.Embedding(128, 32)
        self.shift = nn.Parameter(torch.randn(1, 128, 32))
        self.blocks = nn.Sequential(Block(), Fused())
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.place(torch.arange(length)) + self.shift[:, :length]
        return self.head(self.blocks(x))


class Segmentation(nn.Module):
    """Two scales joined, and results of the size of the image, whatever that is."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 8, 1))
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(fine), fine.shape[-2:], mode="bilinear")
        y = self.head(torch.cat([fine, coarse], 1))
        return F.interpolate(y, x.shape[-2:], mode="bilinear")


SIZES: dict[Callable[[], nn.Module], list[Size]] = {
    Language: [(3, 5), (1, 100), (2, 64)],
    Segmentation: [(1, 3, 64, 96), (3, 3, 40, 40), (2, 3, 37, 50)],
}


def given(kind: Callable[[], nn.Module], size: Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    if kind is Language:
        return torch.randint(0, 50, size, generator=generator)
    return torch.randn(size, generator=generator)


@cache
def network(kind: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    net = kind().eval()
    if kind is Segmentation:
        net = randomize_weights(net, torch.randn(1, 3, 32, 32))
    axes = dict.fromkeys((0, 1) if kind is Language else (0, 2, 3), OPEN)
    example = given(kind, SIZES[kind][0])
    return net, mg.lift(mg.export(net, (example,), dynamic_shapes=(axes,)))


def result(model: ir.Model, x: torch.Tensor) -> np.ndarray:
    (name,) = (value.name for value in model.graph.inputs)
    (found,) = ort.run(model, {name or "": x.numpy()}).values()
    return found


@pytest.fixture(params=SIZES, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


def test_resized_at_any_size_it_is_the_masked_original(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    net, graph = network(kind)
    plan = mg.uniform(graph, 0.5)
    small, masked = mg.apply(graph, plan), mask(graph, plan.keep_channels(graph))
    mg.save(small, tmp_path / "small.onnx")
    again = mg.lift(tmp_path / "small.onnx")
    for size in SIZES[kind]:
        x = given(kind, size)
        original, expected = result(graph.model, x), result(masked, x)
        np.testing.assert_allclose(original, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
        scale = np.abs(expected).max()
        assert np.abs(expected - original).max() > 1e-2 * scale
        for resized in (small, again.model):
            np.testing.assert_allclose(result(resized, x), expected, rtol=0, atol=1e-5 * scale)
        torched = mg.to_torch(small, input_shapes={graph.model.graph.inputs[0].name or "": size})
        found = torched(x).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.long
def test_proved(kind: Callable[[], nn.Module]) -> None:
    prove(network(kind)[1], faults=30)


def test_the_groups_are_those_at_fixed_sizes(kind: Callable[[], nn.Module]) -> None:
    _, graph = network(kind)
    shapes = {value.name or "": static_shape(value) for value in graph.model.graph.inputs}
    fixed = mg.lift(graph.model, input_shapes=shapes)
    # At a fixed length nobody reads the table's rows behind it, so that they are free there.
    found, expected = (
        {(g.name, g.width) for g in each.groups if g.resizable}
        - {("place.weight", 64), ("shift", 64)}
        for each in (graph, fixed)
    )
    assert found == expected
    assert {node.ir.op_type for node in graph.ops if node.opaque} <= {"Trilu"}  # of the mask
    assert mg.cost(graph, "macs").total == mg.cost(fixed, "macs").total


def test_pytorch_leaves_open_what_the_model_does(kind: Callable[[], nn.Module]) -> None:
    _, graph = network(kind)
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    net = mg.to_torch(small)
    assert net.meta["morphgraph.batch"] == "free"
    for size in SIZES[kind]:
        x = given(kind, size)
        expected = result(small, x)
        np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    axes = dict.fromkeys((0, 1) if kind is Language else (0, 2, 3), OPEN)
    *_, last, first = (given(kind, size) for size in SIZES[kind])
    traced = torch.export.export(net, (first,), dynamic_shapes=(axes,)).module()
    np.testing.assert_allclose(traced(last).detach(), result(small, last), rtol=1e-4, atol=1e-5)


def lifted(text: str) -> ChannelGraph:
    return mg.lift(model_from_text(text, inputs=("x", "z")))


def test_sizes_are_written_in_the_open_ones() -> None:
    graph = lifted("""net (float[N,3,H,W] x, float[8,3,3,3] w, float[8,8,2,2] v)
    => (float[N,8,P,Q] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)  y = ConvTranspose<strides=[2,2]>(a, v)
    }""")
    shapes = {v.name: str(v.shape) for node in graph.ops for v in node.ir.outputs}
    assert shapes["a"] == "[N,8,H,W]"
    assert shapes["y"] == "[N,8,2*H,2*W]"


def test_symbols_that_must_be_equal_grow_together() -> None:
    graph = lifted("""net (float[N,S,4] x, float[M,T,4] z, float[4,8] w, float[8,2] v)
    => (float[N,S,2] y) { a = Add(x, z)  b = MatMul(a, w)  r = Relu(b)  y = MatMul(r, v) }""")
    plan = mg.uniform(graph, 0.5)
    small, masked = mg.apply(graph, plan), mask(graph, plan.keep_channels(graph))
    feeds = {name: np.random.default_rng(0).standard_normal((3, 7, 4), np.float32) for name in "xz"}
    (expected,), (found,) = (ort.run(each, feeds).values() for each in (masked, small))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_does_not_fit_the_analysis_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"do not fit.*S=64.*--input-shape"):
        lifted("""net (float[1,S,4] x, float[1,9,4] w) => (float[1,S,4] y) { y = Add(x, w) }""")


def test_a_branch_on_a_size_stays() -> None:
    graph = lifted("""net (float[1,S,4] x, float[4,4] w) => (float[1,S,4] y)
    <int64[1] most = {70}> {
        l = Shape<start=1, end=2>(x)  c = Less(l, most)
        y = If(c) <then_branch = g () => (float[1,S,4] t) { t = MatMul(x, w) },
                   else_branch = h () => (float[1,S,4] e) { e = Identity(x) }>
    }""")
    weight = graph.model.graph.initializers["w"].const_value
    assert weight is not None
    for length in (10, 100):
        x = torch.randn(1, length, 4)
        expected = x.numpy() @ weight.numpy() if length < 70 else x.numpy()
        np.testing.assert_allclose(result(graph.model, x), expected, atol=1e-5)
