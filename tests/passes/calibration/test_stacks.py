"""In what order experts, and units inside of them, go by what inputs make of them.

Oracles: the original in ONNX Runtime with the kernels of one expert, or of one unit in all experts,
at zero, and with one expert that the router never takes; NumPy's least squares of each expert.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from scipy.stats import kendalltau

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.score import score
from morphgraph.passes.calibration import removal, statistics
from morphgraph.passes.calibration.choices import how_often
from morphgraph.passes.calibration.curves import measure, order_of
from morphgraph.passes.calibration.fused import fused_mixtures
from morphgraph.passes.calibration.statistics import Calibration, calibrate
from tests.calibration.test_processes import Found, together as in_processes
from tests.passes.experts import (
    COMMON,
    EXPERTS,
    FORMS,
    HIDDEN,
    INNER,
    SIDE_BY_SIDE,
    STACKS,
    TAKEN,
    TOKENS,
    arrays_of,
    changed,
    group_on,
    model,
    weights,
)

LARGEST = "largest, then largest of the others"
CHOSEN = [
    "softmax first",
    "softmax of those taken",
    "scores read by number",
    "tuples",
    "biases",
    LARGEST,
]
FUSED = ["relu", "silu", "swiglu"]
DENSE = ["one-hot", *SIDE_BY_SIDE]  # all experts compute every token
CPU = "CPUExecutionProvider"
BATCHES = 40
INPUTS = np.random.default_rng(1).normal(size=(BATCHES, TOKENS, 3)).astype(np.float32)
FEEDS = [{"x": x} for x in INPUTS]


def mixture(form: str) -> onnx.ModelProto:
    """One whose outputs are all that is added up; its experts differ in size and in use."""
    proto = FORMS[form]()
    w2 = arrays_of(proto)["w2"] * np.array([1, 0.3, 2, 1, 0.7], np.float32)[:, None, None]
    mask = np.array([1, 0, -2, -1, 2], np.float32)
    return changed(proto, head=np.eye(HIDDEN, dtype=np.float32), w2=w2, mask=mask)


def gives(proto: onnx.ModelProto) -> Array:
    """For all tokens, ``[BATCHES, TOKENS, HIDDEN]``."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=[CPU])
    return np.stack([session.run(["y"], feed)[0] for feed in FEEDS]).astype(np.float64)


def lost(proto: onnx.ModelProto, **arrays: Array) -> float:
    """The energy of what changes with other weights."""
    return float(np.square(gives(proto) - gives(changed(proto, **arrays))).sum())


def known(graph: ChannelGraph, stops: tuple[int, ...] = ()) -> Calibration:
    return calibrate(graph, FEEDS, stops=lambda group: [w for w in stops if w < group.width])


def without(proto: onnx.ModelProto, **places: Any) -> Arrays:
    """Arrays that are zero at some places."""
    found = {}
    for name, at in places.items():
        found[name] = arrays_of(proto)[name].copy()
        found[name][at] = 0
    return found


@pytest.mark.parametrize("form", CHOSEN + FUSED + DENSE)
def test_an_expert_counts_by_what_it_adds(form: str) -> None:
    """Its bias and its share of every token in it."""
    proto = mixture(form)
    graph = mg.lift(proto)
    experts, found = group_on(graph, "w1", 0), known(graph)
    names = [name for name in ("w2", "b2") if name in arrays_of(proto)]
    energies = [
        lost(proto, **without(proto, **dict.fromkeys(names, expert))) for expert in range(EXPERTS)
    ]
    expected = np.array(energies) / sum(energies)
    np.testing.assert_allclose(found.chosen[experts.index], expected, rtol=1e-4)
    assert order_of(found, experts.index).tolist() == np.argsort(energies).tolist()
    for kind in ("activation", "variance"):
        np.testing.assert_allclose(found.contributions(kind)[experts.channels], expected, rtol=1e-4)


MASKS = [[1, 0, -2, -1, 2], [0, -3, -1, -6, -2], [3, 0, 1.5, -1.5, -3]]


@pytest.mark.parametrize("form", ["softmax first", "softmax of those taken", LARGEST, "relu"])
def test_experts_go_nearly_as_the_mixture_loses_them(form: str) -> None:
    """Others take their tokens, so that it is not quite what they added; the least goes first.

    How often they are chosen says less, and so do their rows of the router.
    """
    said: dict[str, list[float]] = {"data": [], "often": [], "norms": []}
    for numbers in MASKS:
        mask = np.array(numbers, np.float32)
        proto = changed(FORMS[form](), head=np.eye(HIDDEN, dtype=np.float32), mask=mask)
        graph = mg.lift(proto)
        experts, losses = group_on(graph, "w1", 0), []
        for expert in range(EXPERTS):
            never = np.where(np.arange(EXPERTS) == expert, np.float32(-np.inf), mask)
            losses.append(lost(proto, mask=never))
        found = {
            "data": known(graph).chosen[experts.index],
            "often": how_often(graph, FEEDS)[experts.index],
            "norms": score(graph, "l2")[experts.channels],
        }
        assert np.argmin(found["data"]) == np.argmin(losses)
        for name, values in found.items():
            said[name].append(float(kendalltau(losses, values).statistic))
    mean = {name: np.mean(each) for name, each in said.items()}
    assert mean["data"] > 0.7
    assert mean["data"] > 0.1 + max(mean["often"], mean["norms"])


