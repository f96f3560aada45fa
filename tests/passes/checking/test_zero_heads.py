"""Networks whose last layer starts at zero: outputs tell nothing, values inside tell all."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.checking import verify as verifying
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.testing import model_from_text

BODY = """net (float[1,3,6,6] x, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[5,8] w3,
    float[5] b3) => (float[1,5] y) <int64[2] axes = {2,3}> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, w2)
    s = Add(r, c)  m = ReduceMean<keepdims=0>(s, axes)
"""
HEADS = {
    "gemm": "y = Gemm<transB=1>(m, w3, b3) }",
    "scaled": "z = Gemm<transB=1>(m, w3)  y = Mul(z, b3) }",
    "probabilities": "z = Gemm<transB=1>(m, w3, b3)  y = Softmax(z) }",
}


def checked(
    text: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[VerifyReport, list[int]]:
    """The report of a large network's check, and how many results each of its runs gave."""
    model = model_from_text(text)
    zeros = ir.Tensor(np.zeros((5, 8), np.float32), name="w3")
    model.graph.initializers["w3"].const_value = zeros
    graph = mg.lift(model)
    plan = mg.plan(graph, budget={"flops": "50%"}, round_to=1)
    small = mg.apply(graph, plan, verify=False)
    if wrong:
        kernel = small.graph.initializers["w2"]
        assert kernel.const_value is not None
        rolled = np.roll(kernel.const_value.numpy(), 1, axis=1)
        kernel.const_value = ir.Tensor(rolled, name="w2")
    runs: list[int] = []

    def counted(model: ir.Model, feeds: Mapping[str, Array]) -> Arrays:
        found = run(model, feeds)
        runs.append(len(found))
        return found

    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    return verifying.verify(graph, plan, small, runner=counted), runs


@pytest.mark.parametrize("head", HEADS)
def test_values_inside_come_from_the_runs_of_the_outputs(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, runs = checked(BODY + HEADS[head], wrong=False, monkeypatch=monkeypatch)
    assert report.ok
    assert report.values is not None
    assert report.sensitivity > 0.01
    assert len(runs) == 4
    monkeypatch.setattr(verifying, "_is_of_zeros", lambda _: False)
    again, runs = checked(BODY + HEADS[head], wrong=False, monkeypatch=monkeypatch)
    assert again == report
    assert len(runs) == 7  # one with other channels masked: they move the outputs no more


@pytest.mark.parametrize("head", HEADS)
def test_a_wrong_kernel_is_found_behind_a_zero_head(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = checked(BODY + HEADS[head], wrong=True, monkeypatch=monkeypatch)
    assert not report.ok
    assert report.worst.relative == 0
