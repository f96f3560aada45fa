"""Queries that positions turn: their factors, held against least squares over all logits.

Logits of a pair alone come from ONNX Runtime: the network runs with the other columns of the
queries' kernel at zero, or with those of a pair exchanged.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings, strategies as st

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.calibration.compared import compared
from morphgraph.passes.calibration.factors import (
    best_factors,
    factors_error,
    moments_of_terms,
    whole,
)
from morphgraph.passes.calibration.logits import products
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text

PLACES, IN, SIZE, HEADS = 9, 12, 8, 4

NETWORK = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
net (float[1,9,12] x, float[12,32] wq, float[32] bq, float[12,KW] wk, float[9,C] cos,
     float[9,C] sin, float[9,9] mask)
    => (float[1,4,9,9] l, float[1,4,9,9] p)
<int64[4] qs = {1, 9, 4, 8}, int64[4] ks = {1, 9, KH, 8}, int64[1] two = {2},
 int64[5] often = {1, 2, 2, 9, 8}, int64[4] all = {1, 4, 9, 8}, int64[5] apart = {1, 4, 9, 4, 2},
 int64[5] kapart = {1, KH, 9, 4, 2}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] much = {99},
 int64[1] last = {-1}, int64[2] half = {4, 4}, int64[4] kall = {1, KH, 9, 8},
 int64[1,9] at = {0, 1, 2, 3, 4, 5, 6, 7, 8}> {
  q0 = MatMul(x, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, qs)
  k0 = MatMul(x, wk)  k2 = Reshape(k0, ks)
  q = Transpose<perm=[0,2,1,3]>(q2)  k = Transpose<perm=[0,2,1,3]>(k2)
  TURNS
  kt = Transpose<perm=[0,1,3,2]>(KEYS)
  l = MatMul(qr, kt)  s = Add(l, mask)  p = Softmax<axis=-1>(s)
}"""

HALVES = """Z0, Z1 = Split<axis=-1, num_outputs=2>(FROM)  Zn = Neg(Z1)
  Zt = Concat<axis=-1>(Zn, Z0)  Zc = Mul(FROM, cos)  Zs = Mul(Zt, sin)  TO = Add(Zc, Zs)"""
NEIGHBOURS = """Z0 = Slice(FROM, zero, much, last, two)  Z1 = Slice(FROM, one, much, last, two)
  Zn = Neg(Z1)  Zu = Unsqueeze(Zn, last)  Zv = Unsqueeze(Z0, last)  Zw = Concat<axis=-1>(Zu, Zv)
  Zt = Reshape(Zw, SHAPE)  Zc = Mul(FROM, cos)  Zs = Mul(Zt, sin)  TO = Add(Zc, Zs)"""
COMPLEX = """Za = Reshape(FROM, APART)  Z0, Z1 = Split<axis=-1, num_outputs=2>(Za)
  cu = Unsqueeze(cos, last)  su = Unsqueeze(sin, last)
  Zp = Mul(Z0, cu)  Zq = Mul(Z1, su)  Zr = Sub(Zp, Zq)
  Zx = Mul(su, Z0)  Zy = Mul(Z1, cu)  Zz = Add(Zx, Zy)
  Zj = Concat<axis=-1>(Zr, Zz)  TO = Reshape(Zj, SHAPE)"""
PART = (
    f"Zf, Zg = Split<axis=-1>(FROM, half)  {HALVES.replace('FROM', 'Zf').replace('TO', 'Zh')}"
    + ("  TO = Concat<axis=-1>(Zh, Zg)")
)
OWN = "Zh = Identity(FROM)  TO = RotaryEmbedding<MORE>(Zh, cos, sin, at)"
CONTRIB = "TO = com.microsoft.RotaryEmbedding<MORE>(FROM, at, cos, sin)"
HALF_PAIRS = [(0, 4), (1, 5), (2, 6), (3, 7)]
NEXT_PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]
# By name how queries and keys turn, numbers in a row of the tables, how often each angle stands
# there, and which elements belong together.
FORMS: dict[str, tuple[str, int, str, list[tuple[int, ...]]]] = {
    "halves": (HALVES, 8, "tile", [*HALF_PAIRS]),
    "neighbours": (NEIGHBOURS, 8, "repeat", [*NEXT_PAIRS]),
    "neighbours as complex numbers": (COMPLEX, 4, "", [*NEXT_PAIRS]),
    "a part": (PART, 4, "tile", [(0, 2), (1, 3), (4,), (5,), (6,), (7,)]),
    "one node": (OWN, 4, "", [*HALF_PAIRS]),
    "one node, neighbours": (OWN.replace("MORE", "interleaved=1"), 4, "", [*NEXT_PAIRS]),
    "one node, a part": (
        OWN.replace("MORE", "rotary_embedding_dim=4"),
        2,
        "",
        [(0, 2), (1, 3), (4,), (5,), (6,), (7,)],
    ),
    "one node of ONNX Runtime": (CONTRIB, 4, "", [*HALF_PAIRS]),
}


