"""Kernels of experts, chosen from a stack, are fitted to what the whole ones give.

Oracles: a resized network that is right exists where units repeat others; NumPy's least squares of
each expert by itself; the original in ONNX Runtime on inputs that nobody has seen.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.graph import ChannelGraph
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from tests.passes.experts import (
    EXPERTS,
    FORMS,
    HIDDEN,
    INNER,
    SIDE_BY_SIDE,
    TAKEN,
    TOKENS,
    arrays_of,
    changed,
    group_on,
    outputs,
)

LARGEST = "largest, then largest of the others"
CHOSEN = ["softmax first", "softmax of those taken", "tuples", "biases", LARGEST]
FUSED = "relu"
DENSE = ["one-hot", *SIDE_BY_SIDE]  # all experts compute every token
LAYER = {FUSED: "moe"}
HALF = INNER // 2


def feeds(count: int, seed: int) -> list[Arrays]:
    generator = np.random.default_rng(seed)
    shape = (count, TOKENS, 3)
    return [{"x": x} for x in generator.normal(size=shape).astype(np.float32)]


def fitted(graph: ChannelGraph, keep: dict[int, Array], count: int = 60) -> Any:
    return refit(graph, keep, feeds(count, 1), feeds(20, 2))


def error(small: ir.Model, proto: Any) -> float:
    x = feeds(1, 3)[0]["x"]
    expected = outputs(proto, x)
    found = outputs(ir.to_proto(small).SerializeToString(), x)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def repeated(form: str) -> Any:
    """Half of the units of each expert are the other half, times numbers of its own."""
    proto = FORMS[form]()
    arrays = arrays_of(proto)
    scale = np.random.default_rng(0).uniform(0.5, 2, (EXPERTS, HALF)).astype(np.float32)
    first = {name: arrays[name].copy() for name in ("w1", "b1") if name in arrays}
    for array in first.values():
        array[:, HALF:] = array[:, :HALF] * scale.reshape(scale.shape + (1,) * (array.ndim - 2))
    return changed(proto, **first)


@pytest.mark.parametrize("form", [*CHOSEN, FUSED, *DENSE])
def test_units_that_repeat_others_of_their_expert_go_without_loss(form: str) -> None:
    proto = repeated(form)
    graph = mg.lift(proto)
    keep = {group_on(graph, "w2", 2).index: np.arange(HALF)}
    made = fitted(graph, keep)
    assert error(resize(graph, keep), proto) > 0.1
    assert error(made.model, proto) < 1e-3
    (layer,) = (each for each in made.layers if each.name == LAYER.get(form, "down"))
    assert layer.after < 1e-5 < 0.01 < layer.before
    assert layer.places == 60 * TOKENS * TAKEN
    assert layer.inputs == HALF


def left(units: Array, kernel: Array, proto: Any, expert: int) -> float:
    """The squared error of a kernel of the first half of the units, for an expert's tokens."""
    wanted = units @ arrays_of(proto)["w2"][expert].T
    return float(np.square(units[:, :HALF] @ kernel.T - wanted).sum())


def units_of(form: str, proto: Any, experts: list[int]) -> dict[int, Array]:
    """What the units of some experts give for the tokens that take them, if there are no others.

    A mixture in one node shows them times their shares, and is fitted to that; so are those that
    compute all experts.
    """
    arrays = {name: array.astype(np.float64) for name, array in arrays_of(proto).items()}
    h = np.concatenate([feed["x"] for feed in feeds(60, 1)]) @ arrays["inw"]
    logits = (h @ arrays["gate"])[:, experts]
    best = np.argsort(-logits, axis=1)[:, :TAKEN]
    taken = np.exp(np.take_along_axis(logits, best, axis=1))
    whole = np.exp(logits) if form in DENSE else taken
    shares = taken / whole.sum(axis=1, keepdims=True)
    found = {}
    for place, expert in enumerate(experts):
        there, at = np.nonzero(best == place)
        bias = arrays["b1"][expert] if "b1" in arrays else 0
        found[expert] = np.maximum(h[there] @ arrays["w1"][expert].T + bias, 0)
        if form in (FUSED, *DENSE):
            found[expert] *= shares[there, at][:, None]
    return found


