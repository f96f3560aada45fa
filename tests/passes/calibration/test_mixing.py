"""Mixtures ahead of norms, held against PyTorch's derivatives and ONNX Runtime's logits."""

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings, strategies as st

import morphgraph as mg
from morphgraph.arrays import Array, FloatArray
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration import narrowed
from morphgraph.passes.calibration.compared import compared
from morphgraph.passes.calibration.logits import products
from morphgraph.passes.calibration.mixing import (
    Mixtures,
    Norm,
    Operand,
    Sample,
    best_mixtures,
    mixing_error,
    mixing_gradient,
)
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text
from tests.passes.calibration.test_normed import BEHIND, FORMS, Case, case, seen, text_of

HEADS, KEYS, SIZE, KEPT, SEEN = 4, 2, 6, 4, 5


def operand(rng: np.random.Generator, heads: int, places: int, norm: Norm) -> Operand:
    own, beside, nothing = rng.normal(size=(3, heads, places, KEPT))
    beside[..., 3] = 0  # the last is by itself
    elements = rng.normal(size=(heads, places, SIZE)) + 0.5
    return Operand(elements, own, beside, nothing, norm, np.array([1, 0, 2, 3]))


def sample(rng: np.random.Generator, norms: tuple[Norm, Norm]) -> Sample:
    taken = rng.uniform(0, 1, (HEADS, SEEN, 7)) * (rng.uniform(size=(HEADS, SEEN, 7)) > 0.3)
    taken[..., 0] += 0.1
    return Sample(
        operand(rng, HEADS, SEEN, norms[0]),
        operand(rng, KEYS, 7, norms[1]),
        np.array([0, 0, 1, 1]),
        (taken / taken.sum(axis=2, keepdims=True)).astype(np.float32),
        rng.normal(size=(HEADS, SEEN, 7)).astype(np.float32) * 3,
    )


def mixtures(rng: np.random.Generator, free: bool) -> Mixtures:
    return Mixtures(
        rng.normal(size=(HEADS, SIZE, KEPT)),
        rng.normal(size=(KEYS, SIZE, KEPT)) if free else None,
        rng.uniform(0.5, 1.5, (2, KEPT)),
        np.array([0, 1, 1, 0]),
    )


