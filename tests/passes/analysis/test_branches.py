"""Branches that can go as a whole, of networks whose branches are known by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.branches import Branch, blocks, branches
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.rewrite.mask import mask
from morphgraph.testing import model_from_text


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(-1, -2) / (c / self.heads) ** 0.5).softmax(-1) @ v
        y: Tensor = self.o(mixed.transpose(1, 2).reshape(b, t, c))
        return y


class Block(nn.Module):
    """Norm before or behind, or both branches side by side from one norm."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.attn, self.n1, self.n2 = Attention(width, 2), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "pre":
            x = x + self.attn(self.n1(x))
            return x + self.mlp(self.n2(x))
        if self.form == "post":
            x = self.n1(x + self.attn(x))
            y: Tensor = self.n2(x + self.mlp(x))
            return y
        h = self.n1(x)
        return x + (self.attn(h) + self.mlp(h))


class Transformer(nn.Module):
    def __init__(self, form: str, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8, form) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def transformer(form: str) -> ChannelGraph:
    torch.manual_seed(0)
    return mg.lift(mg.export(Transformer(form).eval(), (torch.randn(1, 4, 8),)))


BOTTLENECKS = """net (float[1,3,6,6] x, float[8,3,1,1] sw, float[4,8,1,1] aw, float[4,4,3,3] bw,
    float[8,4,1,1] cw, float[6,8,3,3] dw, float[10,6,3,3] ew, float[10,8,1,1] fw,
    float[2,10,1,1] gw) => (float[1,2,6,6] y) {
    s = Conv(x, sw)
    a = Conv(s, aw)  ra = Relu(a)  b = Conv<pads=[1,1,1,1]>(ra, bw)  rb = Relu(b)
    c = Conv(rb, cw)  t = Add(s, c)  rt = Relu(t)
    d = Conv<pads=[1,1,1,1]>(rt, dw)  rd = Relu(d)  e = Conv<pads=[1,1,1,1]>(rd, ew)
    f = Conv(rt, fw)  u = Add(e, f)  y = Conv(u, gw)
}"""
PATHS = """net (float[1,3,6,6] x, float[8,3,1,1] sw, float[4,8,1,1] aw, float[5,8,3,3] bw,
    float[8,9,1,1] cw, float[2,8,1,1] gw) => (float[1,2,6,6] y) {
    s = Conv(x, sw)  a = Conv(s, aw)  b = Conv<pads=[1,1,1,1]>(s, bw)
    j = Concat<axis=1>(a, b)  r = Relu(j)  c = Conv(r, cw)  t = Add(c, s)  y = Conv(t, gw)
}"""
SKIP = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
net (float[1,4,8] x, float[8,12] uw, float[12,8] vw, float[8] one, float[8,2] hw)
    => (float[1,4,2] y) {
    u = MatMul(x, uw)  r = Relu(u)  v = MatMul(r, vw)
    n, m, d, t = com.microsoft.SkipLayerNormalization(x, v, one)
    y = MatMul(n, hw)
}"""
# Nothing here is a branch: two towers that meet, a sum at the end of a chain, a mask.
TOWERS = """net (float[1,3] x, float[1,3] z, float[3,4] aw, float[4,5] bw, float[3,6] cw,
    float[6,5] dw, float[5,2] ew) => (float[1,2] y) {
    a = MatMul(x, aw)  ra = Relu(a)  b = MatMul(ra, bw)
    c = MatMul(z, cw)  rc = Relu(c)  d = MatMul(rc, dw)  t = Add(b, d)  y = MatMul(t, ew)
}"""


def found_in(graph: ChannelGraph) -> tuple[Branch, ...]:
    return branches(graph, frozenset(g.index for g in graph.groups if g.resizable))


def widths_of(graph: ChannelGraph, branch: Branch) -> list[int]:
    return [graph.groups[index].width for index in branch.groups]


@pytest.mark.parametrize("form", ["pre", "post"])
def test_attentions_and_mlps_are_branches_and_together_blocks(form: str) -> None:
    graph = transformer(form)
    found = found_in(graph)
    assert [branch.name for branch in found] == [
        name for k in range(3) for name in (f"layers.{k}.attn", f"layers.{k}.mlp")
    ]
    assert [widths_of(graph, branch) for branch in found] == [[2], [12]] * 3
    whole = blocks(found)
    assert [block.name for block in whole] == ["layers.0", "layers.1", "layers.2"]
    assert [block.groups for block in whole] == [
        tuple(sorted(a.groups + m.groups)) for a, m in zip(found[::2], found[1::2], strict=True)
    ]


def test_branches_side_by_side_go_alone_or_together() -> None:
    graph = transformer("parallel")
    found = found_in(graph)
    assert [widths_of(graph, branch) for branch in found] == [[2], [12], [2, 12]] * 3
    assert [widths_of(graph, block) for block in blocks(found)] == [[2, 12]] * 3


def test_a_bottleneck_goes_with_both_widths_and_a_shortcut_stays() -> None:
    graph = mg.lift(model_from_text(BOTTLENECKS))
    assert [widths_of(graph, branch) for branch in found_in(graph)] == [[4, 4], [6]]


@pytest.mark.parametrize(
    ("text", "widths"),
    [(PATHS, [[4, 5]]), (SKIP, [[12]]), (TOWERS, [])],
    ids=["paths", "skip", "two"],
)
def test_paths_side_by_side_fused_sums_and_what_is_no_branch(
    text: str, widths: list[list[int]]
) -> None:
    graph = mg.lift(model_from_text(text))
    assert [widths_of(graph, branch) for branch in found_in(graph)] == widths


@pytest.mark.parametrize("text", [BOTTLENECKS, PATHS, SKIP], ids=["bottlenecks", "paths", "skip"])
def test_what_a_branch_gives_is_constant_once_it_is_dead(text: str) -> None:
    """ONNX Runtime runs the masked original: two inputs, one result."""
    graph = mg.lift(model_from_text(text))
    for branch in found_in(graph):
        assert liveness(graph, branch.groups).refusal is None
        dead = {index: np.zeros(0, dtype=np.int64) for index in branch.groups}
        model = mask(graph, dead)
        by_name = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.append(by_name[branch.values[0]])
        one, other = (run(model, random_inputs(model, seed=seed)) for seed in (0, 1))
        np.testing.assert_array_equal(one[branch.values[0]], other[branch.values[0]])
        assert np.abs(one["y"] - other["y"]).max() > 1e-3  # the rest of the network still listens
