"""Queries and keys that lose elements, held against numpy's decompositions of the logits."""

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.graph import Attention as Choice, ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration.compared import Compared, compared
from morphgraph.passes.calibration.logits import products
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.testing import model_from_text

IN, PLACES = 12, 9


class Attention(nn.Module):
    """Self-attention that gives its logits as well, and its keys where these are to be seen."""

    def __init__(
        self,
        heads: int = 3,
        size: int = 6,
        *,
        bias: bool = True,
        packed: bool = False,
        repeats: int = 1,
        shown: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.size, self.repeats = heads, size, repeats
        self.packed, self.shown = packed, shown
        wide = heads * size
        parts = [3 * wide] if packed else [wide * repeats, wide, wide]
        self.make = nn.ModuleList(nn.Linear(IN, part, bias=bias) for part in parts)
        self.out = nn.Linear(wide * repeats, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = [layer(x) for layer in self.make]
        if self.packed:
            made = list(made[0].split(self.heads * self.size, dim=-1))
        q, k, v = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in made)
        keys = k
        if self.repeats > 1:
            k, v = (each.repeat_interleave(self.repeats, 1) for each in (k, v))
        logits = (q * 0.5) @ k.transpose(-1, -2)
        y = self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return (y, logits, keys) if self.shown else (y, logits)


def lifted(
    net: nn.Module, x: Tensor, pin_outputs: bool = True, attention: Choice = "head-dim"
) -> ChannelGraph:
    model = mg.export(net.eval(), (x,), dynamic_batch=True)
    return mg.lift(model, attention=attention, pin_outputs=pin_outputs)


def logits_group(graph: ChannelGraph) -> int:
    (found,) = {k for p in products(graph) for k in graph.groups_on(p.summed)}
    return found


def feeds_of(graph: ChannelGraph, x: Tensor) -> dict[str, np.ndarray]:
    (name,) = (value.name or "" for value in graph.model.graph.inputs)
    return {name: x.numpy()}


def fitted(graph: ChannelGraph, keep: dict[int, np.ndarray], x: Tensor) -> ir.Model:
    """Sees one sample: all pairs of its places are all logits that there are."""
    feeds = feeds_of(graph, x)
    seen = compared(graph, lambda: [feeds])
    return refit(graph, keep, [feeds], [feeds], compared=seen).model


def logits_of(graph: ChannelGraph, model: ir.Model, x: Tensor) -> np.ndarray:
    outputs = run(model, feeds_of(graph, x))
    return outputs[graph.model.graph.outputs[1].name or ""].astype(np.float64)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"heads": 1, "size": 8}])
def test_the_rest_is_that_of_the_singular_values(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net, x = Attention(**options), torch.randn(1, PLACES, IN)
    graph = lifted(net, x)
    keep = {logits_group(graph): np.array([0, 2, 5])}
    with torch.no_grad():
        whole = net(x)[1].double().numpy()
    error = np.square(logits_of(graph, fitted(graph, keep, x), x) - whole).sum()
    singular = np.linalg.svd(whole, compute_uv=False)  # [1, heads, places]
    assert error == pytest.approx(np.square(singular[..., 3:]).sum(), rel=1e-3)
    sliced = np.square(logits_of(graph, resize(graph, keep), x) - whole).sum()
    assert sliced > 2 * error


@pytest.mark.parametrize("options", [{"shown": True}, {"repeats": 2}])
def test_keys_that_others_see_stay_as_they_are(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    net, x = Attention(**options), torch.randn(1, PLACES, IN)
    graph = lifted(net, x, pin_outputs=False)
    stays = np.array([1, 3, 4])
    keep = {logits_group(graph): stays}
    model = fitted(graph, keep, x)
    with torch.no_grad():
        whole = net(x)[1].double().numpy()
        made = [layer(x).unflatten(-1, (-1, net.size)).transpose(1, 2) for layer in net.make]
    queries, keys = (
        each[0].double().numpy() * f for each, f in zip(made, (0.5, 1.0), strict=False)
    )
    expected = np.zeros_like(whole[0])
    for head, q in enumerate(queries):
        k = keys[head // net.repeats]
        best, *_ = np.linalg.lstsq(k[:, stays], k, rcond=None)  # [kept, size]
        expected[head] = q @ best.T @ k[:, stays].T
    np.testing.assert_allclose(logits_of(graph, model, x)[0], expected, atol=1e-4)
    if net.shown:
        shown = run(model, feeds_of(graph, x))[graph.model.graph.outputs[2].name or ""]
        np.testing.assert_allclose(shown, made[1][..., stays].numpy(), atol=1e-5)


def test_heads_that_stay_are_made_up_for() -> None:
    torch.manual_seed(6)
    net, x = Attention(heads=3), torch.randn(1, PLACES, IN)
    graph = lifted(net, x, pin_outputs=False, attention="all")
    size = logits_group(graph)
    heads = next(g.index for g in graph.groups if g.resizable and g.width == 3)
    keep = {size: np.array([1, 2, 5]), heads: np.array([0, 2])}
    with torch.no_grad():
        whole = net(x)[1].double().numpy()[:, [0, 2]]
    found = logits_of(graph, fitted(graph, keep, x), x)
    singular = np.linalg.svd(whole, compute_uv=False)
    expected = np.square(singular[..., 3:]).sum()
    assert np.square(found - whole).sum() == pytest.approx(expected, rel=1e-3)


def test_packed_layers_keep_their_values() -> None:
    """One layer makes queries, keys and values; the last are sliced as they were."""
    torch.manual_seed(3)
    net, x = Attention(packed=True), torch.randn(1, PLACES, IN)
    graph = lifted(net, x)
    (product,) = products(graph)
    assert product.queries.reader == product.keys.reader != ""
    keep = {logits_group(graph): np.array([0, 1, 4])}
    with torch.no_grad():
        y, whole = (each.double().numpy() for each in net(x))
    model = fitted(graph, keep, x)
    error = np.square(logits_of(graph, model, x) - whole).sum()
    singular = np.linalg.svd(whole, compute_uv=False)
    assert error == pytest.approx(np.square(singular[..., 3:]).sum(), rel=1e-3)
    name = graph.model.graph.outputs[0].name or ""
    found = [run(m, feeds_of(graph, x))[name] for m in (model, resize(graph, keep))]
    assert np.square(found[0] - y).sum() < np.square(found[1] - y).sum()


LAW = """
<ir_version: 10, opset_import: ["": 20]>
net (float[1,N,12] x, float[12,W] wq, float[W] bq, float[12,W] wk, float[W] bk)
    => (float[1,H,N,N] y)
<int64[4] four = {1, N, H, S}> {
  qm = MatMul(x, wq)  q = Add(qm, bq)  qh = Reshape(q, four)
  km = MatMul(x, wk)  k = Add(km, bk)  kh = Reshape(k, four)
  qt = Transpose<perm=[0,2,1,3]>(qh)
  kt = Transpose<perm=[0,2,3,1]>(kh)
  y = MatMul(qt, kt)
}"""


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    heads=st.integers(1, 3),
    size=st.integers(2, 6),
    kept=st.integers(1, 6),
    places=st.integers(3, 12),
    seed=st.integers(0, 999),
)
def test_the_fit_is_never_further_from_the_logits(
    heads: int, size: int, kept: int, places: int, seed: int
) -> None:
    sizes = {"N": places, "H": heads, "S": size, "W": heads * size}
    text = LAW
    for letter, number in sizes.items():
        text = re.sub(rf"\b{letter}\b", str(number), text)
    graph = mg.lift(model_from_text(text, seed=seed), attention="head-dim")
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(1, places, IN)).astype(np.float32))
    stays = np.sort(rng.choice(size, min(kept, size), replace=False))
    keep = {logits_group(graph): stays}
    models = graph.model, resize(graph, keep), fitted(graph, keep, x)
    whole, sliced, found = (run(m, {"x": x.numpy()})["y"].astype(np.float64) for m in models)
    scale = np.square(whole).sum()
    assert np.square(found - whole).sum() <= np.square(sliced - whole).sum() + 1e-8 * scale
    if len(stays) == size:
        np.testing.assert_array_equal(found, whole)