def by_torch(made: Mixtures, samples: Sequence[Sample]) -> tuple[float, FloatArray]:
    """The error, written out place by place, and its derivative by autograd."""
    vector = torch.tensor(made.vector(), requires_grad=True)
    parts = torch.tensor_split(vector, [made.queries.size, made.queries.size + made.factors.size])
    queries, factors = parts[0].view(HEADS, SIZE, KEPT), parts[1].view(2, KEPT)
    total = torch.zeros((), dtype=torch.float64)

    def met(given: Operand, mixed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows = torch.einsum("hps,hsk->hpk", torch.tensor(given.elements), mixed)
        axes = (0, 2) if given.norm.together else (2,)
        if given.norm.centered:
            rows = rows - rows.mean(axes, keepdim=True)
        unit = rows / (rows.square().mean(axes, keepdim=True) + given.norm.epsilon).sqrt()
        found = []
        for e, other in enumerate(given.partner):
            own = torch.tensor(given.own[..., e]) * unit[..., e] * scale[:, None, e]
            share = torch.tensor(given.beside[..., other])
            added = share * unit[..., other] * scale[:, None, other]
            found.append(torch.tensor(given.nothing[..., e]) + own + added)
        return torch.stack(found, -1)

    for each in samples:
        q = met(each.queries, queries, factors[made.set_of])
        k = torch.tensor(each.keys.nothing)
        if made.keys is not None:
            ones = torch.ones(KEYS, KEPT, dtype=torch.float64)
            k = met(each.keys, parts[2].view(KEYS, SIZE, KEPT), ones)
        for head, key in enumerate(each.key_of):
            wrong = q[head] @ k[key].T - torch.tensor(each.logits[head]).double()
            shares = torch.tensor(each.shares[head]).double()
            mean = (shares * wrong).sum(1, keepdim=True)
            total = total + (shares * (wrong - mean) ** 2).sum()
    total.backward()
    assert vector.grad is not None
    return float(total.detach()), vector.grad.numpy()


@pytest.mark.parametrize("free", [False, True], ids=["keys as they are", "both"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_error_and_gradient_are_those_of_autograd(
    free: bool, centered: bool, together: bool
) -> None:
    rng = np.random.default_rng(0)
    norms = Norm(0.1, centered, together), Norm(0.01, not centered, together)
    samples, made = [sample(rng, norms) for _ in range(3)], mixtures(rng, free)
    error, gradient = mixing_gradient(made, samples)
    wanted, derivative = by_torch(made, samples)
    assert error == pytest.approx(wanted, rel=1e-5)
    assert mixing_error(made, samples) == error
    np.testing.assert_allclose(
        gradient.vector(), derivative, rtol=1e-4, atol=1e-5 * np.abs(derivative).max()
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_mixtures_are_never_worse_on_inputs_kept_aside(seed: int, free: bool) -> None:
    rng = np.random.default_rng(seed)
    norms = Norm(1e-3), Norm(1e-3)
    start = mixtures(rng, free)
    fitted, aside = ([sample(rng, norms) for _ in range(2)] for _ in "ab")
    found = best_mixtures(start, fitted, aside)
    assert mixing_error(found, aside) <= mixing_error(start, aside)
    own = best_mixtures(start, fitted, fitted)
    assert mixing_error(own, fitted) < mixing_error(start, fitted)


def test_a_head_that_loses_nothing_is_found_again() -> None:
    """A head of six elements of which four say all: mixtures of the others are to be undone."""
    rng = np.random.default_rng(0)
    hidden = mixtures(rng, free=True)
    samples = []
    for _ in range(20):
        one = sample(rng, (Norm(1e-6), Norm(1e-6)))
        q, _, _ = one.queries(hidden.queries, hidden.factors[hidden.set_of])
        assert hidden.keys is not None
        k, _, _ = one.keys(hidden.keys, np.ones((KEYS, KEPT)))
        logits = (q @ k[one.key_of].swapaxes(1, 2)).astype(np.float32)
        samples.append(Sample(one.queries, one.keys, one.key_of, one.shares, logits))
    near = hidden.like(hidden.vector() + 0.1 * rng.normal(size=hidden.vector().size))
    found = best_mixtures(near, samples, samples)
    assert mixing_error(found, samples) < 1e-3 * mixing_error(near, samples)


def wrong(found: Case, model: ir.Model) -> float:
    """Squared change of what a softmax sees of the logits, in ONNX Runtime."""
    outputs = found.run(found.graph.model)
    return float(np.square(seen(found.run(model)["l"] - outputs["l"], outputs["p"])).sum())


@pytest.mark.parametrize(("norm", "together", "turned", "shared"), FORMS)
def test_the_resized_network_has_the_error_that_was_fitted(
    norm: str, together: bool, turned: bool, shared: int
) -> None:
    """And a third of that with numbers behind the norm alone."""
    found = case(norm, together, turned, shared)
    keep, feeds = found.keep(), [found.feeds]
    saw = compared(found.graph, lambda: feeds)
    errors: list[float] = []

    def spied(start: Mixtures, some: Sequence[Sample], aside: Sequence[Sample]) -> Mixtures:
        best = best_mixtures(start, some, aside)
        errors.extend((mixing_error(start, some), mixing_error(best, some)))
        return best

    with patch.object(narrowed, "best_mixtures", spied):
        small = refit(found.graph, keep, feeds, feeds, compared=saw).model
    with patch.object(narrowed, "best_mixtures", lambda start, *_: start):
        scaled = refit(found.graph, keep, feeds, feeds, compared=saw).model
    assert [wrong(found, scaled), wrong(found, small)] == pytest.approx(errors, rel=5e-3)
    assert errors[1] < errors[0] / 3
    made = mg.to_torch(small)(torch.from_numpy(found.feeds["x"]))
    for one, other in zip(made, run(small, found.feeds).values(), strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, atol=1e-3)


@pytest.mark.parametrize(
    ("seen_by_others", "changed"),
    [
        ("z = MatMul(k0, wz)", {"wq"}),
        ("kf = Reshape(kn, flat)  z = MatMul(kf, wz)", {"wq"}),
        ("z = MatMul(q0, wz)", set[str]()),
    ],
)
def test_layers_that_others_see_stay_slices(seen_by_others: str, changed: set[str]) -> None:
    text = text_of("one node", together=False, turned=True, shared=1)
    text = text.replace("float[1,4,9,9] p)", "float[1,4,9,9] p, float[1,9,3] z)")
    text = text.replace("float[9,8] cos", "float[32,3] wz, float[9,8] cos")
    text = text.replace("int64[1] two", "int64[3] flat = {1, 9, 32}, int64[1] two")
    found = case("one node")
    model = model_from_text(text.replace("l = MatMul", f"{seen_by_others}  l = MatMul"), seed=0)
    for name, value in found.graph.model.graph.initializers.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = value.const_value
    graph, feeds = mg.lift(model, attention="head-dim"), [found.feeds]
    (product,) = products(graph)
    keep = {k: np.arange(1, graph.groups[k].width, 2) for k in graph.groups_on(product.summed)}
    saw = compared(graph, lambda: feeds)
    small, sliced = refit(graph, keep, feeds, feeds, compared=saw).model, resize(graph, keep)
    far = {n: np.abs(_array(small, n) - _array(sliced, n)).max() for n in ("wq", "wk")}
    assert {name for name, distance in far.items() if distance > 1e-4} == changed


def test_queries_keys_and_values_of_one_layer() -> None:
    """The outputs of a joint layer are told apart: values stay as they are."""
    text = text_of("one node", together=False, turned=True, shared=1)
    text = text.replace("float[12,32] wq, float[12,32] wk", "float[12,96] wa")
    text = text.replace(
        "q0 = MatMul(x, wq)  k0 = MatMul(x, wk)",
        "a = MatMul(x, wa)  q0, k0, v0 = Split<axis=-1, num_outputs=3>(a)",
    ).replace("float[1,4,9,9] p)", "float[1,4,9,9] p, float[1,9,32] v0)")
    found = case("one node")
    graph = mg.lift(model_from_text(text, seed=0), attention="head-dim")
    (product,) = products(graph)
    assert product.scale is not None
    assert product.keys_scale is not None
    assert product.scale.rows is not None
    assert product.keys_scale.rows is not None
    np.testing.assert_array_equal(product.scale.rows.ravel(), np.arange(32))
    np.testing.assert_array_equal(product.keys_scale.rows.ravel(), 32 + np.arange(32))
    weights = [_array(found.graph.model, name) for name in ("wq", "wk")]
    whole = np.concatenate([*weights, np.ones((12, 32), np.float32)], axis=1)
    graph.model.graph.initializers["wa"].const_value = ir.tensor(whole, name="wa")
    feeds = [found.feeds]
    keep = {k: np.arange(1, graph.groups[k].width, 2) for k in graph.groups_on(product.summed)}
    saw = compared(graph, lambda: feeds)
    small, sliced = refit(graph, keep, feeds, feeds, compared=saw).model, resize(graph, keep)
    kernels = [_array(model, "wa") for model in (small, sliced)]
    assert not np.allclose(kernels[0][:, :32], kernels[1][:, :32], atol=1e-3)
    np.testing.assert_allclose(kernels[0][:, 32:], kernels[1][:, 32:], atol=1e-4)


def test_a_layer_of_queries_that_are_keys_too_stays_slices() -> None:
    text = text_of("one node", together=False, turned=True, shared=1)
    text = text.replace("k2 = Reshape(k0, ks)", "k2 = Reshape(q0, ks)")
    (product,) = products(mg.lift(model_from_text(text, seed=0), attention="head-dim"))
    assert product.scale is not None
    assert not product.scale.layer
    assert product.keys_scale is None


def test_a_norm_behind_the_turn_has_no_layer_ahead() -> None:
    (product,) = products(case(BEHIND, shared=2).graph)
    assert product.scale is not None
    assert not product.scale.layer


def _array(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()
