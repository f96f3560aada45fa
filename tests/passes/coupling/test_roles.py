"""What factors do at their operators, on operators where a person knows it."""

import numpy as np
import pytest

from morphgraph.passes.coupling.roles import roles
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

FLAGS = ("makes", "produces", "reads", "keeps", "sums_state", "ties", "adds")
CONV = "net (float[1,3,4,4] x, float[8,3,1,1] w) => (float[1,8,4,4] y) { y = Conv(x, w) }"
DEPTHWISE = """net (float[1,3,4,4] x, float[3,1,1,1] w) => (float[1,3,4,4] y)
    { y = Conv<group=3>(x, w) }"""
RESIDUAL = "net (float[2,5,4] x) => (float[2,5,4] y) { r = Relu(x)  y = Add(r, x) }"
BIAS = "net (float[2,5,4] x, float[4] w) => (float[2,5,4] y) { y = Add(x, w) }"
GATE = "net (float[2,5,4] x) => (float[2,5,4] y) { r = Sigmoid(x)  y = Mul(r, x) }"
NORM = """net (float[2,5,8] x, float[8] w, float[8] b) => (float[2,5,8] y)
    { y = LayerNormalization(x, w, b) }"""
SOFTMAX = "net (float[2,5,8] x) => (float[2,5,8] y) { y = Softmax<axis=-1>(x) }"
EMBEDDING = "net (int64[2,5] x, float[9,6] w) => (float[2,5,6] y) { y = Gather(w, x) }"
RECURRENT = """net (float[5,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[5,1,2,4] y)
    { y = LSTM<hidden_size=4>(x, w, r) }"""


@pytest.mark.parametrize(
    ("text", "value", "axis", "expected"),
    [
        (CONV, "w", 0, "makes produces"),
        (CONV, "w", 1, "reads"),
        (DEPTHWISE, "x", 1, ""),  # its channels come in and go out
        (RESIDUAL, "x", 2, "ties adds"),
        (BIAS, "w", 0, ""),
        (GATE, "x", 2, "ties"),
        (NORM, "w", 0, "reads keeps"),
        (SOFTMAX, "x", 2, "reads keeps"),
        (EMBEDDING, "w", 1, "makes"),  # a table makes channels, and counts no arithmetic
        (RECURRENT, "w", 2, "reads"),
        (RECURRENT, "r", 2, "reads sums_state"),
    ],
)
def test_roles(text: str, value: str, axis: int, expected: str) -> None:
    graph = lift(model_from_text(text))
    couplings = graph.couplings
    last = len(graph.ops) - 1
    dim = graph.dim(value, axis)
    factors = [edge.factor for edge in graph.edges_of(last) if edge.dim == dim]
    role = roles(couplings)
    flags = {flag for flag in FLAGS for factor in factors if getattr(role, flag)[factor]}
    assert flags == set(expected.split())
    assert {int(role.op_index[factor]) for factor in factors} == {last}


def test_a_dim_has_no_role() -> None:
    couplings = lift(model_from_text(NORM)).couplings
    role = roles(couplings)
    dims = np.arange(len(couplings.dims))
    assert (role.op_index[dims] == -1).all()
    assert not any(getattr(role, flag)[dims].any() for flag in FLAGS)


def test_it_is_computed_once() -> None:
    couplings = lift(model_from_text(NORM)).couplings
    assert roles(couplings) is roles(couplings)