@dataclass
class Case:
    """A network, how its elements turn, and what it sees."""

    graph: ChannelGraph
    pairs: Sequence[tuple[int, ...]]
    feeds: Arrays

    def run(self, model: ir.Model) -> Arrays:
        return {name: array[0].astype(np.float64) for name, array in run(model, self.feeds).items()}

    def term(self, pair: tuple[int, ...], turned: bool) -> FloatArray:
        """Logits of one pair alone, as it is or turned by a right angle, ``[heads, T, T]``."""
        model = self.graph.model.clone()
        for name in ("wq", "bq"):
            old = _array(model, name)
            new = np.zeros_like(old)
            for head in range(HEADS):
                at = [head * SIZE + e for e in pair]
                if turned:
                    new[..., at[0]], new[..., at[1]] = -old[..., at[1]], old[..., at[0]]
                else:
                    new[..., at] = old[..., at]
            _write(model, name, new)
        return self.run(model)["l"]


def _array(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def _write(model: ir.Model, name: str, array: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


def case(form: str, shared: int = 1, seed: int = 0) -> Case:
    turns, columns, often, pairs = FORMS[form]
    text = NETWORK
    keys = HEADS // shared
    both = [
        re.sub(r"\bZ", letter + "z", turns)
        .replace("FROM", letter)
        .replace("TO", f"{letter}r")
        .replace("SHAPE", shape)
        .replace("APART", apart)
        for letter, shape, apart in (("q", "all", "apart"), ("k", "kall", "kapart"))
    ]
    both[1] = re.sub(r"[cs]u = Unsqueeze\(\w+, last\)", "", both[1])
    if shared > 1:
        both.append("ku = Unsqueeze(kr, two)  ke = Expand(ku, often)  kx = Reshape(ke, all)")
    text = text.replace("TURNS", "  ".join(both)).replace("KEYS", "kx" if shared > 1 else "kr")
    text = text.replace("<MORE>", "")
    for name, number in (("KW", keys * SIZE), ("KH", keys), ("C", columns)):
        text = re.sub(rf"\b{name}\b", str(number), text)
    model = model_from_text(text, seed=seed)
    angles = np.outer(np.arange(PLACES), 0.9 ** np.arange(sum(len(p) > 1 for p in pairs)))
    spread = {"tile": lambda a: np.tile(a, 2), "repeat": lambda a: np.repeat(a, 2, 1)}
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        _write(model, name, spread.get(often, lambda a: a)(table))
    _write(model, "mask", np.where(np.tri(PLACES) > 0, 0.0, -np.inf))
    x = np.random.default_rng(seed).normal(size=(1, PLACES, IN)).astype(np.float32)
    return Case(mg.lift(model, attention="head-dim"), pairs, {"x": x})


def seen(logits: FloatArray, weights: FloatArray) -> FloatArray:
    """What a softmax sees of logits, so that squares add up to the error."""
    from_mean = logits - (weights * logits).sum(-1, keepdims=True)
    found: FloatArray = (np.sqrt(weights) * from_mean).reshape(HEADS, -1)
    return found


def weights_of(taken: FloatArray) -> FloatArray:
    allowed = np.tri(PLACES)
    found: FloatArray = (taken + allowed / allowed.sum(1, keepdims=True)) / 2
    return found


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_fit_is_that_of_least_squares_over_all_logits(form: str, shared: int) -> None:
    found = case(form, shared)
    (product,) = compared(found.graph, lambda: [found.feeds]).products
    stays = [pair for number, pair in enumerate(found.pairs) if number % 2]
    kept = sorted(element for pair in stays for element in pair)
    standing = found.graph.channels_of(product.summed)
    by_group = {k: found.graph.groups[k].channels for k in found.graph.groups_on(product.summed)}
    keep = {
        k: np.flatnonzero(np.isin(channels, standing[kept])) for k, channels in by_group.items()
    }
    outputs = found.run(found.graph.model)
    weights = weights_of(outputs["p"])
    terms = [found.term(pair, turned=False) for pair in stays]
    terms += [found.term(pair, turned=True) for pair in stays if len(pair) == 2]
    wanted, given = seen(outputs["l"], weights), [seen(term, weights) for term in terms]
    least = 0.0
    for head in range(HEADS):
        columns = np.stack([each[head] for each in given], axis=1)
        best, *_ = np.linalg.lstsq(columns, wanted[head], rcond=None)
        least += float(np.square(columns @ best - wanted[head]).sum())
    saw = compared(found.graph, lambda: [found.feeds])
    fitted = refit(found.graph, keep, [found.feeds], [found.feeds], compared=saw).model
    errors = [
        float(np.square(seen(found.run(model)["l"], weights) - wanted).sum())
        for model in (fitted, resize(found.graph, keep))
    ]
    assert errors[0] == pytest.approx(least, rel=2e-3)
    assert errors[1] > 1.1 * least
    made = mg.to_torch(fitted)(torch.from_numpy(found.feeds["x"]))
    for one, other in zip(made, run(fitted, found.feeds).values(), strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_removed_changes_nothing(form: str) -> None:
    found = case(form)
    saw = compared(found.graph, lambda: [found.feeds])
    (product,) = saw.products
    assert product.partner is not None
    for moments in saw.moments[product.name][0]:
        every = best_factors(moments, moments, product.partner, np.arange(SIZE))
        np.testing.assert_array_equal(every, whole(product.partner))
    fitted = refit(found.graph, {}, [found.feeds], [found.feeds], compared=saw).model
    for one, other in zip(
        *(found.run(m).values() for m in (fitted, found.graph.model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_turn_is_left_alone() -> None:
    """The two of a pair are scaled by other numbers: no factor passes that."""
    found = case("halves")
    model = found.graph.model
    assert len(compared(found.graph, lambda: [found.feeds]).products) == 1
    _write(model, "cos", np.random.default_rng(0).normal(size=(PLACES, SIZE)))
    graph = mg.lift(model, attention="head-dim")
    assert len(products(graph)) == 1
    assert not compared(graph, lambda: [found.feeds]).products


FUSED = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
net (float[2,5,8] x, float[8,16] wq, float[8,8] wk, float[8,6] wv, float[9,2] cos, float[9,2] sin,
     float[5,5] mask, float[12,3] wo)
    => (float[2,5,3] y) <int64[2,5] at = {0, 1, 2, 3, 4, 2, 3, 4, 5, 6}> {
  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  qr = RotaryEmbedding<num_heads=4>(q, cos, sin, at)
  kr = RotaryEmbedding<num_heads=2>(k, cos, sin, at)
  a = Attention<q_num_heads=4, kv_num_heads=2, FORM>(qr, kr, v, MASK)
  y = MatMul(a, wo)
}"""


@pytest.mark.parametrize(
    ("form", "mask"), [("is_causal=1", ""), ("softcap=1.5", "mask"), ("scale=0.9", "")]
)
def test_attentions_in_one_node_say_what_they_take(form: str, mask: str) -> None:
    """Masks and all else are the operator's own: it mixes rows of which each is a key."""
    text = FUSED.replace("FORM", form).replace("MASK", mask)
    graph = mg.lift(model_from_text(text), attention="head-dim")
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    saw = compared(graph, lambda: [{"x": x}])
    (product,) = saw.products
    assert product.partner is not None
    np.testing.assert_array_equal(product.partner, [2, 3, 0, 1])
    rows = evaluate(["qr", "kr"], {"x": x}, graph.model)
    q = rows["qr"].reshape(2, 5, 4, 4).astype(np.float64)
    k = rows["kr"].reshape(2, 5, 2, 4).repeat(2, axis=2).astype(np.float64)
    logits = np.einsum("nthd,nshd->nhts", q, k) * (0.9 if "scale" in form else 0.5)
    if "softcap" in form:
        logits = 1.5 * np.tanh(logits / 1.5) + _array(graph.model, "mask")
    allowed = np.tri(5) if "causal" in form else np.ones((5, 5))
    taken = np.exp(logits) * allowed
    weights = taken / taken.sum(-1, keepdims=True) / 2
    weights += allowed / allowed.sum(-1, keepdims=True) / 2
    expected = np.zeros((4, 4, 4))
    for n, h, t in np.ndindex(2, 4, 5):
        a, b = q[n, t, h], k[n, :, h]
        terms = [
            a[0] * b[:, 0] + a[2] * b[:, 2],
            a[1] * b[:, 1] + a[3] * b[:, 3],
            a[0] * b[:, 2] - a[2] * b[:, 0],
            a[1] * b[:, 3] - a[3] * b[:, 1],
        ]
        expected[h] += np.cov(terms, ddof=0, aweights=weights[n, h, t])
    np.testing.assert_allclose(saw.moments[product.name][0], expected / 10, rtol=1e-3, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 3), st.integers(2, 12))
def test_factors_are_never_worse_on_inputs_kept_aside(
    seed: int, pairs: int, single: int, keys: int
) -> None:
    rng = np.random.default_rng(seed)
    size = 2 * pairs + single
    partner = np.arange(size)
    order = rng.permutation(size)[: 2 * pairs].reshape(pairs, 2)
    partner[order[:, 0]], partner[order[:, 1]] = order[:, 1], order[:, 0]
    fitted, aside = (
        moments_of_terms(
            rng.normal(size=(1, 1, 6, size)),
            rng.normal(size=(1, 1, keys, size)),
            rng.uniform(size=(1, 1, 6, keys)),
            np.array([0]),
            partner,
        )[0]
        for _ in "ab"
    )
    kept = np.flatnonzero((rng.uniform(size=size) < 0.5) | (partner < 0))
    kept = np.union1d(kept, partner[kept])
    start = np.zeros(size)
    start[kept] = whole(partner)[kept]
    found = best_factors(fitted, aside, partner, kept)
    assert factors_error(found, aside, partner) <= factors_error(start, aside, partner)
    assert not np.delete(found, kept).any()
    own = best_factors(fitted, fitted, partner, kept)
    best, *_ = np.linalg.lstsq(
        fitted[np.ix_(kept, kept)], fitted[kept] @ whole(partner), rcond=None
    )
    ideal = np.zeros(size)
    ideal[kept] = best
    least, error = (factors_error(each, fitted, partner) for each in (ideal, own))
    assert error <= least + 1e-3 * max(factors_error(0 * own, fitted, partner), 1e-9)


CACHED = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
net (float[B,T,12] x, int64[B,T] at, float[B,2,P,16] pk, float[B,2,P,16] pv, float[12,64] wq,
     float[12,32] wk, float[12,32] wv, float[99,8] cos, float[99,8] sin, float[64,5] wo)
    => (float[B,T,5] y, float[B,2,L,16] k, float[B,2,L,16] v) {
  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
  qr = RotaryEmbedding<num_heads=4>(q0, cos, sin, at)
  kr = RotaryEmbedding<num_heads=2>(k0, cos, sin, at)
  a, k, v = ATTENTION
  y = MatMul(a, wo)
}"""
ONE_NODE = "Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(qr, kr, v0, , pk, pv)"


def test_what_is_fitted_decodes_through_a_cache() -> None:
    """Two steps give what one gives, and keys that the cache holds are slices of what they were."""
    text = CACHED.replace("ATTENTION", ONE_NODE)
    model = model_from_text(text, inputs=("x", "at", "pk", "pv"))
    graph = mg.lift(model, attention="head-dim")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 11, 12)).astype(np.float32)
    empty = np.zeros((3, 2, 0, 16), np.float32)
    feeds: Arrays = {"x": x, "at": np.tile(np.arange(11), (3, 1)), "pk": empty, "pv": empty}
    saw = compared(graph, lambda: [feeds])
    (product,) = saw.products
    assert product.partner is not None
    (pairs,) = (k for k in graph.groups_on(product.summed) if graph.groups[k].can_change)
    keep = {pairs: np.array([1, 2, 4, 7])}
    small = refit(graph, keep, [feeds], [feeds], compared=saw).model
    sliced = resize(graph, keep)
    whole_run = run(graph.model, feeds)
    less = np.zeros((3, 2, 0, 8), np.float32)
    given = {**feeds, "pk": less}
    found, plain = run(small, given), run(sliced, given)
    errors = [np.square(each["y"] - whole_run["y"]).sum() for each in (found, plain)]
    assert errors[0] < errors[1]
    np.testing.assert_allclose(found["k"], plain["k"], atol=1e-5)
    first = run(small, {"x": x[:, :7], "at": feeds["at"][:, :7], "pk": less, "pv": empty})
    later = {"x": x[:, 7:], "at": feeds["at"][:, 7:], "pk": first["k"], "pv": first["v"]}
    second = run(small, later)
    steps = np.concatenate([first["y"], second["y"]], axis=1)
    np.testing.assert_allclose(steps, found["y"], atol=1e-5)


GROUPED = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
net (float[2,7,12] x, float[2,2,P,32] pk, float[2,2,P,32] pv, float[12,128] wq, float[12,64] wk,
     float[12,64] wv, float[99,16] cos, float[99,16] sin, float[128,5] wo)
    => (float[2,7,5] y, float[2,2,L,32] k, float[2,2,L,32] v)
<int32[2] less = {6, 6}, int32 total = {7}, int64[1] first = {0}> {
  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
  TURNS
  a, k, v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, HOW>
      (FROM, v0, pk, pv, less, total, TABLES)
  y = MatMul(a, wo)
}"""


@pytest.mark.parametrize("kind", ["", "interleaved=1"])
def test_an_attention_that_turns_is_one_behind_nodes_that_turn(kind: str) -> None:
    """The model builder writes the first; the second is another program's way to say the same."""
    inside = "do_rotary=1" + (", rotary_interleaved=1" if kind else "")
    turned = f"com.microsoft.RotaryEmbedding<{', '.join(filter(None, ['num_heads=N', kind]))}>"
    before = "  ".join(
        f"{letter}r = {turned.replace('N', count)}({letter}0, first, cos, sin)"
        for letter, count in (("q", "4"), ("k", "2"))
    )
    found = []
    for turns, given_, how, tables in (
        ("", "q0, k0", inside, "cos, sin"),
        (before, "qr, kr", "softcap=0.0", ""),
    ):
        text = GROUPED.replace("TURNS", turns).replace("FROM", given_).replace("HOW", how)
        text = text.replace(", TABLES", f", {tables}" if tables else "")
        model = model_from_text(text, inputs=("x", "pk", "pv"))
        angles = np.outer(np.arange(99), 0.8 ** np.arange(16))
        _write(model, "cos", np.cos(angles))
        _write(model, "sin", np.sin(angles))
        graph = mg.lift(model, attention="head-dim")
        x = np.random.default_rng(3).normal(size=(2, 7, 12)).astype(np.float32)
        empty = np.zeros((2, 2, 0, 32), np.float32)
        feeds: Arrays = {"x": x, "pk": empty, "pv": empty}
        saw = compared(graph, lambda f=feeds: [f])  # type: ignore[misc]
        (product,) = saw.products
        (pairs,) = (k for k in graph.groups_on(product.summed) if graph.groups[k].can_change)
        keep = {pairs: np.array([0, 1, 3, 5, 6, 9, 10, 15])}
        small = refit(graph, keep, [feeds], [feeds], compared=saw).model
        less = np.zeros((2, 2, 0, 16), np.float32)
        kept = {"x": x, "pk": less, "pv": less}
        errors = [
            float(np.square(run(m, kept)["y"] - run(model, feeds)["y"]).sum())
            for m in (small, resize(graph, keep))
        ]
        assert errors[0] < errors[1]
        found.append((saw.moments[product.name][0], _array(small, "wq")))
    order = np.arange(32).reshape(16, 2).T.ravel() if kind else np.arange(32)
    np.testing.assert_allclose(
        found[0][0], found[1][0][:, order][:, :, order], rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)
