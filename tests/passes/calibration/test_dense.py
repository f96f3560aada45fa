"""Mixtures with gates that compute all experts, as exporters write them."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import morphgraph as mg
from morphgraph.arrays import Arrays
from morphgraph.graph import ChannelGraph
from morphgraph.passes.calibration.dense import Dense, dense_products, shares_of
from morphgraph.passes.refit.refit import refit
from tests.passes.experts import (
    COMMON,
    EXPERTS,
    HIDDEN,
    INNER,
    TAKEN,
    TOKENS,
    group_on,
    model,
    weights,
)

HALF = HIDDEN // 2


def gated(between: str = "Sigmoid", repeated: bool = False) -> onnx.ModelProto:
    """Gates and units of one product; ``repeated``: half of the features are the others, scaled."""
    node: Any = helper.make_node
    arrays = weights(3, **COMMON, w1=(EXPERTS, HIDDEN, 2 * INNER), w2=(EXPERTS, INNER, HIDDEN))
    if repeated:
        arrays["inw"][:, HALF:] = arrays["inw"][:, :HALF] * np.float32(1.5)
    arrays |= {
        "k": np.array([TAKEN]),
        "last": np.array([-1]),
        "inside": np.array([1]),
        "first": np.array([0]),
        "depth": np.array([EXPERTS]),
        "off_on": np.array([0, 1], np.float32),
        "repeated": np.array([EXPERTS, TOKENS, HIDDEN]),
    }
    nodes = [
        node("Softmax", ["router"], ["p"], axis=-1),
        node("TopK", ["p", "k"], ["best", "taken"], axis=-1),
        node("OneHot", ["taken", "depth", "off_on"], ["marked"], axis=-1),
        node("Unsqueeze", ["best", "last"], ["share"]),
        node("Mul", ["marked", "share"], ["placed"]),
        node("ReduceSum", ["placed", "inside"], ["shares"], keepdims=0),
        node("Expand", ["h", "repeated"], ["each"]),
        node("MatMul", ["each", "w1"], ["both"], name="up"),
        node("Split", ["both"], ["g", "u"], axis=-1, num_outputs=2),
        node(between, ["g"], ["open"]),
        node("Mul", ["g", "open"], ["a"]),
        node("Mul", ["a", "u"], ["r"]),
        node("MatMul", ["r", "w2"], ["d"], name="down"),
        node("Transpose", ["shares"], ["turned"], perm=[1, 0]),
        node("Unsqueeze", ["turned", "last"], ["by_expert"]),
        node("Mul", ["d", "by_expert"], ["scaled"]),
        node("ReduceSum", ["scaled", "first"], ["m"], keepdims=0),
    ]
    return model(nodes, arrays)


def products(graph: ChannelGraph) -> dict[str, Dense]:
    return dense_products(graph.model, graph.couplings.input_independent)


def test_shares_are_found_behind_gates_and_the_next_product() -> None:
    graph = mg.lift(gated())
    found = products(graph)
    assert list(found) == ["up", "down"]
    for each in found.values():
        mixed = shares_of(graph.model, found, each)
        assert mixed is not None
        assert mixed.shares.name == "by_expert"
        assert mixed.given.name == "d"


def test_shares_are_not_known_where_somebody_sees_units_of_all_experts() -> None:
    proto = gated()
    proto.graph.output.append(helper.make_tensor_value_info("open", TensorProto.FLOAT, None))
    graph = mg.lift(proto)
    found = products(graph)
    assert shares_of(graph.model, found, found["up"]) is None
    assert shares_of(graph.model, found, found["down"]) is not None


def test_shares_are_not_known_where_units_of_a_place_mix() -> None:
    """A softmax over units: whoever is without a share changes nothing, but errors are others."""
    graph = mg.lift(gated("Softmax"))
    found = products(graph)
    assert shares_of(graph.model, found, found["up"]) is None


def feeds(count: int, seed: int) -> list[Arrays]:
    shape = (count, TOKENS, 3)
    return [{"x": x} for x in np.random.default_rng(seed).normal(size=shape).astype(np.float32)]


@pytest.mark.parametrize("experts", [EXPERTS, 3])
def test_gates_and_units_make_up_for_hidden_width_that_repeats(experts: int) -> None:
    """Also where experts go, and other shares count; judged by NumPy on tokens nobody has seen."""
    graph = mg.lift(gated(repeated=True))
    hidden, gate = group_on(graph, "inw", 1), group_on(graph, "w1", 0)
    keep = {hidden.index: np.arange(HALF), gate.index: np.arange(experts)}
    made = refit(graph, keep, feeds(60, 1), feeds(20, 2))
    (layer,) = (each for each in made.layers if each.name == "up")
    assert layer.after < 1e-5 < 0.01 < layer.before
    whole, stem, found = (
        network.graph.initializers[name].const_value.numpy()
        for network, name in ((graph.model, "w1"), (graph.model, "inw"), (made.model, "w1"))
    )
    tokens = feeds(1, 3)[0]["x"] @ stem
    wanted = np.einsum("th,ehi->tei", tokens, whole[:experts])
    given = np.einsum("th,ehi->tei", tokens[:, :HALF], found)
    assert np.abs(given - wanted).max() < 1e-2 * np.abs(wanted).max()