@pytest.mark.parametrize("form", ["softmax first", FUSED, *DENSE])
def test_experts_that_stay_are_fitted_where_others_go(form: str) -> None:
    """Each to what its own kernel gave, whatever number it has now."""
    proto, stay = repeated(form), [0, 2, 4]
    graph = mg.lift(proto)
    keep = {
        group_on(graph, "w2", 2).index: np.arange(HALF),
        group_on(graph, "w1", 0).index: np.array(stay),
    }
    found = fitted(graph, keep).model.graph.initializers["w2"].const_value.numpy()
    for place, (expert, units) in enumerate(units_of(form, proto, stay).items()):
        sliced = arrays_of(proto)["w2"][expert][:, :HALF]
        assert left(units, found[place], proto, expert) < 1e-3 * left(units, sliced, proto, expert)


@pytest.mark.parametrize("form", ["softmax first", FUSED, *DENSE])
def test_each_expert_gets_its_own_least_squares(form: str) -> None:
    proto = FORMS[form]()
    if form in (FUSED, *DENSE):  # units that are near others, so that there is something to win
        both = arrays_of(proto)["w1"], arrays_of(repeated(form))["w1"]
        proto = changed(proto, w1=np.float32(0.3) * both[0] + np.float32(0.7) * both[1])
    graph = mg.lift(proto)
    made = fitted(graph, {group_on(graph, "w2", 2).index: np.arange(HALF)})
    found = made.model.graph.initializers["w2"].const_value.numpy()
    for expert, units in units_of(form, proto, list(range(EXPERTS))).items():
        whole = arrays_of(proto)["w2"][expert]
        best = np.linalg.lstsq(units[:, :HALF], units @ whole.T, rcond=None)[0].T
        least, most = (left(units, each, proto, expert) for each in (best, whole[:, :HALF]))
        gained = most - left(units, found[expert], proto, expert)
        assert 0.8 * (most - least) < gained < most - least
        assert least < 0.8 * most


@pytest.mark.parametrize("form", ["softmax first", FUSED, *DENSE])
def test_experts_are_fitted_where_hidden_width_goes_too(form: str) -> None:
    """A feature that nobody makes and nobody reads goes without loss, and so do the units."""
    proto = repeated(form)
    arrays = {name: array.copy() for name, array in arrays_of(proto).items()}
    gone = 2
    arrays["inw"][:, gone] = arrays["w2"][:, gone] = arrays["head"][gone] = 0
    if "b2" in arrays:
        arrays["b2"][:, gone] = 0
    names = [name for name in ("inw", "w2", "b2", "head") if name in arrays]
    proto = changed(proto, **{name: arrays[name] for name in names})
    graph = mg.lift(proto)
    keep = {
        group_on(graph, "w2", 2).index: np.arange(HALF),
        group_on(graph, "inw", 1).index: np.delete(np.arange(HIDDEN), gone),
    }
    assert error(resize(graph, keep), proto) > 0.1
    assert error(fitted(graph, keep).model, proto) < 1e-3


@pytest.mark.parametrize(("seen", "is_fitted"), [(-1e4, False), (-4.5, False), (0, True)])
def test_an_expert_that_too_few_places_choose_keeps_its_slice(seen: float, is_fitted: bool) -> None:
    proto = repeated("softmax first")
    mask = np.zeros(EXPERTS, np.float32)
    mask[2] = seen
    proto = changed(proto, mask=mask)
    graph = mg.lift(proto)
    made = fitted(graph, {group_on(graph, "w2", 2).index: np.arange(HALF)})
    found = made.model.graph.initializers["w2"].const_value.numpy()
    sliced = arrays_of(proto)["w2"][:, :, :HALF]
    is_kept = [bool(np.array_equal(a, b)) for a, b in zip(found, sliced, strict=True)]
    assert is_kept == [False, False, not is_fitted, False, False]


@pytest.mark.parametrize("form", ["softmax first", FUSED, "swiglu", *DENSE])
def test_kernels_inside_experts_make_up_for_hidden_width(form: str) -> None:
    proto = FORMS[form]()
    arrays = arrays_of(proto)
    stem = arrays["inw"].copy()
    stem[:, HIDDEN // 2 :] = stem[:, : HIDDEN // 2] * 1.5
    graph = mg.lift(changed(proto, inw=stem))
    made = fitted(graph, {group_on(graph, "inw", 1).index: np.arange(HIDDEN // 2)})
    (layer,) = (each for each in made.layers if each.name in ("up", "moe (first kernels)"))
    assert layer.after < 1e-5 < 0.01 < layer.before