def is_dense(proto: onnx.ModelProto) -> bool:
    return any("marked" in node.output for node in proto.graph.node)


def rows_of(proto: onnx.ModelProto) -> dict[int, FloatArray]:
    """What the units of every expert give for the tokens that take it, times their shares."""
    arrays = {name: array.astype(np.float64) for name, array in arrays_of(proto).items()}
    h = INPUTS.reshape(-1, 3) @ arrays["inw"]
    logits = h @ arrays["gate"] + arrays["mask"]
    best = np.argsort(-logits, axis=1)[:, :TAKEN]
    taken = np.exp(np.take_along_axis(logits, best, axis=1))
    whole = np.exp(logits) if is_dense(proto) else taken  # those that are not taken count, too
    shares = taken / whole.sum(axis=1, keepdims=True)
    found = {}
    for expert in range(EXPERTS):
        token, place = np.nonzero(best == expert)
        bias = arrays["b1"][expert] if "b1" in arrays else 0
        units = np.maximum(h[token] @ arrays["w1"][expert].T + bias, 0)
        found[expert] = units * shares[token, place][:, None]
    return found


def least(proto: onnx.ModelProto, kept: list[int]) -> tuple[float, Array]:
    """What some units of each expert leave at best, and the kernels with which they do."""
    w2, total = arrays_of(proto)["w2"].astype(np.float64), 0.0
    best = np.zeros_like(w2)
    for expert, rows in rows_of(proto).items():
        wanted = rows @ w2[expert].T
        solved = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        best[expert][:, kept] = solved.T
        total += float(np.square(rows[:, kept] @ solved - wanted).sum())
    return total, best.astype(np.float32)


