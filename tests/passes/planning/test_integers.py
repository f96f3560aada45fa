"""Budgets on weights of networks whose kernels are integers, which do not count."""

import pytest

import morphgraph as mg
from morphgraph.errors import ArgumentError, MorphWarning
from morphgraph.testing import model_from_text

HEAD = '<ir_version: 9, opset_import: ["": 20]> '
BOTH = """net (float[1,6] x, int8[6,32] a, int8[32,3] b, float s) => (float[1,3] y) {
    k = DequantizeLinear(a, s)  p = MatMul(x, k)  r = Relu(p)
    l = DequantizeLinear(b, s)  y = MatMul(r, l)
}"""


def test_a_share_of_no_parameters_is_refused() -> None:
    graph = mg.lift(model_from_text(HEAD + BOTH))
    assert mg.cost(graph, "params").total == 0
    for kind in ("params", "body_params"):
        with pytest.raises(ArgumentError, match=rf"{kind}=50%: the network has no .*integers"):
            mg.plan(graph, {kind: "50%"})
    assert mg.plan(graph, {"flops": "50%"}, round_to=1).groups


def test_integers_that_do_not_count_are_told() -> None:
    text = BOTH.replace("float s)", "float s, float[32] c)").replace("Relu(p)", "Add(p, c)")
    graph = mg.lift(model_from_text(HEAD + text))
    with pytest.warns(MorphWarning, match="288 weights are stored as integers.* 32 others do"):
        mg.plan(graph, {"params": "50%"}, round_to=1)