def test_nothing_removed_changes_nothing() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, PLACES, IN)
    graph = lifted(Attention(), x)
    model = fitted(graph, {}, x)
    before, after = (each.graph.initializers for each in (graph.model, model))
    assert {*before} == {*after}
    for name, value in before.items():
        np.testing.assert_array_equal(value.const_value.numpy(), after[name].const_value.numpy())


FUSED = """
<ir_version: 10, opset_import: ["": 23]>
net (float[1,5,8] x, float[8,12] wq, float[8,12] wk, float[8,12] wv, float[12,4] wo)
    => (float[1,5,4] y) {
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  a = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)
  y = MatMul(a, wo)
}"""


def test_fused_attentions_count() -> None:
    graph = mg.lift(model_from_text(FUSED), attention="head-dim")
    (found,) = products(graph)
    np.testing.assert_array_equal(found.queries.outputs, np.arange(12).reshape(2, 6))
    data = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    seen = compared(graph, lambda: [{"x": data}])
    weight = {n: v.const_value.numpy() for n, v in graph.model.graph.initializers.items()}
    queries = (data[0] @ weight["wq"]).reshape(5, 2, 6)
    expected = np.einsum("phi,phj->hij", queries, queries) / 5
    np.testing.assert_allclose(seen.moments[found.name][0], expected, rtol=1e-4, atol=1e-6)


def test_widths_are_chosen_by_what_is_left_after_the_compensation() -> None:
    """Logits of a low rank in no kept basis: a plan takes the head's size, and loses nothing."""
    torch.manual_seed(5)
    net = Attention(heads=2, size=8)
    with torch.no_grad():
        for layer in net.make[:2]:  # queries and keys of three dimensions, in all elements
            assert isinstance(layer, nn.Linear)
            for head in range(2):
                rows = slice(8 * head, 8 * head + 8)
                layer.weight[rows] = torch.randn(8, 3) @ torch.randn(3, IN)
                layer.bias[rows] = 0.0
    x = torch.randn(150, PLACES, IN)
    graph = lifted(net, x[:2])
    shrinker = Shrinker(graph, x.numpy(), threads=1)
    index = logits_group(graph)
    plan = shrinker.plan({"flops": "82%"})
    changed = np.flatnonzero(plan.widths(graph) < graph.widths)
    np.testing.assert_array_equal(changed, [index])
    result = finish(shrinker, plan)
    by_name = {check.name: check for check in result.error}
    logits = graph.model.graph.outputs[1].name or ""
    assert by_name[logits].error < 1e-2
    losses = shrinker.calibration.removals[index].losses  # after each of eight elements
    assert losses[4] < 1e-6
    assert losses[5] > 1e-4
    assert losses[-1] == pytest.approx(1)


def test_without_products_no_inputs_are_asked_for() -> None:
    graph = mg.lift(mg.export(nn.Linear(3, 2), (torch.randn(1, 3),)))
    assert compared(graph, lambda: pytest.fail("asked for")) == Compared() or not products(graph)