@pytest.mark.parametrize(
    "form", ["softmax first", "softmax of those taken", "tuples", LARGEST, "relu", *DENSE]
)
@pytest.mark.parametrize("damped", [True, False])
def test_units_go_as_each_expert_can_make_up_for_them(
    form: str, damped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least squares of all experts, with the shares of their tokens, one unit after another."""
    if not damped:
        monkeypatch.setattr(removal, "DAMPING", 1e-9)
        monkeypatch.setattr(removal, "FEW_DAMPING", 0.0)
    proto = mixture(form)
    graph = mg.lift(proto)
    inner = group_on(graph, "w2", 2)
    found = known(graph).removals[inner.index]
    alive, left = list(range(INNER)), np.zeros(0)
    while alive:
        ways = {u: least(proto, [k for k in alive if k != u])[0] for u in alive}
        first = min(ways, key=lambda unit: ways[unit])
        assert found.order[INNER - len(alive)] == first
        left = np.append(left, ways[first])
        alive.remove(first)
    if not damped:
        np.testing.assert_allclose(found.losses / found.losses[-1], left / left[-1], rtol=1e-3)


@pytest.mark.parametrize("form", ["softmax first", "relu", *DENSE])
def test_what_units_cost_the_outputs_is_measured_with_kernels_that_make_up_for_them(
    form: str,
) -> None:
    proto = mixture(form)
    graph = mg.lift(proto)
    inner = group_on(graph, "w2", 2)
    found = known(graph, stops=(2, 4))
    points = measure(found, FEEDS, {inner.index: (2, 4)})[inner.index]
    y = gives(proto)
    for width, error in points.items():
        kept = np.sort(found.removals[inner.index].order[INNER - width :])
        gone = np.setdiff1d(np.arange(INNER), kept)
        best = _share(lost(proto, w2=least(proto, kept.tolist())[1]), y)
        sliced = _share(lost(proto, **without(proto, w2=np.s_[:, :, gone])), y)
        assert best < error < 1.05 * best < 0.9 * sliced


@pytest.mark.parametrize("form", CHOSEN + FUSED + DENSE)
def test_units_of_very_many_experts_go_by_what_they_give(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where covariances of all experts do not fit, nothing takes over, and curves say so.

    What experts of one token give does not cancel, so that the mixture loses nearly the same.
    """
    proto = mixture(form)
    graph = mg.lift(proto)
    inner = group_on(graph, "w2", 2)
    energies = [
        sum(lost(proto, **without(proto, w2=np.s_[expert, :, unit])) for expert in range(EXPERTS))
        for unit in range(INNER)
    ]
    at_once = [lost(proto, **without(proto, w2=np.s_[:, :, unit])) for unit in range(INNER)]
    assert kendalltau(energies, at_once).statistic > 0.8
    together = known(graph).contributions("activation")[inner.channels]
    monkeypatch.setattr(statistics, "MOST_TOGETHER", 0)
    found = known(graph, stops=(4,))
    assert found.removals[inner.index].order.tolist() == np.argsort(energies).tolist()
    given = found.contributions("activation")[inner.channels]
    np.testing.assert_allclose(given, together, rtol=1e-4)
    np.testing.assert_allclose(given / given.sum(), energies / np.sum(energies), rtol=1e-4)
    error = measure(found, FEEDS, {inner.index: (4,)})[inner.index][4]
    gone = np.argsort(energies)[:2]
    expected = _share(lost(proto, **without(proto, w2=np.s_[:, :, gone])), gives(proto))
    assert error == pytest.approx(expected, rel=1e-4)


def _share(energy: float, outputs: Array) -> float:
    """Of the outputs' variance, as curves have it."""
    return energy / float(np.square(outputs - outputs.mean((0, 1))).sum())


@pytest.mark.parametrize("form", ["softmax first", "silu", *DENSE])
def test_how_often_is_not_asked_where_it_is_known_what_experts_give(form: str) -> None:
    graph = mg.lift(mixture(form))
    assert how_often(graph, iter(()), known=known(graph).chosen) == {}


@pytest.mark.parametrize("form", ["softmax first", "biases", "silu", "one-hot"])
def test_two_processes_see_what_one_sees(form: str) -> None:
    """Also where one has no batch, and so counts nothing of any expert."""
    graph = mg.lift(mixture(form))

    def work(processes: Processes) -> Found:
        feeds = processes.share(iter(FEEDS[:1] if form == "biases" else FEEDS))
        found = calibrate(graph, feeds, stops=lambda group: [], processes=processes)
        orders = {k: each.order.tolist() for k, each in found.removals.items()}
        return orders, [], {str(k): each for k, each in found.chosen.items()}

    (first, _, given), *others = [work(ALONE), *in_processes(2, work)]
    for orders, _, chosen in others:
        assert orders == first
        for name, each in chosen.items():
            np.testing.assert_allclose(each, given[name], rtol=1e-6)


def test_kernels_that_are_no_numbers_are_named() -> None:
    proto = mixture("softmax first")
    w2 = arrays_of(proto)["w2"].copy()
    w2[3, 0, 0] = np.nan
    with pytest.raises(mg.ModelError, match="node 'down' sees or gives no finite numbers"):
        known(mg.lift(changed(proto, w2=w2)))


@pytest.mark.parametrize("biased", [True, False])
def test_a_mixture_in_one_node_shows_more_experts_and_units_than_features(biased: bool) -> None:
    """NumPy's units of each token's experts, times its shares."""
    experts, inner = 2 * HIDDEN + 3, HIDDEN + 5
    shapes = {"w1": (experts, inner, HIDDEN), "b1": (experts, inner)}
    shapes |= {"w2": (experts, HIDDEN, inner)} | ({"b2": (experts, HIDDEN)} if biased else {})
    arrays = weights(6, **(COMMON | {"gate": (HIDDEN, experts)}), **shapes)
    operands = ["h", "router", *shapes]
    options: dict[str, Any] = {"k": 3, "activation_type": "relu", "normalize_routing_weights": 1}
    node = helper.make_node("MoE", operands, ["m"], "moe", domain="com.microsoft", **options)
    graph = mg.lift(model([node], arrays))
    fused = fused_mixtures(graph.model, graph.couplings.input_independent)["moe"]
    h = INPUTS.reshape(-1, 3) @ arrays["inw"]
    logits = h @ arrays["gate"]
    best = np.argsort(-logits, axis=1)[:, :3]
    taken = np.exp(np.take_along_axis(logits, best, axis=1))
    shares = taken / taken.sum(axis=1, keepdims=True)
    found = {expert: seen for expert, *seen in fused.shown().seen([h, logits])}
    assert sorted(found) == np.unique(best).tolist()
    for expert, (there, share, units) in found.items():
        token, place = np.nonzero(best == expert)
        assert there.tolist() == token.tolist()
        np.testing.assert_allclose(share, shares[token, place], rtol=1e-5, atol=1e-7)
        plain = np.maximum(h[token] @ arrays["w1"][expert].T + arrays["b1"][expert], 0)
        wanted = plain * shares[token, place][:, None]
        np.testing.assert_allclose(units, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_of_a_mixture_in_one_node_may_stand_on_several_axes() -> None:
    arrays = weights(6, **(COMMON | {"head": (HIDDEN, HIDDEN)}), **STACKS, b1=(EXPERTS, INNER))
    arrays |= {"apart": np.array([3, -1, HIDDEN]), "flat": np.array([-1, HIDDEN])}
    options: dict[str, Any] = {"k": TAKEN, "activation_type": "gelu"}
    nodes = [
        helper.make_node("Reshape", ["h", "apart"], ["tokens"]),
        helper.make_node(
            "MoE",
            ["tokens", "router", "w1", "b1", "w2"],
            ["mixed"],
            "moe",
            domain="com.microsoft",
            **options,
        ),
        helper.make_node("Reshape", ["mixed", "flat"], ["m"]),
    ]
    proto = changed(model(nodes, arrays), head=np.eye(HIDDEN, dtype=np.float32))
    graph = mg.lift(proto)
    energies = [lost(proto, **without(proto, w2=expert)) for expert in range(EXPERTS)]
    given = known(graph).chosen[group_on(graph, "w1", 0).index]
    np.testing.assert_allclose(given, np.array(energies) / sum(energies), rtol=1e-4)
