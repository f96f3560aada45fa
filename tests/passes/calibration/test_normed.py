"""Queries with a norm of their own: its scales, held against least squares over all logits.

Terms come from ONNX Runtime: the resized network runs with one number of the norm's scale alone.
What the layers ahead make up for is left out here (``test_mixing.py``).
"""

import re
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings, strategies as st

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration import narrowed
from morphgraph.passes.calibration.compared import Compared, compared
from morphgraph.passes.calibration.curves import order_of
from morphgraph.passes.calibration.normed import best_scales, scales_error
from morphgraph.passes.calibration.statistics import calibrate
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text

PLACES, IN, SIZE, HEADS = 9, 12, 8, 4

NETWORK = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
net (float[1,9,12] x, float[12,32] wq, float[12,KW] wk, float[9,8] cos, float[9,8] sin,
     float[9,9] mask, float[COUNT] scale, float[COUNT] beta, float[8] kscale)
    => (float[1,4,9,9] l, float[1,4,9,9] p)
<int64[4] qs = {1, 9, 4, 8}, int64[4] ks = {1, 9, KH, 8}, int64[1] two = {2},
 int64[5] often = {1, 2, 2, 9, 8}, int64[4] all = {1, 4, 9, 8}, int64[1] last = {-1},
 float eps = {0.001}, float half = {0.5}, float[1] one = {1.0}> {
  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  k2 = Reshape(k0, ks)
  QUERIES
  kn = RMSNormalization<axis=-1>(k2, kscale)  k = Transpose<perm=[0,2,1,3]>(kn)
  TURNS
  kt = Transpose<perm=[0,1,3,2]>(KEYS)
  l = MatMul(qr, kt)  s = Add(l, mask)  p = Softmax<axis=-1>(s)
}"""
HALVES = """Z0, Z1 = Split<axis=-1, num_outputs=2>(FROM)  Zn = Neg(Z1)
  Zt = Concat<axis=-1>(Zn, Z0)  Zc = Mul(FROM, cos)  Zs = Mul(Zt, sin)  TO = Add(Zc, Zs)"""
OPERATORS = """sq = Mul(FROM, FROM)  mean = ReduceMean<keepdims=1>(sq, last)  more = Add(mean, eps)
  root = Sqrt(more)  unit = Div(FROM, root)  TO = Mul(SCALE, unit)"""
BEHIND = "behind the turn"
NORMS = {
    "operators": OPERATORS,
    "one more than the weight": f"g = Add(scale, one)  {OPERATORS.replace('SCALE', 'g')}",
    "one node": "TO = RMSNormalization<axis=-1>(FROM, scale)",
    "one node of ONNX Runtime": "TO = SimplifiedLayerNormalization<axis=-1>(FROM, scale)",
    "with a mean and a shift": "TO = LayerNormalization<axis=-1>(FROM, scale, beta)",
}


@dataclass
class Case:
    """A network with its inputs."""

    graph: ChannelGraph
    feeds: Arrays

    def keep(self) -> dict[int, Array]:
        """Half of the elements, in pairs where positions turn these."""
        summed = self.graph.groups_on(self.graph.dim("qr", 3))
        return {
            k: np.arange(1, self.graph.groups[k].width, 2)
            for k in summed
            if self.graph.groups[k].can_change
        }

    def run(self, model: ir.Model) -> Arrays:
        return {name: array[0].astype(np.float64) for name, array in run(model, self.feeds).items()}

    def with_numbers(self, model: ir.Model, numbers: FloatArray) -> FloatArray:
        """Logits with other numbers behind the norm, ``[heads, T, T]``."""
        model = model.clone()
        added = any(node.outputs[0].name == "g" for node in model.graph)
        _write(model, "scale", numbers - added)
        return self.run(model)["l"]


def _array(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def _write(model: ir.Model, name: str, array: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


def text_of(norm: str, together: bool, turned: bool, shared: int) -> str:
    """Of a network: the norm, over all heads at once or each head, and how queries go on."""
    keys = HEADS // shared
    steps = NORMS.get(norm, "TO = Mul(FROM, half)").replace("SCALE", "scale")
    if together:
        queries = f"{_between(steps, 'q0', 'qn')}  q2 = Reshape(qn, qs)"
    else:
        queries = f"q1 = Reshape(q0, qs)  {_between(steps, 'q1', 'q2')}"
    both = [f"{queries}  q = Transpose<perm=[0,2,1,3]>(q2)"]
    turns = []
    for name in "qk":
        turn = HALVES if turned else "TO = Mul(FROM, half)"
        turns.append(_between(re.sub(r"\bZ", name + "z", turn), name, f"{name}r"))
    if norm == BEHIND:
        turns[0] = turns[0].replace("qr =", "qt =") + "  qr = RMSNormalization<axis=-1>(qt, scale)"
    if shared > 1:
        turns.append("ku = Unsqueeze(kr, two)  ke = Expand(ku, often)  kx = Reshape(ke, all)")
    text = NETWORK.replace("QUERIES", both[0]).replace("TURNS", "  ".join(turns))
    text = text.replace("KEYS", "kx" if shared > 1 else "kr")
    count = HEADS * SIZE if together else SIZE
    for word, number in (("KW", keys * SIZE), ("KH", keys), ("COUNT", count)):
        text = re.sub(rf"\b{word}\b", str(number), text)
    return text


def _between(steps: str, start: str, end: str) -> str:
    return re.sub(r"\bTO\b", end, re.sub(r"\bFROM\b", start, steps))


def case(norm: str, together: bool = False, turned: bool = True, shared: int = 1) -> Case:
    model = model_from_text(text_of(norm, together, turned, shared), seed=0)
    angles = np.tile(np.outer(np.arange(PLACES), 0.9 ** np.arange(SIZE // 2)), 2)
    _write(model, "cos", np.cos(angles))
    _write(model, "sin", np.sin(angles))
    _write(model, "mask", np.where(np.tri(PLACES) > 0, 0.0, -np.inf))
    # What goes is large, so that the norm of what stays is another one.
    large = _array(model, "wq").reshape(IN, HEADS, -1, SIZE // 2).copy()
    large[..., ::2] *= 2
    _write(model, "wq", large.reshape(IN, -1))
    rng = np.random.default_rng(1)
    for name in ("scale", "kscale"):
        _write(model, name, np.asarray(rng.uniform(0.5, 1.5, _array(model, name).shape)))
    x = rng.normal(size=(1, PLACES, IN)).astype(np.float32)
    return Case(mg.lift(model, attention="head-dim"), {"x": x})


def seen(logits: FloatArray, taken: FloatArray) -> FloatArray:
    """What a softmax sees of logits, so that squares add up to the error."""
    allowed = np.tri(PLACES)
    weights = (taken + allowed / allowed.sum(1, keepdims=True)) / 2
    from_mean = logits - (weights * logits).sum(-1, keepdims=True)
    found: FloatArray = (np.sqrt(weights) * from_mean).reshape(-1)
    return found


# A norm's form; of all heads at once; whether positions turn; heads that share a head of keys.
FORMS = [
    *((norm, False, True, 1) for norm in NORMS),
    ("operators", True, True, 1),
    ("one node", True, True, 2),
    ("operators", False, True, 2),
    ("one node", False, False, 2),
    ("with a mean and a shift", True, False, 1),
]


@pytest.mark.parametrize(
    ("norm", "together", "turned", "shared"),
    [*FORMS, (BEHIND, False, True, 2)],
)
def test_the_fit_is_that_of_least_squares_over_all_logits(
    norm: str, together: bool, turned: bool, shared: int
) -> None:
    """Of the resized network's own logits, its norms over what stays."""
    found = case(norm, together, turned, shared)
    keep, feeds = found.keep(), [found.feeds]
    sliced = resize(found.graph, keep)
    outputs = found.run(found.graph.model)
    count = _array(sliced, "scale").size
    nothing = found.with_numbers(sliced, np.zeros(count))
    terms = [
        seen(found.with_numbers(sliced, unit) - nothing, outputs["p"]) for unit in np.eye(count)
    ]
    wanted = seen(outputs["l"] - nothing, outputs["p"])
    columns = np.stack(terms, axis=1)
    best, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    least = float(np.square(columns @ best - wanted).sum())
    saw = compared(found.graph, lambda: feeds)
    assert len(saw.products) == 1
    with patch.object(narrowed, "best_mixtures", lambda start, *_: start):
        fitted = refit(found.graph, keep, feeds, feeds, compared=saw).model
    errors = [
        float(np.square(seen(found.run(model)["l"] - outputs["l"], outputs["p"])).sum())
        for model in (fitted, sliced)
    ]
    assert errors[0] == pytest.approx(least, rel=5e-3)
    assert errors[1] > 1.05 * least
    np.testing.assert_array_equal(_array(fitted, "wq"), _array(sliced, "wq"))
    np.testing.assert_array_equal(_array(fitted, "kscale"), _array(sliced, "kscale"))
    made = mg.to_torch(fitted)(torch.from_numpy(found.feeds["x"]))
    for one, other in zip(made, run(fitted, found.feeds).values(), strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_removed_changes_nothing(norm: str) -> None:
    found = case(norm)
    feeds = [found.feeds]
    saw = compared(found.graph, lambda: feeds)
    assert saw.samples
    fitted = refit(found.graph, {}, feeds, feeds, compared=saw).model
    for one, other in zip(
        *(found.run(m).values() for m in (fitted, found.graph.model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(k2, kscale)", "(k2, scale)"),  # the keys would change, too
        ("RMSNormalization<axis=-1>(q1, scale)", "LpNormalization<axis=-1>(q1)"),  # no numbers
        ("q = Transpose<perm=[0,2,1,3]>(q2)", "qa = Tanh(q2)  q = Transpose<perm=[0,2,1,3]>(qa)"),
    ],
)
def test_what_is_no_sum_of_terms_is_left_alone(old: str, new: str) -> None:
    text = text_of("one node", together=False, turned=True, shared=1)
    assert old in text
    graph = mg.lift(model_from_text(text.replace(old, new)), attention="head-dim")
    x = np.random.default_rng(0).normal(size=(1, PLACES, IN)).astype(np.float32)
    assert not compared(graph, lambda: [{"x": x}]).products


def test_elements_go_by_the_logits_and_not_by_the_smallest_kernels() -> None:
    """Of two pairs that add nothing to any logit one has the largest kernels."""
    found = case("one node")
    model = found.graph.model.clone()
    scale = np.ones(SIZE)
    scale[[1, 5, 2, 6]] = 1e-3
    _write(model, "scale", scale)
    large = _array(model, "wq").reshape(IN, HEADS, SIZE).copy()
    large[:, :, [1, 5]] *= 3
    _write(model, "wq", large.reshape(IN, -1))
    graph = mg.lift(model, attention="head-dim")
    (index,) = found.keep()
    saw = compared(graph, lambda: [found.feeds])
    known = calibrate(graph, [found.feeds], stops=lambda group: [], compared=saw)
    assert {*known.removals[index].order[:2].tolist()} == {1, 2}
    assert 1 not in order_of(calibrate(graph, [found.feeds], stops=lambda group: []), index)[:2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(3, 40))
def test_factors_are_never_worse_on_inputs_kept_aside(seed: int, count: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(count + 1, count + 1))
    fitted, aside = (
        found.T @ found for found in (rng.normal(size=(rows, count + 1)) @ mixing for _ in "ab")
    )
    start = np.ones(count)
    found = best_scales(fitted, aside, start)
    assert scales_error(found, aside) <= scales_error(start, aside)
    own = best_scales(fitted, fitted, start)
    best = np.linalg.pinv(fitted[:-1, :-1], hermitian=True) @ fitted[:-1, -1]
    errors = [scales_error(each, fitted) for each in (own, best)]
    assert errors[0] <= errors[1] + 1e-3 * scales_error(start, fitted) + 1e-9


CACHED = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
net (float[B,T,12] x, int64[B,T] at, float[B,2,P,16] pk, float[B,2,P,16] pv, float[12,64] wq,
     float[12,32] wk, float[12,32] wv, float[99,8] cos, float[99,8] sin, float[16] scale,
     float[16] kscale, float[64,5] wo)
    => (float[B,T,5] y, float[B,2,L,16] k, float[B,2,L,16] v)
<int64[4] by_head = {0, 0, -1, 16}, int64[3] flat = {0, 0, -1}> {
  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
  q1 = Reshape(q0, by_head)  k1 = Reshape(k0, by_head)
  q2 = RMSNormalization<axis=-1>(q1, scale)  k2 = RMSNormalization<axis=-1>(k1, kscale)
  q3 = Reshape(q2, flat)  k3 = Reshape(k2, flat)
  qr = RotaryEmbedding<num_heads=4>(q3, cos, sin, at)
  kr = RotaryEmbedding<num_heads=2>(k3, cos, sin, at)
  a, k, v = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(qr, kr, v0, , pk, pv)
  y = MatMul(a, wo)
}"""


def test_what_is_fitted_decodes_through_a_cache() -> None:
    """Two steps give what one gives, and keys that the cache holds are slices of what they were."""
    model = model_from_text(CACHED, inputs=("x", "at", "pk", "pv"))
    rng = np.random.default_rng(0)
    for name in ("scale", "kscale"):
        _write(model, name, rng.uniform(0.5, 1.5, 16))
    large = _array(model, "wq").reshape(12, 4, 2, 8).copy()
    large[..., [0, 3, 5, 6]] *= 2
    _write(model, "wq", large.reshape(12, 64))
    graph = mg.lift(model, attention="head-dim")
    x = rng.normal(size=(40, 11, 12)).astype(np.float32)
    empty = np.zeros((40, 2, 0, 16), np.float32)
    feeds: Arrays = {"x": x, "at": np.tile(np.arange(11), (40, 1)), "pk": empty, "pv": empty}
    saw = compared(graph, lambda: [feeds])
    (product,) = saw.products
    (pairs,) = (k for k in graph.groups_on(product.summed) if graph.groups[k].can_change)
    keep = {pairs: np.array([1, 2, 4, 7])}
    without = refit(graph, keep, [feeds], [feeds], compared=Compared()).model
    small, sliced = refit(graph, keep, [feeds], [feeds], compared=saw).model, resize(graph, keep)
    less = np.zeros((40, 2, 0, 8), np.float32)
    given_ = {**feeds, "pk": less}
    expected = run(graph.model, feeds)["y"]
    found, plain = run(small, given_), run(sliced, given_)
    errors = [
        np.square(each["y"] - expected).sum() for each in (found, run(without, given_), plain)
    ]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]
    np.testing.assert_allclose(found["k"], plain["k"], atol=1e-5)
    first = run(small, {"x": x[:, :7], "at": feeds["at"][:, :7], "pk": less, "pv": empty})
    later = {"x": x[:, 7:], "at": feeds["at"][:, 7:], "pk": first["k"], "pv": first["v"]}
    second = run(small, later)
    steps = np.concatenate([first["y"], second["y"]], axis=1)
    np.testing.assert_allclose(steps, found["y"], atol=1e-5)


GROUPED = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
net (float[4,7,12] x, float[4,2,P,32] pk, float[4,2,P,32] pv, float[12,128] wq, float[12,64] wk,
     float[12,64] wv, float[99,16] cos, float[99,16] sin, float[32] scale, float[32] kscale,
     float[128,5] wo)
    => (float[4,7,5] y, float[4,2,L,32] k, float[4,2,L,32] v)
<int32[4] less = {6, 6, 6, 6}, int32 total = {7}, int64[1] first = {0},
 int64[4] by_head = {0, 0, -1, 32}, int64[3] flat = {0, 0, -1}> {
  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
  q1 = Reshape(q0, by_head)  k1 = Reshape(k0, by_head)
  q2 = SimplifiedLayerNormalization<axis=-1>(q1, scale)
  k2 = SimplifiedLayerNormalization<axis=-1>(k1, kscale)
  q3 = Reshape(q2, flat)  k3 = Reshape(k2, flat)
  TURNS
  a, k, v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, HOW>
      (FROM, v0, pk, pv, less, total TABLES)
  y = MatMul(a, wo)
}"""


def test_an_attention_that_turns_is_one_behind_nodes_that_turn() -> None:
    """The model builder writes the first; the second is another program's way to say the same."""
    turned = "com.microsoft.RotaryEmbedding<num_heads=N>"
    before = "  ".join(
        f"{letter}r = {turned.replace('N', count)}({letter}3, first, cos, sin)"
        for letter, count in (("q", "4"), ("k", "2"))
    )
    found = []
    for turns, given_, how, tables in (
        ("", "q3, k3", "do_rotary=1", ", cos, sin"),
        (before, "qr, kr", "softcap=0.0", ""),
    ):
        text = GROUPED.replace("TURNS", turns).replace("FROM", given_).replace("HOW", how)
        model = model_from_text(text.replace("TABLES", tables), inputs=("x", "pk", "pv"))
        angles = np.outer(np.arange(99), 0.8 ** np.arange(16))
        _write(model, "cos", np.cos(angles))
        _write(model, "sin", np.sin(angles))
        rng = np.random.default_rng(3)
        for name in ("scale", "kscale"):
            _write(model, name, rng.uniform(0.5, 1.5, 32))
        graph = mg.lift(model, attention="head-dim")
        x = rng.normal(size=(4, 7, 12)).astype(np.float32)
        empty = np.zeros((4, 2, 0, 32), np.float32)
        feeds: Arrays = {"x": x, "pk": empty, "pv": empty}
        saw = compared(graph, partial(list, [feeds]))
        (product,) = saw.products
        (pairs,) = (k for k in graph.groups_on(product.summed) if graph.groups[k].can_change)
        keep = {pairs: np.array([0, 1, 3, 5, 6, 9, 10, 15])}
        small = refit(graph, keep, [feeds], [feeds], compared=saw).model
        assert not np.allclose(_array(small, "scale"), _array(resize(graph, keep), "scale"))
        found.append((saw.moments[product.name][0], _array(small, "scale")))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=2e-3, atol=1e-3)
